"""Post-training quantisation of a dense network to `exact-int8`: integers and powers of two.

Activations are uint8 (input zero point 128, hidden 0, so that saturation is the ReLU), weights
int8 and symmetric with one scale a channel, biases and accumulators int32, every scale a power of
two. Then requantisation is exact in float32 before its one rounding (half to even), and as long as
an accumulator stays under 2**24 float32 and integer arithmetic give the same bits, whatever the
order of the sums: a fused kernel, an unfused graph and `IntegerNetwork` agree.

Sources: Jacob et al. (2018), "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference"; Nagel et al. (2021), "A White Paper on Neural Network
Quantization", section 3 (percentile range, per-channel weights).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

ACTIVATION_PERCENTILE: Final = 99.99
HISTOGRAM_BINS: Final = 4096
INPUT_ZERO_POINT: Final = 128
UINT8_MAX: Final = 255
INT8_MAX: Final = 127
MAX_ACCUMULATOR: Final = 1 << 24  # float32 holds every integer below


class PercentileObserver:
    """Streaming histogram of magnitudes: O(bins) memory however much is observed.

    The range starts at the first batch's greatest magnitude and doubles when a value passes it,
    merging bins in pairs, so nothing is counted twice or lost.
    """

    def __init__(self) -> None:
        self._counts = np.zeros(HISTOGRAM_BINS, dtype=np.int64)
        self._top = 0.0

    def update(self, values: np.ndarray) -> None:
        """Count the magnitudes of a batch, any shape, finite."""
        magnitudes = np.abs(np.asarray(values, dtype=np.float64)).ravel()
        greatest = float(magnitudes.max(initial=0.0))
        assert math.isfinite(greatest), "only finite activations can be observed"
        if greatest == 0.0 and self._top == 0.0:
            return
        if self._top == 0.0:
            self._top = 2.0 ** math.ceil(math.log2(greatest))
        while greatest > self._top:
            pairs = self._counts.reshape(-1, 2).sum(axis=1)
            self._counts[:] = 0
            self._counts[: HISTOGRAM_BINS // 2] = pairs
            self._top *= 2.0
        bins = np.minimum(magnitudes * (HISTOGRAM_BINS / self._top), HISTOGRAM_BINS - 1)
        self._counts += np.bincount(bins.astype(np.int64), minlength=HISTOGRAM_BINS)

    def percentile(self, percent: float) -> float:
        """Upper edge of the bin that holds the percentile; 0 where nothing was observed."""
        total = int(self._counts.sum())
        if total == 0:
            return 0.0
        bin_index = int(np.searchsorted(np.cumsum(self._counts), total * percent / 100.0))
        return (min(bin_index, HISTOGRAM_BINS - 1) + 1) * self._top / HISTOGRAM_BINS


def exponent_for(greatest: float, levels: int) -> int:
    """Smallest e with ``levels * 2**e >= greatest``; -24 where there is nothing to hold."""
    if greatest <= levels * 2.0**-24:
        return -24
    fraction, exponent = math.frexp(greatest / levels)
    return exponent - 1 if fraction == 0.5 else exponent


@dataclass(frozen=True)
class IntegerLayer:
    """One dense layer in integers.

    Attributes
    ----------
    weight : ndarray of int8, shape (out, in)
    bias : ndarray of int32, shape (out,)
        In units of ``2 ** (in_exponent + weight_exponent)``.
    weight_exponent : ndarray of int64, shape (out,)
    in_exponent, in_zero_point : int
        Scale (a power of two) and zero point of the input.
    out_exponent : int or None
        Scale of the uint8 output; None where the accumulators leave as float32.
    """

    weight: np.ndarray
    bias: np.ndarray
    weight_exponent: np.ndarray
    in_exponent: int
    in_zero_point: int
    out_exponent: int | None

    def accumulator_bound(self) -> int:
        """Greatest magnitude any accumulator of this layer can reach."""
        reach = max(self.in_zero_point, UINT8_MAX - self.in_zero_point)
        sums = np.abs(self.weight.astype(np.int64)).sum(axis=1) * reach
        return int((sums + np.abs(self.bias.astype(np.int64))).max())


@dataclass(frozen=True)
class IntegerNetwork:
    """The quantised network, and the reference arithmetic every backend must reproduce."""

    layers: tuple[IntegerLayer, ...]

    def forward(self, x: np.ndarray) -> np.ndarray:
        """Outputs float32, shape (n, classes), of inputs float32, shape (n, features)."""
        first = self.layers[0]
        quantised = np.rint(np.ldexp(x.astype(np.float32), -first.in_exponent))
        q = np.clip(quantised + first.in_zero_point, 0, UINT8_MAX).astype(np.int64)
        for layer in self.layers:
            accumulator = (q - layer.in_zero_point) @ layer.weight.astype(np.int64).T + layer.bias
            scale = layer.in_exponent + layer.weight_exponent
            if layer.out_exponent is None:
                return np.ldexp(accumulator.astype(np.float32), scale)
            real = np.ldexp(accumulator.astype(np.float64), scale - layer.out_exponent)
            q = np.clip(np.rint(real), 0, UINT8_MAX).astype(np.int64)
        raise AssertionError("the last layer leaves in float32")


def quantise_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per-channel int8 weights and exponents of a float matrix of shape (out, in).

    Of the smallest power of two that holds a channel's greatest weight and the one below it,
    which saturates some, the one with the smaller squared error is taken.
    """
    out = np.empty(weight.shape, dtype=np.int8)
    exponents = np.empty(len(weight), dtype=np.int64)
    for channel, row in enumerate(np.asarray(weight, dtype=np.float64)):
        best = math.inf
        holds = exponent_for(float(np.abs(row).max()), INT8_MAX)
        for exponent in (holds, holds - 1):
            rounded = np.clip(np.rint(np.ldexp(row, -exponent)), -INT8_MAX, INT8_MAX)
            error = float(np.square(np.ldexp(rounded, exponent) - row).sum())
            if error < best:
                best = error
                out[channel] = rounded
                exponents[channel] = exponent
    return out, exponents


