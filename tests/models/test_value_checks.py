"""The value check inside a graph: it sees what INT8 hides, and changes nothing of the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper

from engine.backends.exactness import prove_exact
from engine.backends.integer_reference import IntegerReference
from engine.backends.qdq_graph import without_checks
from engine.bundle import load_bundle
from engine.manifest import VIOLATIONS, StateSection, StateTensor
from engine.trust import CHECK_INPUT, CHECK_LAYERS, CHECK_OUTPUT
from feeds.errors import InputError
from models.bundle_cli import info
from models.bundles import _checked
from models.check_limits import (
    CONSTANT_FACTOR,
    MIN_CONSTANT_ROWS,
    MIN_INPUT_BOUND,
    add_checks,
    check_fusion,
    constant_rows,
    input_bounds,
    longest_runs,
    saturation_limits,
)
from models.dataset import Normalisation
from models.export import FEATURES_NAME, research_graph
from models.foreign.runtime import fused_nodes, int8_nodes, latency, opened
from models.operations import Spec
from models.quantisation import Quantised
from models.sequences import TRAIN, Dataset, Facts
from models.step_graph import OUTPUT_NAME
from models.step_session import StepSession
from models.value_checks import (
    CLIPPED,
    LimitedLayer,
    input_step,
    quantised_layers,
    with_checks,
)
from models.verify import hard_rows
from tests.models.small_networks import ARCHS, CLIP, N_CLASSES, N_FEATURES, Twins, rows_for, twins

ROWS = 120
BAD = (np.nan, np.inf, -np.inf, 1e30, -1e30, 1.001 * CLIP, -1.001 * CLIP, 2.0 * CLIP)
ADDED = {"Gather": 1, "MatMulInteger": 1, "QLinearConcat": 1, "QuantizeLinear": 1, "ReduceSum": 1}


def unchecked_rows(arch: str) -> np.ndarray:
    """Ordinary and hard rows within the clip."""
    return rows_for(arch, ROWS)


@cache
def limited(arch: str) -> tuple[Twins, tuple[LimitedLayer, ...]]:
    """A network and its layers, with limits that hard rows pass now and then."""
    made = twins(arch)
    layers = quantised_layers(made.int8)
    seen = saturations(made, unchecked_rows(arch))
    shapes = codes_of(made, unchecked_rows(arch)[:1])
    found = [
        LimitedLayer(layer, array[0].shape, int(np.median(counts)))
        for layer, array, counts in zip(layers, shapes, seen, strict=True)
    ]
    return made, tuple(item for item in found if item.limit < item.size)


def codes_of(made: Twins, x: np.ndarray) -> list[np.ndarray]:
    """Codes of every quantised layer, row by row, without the check."""
    layers = quantised_layers(made.int8)
    names = [layer.codes for layer in layers]
    shown = {value.name for value in made.int8.graph.output}
    tapped = onnx.ModelProto()
    tapped.CopyFrom(made.int8)
    for name in set(names) - shown:
        value = helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None)
        tapped.graph.output.append(value)
    session = StepSession(tapped, made.int8_state, optimise=False, watch=names)
    steps = [session.step(row)[1:] for row in x]
    return [np.stack(column) for column in zip(*steps, strict=True)]


def saturations(made: Twins, x: np.ndarray) -> list[np.ndarray]:
    """Saturated codes of every layer in every row, counted by NumPy."""
    found = []
    for layer, codes in zip(quantised_layers(made.int8), codes_of(made, x), strict=True):
        flat = codes.reshape(len(x), -1)
        high = (flat == 255).sum(axis=1) if layer.zero_point < 255 else 0
        low = (flat == 0).sum(axis=1) if layer.zero_point > 0 else 0
        found.append(np.asarray(low + high) + np.zeros(len(x), dtype=np.int64))
    return found


def masks(model: onnx.ModelProto, state: tuple[StateTensor, ...], x: np.ndarray) -> list[int]:
    """The mask of every row, as unsigned bits."""
    session = StepSession(model, state, watch=[VIOLATIONS])
    return [int(session.step(row)[1].view(np.uint32)[0]) for row in x]


@pytest.mark.parametrize("arch", ARCHS)
def test_every_fused_node_is_still_there(arch: str) -> None:
    made, layers = limited(arch)
    checked = with_checks(made.int8, CLIP, layers, quantised=True)
    before, after = fused_nodes(made.int8), fused_nodes(checked)
    reshaped = {op: after.get(op, 0) - before.get(op, 0) for op in ("Reshape",)}
    assert {op: n - before.get(op, 0) for op, n in after.items() if n != before.get(op, 0)} == (
        ADDED | {op: n for op, n in reshaped.items() if n}
    )
    assert all(after[op] >= n for op, n in before.items())
    assert int8_nodes(checked) == int8_nodes(made.int8)
    check_fusion(made.int8, checked)


@pytest.mark.parametrize("arch", ARCHS)
def test_scores_keep_their_bits_and_the_proof_holds(arch: str) -> None:
    made, layers = limited(arch)
    checked = with_checks(made.int8, CLIP, layers, quantised=True)
    x = unchecked_rows(arch)
    expected = StepSession(made.int8, made.int8_state, optimise=False).run(x)
    data = checked.SerializeToString()
    assert np.array_equal(IntegerReference(data, made.int8_state).run(x), expected)
    for options in ({}, {"optimise": False}, {"threads": 2}):
        assert np.array_equal(StepSession(checked, made.int8_state, **options).run(x), expected)  # type: ignore[arg-type]
    assert prove_exact(checked, made.int8_state) == prove_exact(made.int8, made.int8_state)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_checks_come_out_again_as_they_went_in(arch: str, precision: str) -> None:
    made, layers = limited(arch)
    model = getattr(made, precision)
    quantised = precision == "int8"
    checked = with_checks(model, CLIP, layers if quantised else (), quantised=quantised)
    assert checked.graph.output[-1].name == VIOLATIONS
    found = without_checks(checked)
    if quantised:
        assert found.SerializeToString(deterministic=True) == model.SerializeToString(
            deterministic=True
        )
    else:  # the clip stays: it is the model's own
        assert [node.name for node in found.graph.node] == [
            CLIPPED,
            *(node.name for node in model.graph.node),
        ]
    assert found.graph.output == model.graph.output


def test_a_model_that_depends_on_its_check_is_refused() -> None:
    made, layers = limited("mlp")
    checked = with_checks(made.int8, CLIP, layers, quantised=True)
    (head,) = (node for node in checked.graph.node if node.output[0] == OUTPUT_NAME)
    head.input[0] = "check/flags.real"
    with pytest.raises(InputError, match="depends on its own value check") as caught:
        without_checks(checked)
    assert "head" in caught.value.where


@pytest.mark.parametrize("arch", ["mlp", "gru", "attention"])
@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_research_graphs_are_made_of_the_model_alone(arch: str, precision: str) -> None:
    made, layers = limited(arch)
    quantised = precision == "int8"
    model = getattr(made, precision)
    checked = with_checks(model, CLIP, layers if quantised else (), quantised=quantised)
    normalisation = Normalisation(np.zeros(N_FEATURES), np.ones(N_FEATURES), CLIP)
    state = getattr(made, f"{precision}_state")
    raw = 3.0 * np.random.default_rng(0).normal(size=(40, N_FEATURES))
    graph = research_graph(checked, state, normalisation)
    (whole,) = opened(graph).run([OUTPUT_NAME], {FEATURES_NAME: raw})
    assert np.array_equal(whole, StepSession(checked, state).run(normalisation.apply(raw)))


# What is wrong with an input.


@pytest.mark.parametrize("precision", ["int8", "fp32"])
@pytest.mark.parametrize("value", BAD)
def test_a_bad_number_in_any_input_is_seen(precision: str, value: float) -> None:
    made, layers = limited("mlp")
    quantised = precision == "int8"
    model = getattr(made, precision)
    checked = with_checks(model, CLIP, layers if quantised else (), quantised=quantised)
    x = 0.1 * np.random.default_rng(0).normal(size=(N_FEATURES, N_FEATURES))
    np.fill_diagonal(x, value)
    assert all(mask & CHECK_INPUT for mask in masks(checked, (), x.astype(np.float32)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_int8_hides_what_is_no_number_and_the_mask_tells(value: float) -> None:
    made, layers = limited("mlp")
    checked = with_checks(made.int8, CLIP, layers, quantised=True)
    x = 0.3 * np.random.default_rng(1).normal(size=(1, N_FEATURES)).astype(np.float32)
    session = StepSession(checked, (), watch=[VIOLATIONS])
    usual, clean = session.step(x[0])
    x[0, 40] = value
    planted, mask = session.step(x[0])
    assert np.isfinite(planted).all(), "it looks like any other answer"
    assert np.abs(planted - usual).max() < np.abs(usual).max() + 4.0
    assert int(clean[0]) == 0
    assert int(mask[0]) == CHECK_INPUT


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_nothing_within_the_clip_is_called_bad(arch: str, precision: str) -> None:
    made = twins(arch)
    checked = with_checks(getattr(made, precision), CLIP, quantised=precision == "int8")
    assert set(masks(checked, getattr(made, f"{precision}_state"), unchecked_rows(arch))) == {0}


@pytest.mark.parametrize("clip", [4.0, 3.0, 0.1, 5.5, 1e-3, 1e6, float(np.float32(np.pi))])
def test_the_clip_itself_is_the_border_whatever_it_is(clip: float) -> None:
    made = twins("linear")
    checked = with_checks(made.int8, clip, quantised=True)
    edge = np.float32(clip)
    beyond = edge * np.float32(1.0 + 1e-6)
    x = np.zeros((4, N_FEATURES), dtype=np.float32)
    x[:, 5] = (edge, -edge, beyond, -beyond)
    assert masks(checked, (), x) == [0, 0, CHECK_INPUT, CHECK_INPUT]
    step = np.float32(input_step(clip))
    assert edge / step <= np.float32(126.5) < beyond / step


def test_the_float_twin_clips_its_input() -> None:
    made = twins("mlp")
    checked = with_checks(made.fp32, CLIP, quantised=False)
    x = hard_rows(N_FEATURES, CLIP, 8)
    wild = np.where(np.abs(x) == CLIP, 100.0 * x, x)
    assert (wild != x).any()
    found = StepSession(checked, ()).run(wild)
    assert np.array_equal(found, StepSession(made.fp32, ()).run(x))


# What is wrong with scores and layers.


def with_weight(model: onnx.ModelProto, name: str, factor: float) -> onnx.ModelProto:
    """A copy with one constant multiplied."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    (item,) = (item for item in copy.graph.initializer if item.name == name)
    item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item) * np.float32(factor), name))
    return copy


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_a_score_that_is_no_number_is_seen(precision: str) -> None:
    made = twins("mlp", kept={"head": "fp32"})  # INT8 too has a float head then
    model, quantised = getattr(made, precision), precision == "int8"
    x = np.full((1, N_FEATURES), 2.0, dtype=np.float32)
    broken = with_weight(model, "head.weight", 3e38)
    assert not np.isfinite(StepSession(broken, ()).run(x)).all()
    for graph, expected in ((model, 0), (broken, CHECK_OUTPUT)):
        checked = with_checks(graph, CLIP, quantised=quantised)
        assert masks(checked, (), x) == [expected]
    names = {node.name for node in checked.graph.node}
    assert ("check/scores" in names) == quantised


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_two_bits_can_be_set_at_once(precision: str) -> None:
    made = twins("mlp", kept={"head": "fp32"})
    broken = with_weight(getattr(made, precision), "head.weight", 3e38)
    checked = with_checks(broken, CLIP, quantised=precision == "int8")
    x = np.full((1, N_FEATURES), 2.0, dtype=np.float32)
    x[0, 3] = np.inf
    assert masks(checked, (), x) == [CHECK_INPUT | CHECK_OUTPUT]


