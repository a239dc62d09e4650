"""What other people's graphs are put through before they are served or quantised.

Each pass takes a model and gives another one; what comes in is never changed. None changes what a
graph computes by more than float32 rounding. Names of nodes and tensors are kept where they are
there, and given in graph order where they are not, so that the same file gives the same bytes.

Source: ONNX operator specifications.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import helper, numpy_helper

from feeds.errors import InputError
from models.step_graph import IR_VERSION

LOWEST_OPSET: Final = 18
HIGHEST_OPSET: Final = 20  # above, ONNX Runtime 1.32 fuses quantised attention wrongly
MACS: Final = ("Conv", "Gemm", "MatMul")


class Wiring:
    """Who makes and who takes each tensor of a graph without subgraphs.

    Attributes
    ----------
    graph : GraphProto
    constants : dict of str to ndarray
        Initialisers.
    maker : dict of str to NodeProto
    takers : dict of str to list of NodeProto
    results : set of str
        Graph outputs.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        self.maker = {name: node for node in model.graph.node for name in node.output}
        self.takers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in model.graph.node:
            for name in dict.fromkeys(node.input):
                self.takers[name].append(node)
        self.results = {value.name for value in model.graph.output}
        self._names = {name for node in model.graph.node for name in (*node.input, *node.output)}
        self._names |= self.constants.keys() | {value.name for value in model.graph.input}

    def add_constant(self, name: str, values: np.ndarray) -> str:
        """A new initialiser under this name, or a numbered one where it is taken."""
        name = self.unique(name)
        self.constants[name] = values
        self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def add_node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """A node of one output at the end of the graph; returns the output's name."""
        output = self.unique(output)
        node = helper.make_node(op, inputs, [output], name=output, **attributes)
        self.graph.node.append(node)
        self.maker[output] = node
        return output

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._names

    def unique(self, name: str) -> str:
        """A tensor name that nothing has yet."""
        candidate, count = name, 1
        while candidate in self._names:
            count += 1
            candidate = f"{name}.{count}"
        self._names.add(candidate)
        return candidate


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    """A deep copy."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def shape_of(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """Shape of a graph input or output; 0 where a size is not fixed."""
    return tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """Value of a node's attribute."""
    found = next((item for item in node.attribute if item.name == name), None)
    return default if found is None else helper.get_attribute_value(found)


