"""The value check, read back from the graph: the mask that its nodes compute, or a refusal."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from engine.backends.check_groups import NO_CHECK, Counted, ValueCheck, input_mask, read_value_check
from engine.backends.graph_reference import GraphReference
from engine.backends.lowering import lower
from engine.backends.small_graphs import convolution, gru_graph, lstm_graph, two_cells
from engine.manifest import CHECK_PREFIX, VIOLATIONS
from engine.trust import CHECK_INPUT, CHECK_LAYERS
from feeds.errors import InputError
from models.value_checks import Layer, LimitedLayer, quantised_layers, with_checks
from tests.engine.bundles import checked
from tests.engine.integer_graphs import (
    CLASSES,
    CLIP,
    FEATURES,
    X_EXPONENT,
    X_ZERO,
    GraphBuilder,
    dense,
    inputs,
    session,
)

AT = (X_EXPONENT, X_ZERO)
LAST_BIT = 31
GRAPHS: dict[str, Callable[[np.random.Generator], GraphBuilder]] = {
    "dense": dense,
    "convolution": convolution,
    "lstm": lstm_graph,
    "gru": gru_graph,
    "two cells": two_cells,
}


def narrow_layers(rng: np.random.Generator, n: int) -> GraphBuilder:
    """``n`` quantised layers of two outputs each, at zero points 0, 255 and between."""
    g = GraphBuilder()
    q = g.quantise("x", *AT)
    names = []
    for i in range(n):
        sums = g.dense(rng, q, AT, (FEATURES, 2), name=f"layer{i}")
        zero = (0, 255, 128)[i % 3]
        names.append(g.quantise(sums, -4, zero, f"layer{i}.quantise"))
    whole = g.node("Concat", names, axis=1)
    g.dense(rng, whole, (-4, 128), (2 * n, CLASSES), name="head", out="logits")
    return g


def sizes_of(model: onnx.ModelProto) -> dict[str, int]:
    """Elements of each tensor that is no part of the check."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    ends = (*inferred.value_info, *inferred.input, *inferred.output)
    return {
        value.name: int(np.prod([dim.dim_value for dim in value.type.tensor_type.shape.dim]))
        for value in ends
        if not value.name.startswith(CHECK_PREFIX)
    }


def with_limits(g: GraphBuilder, limits: dict[str, int]) -> tuple[onnx.ModelProto, ValueCheck]:
    """A graph that checks some layers, each against a limit of its own; and what is read of it."""
    model = onnx.load_model_from_string(g.model())
    sizes = sizes_of(model)
    layers = [
        LimitedLayer(layer, (1, sizes[layer.codes]), limits[layer.name])
        for layer in quantised_layers(model)
        if layer.name in limits
    ]
    found = with_checks(model, CLIP, layers, quantised=True)
    return found, read_value_check(found, sizes_of(found))


def masks(data: bytes, g: GraphBuilder, x: np.ndarray) -> tuple[list[int], list[int]]:
    """Step by step, what the graph says and what the integer graph says."""
    plain, own = session(data, fused=False), GraphReference(lower(data, g.state))
    names = [VIOLATIONS, *(tensor.output for tensor in g.state)]
    state = {tensor.input: tensor.fresh() for tensor in g.state}
    said, found = [], []
    for row in x:
        mask, *after = plain.run(names, {"x": row[None], **state})
        state = {t.input: array for t, array in zip(g.state, after, strict=True)}
        said.append(int(mask.view(np.uint32)[0]))
        found.append(own.step(row)[1])
    return said, found


@pytest.mark.parametrize("limit", [0, 1, 5])
@pytest.mark.parametrize("name", GRAPHS)
def test_masks_are_those_of_the_graph(name: str, limit: int) -> None:
    rng = np.random.default_rng(limit)
    g = GRAPHS[name](rng)
    data, _ = checked(g.model(), "int8", limit)
    x = inputs(rng, 60)
    x[::7, 5] = np.resize([np.nan, np.inf, -np.inf, 1e30, -4.1], len(x[::7]))
    said, found = masks(data, g, x)
    assert found == said
    assert {mask & CHECK_INPUT for mask in said} == {0, CHECK_INPUT}
    if limit == 0:
        assert any(mask >= CHECK_LAYERS for mask in said), "some layer saturates"


@pytest.mark.parametrize("n", [23, 24, 25, 40])
def test_layers_behind_the_23rd_share_the_last_bit(n: int) -> None:
    g = narrow_layers(np.random.default_rng(n), n)
    model, check = with_limits(g, {f"layer{i}": int(i % 5 == 0) for i in range(n)})
    assert len(check.groups) == min(n, 24)
    shared = [counted for counted in check.counted.values() if counted.group == 23]
    assert len(shared) == max(n - 23, 0)
    if shared:
        assert check.groups[23].mask == 1 << LAST_BIT
        assert check.groups[23].limit == sum(i % 5 == 0 for i in range(23, n)), "together"
    data = model.SerializeToString()
    x = inputs(np.random.default_rng(1), 40)
    x[0] = 0.0
    said, found = masks(data, g, x)
    assert found == said
    assert not shared or {mask >> LAST_BIT for mask in said} == {0, 1}


def test_each_group_has_its_mask_its_limit_and_the_ends_that_count() -> None:
    g = narrow_layers(np.random.default_rng(0), 4)
    _, check = with_limits(g, {"layer0": 1, "layer1": 0, "layer2": 1})
    assert [(group.mask, group.limit) for group in check.groups] == [(256, 1), (512, 0), (1024, 1)]
    assert check.counted == {
        "layer0.quantise": Counted(0, low=False, high=True),  # at zero point 0, 0 is a plain zero
        "layer1.quantise": Counted(1, low=True, high=False),
        "layer2.quantise": Counted(2, low=True, high=True),
    }


