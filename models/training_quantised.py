"""Quantisation-aware training: fake quantisation whose scales are learnt with the weights.

Training goes on from the float weights (BatchNorm folded) and from the scales that percentile
calibration chose: starting from the extremes was worse than no training at all. Steps are learnt by
the straight-through gradient of Esser et al. (2020), "Learned Step Size Quantization"; under the
power-of-two rule the logarithm is learnt and rounded, Jain et al. (2020), "Trained Quantization
Thresholds". Weight scales follow the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from models.numerics import quantise, round_through, wide_steps
from models.operations import Spec
from models.scheme import (
    INT8_MAX,
    Point,
    Rule,
    Scheme,
    fit_accumulators,
    quantise_weight,
)
from models.shapes import describe

SCALE_RATE: Final = 4.0  # scales move this much faster than weights


class _QuantiseWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor) -> Tensor:
        codes = (weight / scale).round()
        ctx.save_for_backward(codes.abs() <= INT8_MAX)
        return codes.clamp_(-INT8_MAX, INT8_MAX) * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None


class TrainedNumerics:
    """Fake quantisation with scales under training.

    Parameters
    ----------
    spec : Spec
    scheme : Scheme
        Where the scales start; its rule, zero points and kept layers stay.
    per_channel : bool
        Of the weights.
    """

    quantised = True

    def __init__(self, spec: Spec, scheme: Scheme, *, per_channel: bool = True) -> None:
        self.spec = spec
        self.rule: Rule = scheme.rule
        self._scheme = scheme
        self._per_channel = per_channel
        kinds = describe(spec).points
        self._logs = {
            name: torch.tensor(np.log2(point.scale) / SCALE_RATE, dtype=torch.float32)
            for name, point in scheme.points.items()
            if kinds[name] in ("signed", "positive")
        }
        self._fixed = {
            name: torch.tensor(point.scale, dtype=torch.float32)
            for name, point in scheme.points.items()
        }
        self._now: dict[str, Tensor] = {}
        self._weights: dict[str, tuple[Tensor, Tensor]] = {}

    def begin(self) -> None:
        """Scales and weights may have changed since the last pass."""
        self._now, self._weights = {}, {}

    def parameters(self) -> dict[str, Tensor]:
        """Logarithms of the scales, to be learnt."""
        return self._logs

    def scale(self, name: str) -> Tensor:
        if name not in self._logs:
            return self._fixed[name]
        if name not in self._now:
            exponent = self._logs[name] * SCALE_RATE
            if self.rule == "power-of-two":
                exponent = round_through(exponent)
            self._now[name] = torch.exp2(exponent)
        return self._now[name]

    def weight(self, name: str, weight: Tensor) -> Tensor:
        if self.keeps(name):
            return weight
        if name not in self._weights:
            _, scales = quantise_weight(
                weight.detach().numpy(), self.rule, per_channel=self._per_channel
            )
            steps = torch.from_numpy(scales.astype(np.float32))
            self._weights[name] = _QuantiseWeight.apply(weight, steps[:, None]), steps
        return self._weights[name][0]

    def bias(self, name: str, bias: Tensor, point: str) -> Tensor:
        if self.keeps(name):
            return bias
        unit = self._weights[name][1] * self.scale(point).detach()
        return round_through(bias / unit) * unit

    def point(self, name: str, values: Tensor) -> Tensor:
        return quantise(values, self.scale(name), self._scheme.points[name].zero_point)

    def wide(self, values: Tensor, scale: float, limit: int) -> Tensor:
        return wide_steps(values, scale, limit)

    def keeps(self, name: str) -> bool:
        return name in self._scheme.kept

    def finished(self, parameters: Mapping[str, np.ndarray]) -> Scheme:
        """The scheme that was learnt, for the weights that were trained with it."""
        points = dict(self._scheme.points)
        for name, log in self._logs.items():
            exponent = float(log.detach()) * SCALE_RATE
            if self.rule == "power-of-two":
                scale = 2.0 ** float(np.rint(np.float32(exponent)))
            else:
                scale = float(np.exp2(np.float32(exponent)))
            points[name] = Point(scale, points[name].zero_point)
        scales = {
            name: quantise_weight(
                parameters[f"{name}.weight"], self.rule, per_channel=self._per_channel
            )[1]
            for name in self._scheme.weight_scales
        }
        scheme = replace(self._scheme, points=points, weight_scales=scales)
        if self.rule == "power-of-two":
            scheme = fit_accumulators(describe(self.spec), parameters, scheme)
        return scheme
