"""How much the host itself interrupts a busy program: the control beside every latency figure.

A loop that does nothing but read the clock should see only its own cost between two readings.
What it sees beyond that — interrupts, other programs, a hypervisor — no program on this host
can be faster than at that quantile.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Final

import msgspec

from engine.latency import AT_COUNT, AT_MAX, new_counts, quantile, record

DEFAULT_SECONDS: Final = 1.0
MAX_SECONDS: Final = 60.0


class Jitter(msgspec.Struct, frozen=True):
    """Gaps between consecutive clock readings of a spinning loop, in nanoseconds.

    ``preempted`` is how often the kernel took the core away meanwhile. ``p50_ns`` is the cost of
    the loop itself, well under a microsecond on an idle core.
    """

    seconds: float
    readings: int
    p50_ns: int
    p99_ns: int
    p999_ns: int
    max_ns: int
    preempted: int


def measure_jitter(
    seconds: float = DEFAULT_SECONDS, clock: Callable[[], int] = time.perf_counter_ns
) -> Jitter:
    """Spin for ``seconds`` on this thread and say what got in the way.

    Parameters
    ----------
    seconds : float
        How long, above 0 and at most `MAX_SECONDS`.
    clock : callable
        A monotonic clock in nanoseconds.
    """
    assert 0 < seconds <= MAX_SECONDS
    counts = new_counts()
    preempted = _preemptions()
    last = clock()
    stop = last + int(seconds * 1e9)
    while last < stop:
        now = clock()
        record(counts, now - last)
        last = now
    return Jitter(
        seconds=seconds,
        readings=int(counts[AT_COUNT]),
        p50_ns=int(quantile(counts, 0.5)),
        p99_ns=int(quantile(counts, 0.99)),
        p999_ns=int(quantile(counts, 0.999)),
        max_ns=int(counts[AT_MAX]),
        preempted=_preemptions() - preempted,
    )


def _preemptions() -> int:
    thread = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)
    return resource.getrusage(thread).ru_nivcsw
