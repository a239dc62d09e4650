"""The best accuracy that any model can reach on the simulator's planted signal.

The label is the class of the mid's move over the next ``horizon`` events (Deltas) of an
instrument: down, flat or up, flat being a move of at most ``threshold`` half ticks. Given the
hidden state, that move depends on nothing else in the book or the flow, so its distribution
follows exactly from the chain of (hidden state, displacement):

    P_h+1(s', x) = sum over s of  A(s, s') * ( (1 - p) P_h(s, x)
                                               + p (1 + drift s') / 2  P_h(s, x - 1)
                                               + p (1 - drift s') / 2  P_h(s, x + 1) )

with A the transition matrix and p the step probability. Bayes' rule picks the most probable class;
who sees only the messages weighs the three rows with the filter's posterior (Rabiner, Proc. IEEE
77, 1989). See ``feeds/SIMULATOR.md``.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from feeds.errors import InputError
from feeds.market_state import DRIFT, SWITCH
from feeds.order_flow import STEP_PROBABILITY
from feeds.simulator import Simulator

DOWN: Final = 0
FLAT: Final = 1
UP: Final = 2
CLASSES: Final = ("down", "flat", "up")
MAX_HORIZON_EVENTS: Final = 10_000


class Optimum(NamedTuple):
    """What can be reached for one horizon and threshold.

    Attributes
    ----------
    horizon_events, threshold_half_ticks : int
    class_given_state : ndarray of float64, shape (3, 3)
        P(class | s), rows s = -1, 0, +1, columns down, flat, up.
    accuracy : float
        Accuracy of Bayes' rule for one who knows s: no model can do better.
    chance : float
        Share of the most frequent class: what a model without features reaches.
    """

    horizon_events: int
    threshold_half_ticks: int
    class_given_state: np.ndarray
    accuracy: float
    chance: float


def displacement_given_state(simulator: Simulator, horizon_events: int) -> np.ndarray:
    """P(mid moves by x half ticks over the next events | s now).

    Returns
    -------
    ndarray of float64, shape (3, 2 * horizon_events + 1)
        Rows s = -1, 0, +1; column x + horizon_events.
    """
    if not 1 <= horizon_events <= MAX_HORIZON_EVENTS:
        raise InputError(
            "out of range",
            where="horizon_events",
            expected=f"1 to {MAX_HORIZON_EVENTS}",
            found=str(horizon_events),
        )
    switch = float(simulator.parameters[SWITCH])
    transition = np.full((3, 3), 0.5 * switch)
    np.fill_diagonal(transition, 1.0 - switch)
    up = STEP_PROBABILITY * 0.5 * (1.0 + simulator.parameters[DRIFT] * np.array([-1.0, 0.0, 1.0]))
    down = STEP_PROBABILITY - up
    chain = np.zeros((3, 3, 2 * horizon_events + 1))  # state at the start, state now, displacement
    chain[np.arange(3), np.arange(3), horizon_events] = 1.0
    for _ in range(horizon_events):
        moved = np.einsum("asx,st->atx", chain, transition)
        chain = (1.0 - STEP_PROBABILITY) * moved
        chain[:, :, 1:] += up[None, :, None] * moved[:, :, :-1]
        chain[:, :, :-1] += down[None, :, None] * moved[:, :, 1:]
    return chain.sum(axis=1)


def optimum(
    simulator: Simulator, horizon_events: int, threshold_half_ticks: int | None = None
) -> Optimum:
    """The Bayes optimum of predicting the move over the next ``horizon_events`` events.

    Parameters
    ----------
    simulator : Simulator
    horizon_events : int
        Deltas of the instrument.
    threshold_half_ticks : int, optional
        Moves of at most so many half ticks are flat; by default the threshold that makes the
        three classes most nearly equal.
    """
    moves = displacement_given_state(simulator, horizon_events)
    x = np.abs(np.arange(-horizon_events, horizon_events + 1))
    if threshold_half_ticks is None:
        flat = np.array([moves[:, x <= t].sum() / 3.0 for t in range(horizon_events)])
        threshold_half_ticks = int(np.argmin(np.abs(flat - 1.0 / 3.0)))
    sign = np.arange(-horizon_events, horizon_events + 1)
    given = np.stack(
        [
            moves[:, sign < -threshold_half_ticks].sum(axis=1),
            moves[:, x <= threshold_half_ticks].sum(axis=1),
            moves[:, sign > threshold_half_ticks].sum(axis=1),
        ],
        axis=1,
    )
    # The stationary distribution of the chain gives each state one third.
    return Optimum(
        horizon_events,
        threshold_half_ticks,
        given,
        float(given.max(axis=1).mean()),
        float(given.mean(axis=0).max()),
    )


def bayes_accuracy(
    labels: np.ndarray, state: np.ndarray, class_given_state: np.ndarray | None = None
) -> float:
    """Accuracy that Bayes' rule reaches on one sample, whatever the labels stand for.

    Parameters
    ----------
    labels : ndarray of int, shape (n,)
        0, 1, 2 for down, flat, up.
    state : ndarray
        ``truth["hidden"]``, shape (n,): the bound for one who knows s; or ``truth["posterior"]``,
        shape (n, 3): what can be inferred from the messages.
    class_given_state : ndarray, shape (3, 3), optional
        As in `Optimum`; by default counted from this sample, for labels with another horizon
        than one in events.
    """
    posterior = np.asarray(state, dtype=np.float64)
    if posterior.ndim == 1:
        posterior = np.eye(3)[np.asarray(state, dtype=np.int64) + 1]
    if class_given_state is None:
        counts = posterior.T @ np.eye(3)[labels]
        class_given_state = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1e-300)
    return float((np.argmax(posterior @ class_given_state, axis=1) == labels).mean())
