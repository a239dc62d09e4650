"""The integer graph in numpy: its one rounding rule, each layer as it is said, streams, masks."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.backends.check_groups import input_mask
from engine.backends.graph_reference import GraphReference, run_codes
from engine.backends.integer_graph import (
    CODE_MAX,
    INPUT,
    MAX_SHIFT,
    MIN_SHIFT,
    Add,
    CheckGroup,
    Columns,
    Concat,
    Delay,
    Dense,
    IntegerGraph,
    Layer,
    Maximum,
    Point,
    Product,
    Table,
    quantise_input,
    requantise,
    round_shift,
)
from engine.backends.lowering import lower
from engine.backends.lowering_products import bounded
from engine.backends.small_graphs import convolution, lstm_graph
from engine.manifest import StateTensor
from engine.trust import CHECK_INPUT
from tests.engine.integer_graphs import FEATURES, GraphBuilder, inputs, session

EXACT = (1 << 24) - 1  # no accumulator of an exact graph is greater
INT32 = (1 << 31) - 1

accumulators = st.one_of(
    st.integers(-INT32 - 1, INT32),
    st.integers(-600, 600),
    st.sampled_from([-INT32 - 1, -INT32, -EXACT, 0, EXACT, INT32]),
)
# A tie, and its neighbours, of any shift.
near_ties = st.builds(
    lambda whole, shift, off: ((2 * whole + 1) << shift >> 1) + off,
    st.integers(-300, 300),
    st.integers(1, 20),
    st.integers(-1, 1),
)
any_accumulator = st.one_of(accumulators, near_ties)


def half_to_even(acc: int, shift: int) -> int:
    """``acc / 2**shift``, rounded: Python's own rounding of rationals."""
    return round(Fraction(acc) / Fraction(2) ** shift)


def code_of(acc: int, shift: int, zero_point: int) -> int:
    return min(max(half_to_even(acc, shift) + zero_point, 0), CODE_MAX)


@given(any_accumulator, st.integers(0, MAX_SHIFT))
def test_a_shift_to_the_right_rounds_half_to_even(acc: int, shift: int) -> None:
    assert round_shift(np.array([acc]), shift).tolist() == [half_to_even(acc, shift)]


@given(st.integers(-300, 300), st.integers(1, MAX_SHIFT))
def test_every_tie_goes_to_the_even_one(whole: int, shift: int) -> None:
    tie = (2 * whole + 1) << (shift - 1)
    (found,) = round_shift(np.array([tie]), shift).tolist()
    assert found % 2 == 0
    assert abs(found - Fraction(tie, 1 << shift)) == Fraction(1, 2)


@given(any_accumulator, st.integers(MIN_SHIFT, MAX_SHIFT), st.integers(0, 255))
def test_codes_are_those_of_exact_rational_rounding(acc: int, shift: int, zero: int) -> None:
    found = requantise(np.array([acc]), shift, zero)
    assert found.dtype == np.uint8
    assert found.tolist() == [code_of(acc, shift, zero)]


@given(st.integers(-EXACT, EXACT), st.integers(-200, 200), st.integers(0, 255))
def test_beyond_the_shifts_there_are_the_codes_stay_the_same(
    acc: int, shift: int, zero: int
) -> None:
    within = bounded(np.array([shift]))
    assert MIN_SHIFT <= int(within[0]) <= MAX_SHIFT
    assert requantise(np.array([acc]), within, zero).tolist() == [code_of(acc, shift, zero)]


@given(
    st.lists(st.tuples(any_accumulator, st.integers(MIN_SHIFT, MAX_SHIFT)), min_size=1, max_size=8),
    st.integers(0, 255),
)
def test_each_output_has_its_own_shift(pairs: list[tuple[int, int]], zero: int) -> None:
    acc, shift = (np.array(part) for part in zip(*pairs, strict=True))
    rows = np.stack([acc, acc[::-1]])
    found = requantise(rows, shift.astype(np.int32), zero)
    expected = [
        [code_of(int(a), int(s), zero) for a, s in zip(r, shift, strict=True)] for r in rows
    ]
    assert found.tolist() == expected


@pytest.mark.parametrize(("exponent", "zero"), [(-5, 128), (-7, 0), (0, 255), (3, 17), (-24, 1)])
def test_the_input_is_quantised_as_the_runtime_does(exponent: int, zero: int) -> None:
    g = GraphBuilder()
    model = g.with_output(g.quantise("x", exponent, zero))
    rng = np.random.default_rng(0)
    x = np.concatenate([inputs(rng, 60), rng.normal(size=(20, FEATURES)) * 1e30]).astype(np.float32)
    x[0, :6] = (np.inf, -np.inf, 1e-45, -1e-45, np.finfo(np.float32).max, -0.0)
    ties = np.ldexp(rng.integers(-300, 300, (40, FEATURES)) + 0.5, exponent).astype(np.float32)
    around = [np.nextafter(ties, np.float32(to)) for to in (-np.inf, np.inf)]
    plain, point = session(model, fused=False), Point("x", exponent, zero)
    for row in np.concatenate([x, ties, *around]):
        (expected,) = plain.run(None, {"x": row[None]})
        assert quantise_input(row[None], point).tobytes() == expected.tobytes()


