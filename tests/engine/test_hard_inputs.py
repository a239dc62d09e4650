"""Hard inputs: on the ties of the graph's own quantisation, and beside them."""

from __future__ import annotations

from itertools import islice

import numpy as np
import onnx

from engine.backends.hard_inputs import KINDS, hard_inputs, input_steps
from tests.engine.integer_graphs import CLIP, FEATURES, GRAPHS, X_EXPONENT, GraphBuilder

STEP = 2.0**X_EXPONENT


def rows(n: int, **keys: bool) -> np.ndarray:
    rng = np.random.default_rng(3)
    return np.concatenate(list(islice(hard_inputs(rng, (1, FEATURES), CLIP, (STEP,), **keys), n)))


def test_the_step_is_that_of_the_graph() -> None:
    for make in GRAPHS.values():
        model = onnx.load_model_from_string(make(np.random.default_rng(0)).model())
        assert input_steps(model, "x", CLIP) == (STEP,)


def test_steps_are_found_behind_what_moves_data_and_all_of_them() -> None:
    rng = np.random.default_rng(0)
    g = GraphBuilder()
    left, right = g.split("x", [4, FEATURES - 4])
    row = g.node("Reshape", [left, g.constant([1, 4], np.int64)])
    g.quantise(row, -3, 128)
    q = g.quantise(right, -6, 100)
    g.dense(rng, q, (-6, 100), (FEATURES - 4, 3), name="head", out="logits")
    model = onnx.load_model_from_string(g.model())
    assert input_steps(model, "x", CLIP) == (2.0**-6, 2.0**-3)


def test_a_graph_that_quantises_nothing_gets_a_step_of_the_clip() -> None:
    g = GraphBuilder()
    weight = g.constant(np.ones((3, FEATURES)))
    g.node("Gemm", ["x", weight], "head", "logits", transB=1)
    assert input_steps(onnx.load_model_from_string(g.model()), "x", 4.0) == (4.0 / 128.0,)


def test_rows_saturate_lie_on_ties_and_beside_them() -> None:
    x = rows(40 * KINDS)
    assert x.dtype == np.float32
    assert np.abs(x).max() <= CLIP
    assert (np.abs(x[1::KINDS]) == CLIP).mean() > 0.99
    x = x.astype(np.float64)  # float32 itself would round what is left of a division
    ties = x[2::KINDS] / STEP
    assert (ties % 1.0 == 0.5).mean() > 0.98, "all but what was clipped"
    beside = x[3::KINDS] / STEP
    assert not (beside % 1.0 == 0.5).any()
    assert (np.abs(beside % 1.0 - 0.5) < 1e-4).mean() > 0.95
    assert ((beside % 1.0) > 0.5).any()
    assert ((beside % 1.0) < 0.5).any()


def test_ties_are_left_out_where_a_tolerance_is_declared() -> None:
    assert not (rows(200, ties=False) / STEP % 1.0 == 0.5).any()


def test_they_tell_a_zero_point_added_too_early() -> None:
    """Ordinary rows do not: 200 of them go by without a difference."""
    zero = np.float32(128.0)

    def wrong(x: np.ndarray) -> np.ndarray:
        codes = x / np.float32(STEP)
        return np.asarray(np.rint(codes + zero) - zero != np.rint(codes)).any(axis=1)

    assert wrong(rows(40)).any()
    ordinary = np.random.default_rng(0).normal(size=(200, FEATURES)).astype(np.float32)
    assert not wrong(ordinary).any()
