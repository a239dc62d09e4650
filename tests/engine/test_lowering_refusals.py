"""Refusals of lowering: graphs that could be served, and that no integer graph says."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import onnx
import pytest

from engine.backends.exactness import prove_exact
from engine.backends.lowering import lower
from engine.backends.small_graphs import H_AT, gru, gru_graph, lstm, lstm_graph
from engine.manifest import StateTensor
from feeds.errors import InputError
from tests.engine import integer_graphs
from tests.engine.architecture_graphs import quantised
from tests.engine.integer_graphs import (
    CLASSES,
    FEATURES,
    X_EXPONENT,
    X_ZERO,
    GraphBuilder,
    inputs,
    run_session,
    session,
)

AT = (X_EXPONENT, X_ZERO)


def headed(build: Callable[[GraphBuilder, np.random.Generator], tuple[str, int]]) -> GraphBuilder:
    """A graph whose head reads (codes, how many) of what ``build`` makes."""
    g, rng = GraphBuilder(), np.random.default_rng(0)
    codes, size = build(g, rng)
    g.dense(rng, codes, (-2, 128), (size, CLASSES), name="head", out="logits")
    return g


def window(g: GraphBuilder, q: str, steps: int, rows: int = 1) -> str:
    """A delay that returns as it should: (steps + rows, FEATURES / rows)."""
    last = g.remember("delay", "uint8", (steps, FEATURES // rows), X_ZERO)
    now = g.reshape(q, rows, FEATURES // rows)
    whole = g.node("Concat", [last, now], "window", axis=0)
    ends = [g.constant([v], np.int64) for v in (1, steps + 1, 0)]
    g.node("Slice", [whole, *ends], "window.slice", "delay.next")
    return whole


def past_from_elsewhere(g: GraphBuilder, rng: np.random.Generator) -> tuple[str, int]:
    q = g.quantise("x", *AT)
    other = g.quantise(g.dense(rng, q, AT, (FEATURES, FEATURES), name="other"), -2, 128)
    whole = g.node("Concat", [g.remember("delay", "uint8", (1, FEATURES), X_ZERO), q], axis=0)
    g.node("Identity", [other], "kept", "delay.next")
    return g.reshape(whole, 1, 2 * FEATURES), 2 * FEATURES


def past_turned_round(g: GraphBuilder, rng: np.random.Generator) -> tuple[str, int]:
    q = g.quantise("x", *AT)
    whole = g.node("Concat", [g.remember("delay", "uint8", (3, FEATURES), X_ZERO), q], axis=0)
    g.node("Gather", [whole, g.constant([3, 2, 1], np.int64)], "kept", "delay.next", axis=0)
    return g.reshape(whole, 1, 4 * FEATURES), 4 * FEATURES


def past_of_two_steps(g: GraphBuilder, rng: np.random.Generator) -> tuple[str, int]:
    return g.reshape(window(g, g.quantise("x", *AT), 3, 2), 1, 60), 60


def oldest_kept(g: GraphBuilder, rng: np.random.Generator) -> tuple[str, int]:
    q = g.quantise("x", *AT)
    whole = g.node("Concat", [g.remember("delay", "uint8", (3, FEATURES), X_ZERO), q], axis=0)
    ends = [g.constant([v], np.int64) for v in (0, 3, 0)]
    g.node("Slice", [whole, *ends], "kept", "delay.next")
    return g.reshape(whole, 1, 4 * FEATURES), 4 * FEATURES


def lags_transposed(g: GraphBuilder, rng: np.random.Generator) -> tuple[str, int]:
    whole = window(g, g.quantise("x", *AT), 3)
    lagged = g.node("Gather", [whole, g.constant([[0, 1], [2, 3]], np.int64)], axis=0)
    turned = g.node("Transpose", [lagged], "turned", perm=[1, 0, 2])
    return g.reshape(turned, 1, 4 * FEATURES), 4 * FEATURES


def unread_state(g: GraphBuilder, rng: np.random.Generator) -> tuple[str, int]:
    q = g.quantise("x", *AT)
    window(g, q, 2)
    return q, FEATURES


def state_past_by(g: GraphBuilder, rng: np.random.Generator) -> tuple[str, int]:
    q = g.quantise("x", *AT)
    g.remember("echo", "uint8", (1, FEATURES), 0)
    g.node("Identity", [q], "kept", "echo.next")
    return q, FEATURES


def bias_of_rows(g: GraphBuilder, rng: np.random.Generator) -> tuple[str, int]:
    q = g.reshape(g.quantise("x", *AT), 3, 8)
    weight = g.weights(rng.integers(-127, 128, (3, 8)), np.full(3, -7), np.int8, "weight")
    bias = g.weights(rng.integers(-99, 99, (3, 1)), np.full(3, -12), np.int32, "bias")
    sums = g.node("Gemm", [g.dequantise(q, *AT), weight, bias], "rows", transB=1)
    return g.reshape(g.quantise(sums, -2, 128), 1, 9), 9


def fine_bias(g: GraphBuilder, rng: np.random.Generator) -> tuple[str, int]:
    q = g.quantise("x", *AT)
    weight = g.weights(rng.integers(-127, 128, (4, FEATURES)), np.full(4, -7), np.int8, "weight")
    bias = g.weights(np.array([2, 4, 5, 8]), np.full(4, -14), np.int32, "bias")
    sums = g.node("Gemm", [g.dequantise(q, *AT), weight, bias], "fine", transB=1)
    return g.quantise(sums, -2, 128), 4


def scales_by_input(g: GraphBuilder, rng: np.random.Generator) -> tuple[str, int]:
    values = [g.constant(rng.integers(-127, 128, (4, FEATURES)), np.int8)]
    values.append(g.constant(np.ldexp(1.0, -7 - np.arange(FEATURES) % 2)))
    values.append(g.constant(np.zeros(FEATURES), np.int8))
    weight = g.node("DequantizeLinear", values, "weight", axis=1)
    x = g.dequantise(g.quantise("x", *AT), *AT)
    return g.quantise(g.node("Gemm", [x, weight], "mixed", transB=1), -2, 128), 4


def wide_weights(g: GraphBuilder, rng: np.random.Generator) -> tuple[str, int]:
    x = g.dequantise(g.quantise("x", *AT), *AT)
    weight = g.constant(np.arange(4 * FEATURES).reshape(4, FEATURES) + 129.0)
    return g.quantise(g.node("Gemm", [x, weight], "wide", transB=1), 4, 128), 4


def broadcast_rows(g: GraphBuilder, rng: np.random.Generator) -> tuple[str, int]:
    q = g.quantise("x", *AT)
    rows = g.dense(rng, g.reshape(q, 4, 6), AT, (6, 5), name="rows")
    one = g.dense(rng, q, AT, (FEATURES, 5), name="one")
    return g.reshape(g.quantise(g.node("Add", [rows, one], "total"), -2, 128), 1, 20), 20


def broadcast_outputs(g: GraphBuilder, rng: np.random.Generator) -> tuple[str, int]:
    q = g.quantise("x", *AT)
    single = g.dense(rng, q, AT, (FEATURES, 1), name="single")
    five = g.dense(rng, q, AT, (FEATURES, 5), name="five")
    return g.quantise(g.node("Add", [single, five], "total"), -2, 128), 5


def broadcast_codes(g: GraphBuilder, rng: np.random.Generator) -> tuple[str, int]:
    q = g.quantise("x", *AT)
    one, five = (
        g.quantise(g.dense(rng, q, AT, (FEATURES, m), name=f"of{m}"), -2, 128) for m in (1, 5)
    )
    total = g.node("Add", [g.dequantise(one, -2, 128), g.dequantise(five, -2, 128)], "total")
    return g.quantise(total, -1, 128), 5


def other_concat(g: GraphBuilder, rng: np.random.Generator) -> tuple[str, int]:
    q = g.quantise("x", *AT)
    return g.reshape(g.node("Concat", [q, q], "stack", axis=0), 1, 2 * FEATURES), 2 * FEATURES


def stacked_scales(g: GraphBuilder, rng: np.random.Generator) -> tuple[str, int]:
    q = g.quantise("x", *AT)
    real = g.node("Concat", [g.dequantise(q, *AT), g.dequantise(q, -3, 7)], "stack", axis=0)
    return g.reshape(g.quantise(real, -4, 3), 1, 2 * FEATURES), 2 * FEATURES


def stepped_slice(g: GraphBuilder, rng: np.random.Generator) -> tuple[str, int]:
    ends = [g.constant([v], np.int64) for v in (0, FEATURES, 1, 2)]
    return g.node("Slice", [g.quantise("x", *AT), *ends], "stepped"), FEATURES // 2


def rows_sliced(g: GraphBuilder, rng: np.random.Generator) -> tuple[str, int]:
    q = g.reshape(g.quantise("x", *AT), 3, 8)
    cut = g.node("Slice", [q, *(g.constant([v], np.int64) for v in (1, 3, 0))], "rows")
    return g.reshape(cut, 1, 16), 16


def rows_split(g: GraphBuilder, rng: np.random.Generator) -> tuple[str, int]:
    parts = g.split(g.reshape(g.quantise("x", *AT), 3, 8), [1, 2], axis=0)
    return g.reshape(parts[1], 1, 16), 16


def maximum_of_columns(g: GraphBuilder, rng: np.random.Generator) -> tuple[str, int]:
    q = g.reshape(g.quantise("x", *AT), 3, 8)
    found = g.node("ReduceMax", [q, g.constant([1], np.int64)], "widest", keepdims=0)
    return g.reshape(found, 1, 3), 3


def chosen_columns(g: GraphBuilder, rng: np.random.Generator) -> tuple[str, int]:
    q = g.quantise("x", *AT)
    return g.node("Gather", [q, g.constant([3, 1], np.int64)], "chosen", axis=1), 2


def short_table(g: GraphBuilder, rng: np.random.Generator) -> tuple[str, int]:
    wide = g.quantise("x", *AT)
    return g.look_up(wide, rng.integers(0, 256, 300), "long"), FEATURES


def input_twice(g: GraphBuilder, rng: np.random.Generator) -> tuple[str, int]:
    g.quantise("x", *AT)
    return g.quantise("x", -3, 100, "again"), FEATURES


def input_moved(g: GraphBuilder, rng: np.random.Generator) -> tuple[str, int]:
    g.quantise("x", *AT)
    return g.quantise(g.node("Reshape", ["x", g.constant([1, -1], np.int64)], "moved"), -3, 9), 24


def relu(g: GraphBuilder, rng: np.random.Generator) -> tuple[str, int]:
    sums = g.dense(rng, g.quantise("x", *AT), AT, (FEATURES, 5), name="sums")
    return g.quantise(g.node("Relu", [sums], "relu"), -2, 128), 5


def hidden_elsewhere(g: GraphBuilder, rng: np.random.Generator) -> tuple[str, int]:
    h = lstm(g, rng, g.quantise("x", *AT), AT, (FEATURES, 4))
    return g.node("Concat", ["lstm.h.last", h], "both", axis=1), 8


def hidden_delayed(g: GraphBuilder, rng: np.random.Generator) -> tuple[str, int]:
    h = lstm(g, rng, g.quantise("x", *AT), AT, (FEATURES, 4))
    both = g.node("Concat", ["lstm.h.last", h], "both", axis=0)
    return g.reshape(both, 1, 8), 8


def gru_past_elsewhere(g: GraphBuilder, rng: np.random.Generator) -> tuple[str, int]:
    h = gru(g, rng, g.quantise("x", *AT), AT, (FEATURES, 4))
    return g.node("Concat", ["gru.past", h], "both", axis=1), 8


def scores_of_codes(g: GraphBuilder, rng: np.random.Generator) -> GraphBuilder:
    q = g.quantise("x", *AT)
    q = g.quantise(g.dense(rng, q, AT, (FEATURES, CLASSES), name="last"), -2, 128)
    g.nodes.append(
        onnx.helper.make_node(
            "DequantizeLinear",
            [q, g.constant(0.25), g.constant(128, np.uint8)],
            ["logits"],
            name="scores",
        )
    )
    return g


REFUSED: dict[str, tuple[str, str, Callable[..., object]]] = {
    "past from elsewhere": ("'kept' (Identity)", "does not return", past_from_elsewhere),
    "past turned round": ("'kept' (Gather)", "does not return", past_turned_round),
    "past of two steps": ("'window' (Concat)", "several values a step", past_of_two_steps),
    "oldest step kept": ("'kept' (Slice)", "another Slice of a delay", oldest_kept),
    "lags transposed": ("'turned' (Transpose)", "another order", lags_transposed),
    "a delay nothing reads": ("'window.slice' (Slice)", "no layer keeps", unread_state),
    "a state nothing reads": ("'kept' (Identity)", "no layer keeps", state_past_by),
    "a bias of its own a row": ("'rows' (Gemm)", "for each row", bias_of_rows),
    "a fine bias": ("'fine' (Gemm)", "finer unit", fine_bias),
    "scales along a row": ("'mixed' (Gemm)", "several units", scales_by_input),
    "wide weights": ("'wide' (Gemm)", "more than 8 bits", wide_weights),
    "rows that broadcast": ("'total' (Add)", "broadcasts", broadcast_rows),
    "outputs that broadcast": ("'total' (Add)", "broadcasts", broadcast_outputs),
    "codes that broadcast": ("'total' (Add)", "broadcasts", broadcast_codes),
    "rows stacked": ("'stack' (Concat)", "behind the other", other_concat),
    "rows of two scales": ("'stack' (Concat)", "behind the other", stacked_scales),
    "every second column": ("'stepped' (Slice)", "with steps", stepped_slice),
    "rows cut out": ("'rows' (Slice)", "rows of a value", rows_sliced),
    "rows split off": ("(Split)", "rows of a value", rows_split),
    "a maximum of columns": ("'widest' (ReduceMax)", "another axis", maximum_of_columns),
    "columns chosen": ("'chosen' (Gather)", "no table", chosen_columns),
    "another table": ("'long' (Gather)", "no table", short_table),
    "an input quantised twice": ("'again' (QuantizeLinear)", "second quantisation", input_twice),
    "an input moved": (": x", "no layer", input_moved),
    "a node of float32": ("'relu' (Relu)", "no place", relu),
    "a hidden state elsewhere": ("'both' (Concat)", "no layer", hidden_elsewhere),
    "a hidden state delayed": ("'lstm.out' (QuantizeLinear)", "not return", hidden_delayed),
    "a GRU's past elsewhere": ("'both' (Concat)", "no layer", gru_past_elsewhere),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_place_in_an_integer_graph_is_refused_by_its_name(name: str) -> None:
    where, what, build = REFUSED[name]
    g = headed(build)  # type: ignore[arg-type]
    model = g.model()
    # Each is a graph that could be served: it is exact, and ONNX Runtime runs it.
    if name != "a fine bias":  # exact as written, but not as ONNX Runtime fuses it
        prove_exact(onnx.load_model_from_string(model), g.state)
    run_session(session(model, fused=False), g.state, inputs(np.random.default_rng(0), 2))
    with pytest.raises(InputError, match=what) as caught:
        lower(model, g.state)
    assert where in caught.value.where
    assert "\n" not in str(caught.value)
    assert caught.value.fix


def edited_cell(
    make: Callable[..., GraphBuilder], change: Callable[[GraphBuilder], None]
) -> GraphBuilder:
    g = make(np.random.default_rng(0))
    change(g)
    return g


def node_of(g: GraphBuilder, name: str) -> onnx.NodeProto:
    return next(node for node in g.nodes if node.name == name)


def crossed(make: Callable[..., str], flipped: bool) -> GraphBuilder:
    """Two cells, each of which keeps the other's state."""
    g, rng = GraphBuilder(), np.random.default_rng(0)
    q = g.quantise("x", *AT)
    cells = [make(g, rng, q, AT, (FEATURES, 4), name=n, flipped=flipped) for n in ("a", "b")]
    end = "c.last" if make is lstm else "h.last"
    for own, other in (("a", "b"), ("b", "a")):
        node = node_of(g, f"{own}.kept")
        at = list(node.input).index(f"{own}.{end}")
        node.input[at] = f"{other}.{end}"
    q = g.node("Concat", cells, axis=1)
    g.dense(rng, q, H_AT, (8, CLASSES), name="head", out="logits")
    return g