def tidied(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every node under a name of its own, constants as initialisers, nothing but the graph.

    Stack traces and paths, which exporters leave in the metadata, go; so do initialisers that
    nothing takes and those listed as inputs, which a caller could override.
    """
    model = copy_of(model)
    graph = model.graph
    model.ir_version = min(model.ir_version, IR_VERSION)
    model.doc_string = graph.doc_string = ""
    del model.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    del graph.quantization_annotation[:]
    for value in (*graph.input, *graph.output):
        value.doc_string = ""
        del value.metadata_props[:]
    nodes: list[onnx.NodeProto] = []
    taken: set[str] = set()
    given = {node.name for node in graph.node}
    for number, node in enumerate(graph.node):
        node.doc_string = ""
        del node.metadata_props[:]
        if node.op_type == "Constant" and not node.domain:
            array = _constant_value(node)
            if array is not None:
                graph.initializer.append(numpy_helper.from_array(array, node.output[0]))
                continue
        name = node.name or f"{node.op_type}.{number}"
        while name in taken or (not node.name and name in given):
            name += ".2"
        node.name = name
        taken.add(name)
        nodes.append(node)
    _replace(graph.node, nodes)
    constants = {tensor.name for tensor in graph.initializer}
    for tensor in graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]
    _replace(graph.input, [value for value in graph.input if value.name not in constants])
    return without_unused(model)


def _constant_value(node: onnx.NodeProto) -> np.ndarray | None:
    item = node.attribute[0]
    value = helper.get_attribute_value(item)
    if item.name == "value":
        return numpy_helper.to_array(value)
    if item.name in ("value_float", "value_floats"):
        return np.array(value, dtype=np.float32)
    if item.name in ("value_int", "value_ints"):
        return np.array(value, dtype=np.int64)
    return None


def replace_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    """Put other nodes, in order, into a model; in place."""
    _replace(model.graph.node, nodes)


def _replace(field: Any, items: list[Any]) -> None:
    """Put other messages into a repeated field."""
    kept = [type(item).FromString(item.SerializeToString()) for item in items]
    del field[:]
    field.extend(kept)


def renamed(model: onnx.ModelProto, names: Mapping[str, str]) -> onnx.ModelProto:
    """The same graph under other tensor names."""
    model = copy_of(model)
    graph = model.graph
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for item in (*graph.initializer, *graph.input, *graph.output):
        item.name = names.get(item.name, item.name)
    del graph.value_info[:]
    return model


def with_metadata_of(model: onnx.ModelProto, source: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the metadata and the graph name of another; changed in place."""
    del model.metadata_props[:]
    helper.set_model_props(model, {item.key: item.value for item in source.metadata_props})
    model.graph.name = source.graph.name
    return model


def without_unused(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model without nodes and initialisers that no output needs; changed in place."""
    graph = model.graph
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(_inputs_of(node))
            kept.append(node)
    if len(kept) < len(graph.node):
        _replace(graph.node, kept[::-1])
    if any(tensor.name not in needed for tensor in graph.initializer):
        _replace(graph.initializer, [t for t in graph.initializer if t.name in needed])
    return model


def _inputs_of(node: onnx.NodeProto) -> set[str]:
    """Tensors that a node or one of its subgraphs takes."""
    names = set(node.input)
    for item in node.attribute:
        for graph in (*item.graphs, *([item.g] if item.HasField("g") else [])):
            for inner in graph.node:
                names |= _inputs_of(inner)
            names |= {value.name for value in graph.output}
    return names


def opset_of(model: onnx.ModelProto) -> int:
    """Version of the standard operators."""
    return next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 0)


def at_opset(
    model: onnx.ModelProto, lowest: int = LOWEST_OPSET, highest: int = HIGHEST_OPSET
) -> onnx.ModelProto:
    """The same graph in an operator set from ``lowest`` to ``highest``.

    Raises
    ------
    InputError
        If an operator has no equivalent there.
    """
    found = opset_of(model)
    if lowest <= found <= highest:
        return model
    target = lowest if found < lowest else highest
    try:
        model = onnx.version_converter.convert_version(copy_of(model), target)
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the converter throws bare RuntimeErrors out of C++
        raise InputError(
            "the graph cannot be brought to an operator set that is served",
            where=model.graph.name or "model",
            expected=f"opset {lowest} to {highest}",
            found=f"opset {found}: {' '.join(str(error).split())[:200]}",
            fix=f"export it with opset {lowest}",
        ) from None
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the tools of ONNX Runtime from writing to, and configuring, the root logger."""
    root = logging.getLogger()
    handlers, level, disabled = root.handlers[:], root.level, logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.disable(disabled)


def preprocessed(model: onnx.ModelProto) -> onnx.ModelProto:
    """ONNX Runtime's own preparation: shapes, constant folding, Conv with BatchNormalization.

    Raises
    ------
    InputError
        If ONNX Runtime cannot load the graph.
    """
    with quiet(), tempfile.TemporaryDirectory() as folder:
        from onnxruntime.quantization import quant_pre_process

        given, path = Path(folder) / "given.onnx", Path(folder) / "prepared.onnx"
        # By file: of a model in memory the tool loses large constants, as external data of none.
        onnx.save(model, given)
        try:
            # Shapes are fixed: ONNX infers them; the symbolic pass gives up on some Gathers.
            quant_pre_process(given, path, skip_symbolic_shape=True)
            return onnx.load(path)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise InputError(
                "the graph cannot be prepared for quantisation",
                where=model.graph.name or "model",
                found=" ".join(str(error).split())[:300],
                fix="hold it against models.foreign.step_model.load_onnx first",
            ) from None


def with_plain_gemms(model: onnx.ModelProto) -> onnx.ModelProto:
    """Factors ``alpha`` and ``beta`` of each Gemm multiplied into its constants."""
    model = copy_of(model)
    wires = Wiring(model)
    for node in [node for node in model.graph.node if node.op_type == "Gemm"]:
        for place, key in ((1, "alpha"), (2, "beta")):
            factor = attribute(node, key, 1.0)
            name = node.input[place] if len(node.input) > place else ""
            if factor == 1.0 or (name and name not in wires.constants):
                continue
            if name:
                values = (wires.constants[name].astype(np.float64) * factor).astype(np.float32)
                node.input[place] = wires.add_constant(f"{name}.{key}", values)
            kept = [item for item in node.attribute if item.name != key]
            _replace(node.attribute, kept)
    return without_unused(model)


def with_own_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """No two products share a constant.

    ONNX Runtime's optimiser fails where two DequantizeLinear nodes share one initialiser.
    """
    model = copy_of(model)
    wires = Wiring(model)
    taken: set[str] = set()
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name in wires.constants and node.op_type in MACS:
                if name in taken:
                    node.input[place] = wires.add_constant(name, wires.constants[name])
                taken.add(name)
    return without_unused(model)


def with_matmuls(model: onnx.ModelProto) -> onnx.ModelProto:
    """Each Gemm of a constant weight as MatMul and Add, the weight as (in, out).

    ONNX Runtime's dynamic and 4-bit quantisers know MatMul only. MatMul keeps the Gemm's name.
    """
    model = with_plain_gemms(model)
    wires = Wiring(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        plain = node.op_type == "Gemm" and node.input[1] in wires.constants
        if not plain or attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1.0:
            nodes.append(node)
            continue
        weight = node.input[1]
        if attribute(node, "transB", 0):
            weight = wires.add_constant(f"{weight}.transposed", wires.constants[weight].T)
        has_bias = len(node.input) > 2 and bool(node.input[2])
        product = wires.unique(f"{node.output[0]}.product") if has_bias else node.output[0]
        nodes.append(helper.make_node("MatMul", [node.input[0], weight], [product], name=node.name))
        if has_bias:
            ends = [product, node.input[2]]
            nodes.append(helper.make_node("Add", ends, node.output, name=f"{node.name}.bias"))
    replace_nodes(model, nodes)
    return without_unused(model)