def test_scores_of_an_integer_product_need_no_check() -> None:
    made, layers = limited("mlp")
    checked = with_checks(made.int8, CLIP, layers, quantised=True)
    assert not [node.name for node in checked.graph.node if node.name.startswith("check/scores")]


def test_scores_that_are_codes_are_checked_for_saturation() -> None:
    made = twins("mlp")
    model = onnx.ModelProto()
    model.CopyFrom(made.int8)
    (head,) = (node for node in model.graph.node if node.output[0] == OUTPUT_NAME)
    head.output[0] = "sums"
    constants = {"out.scale": np.float32(1e-3), "out.zero": np.uint8(128)}
    for name, constant in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(constant), name))
    for op, source, made_of in (
        ("QuantizeLinear", "sums", "out.q"),
        ("DequantizeLinear", "out.q", OUTPUT_NAME),
    ):
        node = helper.make_node(op, [source, *constants], [made_of], name=made_of)
        model.graph.node.append(node)
    layers = quantised_layers(model)
    assert [layer.name for layer in layers if layer.scores] == ["out.q"]
    limits = [
        LimitedLayer(layer, (1, size), size - 1)
        for layer, size in zip(layers, (64, 32, N_CLASSES), strict=True)
    ]
    checked = with_checks(model, CLIP, limits, quantised=True)
    x = np.stack([np.full(N_FEATURES, value, dtype=np.float32) for value in (0.0, 2.0, -2.0)])
    scores = StepSession(made.int8, ()).run(x)
    expected = [CHECK_OUTPUT if (np.abs(row) > 0.128).all() else 0 for row in scores]
    assert CHECK_OUTPUT in expected
    assert masks(checked, (), x) == expected


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch != "linear"])
def test_a_layers_bit_is_set_where_more_codes_saturate_than_its_limit(arch: str) -> None:
    made, layers = limited(arch)
    checked = with_checks(made.int8, CLIP, layers, quantised=True)
    x = unchecked_rows(arch)
    names = [layer.name for layer in quantised_layers(made.int8)]
    counts = dict(zip(names, saturations(made, x), strict=True))
    expected = np.zeros(len(x), dtype=np.int64)
    for i, item in enumerate(layers):
        expected |= (counts[item.layer.name] > item.limit).astype(np.int64) << (CHECK_LAYERS + i)
    assert masks(checked, made.int8_state, x) == expected.tolist()
    assert len(set(expected.tolist())) > 1