def test_what_is_no_number_becomes_the_lowest_code() -> None:
    assert quantise_input(np.array([np.nan, 0.0], np.float32), Point("x", -5, 128)).tolist() == [
        0,
        128,
    ]


# ---- each layer, by hand


def graph_of(
    *layers: Layer,
    n: int,
    state: tuple[StateTensor, ...] = (),
    checks: tuple[CheckGroup, ...] = (),
    limit: float = np.inf,
) -> IntegerGraph:
    """A graph of these layers whose input's codes are its numbers."""
    return IntegerGraph("by hand", n, Point("x", 0, 0), layers, {INPUT: n}, state, checks, limit)


def last_codes(graph: IntegerGraph, *rows: list[int]) -> list[list[int]]:
    """What the last layer gives, step by step."""
    stream, found = GraphReference(graph), []
    for row in rows:
        stream.step_codes(np.array(row, np.uint8))
        found.append(stream.values[graph.layers[-1].name].tolist())
    return found


def product(source: str, weight: list[list[int]], bias: list[int], up: list[int]) -> Product:
    return Product(
        source, np.array(weight, np.int8), np.array(bias, np.int32), np.array(up, np.int32)
    )


def dense_of(
    *products: Product, rows: int = 1, shift: list[int], point: Point | None = None
) -> Dense:
    exponent = np.zeros(len(shift), np.int32)
    return Dense("dense", rows, products, exponent, point, np.array(shift, np.int32))


def test_a_dense_layer_adds_products_in_one_unit_and_rounds_once() -> None:
    layer = dense_of(
        product(INPUT, [[1, 2], [-3, 4]], [10, 0], [0, 3]),
        product(INPUT, [[5, 0], [0, 1]], [0, -1], [1, 0]),
        shift=[2, -1],
        point=Point("dense", 0, 100),
    )
    # (3 + 14 + 10) + (15 << 1) = 57, a quarter is 14.25; ((-9 + 28) << 3) + (7 - 1) = 158, twice.
    assert last_codes(graph_of(layer, n=2), [3, 7]) == [[114, 255]]


def test_a_dense_layer_does_every_row_alike() -> None:
    layer = dense_of(
        product(INPUT, [[1, -1]], [0], [0]), rows=3, shift=[1], point=Point("dense", 0, 128)
    )
    # Halves of 1, 3 and -5: to the even one each.
    assert last_codes(graph_of(layer, n=6), [2, 1, 6, 3, 0, 5]) == [[128, 130, 126]]


def test_scores_are_accumulators_in_the_unit_of_their_output() -> None:
    scores = Dense(
        "scores",
        1,
        (product(INPUT, [[1, 0], [0, -1]], [0, 1], [0, 0]),),
        np.array([-3, 2], np.int32),
        None,
        np.zeros(2, np.int32),
    )
    graph = graph_of(scores, n=2)
    found, mask = GraphReference(graph).step(np.array([5.0, 9.0], np.float32))
    assert (graph.n_outputs, mask) == (2, 0)
    assert found.dtype == np.float32
    assert found.tolist() == [0.625, -32.0]


def test_a_delay_by_step_has_all_rows_of_a_lag_together() -> None:
    past = StateTensor("past", "next", "uint8", (2, 2, 2), 9.0)
    for by_row, expected in (
        (False, [[9, 9, 9, 9, 1, 2, 3, 4], [9, 9, 9, 9, 5, 6, 7, 8], [1, 2, 3, 4, 0, 0, 0, 0]]),
        (True, [[9, 9, 1, 2, 9, 9, 3, 4], [9, 9, 5, 6, 9, 9, 7, 8], [1, 2, 0, 0, 3, 4, 0, 0]]),
    ):
        layer = Delay("delay", INPUT, 2, (2, 0), by_row, past)
        graph = graph_of(layer, n=4, state=(past,))
        assert last_codes(graph, [1, 2, 3, 4], [5, 6, 7, 8], [0, 0, 0, 0]) == expected


def test_a_delay_may_remember_more_than_it_shows_and_show_a_lag_twice() -> None:
    past = StateTensor("past", "next", "uint8", (3, 1), 0.0)
    graph = graph_of(Delay("delay", INPUT, 1, (1, 0, 1), True, past), n=1, state=(past,))
    assert last_codes(graph, [1], [2], [3]) == [[0, 1, 0], [1, 2, 1], [2, 3, 2]]


