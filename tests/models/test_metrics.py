"""Every figure against its definition, written down once more, plainly."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feeds.errors import InputError
from models.metrics import (
    CALIBRATION_BINS,
    CURVE_POINTS,
    Metrics,
    agreement,
    evaluate,
    follow,
    log_softmax,
    pearson,
    positions,
    ranks,
    reliability,
    softmax,
    spearman,
)

CLASSES = 3
NS_A_DAY = 86_400_000_000_000
UP, FLAT, DOWN = [0.0, 0.0, 9.0], [0.0, 9.0, 0.0], [9.0, 0.0, 0.0]

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 60)


def drawn(seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores that know something, and the truth."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, CLASSES, n)
    return rng.normal(size=(n, CLASSES)) + np.eye(CLASSES)[truth], truth


# Probabilities


@given(seeds, sizes)
def test_softmax_is_exponentials_over_their_sum(seed: int, n: int) -> None:
    scores, _ = drawn(seed, n)
    plain = [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in scores.tolist()]
    np.testing.assert_allclose(softmax(scores), plain)
    np.testing.assert_allclose(log_softmax(scores), np.log(plain))


def test_softmax_of_huge_scores_neither_overflows_nor_loses_the_class() -> None:
    scores = np.array([[3e38, -3e38, 0.0], [-1e4, -1e4, -1e4]], dtype=np.float32)
    np.testing.assert_allclose(softmax(scores), [[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    assert np.isfinite(log_softmax(scores)).all()


@given(seeds, sizes)
def test_calibration_error_is_the_mean_gap_between_confidence_and_accuracy(
    seed: int, n: int
) -> None:
    scores, truth = drawn(seed, n)
    p = softmax(scores)
    diagram, error = reliability(p, truth)
    plain = 0.0
    for k in range(CALIBRATION_BINS):
        low, high = k / CALIBRATION_BINS, (k + 1) / CALIBRATION_BINS
        own = [i for i in range(n) if low < p[i].max() <= high]
        assert diagram.count[k] == len(own)
        if own:
            confidence = sum(p[i].max() for i in own) / len(own)
            accuracy = sum(p[i].argmax() == truth[i] for i in own) / len(own)
            assert diagram.confidence[k] == pytest.approx(confidence, abs=1e-6)
            assert diagram.accuracy[k] == pytest.approx(accuracy, abs=1e-6)
            plain += len(own) / n * abs(accuracy - confidence)
    assert error == pytest.approx(plain)
    assert len(diagram.edges) == CALIBRATION_BINS + 1


def test_a_model_that_is_as_sure_as_it_is_right_has_no_calibration_error() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(100_000, CLASSES)) * 2.0
    truth = (rng.random((len(scores), 1)) > softmax(scores).cumsum(axis=1)).sum(axis=1)
    assert evaluate(scores, truth).calibration_error < 0.01
    assert evaluate(3.0 * scores, truth).calibration_error > 0.1


# Classes


@given(seeds, sizes)
def test_the_figures_of_a_class_are_counted_from_its_rows(seed: int, n: int) -> None:
    scores, truth = drawn(seed, n)
    named = scores.argmax(axis=1)
    found = evaluate(scores, truth)
    recalls, f1s = [], []
    for c in range(CLASSES):
        both = sum(a == b == c for a, b in zip(named, truth, strict=True))
        so, called = int((truth == c).sum()), int((named == c).sum())
        item = found.classes[c]
        assert item.support == so
        assert item.precision == pytest.approx(both / called if called else 0.0, abs=1e-6)
        assert item.recall == pytest.approx(both / so if so else 0.0, abs=1e-6)
        assert item.f1 == pytest.approx(2 * both / (so + called) if both else 0.0, abs=1e-6)
        recalls += [both / so] if so else []
        f1s += [2 * both / (so + called)] if so + called else []
        assert [int(((truth == c) & (named == d)).sum()) for d in range(CLASSES)] == list(
            found.confusion[c]
        )
    assert found.rows == n
    assert found.accuracy == pytest.approx((named == truth).mean(), abs=1e-6)
    assert found.balanced_accuracy == pytest.approx(np.mean(recalls), abs=1e-6)
    assert found.macro_f1 == pytest.approx(np.mean(f1s), abs=1e-6)
    assert found.majority == pytest.approx(np.bincount(truth).max() / n, abs=1e-6)
    plain = -np.log(softmax(scores)[np.arange(n), truth]).mean()
    assert found.log_loss == pytest.approx(plain, abs=1e-6)


def test_scores_that_know_nothing_are_at_chance() -> None:
    rng = np.random.default_rng(1)
    found = evaluate(rng.normal(size=(50_000, CLASSES)), rng.integers(0, CLASSES, 50_000))
    assert found.chance == pytest.approx(1 / 3, abs=1e-6)
    assert found.accuracy == pytest.approx(found.chance, abs=0.01)
    assert found.macro_f1 == pytest.approx(found.chance, abs=0.01)


def test_agreement_is_the_share_of_equal_classes() -> None:
    assert agreement(np.array([UP, DOWN, FLAT, UP]), np.array([UP, UP, FLAT, UP])) == 0.75


# Correlations


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=40))
def test_ranks_are_counted_and_ties_share_their_mean(values: list[int]) -> None:
    plain = [
        sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values
    ]
    assert ranks(np.array(values)).tolist() == plain


@given(seeds, st.integers(3, 60))
def test_correlations_are_numpys_and_ranks_ignore_a_monotonic_change(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.normal(size=n)
    b = a + rng.normal(size=n)
    assert pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert spearman(a, b) == pytest.approx(np.corrcoef(ranks(a), ranks(b))[0, 1])
    assert spearman(np.exp(a), b**3) == pytest.approx(spearman(a, b))
    assert spearman(a, -a) == pytest.approx(-1.0)


def test_a_constant_correlates_with_nothing() -> None:
    assert pearson(np.full(5, 0.1), np.arange(5)) == 0.0
    assert spearman(np.arange(5), np.zeros(5)) == 0.0
    assert pearson(np.arange(2) * 1e-300, np.arange(2)) == 0.0


def test_the_information_coefficient_is_of_up_less_down_and_the_move() -> None:
    scores, truth = drawn(3, 500)
    moves = np.random.default_rng(4).integers(-4, 5, 500) + 3 * (truth - 1)
    lean = softmax(scores)[:, 2] - softmax(scores)[:, 0]
    found = evaluate(scores, truth, moves=moves)
    assert found.information_coefficient == pytest.approx(spearman(lean, moves), abs=1e-6)
    assert found.correlation == pytest.approx(pearson(lean, moves), abs=1e-6)
    assert spearman(lean, moves) > 0.3
    assert evaluate(scores, truth).information_coefficient is None


# Following the signal


def test_a_position_is_the_class_named_if_it_is_likely_enough() -> None:
    scores = np.array([UP, FLAT, DOWN, [0.0, 0.0, 0.5]])
    assert positions(scores).tolist() == [1, 0, -1, 1]
    assert positions(scores, 0.9).tolist() == [1, 0, -1, 0]


def test_one_round_trip_pays_half_the_spread_twice() -> None:
    # Bought at row 0, held over +6, closed at row 1.
    found = follow(
        np.array([UP, FLAT, FLAT]),
        np.array([100, 106, 90]),
        np.array([2, 3, 50]),
        np.zeros(3, dtype=np.int64),
    )
    assert (found.gross_half_ticks, found.cost_half_ticks, found.net_half_ticks) == (6.0, 5.0, 1.0)
    assert (found.trades, found.turnover, found.hit_rate) == (2, 2, 1.0)
    assert found.equity_half_ticks == (-2.0, 1.0, 1.0)
    assert found.max_drawdown_half_ticks == 2.0
    assert found.sharpe_a_day is None


def test_a_reversal_is_one_trade_of_two_units_and_the_end_closes() -> None:
    found = follow(
        np.array([UP, DOWN, DOWN]),
        np.array([100, 106, 102]),
        np.array([1, 1, 1]),
        np.zeros(3, dtype=np.int64),
    )
    assert (found.trades, found.turnover) == (3, 4)
    assert (found.gross_half_ticks, found.net_half_ticks) == (10.0, 6.0)


@given(seeds, sizes, st.integers(1, 4), st.booleans())
@settings(deadline=None)
def test_following_is_what_a_plain_loop_makes(seed: int, n: int, n_slots: int, timed: bool) -> None:
    rng = np.random.default_rng(seed)
    scores, _ = drawn(seed, n)
    mids, costs = 1_000 + np.cumsum(rng.integers(-4, 5, n)), rng.integers(1, 5, n)
    slot = rng.integers(0, n_slots, n)
    time_ns = np.arange(n) * 10**9
    found = follow(scores, mids, costs, slot, time_ns=time_ns if timed else None, threshold=0.4)
    gross = cost = net = height = drawdown = 0.0
    hits = moved = trades = 0
    held: dict[int, int] = {}
    mid: dict[int, int] = {}
    results: list[float] = []
    wanted = positions(scores, 0.4)
    for i in range(n):
        s = int(slot[i])
        earned = held.get(s, 0) * (mids[i] - mid.get(s, 0))
        moved += earned != 0
        hits += earned > 0
        target = 0 if s not in slot[i + 1 :] else int(wanted[i])
        paid = abs(target - held.get(s, 0)) * costs[i]
        trades += target != held.get(s, 0)
        held[s], mid[s] = target, mids[i]
        gross, cost, net = gross + earned, cost + paid, net + earned - paid
        results.append(earned - paid)
        height = max(height, net)
        drawdown = max(drawdown, height - net)
    assert found.gross_half_ticks == gross
    assert found.cost_half_ticks == cost
    assert found.net_half_ticks == net == found.equity_half_ticks[-1]
    assert found.trades == trades
    assert found.hit_rate == pytest.approx(hits / moved if moved else 0.0, abs=1e-6)
    assert found.max_drawdown_half_ticks == drawdown
    sharpe = np.mean(results) / np.std(results) if np.std(results) > 0 else 0.0
    assert found.sharpe_a_signal == pytest.approx(sharpe, abs=1e-6)
    if timed and n > 1:
        scale = math.sqrt(n * NS_A_DAY / time_ns[-1])
        assert found.sharpe_a_day == pytest.approx(sharpe * scale, rel=1e-6, abs=1e-5)
    else:
        assert found.sharpe_a_day is None


def test_the_rows_of_instruments_may_stand_one_after_another() -> None:
    rng = np.random.default_rng(6)
    n = 400
    scores, _ = drawn(6, n)
    mids, costs = 1_000 + np.cumsum(rng.integers(-4, 5, n)), rng.integers(1, 5, n)
    slot, time_ns = rng.integers(0, 3, n), np.arange(n) * 10**9
    order = np.argsort(slot, kind="stable")
    mixed = follow(scores, mids, costs, slot, time_ns=time_ns)
    sorted_by_slot = follow(
        scores[order], mids[order], costs[order], slot[order], time_ns=time_ns[order]
    )
    assert mixed == sorted_by_slot


def test_a_forecast_worth_less_than_the_spread_loses() -> None:
    rng = np.random.default_rng(7)
    steps = rng.choice([-1, 1], 5_000)
    mids = 1_000 + np.concatenate([[0], np.cumsum(steps)])
    knows = np.where(rng.random(len(mids)) < 0.8, np.append(steps, 1), -np.append(steps, 1))
    scores = np.where(knows[:, None] > 0, UP, DOWN)
    slot = np.zeros(len(mids), dtype=np.int64)
    free = follow(scores, mids, np.zeros(len(mids)), slot)
    dear = follow(scores, mids, np.full(len(mids), 2), slot)
    assert free.hit_rate == pytest.approx(0.8, abs=0.02)
    assert free.net_half_ticks > 0 > dear.net_half_ticks
    assert free.gross_half_ticks == dear.gross_half_ticks


def test_the_curve_has_few_points_and_the_last_one() -> None:
    rng = np.random.default_rng(8)
    scores, _ = drawn(8, 30_000)
    mids = np.cumsum(rng.integers(-2, 3, 30_000))
    found = follow(scores, mids, np.ones(30_000), np.zeros(30_000, dtype=np.int64))
    assert len(found.equity_half_ticks) == CURVE_POINTS
    assert found.equity_half_ticks[-1] == found.net_half_ticks


# All of it


def test_metrics_survive_json_and_hold_no_more_than_six_places() -> None:
    rng = np.random.default_rng(9)
    scores, truth = drawn(9, 300)
    found = evaluate(
        scores,
        truth,
        moves=rng.integers(-9, 10, 300),
        mid_half_ticks=np.cumsum(rng.integers(-2, 3, 300)),
        cost_half_ticks=rng.integers(1, 3, 300),
        time_ns=np.arange(300) * 10**9,
    )
    assert msgspec.json.decode(msgspec.json.encode(found), type=Metrics) == found
    for value in (found.accuracy, found.log_loss, found.calibration_error, found.macro_f1):
        assert type(value) is float
        assert value == round(value, 6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    scores, truth = drawn(1, 5)
    scores[3, 1] = bad
    with pytest.raises(InputError, match="5 rows, 1 values not finite"):
        evaluate(scores, truth)


def test_no_rows_cannot_be_measured() -> None:
    with pytest.raises(InputError, match="0 rows"):
        evaluate(np.empty((0, 3)), np.empty(0, dtype=np.int64))
