"""The clock of kernels is the clock of Python."""

from __future__ import annotations

import time

from numba import njit

from feeds.monotonic import monotonic_ns


def test_it_tells_the_time_between_two_looks_at_pythons() -> None:
    @njit("int64()")
    def now() -> int:
        found: int = monotonic_ns()
        return found

    for _ in range(100):
        before, found, after = time.monotonic_ns(), now(), time.monotonic_ns()
        assert before <= found <= after
