"""Watches whether a model still works on what it was made for: its inputs and its error.

The shadow's process calls `DriftMonitor.observe` for each inference it repeats. What is watched,
why so, and what it was measured to find stands in ``engine/DRIFT.md``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Final, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta

from engine.calibration_distance import CalibrationDistance
from engine.change_chart import ChangeChart
from engine.divergence import DivergenceWatch

MAX_ROWS: Final = 1 << 20
MAX_RUNGS: Final = 12
DISTANCE_WINDOWS: Final = 16  # of the shortest, for one look at the calibration set
DIVERGENCE: Final = "INT8 against FP32"


class DriftConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When a drift is worth an alert.

    Attributes
    ----------
    every_rows : int
        One observed row of so many is kept to judge the inputs by. 1 where the shadow itself
        repeats only a share of the inferences.
    window_rows : int
        Kept rows in the shortest window.
    rungs : int
        Lengths of windows; each is twice the one before.
    learn_windows : int
        Windows of a length that only teach what is usual.
    shift_sigmas : float
        How far a window's mean may be from the usual, in deviations of such means.
    smallest_shift_sd : float
        Shift of an input that is never worth an alert, in its standard deviations in training.
    ks_distance : float
        Kolmogorov-Smirnov distance of an input from the calibration set that always is.
    adwin_delta : float
        Confidence of the change points of the divergence.
    divergence_ratio : float
        How many times the usual the mean divergence must have become.
    smallest_saturation_rise : float
        Rise of a layer's share of saturated codes that is never worth an alert.
    recovered_share : float
        Of a threshold: below it an alarm has ended, and the next one is told again.
    """

    every_rows: Annotated[int, Meta(ge=1, le=MAX_ROWS)] = 16
    window_rows: Annotated[int, Meta(ge=16, le=MAX_ROWS)] = 1_024
    rungs: Annotated[int, Meta(ge=1, le=MAX_RUNGS)] = 8
    learn_windows: Annotated[int, Meta(ge=4, le=1_000)] = 8
    shift_sigmas: Annotated[float, Meta(ge=1.0, le=20.0)] = 5.0
    smallest_shift_sd: Annotated[float, Meta(gt=0.0, le=8.0)] = 0.1
    ks_distance: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.55
    adwin_delta: Annotated[float, Meta(gt=0.0, lt=1.0)] = 0.002
    divergence_ratio: Annotated[float, Meta(gt=1.0, lt=4.0)] = 1.25
    smallest_saturation_rise: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.01
    recovered_share: Annotated[float, Meta(gt=0.0, lt=1.0)] = 0.5


class DriftAlert(NamedTuple):
    """One alarm, as it begins.

    Attributes
    ----------
    kind : str
        "input", "divergence" or "saturation".
    subject : str
        The feature's or layer's name, or `DIVERGENCE`.
    statistic : str
        "MEAN" (shift of a window's mean, in standard deviations in training), "KS" (distance from
        the calibration set), "ADWIN" (mean divergence over the usual) or "RATE" (rise of the
        share of saturated codes).
    value, threshold : float
    rows : int
        Observed so far.
    """

    kind: str
    subject: str
    statistic: str
    value: float
    threshold: float
    rows: int


