"""Labels against the formula written down once more, plainly."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from models.labels import DOWN, FLAT, UP, balancing_threshold, classify, smoothed_move


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


def test_a_label_never_looks_at_the_past() -> None:
    mids = np.array([100, 101, 103, 102, 104, 107], dtype=np.int64)
    other_past = mids.copy()
    other_past[:2] = 5
    assert smoothed_move(mids, 2)[2:].tolist() == smoothed_move(other_past, 2)[2:].tolist()


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
