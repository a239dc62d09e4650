"""The shadow's own process: when it answers what has gathered."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from engine import shadow_ring as ring

ROWS = 32
MANY = 8
LOOK_NS = 1_000_000
MOST_NS = 100_000_000
LONG_NS = 20_000_000_000


@pytest.fixture
def area() -> ring.ShadowRing:
    made, _ = ring.ShadowRing.make(ROWS, 4, 3)
    return made


def request(area: ring.ShadowRing, count: int = 1) -> None:
    x = np.zeros((1, 4), dtype=np.float32)
    for _ in range(count):
        assert ring.push_request(area.header, area.requests, area.inputs, 1, 0, 1, 0, x)


def gathered(area: ring.ShadowRing, most_ns: int) -> tuple[int, int]:
    """How many, and after how many nanoseconds."""
    begun = time.monotonic_ns()
    found = int(ring.gather(area.header, MANY, LOOK_NS, most_ns))
    return found, time.monotonic_ns() - begun


def test_one_request_waits_for_others_and_no_longer_than_it_may(area: ring.ShadowRing) -> None:
    request(area)
    later = threading.Timer(MOST_NS / 4e9, request, [area, 2])
    later.start()
    found, took_ns = gathered(area, MOST_NS)
    later.join()
    assert found == 3
    assert took_ns >= MOST_NS


def test_many_wait_for_no_more(area: ring.ShadowRing) -> None:
    request(area, MANY)
    found, took_ns = gathered(area, LONG_NS)
    assert found == MANY
    assert took_ns < LONG_NS / 2
    request(area, MANY)
    assert gathered(area, LONG_NS)[0] == 2 * MANY


def test_where_nothing_comes_it_says_so_and_that_it_is_there(area: ring.ShadowRing) -> None:
    found, took_ns = gathered(area, MOST_NS)
    assert (found, took_ns >= MOST_NS) == (0, True)
    assert time.monotonic_ns() - area.header[ring.ALIVE_NS] < LONG_NS
    assert area.header[ring.ALIVE_NS] > 0


def test_a_stop_ends_the_wait(area: ring.ShadowRing) -> None:
    request(area)

    def stop() -> None:
        area.header[ring.STOP] = 1

    threading.Timer(0.1, stop).start()
    found, took_ns = gathered(area, LONG_NS)
    assert found == 0
    assert took_ns < LONG_NS / 2
