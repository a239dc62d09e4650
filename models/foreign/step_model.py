"""Other people's models: from an ONNX file or a PyTorch module to a step that the engine can serve.

`load_onnx` and `load_torch` give a checked float graph; `as_step_model` turns one that looks at a
whole window of rows into one that takes a row and remembers the rest. `models.foreign.quantise`
makes the quantised twin, before or after: the wrapping only moves data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper

from engine.manifest import MAX_CLASSES, StateTensor
from feeds.errors import InputError
from models.foreign.check import (
    book_input,
    checked,
    state_pairs,
    state_tensor,
)
from models.foreign.passes import Wiring, at_opset, attribute, renamed, shape_of
from models.step_graph import INPUT_NAME, OUTPUT_NAME

HISTORY: Final = "history"
NEXT_HISTORY: Final = "history.next"
MAX_WINDOW: Final = 4096
Layout = Literal["rows-columns", "columns-rows"]
Columns = slice | Sequence[int]


def as_step_model(
    model: onnx.ModelProto,
    *,
    n_features: int,
    columns: Columns,
    window: int,
    n_classes: int,
    name: str,
    layout: Layout | None = None,
) -> tuple[onnx.ModelProto, tuple[StateTensor, ...]]:
    """Wrap a model of a window into a model of one step.

    Parameters
    ----------
    model : ModelProto
        Of `load_onnx` or `load_torch`, or quantised since. Its input is some arrangement of
        (window, columns) with ones, 1 x T x C, 1 x 1 x T x C, 1 x C x T or the like, told apart by
        the sizes; or it is (1, features): then it takes one step already and only gets new names.
    n_features : int
        Length of the engine's feature vector.
    columns : slice or sequence of int
        Features that the model takes, in its order.
    window : int
        Rows that it looks at, the newest last.
    n_classes : int
    name : str
        Of the graph, and of the model in errors.
    layout : {"rows-columns", "columns-rows"}, optional
        For a window as long as it is wide, where the sizes do not say.

    Returns
    -------
    model : ModelProto
        Inputs ``x`` float32 (1, features) and ``history`` float32 (window - 1, columns), outputs
        ``logits`` float32 (1, classes) and ``history.next``; then state tensors of the model's
        own. A Softmax at the end is cut off: the greatest score stays the same one.
    state : tuple of StateTensor
        For the bundle's manifest. A fresh history is zeros, the mean of normalised features.

    Raises
    ------
    InputError
        For what `load_onnx` refuses, an input that is no such arrangement or could be two, and a
        model without an output of the classes.
    """
    picked = _picked(columns, n_features)
    for key, value, most in (("window", window, MAX_WINDOW), ("n_classes", n_classes, MAX_CLASSES)):
        if not 1 <= value <= most:
            raise InputError("out of range", where=key, expected=f"1 to {most}", found=str(value))
    model = at_opset(checked(model, name))
    own, entry = state_pairs(model), book_input(model)
    wrapped = shape_of(entry) != (1, n_features)
    turned = wrapped and _is_turned(entry, window, len(picked), layout, name)
    wires = Wiring(model)
    logits = _logits(wires, {after for _, after in own}, n_classes, name)
    ends = {INPUT_NAME, OUTPUT_NAME, *((HISTORY, NEXT_HISTORY) if wrapped else ())}
    names = {end: wires.unique(f"{end}.inner") for end in ends if wires.has(end)}
    names[logits] = OUTPUT_NAME
    if not wrapped:
        names[entry.name] = INPUT_NAME
    model = renamed(model, names)
    states = [
        state_tensor(model, names.get(before, before), names.get(after, after))
        for before, after in own
    ]
    if wrapped:
        inner = names.get(entry.name, entry.name)
        _put_window_before(model, inner, shape_of(entry), picked, window, turned)
        if window > 1:
            shape = (window - 1, len(picked))
            states.insert(0, StateTensor(HISTORY, NEXT_HISTORY, "float32", shape, 0.0))
    _set_ends(model, n_features, n_classes, states)
    model.graph.name = name
    onnx.checker.check_model(model, full_check=True)
    return model, tuple(states)


def _logits(wires: Wiring, after: set[str], n_classes: int, where: str) -> str:
    """The tensor of (1, classes) before any Softmax; made where the model's has another shape."""
    outputs = {value.name: shape_of(value) for value in wires.graph.output}
    scores = [
        name
        for name, shape in outputs.items()
        if name not in after and np.prod(shape, dtype=np.int64) == n_classes
    ]
    if len(scores) != 1:
        raise InputError(
            "the model has not exactly one output of the classes",
            where=f"{where}: outputs",
            expected=f"one of {n_classes} scores, beside state tensors",
            found=", ".join(f"{name}{list(shape)}" for name, shape in outputs.items()),
            fix="correct the number of classes, or export the scores alone",
        )
    (name,) = scores
    shape = outputs[name]
    while (node := wires.maker.get(name)) is not None:
        axis = attribute(node, "axis", -1)
        along = node.op_type in ("Softmax", "LogSoftmax") and shape[axis] == n_classes
        if not along and node.op_type != "Identity":
            break
        name = node.input[0]
    if shape != (1, n_classes) or name not in wires.maker or name in after:
        to = wires.add_constant("step.logits.shape", np.array([1, n_classes]))
        name = wires.add_node("Reshape", [name, to], "step.logits")
    return name


