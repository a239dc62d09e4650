"""Reading a quantised ONNX graph: its nodes in order, its constants, its ends.

`IntegerReference` and `prove_exact` both start from this. Only the default operator set is taken,
nothing nested, and every node gets a name that a person can find in the file. The nodes of the
value check are passed over: they look at the model and nothing of it depends on them.

Source: ONNX IR specification; ONNX operators of the default set, versions 19 to 21.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np

from engine.backends.dyadic import Dyadic, InexactError, from_float
from engine.manifest import CHECK_PREFIX, VIOLATIONS, StateTensor
from feeds.errors import InputError

if TYPE_CHECKING:
    import onnx

OPSETS: Final = range(19, 22)
INTEGERS: Final = ("uint8", "int8", "int32", "int64")
KEEP_OUT: Final = "declare the bundle's numerics as tolerance, or rebuild the graph without it"

Value = Dyadic | np.ndarray
"""What a tensor holds: a float32 tensor as `Dyadic`, an integer tensor as it is."""


@dataclass(frozen=True)
class Node:
    """One operation.

    Attributes
    ----------
    name : str
        As in the file; the first output's where the file gives none.
    op : str
        Operator of the default set.
    inputs, outputs : tuple of str
        "" for an optional one that is left out.
    attributes : dict
    where : str
        Model and node, for errors.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    where: str = field(repr=False)

    def refuse(
        self, what: str, *, expected: str = "", found: object = "", fix: str = ""
    ) -> NoReturn:
        """Raise an `InputError` that names this node and the way out."""
        raise InputError(
            what, where=self.where, expected=expected, found=str(found), fix=fix or KEEP_OUT
        )


