"""The reference interpreter: ONNX Runtime's bits, fused and unfused, and refusals by node name."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from engine.backends.integer_reference import BATCH_ROWS, IntegerReference
from engine.manifest import StateTensor
from feeds.errors import InputError
from tests.engine.integer_graphs import (
    CLASSES,
    FEATURES,
    GRAPHS,
    X_EXPONENT,
    X_ZERO,
    GraphBuilder,
    delays_and_cells,
    dense,
    inputs,
    run_session,
    session,
)

SEEDS = range(4)


def whole_steps(g: GraphBuilder, exponent: int = 0) -> str:
    """The quantised input in whole steps of ``2**exponent``: float32 (1, FEATURES)."""
    return g.dequantise(g.quantise("x", X_EXPONENT, X_ZERO), exponent, X_ZERO, "steps")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", GRAPHS)
def test_fused_unfused_and_reference_give_the_same_bits(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    g = GRAPHS[name](rng)
    model, x = g.model(), inputs(rng, 160)
    fused, fused_states = run_session(session(model), g.state, x)
    plain, plain_states = run_session(session(model, fused=False), g.state, x)
    reference = IntegerReference(model, g.state)
    assert fused.tobytes() == plain.tobytes() == reference.run(x).tobytes()
    state = reference.fresh_state()
    for row, a, b in zip(x, fused_states, plain_states, strict=True):
        outputs, state = reference.step(row, state)
        assert list(outputs) == ["logits"]
        assert a.keys() == b.keys() == state.keys()
        for tensor, found in state.items():
            assert found.dtype == a[tensor].dtype
            assert (a[tensor] == found).all()
            assert (b[tensor] == found).all()


@pytest.mark.parametrize("name", GRAPHS)
def test_every_tensor_is_that_of_the_graph_as_written(name: str) -> None:
    rng = np.random.default_rng(11)
    g = GRAPHS[name](rng)
    model = onnx.load_model_from_string(g.model())
    made = [out for node in model.graph.node for out in node.output]
    known = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=out) for out in made if out not in known)
    plain = session(model.SerializeToString(), fused=False)
    reference = IntegerReference(g.model(), g.state)
    state = reference.fresh_state()
    for row in inputs(rng, 40):
        found = reference.tensors(row, state)
        expected = plain.run(made, {"x": row[None], **state})
        assert set(made) <= found.keys()
        for out, array in zip(made, expected, strict=True):
            assert found[out].dtype == array.dtype, out
            assert found[out].shape == array.shape, out
            assert (found[out] == array).all(), out
        _, state = reference.step(row, state)


def test_the_inputs_make_ties_and_fill_the_cells() -> None:
    rng = np.random.default_rng(3)
    g = delays_and_cells(rng)
    reference = IntegerReference(g.model(), g.state)
    state, ties, full = reference.fresh_state(), 0, 0
    for row in inputs(rng, 160):
        found = reference.tensors(row, state)
        ties += int((found["cell.sum"] % 1.0 == 0.5).sum())
        full += int((np.abs(found["cell.next"]) == 2047.0).sum())
        _, state = reference.step(row, state)
    assert ties > 0
    assert full > 0


def test_rows_together_are_rows_one_by_one() -> None:
    rng = np.random.default_rng(5)
    reference = IntegerReference(dense(rng).model())
    x = inputs(rng, BATCH_ROWS + 100)
    whole = reference.run(x)
    assert whole.shape == (len(x), CLASSES)
    assert whole.dtype == np.float32
    for i in (0, 1, 2, 3, BATCH_ROWS - 1, BATCH_ROWS, len(x) - 1):
        outputs, state = reference.step(x[i])
        assert outputs["logits"].tobytes() == whole[i].tobytes()
        assert state == {}
    assert reference.run(x[:0]).shape == (0, CLASSES)


def test_a_file_and_its_bytes_are_the_same_model(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    model, x = dense(rng).model(), inputs(rng, 5)
    (tmp_path / "model.onnx").write_bytes(model)
    for path in (tmp_path / "model.onnx", str(tmp_path / "model.onnx")):
        assert IntegerReference(path).run(x).tobytes() == IntegerReference(model).run(x).tobytes()


OPERATIONS: dict[str, Callable[[GraphBuilder, str], str]] = {
    "relu": lambda g, x: g.node("Relu", [x]),
    "clip between": lambda g, x: g.node("Clip", [x, g.constant(-20.5), g.constant(63.25)]),
    "clip from above": lambda g, x: g.node("Clip", [x, "", g.constant(3.0)]),
    "greatest of three": lambda g, x: g.node(
        "Max", [x, g.constant(np.full((2, 1), 5.5)), g.constant(-3.0)]
    ),
    "round": lambda g, x: g.node("Round", [g.node("Mul", [x, g.constant(0.25)])]),
    "sum over all": lambda g, x: g.node("ReduceSum", [x], keepdims=0),
    "sum over nothing": lambda g, x: g.node("ReduceSum", [x], noop_with_empty_axes=1),
    "sum of channels in different units": lambda g, x: g.node(
        "ReduceSum", [g.node("Mul", [x, g.constant(2.0 ** -(np.arange(FEATURES) % 5))])]
    ),
    "greatest over all": lambda g, x: g.node("ReduceMax", [x], keepdims=0),
    "greatest of integers": lambda g, x: g.node(
        "ReduceMax",
        [g.node("Cast", [x], to=TensorProto.INT32), g.constant([1], np.int64)],
        keepdims=0,
    ),
    "integer arithmetic": lambda g, x: g.node(
        "Sub",
        [
            g.node("Mul", [g.node("Cast", [x], to=6), g.constant([[7], [-9]], np.int32)]),
            g.constant(np.arange(FEATURES), np.int32),
        ],
    ),
    "back to float32": lambda g, x: g.node(
        "Cast", [g.node("Cast", [x], to=TensorProto.INT64)], to=TensorProto.FLOAT
    ),
    "root": lambda g, x: g.node("Sqrt", [g.node("Mul", [x, x])]),
    "root of odd numbers": lambda g, x: g.node(
        "Sqrt", [g.node("Add", [g.node("Mul", [x, x]), g.constant(0.375)])]
    ),
    "quotient": lambda g, x: g.node("Div", [x, g.constant(np.arange(1, 25) * 3.0)]),
    "quotient of quotients": lambda g, x: g.node(
        "Div", [x, g.node("Div", [g.constant(1.0), g.constant(np.arange(1, 25) * 7.0)])]
    ),
    "part of equal parts": lambda g, x: g.split(x, [10, 4, 10])[1],
    "second axis": lambda g, x: g.node("Gather", [x, g.constant([3, -1, 0], np.int64)], axis=1),
    "flattened": lambda g, x: g.node(
        "Flatten", [g.node("Reshape", [x, g.constant([2, 3, 4], np.int64)])], axis=2
    ),
    "copied size": lambda g, x: g.node("Reshape", [x, g.constant([0, 4, -1], np.int64)]),
    "squeezed": lambda g, x: g.node("Squeeze", [x, g.constant([0], np.int64)]),
    "itself": lambda g, x: g.node("Identity", [x]),
    "constants from nodes": lambda g, x: g.node(
        "Add",
        [
            g.node("Mul", [x, g.node("Constant", [], value_float=0.5)]),
            g.node("Constant", [], value=g_tensor(np.arange(FEATURES, dtype=np.float32))),
        ],
    ),
    "batched product": lambda g, x: g.node(
        "MatMul",
        [
            g.node("Reshape", [x, g.constant([2, 3, 4], np.int64)]),
            g.constant(np.arange(40).reshape(1, 4, 10) / 8.0),
        ],
    ),
    "product with weights": lambda g, x: g.node("MatMul", [x, weights(g)]),
}


def g_tensor(values: np.ndarray) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(values)


def weights(g: GraphBuilder) -> str:
    """int8 weights (FEATURES, 5), one scale a column."""
    values = np.arange(FEATURES * 5).reshape(FEATURES, 5) - 60
    inputs = [
        g.constant(values, np.int8),
        g.constant(2.0 ** -np.arange(5)),
        g.constant(np.zeros(5), np.int8),
    ]
    return g.node("DequantizeLinear", inputs, axis=1)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_that_of_the_runtime(name: str) -> None:
    g = GraphBuilder()
    out = OPERATIONS[name](g, whole_steps(g, -1 if name == "clip between" else 0))
    model = g.with_output(out)
    reference = IntegerReference(model)
    runs = [session(model, fused=fused) for fused in (True, False)]
    for row in inputs(np.random.default_rng(1), 60):
        outputs, _ = reference.step(row)
        for run in runs:
            (expected,) = run.run([out], {"x": row[None]})
            assert outputs[out].dtype == expected.dtype
            assert outputs[out].shape == expected.shape
            assert (outputs[out] == expected).all()


def test_root_and_quotient_are_rounded_once_and_correctly() -> None:
    g = GraphBuilder()
    steps = whole_steps(g)
    model = g.with_output(
        g.node("Div", [steps, g.node("Sqrt", [g.constant(np.arange(2.0, 26.0))])])
    )
    (found,) = IntegerReference(model).step(np.full(FEATURES, 3.0))[0].values()
    for k, value in enumerate(found.ravel(), start=2):
        root = float(np.float32(math.sqrt(k)))
        # 53 bits are more than twice 24 and two: rounding twice is rounding once.
        assert value == np.float32(96.0 / root)


REFUSED: list[tuple[str, str, Callable[[GraphBuilder, str], str]]] = [
    ("sigmoid", "does not know", lambda g, x: g.node("Sigmoid", [x], "sigmoid")),
    (
        "odd.scale",
        "no power of two",
        lambda g, x: g.node(
            "QuantizeLinear", [x, g.constant(0.75), g.constant(0, np.uint8)], "odd.scale"
        ),
    ),
    (
        "odd.weight",
        "no power of two",
        lambda g, x: g.node(
            "MatMul",
            [
                x,
                g.node(
                    "DequantizeLinear",
                    [
                        g.constant(np.ones((FEATURES, 2)), np.int8),
                        g.constant([0.5, 0.3]),
                        g.constant([0, 0], np.int8),
                    ],
                    "odd.weight",
                    axis=1,
                ),
            ],
        ),
    ),
    (
        "to.int8",
        "only uint8 per tensor",
        lambda g, x: g.node(
            "QuantizeLinear", [x, g.constant(0.5), g.constant(0, np.int8)], "to.int8"
        ),
    ),
    (
        "scaled.gemm",
        "another Gemm",
        lambda g, x: g.node(
            "Gemm", [x, g.constant(np.ones((2, FEATURES)))], "scaled.gemm", transB=1, alpha=2.0
        ),
    ),
    (
        "straight.gemm",
        "another Gemm",
        lambda g, x: g.node("Gemm", [x, g.constant(np.ones((FEATURES, 2)))], "straight.gemm"),
    ),
    (
        "wide.sum",
        "not exact",
        lambda g, x: g.node("Add", [x, g.constant(2.0**24)], "wide.sum"),
    ),
    (
        "wide.product",
        "not exact",
        lambda g, x: g.node("Mul", [x, g.constant(2.0**20 + 1)], "wide.product"),
    ),
    (
        "many.terms",
        "not exact",
        lambda g, x: g.node(
            "MatMul",
            [x, g.constant(np.resize([[30011.0], [-30011.0]], (FEATURES, 1)))],
            "many.terms",
        ),
    ),
    (
        "long.sum",
        "not exact",
        lambda g, x: g.node("ReduceSum", [g.node("Mul", [x, g.constant(2.0**17 - 1)])], "long.sum"),
    ),
    ("by.zero", "division by zero", lambda g, x: g.node("Div", [x, g.constant(0.0)], "by.zero")),
    (
        "of.negative",
        "negative",
        lambda g, x: g.node("Sqrt", [g.node("Sub", [x, g.constant(1000.0)])], "of.negative"),
    ),
    (
        "cut.off",
        "fractions",
        lambda g, x: g.node("Cast", [g.node("Mul", [x, g.constant(0.5)])], "cut.off", to=6),
    ),
    (
        "too.narrow",
        "overflow of int8",
        lambda g, x: g.node(
            "Cast", [g.node("Mul", [x, g.constant(3.0)])], "too.narrow", to=TensorProto.INT8
        ),
    ),
    (
        "half",
        "does not know",
        lambda g, x: g.node("Cast", [g.node("Cast", [x], "half", to=TensorProto.FLOAT16)], to=1),
    ),
    (
        "outside",
        "outside the table",
        lambda g, x: g.node(
            "Gather", [g.constant(np.zeros(64), np.uint8), g.node("Cast", [x], to=6)], "outside"
        ),
    ),
    (
        "mixed",
        "does not take",
        lambda g, x: g.node("Relu", [g.node("Cast", [x], to=6)], "mixed"),
    ),
]


@pytest.mark.parametrize(("node", "what", "build"), REFUSED, ids=[item[0] for item in REFUSED])
def test_what_is_not_exact_is_refused_by_the_nodes_name(
    node: str, what: str, build: Callable[[GraphBuilder, str], str]
) -> None:
    g = GraphBuilder()
    model = g.with_output(build(g, whole_steps(g)))
    with pytest.raises(InputError, match=what) as caught:
        IntegerReference(model).step(np.linspace(-3.9, 3.9, FEATURES))
    assert f"node {node!r} (" in caught.value.where
    assert caught.value.fix
    assert "\n" not in str(caught.value)


def test_sums_that_cancel_are_refused_too() -> None:
    # The result would fit: one order of adding would not have.
    g = GraphBuilder()
    steps = whole_steps(g)
    row = np.resize([[70001.0], [-70001.0]], (FEATURES, 1))
    model = g.with_output(g.node("MatMul", [steps, g.constant(row)], "cancelling"))
    with pytest.raises(InputError, match="not exact") as caught:
        IntegerReference(model).step(np.full(FEATURES, 3.0))
    assert "'cancelling' (MatMul)" in caught.value.where


def test_a_weight_that_is_inexact_is_found_before_anything_runs() -> None:
    g = GraphBuilder()
    inputs = [g.constant([2**24 + 1], np.int32), g.constant(1.0), g.constant(0, np.int32)]
    bias = g.node("DequantizeLinear", inputs, "bias")
    model = g.with_output(g.node("Add", [whole_steps(g), bias]))
    with pytest.raises(InputError, match="not exact") as caught:
        IntegerReference(model)
    assert "'bias' (DequantizeLinear)" in caught.value.where


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_inputs_must_be_finite(value: float) -> None:
    reference = IntegerReference(dense(np.random.default_rng(0)).model())
    x = np.zeros((1, FEATURES), np.float32)
    x[0, 3] = value
    with pytest.raises(InputError, match=r": x: a value that is no number"):
        reference.step(x)


def edited(change: Callable[[onnx.ModelProto], object]) -> bytes:
    """A dense graph, changed by hand."""
    model = onnx.load_model_from_string(dense(np.random.default_rng(0)).model())
    change(model)
    return bytes(model.SerializeToString())


EDITS: list[tuple[str, Callable[[onnx.ModelProto], object]]] = [
    ("operator set", lambda m: setattr(m.opset_import[0], "version", 18)),
    ("another domain", lambda m: setattr(m.graph.node[0], "domain", "com.microsoft")),
    (
        "fixed shape",
        lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_param", "n"),
    ),
    ("an end of a type", lambda m: setattr(m.graph.output[0].type.tensor_type, "elem_type", 10)),
    (
        "a constant of a type",
        lambda m: m.graph.initializer.append(
            onnx.numpy_helper.from_array(np.zeros(2, np.float16), "half")
        ),
    ),
    (
        "no number",
        lambda m: m.graph.initializer.append(
            onnx.numpy_helper.from_array(np.full(2, np.nan, np.float32), "nan")
        ),
    ),
    (
        "nested graph",
        lambda m: m.graph.node[0].attribute.append(
            helper.make_attribute("body", onnx.GraphProto())
        ),
    ),
]


@pytest.mark.parametrize(("what", "change"), EDITS, ids=[item[0] for item in EDITS])
def test_what_is_no_such_graph_is_refused(
    what: str, change: Callable[[onnx.ModelProto], object]
) -> None:
    with pytest.raises(InputError, match=what):
        IntegerReference(edited(change))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read") as caught:
        IntegerReference(tmp_path / "absent.onnx")
    assert caught.value.where == str(tmp_path / "absent.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"\xff\x00 nothing of the kind")
    with pytest.raises(InputError) as caught:
        IntegerReference(tmp_path / "bad.onnx")
    assert caught.value.where == str(tmp_path / "bad.onnx")


def test_the_state_must_be_that_of_the_graph() -> None:
    g = delays_and_cells(np.random.default_rng(0))
    model, (delay, cell) = g.model(), g.state
    other = StateTensor(delay.input, delay.output, "uint8", (2, FEATURES), 0.0)
    for state in ((), (delay,), (cell, delay), (other, cell), (delay, cell, other)):
        with pytest.raises(InputError, match="another state"):
            IntegerReference(model, state)
