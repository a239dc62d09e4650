"""A streaming histogram of signed values whose range grows, in bounded memory."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

_SIDE_BITS: Final = 12
SIDE_BINS: Final = 1 << _SIDE_BITS  # of each sign


class Histogram:
    """Counts of signed values in equal bins: O(bins) memory however much is observed.

    The bins reach from -2**exponent to 2**exponent, which starts just above the first batch's
    greatest magnitude and doubles when a value passes it, merging bins in pairs: nothing is
    counted twice or lost, and the counts are the same however the values are batched.

    Attributes
    ----------
    counts : ndarray of int64, shape (2 * SIDE_BINS,)
        Bin j holds the values from ``(j - SIDE_BINS) * width`` to below the next.
    exponent : int or None
        None while there was nothing but zeros.
    zeros : int
        How many values were exactly 0; they are in ``counts`` too.
    lowest, greatest : float
        Exact extremes, and 0 if that lies outside of them.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(2 * SIDE_BINS, dtype=np.int64)
        self.exponent: int | None = None
        self.zeros = 0
        self.lowest = self.greatest = 0.0

    @property
    def width(self) -> float:
        """Of one bin; 0 while there was nothing but zeros."""
        return 0.0 if self.exponent is None else math.ldexp(1.0, self.exponent - _SIDE_BITS)

    @property
    def live(self) -> np.ndarray:
        """Counts without the zeros, int64 of shape (2 * SIDE_BINS,)."""
        counts = self.counts.copy()
        counts[SIDE_BINS] -= self.zeros
        return counts

    def update(self, values: np.ndarray) -> None:
        """Count finite float64 values, shape (n,)."""
        self.lowest = min(self.lowest, float(values.min(initial=0.0)))
        self.greatest = max(self.greatest, float(values.max(initial=0.0)))
        self.zeros += len(values) - int(np.count_nonzero(values))
        magnitude = max(-self.lowest, self.greatest)
        if magnitude > 0.0:
            self._reach(math.frexp(magnitude)[1])
        # By a power of two, so exact; the greatest magnitude lies strictly inside.
        bins = np.floor(np.ldexp(values, _SIDE_BITS - (self.exponent or 0))).astype(np.int64)
        self.counts += np.bincount(bins + SIDE_BINS, minlength=2 * SIDE_BINS)

    def merge(self, other: Histogram) -> None:
        """Count what another one counted, which stays as it is."""
        counts = other.counts
        if other.exponent is not None:
            self._reach(other.exponent)
            assert self.exponent is not None
            counts = _coarser(counts, self.exponent - other.exponent)
        self.counts += counts
        self.zeros += other.zeros
        self.lowest = min(self.lowest, other.lowest)
        self.greatest = max(self.greatest, other.greatest)

    def outside(self, low: float, high: float) -> float:
        """Share of the values outside [low, high]; those of a bin lie evenly in it."""
        assert low <= 0.0 <= high
        if self.exponent is None:
            return 0.0
        left = np.arange(-SIDE_BINS, SIDE_BINS, dtype=np.float64)
        count = 0.0
        if high < self.greatest:
            count += np.clip(left + 1.0 - high / self.width, 0.0, 1.0) @ self.live
        if low > self.lowest:
            count += np.clip(low / self.width - left, 0.0, 1.0) @ self.live
        return float(count / self.counts.sum())

    def _reach(self, exponent: int) -> None:
        if self.exponent is None:
            self.exponent = exponent  # zeros lie in the same bin at any width
        elif exponent > self.exponent:
            self.counts = _coarser(self.counts, exponent - self.exponent)
            self.exponent = exponent


def _coarser(counts: np.ndarray, doublings: int) -> np.ndarray:
    """Counts in bins ``2**doublings`` as wide."""
    bins = np.arange(-SIDE_BINS, SIDE_BINS) >> min(doublings, _SIDE_BITS + 1)
    merged = np.zeros_like(counts)
    np.add.at(merged, bins + SIDE_BINS, counts)
    return merged
