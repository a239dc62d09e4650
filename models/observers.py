"""Observers: the range of the values at a point, seen batch by batch in bounded memory.

=================== ==============================================================================
``minmax``          the extremes; one outlier widens every step
``moving-average``  exponential average of each batch's extremes (Jacob et al. 2018, section 3)
``percentile-99.99``, ``percentile-99.9``, ``coverage-95``
                    the range that leaves 0.01 %, 0.1 % or 5 % of the values to saturation, half of
                    it on each side where there are two (Nagel et al. 2021, section 3)
``entropy``         the range whose 256 levels keep the distribution closest to what it was, by
                    Kullback-Leibler divergence (Migacz 2017, "8-bit Inference with TensorRT")
``mse``             the range whose 256 levels have the least mean squared error (Nagel et al.)
=================== ==============================================================================

The last five keep a `models.histogram.Histogram`. A range always holds zero: padding, and what a
ReLU cut off, must be exact. Values that are exactly zero are so in any range, hence say nothing
about `entropy` and `mse`, and are left out there.

Sources: Jacob et al. (2018), "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference"; Nagel et al. (2021), "A White Paper on Neural Network
Quantization".
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np

from feeds.errors import InputError
from models.histogram import SIDE_BINS, Histogram

LEVELS: Final = 256
ZERO_POINT: Final = 128  # of signed values at a power-of-two scale
AVERAGING: Final = 0.01  # weight of a new batch in the moving average
TAILS: Final = {"percentile-99.99": 1, "percentile-99.9": 10, "coverage-95": 500}
_TAIL_UNIT: Final = 10_000
ENTROPY_STRIDE: Final = 16  # bins between two candidates: 241 of them
ENTROPY_FLOOR: Final = 1e-9  # share of a bin that the levels left without any
SHRINKS: Final = 2.0 ** (-np.arange(129) / 16.0)  # candidates of `mse`: 1 … 1/256
POWER_OF_TWO_STEPS: Final = 9
ASYMMETRIC_PASSES: Final = 2


class Observer(ABC):
    """What every kind can do; see `make_observer` for the parameters.

    Attributes
    ----------
    observed : int
        Number of values seen.
    """

    def __init__(
        self, kind: str, name: str, *, power_of_two: bool = False, symmetric: bool = False
    ) -> None:
        self.kind, self.name = kind, name
        self.power_of_two, self.symmetric = power_of_two, symmetric
        self.observed = 0
        self._range: tuple[float, float] | None = None

    def update(self, values: Any) -> None:
        """See a batch: floats in an array of any shape.

        Raises
        ------
        InputError
            If a value is not finite. The observer stays as it was.
        """
        array = np.asarray(values, dtype=np.float64)
        finite = np.isfinite(array)
        if not finite.all():
            at = tuple(int(i) for i in np.argwhere(~finite)[0])
            raise InputError(
                "a value that is not finite cannot be observed",
                where=self.name,
                expected="finite values",
                found=f"{array[at]} at index {at} of the batch",
                fix="check the rows and the weights that led here",
            )
        if array.size:
            self.observed += array.size
            self._range = None
            self._take(array.ravel())

    def merge(self, other: Observer) -> None:
        """See what another observer of the same kind saw, which stays as it is."""
        mine, its = ((item.kind, item.power_of_two, item.symmetric) for item in (self, other))
        assert mine == its, f"observers of two kinds: {mine} and {its}"
        self.observed += other.observed
        self._range = None
        self._join(other)

    def range(self) -> tuple[float, float]:
        """The range to quantise: low <= 0 <= high; (0, 0) if nothing but zeros was seen."""
        if self._range is None:
            low, high = self._find()
            assert low <= 0.0 <= high
            self._range = float(low), float(high)
        return self._range

    @abstractmethod
    def _take(self, values: np.ndarray) -> None: ...

    @abstractmethod
    def _join(self, other: Any) -> None: ...

    @abstractmethod
    def _find(self) -> tuple[float, float]: ...


class MinMax(Observer):
    """The extremes."""

    _low = _high = 0.0

    def _take(self, values: np.ndarray) -> None:
        self._low, self._high = min(self._low, values.min()), max(self._high, values.max())

    def _join(self, other: MinMax) -> None:
        self._low, self._high = min(self._low, other._low), max(self._high, other._high)

    def _find(self) -> tuple[float, float]:
        return self._low, self._high


class MovingAverage(Observer):
    """Exponential average of each batch's extremes, without the bias of a start at zero.

    After t batches the extremes e_1 … e_t have weights a (1 - a)**(t - i), divided by their sum
    (the correction of Kingma and Ba 2015, "Adam", section 3): the first few count evenly.
    """

    _low = _high = _weight = _lowest = _greatest = 0.0

    def _take(self, values: np.ndarray) -> None:
        low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
        self._lowest, self._greatest = min(self._lowest, low), max(self._greatest, high)
        self._low += AVERAGING * (low - self._low)
        self._high += AVERAGING * (high - self._high)
        self._weight += AVERAGING * (1.0 - self._weight)

    def _join(self, other: MovingAverage) -> None:
        self._low += other._low
        self._high += other._high
        self._weight += other._weight
        self._lowest = min(self._lowest, other._lowest)
        self._greatest = max(self._greatest, other._greatest)

    def _find(self) -> tuple[float, float]:
        if self._weight == 0.0:
            return 0.0, 0.0
        # No average lies beyond the extremes, but its rounding may.
        low, high = self._low / self._weight, self._high / self._weight
        return max(low, self._lowest), min(high, self._greatest)


class HistogramObserver(Observer):
    """Kinds that keep a `Histogram`."""

    def __init__(self, kind: str, name: str, **rules: bool) -> None:
        super().__init__(kind, name, **rules)
        self.histogram = Histogram()

    def saturated(self, low: float, high: float) -> float:
        """Share of the values outside a range with low <= 0 <= high."""
        return self.histogram.outside(low, high)

    def _take(self, values: np.ndarray) -> None:
        self.histogram.update(values)

    def _join(self, other: HistogramObserver) -> None:
        self.histogram.merge(other.histogram)

    def _find(self) -> tuple[float, float]:
        return (0.0, 0.0) if self.histogram.exponent is None else self._search(self.histogram)

    @abstractmethod
    def _search(self, histogram: Histogram) -> tuple[float, float]: ...

    def _power_of_two_range(self, histogram: Histogram, step: float) -> tuple[float, float]:
        """What uint8 holds at a scale of ``step`` bins."""
        scale = step * histogram.width
        if histogram.lowest < 0.0:
            return -ZERO_POINT * scale, (LEVELS - 1 - ZERO_POINT) * scale
        return 0.0, (LEVELS - 1) * scale


class Percentile(HistogramObserver):
    """The narrowest range, in whole bins, that leaves at most a given share to saturation."""

    def _search(self, histogram: Histogram) -> tuple[float, float]:
        sides = 2 if histogram.lowest < 0.0 < histogram.greatest else 1
        # Integers: a product of floats could fall on either side of a rank.
        cut = int(histogram.counts.sum()) * TAILS[self.kind] // (_TAIL_UNIT * sides)
        below = int(np.searchsorted(np.cumsum(histogram.counts), cut, side="right"))
        above = int(np.searchsorted(np.cumsum(histogram.counts[::-1]), cut, side="right"))
        low = max((below - SIDE_BINS) * histogram.width, histogram.lowest)
        high = min((SIDE_BINS - above) * histogram.width, histogram.greatest)
        return min(0.0, low), max(0.0, high)


class Entropy(HistogramObserver):
    """The threshold with the least Kullback-Leibler divergence, in nats.

    Thresholds lie symmetrically about zero; a side on which no value reaches it ends at the last.
    Against Migacz's 2048 bins of magnitudes and 128 levels: both signs are kept, and the levels
    are the 256 that uint8 has.
    """

    def _search(self, histogram: Histogram) -> tuple[float, float]:
        signed = histogram.lowest < 0.0
        sides = 2 if signed else 1
        counts = histogram.live.astype(np.float64)
        best, least = SIDE_BINS, math.inf
        for reach in self._candidates(LEVELS // sides):
            start, stop = SIDE_BINS - (reach if signed else 0), SIDE_BINS + reach
            found = divergence(counts[start:stop], counts[:start].sum(), counts[stop:].sum())
            if found < least:
                best, least = reach, found
        if self.power_of_two:
            return self._power_of_two_range(histogram, best * sides / LEVELS)
        threshold = best * histogram.width
        return max(-threshold, histogram.lowest), min(threshold, histogram.greatest)

    def _candidates(self, fewest: int) -> Iterator[int]:
        """Bins within the threshold, the widest first; below ``fewest`` a level is no bin."""
        if not self.power_of_two:
            yield from range(SIDE_BINS, fewest - 1, -ENTROPY_STRIDE)
            return
        reach = SIDE_BINS
        while reach >= fewest:
            yield reach
            reach //= 2


def divergence(inside: np.ndarray, below: float, above: float) -> float:
    """KL divergence of saturated values from the same in 256 levels (Migacz 2017).

    Parameters
    ----------
    inside : ndarray of float64, shape (bins,)
        Counts within the threshold.
    below, above : float
        Counts beyond it. The reference has them in its outermost bins; the levels do not know
        them, which is what saturation costs.

    Returns
    -------
    float
        In nats; infinite if nothing is inside.
    """
    kept = inside.sum()
    if kept == 0.0:
        return math.inf
    reference = inside.copy()
    reference[0] += below
    reference[-1] += above
    level = np.arange(len(inside)) * LEVELS // len(inside)
    live = reference > 0.0
    # Each level's count, spread evenly over those of its bins in which there is anything.
    share = np.bincount(level, inside, LEVELS) / np.maximum(np.bincount(level, live, LEVELS), 1.0)
    p = reference[live] / reference.sum()
    q = np.maximum(share[level[live]] / kept, ENTROPY_FLOOR)
    return float((p * np.log(p / q)).sum())


class Mse(HistogramObserver):
    """The range with the least expected squared error, values lying evenly within a bin.

    Candidates are the extremes, both times each of `SHRINKS`; then each end by itself, the other
    one held, twice. Lengths are in bins.
    """

    def _search(self, histogram: Histogram) -> tuple[float, float]:
        counts = histogram.live
        bins = np.flatnonzero(counts)
        left, weight = bins - float(SIDE_BINS), counts[bins].astype(np.float64)
        low, high = histogram.lowest / histogram.width, histogram.greatest / histogram.width

        def error(scale: float, zero_point: float) -> float:
            right = squared_error_integral(left + 1.0, scale, zero_point)
            return float(weight @ (right - squared_error_integral(left, scale, zero_point)))

        if self.power_of_two:
            zero_point = ZERO_POINT if low < 0.0 else 0
            holds = max(high / (LEVELS - 1 - zero_point), -low / ZERO_POINT)
            first = math.ceil(math.log2(holds))
            steps = np.ldexp(1.0, first - np.arange(POWER_OF_TWO_STEPS))
            best = min(steps, key=lambda step: error(float(step), zero_point))
            return self._power_of_two_range(histogram, float(best))

        def cost(ends: tuple[float, float]) -> float:
            return error(*self._quantiser(*ends))

        ends = min(((low * f, high * f) for f in SHRINKS), key=cost)
        if low < 0.0 < high and not self.symmetric:
            for _ in range(ASYMMETRIC_PASSES):
                ends = min(((low * f, ends[1]) for f in SHRINKS), key=cost)
                ends = min(((ends[0], high * f) for f in SHRINKS), key=cost)
        return ends[0] * histogram.width, ends[1] * histogram.width

    def _quantiser(self, low: float, high: float) -> tuple[float, float]:
        """Scale and zero point that a range will be given."""
        if self.symmetric and low < 0.0:
            return max(high / (LEVELS - 1 - ZERO_POINT), -low / ZERO_POINT), ZERO_POINT
        scale = (high - low) / (LEVELS - 1)
        return scale, float(np.rint(-low / scale))


def squared_error_integral(x: np.ndarray, scale: float, zero_point: float) -> np.ndarray:
    """Integral from 0 to x of the squared error of quantising to uint8, same shape as ``x``.

    With k the code of x less the zero point and r = x / scale - k, inside of the range it is
    scale**3 (k / 12 + r**3 / 3); outside the cube of the distance to the end adds a third.
    """
    inside = np.clip(x, -zero_point * scale, (LEVELS - 1 - zero_point) * scale)
    steps = inside / scale
    code = np.rint(steps)
    return scale**3 * (code / 12.0 + (steps - code) ** 3 / 3.0) + (x - inside) ** 3 / 3.0


OBSERVERS: Final[Mapping[str, type[Observer]]] = {
    "minmax": MinMax,
    "moving-average": MovingAverage,
    "percentile-99.99": Percentile,
    "percentile-99.9": Percentile,
    "coverage-95": Percentile,
    "entropy": Entropy,
    "mse": Mse,
}


def make_observer(
    kind: str, name: str, *, power_of_two: bool = False, symmetric: bool = False
) -> Observer:
    """An observer that has seen nothing.

    Parameters
    ----------
    kind : str
        One of `OBSERVERS`.
    name : str
        Of the point that is observed, for errors.
    power_of_two : bool
        `entropy` and `mse` choose among the ranges of a power-of-two scale: ``255 * 2**e`` with
        zero point 0 where no value is negative, else ``-128 * 2**e`` to ``127 * 2**e``.
    symmetric : bool
        `mse` counts the error of signed values at zero point 128, not wherever the range wants it.

    Raises
    ------
    InputError
        If there is no such kind.
    """
    if kind not in OBSERVERS:
        raise InputError(
            "no such observer",
            where=f"--observer {kind}",
            expected="one of " + ", ".join(OBSERVERS),
        )
    return OBSERVERS[kind](kind, name, power_of_two=power_of_two, symmetric=symmetric)