@pytest.mark.parametrize("clip", [4.0, 3.0, 0.1, 1e-30, 127.0, 5e8])
def test_the_limit_is_the_greatest_float32_that_the_graph_lets_pass(clip: float) -> None:
    model = onnx.load_model_from_string(dense(np.random.default_rng(0)).model())
    found = with_checks(model, clip, quantised=True)
    limit = np.float32(read_value_check(found, sizes_of(found)).input_limit)
    plain = session(found.SerializeToString(), fused=False)
    up, down = np.float32(np.inf), np.float32(0.0)
    around = [limit, np.nextafter(limit, up), np.nextafter(limit, down), np.float32(clip)]
    assert limit >= np.float32(clip) * (1 - 1e-6)
    for value in (*around, np.float32(np.inf), np.float32(0.0)):
        for signed in (value, -value):
            x = np.zeros((1, FEATURES), np.float32)
            x[0, 7] = signed
            (mask,) = plain.run([VIOLATIONS], {"x": x})
            assert input_mask(x, float(limit)) == int(mask[0]), signed


def test_a_graph_without_a_check_has_none() -> None:
    g = dense(np.random.default_rng(0))
    model = onnx.load_model_from_string(g.model())
    assert read_value_check(model, sizes_of(model)) == NO_CHECK
    graph = lower(g.model())
    assert graph.checks == ()
    assert GraphReference(graph).step(np.full(FEATURES, np.nan, np.float32))[1] == 0


def test_a_graph_may_check_its_input_alone() -> None:
    _, check = with_limits(dense(np.random.default_rng(0)), {})
    assert (check.groups, check.counted) == ((), {})
    assert 0.0 < check.input_limit < np.inf


# ---- what is refused


def constant_of(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(item for item in model.graph.initializer if item.name == CHECK_PREFIX + name)


def change(model: onnx.ModelProto, name: str, edit: Callable[[np.ndarray], None]) -> None:
    item = constant_of(model, name)
    array = onnx.numpy_helper.to_array(item).copy()
    edit(array)
    item.CopyFrom(onnx.numpy_helper.from_array(array, item.name))


def twice(weights: np.ndarray) -> None:
    weights[2 * FEATURES, 1] = 2


def elsewhere(weights: np.ndarray) -> None:
    weights[2 * FEATURES, 2] = 1


def two_masks(table: np.ndarray) -> None:
    table[-1] = 4096


def any_input(table: np.ndarray) -> None:
    table[1] = 0


def other_code(zero: np.ndarray) -> None:
    zero[...] = 200


def without_a_part(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.name == CHECK_PREFIX + "flags.real")
    del node.input[2]


def another_operator(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "MatMulInteger")
    node.op_type = "MatMul"


TAMPERED: dict[str, tuple[str, Callable[[onnx.ModelProto], None]]] = {
    "a code that counts twice": ("counted once", lambda m: change(m, "weights", twice)),
    "a code in two groups": ("counted once", lambda m: change(m, "weights", elsewhere)),
    "two masks in one group": ("one mask behind it", lambda m: change(m, "table", two_masks)),
    "a bad input that is let pass": ("one is flagged", lambda m: change(m, "table", any_input)),
    "a code that is no end": (
        "codes 0 and 255",
        lambda m: change(m, "flags.2.zero_point", other_code),
    ),
    "an input code that is no end": (
        "codes 0, 254 and 255",
        lambda m: change(m, "flags.0.zero_point", other_code),
    ),
    "another zero point of the input": (
        "zero point 127",
        lambda m: change(m, "x.zero_point", other_code),
    ),
    "flags that are missing": ("rows of weights", without_a_part),
    "another operator": ("MatMulInteger", another_operator),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_another_check_is_refused(name: str) -> None:
    what, tamper = TAMPERED[name]
    g = narrow_layers(np.random.default_rng(0), 3)
    model, _ = with_limits(g, {"layer0": 0, "layer1": 0, "layer2": 0})
    sizes = sizes_of(model)
    tamper(model)
    with pytest.raises(InputError, match="value check that is not known") as caught:
        read_value_check(model, sizes, "their.onnx")
    assert what in caught.value.expected
    assert caught.value.where.startswith("their.onnx: ")


@pytest.mark.parametrize(
    ("codes", "what"),
    [
        ("x.codes", "the input's codes"),
        ("looked", "counts and no layer has"),
        ("joined", "counts and no layer has"),
    ],
)
def test_codes_that_no_layer_counts_are_refused(codes: str, what: str) -> None:
    g, rng = GraphBuilder(), np.random.default_rng(0)
    q = g.quantise("x", *AT, name="x.codes")
    looked = g.look_up(q, rng.integers(0, 256, 256), "looked")
    both = g.node("Concat", [q, looked], "joined", axis=1)
    g.dense(rng, both, AT, (2 * FEATURES, CLASSES), name="head", out="logits")
    size = 2 * FEATURES if codes == "joined" else FEATURES
    limited = LimitedLayer(Layer(codes, codes, 128), (1, size), 0)
    model = onnx.load_model_from_string(g.model())
    data = with_checks(model, CLIP, [limited], quantised=True).SerializeToString()
    session(data, fused=False)
    with pytest.raises(InputError, match=what) as caught:
        lower(data)
    assert codes in caught.value.where