def _put_window_before(
    model: onnx.ModelProto,
    entry: str,
    shape: tuple[int, ...],
    picked: np.ndarray,
    window: int,
    turned: bool,
) -> None:
    """Make the model's input ``entry`` of ``x`` and ``history``; in place."""
    wires = Wiring(model)
    body = list(model.graph.node)
    del model.graph.node[:]
    rows = wires.add_node(
        "Gather", [INPUT_NAME, wires.add_constant("step.columns", picked)], "step.row", axis=1
    )
    if window > 1:
        rows = wires.add_node("Concat", [HISTORY, rows], "step.window", axis=0)
        parts = {"start": 1, "stop": window, "axis": 0}
        bounds = [wires.add_constant(f"step.{key}", np.array([at])) for key, at in parts.items()]
        model.graph.node.append(
            helper.make_node("Slice", [rows, *bounds], [NEXT_HISTORY], name="step.history")
        )
    if turned:
        rows = wires.add_node("Transpose", [rows], "step.turned", perm=[1, 0])
    to = wires.add_constant("step.shape", np.array(shape))
    model.graph.node.append(helper.make_node("Reshape", [rows, to], [entry], name="step.input"))
    model.graph.node.extend(body)


def _set_ends(
    model: onnx.ModelProto, n_features: int, n_classes: int, states: Sequence[StateTensor]
) -> None:
    """Inputs and outputs in the order of the manifest."""
    kinds = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT}
    value = helper.make_tensor_value_info
    del model.graph.input[:], model.graph.output[:]
    model.graph.input.append(value(INPUT_NAME, TensorProto.FLOAT, [1, n_features]))
    model.graph.output.append(value(OUTPUT_NAME, TensorProto.FLOAT, [1, n_classes]))
    for state in states:
        model.graph.input.append(value(state.input, kinds[state.dtype], state.shape))
        model.graph.output.append(value(state.output, kinds[state.dtype], state.shape))


def _picked(columns: Columns, n_features: int) -> np.ndarray:
    """Numbers of the columns, int64."""
    if isinstance(columns, slice):
        columns = range(*columns.indices(n_features))
    picked = np.asarray(columns, dtype=np.int64)
    if picked.ndim != 1 or not len(picked) or picked.min() < 0 or picked.max() >= n_features:
        raise InputError(
            "columns that are no features",
            where="columns",
            expected=f"numbers from 0 to {n_features - 1}",
            found=str(columns)[:100],
        )
    return picked


def _is_turned(
    entry: onnx.ValueInfoProto, window: int, width: int, layout: Layout | None, where: str
) -> bool:
    """Whether the model takes (columns, window) instead of (window, columns)."""
    dims = shape_of(entry)
    kept = tuple(size for size in dims if size != 1)
    upright, lying = (
        tuple(size for size in order if size != 1) for order in ((window, width), (width, window))
    )
    fits = [kept == upright, kept == lying] if 2 <= len(dims) <= 4 else [False, False]
    if not any(fits):
        raise InputError(
            "the model's input is no arrangement of the window",
            where=f"{where}: input {entry.name}",
            expected=f"{window} rows of {width} columns, with ones for batch and channels",
            found=str(list(dims)),
            fix="correct the window and the columns, or export it without other axes",
        )
    if all(fits) and len(kept) == 2:
        if layout is None:
            raise InputError(
                "rows and columns of the window cannot be told apart",
                where=f"{where}: input {entry.name}",
                expected="a window longer or shorter than it is wide, or a layout",
                found=str(list(dims)),
                fix="say which with the layout, rows-columns or columns-rows",
            )
        return layout == "columns-rows"
    return not fits[0]


def window_feeds(
    x: np.ndarray, *, columns: Columns, window: int
) -> Iterator[dict[str, np.ndarray]]:
    """Inputs of a model that `as_step_model` wrapped, from the first row with a whole history.

    Parameters
    ----------
    x : ndarray of float32, shape (n, features)
        Normalised rows of one stream.
    """
    x = np.ascontiguousarray(x, dtype=np.float32)
    seen = np.ascontiguousarray(x[:, _picked(columns, x.shape[1])])
    for last in range(window - 1, len(x)):
        feed = {INPUT_NAME: x[last : last + 1]}
        if window > 1:
            feed[HISTORY] = seen[last - window + 1 : last]
        yield feed
