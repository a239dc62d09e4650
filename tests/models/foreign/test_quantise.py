"""Quantising any graph: what is fused, what stays in float, and what data are refused."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from feeds.errors import InputError
from models.foreign.check import load_onnx
from models.foreign.folding import with_folded_norms
from models.foreign.passes import at_opset, opset_of, with_matmuls
from models.foreign.quantise import prepared, quantise_static
from models.foreign.runtime import fused_nodes, int8_nodes, latency
from models.foreign.weights import quantise_dynamic, quantise_int4, weights_to_fp16

FLOAT = TensorProto.FLOAT
node = helper.make_node
RNG = np.random.default_rng(11)


def random(*shape: int, gain: float = 1.0) -> np.ndarray:
    return (RNG.normal(size=shape) * gain).astype(np.float32)


def graph_of(
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    shape: tuple[int, ...],
    out: tuple[int, ...] = (1, 3),
    opset: int = 18,
) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    return helper.make_model(
        helper.make_graph(
            nodes,
            "theirs",
            [value("x", FLOAT, shape)],
            [value("logits", FLOAT, out)],
            [numpy_helper.from_array(array, name) for name, array in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=10,
    )


def dense(sizes: tuple[int, ...] = (40, 64, 32, 3), act: str = "Relu", **more: Any) -> Any:
    """Gemm with transB and an activation, again and again."""
    nodes, constants, last = [], {}, "x"
    for i, (a, b) in enumerate(pairwise(sizes)):
        constants[f"w{i}"] = random(b, a, gain=1.4 / a**0.5)
        constants[f"b{i}"] = random(b, gain=0.1)
        end = i == len(sizes) - 2
        out = "logits" if end else f"sum{i}"
        nodes.append(node("Gemm", [last, f"w{i}", f"b{i}"], [out], name=f"fc{i}", transB=1))
        if not end:
            nodes.append(node(act, [out], [last := f"act{i}"], name=f"act{i}"))
    return graph_of(nodes, constants, (1, sizes[0]), **more)


def conv(groups: int = 1, pads: tuple[int, ...] = (0, 0, 0, 0)) -> onnx.ModelProto:
    """Conv, LeakyRelu, BatchNormalization, Conv, Relu, MaxPool, Gemm: DeepLOB's order."""
    rows = 9 + pads[0] + pads[2] - 2
    return graph_of(
        [
            node("Conv", ["x", "w0", "b0"], ["sum0"], name="conv0", strides=[1, 2]),
            node("LeakyRelu", ["sum0"], ["act0"], alpha=0.01),
            node("BatchNormalization", ["act0", "gain", "shift", "mean", "var"], ["norm0"], "norm"),
            node("Conv", ["norm0", "w1"], ["sum1"], name="conv1", group=groups, pads=pads),
            node("Relu", ["sum1"], ["act1"]),
            node("MaxPool", ["act1"], ["pool"], kernel_shape=[2, 1]),
            node("Flatten", ["pool"], ["flat"]),
            node("Gemm", ["flat", "w2", "b2"], ["logits"], name="head", transB=1),
        ],
        {
            "w0": random(8, 1, 1, 2),
            "b0": random(8),
            "gain": random(8),
            "shift": random(8),
            "mean": random(8, gain=0.3),
            "var": random(8) ** 2 + np.float32(0.5),
            "w1": random(8, 8 // groups, 3, 1, gain=0.3),
            "w2": random(3, 8 * (rows - 1) * 5, gain=0.1),
            "b2": random(3),
        },
        (1, 1, 9, 10),
    )


def calls(model: onnx.ModelProto, count: int = 200, seed: int = 0) -> Iterator[dict[str, Any]]:
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield {"x": rng.normal(size=shape).astype(np.float32)}


def run(model: onnx.ModelProto, feeds: Any) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.concatenate([session.run(["logits"], feed)[0] for feed in feeds])


def agreement(model: onnx.ModelProto, twin: onnx.ModelProto) -> float:
    a, b = (run(each, calls(model, 500, seed=1)).argmax(axis=1) for each in (model, twin))
    return float((a == b).mean())


def operators(model: onnx.ModelProto) -> list[str]:
    return [each.op_type for each in model.graph.node]


# Static.


@pytest.mark.parametrize("model", [dense(), conv()], ids=["dense", "conv"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_every_product_becomes_one_integer_kernel(model: Any, per_channel: bool) -> None:
    int8, ranges = quantise_static(model, calls(model), per_channel=per_channel)
    products = sum(each.op_type in ("Conv", "Gemm", "MatMul") for each in model.graph.node)
    found = fused_nodes(int8)
    assert found.get("QGemm", 0) + found.get("QLinearConv", 0) == products
    assert not {"Conv", "Gemm", "MatMul", "Relu"} & set(found)
    assert int8_nodes(int8) >= products
    assert agreement(model, int8) > 0.95
    assert all(low <= 0.0 <= high for low, high in ranges.values())
    assert {"x", "logits"} <= set(ranges)
    assert 18 <= opset_of(int8) <= 20


def test_a_relu_behind_a_product_is_saturation_at_zero_point_zero() -> None:
    model = dense()
    int8, ranges = quantise_static(model, calls(model))
    assert "Relu" not in operators(int8)
    assert ranges["act0"][0] == 0.0
    constants = {t.name: numpy_helper.to_array(t) for t in int8.graph.initializer}
    points = [
        constants[each.input[2]] for each in int8.graph.node if each.op_type == "QuantizeLinear"
    ]
    assert all(point.dtype == np.uint8 for point in points)
    assert [int(point) for point in points].count(0) == 2


@pytest.mark.parametrize("symmetric", [False, True])
def test_movement_of_data_between_products_is_of_integers(symmetric: bool) -> None:
    model = conv()
    int8, ranges = quantise_static(model, calls(model), symmetric=symmetric)
    # One range before and behind the pooling, beginning at 0 where the Relu was.
    assert ranges["act1"] == ranges["flat"]
    assert ranges["act1"][0] == 0.0
    assert "DequantizeLinear" not in fused_nodes(int8)
    assert agreement(model, int8) > 0.95


def test_logits_leave_in_float() -> None:
    model = dense()
    int8, _ = quantise_static(model, calls(model))
    assert operators(int8)[-1] == "Gemm"
    assert len(np.unique(run(int8, calls(model, 300, seed=2)))) > 256 * 2


@pytest.mark.parametrize("act", ["Tanh", "LeakyRelu", "Softmax"])
def test_other_activations_stay_in_float(act: str) -> None:
    model = dense(act=act)
    int8, _ = quantise_static(model, calls(model))
    assert operators(int8).count(act) == 2
    assert agreement(model, int8) > 0.9


def test_a_range_that_only_a_tanh_takes_ends_where_it_is_flat() -> None:
    model = graph_of(
        [
            node("Conv", ["x", "w"], ["wide"], name="conv"),
            node("Tanh", ["wide"], ["bent"]),
            node("Flatten", ["bent"], ["flat"]),
            node("Gemm", ["flat", "h"], ["logits"], name="head"),
        ],
        {"w": random(4, 1, 1, 1, gain=50.0), "h": random(16, 3)},
        (1, 1, 2, 2),
    )
    _, ranges = quantise_static(model, calls(model), observer="minmax")
    assert ranges["wide"] == (-4.0, 4.0)


def test_symmetric_ranges_have_their_zero_in_the_middle() -> None:
    model = dense(act="Tanh")
    int8, ranges = quantise_static(model, calls(model), symmetric=True)
    assert all(low == -high for low, high in ranges.values())
    constants = {t.name: numpy_helper.to_array(t) for t in int8.graph.initializer}
    points = {
        int(constants[each.input[2]])
        for each in int8.graph.node
        if each.op_type == "QuantizeLinear"
    }
    assert points <= {127, 128}  # the middle of 0 … 255 is half a code away from either
    assert int8_nodes(int8) == 3


def test_weights_have_a_scale_for_each_output_channel_or_one() -> None:
    model = conv()
    for per_channel, sizes in ((True, {3, 8}), (False, {1})):
        int8, _ = quantise_static(model, calls(model), per_channel=per_channel)
        constants = {t.name: numpy_helper.to_array(t) for t in int8.graph.initializer}
        scales = {
            constants[each.input[1]].size
            for each in int8.graph.node
            if each.op_type == "DequantizeLinear"
            and each.input[0] in constants
            and constants[each.input[0]].dtype == np.int8
        }
        assert scales == sizes


def test_excluded_nodes_and_other_operators_stay_in_float() -> None:
    model = dense()
    int8, ranges = quantise_static(model, calls(model), exclude=["fc1"])
    found = fused_nodes(int8)
    assert (found["QGemm"], found.get("Gemm", 0) + found.get("FusedGemm", 0)) == (2, 1)
    assert "sum1" not in ranges
    assert agreement(model, int8) > 0.95
    mixed = conv()
    int8, _ = quantise_static(mixed, calls(mixed), op_types=["Conv"])
    assert fused_nodes(int8) | {"QLinearConv": 2, "Gemm": 1} == fused_nodes(int8)


def test_a_misspelt_node_or_operator_is_refused_with_the_nearest() -> None:
    model = dense()
    with pytest.raises(InputError, match=r"no such node.*found fc9.*did you mean fc"):
        quantise_static(model, calls(model), exclude=["fc9"])
    with pytest.raises(InputError, match=r"some of Conv, Gemm, MatMul, LSTM; found Relu"):
        quantise_static(model, calls(model), op_types=["Relu"])
    with pytest.raises(InputError, match="nothing to quantise"):
        quantise_static(model, calls(model), exclude=["fc0", "fc1", "fc2"])


def poisoned(number: float) -> list[dict[str, np.ndarray]]:
    feeds = list(calls(dense(), 5))
    feeds[3]["x"][0, 7] = number
    return feeds


@pytest.mark.parametrize(
    ("feeds", "said"),
    [
        ([], "no calibration data"),
        ([{"x": np.ones((1, 40), dtype=np.float32)}] * 9, r"constant calibration data.*1\.0"),
        (poisoned(np.nan), "calibration call 4, input x.*NaN or infinity"),
        (poisoned(np.inf), "calibration call 4, input x.*NaN or infinity"),
        ([{"y": np.ones((1, 40), dtype=np.float32)}], "wrong inputs; expected x; found y"),
        ([{"x": np.ones((0, 40), dtype=np.float32)}], r"expected \[1, 40\]; found \[0, 40\]"),
        ([{"x": np.ones((1, 41), dtype=np.float32)}], r"expected \[1, 40\]; found \[1, 41\]"),
    ],
    ids=["empty", "constant", "nan", "infinity", "names", "no rows", "width"],
)
def test_data_that_say_nothing_are_refused(feeds: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        quantise_static(dense(), feeds)


def test_a_model_that_makes_nan_of_its_data_is_named() -> None:
    model = graph_of(
        [
            node("Log", ["x"], ["logs"]),
            node("MatMul", ["logs", "w"], ["logits"], name="product"),
        ],
        {"w": random(4, 3)},
        (1, 4),
    )
    with pytest.raises(InputError, match="tensor logs at node product"):
        quantise_static(model, calls(model))


def test_memory_does_not_grow_with_the_calibration_data() -> None:
    model = dense()
    peaks = []
    for count in (200, 4_000):
        tracemalloc.start()
        quantise_static(model, calls(model, count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1_000_000


def test_products_may_share_a_weight() -> None:
    model = dense((16, 16, 16, 3))
    for each in model.graph.node[:4]:
        each.input[:] = [{"w1": "w0", "b1": "b0"}.get(name, name) for name in each.input]
    int8, _ = quantise_static(model, calls(model))
    assert fused_nodes(int8)["QGemm"] == 3
    assert agreement(model, int8) > 0.9


def attention() -> onnx.ModelProto:
    """One head over four rows, its output row by row."""
    names = ("q", "k", "v")
    return graph_of(
        [
            *(node("MatMul", ["x", f"w.{each}"], [each], name=each) for each in names),
            node("Transpose", ["k"], ["kt"], perm=[1, 0]),
            node("MatMul", ["q", "kt"], ["scores"], name="scores"),
            node("Softmax", ["scores"], ["shares"]),
            node("MatMul", ["shares", "v"], ["mixed"], name="mix"),
            node("MatMul", ["mixed", "w.o"], ["logits"], name="head"),
        ],
        {f"w.{each}": random(8, 8, gain=0.3) for each in names} | {"w.o": random(8, 3)},
        (4, 8),
        (4, 3),
    )


def test_products_of_activations_are_quantised_on_request() -> None:
    model = attention()
    int8, _ = quantise_static(model, calls(model))
    found = fused_nodes(int8)
    assert found["MatMul"] + found["FusedMatMul"] == 2  # the latter with the Transpose
    both, _ = quantise_static(model, calls(model), products=True)
    assert "MatMul" not in fused_nodes(both)
    assert agreement(model, both) > 0.9


def test_an_lstm_is_quantised_where_it_is_asked_for() -> None:
    units = 8
    model = graph_of(
        [
            node("LSTM", ["x", "w", "r", "b"], ["", "h"], name="lstm", hidden_size=units),
            node("Reshape", ["h", "flat"], ["last"]),
            node("Gemm", ["last", "wh"], ["logits"], name="head"),
        ],
        {
            "w": random(1, 4 * units, 6, gain=0.4),
            "r": random(1, 4 * units, units, gain=0.4),
            "b": random(1, 8 * units, gain=0.1),
            "flat": np.array([1, units]),
            "wh": random(units, 3),
        },
        (12, 1, 6),
    )
    int8, _ = quantise_static(model, calls(model))
    assert fused_nodes(int8)["LSTM"] == 1
    int8, _ = quantise_static(model, calls(model), op_types=["Gemm", "LSTM"])
    assert fused_nodes(int8)["DynamicQuantizeLSTM"] == 1
    assert agreement(model, int8) > 0.95
    int8, _ = quantise_static(model, calls(model), op_types=["Gemm", "LSTM"], exclude=["lstm"])
    assert fused_nodes(int8)["LSTM"] == 1


def test_the_same_model_and_data_give_the_same_bytes() -> None:
    model = conv()
    a, b = (quantise_static(model, calls(model))[0].SerializeToString() for _ in range(2))
    assert a == b


def test_a_newer_operator_set_is_brought_down() -> None:
    model = onnx.version_converter.convert_version(dense(), 22)
    int8, _ = quantise_static(model, calls(model))
    assert opset_of(int8) == 20
    assert fused_nodes(int8)["QGemm"] == 3


# What the graphs are put through before.


@pytest.mark.parametrize(
    ("groups", "pads", "left"),
    [(1, (0, 0, 0, 0), 0), (4, (0, 0, 0, 0), 0), (1, (1, 0, 1, 0), 1)],
    ids=["plain", "grouped", "padded"],
)
def test_normalisation_is_folded_where_nothing_is_padded(
    groups: int, pads: tuple[int, ...], left: int
) -> None:
    model = conv(groups, pads)
    folded = with_folded_norms(model)
    assert operators(folded).count("BatchNormalization") == left
    np.testing.assert_allclose(
        run(folded, calls(model)), run(model, calls(model)), rtol=1e-4, atol=1e-4
    )


def test_factors_of_a_gemm_go_into_its_constants() -> None:
    model = dense()
    for each in model.graph.node:
        if each.op_type == "Gemm":
            each.attribute.extend(
                [helper.make_attribute("alpha", 0.5), helper.make_attribute("beta", -2.0)]
            )
    assert fused_nodes(quantise_static(model, calls(model))[0])["QGemm"] == 3
    for made in (prepared(model), with_matmuls(model)):
        np.testing.assert_allclose(run(made, calls(model)), run(model, calls(model)), atol=1e-5)
    assert "Gemm" not in operators(with_matmuls(model))


def test_an_operator_that_the_set_does_not_have_is_refused() -> None:
    model = graph_of([node("RMSNormalization", ["x", "s"], ["logits"])], {}, (1, 3), opset=23)
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "s"))
    with pytest.raises(InputError, match="opset 23"):
        at_opset(model)


# Without data.


@pytest.mark.parametrize(
    "model", [dense(), conv(), attention()], ids=["dense", "conv", "attention"]
)
def test_dynamic_quantisation_needs_no_data(model: onnx.ModelProto) -> None:
    helper.set_model_props(model, {"kept": "yes"})
    twin = quantise_dynamic(model)
    found = fused_nodes(twin)
    weighted = sum(
        each.op_type in ("Conv", "Gemm", "MatMul")
        and each.input[1] in {t.name for t in model.graph.initializer}
        for each in model.graph.node
    )
    integer = ("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "ConvInteger")
    assert sum(found.get(op, 0) for op in integer) == weighted
    assert agreement(model, twin) > 0.95
    assert twin.metadata_props == model.metadata_props


def test_dynamic_weights_have_a_scale_for_each_channel() -> None:
    twin = quantise_dynamic(dense((40, 64, 3)))
    assert sorted(len(t.dims) and t.dims[0] for t in twin.graph.initializer if t.dims)[-1] == 64
    scales = [t for t in twin.graph.initializer if t.name.endswith("_scale")]
    assert sorted(numpy_helper.to_array(t).size for t in scales) == [3, 64]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block_size", [16, 32])
def test_four_bit_weights_stand_in_blocks(block_size: int, symmetric: bool) -> None:
    model = dense((96, 64, 3), act="Tanh")
    twin = quantise_int4(model, block_size=block_size, symmetric=symmetric)
    assert fused_nodes(twin)["MatMulNBits"] == 2
    assert int8_nodes(twin) == 2
    assert opset_of(twin) == 21
    assert twin.ByteSize() < 0.45 * model.ByteSize()
    assert agreement(model, twin) > 0.8


def test_what_four_bits_cannot_do_is_refused() -> None:
    with pytest.raises(InputError, match=r"block_size.*16, 32, 64, 128, 256; found 48"):
        quantise_int4(dense(), block_size=48)
    no_dense = graph_of([node("Relu", ["x"], ["logits"])], {}, (1, 3))
    for quantise in (quantise_int4, quantise_dynamic):
        with pytest.raises(InputError, match="nothing to quantise"):
            quantise(no_dense)


def test_half_precision_weights_are_half_as_large_and_compute_in_float32() -> None:
    model = dense((256, 64, 3))
    twin = weights_to_fp16(model, ["fc0"])
    assert model.ByteSize() - twin.ByteSize() > 0.95 * 2 * 256 * 64
    assert "Cast" not in fused_nodes(twin)
    np.testing.assert_allclose(run(twin, calls(model)), run(model, calls(model)), atol=2e-2)
    rounded = dense((256, 64, 3))
    for tensor in (rounded.graph.initializer, model.graph.initializer):
        for each in tensor:
            narrow = each.name in ("w0", "b0")
            array = numpy_helper.to_array(each)
            if narrow:
                array = array.astype(np.float16).astype(np.float32)
            each.CopyFrom(numpy_helper.from_array(array, each.name))
    np.testing.assert_array_equal(run(twin, calls(model)), run(model, calls(model)))


def test_half_precision_refuses_what_it_cannot_hold() -> None:
    model = dense()
    with pytest.raises(InputError, match=r"no such node.*did you mean fc0"):
        weights_to_fp16(model, ["fc00"])
    with pytest.raises(InputError, match=r"node act0 .*without float32 weights"):
        weights_to_fp16(model, ["act0"])
    large = numpy_helper.from_array(np.full((64, 40), 1e5, dtype=np.float32), "w0")
    model.graph.initializer[0].CopyFrom(large)
    with pytest.raises(InputError, match=r"node fc0, w0.*float16 cannot hold"):
        weights_to_fp16(model, ["fc0"])


def test_latency_is_a_median_and_a_tail() -> None:
    model = dense()
    p50, p99 = latency(model, next(calls(model)), 50)
    assert 0.0 < p50 <= p99
    with pytest.raises(InputError, match="nothing to time"):
        latency(model, next(calls(model)), 0)


# A file that others exported.


@pytest.fixture(scope="module")
def theirs(data_dir: Path) -> onnx.ModelProto:
    return load_onnx(data_dir / "models" / "deeplob_graph_untrained.onnx")


def theirs_calls(count: int) -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    for _ in range(count):
        yield {"lob_window": rng.normal(size=(1, 100, 40)).astype(np.float32)}


def test_a_foreign_file_goes_through_every_method(theirs: onnx.ModelProto) -> None:
    size, expected = theirs.ByteSize(), run(theirs, theirs_calls(30))
    int8, _ = quantise_static(theirs, theirs_calls(30))
    found = fused_nodes(int8)
    assert (found["QLinearConv"], found["QGemm"]) == (14, 1)
    whole, _ = quantise_static(
        theirs, theirs_calls(30), op_types=["Conv", "Gemm", "MatMul", "LSTM"]
    )
    assert whole.ByteSize() < 0.35 * size
    dynamic = quantise_dynamic(theirs)
    assert fused_nodes(dynamic)["ConvInteger"] == 14
    int4 = quantise_int4(theirs)
    assert fused_nodes(int4)["MatMulNBits"] == 1
    spread = np.abs(expected).max()
    for twin in (int8, whole, dynamic, int4):
        assert np.abs(run(twin, theirs_calls(30)) - expected).max() < 0.2 * spread
