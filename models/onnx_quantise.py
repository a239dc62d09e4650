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

import difflib
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from engine.backends.onnx import WARM_UP_RUNS, session_options
from feeds.errors import InputError
from models.observers import make_observer
from models.onnx_passes import (
    MACS,
    Wiring,
    at_opset,
    attribute,
    copy_of,
    preprocessed,
    quiet,
    replace_nodes,
    tidied,
    with_folded_norms,
    with_own_weights,
    with_plain_gemms,
    without_unused,
)

INT4_OPSET: Final = 21
BLOCK_SIZES: Final = (16, 32, 64, 128, 256)
FLOAT16_MAX: Final = 65_504.0
# What ONNX Runtime moves a QuantizeLinear through, back to the product before it.
_CARRIERS: Final = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "MaxPool", "Slice")
INT8_OPS: Final = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QGemm",
        "QLinearAdd",
        "QLinearConcat",
        "QLinearConv",
        "QLinearLeakyRelu",
        "QLinearMatMul",
        "QLinearMul",
        "QLinearSigmoid",
        "QLinearSoftmax",
    }
)

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
        (`models.foreign.window_feeds`).
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
    _check_names(model, exclude)
    start = prepared(model)
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
    ranges = _observe(start, chosen, relus, feeds, observer)
    for name, (low, high) in ranges.items():
        if symmetric and name not in relus:
            reach = max(-low, high)
            ranges[name] = (-reach, reach)
    quantised = _write_qdq(start, [*chosen, *relus.values()], ranges, per_channel)
    quantised = _without_needless_pairs(quantised, {node.name for node in chosen})
    if "LSTM" in kinds:
        quantised = _with_dynamic_lstm(quantised, exclude)
    quantised = tidied(quantised)
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


def _check_names(model: onnx.ModelProto, names: Sequence[str]) -> None:
    """Each of these names is a node of the model."""
    known = {node.name for node in tidied(model).graph.node}
    for name in names:
        if name not in known and name not in {node.name for node in prepared(model).graph.node}:
            nearest = difflib.get_close_matches(name, known, n=1)
            raise InputError(
                "no such node",
                where=model.graph.name or "model",
                expected="the name of a node: " + ", ".join(sorted(known)[:20]),
                found=name,
                fix=f"did you mean {nearest[0]}?" if nearest else "",
            )


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


def _carried_to(wires: Wiring, name: str) -> tuple[str, list[onnx.NodeProto]]:
    """Where a tensor arrives through nodes that only move it, and who takes it there."""
    while len(wires.takers[name]) == 1 and name not in wires.results:
        taker = wires.takers[name][0]
        if taker.op_type not in _CARRIERS or taker.input[0] != name:
            break
        name = taker.output[0]
    return name, wires.takers[name]


def _saturating_relus(
    model: onnx.ModelProto, chosen: Sequence[onnx.NodeProto]
) -> dict[str, onnx.NodeProto]:
    """Relus that saturation at zero point 0 replaces, by their output."""
    wires = Wiring(model)
    names = {node.name for node in chosen}
    found = {}
    for node in chosen:
        takers = wires.takers[node.output[0]]
        if len(takers) != 1 or takers[0].op_type != "Relu" or node.output[0] in wires.results:
            continue
        behind, after = _carried_to(wires, takers[0].output[0])
        wanted = any(taker.name in names and behind in taker.input for taker in after)
        # A Conv is fused only where its output is quantised; another product may leave in float.
        if wanted or node.op_type == "Conv":
            found[takers[0].output[0]] = takers[0]
    return found


def _observe(
    model: onnx.ModelProto,
    chosen: Sequence[onnx.NodeProto],
    relus: Mapping[str, onnx.NodeProto],
    feeds: Iterable[Mapping[str, np.ndarray]],
    kind: str,
) -> Ranges:
    """Run the float graph over the feeds and observe what goes into and comes out of products."""
    wires = Wiring(model)
    names: dict[str, str] = {}
    for node in [*chosen, *relus.values()]:
        for name in (*node.input[:2], *node.output):
            if name not in wires.constants:
                names.setdefault(name, node.name)
    inputs = {value.name: value for value in model.graph.input}
    watched = copy_of(model)
    present = set(inputs) | wires.results
    for name in names:
        if name not in present:
            watched.graph.output.append(
                helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            )
    session = ort.InferenceSession(
        watched.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"]
    )
    computed = [name for name in names if name not in inputs]
    observers = {name: make_observer(kind, name) for name in names}
    spans: dict[str, tuple[float, float]] = {}
    count = 0
    for count, feed in enumerate(feeds, start=1):
        _check_feed(inputs, feed, count, spans)
        answers = session.run(computed, dict(feed)) if computed else []
        values = dict(zip(computed, answers, strict=True)) | {
            n: feed[n] for n in inputs if n in names
        }
        for name, array in values.items():
            if not np.isfinite(array).all():
                raise InputError(
                    "the float model makes NaN or infinity of the calibration data",
                    where=f"call {count}, tensor {name} at node {names[name]}",
                    expected="finite activations",
                    fix="repair the model, or take what leads there out of the data",
                )
            observers[name].update(array)
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
                "constant calibration data: it says nothing about the range of an activation",
                where=f"input {name}, {count} calls",
                expected="values that vary as they do when served",
                found=f"{low} everywhere",
                fix="calibrate on recorded rows, a model with state on its own state",
            )
    ranges = {}
    for name in names:
        low, high = observers[name].range()
        # What a Relu leaves begins at 0, so that the zero point does, and saturation is the Relu.
        ranges[name] = (0.0 if name in relus else min(float(low), 0.0), max(float(high), 0.0))
    return ranges


