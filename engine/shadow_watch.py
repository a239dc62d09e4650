"""What watches the shadow's answers: how far both models are apart, and whether that drifts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

import numpy as np

from engine.bundle import Bundle
from engine.divergence import new_sketch
from engine.drift import DriftAlert, DriftConfig, DriftMonitor
from engine.feature_specs import NAMES
from engine.saturation import SaturationProbe
from engine.shadow_ring import FRESH, MAX_OUTPUT_STATS

PROBE_EVERY: Final = 16  # answers
CALIBRATION_NAME: Final = "calibration.npz"
QUANTILES: Final = (0.5, 0.99)


class Watch:
    """Follows the answers of one bundle's models, in their order.

    Parameters
    ----------
    bundle : Bundle
    drift : DriftConfig
    """

    def __init__(self, bundle: Bundle, drift: DriftConfig) -> None:
        self._has_state = bool(bundle.state("int8") or bundle.state("fp32"))
        self._probe = SaturationProbe(bundle)
        reference = {}
        path = bundle.path / CALIBRATION_NAME
        if path.is_file():
            with np.load(path, allow_pickle=False) as file:
                reference = {name: file[name] for name in file.files}
        self._monitor = DriftMonitor(drift, NAMES, reference, self._probe.names)
        self._seen = 0
        self._sketches = [new_sketch() for _ in range(min(bundle.n_outputs, MAX_OUTPUT_STATS))]

    @property
    def patience(self) -> int:
        """Answers of which, taken together, all but the last raise no alert; 1 or more."""
        return self._monitor.rows_to_verdict

    def take(
        self, slots: Sequence[int], flags: Sequence[int], xs: np.ndarray, scores: np.ndarray
    ) -> list[DriftAlert]:
        """Take answers; returns what drifts. How many come at a time changes nothing else.

        Parameters
        ----------
        slots, flags : sequence of int
            Of the requests.
        xs : ndarray of float32, shape (answers, n_features)
        scores : ndarray of float32, shape (answers, 2, n_outputs)
        """
        apart = np.abs(scores[:, 0] - scores[:, 1])
        divergences = apart.max(axis=1)
        finite = apart[np.isfinite(divergences)]
        for sketch, values in zip(self._sketches, finite.T.tolist(), strict=False):
            for value in values:
                sketch.add(value)
        alerts: list[DriftAlert] = []
        for i, divergence in enumerate(divergences.tolist()):
            if flags[i] & FRESH:
                self._probe.reset(slots[i])
            self._seen += 1
            saturated = None
            if self._has_state or self._seen % PROBE_EVERY == 0:
                saturated = self._probe.shares(slots[i], xs[i : i + 1])
                os.sched_yield()
            alerts += self._monitor.observe(xs[i], divergence, saturated)
        return alerts

    def figures(self) -> dict[str, float]:
        """Of `engine.drift.DriftMonitor.state`, alerts and alarms also as ``drift_…``."""
        state = self._monitor.state()
        return state | {f"drift_{name}": state[name] for name in ("alerts", "alarms")}

    def quantiles_by_output(self) -> list[list[float]]:
        """`QUANTILES` of each output's own divergence, of the first outputs."""
        return [[s.get_quantile_value(q) or 0.0 for q in QUANTILES] for s in self._sketches]
