"""One function, many interpretations: PyTorch, ONNX Runtime and the integer reference agree."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from engine.backends.exactness import prove_exact
from engine.backends.integer_reference import IntegerReference
from engine.backends.onnx_providers import session_options
from feeds.errors import InputError
from models.dataset import Normalisation
from models.execute import scores_of
from models.export import FEATURES_NAME, research_graph
from models.numerics import SchemeNumerics
from models.operations import Spec
from models.scheme import MAX_ACCUMULATOR, is_power_of_two, make_scheme
from models.shapes import describe, fold_norms
from models.step_graph import OUTPUT_NAME, float_graph
from models.step_session import StepSession
from tests.models.small_networks import (
    ARCHS,
    CLIP,
    N_FEATURES,
    random_parameters,
    rows_for,
    small_spec,
    twins,
)

ROWS = 160


@pytest.mark.parametrize("arch", ARCHS)
def test_exact_networks_have_the_same_bits_everywhere(arch: str) -> None:
    made = twins(arch)
    x = rows_for(arch, ROWS)
    expected = IntegerReference(made.int8.SerializeToString(), made.int8_state).run(x)
    fused = StepSession(made.int8, made.int8_state).run(x)
    plain = StepSession(made.int8, made.int8_state, optimise=False).run(x)
    threads = StepSession(made.int8, made.int8_state, threads=2).run(x)
    torch = scores_of(made.spec, made.parameters, x, numerics=SchemeNumerics(made.scheme))
    for found in (fused, plain, threads, torch):
        assert np.array_equal(found, expected)
    assert len(np.unique(expected)) > ROWS  # it says something


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("block", [1, 7])
def test_steps_are_the_window_bit_for_bit(arch: str, block: int) -> None:
    made = twins(arch, seed=2)
    x = rows_for(arch, ROWS)
    numerics = SchemeNumerics(made.scheme)
    whole = scores_of(made.spec, made.parameters, x, numerics=numerics)
    steps = scores_of(made.spec, made.parameters, x, numerics=numerics, block=block)
    assert np.array_equal(steps, whole)


@pytest.mark.parametrize("arch", ARCHS)
def test_float_graphs_say_what_pytorch_says(arch: str) -> None:
    made = twins(arch, seed=3)
    x = rows_for(arch, ROWS)
    torch = scores_of(made.spec, made.parameters, x)
    served = StepSession(made.fp32, made.fp32_state).run(x)
    assert np.abs(served - torch).max() <= 1e-5 * max(1.0, np.abs(torch).max())


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_the_research_graph_has_the_bits_of_the_steps(arch: str, precision: str) -> None:
    made = twins(arch, seed=4)
    rng = np.random.default_rng(5)
    raw = rng.normal(3.0, 2.0, size=(ROWS, N_FEATURES))
    normalisation = Normalisation(raw.mean(axis=0), 1.0 / raw.std(axis=0), CLIP)
    step = getattr(made, precision), getattr(made, f"{precision}_state")
    graph = research_graph(*step, normalisation)
    session = ort.InferenceSession(
        graph.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"]
    )
    for n in (1, ROWS):
        (whole,) = session.run([OUTPUT_NAME], {FEATURES_NAME: raw[:n]})
        assert np.array_equal(whole, StepSession(*step).run(normalisation.apply(raw[:n])))


@pytest.mark.parametrize("arch", ARCHS)
def test_exactness_is_proved_with_power_of_two_scales_only(arch: str) -> None:
    made = twins(arch)
    bounds = prove_exact(made.int8, made.int8_state)
    assert max(item.bound for item in bounds) <= MAX_ACCUMULATOR  # itself a float32
    for item in made.int8.graph.initializer:
        if item.name.endswith(".scale"):
            assert np.all(np.frexp(onnx.numpy_helper.to_array(item))[0] == 0.5), item.name
    free = twins(arch, rule="free")
    with pytest.raises(InputError, match="power of two"):
        prove_exact(free.int8, free.int8_state)


@pytest.mark.parametrize("arch", [a for a in ARCHS if a not in ("linear", "mlp")])
def test_folding_batchnorm_changes_nothing(arch: str) -> None:
    spec = small_spec(arch)
    parameters = random_parameters(spec, 6)
    folded = fold_norms(spec, parameters)
    assert not [name for name in folded if ".norm." in name]
    x = rows_for(arch, ROWS)
    before, after = (
        scores_of(spec, p, x.astype(np.float64)) for p in (_wide(parameters), _wide(folded))
    )
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()


def _wide(parameters: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array.astype(np.float64) for name, array in parameters.items()}


@pytest.mark.parametrize("arch", ARCHS)
def test_every_product_runs_fused_in_integers(arch: str) -> None:
    from models.foreign.runtime import fused_nodes

    made = twins(arch)
    dense = sum(node.op_type == "Gemm" for node in made.int8.graph.node)
    assert dense == len(describe(made.spec).layers)
    found = fused_nodes(made.int8)
    assert found["QGemm"] == dense
    assert "Gemm" not in found
    assert found.get("QLinearMatMul", 0) == (2 if arch == "attention" else 0)


@pytest.mark.parametrize("kept", ["fp32", "fp16"])
def test_a_kept_layer_computes_in_float_and_hands_on_codes(kept: str) -> None:
    made = twins("mlp", kept={"hidden1": kept})  # type: ignore[dict-item]
    names = {item.name for item in made.int8.graph.initializer}
    assert "hidden1.weight.q" not in names
    assert ("hidden1.weight.half" in names) == (kept == "fp16")
    x = rows_for("mlp", ROWS)
    torch = scores_of(made.spec, made.parameters, x, numerics=SchemeNumerics(made.scheme))
    served = StepSession(made.int8, made.int8_state).run(x)
    # Float products may fall to either side of a tie: by one code of each unit, not more.
    reach = np.abs(made.parameters["head.weight"]).sum(axis=1).max()
    assert np.abs(served - torch).max() <= 1.1 * reach * made.scheme.points["hidden1"].scale
    assert np.median(np.abs(served - torch)) < 0.1


@pytest.mark.parametrize(
    "name", ["attention.softmax", "attention.scores", "attention.context", "norm"]
)
def test_sensitive_operations_can_stay_in_float(name: str) -> None:
    made, exact = twins("attention", kept={name: "fp32"}), twins("attention")
    operators = {node.op_type for node in made.int8.graph.node}
    assert ("Softmax" in operators) == (name in ("attention.softmax", "attention.scores"))
    assert ("ReduceMean" in operators) == (name == "norm")
    x = rows_for("attention", ROWS)
    kept, plain = (StepSession(m.int8, m.int8_state).run(x) for m in (made, exact))
    real = StepSession(made.fp32, made.fp32_state).run(x)
    # LayerNorm comes out alike either way; a softmax from a table of 8 bits does not.
    assert np.array_equal(kept, plain) == (name == "norm")
    assert np.corrcoef(kept.ravel(), real.ravel())[0, 1] > 0.95


@pytest.mark.parametrize(
    ("symmetric", "per_channel"), [(False, True), (True, False), (False, False)]
)
def test_every_kind_of_scale_is_exact(symmetric: bool, per_channel: bool) -> None:
    for arch in ("tcn", "lstm"):
        made = twins(arch, symmetric=symmetric, per_channel=per_channel)
        zeros = {point.zero_point for point in made.scheme.points.values()}
        assert bool(zeros - {0, 128}) == (not symmetric)
        for name, scales in made.scheme.weight_scales.items():
            if not per_channel and not name.endswith((".x", ".h")):
                assert len(set(scales)) == 1
        prove_exact(made.int8, made.int8_state)
        x = rows_for(arch, ROWS)
        expected = IntegerReference(made.int8.SerializeToString(), made.int8_state).run(x)
        assert np.array_equal(StepSession(made.int8, made.int8_state).run(x), expected)


def test_accumulators_that_would_be_too_wide_get_coarser_weights() -> None:
    spec = Spec("linear", 4_000, N_FEATURES)
    rng = np.random.default_rng(0)
    parameters = {
        "head.weight": rng.choice([-0.5, 0.5], size=(N_FEATURES, 4_000)).astype(np.float32),
        "head.bias": np.zeros(N_FEATURES, dtype=np.float32),
    }
    scheme = make_scheme(spec, parameters, lambda _: (0.0, 0.0), rule="power-of-two")
    point = scheme.points["x"]
    layer = scheme.integer_layer(
        "head", parameters["head.weight"], parameters["head.bias"], point.scale
    )
    assert layer.bound(point.reach).max() < MAX_ACCUMULATOR
    assert all(is_power_of_two(float(scale)) for scale in layer.weight_scale)
    assert MAX_ACCUMULATOR <= 127 * 128 * 4_000  # as fine as int8 allows they would not fit


def test_the_same_weights_give_the_same_bytes() -> None:
    a, b = twins("tcn"), twins("tcn")
    assert a.int8.SerializeToString(deterministic=True) == b.int8.SerializeToString(
        deterministic=True
    )
    spec = small_spec("gru")
    parameters = random_parameters(spec, 1)
    first, second = (float_graph(spec, parameters, {})[0] for _ in range(2))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(
        deterministic=True
    )


def test_public_shapes_can_be_built() -> None:
    for arch, features, parameters in (("lstm-a", 100, 160_800), ("lstm-b", 250, 1_002_400)):
        spec = Spec(arch, features, N_FEATURES)
        found = describe(spec)
        head = found.layers["head"].shape
        assert found.parameters - head[0] * (head[1] + 1) == parameters


def test_an_unknown_architecture_and_too_few_features_are_refused() -> None:
    with pytest.raises(InputError, match="unknown architecture"):
        describe(Spec("rnn", N_FEATURES, 3))
    with pytest.raises(InputError, match="too few features"):
        describe(Spec("deeplob", 20, 3))


def test_layer_norm_takes_a_correctly_rounded_root() -> None:
    import torch

    from models.execute import Value, _Run
    from models.numerics import SchemeNumerics

    made = twins("attention")
    scale = made.scheme.points["attention.sum"].scale
    rng = np.random.default_rng(0)
    codes = rng.integers(-128, 128, size=(20_000, 32)).astype(np.float32)
    ops = _Run(made.spec, {}, SchemeNumerics(made.scheme), {}, False)
    x = torch.from_numpy(codes * np.float32(scale))[:, None, None]
    found = ops.layer_norm("norm", Value(x, "attention.sum")).tensor[:, 0, 0].numpy()
    total, squares = codes.sum(axis=1, keepdims=True), (codes * codes).sum(axis=1, keepdims=True)
    spread = np.float32(32) * squares - total * total + np.float32(1)
    expected = (np.float32(32) * codes - total) / np.sqrt(spread)
    point = made.scheme.points["norm"]
    assert np.array_equal(found, point.dequantise(point.quantise(expected)))
