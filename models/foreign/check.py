"""What an ONNX graph that other people made must be before anything is made of it.

`load_onnx` gives a static float graph that ONNX Runtime runs at batch 1. A model may carry state:
every input but one is then paired with an output of the same shape, named ``a`` and ``a.next``, or
``a.past`` and ``a.next``.

Source: ONNX specification, "Open Neural Network Exchange Intermediate Representation".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx.inliner
import onnxruntime as ort
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper

from engine.backends.onnx_providers import session_options
from engine.bundle import MAX_MODEL_BYTES
from engine.manifest import StateDtype, StateTensor
from feeds.errors import InputError
from models.foreign.passes import LOWEST_OPSET, shape_of, tidied

CONTROL_FLOW: Final = ("If", "Loop", "Scan", "SequenceMap")
DATA_SHAPED: Final = ("Compress", "NonMaxSuppression", "NonZero", "Unique")
DOMAINS: Final = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
NEXT: Final = ".next"
PAST: Final = ".past"
STATIC_STEP_MODEL: Final = (
    "export the static step model: one book state in, state tensors in and out"
)


def load_onnx(path: str | Path) -> onnx.ModelProto:
    """Read an ONNX file and check that it can be served.

    Parameters
    ----------
    path : str or Path
        A file of any opset that this ONNX Runtime knows, its external data beside it.

    Returns
    -------
    ModelProto
        Static shapes, batch 1, every node named, external data inside, exporters' notes left out.

    Raises
    ------
    InputError
        For a missing or cut file, missing external data, a graph that the ONNX checker or shape
        inference refuses, dynamic control flow, operators that ONNX Runtime cannot load, dynamic
        axes other than the batch, and inputs that are neither the book state nor a state tensor.
    """
    where = str(path)
    return checked(_with_external_data(_read(Path(path)), Path(path)), where)


def _read(path: Path) -> onnx.ModelProto:
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= MAX_MODEL_BYTES else b""
    except OSError as error:
        raise InputError(
            "cannot read the model",
            where=str(path),
            expected="an ONNX file",
            found=error.strerror or type(error).__name__,
            fix="correct the path",
        ) from None
    if size > MAX_MODEL_BYTES:
        raise InputError(
            "the model is too large",
            where=str(path),
            expected=f"at most {MAX_MODEL_BYTES} bytes",
            found=str(size),
        )
    try:
        model = onnx.load_model_from_string(data)
    except DecodeError:
        model = onnx.ModelProto()
    if not model.graph.node:
        raise InputError(
            "not a whole ONNX file: cut off, or another format",
            where=f"{path}, {size} bytes",
            expected="a serialised ModelProto with a graph",
            fix="copy or export it again",
        )
    return model


def _with_external_data(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    try:
        onnx.external_data_helper.load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise InputError(
            "external data of the model are missing, cut off or out of place",
            where=str(path),
            expected="every file that the model names, whole, in its own folder",
            found=one_line(error),
            fix="copy them beside it, or export with the weights inside",
        ) from None
    return model


def checked(model: onnx.ModelProto, where: str) -> onnx.ModelProto:
    """What `load_onnx` makes of the graph that it read; see there.

    Parameters
    ----------
    model : ModelProto
    where : str
        Named in errors.
    """
    model = tidied(onnx.inliner.inline_local_functions(model))
    constants = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in CONTROL_FLOW:
            raise InputError(
                "dynamic control flow cannot be served",
                where=f"{where}: node {node.name} ({node.op_type})",
                expected="a graph whose every node runs at every step",
                fix=STATIC_STEP_MODEL,
            )
        if node.op_type in DATA_SHAPED and not constants.issuperset(node.input):
            raise InputError(
                "an operator whose output has a size that depends on data cannot be served",
                where=f"{where}: node {node.name} ({node.op_type})",
                expected="fixed shapes throughout",
                fix=STATIC_STEP_MODEL,
            )
        if node.domain not in DOMAINS:
            raise InputError(
                "an operator that ONNX Runtime does not have",
                where=f"{where}: node {node.name} ({node.op_type} of domain {node.domain})",
                expected="operators of ONNX, or of com.microsoft",
                fix="export without custom operators",
            )
    _fix_shapes(model, where)
    _check_inputs(model, where)
    try:
        onnx.checker.check_model(model, full_check=True)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise _broken(model, where, error) from None
    return model


def _fix_shapes(model: onnx.ModelProto, where: str) -> None:
    """Batch 1 on every input, and on every output the shape that a run has."""
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        for axis, dim in enumerate(dims):
            if dim.dim_value > 0:
                continue
            if axis:
                raise InputError(
                    "a dynamic axis other than the batch",
                    where=f"{where}: input {value.name}, axis {axis}",
                    expected="a fixed size",
                    found=dim.dim_param or "no size",
                    fix="export it for the window it will be served with, no dynamic axis but 0",
                )
            dim.dim_value = 1
    options = session_options(1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        zeros = {
            value.name: np.zeros(shape_of(value), dtype=dtype_of(value))
            for value in model.graph.input
        }
        arrays = session.run(None, zeros)
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise _broken(model, where, error) from None
    outputs = [
        helper.make_tensor_value_info(
            value.name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
        )
        for value, array in zip(model.graph.output, arrays, strict=True)
    ]
    del model.graph.output[:]
    model.graph.output.extend(outputs)


def dtype_of(value: onnx.ValueInfoProto) -> np.dtype[Any]:
    """Dtype of a graph input or output."""
    return helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)


def _broken(model: onnx.ModelProto, where: str, error: Exception) -> InputError:
    """ONNX's or ONNX Runtime's complaint, with the node that it is about."""
    message = one_line(error)
    nodes = [
        node
        for node in model.graph.node
        if any(f"{a}{node.name}{b}" in message for a, b in ("()", '""', "''", (" ", ",")))
        or f":{node.op_type}(" in message
        or f"Op registered for {node.op_type} " in message
        or f"op_type:{node.op_type}," in message
    ]
    named = [node for node in nodes if node.name in message] or nodes
    at = f": node {named[0].name} ({named[0].op_type})" if named else ""
    return InputError(
        "ONNX or ONNX Runtime refuses the graph",
        where=f"{where}{at}",
        expected="a valid graph of operators that this ONNX Runtime has",
        found=message,
        fix=f"export it again with opset {LOWEST_OPSET} to 20 and no custom operator",
    )


def one_line(error: BaseException, length: int = 240) -> str:
    """First words of an exception, without the control characters of a terminal."""
    words = " ".join(str(error).split())
    return "".join(c for c in words if c.isprintable())[:length] or type(error).__name__


def state_pairs(model: onnx.ModelProto) -> list[tuple[str, str]]:
    """(input, output) of each state tensor, in the order of the inputs."""
    outputs = {value.name: value for value in model.graph.output}
    pairs = []
    for value in model.graph.input:
        after = outputs.get(value.name.removesuffix(PAST) + NEXT)
        if after is None or dtype_of(value).name not in ("float32", "uint8"):
            continue
        if shape_of(value) == shape_of(after) and dtype_of(value) == dtype_of(after):
            pairs.append((value.name, after.name))
    return pairs


def state_tensor(model: onnx.ModelProto, before: str, after: str) -> StateTensor:
    """What the manifest says of a pair; a fresh stream begins with zeros."""
    (value,) = (value for value in model.graph.input if value.name == before)
    dtype: StateDtype = "uint8" if dtype_of(value) == np.uint8 else "float32"
    return StateTensor(before, after, dtype, shape_of(value), 0.0)


def book_input(model: onnx.ModelProto) -> onnx.ValueInfoProto:
    """The one input that is no state tensor."""
    states = {before for before, _ in state_pairs(model)}
    (value,) = (value for value in model.graph.input if value.name not in states)
    return value


def _check_inputs(model: onnx.ModelProto, where: str) -> None:
    states = {before for before, _ in state_pairs(model)}
    others = [value for value in model.graph.input if value.name not in states]
    if len(others) != 1:
        raise InputError(
            "the model does not take exactly one book state",
            where=f"{where}: inputs",
            expected=f"one float32 input; state tensors NAME with an output NAME{NEXT}",
            found=", ".join(f"{value.name}{list(shape_of(value))}" for value in others) or "none",
            fix=STATIC_STEP_MODEL,
        )
    (value,) = others
    if value.type.tensor_type.elem_type != TensorProto.FLOAT:
        raise InputError(
            "the model does not take float32",
            where=f"{where}: input {value.name}",
            expected="float32",
            found=str(dtype_of(value)),
            fix="export the float32 model; it is quantised here",
        )