def test_a_layer_may_saturate_up_to_its_limit_and_no_further() -> None:
    made, layers = limited("mlp")
    broken = with_weight(made.int8, "hidden0.scale", 1e-4)  # nearly every active unit saturates
    x = np.random.default_rng(2).normal(size=(20, N_FEATURES)).astype(np.float32)
    counts = saturations(replace(made, int8=broken), x)[0]
    assert counts.min() > 10
    for row, count in zip(x, counts.tolist(), strict=True):
        for limit, expected in ((count, 0), (count - 1, 1 << CHECK_LAYERS)):
            item = replace(layers[0], limit=limit)
            checked = with_checks(broken, CLIP, [item], quantised=True)
            assert masks(checked, (), row[None]) == [expected]


@pytest.mark.parametrize("n_layers", [24, 25, 31])
def test_layers_from_the_24th_on_share_the_last_bit(n_layers: int) -> None:
    made = twins("tcn")
    broken = with_weight(made.int8, "stem.scale", 2.0**-12)
    broken = with_weight(broken, "stem.scale.2", 2.0**-12)
    layers = quantised_layers(broken)
    stem = next(layer for layer in layers if layer.name == "stem")
    sure = LimitedLayer(stem, (1, 32), 0)
    never = LimitedLayer(stem, (1, 32), 31)
    x = np.random.default_rng(3).normal(size=(1, N_FEATURES)).astype(np.float32)
    for at in (0, 22, 23, n_layers - 1):
        chosen = [never] * n_layers
        chosen[at] = sure
        shares = n_layers > 24 and at >= 23
        if shares:  # counted and limited together
            chosen = [sure if i >= 23 else never for i in range(n_layers)]
        checked = with_checks(broken, CLIP, chosen, quantised=True)
        assert masks(checked, made.int8_state, x) == [1 << min(CHECK_LAYERS + at, 31)]


