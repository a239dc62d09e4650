"""The event loop beside a hot path that waits by itself: nobody waits for anybody."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import uvloop
from numba import njit

from engine.turns import Turns
from engine.waiting import (
    NO_DESCRIPTOR,
    loop_descriptor,
    new_alarm,
    new_descriptors,
    set_alarm,
    wait_for,
)

LONG_NS = 20_000_000_000
SOON_S = 5.0


@njit("int64(int64[::1], int64)", nogil=True)
def sleep_on(descriptors, wait_ns):  # type: ignore[no-untyped-def]
    return wait_for(descriptors.ctypes.data, len(descriptors), wait_ns)


@njit("int64(int64, int64)", nogil=True)
def set_to(alarm, at_ns):  # type: ignore[no-untyped-def]
    return set_alarm(alarm, at_ns)


def happened(descriptors: np.ndarray) -> list[bool]:
    return [bool(number >> 48) for number in descriptors.tolist()]


def test_a_wait_tells_who_has_something_and_ends_in_time() -> None:
    ends = [os.pipe() for _ in range(2)]
    try:
        descriptors = new_descriptors(ends[0][0], [ends[1][0]])
        begun = time.monotonic_ns()
        assert sleep_on(descriptors, 30_000_000) == 0
        assert time.monotonic_ns() - begun >= 30_000_000
        assert happened(descriptors) == [False, False]
        os.write(ends[1][1], b"x")
        assert sleep_on(descriptors, LONG_NS) == 1
        assert happened(descriptors) == [False, True]
        os.write(ends[0][1], b"x")
        assert sleep_on(descriptors, LONG_NS) == 2
        os.read(ends[1][0], 1)
        assert sleep_on(descriptors, LONG_NS) == 1
        assert happened(descriptors) == [True, False]
    finally:
        for pair in ends:
            for fd in pair:
                os.close(fd)


def test_an_alarm_ends_a_wait_at_its_time_until_it_is_set_anew() -> None:
    alarm = new_alarm()
    try:
        descriptors = new_descriptors(NO_DESCRIPTOR, [alarm])
        assert sleep_on(descriptors, 1_000_000) == 0, "one that was never set"
        at = time.monotonic_ns() + 30_000_000
        assert set_to(alarm, at) == 0
        for _ in range(2):  # it goes on telling
            assert sleep_on(descriptors, LONG_NS) == 1
            assert time.monotonic_ns() >= at
            assert happened(descriptors) == [False, True]
        set_to(alarm, time.monotonic_ns() + LONG_NS)
        assert sleep_on(descriptors, 1_000_000) == 0, "put off"
        set_to(alarm, 1)
        assert sleep_on(descriptors, LONG_NS) == 1, "a time that has passed"
    finally:
        os.close(alarm)
    assert set_to(alarm, at) < 0, "closed"


def test_a_descriptor_that_is_not_there_never_happens() -> None:
    descriptors = new_descriptors(NO_DESCRIPTOR, [])
    assert sleep_on(descriptors, 1_000_000) == 0
    assert loop_descriptor(object()) == NO_DESCRIPTOR  # type: ignore[arg-type]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def make_loop(request: pytest.FixtureRequest) -> Any:
    return request.param


def woken(make_loop: Callable[[], Any], act: Callable[[Any, asyncio.Event], Any]) -> int:
    """How often the hot path slept until ``act`` had stopped the loop, each sleep far too long."""
    sleeps = 0

    async def run() -> None:
        nonlocal sleeps
        loop = asyncio.get_running_loop()
        descriptors = new_descriptors(loop_descriptor(loop), [])
        stopped = asyncio.Event()

        def drain(may_sleep: bool) -> bool:
            nonlocal sleeps
            if may_sleep:
                sleep_on(descriptors, LONG_NS)
                sleeps += 1
            return may_sleep

        turns = Turns(
            loop, drain, on_slow_poll=lambda: None, on_timer=lambda: None, timer_s=1_000.0
        )
        turns.start(act(loop, stopped) or [])
        await turns.run(stopped, 0.0)
        turns.stop()

    begun = time.monotonic()
    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(run())
    assert time.monotonic() - begun < SOON_S
    return sleeps


def test_another_thread_wakes_the_hot_path(make_loop: Any) -> None:
    def act(loop: Any, stopped: asyncio.Event) -> None:
        threading.Timer(0.2, loop.call_soon_threadsafe, [stopped.set]).start()

    assert woken(make_loop, act) < 20


def test_a_signal_wakes_the_hot_path(make_loop: Any) -> None:
    def act(loop: Any, stopped: asyncio.Event) -> None:
        loop.add_signal_handler(signal.SIGUSR2, stopped.set)
        threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGUSR2]).start()

    assert woken(make_loop, act) < 20


def test_what_comes_at_a_reader_s_descriptor_wakes_the_hot_path(make_loop: Any) -> None:
    end, other = os.pipe()

    def act(loop: Any, stopped: asyncio.Event) -> list[tuple[int, Callable[[], object]]]:
        threading.Timer(0.2, os.write, [other, b"x"]).start()

        def read() -> None:
            os.read(end, 1)
            stopped.set()

        return [(end, read)]

    try:
        assert woken(make_loop, act) < 20
    finally:
        os.close(end)
        os.close(other)


def test_what_one_round_makes_ready_is_done_before_the_next_sleep(make_loop: Any) -> None:
    def act(loop: Any, stopped: asyncio.Event) -> None:
        async def work() -> None:
            await asyncio.to_thread(time.sleep, 0.1)
            await asyncio.gather(asyncio.sleep(0), asyncio.sleep(0))
            stopped.set()

        tasks.append(loop.create_task(work()))

    tasks: list[asyncio.Task[None]] = []
    assert woken(make_loop, act) < 20


def test_timers_have_their_turn_between_sleeps(make_loop: Any) -> None:
    ticks = polls = 0

    async def run() -> None:
        nonlocal ticks, polls
        loop = asyncio.get_running_loop()
        descriptors = new_descriptors(loop_descriptor(loop), [])
        stopped = asyncio.Event()

        def tick() -> None:
            nonlocal ticks
            ticks += 1
            if ticks == 5:
                stopped.set()

        def poll() -> None:
            nonlocal polls
            polls += 1

        def drain(may_sleep: bool) -> bool:
            if may_sleep:
                sleep_on(descriptors, 2_000_000)
            return may_sleep

        turns = Turns(
            loop,
            drain,
            on_slow_poll=poll,
            on_timer=tick,
            timer_s=0.02,
        )
        turns.start([])
        await turns.run(stopped, 0.0)
        turns.stop()

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(run())
    assert (ticks, polls > 0) == (5, True)
