"""How far INT8 and FP32 lie apart: quantiles, and when that changes.

Quantiles by DDSketch (Masson, Rim and Lee 2019, "DDSketch: a fast and fully-mergeable quantile
sketch with relative-error guarantees", VLDB 12). Change points by ADWIN (Bifet and Gavalda 2007,
"Learning from time-changing data with adaptive windowing", SIAM SDM).
"""

from __future__ import annotations

import sys
from typing import Any, Final

RELATIVE_ACCURACY: Final = 0.01  # of a quantile
MAX_SKETCH_BINS: Final = 2_048
BATCH_ROWS: Final = 32  # whose mean is one value of ADWIN's stream
FULL_SCALE: Final = 4.0  # ADWIN takes values from 0 to 1: 1 is so many times the usual
LEARN_BATCHES: Final = 256
_CLOCK: Final = 1
_GRACE_BATCHES: Final = 16
_LEAST_BATCHES: Final = 4
JUDGED_BATCHES: Final = 64  # of ADWIN's window, for a verdict: a cut may leave a burst's few alone


def new_sketch() -> Any:
    """A sketch of quantiles within `RELATIVE_ACCURACY`, in bounded memory."""
    from ddsketch.ddsketch import LogCollapsingLowestDenseDDSketch

    return LogCollapsingLowestDenseDDSketch(RELATIVE_ACCURACY, MAX_SKETCH_BINS)


class DivergenceWatch:
    """A stream of divergences, with an alarm while they are greater than they used to be.

    Parameters
    ----------
    delta : float
        ADWIN's confidence: the chance that it cuts where nothing changed, if the batches were
        independent.
    ratio : float
        How many times the usual the mean must have become to matter.
    recovered_share : float
        Of the rise that is allowed: the alarm ends within.
    every_rows : int
        A batch spans `BATCH_ROWS` times so many.

    Attributes
    ----------
    out : bool
        Whether the alarm stands.
    ratio : float
        Mean of ADWIN's window over the usual mean; 1 while that is being learnt.
    greatest : float

    Notes
    -----
    The usual is the mean of the first `LEARN_BATCHES` batches. ADWIN's bound has a term for the
    range of the values, so they are given as shares of `FULL_SCALE` times the usual.
    """

    def __init__(self, delta: float, ratio: float, recovered_share: float, every_rows: int) -> None:
        # SciPy comes with River, a second's worth: only where a monitor is made.
        from river.drift import ADWIN

        self._adwin = ADWIN(
            delta=delta,
            clock=_CLOCK,
            min_window_length=_LEAST_BATCHES,
            grace_period=_GRACE_BATCHES,
        )
        self._sketch = new_sketch()
        self._limit = ratio
        self._calm = 1.0 + recovered_share * (ratio - 1.0)
        self._batch_rows = BATCH_ROWS * every_rows
        self._sum = 0.0
        self._rows = 0
        self._usual = 0.0
        self._batches = 0
        self._cut = False
        self.out = False
        self.ratio = 1.0
        self.greatest = 0.0

    def update(self, divergence: float) -> bool:
        """Take one more, finite and not negative; whether a batch ended with it."""
        self._sketch.add(divergence)
        self.greatest = max(self.greatest, divergence)
        self._sum += divergence
        self._rows += 1
        if self._rows < self._batch_rows:
            return False
        mean = self._sum / self._rows
        self._sum = 0.0
        self._rows = 0
        self._take(mean)
        return True

    @property
    def rows_to_batch(self) -> int:
        """Divergences with the last of which a batch ends; 1 or more."""
        return self._batch_rows - self._rows

    def _take(self, mean: float) -> None:
        self._batches += 1
        if self._batches <= LEARN_BATCHES:
            self._usual += mean / LEARN_BATCHES
            return
        # Twins that never differed: anything at all is then off the scale.
        unit = max(self._usual, sys.float_info.min)
        self._adwin.update(min(mean / (FULL_SCALE * unit), 1.0))
        self._cut = self._cut or bool(self._adwin.drift_detected)
        self.ratio = FULL_SCALE * self._adwin.estimation
        if self._adwin.width < JUDGED_BATCHES:
            return
        if self.out:
            self.out = self.ratio > self._calm
            self._cut = self.out
        else:
            self.out = self._cut and self.ratio >= self._limit

    def quantile(self, share: float) -> float:
        """Of all divergences so far; 0 before the first."""
        return float(self._sketch.get_quantile_value(share) or 0.0)