def test_what_was_quantised_before_it_reached_the_graph_is_no_layer() -> None:
    names = {arch: [layer.name for layer in quantised_layers(twins(arch).int8)] for arch in ARCHS}
    assert names["linear"] == []
    assert names["mlp"] == ["hidden0", "hidden1"]
    assert "gru0.out.2" in names["gru"]
    assert "gru0.out" not in names["gru"], "a state, quantised again"
    for found in names.values():
        assert "x" not in found
        assert len(set(found)) == len(found)


# Limits.


def test_limits_are_well_beyond_what_calibration_saw() -> None:
    made = twins("mlp")
    rows = np.random.default_rng(0).normal(size=(50, N_FEATURES)).astype(np.float32)
    found = saturation_limits(made.int8, (), iter([rows[:20], rows[20:]]))
    assert [(item.layer.name, item.size, seen, item.limit) for item, seen in found] == [
        ("hidden0", 64, 0, 32),
        ("hidden1", 32, 0, 16),
    ]
    broken = with_weight(made.int8, "hidden0.scale", 1e-4)
    worst = int(saturations(replace(made, int8=broken), rows)[0].max())
    (first, *_) = saturation_limits(broken, (), iter([rows]))
    assert first[1] == worst
    assert first[0].limit == min(63, max(2 * worst + 1, 32))
    assert not [m for m in masks(with_checks(broken, CLIP, [first[0]], quantised=True), (), rows)
                if m]  # fmt: skip