def test_a_sum_aligns_both_units_before_it_rounds() -> None:
    layer = Add("add", INPUT, INPUT, 10, 4, 0, 2, 3, Point("add", 0, 100))
    # (6 - 10) + ((6 - 4) << 2) = 4, an eighth is a tie: 0. (20 - 10) + (16 << 2) = 74: 9.25.
    assert last_codes(graph_of(layer, n=2), [6, 20]) == [[100, 109]]


def test_moves_keep_rows_apart() -> None:
    cut = Columns("cut", INPUT, 2, 1, 3)
    assert last_codes(graph_of(cut, n=6), [1, 2, 3, 4, 5, 6]) == [[2, 3, 5, 6]]
    both = Concat("both", ("cut", INPUT), 2)
    whole = [2, 3, 1, 2, 3, 5, 6, 4, 5, 6]
    assert last_codes(graph_of(cut, both, n=6), [1, 2, 3, 4, 5, 6]) == [whole]
    greatest = Maximum("greatest", INPUT, 3)
    assert last_codes(graph_of(greatest, n=6), [1, 9, 3, 4, 2, 6]) == [[3, 9]]


def test_a_table_is_looked_up_code_by_code() -> None:
    entries = np.arange(255, -1, -1).astype(np.uint8)
    assert last_codes(graph_of(Table("table", INPUT, entries), n=3), [0, 255, 7]) == [[255, 0, 248]]


def test_a_graph_may_end_in_codes() -> None:
    graph = graph_of(Columns("cut", INPUT, 1, 0, 2), n=3)
    graph.sizes["cut"] = 2
    out, mask = GraphReference(graph).step_codes(np.array([7, 8, 9], np.uint8))
    assert graph.scores is None
    assert (out.dtype, out.tolist(), mask, graph.n_outputs) == (np.int32, [7, 8], 0, 2)


# ---- the value check


def test_more_saturated_codes_than_the_limit_set_the_mask_of_their_group() -> None:
    same = np.arange(256).astype(np.uint8)
    layers = (
        Table("low", INPUT, same, Point("low", 0, 5, group=0, low=True)),
        Table("high", INPUT, same, Point("high", 0, 5, group=0, high=True)),
        Table("both", INPUT, same, Point("both", 0, 5, group=1, low=True, high=True)),
        Table("none", INPUT, same, Point("none", 0, 5)),
    )
    checks = (CheckGroup(256, 2), CheckGroup(1 << 31, 0))
    graph = graph_of(*layers, n=4, checks=checks)
    graph.sizes["none"] = 4
    codes = np.array([[1, 2, 3, 4], [0, 255, 1, 1], [0, 0, 255, 1], [255] * 4], np.uint8)
    _, masks = run_codes(graph, codes)
    assert masks.tolist() == [0, 1 << 31, 256 | 1 << 31, 256 | 1 << 31]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 4.25, -4.25])
def test_one_bad_input_sets_the_bit_of_the_input(value: float) -> None:
    x = np.zeros(5, np.float32)
    assert input_mask(x, 4.0) == 0
    x[3] = value
    assert input_mask(x, 4.0) == CHECK_INPUT
    assert input_mask(x, np.inf) == 0, "a bundle without a value check says nothing"


# ---- streams


def test_a_reset_stream_is_a_fresh_one_and_a_stream_is_the_sequence_of_its_steps() -> None:
    for make in (convolution, lstm_graph):
        g = make(np.random.default_rng(3))
        graph = lower(g.model(), g.state)
        x = inputs(np.random.default_rng(4), 12)
        stream = GraphReference(graph)
        first = [stream.step(row)[0].tobytes() for row in x]
        again = [stream.step(row)[0].tobytes() for row in x]
        assert again != first, "it remembers"
        stream.reset()
        assert all(
            np.array_equal(stream.state[tensor.input], tensor.fresh()) for tensor in graph.state
        )
        assert [stream.step(row[None])[0].tobytes() for row in x] == first
        codes = np.array([graph.quantise(row) for row in x])
        acc, masks = run_codes(graph, codes)
        assert [graph.dequantise(row).tobytes() for row in acc] == first
        assert not masks.any()


def test_every_value_of_a_step_is_there_by_name() -> None:
    g = convolution(np.random.default_rng(3))
    graph = lower(g.model(), g.state)
    stream = GraphReference(graph)
    stream.step(np.zeros(FEATURES, np.float32))
    for name, codes in stream.values.items():
        assert codes.dtype == np.uint8
        assert codes.size == graph.sizes[name]
    assert stream.values.keys() == graph.sizes.keys()
