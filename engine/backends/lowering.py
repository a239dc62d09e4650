"""From a bundle's QDQ graph to the integer graph.

Each node is read once, in the file's order. What a layer is made of is found by walking back from
where it becomes codes, so that a graph is taken whatever its nodes are called; what does not fit
is refused by the name of the first node that cannot be read. Cells are in
`engine.backends.lowering_cells`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from engine.backends import reference_operations as reference
from engine.backends.check_groups import ValueCheck, read_value_check
from engine.backends.dyadic import Dyadic
from engine.backends.integer_graph import (
    CODE_MAX,
    INPUT,
    MAX_SHIFT,
    MIN_SHIFT,
    Add,
    Columns,
    Concat,
    Delay,
    Dense,
    IntegerGraph,
    Layer,
    Maximum,
    Point,
    Product,
    Table,
    requantise,
)
from engine.backends.integer_reference import IntegerReference, fold_constants
from engine.backends.qdq_graph import Node, Value, check_state, read_graph, read_model
from engine.manifest import StateTensor
from feeds.errors import InputError

if TYPE_CHECKING:
    from engine.bundle import Bundle

MAX_MAGNITUDE: Final = (1 << 31) - 1
SAME_ORDER: Final = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
OTHER_BACKEND: Final = "serve this bundle with the onnx backend"


@dataclass(frozen=True, eq=False)
class Real:
    """Codes seen as numbers: ``(codes - zero) * 2**exponent``."""

    codes: str
    exponent: int
    zero: int


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
    makers : dict of str to Node
        Of each tensor.
    done : set of str
        Nodes that are part of a layer already.
    constants : dict of str to Value
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
        self.done: set[str] = set()
        # One interpreted step knows every shape, and refuses what no integers can do.
        zeros = np.zeros(graph.inputs[0].shape, dtype=np.float32)
        self.shapes = {
            name: array.shape
            for name, array in IntegerReference(model, state).tensors(zeros).items()
        }
        elements = {name: int(np.prod(shape)) for name, shape in self.shapes.items()}
        self._check: ValueCheck = read_value_check(proto, elements, self.where)
        self._counted: set[str] = set()
        self._values: dict[str, str] = {}  # tensor of codes → value
        self._points: dict[str, Point] = {}  # of each value
        self._wholes: dict[str, Delay] = {}  # past and present side by side, not yet used
        self._layers: list[Layer] = []
        self._sizes: dict[str, int] = {}
        self._cells: dict[str, Callable[[], None]] = {}  # by their last node

    def run(self) -> IntegerGraph:
        """Lower the whole graph."""
        from engine.backends.lowering_cells import match_cells

        self._cells = match_cells(self)
        scores = self.graph.outputs[0].name
        for node in self._live:
            if node.name in self._cells:
                self._cells[node.name]()
            elif node.name not in self.done:
                self._read(node, scores)
        self._check_ends(scores)
        return IntegerGraph(
            where=self.where,
            n_features=self.graph.inputs[0].shape[-1],
            point=self._points[INPUT],
            layers=tuple(self._layers),
            sizes=self._sizes,
            state=self.state,
            checks=self._check.groups,
            input_limit=self._check.input_limit,
        )

    def _check_ends(self, scores: str) -> None:
        last = self._layers[-1] if self._layers else None
        if not isinstance(last, Dense) or last.point is not None:
            node = self.makers[scores]
            self.refuse(node, "scores that are not the last layer's accumulators", "Gemm")
        missed = sorted(self._check.counted.keys() - self._counted)
        if missed:
            self.refuse(
                self.makers[missed[0]], "codes that the value check counts and no layer has"
            )
        kept = {layer.state.output for layer in self._layers if isinstance(layer, Delay)}
        for tensor in self.state:
            maker = self.makers.get(tensor.output)
            if tensor.output not in kept and (maker is None or maker.name not in self.done):
                raise InputError(
                    "a state that no layer keeps",
                    where=f"{self.where}: {tensor.output}",
                    expected="a delay, or the state of an LSTM or GRU cell",
                    fix=OTHER_BACKEND,
                )

    # ---- what matchers are made of

    def refuse(self, node: Node, what: str, expected: str = "", found: str = "") -> None:
        """Raise an `InputError` that names the node."""
        node.refuse(what, expected=expected, found=found or node.op, fix=OTHER_BACKEND)

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
        self.done.add(node.name)
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
        self.done.add(node.name)
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
        assert isinstance(entries, np.ndarray)
        if entries.dtype != np.uint8:
            self.refuse(gather, "no table of codes", "uint8", entries.dtype.name)
        cast = self.made(gather.inputs[1], "Cast", gather)
        return entries, cast.inputs[0]

    def terms(self, name: str, by: Node) -> list[Term]:
        """The products whose sum a float32 tensor is."""
        node = self.makers.get(name)
        if node is None or node.op not in ("Gemm", "Add", "Split"):
            node = self.made(name, "Gemm", by)
        self.done.add(node.name)
        if node.op == "Gemm":
            return [self._term(node)]
        if node.op == "Add":
            return [term for part in node.inputs for term in self.terms(part, node)]
        sizes = self.constants.get(node.inputs[1]) if len(node.inputs) > 1 else None
        if not isinstance(sizes, np.ndarray) or node.attributes.get("axis", 0) not in (1, -1):
            self.refuse(node, "a Split of accumulators by another axis", "axis 1, given sizes")
        assert isinstance(sizes, np.ndarray)
        at = node.outputs.index(name)
        start = int(sizes[:at].sum())
        chosen = slice(start, start + int(sizes[at]))
        return [term.outputs(chosen) for term in self.terms(node.inputs[0], node)]

    def _term(self, node: Node) -> Term:
        given = (*(self.constants.get(name) for name in node.inputs[1:]), None)[:2]
        weight, bias = given
        plain = node.attributes.get("alpha", 1.0) == node.attributes.get("beta", 1.0) == 1.0
        if not isinstance(weight, Dyadic) or node.attributes.get("transB", 0) != 1 or not plain:
            self.refuse(node, "another product", "constant weights, transB=1, alpha=beta=1")
        assert isinstance(weight, Dyadic)
        real = self.real(node.inputs[0], node)
        if np.abs(weight.m).max(initial=0) > CODE_MAX // 2 + 1 or (weight.m > CODE_MAX // 2).any():
            self.refuse(node, "weights of more than 8 bits", "int8")
        outputs = len(weight.m)
        units = np.broadcast_to(weight.e, weight.shape)
        if (units != units[:, :1]).any():
            self.refuse(node, "weights of one output in several units", "one scale an output")
        exponent = units[:, 0] + real.exponent
        acc = -real.zero * weight.m.sum(axis=1)
        if len(node.inputs) > 2 and node.inputs[2]:
            acc = acc + self._in_units(node, bias, exponent)
        reach = np.abs(acc) + CODE_MAX * np.abs(weight.m).sum(axis=1)
        if reach.max(initial=0) > MAX_MAGNITUDE:
            self.refuse(node, "accumulators beyond int32", f"at most {MAX_MAGNITUDE}", reach.max())
        assert acc.shape == (outputs,)
        return Term(real.codes, weight.m.astype(np.int8), acc.astype(np.int64), exponent)

    def _in_units(self, node: Node, value: Value | None, exponent: np.ndarray) -> np.ndarray:
        """A bias as whole numbers of an exponent for each output."""
        bias = reference.real(node, value)
        up = np.broadcast_to(bias.e, bias.shape).reshape(-1) - exponent
        m = np.broadcast_to(bias.m.reshape(-1), exponent.shape)
        if (m & ((1 << np.clip(-up, 0, 62)) - 1)).any():
            self.refuse(node, "a bias in a finer unit than the products", "the products' scale")
        return np.where(
            m == 0, 0, np.where(up >= 0, m << np.clip(up, 0, 40), m >> -np.minimum(up, 0))
        )

    def dense(self, name: str, rows: int, terms: Sequence[Term], point: Point | None) -> Dense:
        """Products added up in their finest unit, their sources known by value."""
        exponent = np.min([term.exponent for term in terms], axis=0)
        products = tuple(
            Product(
                self.value(term.codes),
                np.ascontiguousarray(term.weight),
                term.bias.astype(np.int32),
                (term.exponent - exponent).astype(np.int32),
            )
            for term in terms
        )
        shift = np.zeros(len(exponent)) if point is None else point.exponent - exponent
        return Dense(name, rows, products, exponent.astype(np.int32), point, bounded(shift))

    def value(self, tensor: str) -> str:
        """The value that a tensor of codes is."""
        whole = self._wholes.pop(tensor, None)
        if whole is not None:
            self.emit(whole, tensor, self._points[whole.source])
        found = self._values.get(tensor)
        if found is None:
            node = self.makers.get(tensor)
            if node is None:
                raise InputError(
                    "codes that come from no layer",
                    where=f"{self.where}: {tensor}",
                    fix=OTHER_BACKEND,
                )
            self.refuse(node, "codes that come from no layer")
        assert found is not None
        return found

    def name_value(self, tensor: str, value: str, size: int) -> None:
        """Let a tensor of codes stand for a value that is there already, or a cell's state."""
        self._values[tensor] = value
        self._sizes[value] = size

    def emit(self, layer: Layer, tensor: str, point: Point | None) -> None:
        """The next layer, and the tensor of codes that it makes."""
        name, count = layer.name, 1
        while layer.name in self._sizes:
            count += 1
            layer = replace(layer, name=f"{name}.{count}")
        self._layers.append(layer)
        if point is not None:
            self.name_value(tensor, layer.name, int(np.prod(self.shapes[tensor])))
            self._points[layer.name] = point

    # ---- the nodes between cells

    def _read(self, node: Node, scores: str) -> None:
        if node.op == "Gemm" and scores in node.outputs:
            self.emit(self.dense(node.name, 1, self.terms(scores, node), None), scores, None)
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
        self.done.add(node.name)

    def _read_quantise(self, node: Node) -> None:
        source, codes = node.inputs[0], node.outputs[0]
        point = self.point(node)
        if source == self.graph.inputs[0].name:
            if INPUT in self._sizes:
                self.refuse(node, "a second quantisation of the input", "one")
            self.name_value(codes, INPUT, int(np.prod(self.shapes[codes])))
            self._points[INPUT] = point
            return
        maker = self.makers.get(source)
        if maker is not None and maker.op == "Concat":
            self._requantise_parts(node, maker, point)
        elif maker is not None and maker.op == "Add" and self._is_real(maker):
            self._add(maker, codes, point)
        else:
            terms = self.terms(source, node)
            rows = int(np.prod(self.shapes[codes])) // len(terms[0].exponent)
            self.emit(self.dense(point.name, rows, terms, point), codes, point)

    def _is_real(self, node: Node) -> bool:
        makers = [self.makers.get(name) for name in node.inputs]
        return all(maker is not None and maker.op == "DequantizeLinear" for maker in makers)

    def _add(self, node: Node, codes: str, point: Point) -> None:
        self.done.add(node.name)
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
        self.emit(layer, codes, point)

    def _requantise_parts(self, quantise: Node, node: Node, point: Point) -> None:
        """Codes of several scales side by side: a table for each, then a Concat."""
        self.done.add(node.name)
        shape = self.shapes[quantise.outputs[0]]
        if node.attributes["axis"] % len(shape) != len(shape) - 1:
            self.refuse(node, "values one behind the other", "a Concat of channels")
        sources, codes = [], np.arange(CODE_MAX + 1)
        for i, name in enumerate(node.inputs):
            real = self.real(name, node)
            shift = int(bounded(np.array([point.exponent - real.exponent]))[0])
            entries = requantise(codes - real.zero, shift, point.zero_point)
            own = f"{point.name}.{i}"
            self._layers.append(Table(own, self.value(real.codes), entries, point))
            self._sizes[own] = int(np.prod(self.shapes[real.codes]))
            sources.append(own)
        rows = int(np.prod(shape)) // shape[-1]
        self.emit(Concat(point.name, tuple(sources), rows), quantise.outputs[0], point)

    def _read_gather(self, node: Node) -> None:
        if node.inputs[0] in self._wholes:
            self._read_lags(node)
            return
        entries, codes = self.look_up(node.outputs[0], node)
        value = self.value(codes)
        name = node.name.removesuffix(".q")
        self.emit(Table(name, value, entries), node.outputs[0], self._points[value])

    def _read_slice(self, node: Node) -> None:
        starts, stops, axes, steps = (*(self.constants.get(n) for n in node.inputs[1:]), None)[:4]
        ranges = [reference.whole(node, value).tolist() for value in (starts, stops, axes)]
        plain = steps is None or reference.whole(node, steps).tolist() == [1]
        if not plain or any(len(values) != 1 for values in ranges):
            self.refuse(node, "a Slice of several axes or with steps", "one axis, step 1")
        (start,), (stop,), (axis,) = ranges
        whole = self._wholes.get(node.inputs[0])
        if whole is not None:
            steps_kept = whole.steps
            if (start, stop, axis) != (1, steps_kept + 1, 0):
                self.refuse(node, "another Slice of a delay", "all but the oldest step")
            if node.outputs[0] != whole.state.output:
                self.refuse(node, "the past of a delay that does not return as its state")
            self.done.add(node.name)
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
        self.emit(layer, out, self._points[value])
        self.done.add(node.name)

    def _read_split(self, node: Node) -> None:
        if self.makers.get(node.inputs[0]) is not None and node.inputs[0] not in self._values:
            return  # of accumulators: read with what uses them
        sizes = self.constants.get(node.inputs[1]) if len(node.inputs) > 1 else None
        edges = np.concatenate([[0], np.cumsum(reference.whole(node, sizes))])
        for i, name in enumerate(node.outputs):
            axis = node.attributes.get("axis", 0)
            self._columns(node, node.inputs[0], name, axis, int(edges[i]), int(edges[i + 1]))

    def _read_concat(self, node: Node) -> None:
        past = next((t for t in self.state if t.input == node.inputs[0]), None)
        if past is None or len(node.inputs) != 2 or node.attributes["axis"] != 0:
            if all(name in self._values for name in node.inputs):
                self._join(node)
            return  # of numbers: read with the QuantizeLinear behind it
        source = self.value(node.inputs[1])
        rows = int(np.prod(past.shape[1:-1], dtype=np.int64))
        if past.dtype != "uint8" or past.initial != self._points[source].zero_point:
            self.refuse(node, "a delay that does not begin with zeros", "the source's zero point")
        lags = tuple(range(past.shape[0], -1, -1))
        name = past.input.removesuffix(".past")
        self._wholes[node.outputs[0]] = Delay(name, source, rows, lags, rows == 1, past)
        self.done.add(node.name)

    def _join(self, node: Node) -> None:
        shape = self.shapes[node.outputs[0]]
        values = [self.value(name) for name in node.inputs]
        points = [self._points[value] for value in values]
        if node.attributes["axis"] % len(shape) != len(shape) - 1:
            self.refuse(node, "values one behind the other", "a Concat of channels")
        rows = int(np.prod(shape)) // shape[-1]
        name = node.outputs[0].removesuffix(".q")
        self.emit(Concat(name, tuple(values), rows), node.outputs[0], points[0])

    def _read_lags(self, node: Node) -> None:
        whole = self._wholes[node.inputs[0]]
        chosen = reference.whole(node, self.constants.get(node.inputs[1])).reshape(-1)
        if node.attributes.get("axis", 0) != 0:
            self.refuse(node, "a delay by another axis", "axis 0")
        lags = tuple(int(whole.steps - (at % (whole.steps + 1))) for at in chosen)
        out, by_row = node.outputs[0], whole.rows == 1
        users = self.users.get(out, [])
        if len(users) == 1 and users[0].op == "Transpose":
            if tuple(users[0].attributes.get("perm", ())) != (1, 0, 2):
                self.refuse(users[0], "another order of a delay's rows", "perm 1, 0, 2")
            by_row, out = True, users[0].outputs[0]
            self.done.add(users[0].name)
        self.done.add(node.name)
        layer = replace(whole, lags=lags, by_row=by_row)
        self.emit(layer, out, self._points[whole.source])

    def _read_maximum(self, node: Node) -> None:
        value, shape = self.value(node.inputs[0]), self.shapes[node.inputs[0]]
        axes = self.constants.get(node.inputs[1]) if len(node.inputs) > 1 else None
        if reference.reduced_axes(node, len(shape), axes) != (0,):
            self.refuse(node, "a maximum over another axis", "axis 0")
        self.emit(Maximum(node.name, value, shape[0]), node.outputs[0], self._points[value])


def bounded(shift: np.ndarray) -> np.ndarray:
    """Shifts as int32, within what `round_shift` takes; beyond it the codes are the same."""
    return np.asarray(np.clip(shift, MIN_SHIFT, MAX_SHIFT)).astype(np.int32)