def rescaled(g: GraphBuilder, old: float, new: float) -> None:
    """Give every DequantizeLinear of one scale another one."""
    found = {item.name: item for item in g.constants}
    for node in g.nodes:
        if node.op_type == "DequantizeLinear" and node.input[1] in found:
            scale = onnx.numpy_helper.to_array(found[node.input[1]])
            if scale.size == 1 and float(scale) == old:
                node.input[1] = g.constant(new)


def coarse_cell(g: GraphBuilder) -> None:
    rescaled(g, 2.0**-8, 2.0)
    rescaled(g, 2.0**4, 1.0)


def begun_with(value: float) -> Callable[[GraphBuilder], None]:
    def change(g: GraphBuilder) -> None:
        g.state = [
            msgspec.structs.replace(t, initial=value) if t.dtype == "float32" else t
            for t in g.state
        ]

    return change


def same_gate_twice(g: GraphBuilder) -> None:
    first, second = node_of(g, "lstm.kept"), node_of(g, "lstm.added")
    second.input[0] = first.input[0]


def state_squared(g: GraphBuilder) -> None:
    node = node_of(g, "lstm.kept")
    node.input[:] = ["lstm.c.last", "lstm.c.last"]


def two_row_cell() -> GraphBuilder:
    """An LSTM cell of two rows with the same weights: two instruments in one, so to say."""
    g, rng = GraphBuilder(), np.random.default_rng(0)
    q = g.reshape(g.quantise("x", *AT), 2, 12)
    h = lstm(g, rng, q, AT, (12, 4))
    g.state = [StateTensor(t.input, t.output, t.dtype, (2, 4), t.initial) for t in g.state]
    for value in (*g.inputs[1:], *g.outputs):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    g.dense(rng, g.reshape(h, 1, 8), H_AT, (8, CLASSES), name="head", out="logits")
    return g


