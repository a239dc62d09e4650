"""The static proof that an `exact-int8` graph is exact: for every input and every reachable state.

`prove_exact` carries bounds through the graph (`engine.backends.value_bounds`) and refuses, by the
node's name, whatever could round otherwise than the graph says:

- a sum that could reach 2**24 steps of its finest unit, or any other float32 result that could
  pass them: float32 holds every integer up to there, so below it no order of adding matters;
- a scale that is no power of two;
- a result of Sqrt or Div, rounded once, that goes anywhere but into a QuantizeLinear;
- what ONNX Runtime's fused kernels are known to compute differently, see `check_fused`.

What remains gives the same bits on every IEEE 754 machine, whatever is fused, vectorised or
reordered; `engine.backends.integer_reference` computes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np

from engine.backends import dyadic as exact
from engine.backends import reference_operations as reference
from engine.backends.dyadic import LIMIT, Dyadic, InexactError, dyadic
from engine.backends.integer_reference import fold_constants
from engine.backends.qdq_graph import Graph, Node, Value, check_state, read_graph
from engine.backends.tensor_moves import MOVES
from engine.backends.value_bounds import FLOAT32_MAX, RULES, Bound, Bounds, Rounded, reach, terms
from engine.backends.value_relations import Trace, related
from engine.manifest import StateTensor

if TYPE_CHECKING:
    import onnx

ONE_INPUT_MOVES: Final = frozenset(MOVES) - {"Concat"}


class NodeBound(msgspec.Struct, frozen=True):
    """How far one node's float32 results can go.

    Attributes
    ----------
    name, op : str
        Of the node.
    bound : int
        Greatest magnitude in units of its finest exponent: of the sum of all terms for Gemm,
        MatMul and ReduceSum, of the result for others.
    headroom_bits : float
        log2(2**24 / bound).
    """

    name: str
    op: str
    bound: int
    headroom_bits: float


def prove_exact(
    model: onnx.ModelProto, state: Sequence[StateTensor] = (), where: str = "ONNX model"
) -> list[NodeBound]:
    """Prove that a graph is exact.

    Parameters
    ----------
    model : onnx.ModelProto
        In QDQ form, operator set 19 to 21.
    state : sequence of StateTensor
        What the graph remembers. uint8 is bounded by its type; float32 must be whole numbers that
        leave through a Clip, whose bounds then hold for every step by induction from ``initial``.
    where : str
        The model's name, for errors.

    Returns
    -------
    list of NodeBound
        Of each node that depends on an input and gives exact float32, in the graph's order;
        nodes that only move data are left out.

    Raises
    ------
    InputError
        Naming the first node that is not exact.
    """
    return carry_bounds(read_graph(model, where), state)[1]


def carry_bounds(
    graph: Graph, state: Sequence[StateTensor] = ()
) -> tuple[dict[str, Bound], list[NodeBound]]:
    """The bounds of every tensor, by name, and of every node; see `prove_exact`."""
    check_state(graph, state)
    constants, _, live = fold_constants(graph)
    trace = Trace.of(graph.nodes)
    bounds: dict[str, Bound] = {name: Bounds(v, v) for name, v in constants.items()}
    bounds.update(_ends(graph, state, constants, trace))
    found = []
    for node in live:
        given = [bounds[name] if name else None for name in node.inputs]
        try:
            outputs = RULES[node.op](node, given)
            if node.op == "Sub":
                outputs = [related(trace, bounds, node, outputs[0])]
            check_fused(trace, bounds, node)
            bound = _bound(node, given, outputs)
        except InexactError as error:
            node.refuse(
                "float32 would not be exact here",
                expected=f"fewer than {LIMIT} steps of the finest unit",
                found=error,
                fix="use coarser scales or fewer terms, or declare the numerics as tolerance",
            )
        bounds.update(zip(node.outputs, outputs, strict=False))
        if bound is not None:
            headroom = math.log2(LIMIT / max(bound, 1))
            found.append(NodeBound(node.name, node.op, bound, headroom))
    _check_ends(graph, state, bounds, trace)
    return bounds, found


def _bound(node: Node, given: Sequence[Bound | None], outputs: Sequence[Bound]) -> int | None:
    """Greatest magnitude that a node can meet; None where it makes no exact float32."""
    summed = terms(node, given)
    if summed is not None:
        reference.check_terms(summed)
    greatest = None if summed is None else int(summed.m.max(initial=0))
    if node.op in MOVES:
        return None
    for output in outputs:
        if isinstance(output, Bounds) and isinstance(output.low, Dyadic):
            most = reach(node, output)
            result = int(most.m.max(initial=0))
            if result > LIMIT:
                raise InexactError(f"{result} steps within reach")
            exact.check_exact(most)  # its unit is no extreme one
            greatest = result if greatest is None else max(greatest, result)
    return greatest


def _ends(
    graph: Graph, state: Sequence[StateTensor], constants: Mapping[str, Value], trace: Trace
) -> dict[str, Bound]:
    """Bounds of the graph's inputs: anything finite, and what each state can hold."""
    first, *_ = graph.inputs
    most = np.full(first.shape, FLOAT32_MAX, dtype=np.float32)
    found: dict[str, Bound] = {first.name: Rounded(-most, most)}
    for tensor in state:
        if tensor.dtype == "uint8":
            codes = np.zeros(tensor.shape, dtype=np.uint8)
            found[tensor.input] = Bounds(codes, codes + np.uint8(255))
        else:
            low, high = _clipped(tensor, constants, trace)
            ends = [dyadic(np.full(tensor.shape, value), 0) for value in (low, high)]
            found[tensor.input] = Bounds(ends[0], ends[1])
    return found


