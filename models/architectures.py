"""The architectures, each one function over `Operations`: a single step with explicit state.

Sources: TCN, Bai, Kolter and Koltun (2018) with BatchNorm directly after each convolution, so that
it folds; DeepLOB, Zhang, Zohren and Roberts (2019), its convolutions causal in time and its LSTM
running on, so that a step costs one column and not a window of 100; LSTM_A and LSTM_B, the public
shapes of the STAC-ML (Markets) Inference benchmark; attention, Vaswani et al. (2017), over a cache
of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from feeds.errors import InputError
from models.operations import HEAD, Architecture, Operations, Spec

TCN_CHANNELS: Final = 32
TCN_DILATIONS: Final = (1, 2, 4, 8)
TCN_TAPS: Final = 3
DEEPLOB_COLUMNS: Final = 40  # ten levels: ask price, ask size, bid price, bid size
DEEPLOB_FILTERS: Final = 16
ATTENTION_CHANNELS: Final = 32
ATTENTION_HEADS: Final = 2
ATTENTION_STEPS: Final = 32


def linear(ops: Operations[Any], x: Any, n_classes: int) -> Any:
    """Multinomial logistic regression: what a linear model finds in the same rows."""
    return ops.logits(HEAD, x, n_classes)


def mlp(ops: Operations[Any], x: Any, n_classes: int) -> Any:
    """features → 64 → 32 → classes."""
    x = ops.dense("hidden0", x, 64, relu=True)
    x = ops.dense("hidden1", x, 32, relu=True)
    return ops.logits(HEAD, x, n_classes)


def tcn(ops: Operations[Any], x: Any, n_classes: int) -> Any:
    """Four residual blocks of two causal convolutions, dilations 1, 2, 4 and 8: 61 steps back."""
    x = ops.dense("stem", x, TCN_CHANNELS, relu=True, norm=True)
    for i, dilation in enumerate(TCN_DILATIONS):
        name = f"block{i}"
        lags = tuple(k * dilation for k in range(TCN_TAPS))
        y = ops.delay(f"{name}.a.taps", x, lags)
        y = ops.dense(f"{name}.a", y, TCN_CHANNELS, relu=True, norm=True)
        y = ops.delay(f"{name}.b.taps", y, lags)
        y = ops.dense(f"{name}.b", y, TCN_CHANNELS, norm=True)
        x = ops.add(f"{name}.sum", x, y, relu=True)
    return ops.logits(HEAD, x, n_classes)


def _stacked(cell: str, units: int, layers: int) -> Architecture:
    def step(ops: Operations[Any], x: Any, n_classes: int) -> Any:
        run = ops.lstm if cell == "lstm" else ops.gru
        for i in range(layers):
            x = run(f"{cell}{i}", x, units)
        return ops.logits(HEAD, x, n_classes)

    return step


def deeplob(ops: Operations[Any], x: Any, n_classes: int) -> Any:
    """Convolutions over (price, size), sides and levels and over time, inception, LSTM."""

    def conv(name: str, y: Any, out: int) -> Any:
        return ops.leaky(f"{name}.leaky", ops.dense(name, y, out, norm=True))

    def in_time(name: str, y: Any, out: int, taps: int) -> Any:
        return conv(name, ops.delay(f"{name}.taps", y, tuple(range(taps))), out)

    x = ops.spread(ops.columns(x, 0, DEEPLOB_COLUMNS), DEEPLOB_COLUMNS // 2)
    for i, rows in enumerate((DEEPLOB_COLUMNS // 2, DEEPLOB_COLUMNS // 4, 1)):
        x = conv(f"conv{i}.a", ops.spread(x, rows), DEEPLOB_FILTERS)
        x = in_time(f"conv{i}.b", x, DEEPLOB_FILTERS, 4)
        x = in_time(f"conv{i}.c", x, DEEPLOB_FILTERS, 4)
    wide = 2 * DEEPLOB_FILTERS
    short = in_time("inception3.b", conv("inception3.a", x, wide), wide, 3)
    long = in_time("inception5.b", conv("inception5.a", x, wide), wide, 5)
    pooled = conv("inception1", ops.maximum("pool", x, (0, 1, 2)), wide)
    x = ops.concat("inception", [short, long, pooled])
    x = ops.lstm("lstm", x, 64)
    return ops.logits(HEAD, x, n_classes)


def attention(ops: Operations[Any], x: Any, n_classes: int) -> Any:
    """One block of causal self-attention over the last 32 steps, two heads, then a small MLP."""
    x = ops.dense("stem", x, ATTENTION_CHANNELS, relu=True, norm=True)
    query, key, value = (
        ops.dense(f"attention.{part}", x, ATTENTION_CHANNELS) for part in ("q", "k", "v")
    )
    keys = ops.history("attention.keys", key, ATTENTION_STEPS)
    values = ops.history("attention.values", value, ATTENTION_STEPS)
    context = ops.attend("attention", query, keys, values, ATTENTION_HEADS)
    projected = ops.dense("attention.out", context, ATTENTION_CHANNELS)
    x = ops.layer_norm("norm", ops.add("attention.sum", x, projected))
    x = ops.dense("mix0", x, 64, relu=True)
    x = ops.dense("mix1", x, 32, relu=True)
    return ops.logits(HEAD, x, n_classes)


@dataclass(frozen=True)
class Entry:
    """An architecture and how it is trained.

    Attributes
    ----------
    step : Architecture
    context : int
        Steps before the first one that counts in training: what the state needs to fill.
    about : str
        One line for ``--help``.
    """

    step: Architecture
    context: int
    about: str


ARCHITECTURES: Final[dict[str, Entry]] = {
    "linear": Entry(linear, 0, "logistic regression, the baseline"),
    "mlp": Entry(mlp, 0, "features → 64 → 32, no state"),
    "tcn": Entry(tcn, 60, "temporal convolutions, 4 residual blocks, 61 steps"),
    "lstm": Entry(_stacked("lstm", 64, 1), 64, "one layer of 64 units"),
    "gru": Entry(_stacked("gru", 64, 1), 64, "one layer of 64 units"),
    "deeplob": Entry(deeplob, 64, "DeepLOB: convolutions, inception, LSTM of 64 units"),
    "attention": Entry(attention, 31, "self-attention over 32 steps"),
    "lstm-a": Entry(_stacked("lstm", 100, 2), 50, "STAC-ML LSTM_A: 2 layers of 100 units"),
    "lstm-b": Entry(_stacked("lstm", 200, 3), 100, "STAC-ML LSTM_B: 3 layers of 200 units"),
}


def architecture(spec: Spec) -> Entry:
    """The architecture that a spec names.

    Raises
    ------
    InputError
        If there is none of that name.
    """
    entry = ARCHITECTURES.get(spec.arch)
    if entry is None:
        raise InputError(
            "unknown architecture",
            where="--arch",
            expected="one of " + ", ".join(ARCHITECTURES),
            found=repr(spec.arch),
        )
    return entry
