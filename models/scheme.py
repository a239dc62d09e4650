"""How a network is quantised: the scale of every point and every weight.

Activations are uint8, weights int8 and symmetric, biases int32 at the product of both scales.
Under the rule ``power-of-two`` every scale is 2**e; then requantisation is exact in float32 before
its one rounding (half to even), and as long as an accumulator stays under 2**24 float32 and
integer arithmetic give the same bits, whatever the order of the sums.

Sources: Jacob et al. (2018), "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference"; Nagel et al. (2021), "A White Paper on Neural Network
Quantization"; Jain et al. (2020), "Trained Quantization Thresholds" (power-of-two scales).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import numpy as np

from feeds.errors import InputError
from models.operations import Spec
from models.shapes import FIXED_POINTS, INPUT_ZERO_POINT, Anatomy, PointKind, describe

Rule = Literal["free", "power-of-two"]
Kept = Literal["fp32", "fp16"]
RULES: Final[tuple[Rule, ...]] = ("free", "power-of-two")
UINT8_MAX: Final = 255
INT8_MAX: Final = 127
MAX_ACCUMULATOR: Final = 1 << 24  # float32 holds every integer up to here
SMALLEST_EXPONENT: Final = -24
SEARCHED_EXPONENTS: Final = 3


@dataclass(frozen=True)
class Point:
    """``value = (q - zero_point) * scale`` for q in 0 … 255."""

    scale: float
    zero_point: int

    @property
    def reach(self) -> int:
        """Greatest ``|q - zero_point|``."""
        return max(self.zero_point, UINT8_MAX - self.zero_point)

    def quantise(self, values: np.ndarray) -> np.ndarray:
        """uint8 of the same shape; float32 arithmetic, half to even, saturating."""
        scaled = np.asarray(values, dtype=np.float32) / np.float32(self.scale)
        return np.clip(np.rint(scaled) + self.zero_point, 0, UINT8_MAX).astype(np.uint8)

    def dequantise(self, codes: np.ndarray) -> np.ndarray:
        """float32 of the same shape."""
        return (codes.astype(np.float32) - self.zero_point) * np.float32(self.scale)


def exponent_for(greatest: float, levels: int) -> int:
    """Smallest e with ``levels * 2**e >= greatest``; -24 where there is nothing to hold."""
    if greatest <= levels * 2.0**SMALLEST_EXPONENT:
        return SMALLEST_EXPONENT
    fraction, exponent = math.frexp(greatest / levels)
    return exponent - 1 if fraction == 0.5 else exponent


def is_power_of_two(scale: float) -> bool:
    """Whether a scale is 2**e."""
    return scale > 0.0 and math.frexp(scale)[0] == 0.5


def point_for(
    kind: PointKind, low: float, high: float, rule: Rule, *, symmetric: bool, clip: float
) -> Point:
    """Scale and zero point that hold a range.

    Parameters
    ----------
    kind : PointKind
        ``unit``, ``tanh`` and ``input`` are fixed and take no notice of the range.
    low, high : float
        ``low <= 0 <= high``.
    symmetric : bool
        Zero point 128 for signed values; else wherever the range wants it.
    """
    if kind in FIXED_POINTS:
        return Point(*FIXED_POINTS[kind])
    if kind == "input":
        # The top code is one step below +clip: half a step is the usual error anyway.
        return Point(_by_rule(clip / INPUT_ZERO_POINT, rule), INPUT_ZERO_POINT)
    if kind == "positive":
        return Point(_by_rule(high / UINT8_MAX, rule), 0)
    if symmetric:
        steps = max(high / (UINT8_MAX - INPUT_ZERO_POINT), -low / INPUT_ZERO_POINT)
        return Point(_by_rule(steps, rule), INPUT_ZERO_POINT)
    scale = _by_rule((high - low) / UINT8_MAX, rule)
    # Even: ONNX Runtime's fused Add and Mul round ties with the zero point inside.
    return Point(scale, int(np.clip(2.0 * np.rint(-low / scale / 2.0), 0, UINT8_MAX - 1)))


def _by_rule(scale: float, rule: Rule) -> float:
    if rule == "power-of-two":
        return float(2.0 ** exponent_for(scale, 1))
    return float(np.float32(max(scale, 2.0**SMALLEST_EXPONENT)))


def quantise_weight(
    weight: np.ndarray, rule: Rule, *, per_channel: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """int8 weights of a float matrix, and the scale of each output channel.

    Under ``power-of-two``, of the smallest scale that holds a channel's greatest weight and the
    next smaller ones, which saturate some, the one with the least squared error is taken.

    Parameters
    ----------
    weight : ndarray of float32, shape (out, in)
    per_channel : bool
        One scale a row; else one for all rows.

    Returns
    -------
    codes : ndarray of int8, shape (out, in)
    scales : ndarray of float64, shape (out,)
    """
    rows = np.asarray(weight, dtype=np.float64)
    greatest = np.abs(rows).max(axis=1, initial=0.0)
    if not per_channel:
        greatest = np.full(len(rows), greatest.max(initial=0.0))
    if rule == "free":
        least = np.full(len(rows), 2.0**SMALLEST_EXPONENT)
        scales = np.maximum(greatest / INT8_MAX, least).astype(np.float32).astype(np.float64)
        return round_weight(rows, scales), scales
    holds = np.ldexp(1.0, [exponent_for(float(value), INT8_MAX) for value in greatest])
    best, least = holds, np.full(len(rows), np.inf)
    for k in range(SEARCHED_EXPONENTS):
        scales = np.ldexp(holds, -k)
        error = np.square(round_weight(rows, scales) * scales[:, None] - rows).sum(axis=1)
        if not per_channel:
            error = np.full(len(rows), error.sum())
        best = np.where(error < least, scales, best)
        least = np.minimum(error, least)
    return round_weight(rows, best), best


def round_weight(rows: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """int8 codes of weights at given scales, half to even, saturating at ±127."""
    codes = np.rint(rows / scales[:, None])
    return np.clip(codes, -INT8_MAX, INT8_MAX).astype(np.int8)


@dataclass(frozen=True)
class IntegerLayer:
    """A layer's weights as they are served.

    Attributes
    ----------
    weight : ndarray of int8, shape (out, in)
    weight_scale : ndarray of float64, shape (out,)
    bias : ndarray of int32, shape (out,), or None
    bias_scale : ndarray of float64, shape (out,)
        ``in_scale * weight_scale``, rounded to float32: the unit of the accumulators.
    """

    weight: np.ndarray
    weight_scale: np.ndarray
    bias: np.ndarray | None
    bias_scale: np.ndarray

    def bound(self, reach: int) -> np.ndarray:
        """Greatest magnitude of each accumulator, int64 of shape (out,)."""
        sums = np.abs(self.weight.astype(np.int64)).sum(axis=1) * reach
        return sums if self.bias is None else sums + np.abs(self.bias.astype(np.int64))


@dataclass(frozen=True)
class Scheme:
    """Everything that quantisation decided.

    Attributes
    ----------
    rule : Rule
    points : dict of str to Point
    weight_scales : dict of str to ndarray of float64, shape (out,)
        Of each layer that is quantised.
    kept : dict of str to Kept
        Layers and operations that stay in floating point.
    """

    rule: Rule
    points: Mapping[str, Point]
    weight_scales: Mapping[str, np.ndarray]
    kept: Mapping[str, Kept] = field(default_factory=dict)

    def integer_layer(
        self, name: str, weight: np.ndarray, bias: np.ndarray | None, in_scale: float
    ) -> IntegerLayer:
        """Weights of a layer in integers.

        Raises
        ------
        InputError
            If a bias does not fit its accumulator: the layer is out of proportion.
        """
        scales = self.weight_scales[name]
        # One float32 product, as ONNX Runtime makes it of both scales.
        unit = (scales.astype(np.float32) * np.float32(in_scale)).astype(np.float64)
        codes = None
        if bias is not None:
            rounded = np.rint(bias.astype(np.float64) / unit)
            if np.abs(rounded).max(initial=0.0) >= MAX_ACCUMULATOR:
                raise InputError(
                    "a bias is out of proportion to its weights",
                    where=f"layer {name}, channel {int(np.abs(rounded).argmax())}",
                    expected=f"fewer than {MAX_ACCUMULATOR} accumulator steps",
                    found=f"{np.abs(rounded).max():.0f}",
                    fix=f"keep the layer in floating point: --keep {name}",
                )
            codes = rounded.astype(np.int32)
        return IntegerLayer(round_weight(weight, scales), scales, codes, unit)


def make_scheme(
    spec: Spec,
    parameters: Mapping[str, np.ndarray],
    ranges: Callable[[str], tuple[float, float]],
    *,
    rule: Rule,
    symmetric: bool = True,
    per_channel: bool = True,
    kept: Mapping[str, Kept] | None = None,
) -> Scheme:
    """Choose every scale.

    Parameters
    ----------
    spec : Spec
    parameters : mapping
        Folded float weights, see `models.shapes.fold_norms`.
    ranges : callable
        (low, high) of an observed point, by name.

    Raises
    ------
    InputError
        If ``kept`` names what is no layer or sensitive operation of this network.
    """
    anatomy = describe(spec)
    kept = dict(kept or {})
    known = {*anatomy.layers, *anatomy.sensitive}
    for name in kept:
        if name not in known:
            raise InputError(
                "no such layer",
                where=f"--keep {name}",
                expected="one of " + ", ".join(sorted(known)),
            )
    points = {}
    for name, kind in anatomy.points.items():
        low, high = (0.0, 0.0) if kind in (*FIXED_POINTS, "input") else ranges(name)
        points[name] = point_for(kind, low, high, rule, symmetric=symmetric, clip=spec.clip)
    scales = {
        name: quantise_weight(parameters[f"{name}.weight"], rule, per_channel=per_channel)[1]
        for name in anatomy.layers
        if name not in kept
    }
    scheme = Scheme(rule, points, scales, kept)
    if rule == "power-of-two":
        scheme = fit_accumulators(anatomy, parameters, scheme)
    return scheme


def fit_accumulators(
    anatomy: Anatomy, parameters: Mapping[str, np.ndarray], scheme: Scheme
) -> Scheme:
    """Coarsen weights until every accumulator, and every sum of two of a cell, is below 2**24.

    The two products of a recurrent cell are added in floating point: in units of the finer of
    their scales the sum must be an integer that float32 holds. Channel by channel, the finer one
    of the two gives way.
    """
    scales = {name: array.copy() for name, array in scheme.weight_scales.items()}
    fitted = replace(scheme, weight_scales=scales)
    pairs = {name.removesuffix(".h"): None for name in anatomy.layers if name.endswith(".h")}
    groups = [
        [f"{cell}.x", f"{cell}.h"]
        for cell in pairs
        if f"{cell}.x" in scales and f"{cell}.h" in scales
    ]
    groups += [[name] for name in scales if name.rpartition(".")[0] not in pairs]
    for group in groups:
        while True:
            units, totals = [], []
            for name in group:
                point = scheme.points[anatomy.layers[name].point]
                layer = fitted.integer_layer(
                    name, parameters[f"{name}.weight"], parameters.get(f"{name}.bias"), point.scale
                )
                units.append(layer.bias_scale)
                totals.append(layer.bound(point.reach) * layer.bias_scale)
            finest = np.min(units, axis=0)
            over = np.sum(totals, axis=0) / finest >= MAX_ACCUMULATOR
            if not over.any():
                break
            for name, unit in zip(group, units, strict=True):
                scales[name][over & (unit == finest)] *= 2.0
    return fitted