class DriftMonitor:
    """Turns a sequence of repeated inferences into alerts: the same sequence, the same alerts.

    Parameters
    ----------
    config : DriftConfig
    feature_names : sequence of str
    reference : mapping of str to ndarray
        The bundle's ``calibration.npz``; where it is empty the inputs are not watched.
    layer_names : sequence of str
        Of the shares of saturated codes; none where they are not watched.

    Raises
    ------
    InputError
        If the reference is none.
    """

    def __init__(
        self,
        config: DriftConfig,
        feature_names: Sequence[str],
        reference: Mapping[str, np.ndarray],
        layer_names: Sequence[str] = (),
    ) -> None:
        self._config = config
        self._features = tuple(feature_names)
        self._layers = tuple(layer_names)
        self._window_rows = config.window_rows * config.every_rows
        self.reset(reference)

    def reset(self, reference: Mapping[str, np.ndarray]) -> None:
        """Forget everything: another model serves, with another calibration set."""
        config = self._config
        n = len(self._features)
        self._distance = CalibrationDistance(reference, n) if reference else None
        self._inputs = ChangeChart(
            n,
            config.shift_sigmas,
            config.smallest_shift_sd,
            config.learn_windows,
            config.recovered_share,
            rungs=config.rungs,
        )
        self._saturation = ChangeChart(
            len(self._layers),
            config.shift_sigmas,
            config.smallest_saturation_rise,
            config.learn_windows,
            config.recovered_share,
            rungs=config.rungs,
            rises_only=True,
        )
        self._divergence = DivergenceWatch(
            config.adwin_delta, config.divergence_ratio, config.recovered_share, config.every_rows
        )
        self._kept: np.ndarray = np.zeros((config.window_rows, n), dtype=np.float32)
        self._n_kept = 0
        self._saturated = np.zeros(len(self._layers))
        self._n_saturated = 0
        self._windows = 0
        self._far = np.zeros(n, dtype=bool)  # from the calibration set
        self._input_alarms = np.zeros(n, dtype=bool)
        self._saturation_alarms = np.zeros(len(self._layers), dtype=bool)
        self._divergence_alarm = False
        self._rows = 0
        self._not_finite = 0
        self._alerts = 0

    def observe(
        self, x: np.ndarray, divergence: float, saturated: np.ndarray | None
    ) -> list[DriftAlert]:
        """Take one repeated inference.

        Parameters
        ----------
        x : ndarray of float32, shape (n_features,)
            The model's normalised input.
        divergence : float
            Greatest absolute difference of the two models' scores.
        saturated : ndarray of float, shape (layers,), or None
            Share of saturated codes of each layer, where it was looked at.

        Returns
        -------
        list of DriftAlert
            One for each subject whose alarm begins here; mostly none. What is not finite is
            counted and otherwise passed over: that is for the value check to tell.
        """
        alerts: list[DriftAlert] = []
        if self._distance is not None and self._rows % self._config.every_rows == 0:
            if np.isfinite(x).all():
                self._kept[self._n_kept] = x
                self._n_kept += 1
            else:
                self._not_finite += 1
        self._rows += 1
        if not math.isfinite(divergence):
            self._not_finite += 1
        elif self._divergence.update(divergence):
            self._judge_divergence(alerts)
        if saturated is not None and self._layers:
            if np.isfinite(saturated).all():
                self._saturated += saturated
                self._n_saturated += 1
            else:
                self._not_finite += 1
        if self._rows % self._window_rows == 0:
            self._close_window(alerts)
        self._alerts += len(alerts)
        return alerts

    @property
    def rows_to_verdict(self) -> int:
        """Rows of which, observed together, only the last can raise an alert; 1 or more."""
        to_window = self._window_rows - self._rows % self._window_rows
        return min(to_window, self._divergence.rows_to_batch)

    def _close_window(self, alerts: list[DriftAlert]) -> None:
        self._windows += 1
        if self._distance is not None:
            rows = self._kept[: self._n_kept]
            # A window of which most was not finite has no mean to speak of.
            if 2 * len(rows) >= len(self._kept):
                self._inputs.update(rows.mean(axis=0, dtype=np.float64))
                self._distance.add(rows)
            self._n_kept = 0
            if self._windows % DISTANCE_WINDOWS == 0:
                self._distance.close_window()
            self._judge_inputs(self._distance, alerts)
        if self._n_saturated:
            self._saturation.update(self._saturated / self._n_saturated)
            self._saturated[:] = 0.0
            self._n_saturated = 0
            self._judge_saturation(alerts)

    def _judge_inputs(self, distance: CalibrationDistance, alerts: list[DriftAlert]) -> None:
        limit = self._config.ks_distance
        self._far = distance.ks > np.where(self._far, self._config.recovered_share * limit, limit)
        moved = self._inputs.out
        alarms = moved | self._far
        for i in np.flatnonzero(alarms & ~self._input_alarms).tolist():
            if moved[i]:
                statistic, (value, threshold) = "MEAN", self._inputs.evidence(i)
            else:
                statistic, value, threshold = "KS", float(distance.ks[i]), limit
            name = self._features[i]
            alerts.append(DriftAlert("input", name, statistic, value, threshold, self._rows))
        self._input_alarms = alarms

    def _judge_saturation(self, alerts: list[DriftAlert]) -> None:
        alarms = self._saturation.out
        for i in np.flatnonzero(alarms & ~self._saturation_alarms).tolist():
            value, threshold = self._saturation.evidence(i)
            name = self._layers[i]
            alerts.append(DriftAlert("saturation", name, "RATE", value, threshold, self._rows))
        self._saturation_alarms = alarms

    def _judge_divergence(self, alerts: list[DriftAlert]) -> None:
        watch = self._divergence
        if watch.out and not self._divergence_alarm:
            limit = self._config.divergence_ratio
            alerts.append(
                DriftAlert("divergence", DIVERGENCE, "ADWIN", watch.ratio, limit, self._rows)
            )
        self._divergence_alarm = watch.out

    def state(self) -> dict[str, float]:
        """Figures for the metrics; those of the inputs are of the last whole window.

        Returns
        -------
        dict of str to float
            ``drift``, ``drift_feature``: the worst population stability index and the feature it
            is of (-1: none yet); ``ks``, ``ks_feature``: the worst distance; ``divergence_p50``,
            ``divergence_p99``, ``divergence_max`` since the last reset and ``divergence_ratio``;
            ``rows``, ``not_finite``, ``alerts`` so far, and ``alarms`` that stand.
        """
        figures = {"drift": 0.0, "drift_feature": -1.0, "ks": 0.0, "ks_feature": -1.0}
        if self._distance is not None and self._windows >= DISTANCE_WINDOWS:
            for name, values in (("drift", self._distance.psi), ("ks", self._distance.ks)):
                worst = int(values.argmax())
                figures |= {name: float(values[worst]), f"{name}_feature": float(worst)}
        alarms = int(self._input_alarms.sum()) + int(self._saturation_alarms.sum())
        return figures | {
            "divergence_p50": self._divergence.quantile(0.5),
            "divergence_p99": self._divergence.quantile(0.99),
            "divergence_max": self._divergence.greatest,
            "divergence_ratio": self._divergence.ratio,
            "rows": float(self._rows),
            "not_finite": float(self._not_finite),
            "alerts": float(self._alerts),
            "alarms": float(alarms + self._divergence_alarm),
        }
