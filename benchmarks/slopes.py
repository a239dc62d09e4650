"""Slopes of a series over time with 95 % intervals, for series that are not well behaved."""

from __future__ import annotations

from statistics import NormalDist
from typing import Final

import msgspec
import numpy as np

CONFIDENCE: Final = 0.95


class Slope(msgspec.Struct, frozen=True):
    """An estimate and its 95 % interval, in units of the series for one of the time.

    ``method`` names the estimator.
    """

    value: float
    low: float
    high: float
    method: str

    @property
    def zero(self) -> bool:
        """Whether it cannot be told from 0: the interval contains it."""
        return self.low <= 0.0 <= self.high


def student_t(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution, to 0.1 % from 5 degrees of freedom on.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    x = NormalDist().inv_cdf(probability)
    n = degrees
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return x + sum(float(term) / n ** (k + 1) for k, term in enumerate(terms))


def drift(times: np.ndarray, values: np.ndarray) -> Slope:
    """Drift of a series that keeps what it gains: the mean of its increments.

    Resident memory moves in steps, when an allocator takes pages, and stays where it is: its
    deviations from any line add up, and a fit by least squares with its interval would call a
    single step a trend. Increments do not add up. One step among them gives t = 1, five equal ones
    are needed to exclude 0; a steady growth, however small, is found.

    Parameters
    ----------
    times, values : ndarray of float, shape (n,)
        At least 3, the times about evenly spaced.

    Source: J. D. Hamilton, Time Series Analysis (1994), chapter 15, the random walk with drift;
    the interval is that of a mean, NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.5.2.
    """
    steps = np.diff(values)
    n = len(steps)
    mean, spread = steps.mean(), steps.std(ddof=1) / np.sqrt(n)
    half = student_t((1 + CONFIDENCE) / 2, n - 1) * spread
    per_time = n / (times[-1] - times[0])
    return Slope(
        value=float(mean * per_time),
        low=float((mean - half) * per_time),
        high=float((mean + half) * per_time),
        method="mean of increments, t interval",
    )


def block_medians(
    times: np.ndarray, values: np.ndarray, blocks: int
) -> tuple[np.ndarray, np.ndarray]:
    """Medians over so many equal stretches, for a series whose neighbours resemble each other.

    An interval that takes each point for news is too narrow where a busy host, for example, stays
    busy over several of them; those of blocks are nearly independent.

    Source: A. M. Law, Simulation Modeling and Analysis, "batch means".
    """
    return (
        np.array([part.mean() for part in np.array_split(times, blocks)]),
        np.array([np.median(part) for part in np.array_split(values, blocks)]),
    )


def theil_sen(times: np.ndarray, values: np.ndarray) -> Slope:
    """Median of the slopes between all pairs, for a series with heavy tails.

    A few wild values move it little, however wild, while they would decide a fit by least squares
    and its interval. The interval is that of Kendall's rank statistic without ties.

    Parameters
    ----------
    times, values : ndarray of float, shape (n,)

    Source: P. K. Sen, "Estimates of the regression coefficient based on Kendall's tau", JASA 63
    (1968); R. O. Gilbert, Statistical Methods for Environmental Pollution Monitoring
    (1987), chapter 16.
    """
    n = len(times)
    i, j = np.triu_indices(n, 1)
    slopes = np.sort((values[j] - values[i]) / (times[j] - times[i]))
    spread = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * np.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    last = len(slopes) - 1
    low = (len(slopes) - spread) / 2 - 1
    high = (len(slopes) + spread) / 2
    return Slope(
        value=float(np.median(slopes)),
        low=float(slopes[max(0, int(np.floor(low)))]),
        high=float(slopes[min(last, int(np.ceil(high)))]),
        method="Theil-Sen, interval after Sen",
    )
