"""The integer network: exact by construction, close to the float one, and what ORT computes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.export import float_model, int8_model
from models.quantize import (
    HISTOGRAM_BINS,
    INT8_MAX,
    MAX_ACCUMULATOR,
    UINT8_MAX,
    IntegerNetwork,
    PercentileObserver,
    exponent_for,
    quantise,
    quantise_weight,
)

CLIP = 4.0
SIZES = (37, 64, 32, 3)


def random_network(
    seed: int, gain: float = 1.4
) -> tuple[IntegerNetwork, list[np.ndarray], list[np.ndarray]]:
    """An untrained float network, and the integers made of it."""
    rng = np.random.default_rng(seed)
    weights = [
        (rng.normal(size=(b, a)) * gain / np.sqrt(a)).astype(np.float32) for a, b in pairwise(SIZES)
    ]
    biases = [(rng.normal(size=b) * 0.1).astype(np.float32) for b in SIZES[1:]]
    batches = [
        np.clip(rng.normal(size=(500, SIZES[0])), -CLIP, CLIP).astype(np.float32) for _ in range(4)
    ]
    return quantise(weights, biases, batches, CLIP), weights, biases


def hard_inputs(rng: np.random.Generator, n: int) -> np.ndarray:
    """Ordinary, saturated, on rounding ties and extreme inputs."""
    x = rng.normal(size=(n, SIZES[0])) * rng.choice([0.1, 1.0, 30.0], size=(n, 1))
    x[::5] = np.sign(x[::5]) * CLIP
    x[1::5] = (np.rint(x[1::5] * 32) + 0.5) / 32
    return x.astype(np.float32)


@given(st.floats(1e-6, 1e6), st.sampled_from([127, 128, 255]))
def test_exponent_is_the_smallest_that_holds(greatest: float, levels: int) -> None:
    exponent = exponent_for(greatest, levels)
    assert levels * 2.0**exponent >= greatest
    assert exponent == -24 or levels * 2.0 ** (exponent - 1) < greatest


def test_observer_agrees_with_numpy_within_one_bin_in_any_batching() -> None:
    values = np.random.default_rng(5).exponential(size=50_000)
    exact = np.percentile(values, 99.99)
    for batches in (1, 7, 500):
        observer = PercentileObserver()
        for batch in np.array_split(np.sort(values), batches):
            observer.update(batch)
        top = 2.0 ** np.ceil(np.log2(values.max()))
        assert abs(observer.percentile(99.99) - exact) <= 2 * top / HISTOGRAM_BINS


def test_observer_of_nothing_has_no_range() -> None:
    observer = PercentileObserver()
    observer.update(np.zeros(10))
    assert observer.percentile(99.99) == 0.0


@given(st.integers(0, 2**32 - 1))
def test_weights_are_within_half_a_step_or_saturated(seed: int) -> None:
    weight = np.random.default_rng(seed).normal(size=(3, 20)).astype(np.float32)
    integers, exponents = quantise_weight(weight)
    step = np.ldexp(1.0, exponents)[:, None]
    error = np.abs(integers * step - weight)
    assert np.all((error <= step / 2) | (np.abs(integers) == INT8_MAX))


def test_accumulators_are_proven_to_fit_float32() -> None:
    network, _, _ = random_network(1)
    for layer in network.layers:
        assert layer.accumulator_bound() < MAX_ACCUMULATOR


def test_a_network_that_could_leave_the_exact_range_is_refused() -> None:
    weights = [np.full((2, 4000), 0.5, dtype=np.float32), np.ones((3, 2), dtype=np.float32)]
    biases = [np.zeros(2, dtype=np.float32), np.zeros(3, dtype=np.float32)]
    with pytest.raises(AssertionError, match="not exact"):
        quantise(weights, biases, [np.ones((4, 4000), dtype=np.float32)], CLIP)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fused_unfused_and_integer_arithmetic_give_the_same_bits(seed: int) -> None:
    network, _, _ = random_network(seed)
    data = int8_model(network).SerializeToString()
    sessions = []
    for level in (
        ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
        ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    ):
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.x64quantprecision", "1")
        sessions.append(ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]))
    x = hard_inputs(np.random.default_rng(seed + 100), 400)
    expected = network.forward(x)
    for session in sessions:
        found = np.concatenate([session.run(None, {"x": row[None]})[0] for row in x])
        assert found.tobytes() == expected.tobytes()


def test_integers_stay_close_to_the_float_network() -> None:
    network, weights, biases = random_network(4)
    rng = np.random.default_rng(9)
    x = np.clip(rng.normal(size=(4_000, SIZES[0])), -CLIP, CLIP).astype(np.float32)
    a = x.astype(np.float64)
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        a = np.maximum(a @ weight.T + bias, 0.0)
    exact = a @ weights[-1].T + biases[-1]
    assert (network.forward(x).argmax(axis=1) == exact.argmax(axis=1)).mean() > 0.96
    session = ort.InferenceSession(
        float_model(weights, biases).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    twin = np.concatenate([session.run(None, {"x": row[None]})[0] for row in x[:200]])
    np.testing.assert_allclose(twin, exact[:200], rtol=1e-4, atol=1e-4)


def test_hidden_activations_use_most_of_their_range() -> None:
    network, _, _ = random_network(6)
    first = network.layers[0]
    x = np.clip(np.random.default_rng(2).normal(size=(2_000, SIZES[0])), -CLIP, CLIP)
    q = np.clip(np.rint(np.ldexp(x, -first.in_exponent)) + 128, 0, UINT8_MAX).astype(np.int64)
    accumulator = (q - 128) @ first.weight.astype(np.int64).T + first.bias
    assert first.out_exponent is not None
    hidden = np.ldexp(
        accumulator.astype(np.float64),
        first.in_exponent + first.weight_exponent - first.out_exponent,
    )
    assert UINT8_MAX / 2.5 < np.percentile(np.maximum(hidden, 0), 99.99) <= UINT8_MAX + 1