@dataclass(frozen=True)
class End:
    """A graph input or output: its name, numpy dtype and fixed shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Graph:
    """A graph that can be interpreted.

    Attributes
    ----------
    where : str
        The model, for errors.
    nodes : tuple of Node
        In the file's order, which ONNX requires to be one of computing. Constants are not in it.
    constants : dict of str to Value
        Initialisers and Constant nodes.
    inputs, outputs : tuple of End
    """

    where: str
    nodes: tuple[Node, ...]
    constants: dict[str, Value]
    inputs: tuple[End, ...]
    outputs: tuple[End, ...]


def read_model(model: bytes | str | Path) -> tuple[onnx.ModelProto, str]:
    """Parse an ONNX file or its bytes; returns it with the name that errors give it.

    Raises
    ------
    InputError
        If it cannot be read or is no ONNX model.
    """
    import onnx

    where = "ONNX model" if isinstance(model, bytes) else str(model)
    try:
        data = model if isinstance(model, bytes) else Path(model).read_bytes()
        return onnx.load_model_from_string(data), where
    except OSError as error:
        raise InputError(
            "cannot read the model", where=where, found=error.strerror or str(error)
        ) from None
    except Exception as error:  # protobuf's exceptions depend on its implementation
        raise InputError(
            "not an ONNX model", where=where, found=str(error)[:200], fix="copy the file again"
        ) from None


def without_checks(model: onnx.ModelProto, where: str = "ONNX model") -> onnx.ModelProto:
    """The model alone: without its value-check nodes, what only they use, and their output.

    A graph whose last output is not `VIOLATIONS` has none, and is given back as it is.

    Raises
    ------
    InputError
        If the model itself depends on a node of the value check.
    """
    import onnx

    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    graph = plain.graph
    if not graph.output or graph.output[-1].name != VIOLATIONS:
        return plain
    made = {
        name
        for node in graph.node
        if node.name.startswith(CHECK_PREFIX)
        for name in node.output
        if name
    }
    nodes = [node for node in graph.node if not node.name.startswith(CHECK_PREFIX)]
    for node in nodes:
        if not made.isdisjoint(node.input):
            raise InputError(
                "the model depends on its own value check",
                where=f"{where}: node {node.name!r} ({node.op_type})",
                expected=f"inputs that no node named {CHECK_PREFIX}... makes",
                found=", ".join(sorted(made.intersection(node.input))),
                fix="rebuild the bundle",
            )
    outputs = [value for value in graph.output if value.name not in made]
    constants = [item for item in graph.initializer if not item.name.startswith(CHECK_PREFIX)]
    for field_of, kept in (
        (graph.node, nodes),
        (graph.output, outputs),
        (graph.initializer, constants),
    ):
        if len(kept) != len(field_of):
            copies = [type(item).FromString(item.SerializeToString()) for item in kept]
            del field_of[:]
            field_of.extend(copies)
    return plain


def read_graph(model: onnx.ModelProto, where: str = "ONNX model") -> Graph:
    """The graph of a model, without its value check.

    Raises
    ------
    InputError
        For another operator set, a nested graph, a constant that is neither float32 nor an
        integer, or an end without a fixed shape.
    """
    model = without_checks(model, where)
    versions = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    if versions.get("ai.onnx") not in OPSETS:
        raise InputError(
            "unknown operator set",
            where=where,
            expected=f"ai.onnx {OPSETS.start} to {OPSETS.stop - 1}",
            found=", ".join(f"{name} {version}" for name, version in versions.items()) or "none",
            fix="export the model with one of these",
        )
    constants = {item.name: _constant(item, where) for item in model.graph.initializer}
    nodes = []
    for proto in model.graph.node:
        node = _node(proto, where)
        if node.op == "Constant":
            constants[node.outputs[0]] = _constant_node(node)
        else:
            nodes.append(node)
    return Graph(
        where,
        tuple(nodes),
        constants,
        tuple(_end(item, where) for item in model.graph.input if item.name not in constants),
        tuple(_end(item, where) for item in model.graph.output),
    )


def check_state(graph: Graph, state: Sequence[StateTensor]) -> None:
    """Whether the graph has exactly this state behind its input and its output.

    Raises
    ------
    InputError
        If it has not.
    """
    for kind, ends, names in (
        ("input", graph.inputs, [tensor.input for tensor in state]),
        ("output", graph.outputs, [tensor.output for tensor in state]),
    ):
        expected = [(n, t.dtype, t.shape) for n, t in zip(names, state, strict=True)]
        found = [(end.name, end.dtype, end.shape) for end in ends]
        if len(found) != len(expected) + 1 or found[1:] != expected:
            raise InputError(
                f"the graph has another state than is said of it, by its {kind}s",
                where=graph.where,
                expected=", ".join(f"{n} {d} {list(s)}" for n, d, s in expected) or "none",
                found=", ".join(f"{n} {d} {list(s)}" for n, d, s in found[1:]) or "none",
                fix="give the state tensors of the bundle's manifest",
            )


def _node(proto: onnx.NodeProto, where: str) -> Node:
    import onnx

    name = proto.name or (proto.output[0] if proto.output else "?")
    at = f"{where}: node {name!r} ({proto.op_type})"
    if proto.domain not in ("", "ai.onnx"):
        raise InputError(
            "an operator of another domain", where=at, found=proto.domain, fix=KEEP_OUT
        )
    nested = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
    if any(item.type in nested or item.ref_attr_name for item in proto.attribute):
        raise InputError("a nested graph", where=at, fix=KEEP_OUT)
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in proto.attribute}
    return Node(name, proto.op_type, tuple(proto.input), tuple(proto.output), attributes, at)


def _constant(tensor: onnx.TensorProto, where: str) -> Value:
    import onnx

    at = f"{where}: constant {tensor.name!r}"
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise InputError("a constant in another file", where=at, fix="store it in the model")
    return _value(onnx.numpy_helper.to_array(tensor), at)


def _value(array: np.ndarray, where: str) -> Value:
    if array.dtype.name in INTEGERS:
        return array
    if array.dtype != np.float32:
        raise InputError(
            "a constant of a type that exact-int8 does not know",
            where=where,
            expected="float32 or one of " + ", ".join(INTEGERS),
            found=array.dtype.name,
            fix=KEEP_OUT,
        )
    try:
        return from_float(array)
    except InexactError as error:
        raise InputError(str(error), where=where, fix=KEEP_OUT) from None


def _constant_node(node: Node) -> Value:
    import onnx

    for name, value in node.attributes.items():
        if name == "value":
            return _value(onnx.numpy_helper.to_array(value), node.where)
        if name in ("value_int", "value_ints"):
            return np.array(value, dtype=np.int64)
        if name in ("value_float", "value_floats"):
            return _value(np.array(value, dtype=np.float32), node.where)
    node.refuse("a constant of a type that exact-int8 does not know", found=list(node.attributes))


def _end(info: onnx.ValueInfoProto, where: str) -> End:
    import onnx

    tensor = info.type.tensor_type
    dims = tensor.shape.dim
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name if tensor.elem_type else ""
    if dtype != "float32" and dtype not in INTEGERS:
        raise InputError(
            "an end of a type that exact-int8 does not know",
            where=f"{where}: {info.name}",
            expected="float32 or one of " + ", ".join(INTEGERS),
            found=dtype or "no tensor",
            fix=KEEP_OUT,
        )
    if not tensor.HasField("shape") or not all(dim.dim_value > 0 for dim in dims):
        raise InputError(
            "an end without a fixed shape",
            where=f"{where}: {info.name}",
            expected="sizes above 0",
            found=str([dim.dim_value or dim.dim_param for dim in dims]),
            fix="export the model with the shape of one step",
        )
    return End(info.name, dtype, tuple(dim.dim_value for dim in dims))