def test_a_layer_that_always_saturates_is_left_out() -> None:
    made = twins("mlp")
    copy = with_weight(made.int8, "hidden0.scale", 1e-12)
    (bias,) = (item for item in copy.graph.initializer if item.name == "hidden0.bias.q")
    high = np.full_like(numpy_helper.to_array(bias), 1 << 23)
    bias.CopyFrom(numpy_helper.from_array(high, bias.name))
    rows = np.zeros((3, N_FEATURES), dtype=np.float32)
    found = saturation_limits(copy, (), iter([rows]))
    assert "hidden0" not in [item.layer.name for item, _ in found]


def dataset(x: np.ndarray, streams: tuple[int, ...], greatest: tuple[float, ...] = ()) -> Dataset:
    """Training rows of streams of these lengths."""
    n = len(x)
    assert sum(streams) == n
    starts = np.zeros(n, dtype=bool)
    starts[np.cumsum((0, *streams[:-1]))] = True
    zeros = np.zeros(n, dtype=np.int64)
    facts = Facts(
        label="fixed",
        horizon=1,
        threshold=0.0,
        embargo_ns=0,
        validation_share=0.1,
        test_share=0.1,
        clip=CLIP,
        mean=(0.0,) * x.shape[1],
        inv_scale=(1.0,) * x.shape[1],
        source="",
        greatest=greatest,
    )
    return Dataset(
        x=x.astype(np.float32),
        label=zeros,
        move=zeros,
        mid_half_ticks=zeros,
        spread_ticks=zeros,
        time_ns=np.arange(n),
        last_seq=zeros,
        slot=np.cumsum(starts) - 1,
        starts=starts,
        part=np.full(n, TRAIN, dtype=np.int8),
        facts=facts,
    )


def test_an_input_may_stay_the_same_four_times_as_long_as_it_ever_did() -> None:
    n = 4_000
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2 * n, 7))
    x[50:55, 1] = 1.0
    x[900:1_500, 2] = 2.0
    x[n - 400 : n + 600, 3] = 3.0  # two streams: 400 and 600 rows
    x[:n, 4] = 4.0  # constant in one instrument
    x[1_000:2_001, 5] = 5.0  # over a quarter of its stream
    x[:, 6] = rng.integers(0, 9, 2 * n)  # counted, as a spread in ticks
    found = constant_rows(dataset(x, (n, n)))
    assert found == (256, 256, 2_400, 2_400, 0, 0, 10_000)
    assert found[2] == CONSTANT_FACTOR * 600
    assert found[0] == MIN_CONSTANT_ROWS
    assert constant_rows(dataset(x[:200], (100, 100))) == (0,) * 7, "too short to tell"
    # A stub of a stream, in which everything stands still, says nothing.
    stub = np.concatenate([np.ones((100, 7)), x])
    assert constant_rows(dataset(stub, (100, n, n)))[:3] == (400, 400, 2_400)


def test_runs_are_counted_by_the_bits_of_float32() -> None:
    x = np.array([[1.0, 0.0], [1.0, 0.5], [1.0, 0.5], [2.0, 0.5], [2.0, 0.0]], dtype=np.float32)
    assert longest_runs(x).tolist() == [3, 3]
    assert longest_runs(x[:1]).tolist() == [1, 1]


def test_input_bounds_catch_garbage_and_nothing_that_was_ever_seen() -> None:
    x = np.zeros((4, 3))
    assert input_bounds(dataset(x, (4,))) == (MIN_INPUT_BOUND,) * 3
    assert input_bounds(dataset(x, (4,), (1.0, 625.0, 5_000.0))) == (
        10_000.0,
        10_000.0,
        80_000.0,
    )