def broadcast_candidate() -> GraphBuilder:
    """A candidate of one unit for all of them."""
    g = lstm_graph(np.random.default_rng(0), joint=False)
    for product in ("lstm.x.new", "lstm.h.new"):
        for part in ("weight", "bias"):
            if part == "bias" and product == "lstm.h.new":
                continue
            node = node_of(g, f"{product}.{part}")
            for name in node.input:
                item = next(item for item in g.constants if item.name == name)
                array = onnx.numpy_helper.to_array(item)[:1]
                item.CopyFrom(onnx.numpy_helper.from_array(array, name))
    return g


CELLS: dict[str, tuple[str, Callable[[], GraphBuilder]]] = {
    "two LSTMs that keep each other's cell": ("known", lambda: crossed(lstm, False)),
    "two LSTMs, factors swapped": ("known", lambda: crossed(lstm, True)),
    "two GRUs that keep each other's state": ("known", lambda: crossed(gru, False)),
    "two GRUs, factors swapped": ("known", lambda: crossed(gru, True)),
    "a cell in steps of more than 1": ("coarser", lambda: edited_cell(lstm_graph, coarse_cell)),
    "a cell of two rows": ("another shape", two_row_cell),
    "a candidate for all units": ("another shape", broadcast_candidate),
    "one gate in two places": ("each gate once", lambda: edited_cell(lstm_graph, same_gate_twice)),
    "a state times itself": ("one of its products", lambda: edited_cell(lstm_graph, state_squared)),
    "a cell that begins beyond its limits": (
        "begins with 40000",
        lambda: edited_cell(lstm_graph, begun_with(40000.0)),
    ),
    "neither LSTM nor GRU": (
        "no place",
        lambda: integer_graphs.delays_and_cells(np.random.default_rng(0)),
    ),
}


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_that_is_another_is_refused(name: str) -> None:
    what, build = CELLS[name]
    g = build()
    model = g.model()
    run_session(session(model, fused=False), g.state, inputs(np.random.default_rng(0), 2))
    with pytest.raises(InputError, match=what) as caught:
        lower(model, g.state)
    assert "node '" in caught.value.where
    assert "\n" not in str(caught.value)


