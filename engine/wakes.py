# Hot path: `wake` and `be_woken`, free @njit functions.
"""How long the host takes to wake a thread: a control beside every figure of a live engine.

Who sends by ZeroMQ wakes its thread, by a write to an eventfd, and is held up until that system
call is back; the message goes on once the thread runs. On a machine of one's own both take a
microsecond or two. A virtual one may have to leave to its host for it, and no engine that sends
to a thread that sleeps is faster than that.

Source: eventfd(2), read(2), write(2).
"""

from __future__ import annotations

import ctypes
import os
import threading
from typing import Any, Final

import msgspec
import numpy as np
from numba import njit
from numba.extending import intrinsic

from feeds.c_functions import INT, WORD, c_function
from feeds.monotonic import monotonic_ns

DEFAULT_WAKES: Final = 500
GAP_NS: Final = 1_000_000  # between two, in which the thread falls asleep
_WORD_BYTES: Final = 8  # of an eventfd's counter


class Wakes(msgspec.Struct, frozen=True):
    """What waking a thread took, in nanoseconds.

    ``call`` is the system call that wakes it, as the caller sees it; ``run`` is from there until
    the thread runs.
    """

    wakes: int
    call_p50_ns: int
    call_p99_ns: int
    run_p50_ns: int
    run_p99_ns: int


@intrinsic
@c_function(WORD, [INT, WORD, WORD])
def _move(typingctx: Any, function: Any, descriptor: Any, at: Any, n_bytes: Any) -> Any:
    """``read`` or ``write`` at a descriptor, of so many bytes at an address."""


@njit("void(int64, int64, int64[::1], int64[::1], int64, int64[::1])", cache=True, nogil=True)
def wake(write, descriptor, called, back, gap_ns, one):  # type: ignore[no-untyped-def]
    """Wake a thread as often as ``called`` is long, one ``gap_ns`` after the other.

    Parameters
    ----------
    write : int
        Address of the C function.
    descriptor : int
        An eventfd.
    called, back : ndarray of int64
        Out: monotonic times before and behind each call.
    gap_ns : int
    one : ndarray of int64, shape (1,)
        What is written.
    """
    for i in range(len(called)):
        moment = monotonic_ns() + gap_ns
        while monotonic_ns() < moment:
            pass
        called[i] = monotonic_ns()
        _move(write, descriptor, one.ctypes.data, _WORD_BYTES)
        back[i] = monotonic_ns()


@njit("void(int64, int64, int64[::1], int64[::1])", cache=True, nogil=True)
def be_woken(read, descriptor, ran, counter):  # type: ignore[no-untyped-def]
    """Sleep until woken, as often as ``ran`` is long, and write down when it was.

    Parameters
    ----------
    read : int
        Address of the C function.
    descriptor : int
        An eventfd.
    ran : ndarray of int64
        Out: monotonic times.
    counter : ndarray of int64, shape (1,)
        What is read goes there.
    """
    for i in range(len(ran)):
        _move(read, descriptor, counter.ctypes.data, _WORD_BYTES)
        ran[i] = monotonic_ns()


def measure_wakes(wakes: int = DEFAULT_WAKES, gap_ns: int = GAP_NS) -> Wakes:
    """Wake a thread so often, from this one, and say what it took.

    Parameters
    ----------
    wakes : int
        Above 0.
    gap_ns : int
        Long enough for the thread to fall asleep again.
    """
    assert wakes > 0
    libc = ctypes.CDLL(None)
    read, write = (ctypes.cast(f, ctypes.c_void_p).value for f in (libc.read, libc.write))
    called, back, ran = (np.zeros(wakes, dtype=np.int64) for _ in range(3))
    # A semaphore: two writes before one read are still two reads.
    descriptor = os.eventfd(0, os.EFD_SEMAPHORE)
    try:
        woken = threading.Thread(
            target=be_woken, args=(read, descriptor, ran, np.zeros(1, dtype=np.int64)), daemon=True
        )
        woken.start()
        wake(write, descriptor, called, back, gap_ns, np.ones(1, dtype=np.int64))
        woken.join()
    finally:
        os.close(descriptor)
    skip = wakes // 10  # the thread may not have slept yet
    call, run = (np.percentile((end - called)[skip:], (50, 99)) for end in (back, ran))
    return Wakes(wakes, *(round(float(ns)) for ns in (*call, *run)))
