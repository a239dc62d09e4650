"""Labels against the formula written down once more, plainly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.labels import (
    DOWN,
    FLAT,
    UP,
    balancing_threshold,
    classify,
    fixed_horizon_move,
    smoothed_move,
    triple_barrier,
)

LABELLERS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "smoothed": smoothed_move,
    "fixed": fixed_horizon_move,
    "triple barrier": lambda mids, horizon: triple_barrier(mids, horizon, 3),
}
# A walk, so that barriers are touched now early, now late, now never.
walks = st.lists(st.integers(-3, 3), max_size=80).map(lambda steps: 1_000 + np.cumsum([0, *steps]))
horizons = st.integers(1, 12)


@given(
    st.lists(st.integers(1, 10**9), min_size=0, max_size=60),
    st.integers(1, 12),
)
def test_the_move_is_the_mean_of_the_next_mids_less_the_mid_now(
    mids: list[int], horizon: int
) -> None:
    moves = smoothed_move(np.array(mids, dtype=np.int64), horizon)
    plain = [
        sum(mids[t + 1 : t + 1 + horizon]) - horizon * mids[t] for t in range(len(mids) - horizon)
    ]
    assert moves.tolist() == plain


@given(walks, horizons)
def test_the_fixed_horizon_move_is_the_mid_then_less_the_mid_now(
    mids: np.ndarray, horizon: int
) -> None:
    plain = [int(mids[t + horizon] - mids[t]) for t in range(len(mids) - horizon)]
    moves = fixed_horizon_move(mids, horizon)
    assert moves.dtype == np.int64
    assert moves.tolist() == plain


@given(walks, horizons, st.integers(1, 8))
def test_the_first_barrier_touched_names_the_class(
    mids: np.ndarray, horizon: int, barrier: int
) -> None:
    plain = []
    for t in range(len(mids) - horizon):
        label = FLAT
        for move in (int(mid - mids[t]) for mid in mids[t + 1 : t + 1 + horizon]):
            if abs(move) >= barrier:
                label = UP if move > 0 else DOWN
                break
        plain.append(label)
    labels = triple_barrier(mids, horizon, barrier)
    assert labels.dtype == np.int64
    assert labels.tolist() == plain


def test_touching_a_barrier_is_enough_and_what_comes_later_does_not_count() -> None:
    mids = np.array([10, 12, 8, 5, 5, 5], dtype=np.int64)
    assert triple_barrier(mids, 3, 2).tolist() == [UP, DOWN, DOWN]
    assert triple_barrier(mids, 3, 6).tolist() == [FLAT, DOWN, FLAT]


@pytest.mark.parametrize("kind", LABELLERS)
@given(mids=walks, horizon=horizons, past=st.integers(0, 10**9), future=st.integers(0, 10**9))
def test_a_label_sees_the_mid_now_and_those_within_the_horizon_and_nothing_else(
    kind: str, mids: np.ndarray, horizon: int, past: int, future: int
) -> None:
    labels = LABELLERS[kind](mids, horizon)
    assert len(labels) == max(len(mids) - horizon, 0)
    for t in range(len(labels)):
        other = mids.copy()
        other[:t] = past
        other[t + horizon + 1 :] = future
        assert LABELLERS[kind](other, horizon)[t] == labels[t]


@pytest.mark.parametrize("kind", LABELLERS)
def test_a_tape_shorter_than_the_horizon_has_no_labels(kind: str) -> None:
    for n in range(4):
        labels = LABELLERS[kind](np.arange(n), 3)
        assert labels.dtype == np.int64
        assert labels.shape == (0,)


def test_threshold_makes_the_three_classes_as_even_as_the_ticks_allow() -> None:
    moves = np.random.default_rng(3).integers(-50, 51, 30_000)
    labels = classify(moves, balancing_threshold(moves))
    shares = np.bincount(labels, minlength=3) / len(labels)
    assert np.abs(shares - 1 / 3).max() < 0.02


def test_a_market_that_mostly_stands_still_has_threshold_zero() -> None:
    moves = np.array([0] * 80 + [3] * 10 + [-3] * 10, dtype=np.int64)
    assert balancing_threshold(moves) == 0
    assert np.bincount(classify(moves, 0)).tolist() == [10, 80, 10]


def test_a_move_of_exactly_the_threshold_is_flat() -> None:
    labels = classify(np.array([-6, -5, 0, 5, 6]), 5)
    assert labels.tolist() == [DOWN, FLAT, FLAT, FLAT, UP]