def small_twins(made: Twins) -> Quantised:
    return Quantised(
        made.spec,
        made.parameters,
        made.parameters,
        made.scheme,
        made.int8,
        made.fp32,
        StateSection(int8=made.int8_state, fp32=made.fp32_state),
        "exact-int8",
        0,
        {},
    )


@pytest.mark.parametrize("arch", ["mlp", "gru"])
def test_twins_get_their_checks_from_the_data(arch: str) -> None:
    made = twins(arch)
    x = np.clip(np.random.default_rng(0).normal(size=(600, N_FEATURES)), -CLIP, CLIP)
    found = add_checks(small_twins(made), dataset(x, (300, 300)))
    assert found.reason == ""
    assert found.section is not None
    assert found.section.output == VIOLATIONS
    assert list(found.section.int8) == [layer.name for layer in quantised_layers(made.int8)]
    assert list(found.limits) == list(found.section.int8)
    assert len(found.section.input_bound) == len(found.section.max_constant) == N_FEATURES
    for name, model in (("int8", found.twins.int8), ("fp32", found.twins.fp32)):
        assert model.graph.output[-1].name == VIOLATIONS
        rows = x[:100].astype(np.float32)
        assert set(masks(model, getattr(found.twins.state, name), rows)) == {0}
    assert made.int8.graph.output[-1].name != VIOLATIONS, "the graphs are copies"


# What cannot be checked.


def spoilt(model: onnx.ModelProto, how: str) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if how == "opset":
        copy.opset_import[0].version = 13
    else:
        copy.graph.node.append(helper.make_node("Identity", ["x"], [how], name=f"node {how}"))
    return copy


@pytest.mark.parametrize(
    ("how", "told"),
    [("opset", "operator set"), ("violations", "is taken"), ("check/mine", "is taken")],
)
def test_a_graph_that_cannot_be_checked_says_why(how: str, told: str) -> None:
    made = twins("linear")
    model = spoilt(made.int8, how)
    with pytest.raises(InputError, match=told):
        with_checks(model, CLIP, quantised=True)
    x = np.clip(np.random.default_rng(0).normal(size=(300, N_FEATURES)), -CLIP, CLIP)
    ours = replace(small_twins(made), int8=model)
    with pytest.raises(InputError, match=told):
        _checked(ours, dataset(x, (300,)))
    theirs = replace(ours, spec=Spec("foreign", N_FEATURES, N_CLASSES, CLIP), parameters={})
    found = _checked(theirs, dataset(x, (300,)))
    assert found.section is None
    assert told in found.reason
    assert found.twins is theirs


def test_a_lost_fusion_is_refused_by_the_operators_name(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: Iterator[dict[str, int]] = iter(({"QGemm": 3, "Gather": 1}, {"QGemm": 2, "Gather": 0}))
    monkeypatch.setattr("models.check_limits.fused_nodes", lambda _: next(counts))
    with pytest.raises(InputError, match="undo a fusion") as caught:
        check_fusion(twins("linear").int8, twins("linear").int8)
    assert "QGemm" in caught.value.expected


# Around it.


def test_checked_graphs_can_be_timed() -> None:
    made, layers = limited("gru")
    checked = with_checks(made.int8, CLIP, layers, quantised=True)
    x = unchecked_rows("gru")
    assert min(StepSession(checked, made.int8_state).latency(x, 20)) > 0
    feeds = {item.input: item.fresh() for item in made.int8_state} | {"x": x[:1]}
    assert min(latency(checked, feeds, 20)) > 0


def test_the_reference_model_has_its_checks(reference_bundle: Path) -> None:
    bundle = load_bundle(reference_bundle)
    assert bundle.checks is not None
    assert bundle.checks.int8 == ("hidden0", "hidden1")
    assert np.isfinite(bundle.input_bound).all()
    assert (bundle.max_constant > 0).sum() > 64
    done = CliRunner().invoke(info, [str(reference_bundle), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["checks"]["layers from bit 8 on"] == ["hidden0", "hidden1"]
    assert told["value_check"]["hidden0"]["limit"] < told["value_check"]["hidden0"]["codes"]
    done = CliRunner().invoke(info, [str(reference_bundle)])
    assert "hidden1" in done.stdout
