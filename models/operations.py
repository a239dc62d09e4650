"""The operations that an architecture is written in, and what a model is: `Spec`.

An architecture (`models/architectures.py`) is one function over `Operations` that says what a
single step does: one new book state in, scores out. Everything else interprets that function, so
nothing can drift apart:

=========================  ====================================================================
`models/shapes.py`         parameters, quantisation points, widths that can be pruned
`models/execute.py`        PyTorch: training over sequences, single steps, calibration, QAT
`models/step_graph.py`     ONNX: the FP32 graph and the quantised (QDQ) graph of one step
=========================  ====================================================================

A value is a matrix of shape (rows, channels); the model input is (1, features). Time is reached
by four operations only, `delay`, `history`, `lstm` and `gru`, whose state is explicit.

Where a value is quantised is a **point**, named after the operation that makes it. Non-negative
points (after a ReLU, a sigmoid, a softmax) are uint8 with zero point 0, so that saturation is the
ReLU; the others are uint8 with a zero point inside.
"""

from __future__ import annotations

from typing import Any, Final, Protocol, TypeVar

import msgspec

V = TypeVar("V")

INPUT_POINT: Final = "x"
HEAD: Final = "head"
# Fixed by what the function can give: sigmoid and softmax (0, 1), tanh (-1, 1).
UNIT_SCALE: Final = 2.0**-8
TANH_SCALE: Final = 2.0**-7
# LSTM cells are kept as integers of 16 bits: (-16, 16) in steps of 2**-11.
CELL_SCALE: Final = 2.0**-11
CELL_LIMIT: Final = 2**15 - 1
# GRU states move by less than an 8-bit step at a time: (-1, 1) in steps of 2**-14.
GRU_SCALE: Final = 2.0**-14
GRU_LIMIT: Final = 2**14
LEAK: Final = 0.01


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a network is, without its weights.

    Attributes
    ----------
    arch : str
        A name in `models.architectures.ARCHITECTURES`.
    n_features, n_classes : int
    clip : float
        Inputs are normalised and lie in [-clip, clip].
    widths : dict of str to int
        Widths that pruning changed, by the operation's name.
    """

    arch: str
    n_features: int
    n_classes: int
    clip: float = 4.0
    widths: dict[str, int] = {}


class Operations(Protocol[V]):
    """What an architecture may do. ``name`` names parameters, state and quantisation point."""

    def columns(self, x: V, start: int, stop: int) -> V:
        """Channels start to stop."""
        ...

    def spread(self, x: V, rows: int) -> V:
        """(r, c) → (rows, r * c / rows) in reading order: neighbours of a row side by side."""
        ...

    def dense(self, name: str, x: V, out: int, *, relu: bool = False, norm: bool = False) -> V:
        """``x W' + b`` on the channels of each row; BatchNorm directly after it, then ReLU."""
        ...

    def delay(self, name: str, x: V, lags: tuple[int, ...]) -> V:
        """Channels of x as it was ``lags`` steps ago, side by side in this order; 0 before."""
        ...

    def history(self, name: str, x: V, steps: int) -> V:
        """(1, c) → (steps, c): the last steps, oldest first, with this one; 0 before."""
        ...

    def maximum(self, name: str, x: V, lags: tuple[int, ...]) -> V:
        """Greatest of x over the lags, channel by channel."""
        ...

    def add(self, name: str, a: V, b: V, *, relu: bool = False) -> V:
        """Sum of two values of one shape."""
        ...

    def concat(self, name: str, parts: list[V]) -> V:
        """Channels side by side."""
        ...

    def leaky(self, name: str, x: V) -> V:
        """LeakyReLU with slope `LEAK`."""
        ...

    def layer_norm(self, name: str, x: V) -> V:
        """(x - mean) / standard deviation over the channels; a scale belongs to the next dense."""
        ...

    def lstm(self, name: str, x: V, units: int) -> V:
        """LSTM cell (Hochreiter and Schmidhuber 1997; Gers et al. 2000), gates i, f, o, g."""
        ...

    def gru(self, name: str, x: V, units: int) -> V:
        """GRU cell (Cho et al. 2014; reset after the product, as cuDNN), gates r, z, n."""
        ...

    def attend(self, name: str, query: V, keys: V, values: V, heads: int) -> V:
        """softmax(q k' / sqrt(d)) v for each head (Vaswani et al. 2017); (1, c), (w, c), (w, c)."""
        ...

    def logits(self, name: str, x: V, out: int) -> V:
        """The last dense: its accumulators leave as float32."""
        ...


class Architecture(Protocol):
    """One step of a network."""

    def __call__(self, ops: Operations[Any], x: Any, n_classes: int) -> Any:
        """Scores of shape (1, n_classes) from the input of shape (1, n_features)."""
        ...