def _clipped(tensor: StateTensor, constants: Mapping[str, Value], trace: Trace) -> tuple[int, int]:
    """Lowest and highest whole number that a float32 state holds, its first value included."""
    node = trace.maker(trace.back(tensor.output, {"Identity"}))
    assert node is not None, "check_state found the output"
    limits = [constants.get(name) for name in node.inputs[1:]]
    if node.op != "Clip" or len(limits) != 2 or not all(isinstance(v, Dyadic) for v in limits):
        node.refuse(
            f"the float32 state {tensor.output} has no bound",
            expected="a Clip between two constants right before it",
            found=node.op,
        )
    low, high = (float(exact.to_float(reference.real(node, v)).reshape(())) for v in limits)
    if low > high or not all(value.is_integer() for value in (low, high, tensor.initial)):
        node.refuse(
            f"the float32 state {tensor.output} is not kept in whole numbers",
            expected="whole limits and a whole initial value",
            found=f"{low}, {high} and {tensor.initial}",
        )
    return int(min(low, tensor.initial)), int(max(high, tensor.initial))


def _check_ends(
    graph: Graph, state: Sequence[StateTensor], bounds: Mapping[str, Bound], trace: Trace
) -> None:
    """No rounded number leaves the graph, and every state stays within what was assumed."""
    for end in graph.outputs:
        node = trace.maker(end.name)
        if isinstance(bounds[end.name], Rounded) and node is not None:
            node.refuse(
                "a number that was rounded leaves the graph",
                expected="QuantizeLinear behind Sqrt and Div",
                found=end.name,
            )
    for tensor in state:
        after, node = bounds[tensor.output], trace.maker(tensor.output)
        assert node is not None
        assert isinstance(after, Bounds)
        if isinstance(after.low, Dyadic) and (after.low.e < 0).any():
            node.refuse(
                f"the float32 state {tensor.output} could hold fractions",
                expected="Round before its Clip",
                found=f"a unit of 2**{after.low.e.min()}",
            )


def check_fused(trace: Trace, bounds: Mapping[str, Bound], node: Node) -> None:
    """Refuse what ONNX Runtime's fused kernels compute differently from the graph as written.

    - QLinearAdd and QLinearMul round after the zero point was added: half to even then depends on
      whether that is odd.
    - QGemm takes an int32 bias as it is, whatever its scale says.
    - A QuantizeLinear right behind a DequantizeLinear is merged with the pair before it.

    Found with ONNX Runtime 1.32; a runtime without these fusions loses nothing by the rules.

    Raises
    ------
    InputError
        Naming the node.
    """
    if node.op == "QuantizeLinear":
        maker = trace.maker(trace.back(node.inputs[0], ONE_INPUT_MOVES))
        if maker is None:
            return
        if maker.op == "DequantizeLinear":
            node.refuse(
                "a requantisation that ONNX Runtime would merge with the quantisation before it",
                expected="a table, or a calculation in between",
                found=f"the output of {maker.name!r} ({maker.op})",
            )
        parts = [trace.maker(trace.back(name, ONE_INPUT_MOVES)) for name in maker.inputs]
        both = all(part is not None and part.op == "DequantizeLinear" for part in parts)
        zero = bounds[node.inputs[2]] if len(node.inputs) > 2 and node.inputs[2] else None
        if maker.op in ("Add", "Mul") and both and isinstance(zero, Bounds):
            offset = int(reference.whole(node, zero.low).flat[0])
            if offset % 2:
                node.refuse(
                    f"an odd zero point behind {maker.name!r}, which ONNX Runtime fuses into "
                    f"QLinear{maker.op}: that rounds ties the other way",
                    expected="an even zero point",
                    found=offset,
                    fix="move the zero point by one",
                )
    if node.op == "Gemm" and len(node.inputs) > 2 and node.inputs[2]:
        maker = trace.maker(node.inputs[2])
        if maker is not None and maker.op == "DequantizeLinear":
            inputs = [reach(node, bounds[name]) for name in node.inputs]
            a, b, c = reference.gemm_inputs(node, inputs)
            assert c is not None
            if ((exact.matmul(a, b).e != c.e) & (c.m != 0)).any():
                node.refuse(
                    "a bias in another unit than the products, which a fused kernel would not see",
                    expected="the input's scale times the weight's, channel by channel",
                    found=f"2**{int(c.e.min())} to 2**{int(c.e.max())} in {maker.name!r}",
                    fix="give the bias this scale",
                )
