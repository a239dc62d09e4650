"""A control chart of window means: has a column of numbers changed by more than it ever does?

Market features are strongly autocorrelated, so that the mean of a thousand rows says far less
than a thousand independent ones would, and how much less differs from feature to feature. The
chart therefore assumes nothing about it: it compares each window's mean with the windows before
it, and takes as its yardstick how much those differed.

Source: Runger and Willemain (1996), "Batch-means control charts for autocorrelated data", IIE
Transactions 28; the running mean as its centre line after Roberts (1959), "Control chart tests
based on geometric moving averages", Technometrics 1.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

GROWTH: Final = 2  # a rung's window is so many windows of the one below
CENTRE_HALF_LIFE: Final = 8.0  # windows
SPREAD_HALF_LIFE: Final = 64.0  # windows
_CENTRE_GAIN: Final = 1.0 - 2.0 ** (-1.0 / CENTRE_HALF_LIFE)
_SPREAD_GAIN: Final = 1.0 - 2.0 ** (-1.0 / SPREAD_HALF_LIFE)
_MOST_DEGREES: Final = int(2.0 / _SPREAD_GAIN) - 1  # of freedom, of a running mean with that gain


def student_limit(sigmas: float, degrees: int) -> float:
    """How many *estimated* deviations are as unlikely as so many true ones of a normal law.

    Notes
    -----
    Wallace (1959), "Bounds on normal approximations to Student's and the chi-square
    distributions", inverted: ``t = sqrt(v (exp(u u / v) - 1))``, ``u = z (8 v + 3) / (8 v + 1)``;
    for five deviations it lies within 4 % above the exact value from 7 degrees on.
    """
    u = sigmas * (8 * degrees + 3) / (8 * degrees + 1)
    return math.sqrt(degrees * math.expm1(u * u / degrees))


class Rung:
    """Windows of one length, for many columns at once.

    A column's centre and spread stand still while it is out of bounds, so that what alarmed it
    does not become the usual.

    Parameters
    ----------
    columns : int
    sigmas : float
        How far off a window's mean may be, in deviations of such means.
    smallest : float
        What never counts as a change, in units of the column.
    learn_windows : int
        Windows before the first verdict.
    recovered_share : float
        Of the limit: a column comes back when its mean lies within.
    rises_only : bool
        Whether a mean may fall as it likes.

    Attributes
    ----------
    out : ndarray of bool, shape (columns,)
    distance, limit : ndarray of float64, shape (columns,)
        Of the last window: from the centre, and what is allowed; the limit is infinite at first.
    """

    def __init__(
        self,
        columns: int,
        sigmas: float,
        smallest: float,
        learn_windows: int,
        recovered_share: float,
        *,
        rises_only: bool = False,
    ) -> None:
        assert learn_windows >= 2
        self.out = np.zeros(columns, dtype=bool)
        self.distance = np.zeros(columns)
        self.limit = np.full(columns, np.inf)
        self._smallest = smallest
        self._recovered_share = recovered_share
        self._rises_only = rises_only
        self._learn_windows = learn_windows
        self._limits = [student_limit(sigmas, max(v, 1)) for v in range(_MOST_DEGREES + 1)]
        self._centre = np.zeros(columns)
        self._variance = np.zeros(columns)
        self._windows = 0

    def update(self, means: np.ndarray) -> None:
        """Take the means of one more window, shape (columns,)."""
        distance = means - self._centre
        n = self._windows
        if n >= self._learn_windows:
            degrees = min(n - 1, _MOST_DEGREES)
            spread = self._limits[degrees] * np.sqrt(self._variance)
            self.limit = np.maximum(spread, self._smallest)
            self.distance = distance if self._rises_only else np.abs(distance)
            bound = np.where(self.out, self._recovered_share * self.limit, self.limit)
            self.out = self.distance > bound
        still = ~self.out
        # Plain averages at first; the first window is the centre and says nothing of the spread.
        centre = distance * max(_CENTRE_GAIN, 1.0 / (n + 1))
        self._centre = np.where(still, self._centre + centre, self._centre)
        if n > 0:
            gain = max(_SPREAD_GAIN, 1.0 / n)
            variance = self._variance + gain * (distance * distance - self._variance)
            self._variance = np.where(still, variance, self._variance)
        self._windows = n + 1


class ChangeChart:
    """A ladder of rungs: short windows find large changes soon, long ones find small changes.

    Parameters
    ----------
    rungs : int
    columns, sigmas, smallest, learn_windows, recovered_share, rises_only
        As of `Rung`.

    Attributes
    ----------
    rungs : list of Rung
        Each with windows `GROWTH` times as long as the one before.
    """

    def __init__(
        self,
        columns: int,
        sigmas: float,
        smallest: float,
        learn_windows: int,
        recovered_share: float,
        *,
        rungs: int,
        rises_only: bool = False,
    ) -> None:
        self.rungs = [
            Rung(columns, sigmas, smallest, learn_windows, recovered_share, rises_only=rises_only)
            for _ in range(rungs)
        ]
        self._sums = np.zeros((rungs, columns))
        self._held = [0] * rungs

    def update(self, means: np.ndarray) -> None:
        """Take the means of one more of the shortest windows, shape (columns,)."""
        for k, rung in enumerate(self.rungs):
            rung.update(means)
            if k + 1 == len(self.rungs):
                return
            self._sums[k] += means
            self._held[k] += 1
            if self._held[k] < GROWTH:
                return
            means = self._sums[k] / GROWTH
            self._sums[k] = 0.0
            self._held[k] = 0

    @property
    def out(self) -> np.ndarray:
        """Which columns are out of bounds on any rung, bool of shape (columns,)."""
        found = self.rungs[0].out.copy()
        for rung in self.rungs[1:]:
            found |= rung.out
        return found

    def evidence(self, column: int) -> tuple[float, float]:
        """Distance and limit of the shortest rung on which a column is out of bounds."""
        for rung in self.rungs:
            if rung.out[column]:
                return float(rung.distance[column]), float(rung.limit[column])
        raise AssertionError("the column is within its bounds")
