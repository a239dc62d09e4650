"""The control of what waking a thread takes."""

from __future__ import annotations

import ctypes
import os
import threading

import numpy as np

from engine.wakes import be_woken, measure_wakes, wake

MS = 1_000_000


def test_a_thread_runs_after_it_was_woken() -> None:
    libc = ctypes.CDLL(None)
    read, write = (ctypes.cast(f, ctypes.c_void_p).value for f in (libc.read, libc.write))
    called, back, ran = (np.zeros(20, dtype=np.int64) for _ in range(3))
    descriptor = os.eventfd(0, os.EFD_SEMAPHORE)
    counter, one = np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64)
    woken = threading.Thread(target=be_woken, args=(read, descriptor, ran, counter))
    woken.start()
    wake(write, descriptor, called, back, 2 * MS, one)
    woken.join()
    os.close(descriptor)
    assert (called < back).all()
    assert (called < ran).all()
    assert (np.diff(called) >= 2 * MS).all(), "it has time to fall asleep"
    assert counter[0] == 1


def test_more_wakes_than_the_thread_can_follow_are_all_counted() -> None:
    wakes = measure_wakes(200, gap_ns=0)
    assert wakes.wakes == 200
    assert 0 < wakes.call_p50_ns <= wakes.call_p99_ns
    assert 0 < wakes.run_p50_ns <= wakes.run_p99_ns
