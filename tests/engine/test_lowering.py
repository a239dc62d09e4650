"""Lowering: the integer graph gives the graph's bits, in any form of the file, or is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest

from engine.backends.exactness import prove_exact
from engine.backends.graph_reference import GraphReference
from engine.backends.integer_graph import (
    Columns,
    Delay,
    Dense,
    GruCell,
    IntegerGraph,
    LstmCell,
    Point,
    denses,
)
from engine.backends.integer_reference import IntegerReference
from engine.backends.lowering import lower, lower_bundle
from engine.backends.small_graphs import (
    H_AT,
    convolution,
    gru_graph,
    lstm,
    lstm_graph,
    two_cells,
)
from engine.bundle import load_bundle
from engine.manifest import StateTensor
from engine.trust import CHECK_INPUT
from feeds.errors import InputError
from tests.engine import integer_graphs
from tests.engine.architecture_graphs import quantised
from tests.engine.bundles import checked, make_bundle, write_manifest
from tests.engine.integer_graphs import (
    CLASSES,
    CLIP,
    FEATURES,
    X_EXPONENT,
    X_ZERO,
    GraphBuilder,
    inputs,
    run_session,
    session,
)
from tests.engine.random_graphs import RandomGraph, permuted
from tests.models.small_networks import ARCHS, rows_for

AT = (X_EXPONENT, X_ZERO)
ROWS = 32
SHARED_BIT = 31
SEEDS = range(2)


def hold(model: bytes, state: list[StateTensor], x: np.ndarray) -> IntegerGraph:
    """Lower a graph, and hold scores and states of every step against the graph as written."""
    prove_exact(onnx.load_model_from_string(model), state)
    graph = lower(model, state)
    own = GraphReference(graph)
    expected, states = run_session(session(model, fused=False), state, x)
    for row, scores, after in zip(x, expected, states, strict=True):
        found, mask = own.step(row)
        assert found.tobytes() == scores.tobytes()
        assert mask == 0
        assert own.state.keys() == after.keys()
        for name, array in after.items():
            assert own.state[name].dtype == array.dtype
            assert np.array_equal(own.state[name], array), name
    return graph


FORMS: dict[str, Callable[[np.random.Generator], GraphBuilder]] = {
    "dense": integer_graphs.dense,
    "two products": integer_graphs.two_products,
    "lstm": lstm_graph,
    "gru": gru_graph,
    "cell on cell": two_cells,
    "convolution": convolution,
    "lstm, gates in another order": lambda rng: lstm_graph(rng, order="ofi"),
    "lstm, factors swapped": lambda rng: lstm_graph(rng, order="fio", flipped=True),
    "lstm, a product for the candidate": lambda rng: lstm_graph(rng, joint=False),
    "lstm, limits of two sizes": lambda rng: lstm_graph(rng, limits=(-117.0, 20000.0)),
    "lstm of one unit": lambda rng: lstm_graph(rng, units=1),
    "gru, gates in another order": lambda rng: gru_graph(rng, order="zr"),
    "gru, factors swapped": lambda rng: gru_graph(rng, order="zr", flipped=True),
    "gru, a product for the candidate": lambda rng: gru_graph(rng, joint=False),
    "gru, limits of two sizes": lambda rng: gru_graph(rng, limits=(-9000.0, 400.0)),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", FORMS)
def test_a_lowered_graph_gives_the_bits_of_the_file(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    g = FORMS[name](rng)
    x = inputs(rng, ROWS)
    model = g.model()
    graph = hold(model, g.state, x)
    own, interpreted = GraphReference(graph), IntegerReference(model, g.state)
    state = interpreted.fresh_state()
    for row in x:
        outputs, state = interpreted.step(row, state)
        assert own.step(row)[0].tobytes() == outputs["logits"].tobytes()
        assert all(np.array_equal(own.state[name], array) for name, array in state.items())


@pytest.mark.parametrize("seed", range(40))
def test_random_graphs_in_random_orders_of_nodes_give_the_bits_of_the_file(seed: int) -> None:
    rng = np.random.default_rng(seed)
    g = RandomGraph(rng).draw(int(rng.integers(2, 12)))
    hold(permuted(g.model(), rng), g.state, inputs(rng, 16))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", ["lstm", "gru", "cell on cell", "convolution", "two products"])
def test_the_order_of_nodes_and_factors_means_nothing(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    g = FORMS[name](rng)
    written, other = (lower(data, g.state) for data in (g.model(), permuted(g.model(), rng)))
    assert sorted(written.sizes.values()) == sorted(other.sizes.values())
    hold(permuted(g.model(), rng), g.state, inputs(rng, 16))


@pytest.mark.parametrize("limit", [0, 3])
@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch != "attention"])
def test_an_architecture_gives_the_bits_and_the_masks_of_its_graph(arch: str, limit: int) -> None:
    model, state = quantised(arch)
    x = rows_for(arch, 20)
    bad = (np.nan, np.inf, -np.inf, np.nextafter(np.float32(CLIP), np.float32(9)))
    x[-20::5, 3] = bad
    data, layers = checked(model, "int8", limit)
    graph = lower(data, state)
    plain, own = session(data, fused=False), GraphReference(graph)
    names = ["logits", *(tensor.output for tensor in state), "violations"]
    now, masks = {tensor.input: tensor.fresh() for tensor in state}, set[int]()
    for row in x:
        expected, *after = plain.run(names, {"x": row[None], **now})
        expected_mask = int(after.pop().view(np.uint32)[0])
        now = {t.input: array for t, array in zip(state, after, strict=True)}
        scores, mask = own.step(row)
        assert scores.tobytes() == expected.tobytes()
        assert mask == expected_mask
        assert all(np.array_equal(own.state[name], array) for name, array in now.items())
        masks.add(mask)
    assert {mask & CHECK_INPUT for mask in masks} == {0, CHECK_INPUT}
    assert len(graph.checks) == min(len(layers), 24)
    if len(layers) > len(graph.checks):
        assert {mask >> SHARED_BIT for mask in masks} == {0, 1}, "layers that share a bit"


@pytest.mark.parametrize("arch", ["tcn", "deeplob", "lstm", "gru"])
def test_zero_points_and_weights_of_any_scheme(arch: str) -> None:
    model, state = quantised(arch, symmetric=False, per_channel=False)
    graph = hold(model, state, rows_for(arch, 30)[-40:])
    zeros = {point.zero_point for point in points(graph)}
    assert zeros - {0, 128}


def points(graph: IntegerGraph) -> Iterator[Point]:
    """Every point of a graph."""
    for layer in graph.layers:
        for dense in denses(layer):
            if dense.point is not None:
                yield dense.point
        if isinstance(layer, LstmCell):
            yield from (layer.gates_in, layer.candidate_in, layer.shown_in, layer.out)


def test_each_channel_has_its_own_shift_and_each_product_its_own_unit() -> None:
    g = lstm_graph(np.random.default_rng(2))
    (cell, head) = lower(g.model(), g.state).layers
    assert isinstance(cell, LstmCell)
    assert isinstance(head, Dense)
    of_x, of_h = cell.sums.products
    assert len(np.unique(of_x.up)) > 1
    assert len(np.unique(of_h.up)) > 1
    assert (np.minimum(of_x.up, of_h.up) == 0).all(), "the finer of both is the unit"
    assert len(np.unique(cell.sums.shift)) > 2
    assert len(np.unique(head.exponent)) > 1


def test_a_delay_that_is_read_twice_is_two_layers_of_one_state() -> None:
    g = convolution(np.random.default_rng(0))
    graph = lower(g.model(), g.state)
    delays = [layer for layer in graph.layers if isinstance(layer, Delay)]
    assert [layer.lags for layer in delays] == [(0, 2, 4, 2), (0, 1), (3, 1, 0)]
    assert delays[0].state == delays[1].state
    assert [(layer.rows, layer.by_row) for layer in delays] == [(1, True), (1, True), (4, True)]
    assert len({layer.name for layer in graph.layers}) == len(graph.layers)


def test_layers_before_and_after_the_scores_that_nothing_reads_change_nothing() -> None:
    rng = np.random.default_rng(5)
    g = lstm_graph(rng)
    q = g.quantise(g.dense(rng, "lstm.h.next", H_AT, (8, 4), name="unread"), -2, 128)
    g.node("Concat", [q, q], axis=1)
    graph = hold(g.model(), g.state, inputs(rng, 8))
    assert graph.layers[-1] is graph.scores


def test_codes_may_stand_for_other_numbers_than_they_were_made_of() -> None:
    g, rng = GraphBuilder(), np.random.default_rng(6)
    q = g.quantise("x", *AT)
    a = g.dense(rng, q, (-2, 3), (FEATURES, 8), name="first", greatest=31)
    q = g.quantise(a, 1, 255, "first.quantise")
    b = g.quantise(g.dense(rng, q, (0, 0), (8, 8), name="second"), -1, 0, "second.quantise")
    total = g.node("Add", [g.dequantise(q, -3, 17), g.dequantise(b, -1, 254)], "sum")
    q = g.quantise(total, -2, 64, "sum.quantise")
    g.dense(rng, q, (-7, 201), (8, CLASSES), name="head", out="logits")
    hold(g.model(), g.state, inputs(rng, ROWS))


def test_names_that_meet_are_told_apart() -> None:
    g, rng = GraphBuilder(), np.random.default_rng(7)
    q = g.quantise("x", *AT)
    # The tables of "join" are named after it, and points inside a cell after the cell.
    a = g.quantise(g.dense(rng, q, AT, (FEATURES, 8), name="one"), -2, 128, "join.0")
    b = g.quantise(
        g.dense(rng, q, AT, (FEATURES, 8), name="two"),
        -1,
        100,
        "lstm.gates_in.2",
        "lstm.gates_in.q",
    )
    real = [g.dequantise(b, -1, 100), g.dequantise(a, -2, 128)]
    join = g.quantise(g.node("Concat", real, axis=1), -2, 120, "join")
    sums = g.dense(rng, q, AT, (FEATURES, 4), name="three")
    own = g.quantise(sums, -1, 9, "lstm.h.last", "lstm.h.last.q")
    h = lstm(g, rng, q, AT, (FEATURES, 4))
    sums = g.dense(rng, q, AT, (FEATURES, 4), name="four")
    late = g.quantise(sums, -1, 9, "x", "x.q")
    whole = g.node("Concat", [join, a, b, own, late, h], axis=1)
    g.dense(rng, whole, (-2, 120), (44, CLASSES), name="head", out="logits")
    graph = hold(g.model(), g.state, inputs(rng, 16))
    assert len({layer.name for layer in graph.layers}) == len(graph.layers)


def test_a_past_may_be_read_before_it_is_kept() -> None:
    g, rng = GraphBuilder(), np.random.default_rng(8)
    q = g.quantise("x", *AT)
    last = g.remember("delay", "uint8", (3, FEATURES), 200)
    whole = g.node("Concat", [last, q], axis=-2)
    flat = g.reshape(whole, 1, 4 * FEATURES)
    recent = g.node("Slice", [whole, *(g.constant([v], np.int64) for v in (2, 9, 1))])
    both = g.node("Concat", [flat, g.reshape(recent, 1, 28)], axis=1)
    g.dense(rng, both, AT, (4 * FEATURES + 28, CLASSES), name="head", out="logits")
    ends = [g.constant([v], np.int64) for v in (-3, 1 << 40, -2)]
    g.node("Slice", [whole, *ends], out="delay.next")
    graph = hold(g.model(), g.state, inputs(rng, 12))
    assert [type(layer) for layer in graph.layers[:2]] == [Delay, Columns]


def test_a_bundle_lowers_from_its_folder(tmp_path: Path) -> None:
    _, manifest = make_bundle(tmp_path, graph="gru", checks=True)
    bundle = load_bundle(tmp_path)
    graph = lower_bundle(bundle)
    assert graph.where == str(bundle.int8_path)
    assert isinstance(graph.layers[0], GruCell)
    assert graph.state == bundle.state("int8")
    assert graph.n_features == bundle.n_features
    assert graph.n_outputs == bundle.n_outputs
    assert 0 < graph.macs < graph.weight_bytes
    write_manifest(tmp_path, msgspec.structs.replace(manifest, numerics="tolerance"))
    with pytest.raises(InputError, match="only an exact-int8 bundle") as caught:
        lower_bundle(load_bundle(tmp_path))
    assert caught.value.where == str(tmp_path)