def quantise(
    weights: list[np.ndarray], biases: list[np.ndarray], batches: list[np.ndarray], clip: float
) -> IntegerNetwork:
    """Quantise a ReLU network of dense layers.

    Parameters
    ----------
    weights, biases : list of ndarray of float32
        Of each layer, shapes (out, in) and (out,).
    batches : list of ndarray of float32, shape (n, features)
        Calibration inputs, normalised and clipped; observed one batch at a time.
    clip : float
        Inputs lie in [-clip, clip].

    Returns
    -------
    IntegerNetwork
        Its accumulators are proven to stay below `MAX_ACCUMULATOR`.
    """
    observers = [PercentileObserver() for _ in weights[:-1]]
    for batch in batches:
        a = batch.astype(np.float64)
        for weight, bias, observer in zip(weights[:-1], biases[:-1], observers, strict=True):
            a = np.maximum(a @ weight.T.astype(np.float64) + bias, 0.0)
            observer.update(a)
    # The top code is one step below +clip: half a step is the usual error anyway.
    exponents = [exponent_for(clip, INPUT_ZERO_POINT)]
    exponents += [
        exponent_for(observer.percentile(ACTIVATION_PERCENTILE), UINT8_MAX)
        for observer in observers
    ]
    layers = []
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        integer_weight, weight_exponent = quantise_weight(weight)
        scaled_bias = np.rint(np.ldexp(bias.astype(np.float64), -(exponents[i] + weight_exponent)))
        assert np.abs(scaled_bias).max() < MAX_ACCUMULATOR, "a bias out of proportion"
        layer = IntegerLayer(
            weight=integer_weight,
            bias=scaled_bias.astype(np.int32),
            weight_exponent=weight_exponent,
            in_exponent=exponents[i],
            in_zero_point=INPUT_ZERO_POINT if i == 0 else 0,
            out_exponent=exponents[i + 1] if i + 1 < len(exponents) else None,
        )
        bound = layer.accumulator_bound()
        assert bound < MAX_ACCUMULATOR, f"layer {i} could reach {bound}: not exact in float32"
        layers.append(layer)
    return IntegerNetwork(tuple(layers))
