"""The shadow's own process: when it answers what has gathered."""

from __future__ import annotations

import numpy as np
import pytest

from engine import shadow_ring as ring
from engine.shadow_worker import GATHER_NS, GATHERED_SHARE, Gathering

ROWS = 32
MANY = ROWS // GATHERED_SHARE


@pytest.fixture
def area() -> ring.ShadowRing:
    made, _ = ring.ShadowRing.make(ROWS, 4, 3)
    return made


def request(area: ring.ShadowRing, count: int = 1) -> None:
    x = np.zeros((1, 4), dtype=np.float32)
    for _ in range(count):
        assert ring.push_request(area.header, area.requests, area.inputs, 1, 0, 1, 0, x)


def answered(area: ring.ShadowRing, gathering: Gathering, now_ns: int) -> int:
    """How many are answered in a row at a time."""
    row, x = np.zeros(ring.META, dtype=np.int64), np.zeros((1, 4), dtype=np.float32)
    count = 0
    while gathering.enough(now_ns):
        assert ring.pop_request(area.header, area.requests, area.inputs, row, x)
        count += 1
    return count


def test_one_request_waits_for_others_and_no_longer_than_it_may(area: ring.ShadowRing) -> None:
    gathering = Gathering(area)
    assert answered(area, gathering, 1) == 0
    request(area)
    assert answered(area, gathering, 1_000) == 0
    request(area)
    assert answered(area, gathering, 1_000 + GATHER_NS - 1) == 0
    assert answered(area, gathering, 1_000 + GATHER_NS) == 2
    request(area)
    assert answered(area, gathering, 1_001 + GATHER_NS) == 0, "a new one, which waits anew"
    assert answered(area, gathering, 1_001 + 2 * GATHER_NS) == 1


def test_many_wait_for_no_more(area: ring.ShadowRing) -> None:
    gathering = Gathering(area)
    request(area, MANY - 1)
    assert answered(area, gathering, 5) == 0
    request(area)
    assert answered(area, gathering, 6) == MANY
    request(area, ROWS)
    assert answered(area, gathering, 7) == ROWS


def test_a_ring_of_the_fewest_rows_is_answered_too() -> None:
    small, _ = ring.ShadowRing.make(1, 4, 3)
    gathering = Gathering(small)
    request(small)
    assert answered(small, gathering, 1) == 1
