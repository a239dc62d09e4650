"""Running a network in PyTorch: over sequences to train it, step by step to serve as a reference.

`run` interprets an architecture over tensors of shape (batch, time, rows, channels); what happens
at weights and points is up to a `models.numerics.Numerics`. With the power-of-two scales of a
finished scheme it gives the very bits that the exported graph gives: every product and sum in it
is an exact float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.architectures import architecture
from models.numerics import FLOAT, Numerics, round_through
from models.operations import (
    CELL_LIMIT,
    CELL_SCALE,
    GRU_LIMIT,
    GRU_SCALE,
    INPUT_POINT,
    LEAK,
    Operations,
    Spec,
)
from models.scheme import UINT8_MAX
from models.shapes import NORM_EPSILON

LAYER_NORM_EPSILON: Final = 1e-5
NORM_MOMENTUM: Final = 0.05
State = dict[str, Tensor]


class Value(NamedTuple):
    """A tensor of shape (batch, time, rows, channels) and the point it was quantised at."""

    tensor: Tensor
    point: str


class _Run(Operations[Value]):
    def __init__(
        self,
        spec: Spec,
        parameters: Mapping[str, Tensor],
        numerics: Numerics,
        state: State,
        training: bool,
    ) -> None:
        self.spec = spec
        self.parameters = parameters
        self.numerics = numerics
        self.state = state
        self.after: State = {}
        self.training = training

    def _width(self, name: str, width: int) -> int:
        return self.spec.widths.get(name, width)

    def _product(self, name: str, x: Value) -> Tensor:
        numerics, given = self.numerics, self.parameters
        weight = numerics.weight(name, given[f"{name}.weight"])
        bias = given.get(f"{name}.bias")
        if bias is not None:
            bias = numerics.bias(name, bias, x.point)
        y = torch.nn.functional.linear(x.tensor, weight, bias)
        return self._normalise(name, y) if f"{name}.norm.gain" in given else y

    def _normalise(self, name: str, y: Tensor) -> Tensor:
        gain, shift, mean, variance = (
            self.parameters[f"{name}.norm.{part}"] for part in ("gain", "shift", "mean", "variance")
        )
        flat = torch.nn.functional.batch_norm(
            y.reshape(-1, y.shape[-1]),
            mean,
            variance,
            gain,
            shift,
            self.training,
            NORM_MOMENTUM,
            NORM_EPSILON,
        )
        return flat.reshape(y.shape)

    def _point(self, name: str, tensor: Tensor) -> Value:
        return Value(self.numerics.point(name, tensor), name)

    def _past(self, name: str, x: Tensor, steps: int) -> Tensor:
        """x with the steps before it in front; keeps what the next call needs."""
        before = self.state.get(name)
        if before is None:
            before = x.new_zeros((x.shape[0], steps, *x.shape[2:]))
        whole = torch.cat([before, x], dim=1)
        self.after[name] = whole[:, whole.shape[1] - steps :]
        return whole

    def columns(self, x: Value, start: int, stop: int) -> Value:
        return Value(x.tensor[..., start:stop], x.point)

    def spread(self, x: Value, rows: int) -> Value:
        batch, time, _, _ = x.tensor.shape
        return Value(x.tensor.reshape(batch, time, rows, -1), x.point)

    def dense(
        self, name: str, x: Value, out: int, *, relu: bool = False, norm: bool = False
    ) -> Value:
        y = self._product(name, x)
        return self._point(name, torch.relu(y) if relu else y)

    def _lagged(self, name: str, x: Value, lags: tuple[int, ...]) -> list[Tensor]:
        steps, time = max(lags), x.tensor.shape[1]
        whole = self._past(name, x.tensor, steps)
        return [whole[:, steps - lag : steps - lag + time] for lag in lags]

    def delay(self, name: str, x: Value, lags: tuple[int, ...]) -> Value:
        return Value(torch.cat(self._lagged(name, x, lags), dim=-1), x.point)

    def history(self, name: str, x: Value, steps: int) -> Value:
        lags = tuple(range(steps - 1, -1, -1))
        return Value(torch.cat(self._lagged(name, x, lags), dim=2), x.point)

    def maximum(self, name: str, x: Value, lags: tuple[int, ...]) -> Value:
        return Value(torch.stack(self._lagged(name, x, lags)).amax(dim=0), x.point)

    def add(self, name: str, a: Value, b: Value, *, relu: bool = False) -> Value:
        y = a.tensor + b.tensor
        return self._point(name, torch.relu(y) if relu else y)

    def concat(self, name: str, parts: list[Value]) -> Value:
        return self._point(name, torch.cat([part.tensor for part in parts], dim=-1))

    def leaky(self, name: str, x: Value) -> Value:
        return self._point(name, torch.nn.functional.leaky_relu(x.tensor, LEAK))

    def layer_norm(self, name: str, x: Value) -> Value:
        n = x.tensor.shape[-1]
        if self.numerics.keeps(name):
            centred = x.tensor - x.tensor.mean(dim=-1, keepdim=True)
            variance = (centred * centred).mean(dim=-1, keepdim=True)
            return self._point(name, centred / torch.sqrt(variance + LAYER_NORM_EPSILON))
        # In steps of the input's scale all sums are integers below 2**24.
        steps = x.tensor / self.numerics.scale(x.point)
        total = steps.sum(dim=-1, keepdim=True)
        squares = (steps * steps).sum(dim=-1, keepdim=True)
        spread = n * squares - total * total
        # The vectorised float32 root is not always correctly rounded; that of a float64 is, as
        # float32.
        deviation = torch.sqrt((spread + 1.0).double()).to(steps.dtype)
        return self._point(name, (n * steps - total) / deviation)

    def _recur(
        self, name: str, x: Value, units: int, gates: int, bias: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Products with the inputs of all steps at once, and what each step needs."""
        weight = self.numerics.weight(f"{name}.h", self.parameters[f"{name}.h.weight"])
        shift = None
        if bias:
            shift = self.numerics.bias(
                f"{name}.h", self.parameters[f"{name}.h.bias"], f"{name}.out"
            )
        assert weight.shape == (gates * units, units)
        return self._product(f"{name}.x", x)[:, :, 0], weight, shift

    def _start(self, key: str, x: Tensor, units: int) -> Tensor:
        before = self.state.get(key)
        return x.new_zeros((x.shape[0], units)) if before is None else before

    def lstm(self, name: str, x: Value, units: int) -> Value:
        units, numerics = self._width(name, units), self.numerics
        products, weight, _ = self._recur(name, x, units, 4, False)
        h = self._start(f"{name}.h", x.tensor, units)
        c = self._start(f"{name}.c", x.tensor, units)
        outputs = []
        for t in range(products.shape[1]):
            sums = products[:, t] + h @ weight.T
            opened = numerics.point(f"{name}.sigmoid_in", sums[:, : 3 * units])
            opened = numerics.point(f"{name}.gates", torch.sigmoid(opened))
            new = numerics.point(f"{name}.tanh_in", sums[:, 3 * units :])
            new = numerics.point(f"{name}.candidate", torch.tanh(new))
            i, f, o = opened.split(units, dim=1)
            c = numerics.wide(f * c + i * new, CELL_SCALE, CELL_LIMIT)
            shown = numerics.point(f"{name}.cell", c)
            shown = numerics.point(f"{name}.cell_tanh", torch.tanh(shown))
            h = numerics.point(f"{name}.out", o * shown)
            outputs.append(h)
        self.after[f"{name}.h"], self.after[f"{name}.c"] = h, c
        return Value(torch.stack(outputs, dim=1)[:, :, None], f"{name}.out")

    def gru(self, name: str, x: Value, units: int) -> Value:
        units, numerics = self._width(name, units), self.numerics
        products, weight, shift = self._recur(name, x, units, 3, True)
        wide = self._start(f"{name}.h", x.tensor, units)
        h = numerics.point(f"{name}.out", wide)
        outputs = []
        for t in range(products.shape[1]):
            own = torch.nn.functional.linear(h, weight, shift)
            given = products[:, t]
            opened = given[:, : 2 * units] + own[:, : 2 * units]
            opened = numerics.point(f"{name}.sigmoid_in", opened)
            r, z = numerics.point(f"{name}.gates", torch.sigmoid(opened)).split(units, dim=1)
            # Both halves at 8 bits first: r times raw accumulators would leave float32's integers.
            from_x = numerics.point(f"{name}.new_x", given[:, 2 * units :])
            from_h = numerics.point(f"{name}.new_h", own[:, 2 * units :])
            new = numerics.point(f"{name}.tanh_in", from_x + r * from_h)
            new = numerics.point(f"{name}.candidate", torch.tanh(new))
            wide = numerics.wide((1.0 - z) * new + z * wide, GRU_SCALE, GRU_LIMIT)
            h = numerics.point(f"{name}.out", wide)
            outputs.append(h)
        self.after[f"{name}.h"] = wide
        return Value(torch.stack(outputs, dim=1)[:, :, None], f"{name}.out")

    def attend(self, name: str, query: Value, keys: Value, values: Value, heads: int) -> Value:
        numerics = self.numerics
        batch, time, steps, channels = keys.tensor.shape
        width = channels // heads
        q = query.tensor.reshape(batch, time, heads, 1, width) * width**-0.5
        k = keys.tensor.reshape(batch, time, steps, heads, width).permute(0, 1, 3, 4, 2)
        v = values.tensor.reshape(batch, time, steps, heads, width).transpose(2, 3)
        scores = q @ k
        if numerics.keeps(f"{name}.softmax") or numerics.keeps(f"{name}.scores"):
            if not numerics.quantised:
                scores = numerics.point(f"{name}.scores", scores)
            shares = torch.softmax(scores, dim=-1)
        else:
            scores = numerics.point(f"{name}.scores", scores)
            # Integer numerators out of a table of 8 bits, one correctly rounded division.
            below = scores.amax(dim=-1, keepdim=True) - scores
            powers = round_through(UINT8_MAX * torch.exp(-below))
            shares = powers / powers.sum(dim=-1, keepdim=True)
        if not (numerics.quantised and numerics.keeps(f"{name}.context")):
            shares = numerics.point(f"{name}.softmax", shares)
        context = (shares @ v).reshape(batch, time, 1, channels)
        return self._point(f"{name}.context", context)

    def logits(self, name: str, x: Value, out: int) -> Value:
        return Value(self._product(name, x), "")


