"""Streams of a model with state: each from its own, whatever happens to the others."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from engine import features
from engine.backends.integer_reference import IntegerReference
from engine.backends.onnx import OnnxBackend
from engine.bundle import Bundle, load_bundle
from feeds.errors import InputError
from tests.engine import integer_graphs, onnx_sessions
from tests.engine.bundles import float_twin, make_bundle, write_models
from tests.engine.integer_graphs import X_EXPONENT, X_ZERO, GraphBuilder

Made = tuple[Bundle, IntegerReference]


@pytest.fixture(params=onnx_sessions.KINDS, autouse=True)
def each_session(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is said here holds for both kinds of session."""
    onnx_sessions.use(request.param, monkeypatch)


@pytest.fixture(scope="module")
def stateful(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A bundle of models that remember, and the reference of its INT8 model."""
    folder = tmp_path_factory.mktemp("stateful")
    reference, _ = make_bundle(folder, stateful=True)
    return load_bundle(folder), reference


def inputs(bundle: Bundle, n: int, seed: int = 0) -> np.ndarray:
    """Normalised inputs, some of them saturated, some half way between two codes."""
    return integer_graphs.inputs(np.random.default_rng(seed), n, bundle.n_features)


Streams = dict[int, np.ndarray]


def interleaved(backend: OnnxBackend, streams: Streams) -> Streams:
    """Outputs of several streams, stepped in turn through one pair of arrays."""
    found: dict[int, list[np.ndarray]] = {stream: [] for stream in streams}
    row = np.empty(backend.info().input_shape, np.float32)
    out = np.empty(backend.info().output_shape, np.float32)
    for i in range(max(len(x) for x in streams.values())):
        for stream, x in streams.items():
            if i < len(x):
                row[0] = x[i]
                backend.infer(stream, row, out)
                found[stream].append(out.copy())
    return {stream: np.array(rows) for stream, rows in found.items()}


@pytest.mark.parametrize("threads", [1, 2])
def test_each_stream_goes_on_from_its_own_state(stateful: Made, threads: int) -> None:
    bundle, reference = stateful
    streams = {stream: inputs(bundle, 120 + stream, seed=stream) for stream in (0, 1, 7)}
    found = interleaved(OnnxBackend.open(bundle, threads=threads), streams)
    for stream, x in streams.items():
        assert found[stream].tobytes() == reference.run(x).tobytes()


def test_opening_leaves_no_trace_in_a_stream(stateful: Made) -> None:
    bundle, reference = stateful
    x = inputs(bundle, 3)
    for _ in range(2):
        found = interleaved(OnnxBackend.open(bundle), {0: x})
        assert found[0].tobytes() == reference.run(x).tobytes()


def test_a_reset_stream_starts_afresh_and_no_other_does(stateful: Made) -> None:
    bundle, reference = stateful
    backend = OnnxBackend.open(bundle)
    x = inputs(bundle, 60)
    backend.reset(1)  # nothing has begun: nothing to do
    for n in (7, 8):  # either set of arrays may be the one that is read next
        backend.reset(0)
        found = interleaved(backend, {0: x[:n]})
        assert found[0].tobytes() == reference.run(x[:n]).tobytes()
    whole = reference.run(x)
    first = interleaved(backend, {1: x[:33]})
    backend.reset(0)
    second = interleaved(backend, {0: x[:27], 1: x[33:]})
    assert np.concatenate([first[1], second[1]]).tobytes() == whole.tobytes()
    assert second[0].tobytes() == whole[:27].tobytes()


def test_the_float_twin_remembers_too(stateful: Made) -> None:
    bundle, _ = stateful
    x = inputs(bundle, 50)
    plain = integer_graphs.session(bundle.model_bytes("fp32"), fused=False)
    expected, _ = integer_graphs.run_session(plain, list(bundle.state("fp32")), x)
    found = interleaved(OnnxBackend.open(bundle, precision="fp32"), {0: x, 1: x})
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)
    assert found[0].tobytes() == found[1].tobytes()


def test_streams_take_other_arrays_at_any_time(stateful: Made) -> None:
    bundle, reference = stateful
    backend = OnnxBackend.open(bundle)
    x = inputs(bundle, 30)
    expected = reference.run(x)
    rows = [x[i : i + 1].copy() for i in range(30)]
    outs = [np.empty(3, np.float32) for _ in range(2)]
    for i, row in enumerate(rows):
        backend.infer(4, row, outs[i % 2])
        assert outs[i % 2].tobytes() == expected[i].tobytes()


def test_a_failed_step_leaves_the_state_as_it_was(stateful: Made) -> None:
    bundle, reference = stateful
    backend = OnnxBackend.open(bundle)
    x, wild = inputs(bundle, 40), inputs(bundle, 40, seed=9)
    expected = reference.run(x)
    row, out = np.empty((1, bundle.n_features), np.float32), np.empty(3, np.float32)
    row[0] = x[0]
    backend.infer(0, row, out)
    failing = onnx_sessions.Failing(backend)
    for i in range(1, 40):
        failing.fails = True
        for _ in range(i % 3):
            row[0] = wild[i]
            with pytest.raises(RuntimeError, match=onnx_sessions.GONE):
                backend.infer(0, row, out)
        failing.fails = False
        row[0] = x[i]
        backend.infer(0, row, out)
        assert out.tobytes() == expected[i].tobytes()


def test_arrays_that_cannot_be_bound_take_no_step(stateful: Made) -> None:
    bundle, reference = stateful
    backend = OnnxBackend.open(bundle)
    x = inputs(bundle, 2)
    expected = reference.run(x)
    out = np.zeros(3, np.float32)
    backend.infer(0, x[:1].copy(), out)
    for bad_x, bad_out in ((x[:1].astype(np.float64), out), (x[:2], out), (x[:1], out[:2])):
        with pytest.raises(AssertionError):
            backend.infer(0, bad_x, bad_out)
    with pytest.raises(AssertionError, match="stream"):
        backend.infer(-1, x[:1], out)
    backend.infer(0, x[1:], out)
    assert out.tobytes() == expected[1].tobytes()


def test_a_step_of_a_known_stream_keeps_no_memory(stateful: Made) -> None:
    bundle, _ = stateful
    backend = OnnxBackend.open(bundle)
    x, out = np.zeros((1, bundle.n_features), np.float32), np.empty(3, np.float32)

    def growth() -> int:
        before = sys.getallocatedblocks()
        for i in range(10_000):
            backend.infer(i % 4, x, out)
            if i % 100 == 0:
                backend.reset(i % 4)
        return sys.getallocatedblocks() - before

    assert min(growth() for _ in range(3)) < 10


def test_submitted_steps_keep_order_and_state(stateful: Made) -> None:
    bundle, reference = stateful
    backend = OnnxBackend.open(bundle)
    xs = [inputs(bundle, 100, seed=stream) for stream in range(2)]
    expected = [reference.run(x) for x in xs]
    out = np.zeros(3, np.float32)
    for i in range(100):
        for stream in range(2):
            assert backend.submit(stream, 2 * i + stream, xs[stream][i : i + 1].copy())
        if i % 7 == 0 or i == 99:
            first = max(0, (i - 1) // 7 * 7 + 1) if i else 0
            for j in range(first, i + 1):
                for stream in range(2):
                    assert backend.poll(out) == 2 * j + stream
                    assert out.tobytes() == expected[stream][j].tobytes()
    assert backend.poll(out) == -1


def test_a_closed_backend_takes_no_step(stateful: Made) -> None:
    bundle, _ = stateful
    backend = OnnxBackend.open(bundle)
    x, out = np.zeros((1, bundle.n_features), np.float32), np.empty(3, np.float32)
    backend.infer(0, x, out)
    backend.close()
    backend.reset(0)
    with pytest.raises(AssertionError, match="closed"):
        backend.infer(0, x, out)


def test_a_model_whose_state_alone_is_inexact_does_not_open(tmp_path: Path) -> None:
    # Its scores need the input only; the sum that it remembers is fused into a node that rounds
    # ties with the odd zero point inside.
    rng = np.random.default_rng(0)
    g = GraphBuilder(features.N_FEATURES)
    q = g.quantise("x", X_EXPONENT, X_ZERO)
    last = g.remember("sum", "uint8", (1, features.N_FEATURES), 1.0)
    parts = [g.dequantise(q, X_EXPONENT, X_ZERO), g.dequantise(last, X_EXPONENT, 1)]
    g.quantise(g.node("Add", parts), X_EXPONENT + 1, 1, out="sum.next")
    g.dense(rng, q, (X_EXPONENT, X_ZERO), (features.N_FEATURES, 3), name="head", out="logits")
    write_models(tmp_path, g, float_twin(rng, features.N_FEATURES, 3, stateful=False))
    with pytest.raises(InputError, match="not exact on this machine") as caught:
        OnnxBackend.open(load_bundle(tmp_path))
    assert "state sum.last" in caught.value.where
