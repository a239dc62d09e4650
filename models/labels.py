"""Class labels: where the mid goes over the next few signals; never where it came from.

`smoothed_move`: Zhang, Zohren and Roberts (2019), "DeepLOB: Deep Convolutional Neural Networks for
Limit Order Books", section III.C. The mean of the next k mid prices stands against the mid now,
their equation (3). Equation (4) puts the mean of the last k in its place; that part of the move
has already happened when the signal is sent, so a model that has learnt nothing would seem to know
it.

`fixed_horizon_move` and `triple_barrier`: López de Prado (2018), "Advances in Financial Machine
Learning", sections 3.2 and 3.4, counted in signals.
"""

from __future__ import annotations

from typing import Final

import numpy as np

CLASSES: Final = ("down", "flat", "up")
DOWN: Final = 0
FLAT: Final = 1
UP: Final = 2


def smoothed_move(mid_half_ticks: np.ndarray, horizon: int) -> np.ndarray:
    """Mean of the next ``horizon`` mids less the mid now, in half ticks, times ``horizon``.

    Integer arithmetic: the factor keeps the mean exact.

    Parameters
    ----------
    mid_half_ticks : ndarray of int64, shape (n,)
        Best bid plus best ask in ticks, one a signal, in order.
    horizon : int
        Number of signals looked ahead, at least 1.

    Returns
    -------
    ndarray of int64, shape (max(n - horizon, 0),)
        The last ``horizon`` signals have no label.
    """
    assert horizon >= 1
    mids = np.asarray(mid_half_ticks, dtype=np.int64)
    if len(mids) <= horizon:
        return np.empty(0, dtype=np.int64)
    sums = np.concatenate(([0], np.cumsum(mids)))
    ahead = sums[horizon + 1 :] - sums[1:-horizon]
    return ahead - horizon * mids[:-horizon]


def fixed_horizon_move(mid_half_ticks: np.ndarray, horizon: int) -> np.ndarray:
    """The mid after exactly ``horizon`` signals less the mid now, in half ticks.

    Parameters
    ----------
    mid_half_ticks : ndarray of int64, shape (n,)
        Best bid plus best ask in ticks, one a signal, in order.
    horizon : int
        Number of signals looked ahead, at least 1.

    Returns
    -------
    ndarray of int64, shape (max(n - horizon, 0),)
        The last ``horizon`` signals have no label.
    """
    assert horizon >= 1
    mids = np.asarray(mid_half_ticks, dtype=np.int64)
    return mids[horizon:] - mids[: max(len(mids) - horizon, 0)]


def triple_barrier(mid_half_ticks: np.ndarray, horizon: int, barrier_half_ticks: int) -> np.ndarray:
    """Which barrier the mid touches first within the next ``horizon`` signals.

    Parameters
    ----------
    mid_half_ticks : ndarray of int64, shape (n,)
        Best bid plus best ask in ticks, one a signal, in order.
    horizon : int
        Number of signals looked ahead, at least 1: the vertical barrier.
    barrier_half_ticks : int
        Distance of both horizontal barriers from the mid now, at least 1; reaching it touches it.

    Returns
    -------
    ndarray of int64, shape (max(n - horizon, 0),)
        UP or DOWN after the first horizontal barrier touched; FLAT if neither is. The last
        ``horizon`` signals have no label.
    """
    assert horizon >= 1
    assert barrier_half_ticks >= 1
    mids = np.asarray(mid_half_ticks, dtype=np.int64)
    labels = np.full(max(len(mids) - horizon, 0), FLAT, dtype=np.int64)
    waiting = np.arange(len(labels))
    for ahead in range(1, horizon + 1):
        moves = mids[waiting + ahead] - mids[waiting]
        labels[waiting[moves >= barrier_half_ticks]] = UP
        labels[waiting[moves <= -barrier_half_ticks]] = DOWN
        waiting = waiting[np.abs(moves) < barrier_half_ticks]
        if not len(waiting):
            break
    return labels


def balancing_threshold(moves: np.ndarray) -> int:
    """The threshold whose three classes come closest to a third each.

    Moves are symmetric enough that only "flat" needs to be a third: the threshold is the value
    whose share of magnitudes at or below it is nearest to 1/3. Prices are discrete, so the
    shares are as near as the ticks allow.

    Parameters
    ----------
    moves : ndarray of int64, shape (n,)
        Of the training part only.
    """
    assert len(moves) > 0
    values, counts = np.unique(np.abs(moves), return_counts=True)
    shares = np.cumsum(counts) / len(moves)
    return int(values[int(np.argmin(np.abs(shares - 1.0 / 3.0)))])


def classify(moves: np.ndarray, threshold: int) -> np.ndarray:
    """DOWN, FLAT or UP of each move; a move of exactly the threshold is FLAT.

    Returns
    -------
    ndarray of int64, shape (n,)
    """
    return np.where(moves > threshold, UP, np.where(moves < -threshold, DOWN, FLAT)).astype(
        np.int64
    )
