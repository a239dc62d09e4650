"""The calibration set: whether it can serve, and how it is distributed.

What is kept in a bundle lets the live distribution be held against it later: `FeatureHistogram`
gives the population stability index of each feature, and the share of live values that lie where
calibration has been.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

import numpy as np

from engine.feature_specs import NAMES
from feeds.errors import InputError

BINS: Final = 64
SMALLEST_SHARE: Final = 1e-4  # in the stability index, of a bin without any
_KEYS: Final = ("counts", "lowest", "greatest", "clip")


def _name(feature: int, n_features: int) -> str:
    return NAMES[feature] if n_features == len(NAMES) else f"feature {feature}"


def _refuse_not_finite(rows: np.ndarray, where: str) -> None:
    finite = np.isfinite(rows)
    if not finite.all():
        row, feature = (int(i) for i in np.argwhere(~finite)[0])
        raise InputError(
            "a row is not finite",
            where=where,
            expected="finite values",
            found=f"{rows[row, feature]} in row {row}, {_name(feature, rows.shape[1])},"
            f" and {int((~finite).sum()) - 1} more",
            fix="take the rows from 'octick model train', or drop these",
        )


def check_rows(rows: np.ndarray, where: str) -> None:
    """Refuse a calibration set that cannot tell any range.

    Parameters
    ----------
    rows : ndarray of float, shape (n, features)
    where : str
        What the set is called in errors.

    Raises
    ------
    InputError
        If there is no row, a value is not finite, or every feature is constant.
    """
    assert rows.ndim == 2
    if rows.size == 0:
        raise InputError(
            "empty calibration set",
            where=where,
            expected="at least two different rows",
            found=f"{len(rows)} rows of {rows.shape[1]} features",
            fix="take longer tapes, or more rows with --rows",
        )
    _refuse_not_finite(rows, where)
    if (rows == rows[0]).all():
        raise InputError(
            "constant calibration set",
            where=where,
            expected="at least one feature that varies",
            found="a single row" if len(rows) == 1 else f"the same row {len(rows)} times",
            fix="take tapes on which the market moves, or more rows with --rows",
        )


class Coverage(NamedTuple):
    """How much of the live distribution lies where calibration has been.

    Attributes
    ----------
    of_feature : ndarray of float64, shape (features,)
        Share of each feature's values.
    values : float
        Share of all values: the mean of those.
    rows : float
        Share of the rows all of whose values do.
    """

    of_feature: np.ndarray
    values: float
    rows: float


class FeatureHistogram:
    """Counts of each normalised feature in `BINS` uniform bins over [-clip, clip].

    Attributes
    ----------
    counts : ndarray of int64, shape (n_features, BINS)
    lowest, greatest : ndarray of float64, shape (n_features,)
        Extremes seen; +inf and -inf before the first row.
    """

    def __init__(self, n_features: int, clip: float) -> None:
        assert clip > 0.0
        self.clip = clip
        self.counts: np.ndarray = np.zeros((n_features, BINS), dtype=np.int64)
        self.lowest = np.full(n_features, np.inf)
        self.greatest = np.full(n_features, -np.inf)

    @property
    def rows(self) -> int:
        """How many rows were counted."""
        return int(self.counts[:1].sum())

    @property
    def edges(self) -> np.ndarray:
        """Of the bins, float64 of shape (BINS + 1,)."""
        return np.linspace(-self.clip, self.clip, BINS + 1)

    def update(self, rows: np.ndarray) -> None:
        """Count normalised rows, shape (n, n_features); the outermost bins take what lies beyond.

        Raises
        ------
        InputError
            If a value is not finite.
        """
        n_features = len(self.counts)
        assert rows.ndim == 2
        assert rows.shape[1] == n_features
        if not len(rows):
            return
        _refuse_not_finite(rows, "feature histogram")
        x = rows.astype(np.float64)
        scaled = np.floor((x + self.clip) * (BINS / (2.0 * self.clip)))
        bins = np.clip(scaled, 0, BINS - 1).astype(np.int64) + BINS * np.arange(n_features)
        flat = np.bincount(bins.ravel(), minlength=n_features * BINS)
        self.counts += flat.reshape(n_features, BINS)
        self.lowest = np.minimum(self.lowest, x.min(axis=0))
        self.greatest = np.maximum(self.greatest, x.max(axis=0))

    def merge(self, other: FeatureHistogram) -> None:
        """Count what another one of the same shape and clip counted."""
        assert (self.clip, self.counts.shape) == (other.clip, other.counts.shape)
        self.counts += other.counts
        self.lowest = np.minimum(self.lowest, other.lowest)
        self.greatest = np.maximum(self.greatest, other.greatest)

    def save(self) -> dict[str, np.ndarray]:
        """Arrays for an npz file."""
        return {
            "counts": self.counts,
            "lowest": self.lowest,
            "greatest": self.greatest,
            "clip": np.array(self.clip),
        }

    @classmethod
    def load(cls, arrays: Mapping[str, np.ndarray], where: str) -> FeatureHistogram:
        """Read what `save` gave; other arrays beside are passed over.

        Parameters
        ----------
        where : str
            The file, for errors.

        Raises
        ------
        InputError
            If an array is missing or has another shape.
        """
        missing = [key for key in _KEYS if key not in arrays]
        counts: np.ndarray = np.empty((0, 0)) if missing else np.asarray(arrays["counts"])
        n = len(counts)
        expected = {"counts": (n, BINS), "lowest": (n,), "greatest": (n,), "clip": ()}
        found = {key: np.shape(arrays[key]) for key in _KEYS if key in arrays}
        if missing or found != expected or counts.dtype != np.int64 or counts.min(initial=0) < 0:
            raise InputError(
                "no feature histogram of a calibration set",
                where=where,
                expected=f"arrays {', '.join(_KEYS)}, the first int64 of shape (features, {BINS})",
                found=f"no {', '.join(missing)}" if missing else f"{found}, {counts.dtype}",
                fix="write the bundle anew with 'octick model quantize'",
            )
        histogram = cls(n, float(arrays["clip"]))
        histogram.counts = counts.copy()
        histogram.lowest = np.array(arrays["lowest"], dtype=np.float64)
        histogram.greatest = np.array(arrays["greatest"], dtype=np.float64)
        return histogram

    def psi(self, other: FeatureHistogram) -> np.ndarray:
        """Population stability index of each feature: how far two distributions lie apart.

        With the shares p and q of a bin it is the sum over the bins of ``(q - p) ln(q / p)``, the
        divergence of Jeffreys; a share below `SMALLEST_SHARE` counts as that much, so that an
        empty bin costs something finite. No term is negative, and either may be the reference.
        By custom less than 0.1 is stable and more than 0.25 a shift.

        Returns
        -------
        ndarray of float64, shape (n_features,)

        Raises
        ------
        InputError
            If one of the two has counted nothing.

        Notes
        -----
        Siddiqi (2006), "Credit Risk Scorecards". Chance alone makes at most about
        ``(BINS - 1) (1 / n + 1 / m)`` with n and m rows (Yurdakul and Naranjo 2020, "Statistical
        properties of the population stability index"): 0.1 says something from some thousand
        rows on.
        """
        assert (self.clip, self.counts.shape) == (other.clip, other.counts.shape)
        if not (self.rows and other.rows):
            raise InputError(
                "nothing to compare",
                where="feature histogram",
                expected="rows in both distributions",
                found=f"{self.rows} and {other.rows}",
            )
        p, q = (np.maximum(item.counts / item.rows, SMALLEST_SHARE) for item in (self, other))
        return ((q - p) * np.log(q / p)).sum(axis=1)

    def coverage(self, rows: np.ndarray) -> Coverage:
        """The calibration set's coverage of live rows: the share within the extremes seen.

        Parameters
        ----------
        rows : ndarray of float, shape (n, n_features)
            Normalised; what is not finite is not covered.

        Raises
        ------
        InputError
            If there are no rows.
        """
        assert rows.ndim == 2
        if not len(rows):
            raise InputError(
                "nothing to compare", where="live rows", expected="at least one", found="none"
            )
        covered = (rows >= self.lowest) & (rows <= self.greatest)
        of_feature = covered.mean(axis=0)
        return Coverage(of_feature, float(of_feature.mean()), float(covered.all(axis=1).mean()))