def run(
    spec: Spec,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    *,
    numerics: Numerics = FLOAT,
    state: State | None = None,
    training: bool = False,
) -> tuple[Tensor, State]:
    """Run a network over sequences.

    Parameters
    ----------
    spec : Spec
    parameters : mapping of str to Tensor
        As `models.shapes.initial_parameters` names them, with or without BatchNorm.
    x : Tensor of float32 or float64, shape (batch, time, features)
        Normalised inputs; one step is ``time == 1``.
    numerics : Numerics
    state : dict of Tensor, optional
        What the call before returned; a fresh stream without.
    training : bool
        BatchNorm by the batch's own statistics, which are then averaged into its parameters.

    Returns
    -------
    scores : Tensor, shape (batch, time, classes)
    state : dict of Tensor
        To go on with.
    """
    ops = _Run(spec, parameters, numerics, state or {}, training)
    entry = Value(numerics.point(INPUT_POINT, x[:, :, None]), INPUT_POINT)
    scores = architecture(spec).step(ops, entry, spec.n_classes)
    return scores.tensor[:, :, 0], ops.after


def tensors(parameters: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Arrays as tensors, in copies."""
    return {name: torch.from_numpy(array.copy()) for name, array in parameters.items()}


def arrays(parameters: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Tensors as arrays, in copies."""
    return {name: tensor.detach().numpy().copy() for name, tensor in parameters.items()}


@torch.no_grad()
def scores_of(
    spec: Spec,
    parameters: Mapping[str, np.ndarray],
    x: np.ndarray,
    *,
    numerics: Numerics = FLOAT,
    block: int = 1024,
) -> np.ndarray:
    """Scores of one long sequence, or of several side by side, in bounded memory.

    Parameters
    ----------
    x : ndarray of float32, shape (time, features) or (batch, time, features)
    block : int
        Steps at a time.

    Returns
    -------
    ndarray of float32, shape (time, classes) or (batch, time, classes)
    """
    weights = tensors(parameters)
    whole = x if x.ndim == 3 else x[None]
    state: State = {}
    parts = [np.empty((len(whole), 0, spec.n_classes), dtype=np.float32)]
    for start in range(0, whole.shape[1], block):
        part = torch.from_numpy(whole[:, start : start + block].copy())
        scores, state = run(spec, weights, part, numerics=numerics, state=state)
        parts.append(scores.numpy())
    joined = np.concatenate(parts, axis=1)
    return joined if x.ndim == 3 else joined[0]
