"""Sums of products of a QDQ graph, as the integer graph's `Dense` has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from engine.backends import reference_operations as reference
from engine.backends.dyadic import Dyadic
from engine.backends.integer_graph import (
    CODE_MAX,
    MAX_SHIFT,
    MIN_SHIFT,
    Dense,
    Point,
    Product,
)
from engine.backends.qdq_graph import Node, Value

if TYPE_CHECKING:
    from engine.backends.lowering import Lowering

MAX_MAGNITUDE: Final = (1 << 31) - 1
WEIGHT_MIN: Final = -(CODE_MAX // 2 + 1)
WEIGHT_MAX: Final = CODE_MAX // 2


@dataclass(frozen=True, eq=False)
class Term:
    """One product of a sum: ``codes weight' + bias`` in units of ``2**exponent``, by output."""

    codes: str
    weight: np.ndarray
    bias: np.ndarray
    exponent: np.ndarray

    def outputs(self, chosen: slice | np.ndarray) -> Term:
        """Some of its outputs."""
        return Term(self.codes, self.weight[chosen], self.bias[chosen], self.exponent[chosen])


def read_terms(graph: Lowering, name: str, by: Node) -> list[Term]:
    """The products whose sum a float32 tensor is; takes their nodes.

    Raises
    ------
    InputError
        Naming the node that is no sum of products of codes.
    """
    node = graph.makers.get(name)
    if node is None or node.op not in ("Gemm", "Add", "Split"):
        node = graph.made(name, "Gemm", by)
    graph.take(node)
    if node.op == "Gemm":
        return [_term(graph, node)]
    if node.op == "Add":
        if len({graph.shapes[part] for part in (*node.inputs, name)}) != 1:
            graph.refuse(node, "a sum that broadcasts", "two tensors of one shape")
        return [term for part in node.inputs for term in read_terms(graph, part, node)]
    sizes = graph.constants.get(node.inputs[1]) if len(node.inputs) > 1 else None
    if not isinstance(sizes, np.ndarray) or node.attributes.get("axis", 0) not in (1, -1):
        graph.refuse(node, "a Split of accumulators by another axis", "axis 1, given sizes")
    at = node.outputs.index(name)
    start = int(sizes[:at].sum())
    chosen = slice(start, start + int(sizes[at]))
    return [term.outputs(chosen) for term in read_terms(graph, node.inputs[0], node)]


def _term(graph: Lowering, node: Node) -> Term:
    given = (*(graph.constants.get(name) for name in node.inputs[1:]), None)[:2]
    weight, bias = given
    plain = node.attributes.get("alpha", 1.0) == node.attributes.get("beta", 1.0) == 1.0
    if not isinstance(weight, Dyadic) or node.attributes.get("transB", 0) != 1 or not plain:
        graph.refuse(node, "another product", "constant weights, transB=1, alpha=beta=1")
    real = graph.real(node.inputs[0], node)
    if ((weight.m < WEIGHT_MIN) | (weight.m > WEIGHT_MAX)).any():
        graph.refuse(node, "weights of more than 8 bits", "int8")
    units = np.broadcast_to(weight.e, weight.shape)
    if (units != units[:, :1]).any():
        graph.refuse(node, "weights of one output in several units", "one scale an output")
    exponent = units[:, 0] + real.exponent
    acc = -real.zero * weight.m.sum(axis=1)
    if len(node.inputs) > 2 and node.inputs[2]:
        acc = acc + _in_units(graph, node, bias, exponent)
    reach = np.abs(acc) + CODE_MAX * np.abs(weight.m).sum(axis=1)
    if reach.max(initial=0) > MAX_MAGNITUDE:
        found = str(reach.max())
        graph.refuse(node, "accumulators beyond int32", f"at most {MAX_MAGNITUDE}", found)
    return Term(real.codes, weight.m.astype(np.int8), acc.astype(np.int64), exponent)


def _in_units(graph: Lowering, node: Node, value: Value | None, exponent: np.ndarray) -> np.ndarray:
    """A bias as whole numbers of an exponent for each output."""
    bias = reference.real(node, value)
    if len(bias.shape) > 1 and bias.shape[0] != 1:
        graph.refuse(node, "a bias of its own for each row", "one for each output")
    up = np.broadcast_to(bias.e, bias.shape).reshape(-1) - exponent
    m = np.broadcast_to(bias.m.reshape(-1), exponent.shape)
    if (m & ((1 << np.clip(-up, 0, 62)) - 1)).any():
        graph.refuse(node, "a bias in a finer unit than the products", "the products' scale")
    return np.where(m == 0, 0, np.where(up >= 0, m << np.clip(up, 0, 40), m >> np.clip(-up, 0, 62)))


def sum_terms(
    graph: Lowering, name: str, rows: int, terms: Sequence[Term], point: Point | None
) -> Dense:
    """Products added up in their finest unit, their sources known by value."""
    exponent = np.min([term.exponent for term in terms], axis=0)
    products = tuple(
        Product(
            graph.value(term.codes),
            np.ascontiguousarray(term.weight),
            term.bias.astype(np.int32),
            (term.exponent - exponent).astype(np.int32),
        )
        for term in terms
    )
    shift = np.zeros(len(exponent)) if point is None else point.exponent - exponent
    return Dense(name, rows, products, exponent.astype(np.int32), point, bounded(shift))


def bounded(shift: np.ndarray) -> np.ndarray:
    """Shifts to codes as int32, within what `round_shift` takes; beyond it the codes are equal."""
    return np.asarray(np.clip(shift, MIN_SHIFT, MAX_SHIFT)).astype(np.int32)
