"""From a bundle's QDQ graph to the integer graph.

Each node is read once, in the file's order. What a layer is made of is found by walking back from
where it becomes codes, so that a graph is taken whatever its nodes are called; what does not fit
is refused by the name of the first node that cannot be read. Sums of products are in
`engine.backends.lowering_products`, delays and cells in `engine.backends.lowering_delays` and
`engine.backends.lowering_cells`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import numpy as np

from engine.backends import reference_operations as reference
from engine.backends.check_groups import ValueCheck, read_value_check
from engine.backends.dyadic import Dyadic
from engine.backends.integer_graph import (
    CODE_MAX,
    INPUT,
    Add,
    Columns,
    Concat,
    Delay,
    Dense,
    GruCell,
    IntegerGraph,
    Layer,
    LstmCell,
    Maximum,
    Point,
    Table,
    requantise,
)
from engine.backends.integer_reference import IntegerReference, fold_constants
from engine.backends.lowering_delays import begin_delay, keep_delay, past_of, read_lags
from engine.backends.lowering_products import bounded, read_terms, sum_terms
from engine.backends.qdq_graph import Node, check_state, read_graph, read_model
from engine.manifest import StateTensor
from feeds.errors import InputError

if TYPE_CHECKING:
    from engine.bundle import Bundle

SAME_ORDER: Final = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
OTHER_BACKEND: Final = "serve this bundle with the onnx backend"


@dataclass(frozen=True, eq=False)
class Real:
    """Codes seen as numbers: ``(codes - zero) * 2**exponent``."""

    codes: str
    exponent: int
    zero: int


def lower_bundle(bundle: Bundle) -> IntegerGraph:
    """The integer graph of a bundle's INT8 model.

    Raises
    ------
    InputError
        If the bundle is not `exact-int8`, or a node has no place in an integer graph.
    """
    if bundle.numerics != "exact-int8":
        raise InputError(
            "only an exact-int8 bundle has an integer graph",
            where=str(bundle.path),
            expected="numerics exact-int8",
            found=bundle.numerics,
            fix=f"{OTHER_BACKEND}, or quantise with power-of-two scales",
        )
    return lower(bundle.model_bytes("int8"), bundle.state("int8"), str(bundle.int8_path))


def lower(
    model: bytes | str | Path, state: Sequence[StateTensor] = (), where: str = ""
) -> IntegerGraph:
    """The integer graph of an ONNX file or its bytes.

    Parameters
    ----------
    model : bytes, str or Path
    state : sequence of StateTensor
        What the graph remembers, as its bundle's manifest says.
    where : str
        The model's name, for errors.

    Raises
    ------
    InputError
        Naming the first node that has no place in an integer graph.
    """
    return Lowering(model, state, where).run()


class Lowering:
    """One graph on its way.

    Attributes
    ----------
    graph : Graph
    state : tuple of StateTensor
    makers : dict of str to Node
        Of each tensor that depends on an input.
    users : dict of str to list of Node
    constants : dict of str to Value
    shapes : dict of str to tuple of int
        Of each tensor.
    delays : dict of str to Delay
        By the tensor that holds past and present side by side.
    """

    def __init__(self, model: bytes | str | Path, state: Sequence[StateTensor], where: str) -> None:
        proto, said = read_model(model)
        self.where = where or said
        graph = read_graph(proto, self.where)
        check_state(graph, state)
        self.graph, self.state = graph, tuple(state)
        self.constants, _, self._live = fold_constants(graph)
        self.makers = {name: node for node in self._live for name in node.outputs}
        self.users: dict[str, list[Node]] = {}
        for node in self._live:
            for name in node.inputs:
                self.users.setdefault(name, []).append(node)
        # One interpreted step knows every shape, and refuses what no integers can do.
        zeros = np.zeros(graph.inputs[0].shape, dtype=np.float32)
        self.shapes = {
            name: array.shape
            for name, array in IntegerReference(model, state).tensors(zeros).items()
        }
        elements = {name: int(np.prod(shape)) for name, shape in self.shapes.items()}
        self._check: ValueCheck = read_value_check(proto, elements, self.where)
        self._counted: set[str] = set()
        self.delays: dict[str, Delay] = {}
        self._taken: set[tuple[str, ...]] = set()  # nodes that are part of a layer, by outputs
        self._values: dict[str, str] = {}  # tensor of codes → value
        self._sizes: dict[str, int] = {}
        self._names = {INPUT, *(tensor.input for tensor in self.state)}
        self._input: Point | None = None
        self._layers: list[Layer] = []
        self._scores: Dense | None = None
        self._cells: dict[tuple[str, ...], Callable[[], None]] = {}  # by their last node's outputs

    def run(self) -> IntegerGraph:
        """Lower the whole graph."""
        from engine.backends.lowering_cells import match_cells

        self._cells = match_cells(self)
        scores = self.graph.outputs[0].name
        for node in self._live:
            if node.outputs in self._cells:
                self._cells[node.outputs]()
            elif node.outputs not in self._taken:
                self._read(node, scores)
        point = self._check_ends(scores)
        return IntegerGraph(
            where=self.where,
            n_features=self.graph.inputs[0].shape[-1],
            point=point,
            layers=tuple(self._layers),
            sizes=self._sizes,
            state=self.state,
            checks=self._check.groups,
            input_limit=self._check.input_limit,
        )

    def _check_ends(self, scores: str) -> Point:
        """Append the scores; whether input, state and value check are all there."""
        if self._scores is None or self.shapes[scores][:-1] != (1,):
            self.refuse_tensor(scores, "scores that are not one row of accumulators", "Gemm")
        self._layers.append(replace(self._scores, name=self.unique(self._scores.name)))
        given = self.graph.inputs[0]
        if self._input is None or given.shape[:-1] != (1,):
            self.refuse_tensor(given.name, "an input that is not one quantised row")
        missed = sorted(self._check.counted.keys() - self._counted)
        if missed:
            self.refuse_tensor(missed[0], "codes that the value check counts and no layer has")
        kept = {tensor.output for layer in self._layers for tensor in states_of(layer)}
        for tensor in self.state:
            if tensor.output not in kept:
                self.refuse_tensor(
                    tensor.output,
                    "a state that no layer keeps",
                    "a delay, or the state of an LSTM or GRU cell",
                )
        return self._input

    # ---- what matchers are made of

    def refuse(self, node: Node, what: str, expected: str = "", found: str = "") -> NoReturn:
        """Raise an `InputError` that names the node."""
        node.refuse(what, expected=expected, found=found or node.op, fix=OTHER_BACKEND)

    def refuse_tensor(self, name: str, what: str, expected: str = "") -> NoReturn:
        """Raise an `InputError` that names the node that makes a tensor, or the tensor."""
        node = self.makers.get(name)
        if node is not None:
            node.refuse(what, expected=expected, found=node.op, fix=OTHER_BACKEND)
        raise InputError(
            what,
            where=f"{self.where}: {name}",
            expected=expected,
            found="an input or a constant",
            fix=OTHER_BACKEND,
        )

    def take(self, node: Node) -> None:
        """Make a node part of a layer."""
        self._taken.add(node.outputs)

    def made(self, name: str, op: str, by: Node) -> Node:
        """The node that makes an input of ``by``, which must be of this operator; taken."""
        node = self.makers.get(name)
        if node is None or node.op != op:
            at = by if node is None else node
            at.refuse(
                "a node that has no place in an integer graph",
                expected=f"{op} before {by.name!r} ({by.op})",
                found="an input or a constant" if node is None else node.op,
                fix=OTHER_BACKEND,
            )
        self.take(node)
        return node

    def real(self, name: str, by: Node) -> Real:
        """Codes behind a DequantizeLinear."""
        node = self.made(name, "DequantizeLinear", by)
        exponent = reference.exponents(node, self.constants.get(node.inputs[1]))
        offset = self.constants.get(node.inputs[2]) if len(node.inputs) > 2 else None
        zero = np.zeros(1, np.uint8) if offset is None else reference.whole(node, offset)
        if exponent.size != 1 or zero.size != 1:
            self.refuse(node, "codes with more than one scale", "one scale, one zero point")
        return Real(node.inputs[0], int(exponent.flat[0]), int(zero.flat[0]))

    def quantisation(self, node: Node) -> tuple[int, int]:
        """Exponent and zero point of a QuantizeLinear; takes the node."""
        scale, zero = (*(self.constants.get(name) for name in node.inputs[1:]), None)[:2]
        self.take(node)
        return reference.quantisation(node, scale, zero)

    def point(self, node: Node, name: str = "") -> Point:
        """The point of a QuantizeLinear, with its part in the value check; takes the node."""
        exponent, zero = self.quantisation(node)
        name = name or node.name.removesuffix(".quantise") or node.outputs[0]
        counted = self._check.counted.get(node.outputs[0])
        if counted is None:
            return Point(name, exponent, zero)
        self._counted.add(node.outputs[0])
        return Point(name, exponent, zero, counted.group, counted.low, counted.high)

    def number(self, name: str, node: Node) -> Dyadic:
        """A constant of one element."""
        value = reference.real(node, self.constants.get(name))
        if value.m.size != 1:
            self.refuse(node, "more than one number where one is expected", "one constant")
        return value

    def whole_number(self, name: str, node: Node) -> int:
        """A constant that is one whole number."""
        return int(reference.whole_numbers(node, self.number(name, node)).flat[0])

    def look_up(self, codes: str, by: Node) -> tuple[np.ndarray, str]:
        """Entries of a table, and the tensor of codes that selects from it."""
        gather = self.made(codes, "Gather", by)
        entries = self.constants.get(gather.inputs[0])
        if not isinstance(entries, np.ndarray) or entries.shape != (CODE_MAX + 1,):
            self.refuse(gather, "no table of codes", f"{CODE_MAX + 1} constants of uint8")
        if entries.dtype != np.uint8:
            self.refuse(gather, "no table of codes", "uint8", entries.dtype.name)
        cast = self.made(gather.inputs[1], "Cast", gather)
        return entries, cast.inputs[0]

    def value(self, tensor: str) -> str:
        """The value that a tensor of codes is."""
        if tensor in self.delays and tensor not in self._values:
            self.emit(self.delays[tensor], tensor)
        found = self._values.get(tensor)
        if found is None:
            self.refuse_tensor(tensor, "codes that come from no layer")
        return found

    def name_value(self, tensor: str, value: str, size: int) -> None:
        """Let a tensor of codes stand for a value that is there already, or a cell's state."""
        self._values[tensor] = value
        self._sizes[value] = size

    def forget_value(self, tensor: str) -> None:
        """Let a tensor stand for nothing: a cell's past is its own."""
        del self._values[tensor]

    def unique(self, name: str) -> str:
        """A name that no value, layer or point inside a cell has yet."""
        found, count = name, 1
        while found in self._names:
            count += 1
            found = f"{name}.{count}"
        self._names.add(found)
        return found

    def emit(self, layer: Layer, tensor: str) -> None:
        """The next layer, and the tensor of codes that it makes."""
        layer = replace(layer, name=self.unique(layer.name))
        self._layers.append(layer)
        self.name_value(tensor, layer.name, int(np.prod(self.shapes[tensor])))

    # ---- the nodes between cells

    def _read(self, node: Node, scores: str) -> None:
        if node.op == "Gemm" and scores in node.outputs:
            self._scores = sum_terms(self, node.name, 1, read_terms(self, scores, node), None)
        elif node.op == "QuantizeLinear":
            self._read_quantise(node)
        elif node.op == "Gather":
            self._read_gather(node)
        elif node.op in SAME_ORDER and node.inputs[0] not in self.constants:
            self._alias(node)
        elif node.op == "Slice":
            self._read_slice(node)
        elif node.op == "Concat":
            self._read_concat(node)
        elif node.op == "Split":
            self._read_split(node)
        elif node.op == "ReduceMax":
            self._read_maximum(node)
        elif node.op not in ("Add", "Cast", "DequantizeLinear", "Gemm"):  # read with what uses them
            self.refuse(node, "a node that has no place in an integer graph")

    def _alias(self, node: Node) -> None:
        value = self.value(node.inputs[0])
        self._values[node.outputs[0]] = value
        self.take(node)

    def _read_quantise(self, node: Node) -> None:
        source, codes = node.inputs[0], node.outputs[0]
        point = self.point(node)
        if source == self.graph.inputs[0].name:
            if self._input is not None:
                self.refuse(node, "a second quantisation of the input", "one")
            if point.group >= 0:
                self.refuse(node, "a value check of the input's codes", "one of the input itself")
            self.name_value(codes, INPUT, int(np.prod(self.shapes[codes])))
            self._input = point
            return
        maker = self.makers.get(source)
        if maker is not None and maker.op == "Concat":
            self._requantise_parts(node, maker, point)
        elif maker is not None and maker.op == "Add" and self._is_real(maker):
            self._add(maker, codes, point)
        else:
            terms = read_terms(self, source, node)
            rows = int(np.prod(self.shapes[codes])) // len(terms[0].exponent)
            self.emit(sum_terms(self, point.name, rows, terms, point), codes)

    def _is_real(self, node: Node) -> bool:
        makers = [self.makers.get(name) for name in node.inputs]
        return all(maker is not None and maker.op == "DequantizeLinear" for maker in makers)

    def _add(self, node: Node, codes: str, point: Point) -> None:
        self.take(node)
        a, b = (self.real(name, node) for name in node.inputs)
        if len({self.shapes[a.codes], self.shapes[b.codes], self.shapes[codes]}) != 1:
            self.refuse(node, "a sum that broadcasts", "two tensors of one shape")
        unit = min(a.exponent, b.exponent)
        layer = Add(
            name=point.name,
            a=self.value(a.codes),
            b=self.value(b.codes),
            zero_a=a.zero,
            zero_b=b.zero,
            up_a=a.exponent - unit,
            up_b=b.exponent - unit,
            shift=int(bounded(np.array([point.exponent - unit]))[0]),
            point=point,
        )
        self.emit(layer, codes)

    def _requantise_parts(self, quantise: Node, node: Node, point: Point) -> None:
        """Codes of several scales side by side: a table for each, then a Concat."""
        self.take(node)
        shape = self.shapes[quantise.outputs[0]]
        if node.attributes["axis"] % len(shape) != len(shape) - 1:
            self.refuse(node, "values one behind the other", "a Concat of channels")
        sources, codes = [], np.arange(CODE_MAX + 1)
        for i, name in enumerate(node.inputs):
            real = self.real(name, node)
            shift = int(bounded(np.array([point.exponent - real.exponent]))[0])
            entries = requantise(codes - real.zero, shift, point.zero_point)
            own = self.unique(f"{point.name}.{i}")
            self._layers.append(Table(own, self.value(real.codes), entries, point))
            self._sizes[own] = int(np.prod(self.shapes[real.codes]))
            sources.append(own)
        rows = int(np.prod(shape)) // shape[-1]
        self.emit(Concat(point.name, tuple(sources), rows), quantise.outputs[0])

    def _read_gather(self, node: Node) -> None:
        if node.inputs[0] in self.delays:
            read_lags(self, node)
            return
        entries, codes = self.look_up(node.outputs[0], node)
        name = node.name.removesuffix(".q")
        self.emit(Table(name, self.value(codes), entries), node.outputs[0])

    def _read_slice(self, node: Node) -> None:
        starts, stops, axes, steps = (*(self.constants.get(n) for n in node.inputs[1:]), None)[:4]
        ranges = [reference.whole(node, value).tolist() for value in (starts, stops, axes)]
        plain = steps is None or reference.whole(node, steps).tolist() == [1]
        if not plain or any(len(values) != 1 for values in ranges):
            self.refuse(node, "a Slice of several axes or with steps", "one axis, step 1")
        (start,), (stop,), (axis,) = ranges
        whole = self.delays.get(node.inputs[0])
        if whole is not None and node.outputs[0] == whole.state.output:
            keep_delay(self, node, axis, start, stop)
            return
        self._columns(node, node.inputs[0], node.outputs[0], axis, start, stop)

    def _columns(self, node: Node, source: str, out: str, axis: int, start: int, stop: int) -> None:
        value, shape = self.value(source), self.shapes[source]
        width = shape[-1]
        if axis % len(shape) != len(shape) - 1:
            self.refuse(node, "rows of a value", "columns")
        start, stop, _ = slice(start, stop).indices(width)
        rows = int(np.prod(shape)) // width
        layer = Columns(out.removesuffix(".q"), value, rows, start, stop)
        self.emit(layer, out)
        self.take(node)

    def _read_split(self, node: Node) -> None:
        source = node.inputs[0]
        if source in self.makers and source not in self._values and source not in self.delays:
            return  # of accumulators: read with what uses them
        sizes = self.constants.get(node.inputs[1]) if len(node.inputs) > 1 else None
        edges = np.concatenate([[0], np.cumsum(reference.whole(node, sizes))])
        for i, name in enumerate(node.outputs):
            axis = node.attributes.get("axis", 0)
            self._columns(node, node.inputs[0], name, axis, int(edges[i]), int(edges[i + 1]))

    def _read_concat(self, node: Node) -> None:
        past = past_of(self, node)
        if past is not None:
            begin_delay(self, node, past)
        elif all(name in self._values or name in self.delays for name in node.inputs):
            self._join(node)  # of numbers: read with the QuantizeLinear behind it

    def _join(self, node: Node) -> None:
        shape = self.shapes[node.outputs[0]]
        if node.attributes["axis"] % len(shape) != len(shape) - 1:
            self.refuse(node, "values one behind the other", "a Concat of channels")
        rows = int(np.prod(shape)) // shape[-1]
        name = node.outputs[0].removesuffix(".q")
        sources = tuple(self.value(name) for name in node.inputs)
        self.emit(Concat(name, sources, rows), node.outputs[0])

    def _read_maximum(self, node: Node) -> None:
        value, shape = self.value(node.inputs[0]), self.shapes[node.inputs[0]]
        axes = self.constants.get(node.inputs[1]) if len(node.inputs) > 1 else None
        if reference.reduced_axes(node, len(shape), axes) != (0,):
            self.refuse(node, "a maximum over another axis", "axis 0")
        self.emit(Maximum(node.name, value, shape[0]), node.outputs[0])


def states_of(layer: Layer) -> tuple[StateTensor, ...]:
    """The state tensors that a layer keeps."""
    if isinstance(layer, Delay):
        return (layer.state,)
    if isinstance(layer, LstmCell):
        return (layer.hidden, layer.cell)
    return (layer.hidden,) if isinstance(layer, GruCell) else ()