def test_a_gru_state_that_begins_with_a_fraction_is_refused() -> None:
    g = edited_cell(gru_graph, begun_with(0.5))
    with pytest.raises(InputError, match=r"begins with 0\.5") as caught:
        lower(g.model(), g.state)
    assert "'gru.clip' (Clip)" in caught.value.where


@pytest.mark.parametrize(("name", "node"), [("softmax", "(Transpose)"), ("layer norm", "'total'")])
def test_what_rounds_in_float32_is_refused(name: str, node: str) -> None:
    g = integer_graphs.GRAPHS[name](np.random.default_rng(0))
    with pytest.raises(InputError, match="no place in an integer graph") as caught:
        lower(g.model(), g.state)
    assert node in caught.value.where


def test_attention_is_refused_by_the_first_node_that_has_no_place() -> None:
    model, state = quantised("attention")
    with pytest.raises(InputError, match="no place in an integer graph") as caught:
        lower(model, state, "their.onnx")
    assert caught.value.where == "their.onnx: node 'attention.q.heads' (Transpose)"
    assert "onnx backend" in caught.value.fix


def test_scores_must_be_a_product() -> None:
    g = scores_of_codes(GraphBuilder(), np.random.default_rng(0))
    with pytest.raises(InputError, match="scores that are not") as caught:
        lower(g.model(), g.state)
    assert "'scores' (DequantizeLinear)" in caught.value.where


def test_a_graph_that_does_not_read_its_input_is_refused() -> None:
    g = GraphBuilder()
    g.node("Gemm", [g.constant(np.ones((1, 4))), g.constant(np.ones((CLASSES, 4)))], "head")
    g.node("Identity", ["head"], out="logits")
    g.nodes[0].attribute.append(onnx.helper.make_attribute("transB", 1))
    with pytest.raises(InputError, match="scores that are not") as caught:
        lower(g.model(), g.state)
    assert caught.value.where.endswith(": logits")
