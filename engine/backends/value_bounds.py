"""Bounds of the tensors of an `exact-int8` graph, carried through its operations.

A bound is the lowest and the highest value of each element, in the unit of which all values of
that element are whole multiples. Operations that never decrease when an input grows are computed on
both ends by the reference itself; the others have a rule here. What one rounded operation leaves
is `Rounded`: float32 between two ends, in no unit.

Source: Moore, Kearfott and Cloud (2009), "Introduction to Interval Analysis", chapters 2 and 5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from engine.backends import dyadic as exact
from engine.backends import reference_operations as reference
from engine.backends.dyadic import Dyadic, dyadic
from engine.backends.qdq_graph import Node, Value
from engine.backends.tensor_moves import MOVES, move

FLOAT32_MAX: Final = float(np.finfo(np.float32).max)
FLOAT32_NORMAL: Final = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, eq=False)
class Bounds:
    """Ends of an exact tensor: both `Dyadic` in the same units, or both integers of one type.

    Attributes
    ----------
    low, high : Value
        The same object for a constant.
    attained : (axes, Value), optional
        A value, of shape (), that at least one element of every slice along these axes has.
    """

    low: Value
    high: Value
    attained: tuple[tuple[int, ...], Value] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.low.shape


@dataclass(frozen=True, eq=False)
class Rounded:
    """Ends of a float32 tensor that was rounded, or came from outside: arrays of float32."""

    low: np.ndarray
    high: np.ndarray


Bound = Bounds | Rounded
Given = Sequence[Bound | None]


def exactly(node: Node, bound: Bound | None) -> Bounds:
    """An input that must not be a rounded one."""
    if isinstance(bound, Rounded):
        node.refuse(
            "a calculation with numbers that were rounded, or came from outside",
            expected="QuantizeLinear before anything else",
            found=node.op,
        )
    assert bound is not None
    return bound


def fixed(node: Node, bound: Bound | None) -> Value | None:
    """An input that must be constant, or left out."""
    if bound is None:
        return None
    found = exactly(node, bound)
    if found.low is not found.high:
        node.refuse("a scale, shape or index that is computed", expected="a constant")
    return found.low


def reach(node: Node, bound: Bound | None) -> Dyadic:
    """Greatest magnitude of each element of a float32 tensor, in its unit."""
    found = exactly(node, bound)
    low, high = reference.real(node, found.low), reference.real(node, found.high)
    return Dyadic(np.maximum(np.abs(low.m), np.abs(high.m)), low.e)


def between(low: Value, high: Value) -> Bounds:
    """Ends brought to the same units."""
    if isinstance(low, Dyadic) and isinstance(high, Dyadic):
        left, right, e = exact.aligned(low, high)
        return Bounds(dyadic(left, e), dyadic(right, e))
    return Bounds(low, high)


def terms(node: Node, given: Given) -> Dyadic | None:
    """Sum of the magnitudes of all terms of each element, where the node adds up terms."""
    if node.op in ("Gemm", "MatMul"):
        inputs = [None if bound is None else reach(node, bound) for bound in given]
        if node.op == "Gemm":
            return reference.sum_terms(*reference.gemm_inputs(node, inputs))
        return reference.sum_terms(*reference.matmul_inputs(node, inputs), None)
    if node.op == "ReduceSum" and isinstance(exactly(node, given[0]).low, Dyadic):
        axes = _axes(node, given)
        x = exact.common(reach(node, given[0]), axes)
        return dyadic(x.m.sum(axis=axes, keepdims=True), x.e)
    return None


def _axes(node: Node, given: Given) -> tuple[int, ...]:
    axes = fixed(node, given[1]) if len(given) > 1 else None
    return reference.reduced_axes(node, len(exactly(node, given[0]).shape), axes)


def growing(node: Node, given: Given) -> list[Bound]:
    """What does not decrease where an input grows: the reference, on both ends."""
    pairs = [None if bound is None else exactly(node, bound) for bound in given]
    function = reference.OPERATIONS[node.op]
    low = function(node, [None if pair is None else pair.low for pair in pairs])
    high = function(node, [None if pair is None else pair.high for pair in pairs])
    return [between(*ends) for ends in zip(low, high, strict=True)]


def quantised(node: Node, given: Given) -> list[Bound]:
    """QuantizeLinear, which takes rounded numbers too: that is where they must end."""
    x = given[0]
    scale = [fixed(node, bound) for bound in given[1:]]
    assert x is not None
    codes = []
    for end in (x.low, x.high):
        value = exact.from_float(end) if isinstance(x, Rounded) else end  # type: ignore[arg-type]
        codes.append(reference.quantize_linear(node, [value, *scale])[0])
    return [Bounds(codes[0], codes[1])]


def converted(node: Node, given: Given) -> list[Bound]:
    """Cast and DequantizeLinear; where all elements are treated alike, what is attained is so."""
    x = exactly(node, given[0])
    rest = [fixed(node, bound) for bound in given[1:]]
    if node.op == "Cast" and isinstance(x.low, Dyadic) and node.attributes.get("to") != 1:
        if (x.low.e < 0).any():
            node.refuse("a Cast that could cut fractions off", fix="Round before it")
    (found,) = growing(node, given)
    assert isinstance(found, Bounds)
    alike = all(value is None or int(np.prod(value.shape)) == 1 for value in rest)
    if x.attained is None or not alike:
        return [found]
    axes, value = x.attained
    after = reference.OPERATIONS[node.op](node, [value, *rest])[0]
    return [Bounds(found.low, found.high, (axes, after))]


def looked_up(node: Node, given: Given) -> list[Bound]:
    """Gather: elements selected by a constant, or a constant table by an index."""
    index = exactly(node, given[1])
    if index.low is index.high:
        return moved(node, given)
    table = exactly(node, given[0]).low
    if table is not exactly(node, given[0]).high or len(table.shape) != 1:
        node.refuse("a Gather from a tensor at a computed index", expected="a constant table")
    first, last = (reference.whole(node, end).astype(np.int64) for end in (index.low, index.high))
    if first.min() < 0 or last.max() >= table.shape[0]:
        node.refuse(
            "an index that could lie outside the table",
            expected=f"0 to {table.shape[0] - 1}",
            found=f"{first.min()} to {last.max()}",
            fix="make the table longer, or clip the index",
        )
    entries = table.m if isinstance(table, Dyadic) else table
    low, high = (np.empty(first.shape, dtype=entries.dtype) for _ in range(2))
    for at in np.ndindex(first.shape):
        reached = entries[first[at] : last[at] + 1]
        low[at], high[at] = reached.min(), reached.max()
    found = Bounds(low, high)
    if isinstance(table, Dyadic):
        if not table.one_unit:
            node.refuse("a table of float32 numbers too far apart", fix="use a table of integers")
        found = Bounds(Dyadic(low, table.e), Dyadic(high, table.e))
    if index.attained is None:
        return [found]
    axes, value = index.attained
    after = reference.moved(node, [table, value])[0]
    return [Bounds(found.low, found.high, (axes, after))]


def difference(node: Node, given: Given) -> list[Bound]:
    """Sub: lowest less highest to highest less lowest."""
    a, b = (exactly(node, bound) for bound in given)
    pairs = ((a.low, b.high), (a.high, b.low))
    return [between(*(reference.arithmetic(node, pair)[0] for pair in pairs))]


def product(node: Node, given: Given) -> list[Bound]:
    """Mul: between the least and the greatest of four products; a square is not negative."""
    a, b = (exactly(node, bound) for bound in given)
    corners = [
        reference.arithmetic(node, [x, y])[0] for x in (a.low, a.high) for y in (b.low, b.high)
    ]
    low, high = corners[0], corners[0]
    for corner in corners[1:]:
        low = reference.choose(node, np.minimum, low, corner)
        high = reference.choose(node, np.maximum, high, corner)
    if node.inputs[0] == node.inputs[1] and isinstance(low, Dyadic):
        low = Dyadic(np.maximum(low.m, 0), low.e)
    return [between(low, high)]


def sum_of_products(node: Node, given: Given) -> list[Bound]:
    """Gemm and MatMul: no further from 0 than all terms together."""
    most = terms(node, given)
    assert most is not None
    return [Bounds(Dyadic(-most.m, most.e), most)]


def reduced(node: Node, given: Given) -> list[Bound]:
    """ReduceSum and ReduceMax; a sum is not below what one of its terms is known to attain."""
    x = exactly(node, given[0])
    (found,) = growing(node, given)
    assert isinstance(found, Bounds)
    if node.op == "ReduceMax" or x.attained is None or not isinstance(x.low, Dyadic):
        return [found]
    axes, value = x.attained
    if set(axes) != set(_axes(node, given)) or (x.low.m < 0).any():
        return [found]
    return [between(reference.choose(node, np.maximum, found.low, value), found.high)]


def square_root(node: Node, given: Given) -> list[Bound]:
    """Sqrt of what cannot be negative."""
    low, high = _float_ends(node, given[0])
    if low.min(initial=0) < 0:
        node.refuse(
            "a square root of what could be negative",
            expected="0 or more",
            found=f"{low.min()} or more",
            fix="keep it positive with Relu, Max or Clip",
        )
    return [_outward(np.sqrt(low), np.sqrt(high))]


def quotient(node: Node, given: Given) -> list[Bound]:
    """Div of an exact number by what cannot be 0, to a normal float32."""
    a = reach(node, given[0])
    low, high = _float_ends(node, given[1])
    if ((low <= 0) & (high >= 0)).any():
        node.refuse(
            "a division by what could be 0",
            expected="a divisor that is always above 0, or always below",
            found=f"{low.min()} to {high.max()}",
            fix="keep it positive with Max, Clip or Add",
        )
    nearest, furthest = (f(np.abs(low), np.abs(high)) for f in (np.minimum, np.maximum))
    greatest = np.ldexp(a.m.astype(np.float64), a.e) / nearest
    smallest = np.ldexp(1.0, a.e) / furthest
    if greatest.max(initial=0) > FLOAT32_MAX / 2 or smallest.min(initial=1) < FLOAT32_NORMAL:
        node.refuse(
            "a quotient that float32 could not hold as a normal number",
            expected=f"{FLOAT32_NORMAL} to {FLOAT32_MAX / 2}",
            found=f"{smallest.min()} to {greatest.max()}",
        )
    return [_outward(-greatest, greatest)]


def _float_ends(node: Node, bound: Bound | None) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(bound, Rounded):
        return bound.low.astype(np.float64), bound.high.astype(np.float64)
    found = exactly(node, bound)
    low, high = reference.real(node, found.low), reference.real(node, found.high)
    return np.ldexp(low.m.astype(np.float64), low.e), np.ldexp(high.m.astype(np.float64), high.e)


def _outward(low: np.ndarray, high: np.ndarray) -> Rounded:
    """Ends as float32, a unit in the last place further out than the nearest."""
    return Rounded(
        np.nextafter(low.astype(np.float32), np.float32(-np.inf)),
        np.nextafter(high.astype(np.float32), np.float32(np.inf)),
    )


def moved(node: Node, given: Given) -> list[Bound]:
    """What only moves data; rounded numbers may be moved too."""
    x = given[0]
    if node.op == "Concat":
        return growing(node, given)
    parameters = [fixed(node, bound) for bound in given[1:]]
    if isinstance(x, Rounded):
        shapes = [None if p is None else reference.whole(node, p) for p in parameters]
        lows, highs = (move(node, [end], shapes) for end in (x.low, x.high))
        return [Rounded(*ends) for ends in zip(lows, highs, strict=True)]
    return growing(node, given)


RULES: Final[dict[str, Callable[[Node, Given], list[Bound]]]] = {
    "Add": growing,
    "Cast": converted,
    "Clip": growing,
    "DequantizeLinear": converted,
    "Div": quotient,
    "Gemm": sum_of_products,
    "MatMul": sum_of_products,
    "Max": growing,
    "Mul": product,
    "QuantizeLinear": quantised,
    "ReduceMax": reduced,
    "ReduceSum": reduced,
    "Relu": growing,
    "Round": growing,
    "Sqrt": square_root,
    "Sub": difference,
    **dict.fromkeys(MOVES, moved),
    "Gather": looked_up,
}
