"""Arrays by their addresses: the kernel sees the very memory."""

from __future__ import annotations

import numpy as np
import pytest
from numba import carray, njit

from engine.handles import FIELDS, new_handles, pointer, set_handle


@njit("float64(int64[::1])")
def change(h):  # type: ignore[no-untyped-def]
    """Sum of the second array; the first one is counted up."""
    numbers = carray(pointer(h[0], np.int64), (h[1], h[2]))
    values = carray(pointer(h[FIELDS], np.float32), (h[FIELDS + 1],))
    numbers[1, 2] += 1
    return np.float64(values.sum())


def test_a_kernel_reads_and_writes_them_in_place() -> None:
    numbers = np.zeros((3, 4), dtype=np.int64)
    values = np.arange(5, dtype=np.float32)
    handles = new_handles([numbers, values])
    assert change(handles) == 10.0
    assert numbers.tolist()[1] == [0, 0, 1, 0]
    assert numbers.sum() == 1
    longer = np.ones(7, dtype=np.float32)
    set_handle(handles, 1, longer)
    assert change(handles) == 7.0


def test_what_is_not_in_c_order_has_no_handle() -> None:
    with pytest.raises(AssertionError):
        new_handles([np.zeros((3, 4))[:, 1:]])
