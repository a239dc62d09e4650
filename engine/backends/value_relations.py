"""What bounds alone cannot see: differences of tensors that depend on each other.

Two subtractions of the integer softmax and of the integer LayerNorm are smaller than their
operands' bounds say, and the division behind them rests on it:

- ``max(x) - x`` is not negative, and 0 for at least one element of every slice;
- ``n sum(x²) - (sum x)²`` is not negative (Cauchy and Schwarz), and at most ``n² (b - a)² / 4``
  for x in [a, b] (Popoviciu 1935, "Sur les équations algébriques ayant toutes leurs racines
  réelles").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

import numpy as np

from engine.backends import dyadic as exact
from engine.backends import reference_operations as reference
from engine.backends.dyadic import LIMIT, Dyadic, dyadic
from engine.backends.qdq_graph import Node, Value
from engine.backends.value_bounds import Bound, Bounds, between

SAME_VALUE: Final = frozenset({"Cast", "Identity"})


@dataclass(frozen=True)
class Trace:
    """Who makes which tensor."""

    makers: Mapping[str, Node]

    @classmethod
    def of(cls, nodes: Sequence[Node]) -> Trace:
        """The trace of a graph."""
        return cls({name: node for node in nodes for name in node.outputs})

    def maker(self, name: str) -> Node | None:
        """The node whose output this is; None for an input or a constant of the graph."""
        return self.makers.get(name)

    def back(self, name: str, ops: AbstractSet[str] = SAME_VALUE) -> str:
        """The tensor that a chain of such operations began with."""
        node = self.makers.get(name)
        while node is not None and node.op in ops:
            name = node.inputs[0]
            node = self.makers.get(name)
        return name

    def made_by(self, name: str, op: str) -> Node | None:
        """The node behind Casts, if it is of this kind."""
        node = self.makers.get(self.back(name))
        return node if node is not None and node.op == op else None


def related(trace: Trace, bounds: Mapping[str, Bound], node: Node, found: Bound) -> Bound:
    """Sharper bounds of a Sub, where its operands depend on each other as said above."""
    if not isinstance(found, Bounds):
        return found
    axes = _axes_of_maximum(trace, bounds, *node.inputs)
    if axes is not None:
        low, zero = _at_least_zero(found.low)
        return Bounds(low, found.high, (axes, zero))
    variance = _variance(trace, bounds, *node.inputs)
    if variance is not None and isinstance(found.low, Dyadic):
        low, _ = _at_least_zero(found.low)
        return between(low, reference.choose(node, np.minimum, found.high, variance))
    return found


def _at_least_zero(value: Value) -> tuple[Value, Value]:
    """The value, not below 0, and such a 0 of shape ()."""
    if isinstance(value, Dyadic):
        zero = Dyadic(np.zeros((), dtype=np.int64), np.asarray(value.e.min()))
        return Dyadic(np.maximum(value.m, 0), value.e), zero
    return np.asarray(np.maximum(value, 0)), np.zeros((), dtype=value.dtype)


def _axes(trace: Trace, bounds: Mapping[str, Bound], node: Node) -> tuple[int, ...] | None:
    """Axes of a reduction over a known tensor."""
    x = bounds[node.inputs[0]]
    axes = bounds.get(node.inputs[1]) if len(node.inputs) > 1 else None
    if not isinstance(x, Bounds) or not (axes is None or isinstance(axes, Bounds)):
        return None
    return reference.reduced_axes(node, len(x.shape), None if axes is None else axes.low)


def _axes_of_maximum(
    trace: Trace, bounds: Mapping[str, Bound], greatest: str, x: str
) -> tuple[int, ...] | None:
    """Axes along which ``greatest`` is the ReduceMax of x; None if it is not."""
    top = trace.made_by(greatest, "ReduceMax")
    if top is None or trace.back(top.inputs[0]) != trace.back(x):
        return None
    return _axes(trace, bounds, top) if top.attributes.get("keepdims", 1) else None


def _variance(
    trace: Trace, bounds: Mapping[str, Bound], scaled: str, squared: str
) -> Dyadic | None:
    """Greatest ``n sum(x²) - (sum x)²``, if the operands are these two; else None."""
    outer, square = trace.made_by(scaled, "Mul"), trace.made_by(squared, "Mul")
    if outer is None or square is None or square.inputs[0] != square.inputs[1]:
        return None
    total = trace.made_by(square.inputs[0], "ReduceSum")
    for squares, count in (outer.inputs, outer.inputs[::-1]):
        summed = trace.made_by(squares, "ReduceSum")
        if total is None or summed is None:
            continue
        power = trace.made_by(summed.inputs[0], "Mul")
        x = trace.back(total.inputs[0])
        if power is None or {trace.back(name) for name in power.inputs} != {x}:
            continue
        axes = _axes(trace, bounds, total)
        same = total.attributes.get("keepdims", 1) == summed.attributes.get("keepdims", 1)
        if axes is None or axes != _axes(trace, bounds, summed) or not same:
            continue
        return _popoviciu(bounds[total.inputs[0]], bounds[count], axes)
    return None


def _popoviciu(x: Bound, count: Bound, axes: tuple[int, ...]) -> Dyadic | None:
    if not isinstance(x, Bounds) or not isinstance(count, Bounds):
        return None
    low, high, times = x.low, x.high, count.low
    if not isinstance(low, Dyadic) or not isinstance(high, Dyadic) or not low.one_unit:
        return None
    n = int(np.prod([low.shape[axis] for axis in axes]))
    if not isinstance(times, Dyadic) or times.m.size != 1 or times is not count.high:
        return None
    if float(exact.to_float(times).reshape(())) != n:
        return None
    width = int(high.m.max()) - int(low.m.min())
    greatest = n * n * width * width // 4
    return dyadic(np.asarray(greatest), 2 * low.e) if greatest <= LIMIT else None
