"""The state machine that decides who answers."""

from __future__ import annotations

import numpy as np
import pytest

from engine.failover import MAX_BACKOFF, Failover, FailoverConfig, Transition
from engine.trust import (
    MODE_FP32,
    MODE_HALTED,
    MODE_INT8,
    SHADOW_AGREEING,
    SHADOW_DIVERGED,
    SHADOW_LOST,
    SHADOW_OFF,
)


def moved(transition: Transition | None, before: int, after: int) -> bool:
    return transition is not None and (transition.before, transition.after) == (before, after)


def agree(failover: Failover, count: int) -> list[Transition | None]:
    return [failover.answered(0.0, False) for _ in range(count)]


def test_k_violations_in_n_demote_and_the_next_k_halt() -> None:
    failover = Failover(FailoverConfig(violations=3, violations_in=10))
    assert failover.violated(1, "a") is None
    assert failover.violated(2, "b") is None
    assert failover.violated(12, "c") is None, "the first two are more than ten inferences ago"
    assert failover.violated(13, "d") is None
    move = failover.violated(14, "layer 2")
    assert moved(move, MODE_INT8, MODE_FP32)
    assert move is not None
    assert move.rule == "violations"
    assert "layer 2" in move.detail
    assert [failover.violated(n, "e") for n in (15, 16)] == [None, None], "counted anew"
    assert moved(failover.violated(17, "f"), MODE_FP32, MODE_HALTED)
    assert failover.violated(18, "g") is None


def test_a_rule_of_zero_is_off() -> None:
    config = FailoverConfig(
        violations=0, input_violations=0, divergences=0, disagreement_rate=0.0, promote_after=0
    )
    failover = Failover(config)
    assert not any(failover.violated(n, "") for n in range(500))
    assert not any(failover.bad_input(n, "") for n in range(500))
    assert not any(failover.answered(99.0, True) for _ in range(500))
    assert failover.mode == MODE_INT8


def test_bad_inputs_halt_since_no_model_could_answer_them() -> None:
    failover = Failover(FailoverConfig(input_violations=2, input_violations_in=5))
    assert failover.bad_input(1, "input not finite") is None
    assert moved(failover.bad_input(4, "input not finite"), MODE_INT8, MODE_HALTED)


def test_k_divergences_in_n_demote() -> None:
    failover = Failover(FailoverConfig(divergence=0.5, divergences=3, divergences_in=6))
    assert failover.shadow == SHADOW_OFF
    for divergence in (0.6, 0.1, 0.2, 0.1, 0.1, 0.7, 0.1, 0.1):
        assert failover.answered(divergence, False) is None
    assert failover.shadow == SHADOW_AGREEING
    assert failover.answered(0.9, False) is None
    move = failover.answered(np.nan, False)
    assert moved(move, MODE_INT8, MODE_FP32), "a score that is no number diverges"
    assert failover.shadow == SHADOW_DIVERGED


def test_a_rate_of_other_classes_demotes_once_the_window_is_full() -> None:
    failover = Failover(FailoverConfig(disagreement_rate=0.5, disagreements_in=4))
    assert not any(failover.answered(0.0, True) for _ in range(3))
    move = failover.answered(0.0, False)
    assert moved(move, MODE_INT8, MODE_FP32)
    assert move is not None
    assert "75.0%" in move.detail


def test_late_inferences_step_down_or_halt_or_are_only_told() -> None:
    failover = Failover(FailoverConfig(late="fp32"))
    assert moved(failover.late(1), MODE_INT8, MODE_FP32)
    assert moved(failover.late(1), MODE_FP32, MODE_HALTED)
    assert moved(Failover(FailoverConfig(late="halt")).late(1), MODE_INT8, MODE_HALTED)
    assert Failover(FailoverConfig(late="tell")).late(1) is None
    hung = FailoverConfig(late="tell", hang_ns=1_000)
    assert Failover(hung).late(1_000) is None
    assert moved(Failover(hung).late(1_001), MODE_INT8, MODE_HALTED)


