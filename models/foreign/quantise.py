"""Quantising any ONNX graph with ONNX Runtime's tools, on ranges that our own observers saw.

`quantise_static` writes QDQ graphs: uint8 activations and int8 weights around the products (Conv,
Gemm, MatMul), everything else in floating point. Around each product it leaves exactly the pairs
that let ONNX Runtime fuse it into one integer kernel: signed activations, an explicit Relu behind
a product, or a pair that no product takes would keep it from doing so. Numerics are "tolerance".

`quantise_dynamic` and `quantise_int4` need no data; `weights_to_fp16` only stores narrower.

Sources: ONNX Runtime documentation, "Quantize ONNX models"; Jacob et al. (2018), "Quantization and
Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"; Nagel et al. (2021),
"A White Paper on Neural Network Quantization".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper

from feeds.errors import InputError
from models.foreign.folding import with_folded_norms
from models.foreign.passes import (
    MACS,
    Wiring,
    at_opset,
    attribute,
    copy_of,
    preprocessed,
    shape_of,
    tidied,
    with_metadata_of,
    with_own_weights,
    with_plain_gemms,
)
from models.foreign.qdq import carried_to, with_float_kept, without_needless_pairs, write_qdq
from models.foreign.runtime import opened
from models.foreign.weights import (
    check_node_names,
    dynamic,
)
from models.observers import make_observer

# Past these, half a step of a uint8 output holds what is left of the curve: a range that only such
# a node takes ends there.
_FLAT: Final = {"Tanh": 4.0, "Sigmoid": 8.0}

Ranges = dict[str, tuple[float, float]]


def prepared(model: onnx.ModelProto) -> onnx.ModelProto:
    """The float graph that `quantise_static` starts from; ``exclude`` may name its nodes."""
    model = with_folded_norms(preprocessed(at_opset(tidied(model))))
    return with_own_weights(with_plain_gemms(tidied(model)))


def quantise_static(
    model: onnx.ModelProto,
    feeds: Iterable[Mapping[str, np.ndarray]],
    *,
    observer: str = "percentile-99.99",
    per_channel: bool = True,
    symmetric: bool = False,
    exclude: Sequence[str] = (),
    op_types: Sequence[str] | None = None,
    products: bool = False,
) -> tuple[onnx.ModelProto, Ranges]:
    """Quantise the products of a float graph, activations by observed ranges.

    Parameters
    ----------
    model : ModelProto
        A float step or window model.
    feeds : iterable of mapping of str to ndarray
        Calibration inputs, one model call each, taken one after the other: memory does not grow
        with their number. A model with state needs the state of each step too
        (`models.foreign.step_model.window_feeds`).
    observer : str
        Kind of `models.observers.make_observer`.
    per_channel : bool
        A weight scale for each output channel, else one a tensor.
    symmetric : bool
        Ranges symmetric about 0, except behind a Relu that became saturation.
    exclude : sequence of str
        Nodes that stay in floating point, by their names in ``model`` or in `prepared`.
    op_types : sequence of str, optional
        Some of Conv, Gemm and MatMul; all of them by default. "LSTM" beside them makes LSTM nodes
        DynamicQuantizeLSTM: int8 weights, ranges of each call.
    products : bool
        Also MatMul of two activations (attention), which stays in floating point otherwise.

    Returns
    -------
    model : ModelProto
        QDQ, the same inputs and outputs.
    ranges : dict of str to (float, float)
        What was handed to the quantiser, by tensor of the `prepared` graph.

    Raises
    ------
    InputError
        For no calibration data, constant data, NaN or infinity, an unknown node in ``exclude``,
        and graphs with nothing to quantise.
    """
    kinds = _checked_kinds(op_types)
    start = prepared(model)
    check_node_names(model, exclude, start)
    chosen = _chosen(start, kinds, exclude, products)
    if not chosen:
        raise InputError(
            "nothing to quantise in this graph",
            where=model.graph.name or "model",
            expected=f"a node of {', '.join(kinds)} with a constant weight that is not excluded",
            found=", ".join(sorted({node.op_type for node in start.graph.node})),
            fix="serve it in fp32",
        )
    relus = _saturating_relus(start, chosen)
    ranges = _observed(start, chosen, relus, feeds, observer, symmetric)
    quantised = write_qdq(start, [*chosen, *relus.values()], ranges, per_channel)
    quantised = without_needless_pairs(quantised, {node.name for node in chosen}, relus)
    quantised = with_float_kept(quantised, {node.name for node in chosen})
    if "LSTM" in kinds:
        quantised = dynamic(quantised, ("LSTM",), signed=True, exclude=exclude)
    quantised = with_metadata_of(tidied(quantised), model)
    onnx.checker.check_model(quantised, full_check=True)
    return quantised, ranges


def _checked_kinds(op_types: Sequence[str] | None) -> tuple[str, ...]:
    kinds = MACS if op_types is None else tuple(op_types)
    for kind in kinds:
        if kind not in (*MACS, "LSTM"):
            raise InputError(
                "an operator that is not quantised",
                where="op_types",
                expected="some of " + ", ".join((*MACS, "LSTM")),
                found=kind,
                fix="leave it out: it stays in floating point",
            )
    return kinds


def _chosen(
    model: onnx.ModelProto, kinds: Sequence[str], exclude: Sequence[str], products: bool
) -> list[onnx.NodeProto]:
    """Products to quantise: those of a constant weight, and on request those of activations."""
    wires = Wiring(model)
    chosen = []
    for node in model.graph.node:
        # A MatMul and an Add that became one Gemm are named "MatMul's name/MatMulAddFusion".
        kept = any(node.name == name or node.name.startswith(f"{name}/") for name in exclude)
        if node.op_type not in kinds or node.op_type not in MACS or kept:
            continue
        if node.input[0] in wires.constants:
            continue
        weighted = node.input[1] in wires.constants
        if node.op_type != "MatMul":
            weighted = weighted and all(name in wires.constants for name in node.input[2:] if name)
            plain = attribute(node, "alpha", 1.0) == 1.0 == attribute(node, "beta", 1.0)
            weighted = weighted and plain
        if weighted or (products and node.op_type == "MatMul"):
            chosen.append(node)
    return chosen


def _saturating_relus(
    model: onnx.ModelProto, chosen: Sequence[onnx.NodeProto]
) -> dict[str, onnx.NodeProto]:
    """Relus that saturation at zero point 0 replaces, by their output."""
    wires = Wiring(model)
    found = {}
    for node in chosen:
        takers = wires.takers[node.output[0]]
        alone = len(takers) == 1 and node.output[0] not in wires.results
        if alone and takers[0].op_type == "Relu" and takers[0].output[0] not in wires.results:
            found[takers[0].output[0]] = takers[0]
    return found


def _observed(
    model: onnx.ModelProto,
    chosen: Sequence[onnx.NodeProto],
    relus: Mapping[str, onnx.NodeProto],
    feeds: Iterable[Mapping[str, np.ndarray]],
    kind: str,
    symmetric: bool,
) -> Ranges:
    """Run the float graph over the feeds and observe what goes into and comes out of products."""
    wires = Wiring(model)
    where: dict[str, str] = {}
    for node in [*chosen, *relus.values()]:
        for name in (*node.input[:2], *node.output):
            if name not in wires.constants:
                where.setdefault(name, f"tensor {name} at node {node.name}")
    observers = {
        name: make_observer(kind, at, symmetric=symmetric and name not in relus)
        for name, at in where.items()
    }
    inputs = {value.name: shape_of(value) for value in model.graph.input}
    computed = [name for name in where if name not in inputs]
    session = opened(_with_outputs(model, computed))
    spans: dict[str, tuple[float, float]] = {}
    count = 0
    for count, feed in enumerate(feeds, start=1):
        _check_feed(inputs, feed, count, spans)
        values = session.run(computed, dict(feed)) if computed else []
        for name, array in zip(computed, values, strict=True):
            observers[name].update(array)
        for name in where.keys() & feed.keys():
            observers[name].update(feed[name])
    _check_spans(spans, count)
    ranges = {
        name: _limited(*observer.range(), wires, name, symmetric, relus)
        for name, observer in observers.items()
    }
    # Saturation and rounding commute with movement of data. With one range before and behind it
    # they happen once, and the movement is of integers.
    for name in [*(node.output[0] for node in chosen), *relus]:
        behind, _ = carried_to(wires, name)
        if behind != name and behind in ranges:
            low, high = ranges[behind]
            ranges[name] = ranges[behind] = (0.0 if name in relus else low, high)
    return ranges


def _with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """The model with further tensors as outputs."""
    watched = copy_of(model)
    present = {value.name for value in model.graph.output}
    for name in names:
        if name not in present:
            value = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            watched.graph.output.append(value)
    return watched


def _limited(
    low: float,
    high: float,
    wires: Wiring,
    name: str,
    symmetric: bool,
    relus: Mapping[str, onnx.NodeProto],
) -> tuple[float, float]:
    """A range as it is quantised: what is cut off must make no difference behind it."""
    if name in relus:
        # It begins at 0, so that the zero point does, and saturation is the Relu.
        return 0.0, high
    takers = {node.op_type for node in wires.takers[name]}
    if name not in wires.results and takers and takers <= _FLAT.keys():
        end = max(_FLAT[op] for op in takers)
        low, high = max(low, -end), min(high, end)
    reach = max(-low, high)
    return (-reach, reach) if symmetric else (low, high)


def _check_spans(spans: Mapping[str, tuple[float, float]], count: int) -> None:
    """There were data, and no float input was the same throughout."""
    if not count:
        raise InputError(
            "no calibration data",
            where="feeds",
            expected="at least one model call",
            found="none",
            fix="take a longer stretch of the tape",
        )
    for name, (low, high) in spans.items():
        if low == high:
            raise InputError(
                "constant calibration data: they say nothing about the range of an activation",
                where=f"input {name}, {count} calls",
                expected="values that vary as they do when served",
                found=f"{low} everywhere",
                fix="calibrate on recorded rows, a model with state on its own state",
            )


def _check_feed(
    inputs: Mapping[str, tuple[int, ...]],
    feed: Mapping[str, np.ndarray],
    number: int,
    spans: dict[str, tuple[float, float]],
) -> None:
    """One model call has every input, and floats in it are numbers; notes their span."""
    where = f"calibration call {number}"
    if set(feed) != set(inputs):
        raise InputError(
            "wrong inputs",
            where=where,
            expected=", ".join(inputs),
            found=", ".join(feed) or "none",
            fix="name the arrays as the model names its inputs",
        )
    for name, array in feed.items():
        shape = inputs[name]
        fits = len(shape) == array.ndim and array.size > 0
        if not fits or any(a not in (0, b) for a, b in zip(shape, array.shape, strict=True)):
            raise InputError(
                "calibration data of another shape",
                where=f"{where}, input {name}",
                expected=str(list(shape)),
                found=str(list(array.shape)),
                fix="pass what the model takes in one call",
            )
        if array.dtype.kind != "f":
            continue
        if not np.isfinite(array).all():
            raise InputError(
                "calibration data that are no numbers",
                where=f"{where}, input {name}",
                expected="finite values",
                found="NaN or infinity",
                fix="take these rows out",
            )
        low, high = spans.get(name, (math.inf, -math.inf))
        spans[name] = (min(low, float(array.min())), max(high, float(array.max())))
