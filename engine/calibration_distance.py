"""How far live inputs lie from the set that a model was calibrated on.

Against the histogram in the bundle's ``calibration.npz``; `models.calibration.FeatureHistogram`
writes it and says what its arrays are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from feeds.errors import InputError

SMALLEST_SHARE: Final = 1e-4  # in the stability index, of a bin without any


class CalibrationDistance:
    """Counts live rows in the calibration histogram's bins, window by window.

    Parameters
    ----------
    reference : mapping of str to ndarray
        ``counts``, int64 of shape (n_features, bins), over [-clip, clip], and ``clip``.
    n_features : int

    Attributes
    ----------
    ks : ndarray of float64, shape (n_features,)
        Of the last window: greatest difference of the two distribution functions at a bin's edge,
        0 to 1 (Kolmogorov 1933, Smirnov 1939).
    psi : ndarray of float64, shape (n_features,)
        Its population stability index, the sum over the bins of ``(q - p) ln(q / p)`` (Siddiqi
        2006, "Credit Risk Scorecards"), as in `models.calibration`.

    Raises
    ------
    InputError
        If the arrays are no histogram of so many features.
    """

    def __init__(self, reference: Mapping[str, np.ndarray], n_features: int) -> None:
        counts = np.asarray(reference.get("counts", np.zeros(0)))
        clip = np.asarray(reference.get("clip", np.zeros(0)))
        good = counts.ndim == 2 and counts.shape[1:] > (0,) and len(counts) == n_features
        good = good and counts.dtype.kind in "iu" and clip.shape == () and float(clip) > 0.0
        if not good or (counts < 0).any() or not (counts.sum(axis=1) > 0).all():
            raise InputError(
                "no feature histogram of a calibration set",
                where="calibration.npz",
                expected=f"counts of shape ({n_features}, bins) with rows in them, and clip",
                found=f"{counts.dtype} of shape {counts.shape}, clip {clip}",
                fix="write the bundle anew with 'octick model quantize'",
            )
        self._clip = float(clip)
        self._bins = counts.shape[1]
        self._share = counts / counts.sum(axis=1, keepdims=True)
        self._below = np.cumsum(self._share, axis=1)
        self._offsets = self._bins * np.arange(n_features)
        self._counts: np.ndarray = np.zeros(counts.shape, dtype=np.int64)
        self._rows = 0
        self.ks = np.zeros(n_features)
        self.psi = np.zeros(n_features)

    def add(self, rows: np.ndarray) -> None:
        """Count finite rows, shape (n, n_features)."""
        scaled = np.floor((rows.astype(np.float64) + self._clip) * (self._bins / 2.0 / self._clip))
        bins = np.clip(scaled, 0, self._bins - 1).astype(np.int64) + self._offsets
        flat = np.bincount(bins.ravel(), minlength=self._counts.size)
        self._counts += flat.reshape(self._counts.shape)
        self._rows += len(rows)

    def close_window(self) -> None:
        """Compare what was counted since the last time, if anything, and count anew."""
        if not self._rows:
            return
        share = self._counts / self._rows
        self.ks = np.abs(np.cumsum(share, axis=1) - self._below).max(axis=1)
        p, q = (np.maximum(item, SMALLEST_SHARE) for item in (self._share, share))
        self.psi = ((q - p) * np.log(q / p)).sum(axis=1)
        self._counts[:] = 0
        self._rows = 0