def test_a_lost_shadow_is_said_and_halts_only_where_the_config_asks() -> None:
    failover = Failover(FailoverConfig())
    assert failover.shadow_lost("killed") is None
    assert failover.shadow == SHADOW_LOST
    failover.shadow_up()
    assert failover.shadow == SHADOW_AGREEING
    strict = Failover(FailoverConfig(shadow_lost="halt"))
    assert moved(strict.shadow_lost("killed"), MODE_INT8, MODE_HALTED)


def test_promotion_by_rule_asks_for_twice_as_much_after_each_demotion() -> None:
    failover = Failover(FailoverConfig(promote_after=10, divergences=1, divergences_in=1))
    wanted = 10
    for _ in range(9):
        assert moved(failover.answered(9.0, False), MODE_INT8, MODE_FP32)
        assert not any(agree(failover, wanted - 1))
        assert failover.answered(9.0, False) is None, "one that diverges starts the count anew"
        assert not any(agree(failover, wanted - 1))
        assert moved(agree(failover, 1)[0], MODE_FP32, MODE_INT8)
        wanted = min(2 * wanted, 10 * MAX_BACKOFF)


def test_without_a_rule_only_a_person_promotes() -> None:
    failover = Failover(FailoverConfig(promote_after=0))
    assert failover.demote("Ada", "test") is not None
    assert not any(agree(failover, 2_000))
    move = failover.promote("Ada")
    assert moved(move, MODE_FP32, MODE_INT8)
    assert move is not None
    assert move.by == "Ada"
    assert failover.promote("Ada") is None


def test_a_halt_stands_until_armed_whatever_happens_below_it() -> None:
    failover = Failover(FailoverConfig(promote_after=2))
    assert moved(failover.halt("Ada", "news"), MODE_INT8, MODE_HALTED)
    assert failover.halt("Bob", "again") is None
    assert moved(failover.demote("Ada", ""), MODE_HALTED, MODE_HALTED)
    assert failover.serving == MODE_FP32
    agree(failover, 2)
    assert failover.mode == MODE_HALTED
    assert failover.serving == MODE_INT8, "the rule went on beneath the halt"
    failover.demote("Ada", "")
    assert moved(failover.arm("Ada"), MODE_HALTED, MODE_FP32), "where its own rules have it"
    assert failover.arm("Ada") is None


def test_start_halted() -> None:
    failover = Failover(FailoverConfig(), start_halted=True)
    assert failover.mode == MODE_HALTED
    assert failover.halted_why == "start_halted"
    assert moved(failover.arm("Ada"), MODE_HALTED, MODE_INT8)


def test_an_engine_that_was_asked_for_fp32_has_nothing_below_it_but_a_halt() -> None:
    failover = Failover(FailoverConfig(violations=1), fp32_only=True)
    assert failover.mode == MODE_FP32
    assert failover.promote("Ada") is None
    assert failover.demote("Ada", "") is None
    assert moved(failover.violated(1, "x"), MODE_FP32, MODE_HALTED)


@pytest.mark.parametrize("halted", [False, True])
def test_another_model_starts_with_int8_and_under_the_same_halt(halted: bool) -> None:
    failover = Failover(FailoverConfig(divergences=1, divergences_in=1))
    failover.answered(9.0, True)
    if halted:
        failover.halt("Ada", "")
    failover.swapped()
    assert failover.serving == MODE_INT8
    assert failover.mode == (MODE_HALTED if halted else MODE_INT8)
    assert failover.shadow == SHADOW_AGREEING


def test_the_same_events_give_the_same_moves() -> None:
    def moves() -> list[str]:
        rng = np.random.default_rng(3)
        failover = Failover(FailoverConfig(promote_after=5, divergences=2, divergences_in=4))
        found = []
        for ticket in range(1, 6_000):
            for move in (
                failover.answered(float(rng.exponential(0.5)), bool(rng.random() < 0.05)),
                failover.violated(ticket, "x") if rng.random() < 0.01 else None,
                failover.arm("Ada") if rng.random() < 0.05 else None,
            ):
                if move is not None:
                    found.append(f"{ticket} {move}")
        return found

    assert moves() == moves()
    assert len(moves()) > 12
