"""Throttles, collar and stuck scores, as signals pass by."""

from __future__ import annotations

import numpy as np
import pytest

from engine import controls
from engine.controls import ControlsConfig, check_controls, stuck_output
from engine.failover import FailoverConfig
from engine.trust import (
    CHECK_STUCK_OUTPUT,
    REASON_COLLAR,
    REASON_REPEATED,
    REASON_THROTTLED,
)

SECOND = 1_000_000_000


class Guard:
    def __init__(self, failover: FailoverConfig | None = None, **settings: float) -> None:
        self.limits = controls.limits(ControlsConfig(**settings), failover or FailoverConfig())
        self.guards, self.scores = controls.new_guards(1, 3)

    def check(self, outputs: list[float], at_ns: int = 0) -> int:
        scores = np.array(outputs, dtype=np.float32)
        best = int(scores.argmax())
        return int(
            check_controls(scores, best, at_ns, self.guards[0], self.scores[0], *self.limits)
        )


def test_by_default_everything_passes() -> None:
    guard = Guard()
    assert {guard.check([n % 7, 1e30, -1e30], 0) for n in range(5_000)} == {0}


def test_a_message_throttle_lets_a_second_s_signals_through_and_refills_with_time() -> None:
    guard = Guard(max_signals_per_s=10)
    start = 5 * SECOND
    passed = [guard.check([0, 0, n], start + n) for n in range(50)]
    assert passed == [0] * 10 + [REASON_THROTTLED] * 40
    later = [guard.check([0, 0, 1], start + 50 + n * SECOND // 5) for n in range(1, 11)]
    assert later == [0] * 10, "five a second are fewer than ten"
    rush = [guard.check([0, 0, 1], start + 60 * SECOND + n) for n in range(30)]
    assert rush.count(0) == 10, "a long pause fills it for one second, not for more"


def test_a_clock_that_steps_back_gives_no_credit() -> None:
    guard = Guard(max_signals_per_s=2)
    assert [guard.check([0, 0, 1], SECOND) for _ in range(3)] == [0, 0, REASON_THROTTLED]
    assert guard.check([0, 0, 1], 0) == REASON_THROTTLED
    assert guard.check([0, 0, 1], SECOND) == REASON_THROTTLED


def test_a_class_too_often_in_a_row_latches_until_it_is_armed() -> None:
    guard = Guard(max_repeats=3)
    assert [guard.check([1, 0, 0]) for _ in range(3)] == [0, 0, 0]
    assert guard.check([0, 1, 0]) == 0, "another class in between"
    assert [guard.check([1, 0, 0]) for _ in range(4)] == [0, 0, 0, REASON_REPEATED]
    assert guard.check([0, 1, 0]) == REASON_REPEATED, "latched, whatever comes"
    controls.rearm(guard.guards)
    assert [guard.check([1, 0, 0]) for _ in range(4)] == [0, 0, 0, REASON_REPEATED]


def test_the_collar_holds_scores_and_their_changes() -> None:
    guard = Guard(collar_score=5.0, collar_change=2.0)
    assert guard.check([1.0, 0.0, 0.0]) == 0
    assert guard.check([6.0, 0.0, 0.0]) == REASON_COLLAR
    assert guard.check([0.0, -5.5, 0.0]) == REASON_COLLAR
    assert guard.check([3.5, 0.0, 0.0]) == REASON_COLLAR, "2.5 away from the last one that passed"
    assert guard.check([3.0, 0.0, 0.0]) == 0
    assert guard.check([5.0, 0.0, 0.0]) == 0, "held against that one"


@pytest.mark.parametrize("limit", [0, 3])
def test_equal_scores_for_other_inputs_are_stuck(limit: int) -> None:
    guard = Guard(FailoverConfig(stuck_outputs=limit))
    scores = np.array([1, 2, 3], dtype=np.float32)

    def step(crc: int) -> int:
        return int(stuck_output(scores, crc, guard.guards[0], guard.scores[0], guard.limits[0]))

    found = [step(crc) for crc in (10, 11, 11, 11, 12, 13, 14)]
    expected = CHECK_STUCK_OUTPUT if limit else 0
    assert found == [0, 0, 0, 0, 0, expected, expected], "the same input again says nothing"
    scores[0] = 9
    assert step(15) == 0
