"""What a network consists of: parameters, quantisation points, layers, prunable widths.

`describe` interprets an architecture over shapes alone. Each channel carries a label (the
operation that made it and its number there), so that it is known which rows and columns of which
weights belong to one unit: that is what structured pruning cuts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np

from feeds.errors import InputError
from models.architectures import architecture
from models.operations import (
    INPUT_POINT,
    TANH_SCALE,
    UNIT_SCALE,
    Operations,
    Spec,
)

Label = tuple[str, int]
PointKind = Literal["signed", "positive", "unit", "tanh", "input"]
INPUT_ZERO_POINT: Final = 128


@dataclass(frozen=True)
class Shape:
    """A value: ``rows`` times as many channels as it has labels."""

    rows: int
    labels: tuple[Label, ...]
    positive: bool = False
    point: str = ""

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.labels)


@dataclass(frozen=True)
class Layer:
    """A product with weights: a dense layer, or one of the two products of a recurrent cell.

    ``norm`` says whether a BatchNorm stands directly after it; ``bias`` whether it has one.
    """

    name: str
    rows: int
    inputs: tuple[Label, ...]
    outputs: tuple[Label, ...]
    norm: bool = False
    bias: bool = True
    point: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return len(self.outputs), len(self.inputs)


@dataclass
class Anatomy:
    """What `describe` found.

    Attributes
    ----------
    layers : dict of Layer
        By name, in the order of computing.
    points : dict of str to PointKind
        What is quantised and how its range is known: ``signed`` and ``positive`` are observed,
        ``unit`` and ``tanh`` are fixed by the function, ``input`` by the clip.
    sensitive : tuple of str
        What `keep` may name besides layers: attention products, softmax, LayerNorm.
    prunable : dict of str to int
        Widths that can shrink on their own.
    macs : int
        Multiply-accumulates of one step.
    """

    layers: dict[str, Layer] = field(default_factory=dict)
    points: dict[str, PointKind] = field(default_factory=dict)
    sensitive: list[str] = field(default_factory=list)
    prunable: dict[str, int] = field(default_factory=dict)
    macs: int = 0

    @property
    def parameters(self) -> int:
        """Number of weights and biases after folding."""
        return sum(layer.shape[0] * (layer.shape[1] + layer.bias) for layer in self.layers.values())


class _Describe(Operations[Shape]):
    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.found = Anatomy()
        self.fixed: set[str] = set()  # widths tied to others

    def _layer(self, name: str, x: Shape, labels: tuple[Label, ...], **options: object) -> None:
        assert name not in self.found.layers, f"two layers named {name}"
        layer = Layer(name, x.rows, x.labels, labels, point=x.point, **options)  # type: ignore[arg-type]
        self.found.layers[name] = layer
        self.found.macs += x.rows * layer.shape[0] * layer.shape[1]

    def _labels(self, name: str, width: int, prunable: bool) -> tuple[Label, ...]:
        width = self.spec.widths.get(name, width)
        if prunable:
            self.found.prunable[name] = width
        return tuple((name, i) for i in range(width))

    def _point(self, name: str, kind: PointKind) -> str:
        assert name not in self.found.points, f"two points named {name}"
        self.found.points[name] = kind
        return name

    def _tie(self, *values: Shape) -> None:
        for value in values:
            self.fixed.update(label[0] for label in value.labels)

    def input(self) -> Shape:
        """The model input."""
        self._point(INPUT_POINT, "input")
        labels = tuple((INPUT_POINT, i) for i in range(self.spec.n_features))
        self.fixed.add(INPUT_POINT)
        return Shape(1, labels, point=INPUT_POINT)

    def columns(self, x: Shape, start: int, stop: int) -> Shape:
        if stop > x.channels:
            raise InputError(
                "too few features for this architecture",
                where=f"--arch {self.spec.arch}",
                expected=f"at least {stop}",
                found=str(x.channels),
            )
        return Shape(x.rows, x.labels[start:stop], x.positive, x.point)

    def spread(self, x: Shape, rows: int) -> Shape:
        total = x.rows * x.channels
        assert total % rows == 0, f"{x.rows} x {x.channels} cannot be {rows} rows"
        if rows <= x.rows:
            return Shape(rows, x.labels * (x.rows // rows), x.positive, x.point)
        channels = total // rows
        self._tie(x)
        return Shape(rows, x.labels[:channels], x.positive, x.point)

    def dense(
        self, name: str, x: Shape, out: int, *, relu: bool = False, norm: bool = False
    ) -> Shape:
        labels = self._labels(name, out, prunable=True)
        self._layer(name, x, labels, norm=norm)
        return Shape(x.rows, labels, relu, self._point(name, "positive" if relu else "signed"))

    def delay(self, name: str, x: Shape, lags: tuple[int, ...]) -> Shape:
        return Shape(x.rows, x.labels * len(lags), x.positive, x.point)

    def history(self, name: str, x: Shape, steps: int) -> Shape:
        assert x.rows == 1
        return Shape(steps, x.labels, x.positive, x.point)

    def maximum(self, name: str, x: Shape, lags: tuple[int, ...]) -> Shape:
        return x

    def add(self, name: str, a: Shape, b: Shape, *, relu: bool = False) -> Shape:
        assert (a.rows, a.channels) == (b.rows, b.channels)
        self._tie(a, b)
        point = self._point(name, "positive" if relu else "signed")
        return Shape(a.rows, a.labels, relu, point)

    def concat(self, name: str, parts: list[Shape]) -> Shape:
        labels = tuple(label for part in parts for label in part.labels)
        positive = all(part.positive for part in parts)
        point = self._point(name, "positive" if positive else "signed")
        return Shape(parts[0].rows, labels, positive, point)

    def leaky(self, name: str, x: Shape) -> Shape:
        return Shape(x.rows, x.labels, False, self._point(name, "signed"))

    def layer_norm(self, name: str, x: Shape) -> Shape:
        assert x.rows == 1
        self._tie(x)
        self.found.sensitive.append(name)
        return Shape(1, x.labels, False, self._point(name, "signed"))

    def lstm(self, name: str, x: Shape, units: int) -> Shape:
        assert x.rows == 1
        labels = self._labels(name, units, prunable=True)
        h = Shape(1, labels, False, f"{name}.out")
        self._layer(f"{name}.x", x, labels * 4)
        self._layer(f"{name}.h", h, labels * 4, bias=False)
        for point in ("sigmoid_in", "tanh_in", "cell"):
            self._point(f"{name}.{point}", "signed")
        self._point(f"{name}.gates", "unit")
        for point in ("candidate", "cell_tanh", "out"):
            self._point(f"{name}.{point}", "tanh")
        return h

    def gru(self, name: str, x: Shape, units: int) -> Shape:
        assert x.rows == 1
        labels = self._labels(name, units, prunable=True)
        h = Shape(1, labels, False, f"{name}.out")
        self._layer(f"{name}.x", x, labels * 3)
        self._layer(f"{name}.h", h, labels * 3)
        for point in ("sigmoid_in", "new_x", "new_h", "tanh_in"):
            self._point(f"{name}.{point}", "signed")
        self._point(f"{name}.gates", "unit")
        for point in ("candidate", "out"):
            self._point(f"{name}.{point}", "tanh")
        return h

    def attend(self, name: str, query: Shape, keys: Shape, values: Shape, heads: int) -> Shape:
        assert query.channels == keys.channels == values.channels
        assert query.channels % heads == 0
        self._tie(query, keys, values)
        self.found.sensitive += [f"{name}.scores", f"{name}.softmax", f"{name}.context"]
        self._point(f"{name}.scores", "signed")
        self._point(f"{name}.softmax", "unit")
        self.found.macs += 2 * keys.rows * keys.channels
        return Shape(1, values.labels, False, self._point(f"{name}.context", "signed"))

    def logits(self, name: str, x: Shape, out: int) -> Shape:
        labels = tuple((name, i) for i in range(out))
        self._layer(name, x, labels)
        return Shape(1, labels)


def describe(spec: Spec) -> Anatomy:
    """Parameters, points, state and prunable widths of a network.

    Raises
    ------
    InputError
        For an unknown architecture, or one that needs more features.
    """
    ops = _Describe(spec)
    out = architecture(spec).step(ops, ops.input(), spec.n_classes)
    assert (out.rows, out.channels) == (1, spec.n_classes)
    for name in ops.fixed:
        ops.found.prunable.pop(name, None)
    return ops.found


def initial_parameters(spec: Spec, seed: int) -> dict[str, np.ndarray]:
    """Fresh weights, float32, by the layer's name and ``.weight``, ``.bias``, ``.norm.…``.

    He et al. (2015) for dense layers; Glorot and Bengio (2010) for recurrent cells, whose forget
    gates start open (Jozefowicz et al. 2015).
    """
    rng = np.random.default_rng(seed)
    parameters: dict[str, np.ndarray] = {}
    anatomy = describe(spec)
    cells = {name.removesuffix(".h") for name in anatomy.layers if name.endswith(".h")}
    for name, layer in anatomy.layers.items():
        out, inputs = layer.shape
        cell = name.rpartition(".")[0]
        if cell in cells:
            units = layer.outputs.index(layer.outputs[-1]) + 1
            spread = (2.0 / (inputs + units)) ** 0.5
        else:
            units = 0
            spread = (2.0 / inputs) ** 0.5
        parameters[f"{name}.weight"] = (rng.standard_normal((out, inputs)) * spread).astype("f4")
        if layer.bias:
            bias = np.zeros(out, dtype=np.float32)
            if units and out == 4 * units:
                bias[units : 2 * units] = 1.0
            parameters[f"{name}.bias"] = bias
        if layer.norm:
            parameters[f"{name}.norm.gain"] = np.ones(out, dtype=np.float32)
            parameters[f"{name}.norm.shift"] = np.zeros(out, dtype=np.float32)
            parameters[f"{name}.norm.mean"] = np.zeros(out, dtype=np.float32)
            parameters[f"{name}.norm.variance"] = np.ones(out, dtype=np.float32)
    return parameters


NORM_EPSILON: Final = 1e-5


def fold_norms(spec: Spec, parameters: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same network without BatchNorm: its scale and shift go into the layer before it.

    ``w' = w g / sqrt(v + e)``, ``b' = (b - m) g / sqrt(v + e) + s``, computed in float64. Source:
    Jacob et al. (2018), section 3.2.
    """
    folded = {name: array for name, array in parameters.items() if ".norm." not in name}
    for name, layer in describe(spec).layers.items():
        if not layer.norm or f"{name}.norm.gain" not in parameters:
            continue
        gain, shift, mean, variance = (
            parameters[f"{name}.norm.{part}"].astype(np.float64)
            for part in ("gain", "shift", "mean", "variance")
        )
        factor = gain / np.sqrt(variance + NORM_EPSILON)
        weight, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
        folded[f"{name}.weight"] = (weight * factor[:, None]).astype(np.float32)
        folded[f"{name}.bias"] = ((bias - mean) * factor + shift).astype(np.float32)
    return folded


FIXED_POINTS: Final[dict[str, tuple[float, int]]] = {
    "unit": (UNIT_SCALE, 0),
    "tanh": (TANH_SCALE, INPUT_ZERO_POINT),
}