def _check_feed(
    inputs: Mapping[str, Any],
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
        if array.dtype.kind != "f":
            continue
        if array.size == 0 or not np.isfinite(array).all():
            raise InputError(
                "calibration data that are no numbers",
                where=f"{where}, input {name}",
                expected="finite values",
                found="an empty array" if array.size == 0 else "NaN or infinity",
                fix="take these rows out",
            )
        low, high = spans.get(name, (math.inf, -math.inf))
        spans[name] = (min(low, float(array.min())), max(high, float(array.max())))


def _write_qdq(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    ranges: Ranges,
    per_channel: bool,
) -> onnx.ModelProto:
    """ONNX Runtime's QDQ quantiser on these nodes and ranges."""
    with quiet():
        from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType
        from onnxruntime.quantization.calibrate import TensorsData

        spans = {
            name: (np.array(low, dtype=np.float32), np.array(high, dtype=np.float32))
            for name, (low, high) in ranges.items()
        }
        quantizer = QDQQuantizer(
            onnx.shape_inference.infer_shapes(copy_of(model)),
            per_channel,
            False,  # weights keep all 8 bits: the sessions ask for sums that cannot saturate
            QuantType.QInt8,
            QuantType.QUInt8,
            TensorsData(CalibrationMethod.MinMax, spans),
            [node.name for node in nodes],
            [],
            sorted({node.op_type for node in nodes}),
            {"WeightSymmetric": True, "ActivationSymmetric": False},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        return quantizer.model.model


def _without_needless_pairs(model: onnx.ModelProto, chosen: set[str]) -> onnx.ModelProto:
    """Take out the pairs behind products that cost precision and win no fusion.

    A Gemm or MatMul may leave in float32. Where a pair behind movement of data follows anyway, ONNX
    Runtime moves that one back, so that the product's own would only round twice.
    """
    model = copy_of(model)
    wires = Wiring(model)
    renamed: dict[str, str] = {}
    needless: set[str] = set()
    for node in model.graph.node:
        made = node.output[0]
        takers = wires.takers[made]
        if node.name not in chosen or [taker.op_type for taker in takers] != ["QuantizeLinear"]:
            continue
        (back,) = wires.takers[takers[0].output[0]]
        real = back.output[0]
        behind, after = _carried_to(wires, real)
        again = behind != real and [taker.op_type for taker in after] == ["QuantizeLinear"]
        taken = behind == real and any(taker.name in chosen for taker in after)
        if not again and (taken or node.op_type == "Conv"):
            continue
        needless |= {takers[0].name, back.name}
        if real in wires.results:
            node.output[0] = real
        else:
            renamed[real] = made
    kept = [node for node in model.graph.node if node.name not in needless]
    for node in kept:
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)
    replace_nodes(model, kept)
    return without_unused(model)


def _with_dynamic_lstm(model: onnx.ModelProto, exclude: Sequence[str]) -> onnx.ModelProto:
    return _dynamic(model, ("LSTM",), exclude, signed=True)


def _dynamic(
    model: onnx.ModelProto, kinds: Sequence[str], exclude: Sequence[str], *, signed: bool
) -> onnx.ModelProto:
    """ONNX Runtime's dynamic quantiser on nodes of these kinds."""
    with quiet(), tempfile.TemporaryDirectory() as folder:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        path = Path(folder) / "dynamic.onnx"
        quantize_dynamic(
            copy_of(model),
            path,
            op_types_to_quantize=list(kinds),
            per_channel=True,
            weight_type=QuantType.QInt8 if signed else QuantType.QUInt8,
            nodes_to_exclude=list(exclude),
        )
        return onnx.load(path)


def fused_nodes(model: onnx.ModelProto) -> dict[str, int]:
    """How many nodes of each operator ONNX Runtime runs, as a serving session optimises them."""
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(1)
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        optimised = onnx.load(options.optimized_model_filepath)
    return dict(sorted(Counter(node.op_type for node in optimised.graph.node).items()))


def int8_nodes(model: onnx.ModelProto) -> int:
    """How many of them compute on integers of 8 or 4 bits."""
    return sum(count for op, count in fused_nodes(model).items() if op in INT8_OPS)


def latency(
    model: onnx.ModelProto, feeds: Mapping[str, np.ndarray], runs: int
) -> tuple[float, float]:
    """Median and 99th percentile of one bound inference, in microseconds, after warm-up."""
    session = ort.InferenceSession(
        model.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    arrays = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    for name, value in arrays.items():
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu")
    times = np.empty(runs, dtype=np.int64)
    for number in range(-WARM_UP_RUNS, runs):
        before = time.perf_counter_ns()
        session.run_with_iobinding(binding)
        times[max(number, 0)] = time.perf_counter_ns() - before
    p50, p99 = np.percentile(times, (50, 99)) / 1e3
    return float(p50), float(p99)
