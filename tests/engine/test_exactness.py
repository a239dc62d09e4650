"""The static proof: true of everything that runs, and refusing, by name, whatever could round."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from engine.backends.dyadic import LIMIT, Dyadic
from engine.backends.exactness import NodeBound, carry_bounds, prove_exact
from engine.backends.integer_reference import IntegerReference
from engine.backends.qdq_graph import read_graph
from engine.backends.value_bounds import Bounds
from feeds.errors import InputError
from tests.engine.integer_graphs import (
    FEATURES,
    GRAPHS,
    X_EXPONENT,
    X_ZERO,
    GraphBuilder,
    inputs,
    session,
)


def proof(g: GraphBuilder) -> dict[str, NodeBound]:
    """The bounds of a graph's nodes."""
    found = prove_exact(onnx.load_model_from_string(g.model()), g.state)
    return {item.name: item for item in found}


def steps_of(g: GraphBuilder, exponent: int = 0) -> str:
    """The quantised input in whole steps of ``2**exponent``, -128 to 127."""
    return g.dequantise(g.quantise("x", X_EXPONENT, X_ZERO), exponent, X_ZERO)


def finish(g: GraphBuilder, real: str) -> GraphBuilder:
    """Quantise a float32 tensor of shape (1, n) and score it."""
    q = g.quantise(real, 0, 128, "last.quantise")
    columns = g.node("ReduceMax", [g.node("Cast", [q], to=6)], keepdims=1)
    q = g.node("Cast", [columns], to=TensorProto.UINT8)
    g.dense(np.random.default_rng(0), q, (0, 128), (1, g.n_classes), name="head", out="logits")
    return g


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", GRAPHS)
def test_no_tensor_leaves_its_bounds_or_its_unit(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    g = GRAPHS[name](rng)
    bounds, _ = carry_bounds(read_graph(onnx.load_model_from_string(g.model())), g.state)
    reference = IntegerReference(g.model(), g.state)
    state = reference.fresh_state()
    for row in inputs(rng, 60):
        for tensor, found in reference.tensors(row, state).items():
            bound = bounds[tensor]
            if not isinstance(bound, Bounds):
                assert (bound.low <= found).all(), tensor
                assert (found <= bound.high).all(), tensor
            elif isinstance(bound.low, Dyadic) and isinstance(bound.high, Dyadic):
                counted = np.ldexp(found.astype(np.float64), -bound.low.e)
                assert (counted == np.rint(counted)).all(), tensor
                assert (bound.low.m <= counted).all(), tensor
                assert (counted <= bound.high.m).all(), tensor
            else:
                assert (bound.low <= found).all(), tensor
                assert (found <= bound.high).all(), tensor
        _, state = reference.step(row, state)


@pytest.mark.parametrize("name", GRAPHS)
def test_every_result_and_its_headroom_is_reported(name: str) -> None:
    found = proof(GRAPHS[name](np.random.default_rng(0)))
    assert "head" in found
    for item in found.values():
        assert 0 <= item.bound <= LIMIT
        assert item.headroom_bits == math.log2(LIMIT / max(item.bound, 1))
    assert found["head"].op == "Gemm"


def test_the_bound_of_a_product_is_every_weight_at_full_reach() -> None:
    rng = np.random.default_rng(4)
    weight, bias = rng.integers(-127, 128, (3, FEATURES)), rng.integers(-999, 999, 3)
    g = GraphBuilder()
    zeros = np.full(3, -6)
    operands = [
        steps_of(g, X_EXPONENT),
        g.weights(weight, zeros, np.int8, "weight"),
        g.weights(bias, zeros + X_EXPONENT, np.int32, "bias"),
    ]
    g.node("Gemm", operands, "head", "logits", transB=1)
    expected = (np.abs(weight).sum(axis=1) * 128 + np.abs(bias)).max()
    assert proof(g)["head"].bound == expected
    # One row comes within a step of each weight of it.
    reach = np.where(weight > 0, 127, -128) * 2.0**X_EXPONENT
    sums = [abs(IntegerReference(g.model()).run(row[None])).max() for row in reach]
    assert max(sums) * 2.0 ** (6 - X_EXPONENT) >= expected - np.abs(weight).sum() - 2 * 999


def product_of(n: int, weight: int) -> GraphBuilder:
    """One score from ``n`` inputs that reach 128 and have this weight."""
    g = GraphBuilder(n, 1)
    scale = np.array([-4])
    operands = [steps_of(g), g.weights(np.full((1, n), weight), scale, np.int8, "weight")]
    g.node("Gemm", operands, "head", "logits", transB=1)
    return g


def test_a_sum_may_come_up_to_2_to_the_24_and_not_reach_it() -> None:
    assert proof(product_of(2047, 64))["head"].bound == 2047 * 64 * 128
    with pytest.raises(InputError, match="would not be exact") as caught:
        proof(product_of(2048, 64))
    assert "node 'head' (Gemm)" in caught.value.where
    assert str(LIMIT) in caught.value.found


def test_a_single_result_may_reach_it_for_float32_holds_that_too() -> None:
    def squared(n: int) -> GraphBuilder:
        g = GraphBuilder(n)
        total = g.node("ReduceSum", [steps_of(g)], "total", keepdims=1)
        return finish(g, g.node("Mul", [total, total], "square"))

    assert proof(squared(32))["square"].bound == LIMIT
    with pytest.raises(InputError, match="would not be exact") as caught:
        proof(squared(33))
    assert "node 'square' (Mul)" in caught.value.where


def test_two_products_are_counted_in_the_finer_unit() -> None:
    def summed(apart: int) -> GraphBuilder:
        g = GraphBuilder()
        q = g.quantise("x", X_EXPONENT, X_ZERO)
        parts = [
            g.node(
                "Gemm",
                [
                    g.dequantise(q, X_EXPONENT, X_ZERO),
                    g.weights(np.full((3, FEATURES), 127), np.full(3, e), np.int8, f"weight{e}"),
                ],
                f"part{e}",
                transB=1,
            )
            for e in (-5, -5 - apart)
        ]
        g.quantise(g.node("Add", parts, "sum"), 0, 0)
        return finish(g, "sum")

    one = FEATURES * 127 * 128
    assert proof(summed(1))["sum"].bound == one * 2 + one
    assert proof(summed(5))["sum"].bound == one * 32 + one
    with pytest.raises(InputError, match="would not be exact") as caught:
        proof(summed(6))
    assert "node 'sum' (Add)" in caught.value.where


def cell(limits: tuple[float, ...], *, rounded: bool = True, initial: float = 0.0) -> GraphBuilder:
    """A float32 state that half of stays, and grows by the input."""
    g = GraphBuilder()
    last = g.remember("cell", "float32", (1, FEATURES), initial)
    total = g.node("Add", [g.node("Mul", [last, g.constant(0.5)], "kept"), steps_of(g)], "sum")
    if rounded:
        total = g.node("Round", [total], "round")
    if limits:
        total = g.node("Clip", [total, *map(g.constant, limits)], "clip", "cell.next")
    else:
        total = g.node("Identity", [total], "clip", "cell.next")
    return finish(g, total)


def test_a_float32_state_is_bounded_by_its_clip_and_its_first_value() -> None:
    assert proof(cell((-1000.0, 2000.0)))["kept"].bound == 2000
    assert proof(cell((-1000.0, 2000.0), initial=-3000.0))["kept"].bound == 3000
    assert proof(cell((-(2.0**23) + 128, 2.0**23 - 128)))["sum"].bound == 2**23 + 128


@pytest.mark.parametrize(
    ("what", "node", "build"),
    [
        ("has no bound", "'round' (Round)", lambda: cell(())),
        ("has no bound", "'clip' (Clip)", lambda: cell((5.0,))),
        ("whole numbers", "'clip' (Clip)", lambda: cell((-10.5, 10.0))),
        ("whole numbers", "'clip' (Clip)", lambda: cell((-10.0, 10.0), initial=0.5)),
        ("whole numbers", "'clip' (Clip)", lambda: cell((10.0, -10.0))),
        ("could hold fractions", "'clip' (Clip)", lambda: cell((-10.0, 10.0), rounded=False)),
        ("would not be exact", "'sum' (Add)", lambda: cell((-(2.0**24), 2.0**24))),
    ],
)
def test_a_float32_state_that_is_not_kept_exact_is_refused(
    what: str, node: str, build: Callable[[], GraphBuilder]
) -> None:
    with pytest.raises(InputError, match=what) as caught:
        proof(build())
    assert f"node {node}" in caught.value.where


REFUSED: list[tuple[str, str, Callable[[GraphBuilder, str], str]]] = [
    (
        "bad",
        "no power of two",
        lambda g, x: g.node("QuantizeLinear", [x, g.constant(0.3), g.constant(0, np.uint8)], "bad"),
    ),
    ("bad", "does not know", lambda g, x: g.node("Tanh", [x], "bad")),
    (
        "bad",
        "could be negative",
        lambda g, x: g.quantise(g.node("Sqrt", [x], "bad"), -4, 0),
    ),
    ("bad", "could be 0", lambda g, x: g.node("Div", [g.constant(1.0), x], "bad")),
    (
        "bad",
        "could be 0",
        lambda g, x: g.node("Div", [x, g.node("Sqrt", [g.node("Mul", [x, x])])], "bad"),
    ),
    (
        "bad",
        "were rounded",
        lambda g, x: g.node("Add", [g.node("Div", [x, g.constant(3.0)]), x], "bad"),
    ),
    (
        "bad",
        "were rounded",
        lambda g, x: g.node("Relu", [g.node("Sqrt", [g.node("Mul", [x, x])])], "bad"),
    ),
    ("bad", "came from outside", lambda g, x: g.node("Mul", ["x", x], "bad")),
    (
        "bad",
        "fractions",
        lambda g, x: g.node("Cast", [g.node("Mul", [x, g.constant(0.5)])], "bad", to=6),
    ),
    (
        "bad",
        "outside the table",
        lambda g, x: g.node(
            "Gather", [g.constant(np.zeros(256), np.uint8), g.node("Cast", [x], to=6)], "bad"
        ),
    ),
    (
        "bad",
        "overflow of int8",
        lambda g, x: g.node(
            "Cast", [g.node("Mul", [x, g.constant(2.0)])], "bad", to=TensorProto.INT8
        ),
    ),
    (
        "bad",
        "could not hold as a normal",
        lambda g, x: g.node(
            "Div", [g.node("Mul", [x, g.constant(2.0**-120)]), g.constant(999.0)], "bad"
        ),
    ),
    (
        "bad",
        "that is computed",
        lambda g, x: g.node(
            "QuantizeLinear",
            [x, g.node("ReduceMax", [x], keepdims=0), g.constant(0, np.uint8)],
            "bad",
        ),
    ),
]


@pytest.mark.parametrize(("node", "what", "build"), REFUSED, ids=[item[1] for item in REFUSED])
def test_what_could_round_is_refused_by_the_nodes_name(
    node: str, what: str, build: Callable[[GraphBuilder, str], str]
) -> None:
    g = GraphBuilder()
    model = g.with_output(build(g, steps_of(g)))
    with pytest.raises(InputError, match=what) as caught:
        prove_exact(onnx.load_model_from_string(model), where="small.onnx")
    assert caught.value.where.startswith(f"small.onnx: node {node!r} (")
    assert caught.value.fix


def differs(g: GraphBuilder, out: str) -> bool:
    """Whether ONNX Runtime, fused, gives other bits than the graph as written."""
    model = g.with_output(out)
    x = inputs(np.random.default_rng(2), 400)
    fused, plain = (session(model, fused=fused) for fused in (True, False))
    return any(
        fused.run([out], {"x": row[None]})[0].tobytes()
        != plain.run([out], {"x": row[None]})[0].tobytes()
        for row in x
    )


def two(g: GraphBuilder) -> tuple[str, str]:
    """Two halves of the input as uint8."""
    first, second = g.split(g.quantise("x", X_EXPONENT, X_ZERO), [12, 12])
    return first, second


def residual(g: GraphBuilder, op: str, zero: int, *, moved: bool = False) -> str:
    """DequantizeLinear twice, one operation, QuantizeLinear."""
    a, b = (g.dequantise(q, -3, 128) for q in two(g))
    if moved:
        a, b = (g.node("Reshape", [part, g.constant([2, 6], np.int64)]) for part in (a, b))
    return g.quantise(g.node(op, [a, b], "both"), -2 if op == "Add" else 2, zero, "behind")


@pytest.mark.parametrize("op", ["Add", "Mul"])
def test_an_odd_zero_point_behind_a_fused_sum_or_product_is_refused(op: str) -> None:
    for zero in (0, 100, 128):
        g = GraphBuilder()
        out = residual(g, op, zero)
        assert prove_exact(onnx.load_model_from_string(g.with_output(out)))
        assert not differs(g, out)
    for moved in (False, True):
        g = GraphBuilder()
        out = residual(g, op, 101, moved=moved)
        with pytest.raises(InputError, match=f"odd zero point.*QLinear{op}") as caught:
            prove_exact(onnx.load_model_from_string(g.with_output(out)))
        assert "node 'behind' (QuantizeLinear)" in caught.value.where
    if not differs(g := GraphBuilder(), residual(g, op, 101)):
        pytest.skip("this ONNX Runtime rounds as the graph says")


def test_an_odd_zero_point_behind_two_products_is_as_good_as_any() -> None:
    g = GraphBuilder()
    rng = np.random.default_rng(0)
    a, b = two(g)
    parts = [g.dense(rng, q, (-5, 128), (12, 8), name=n) for q, n in ((a, "left"), (b, "right"))]
    out = g.quantise(g.node("Add", parts), -1, 101)
    assert prove_exact(onnx.load_model_from_string(g.with_output(out)))
    assert not differs(g, out)


def biased(g: GraphBuilder, apart: int) -> str:
    """A Gemm whose bias is in units ``2**apart`` times those of its products."""
    operands = [
        g.dequantise(g.quantise("x", X_EXPONENT, X_ZERO), X_EXPONENT, X_ZERO),
        g.weights(np.full((3, FEATURES), 5), np.full(3, -6), np.int8, "weight"),
        g.weights(np.full(3, 77), np.full(3, -6 + X_EXPONENT + apart), np.int32, "bias"),
    ]
    return g.node("Gemm", operands, "sums", transB=1)


def test_a_bias_must_have_the_unit_of_the_products() -> None:
    g = GraphBuilder()
    assert prove_exact(onnx.load_model_from_string(g.with_output(biased(g, 0))))
    for apart in (-1, 1):
        g = GraphBuilder()
        with pytest.raises(InputError, match="bias in another unit") as caught:
            prove_exact(onnx.load_model_from_string(g.with_output(biased(g, apart))))
        assert "node 'sums' (Gemm)" in caught.value.where
        if not differs(g := GraphBuilder(), biased(g, apart)):
            pytest.skip("this ONNX Runtime heeds the scale of a bias")


def requantised(g: GraphBuilder) -> str:
    """One quantisation right behind another, and what the second holds as float32."""
    q = g.quantise(g.dequantise(g.quantise("x", -3, 90), -3, 90), -4, 117, "again")
    return g.dequantise(q, -4, 117)


def test_a_quantisation_right_behind_another_is_refused() -> None:
    g = GraphBuilder()
    with pytest.raises(InputError, match="requantisation") as caught:
        prove_exact(onnx.load_model_from_string(g.with_output(requantised(g))))
    assert "node 'again' (QuantizeLinear)" in caught.value.where
    if not differs(g := GraphBuilder(), requantised(g)):
        pytest.skip("this ONNX Runtime keeps both")


def test_a_rounded_number_must_not_leave_the_graph() -> None:
    g = GraphBuilder()
    model = g.with_output(g.node("Div", [steps_of(g), g.constant(3.0)], "last"))
    with pytest.raises(InputError, match="rounded leaves") as caught:
        prove_exact(onnx.load_model_from_string(model))
    assert "node 'last' (Div)" in caught.value.where


def shares(g: GraphBuilder, *, axis: int = 1, of: int = 1) -> str:
    """The integer softmax over the last axis of (2, 12), summed over ``axis``."""
    x = g.node("Reshape", [g.quantise("x", X_EXPONENT, X_ZERO), g.constant([2, 12], np.int64)])
    steps = g.node("Cast", [x], to=TensorProto.FLOAT)
    top = g.node("ReduceMax", [steps, g.constant([of], np.int64)], keepdims=1)
    below = g.node("Cast", [g.node("Sub", [top, steps], "below")], to=TensorProto.INT32)
    powers = np.rint(255.0 * np.exp2(-np.arange(256) / 4.0))
    assert powers[-1] == 0.0
    looked_up = g.node("Gather", [g.constant(powers, np.uint8), below], "powers")
    parts = g.node("Cast", [looked_up], to=TensorProto.FLOAT)
    total = g.node("ReduceSum", [parts, g.constant([axis], np.int64)], "total", keepdims=1)
    return g.quantise(g.node("Div", [parts, total], "shares"), -8, 0)


def test_the_greatest_score_keeps_the_sum_of_a_softmax_above_zero() -> None:
    g = GraphBuilder()
    graph = read_graph(onnx.load_model_from_string(g.with_output(shares(g))))
    bounds, _ = carry_bounds(graph)
    total, below = bounds["total"], bounds["below"]
    assert isinstance(total, Bounds)
    assert isinstance(below, Bounds)
    assert isinstance(total.low, Dyadic)
    assert isinstance(below.low, Dyadic)
    assert (total.low.m == 255).all()
    assert (below.low.m == 0).all()
    g = GraphBuilder()
    with pytest.raises(InputError, match="could be 0") as caught:
        prove_exact(onnx.load_model_from_string(g.with_output(shares(g, axis=0))))
    assert "node 'shares' (Div)" in caught.value.where


def normal(g: GraphBuilder, count: float = FEATURES, add: float = 1.0) -> str:
    """The integer LayerNorm, with any count and any addend."""
    x = steps_of(g)
    total, squared = (
        g.node("ReduceSum", [value, g.constant([1], np.int64)], name, keepdims=1)
        for value, name in ((x, "total"), (g.node("Mul", [x, x]), "squared"))
    )
    scaled = g.node("Mul", [g.constant(count), squared])
    spread = g.node("Sub", [scaled, g.node("Mul", [total, total])], "spread")
    root = g.node("Sqrt", [g.node("Add", [spread, g.constant(add)])], "root")
    return g.quantise(g.node("Div", [x, root], "normal"), -4, 128)


def test_a_variance_is_neither_negative_nor_beyond_what_a_range_allows() -> None:
    g = GraphBuilder()
    graph = read_graph(onnx.load_model_from_string(g.with_output(normal(g))))
    bounds, _ = carry_bounds(graph)
    spread = bounds["spread"]
    assert isinstance(spread, Bounds)
    assert isinstance(spread.low, Dyadic)
    assert isinstance(spread.high, Dyadic)
    assert spread.low.m.tolist() == [[0]]
    assert spread.high.m.tolist() == [[FEATURES**2 * 255**2 // 4]]


@pytest.mark.parametrize(
    ("what", "node", "count", "add"),
    [
        ("could be negative", "'root' (Sqrt)", FEATURES - 1.0, 1.0),
        ("could be 0", "'normal' (Div)", FEATURES, 0.0),
    ],
)
def test_what_is_no_variance_is_not_taken_for_one(
    what: str, node: str, count: float, add: float
) -> None:
    g = GraphBuilder()
    with pytest.raises(InputError, match=what) as caught:
        prove_exact(onnx.load_model_from_string(g.with_output(normal(g, count, add))))
    assert f"node {node}" in caught.value.where
