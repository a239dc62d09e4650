"""The mask of the graph's value check, as the backend hands it on."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from engine.backends.integer_reference import IntegerReference
from engine.backends.onnx import WARM_UP_RUNS, OnnxBackend
from engine.bundle import Bundle, load_bundle
from engine.trust import CHECK_INPUT, CHECK_LAYERS
from tests.engine import integer_graphs
from tests.engine.bundles import make_bundle

Made = tuple[Bundle, IntegerReference]
BAD = (np.nan, np.inf, -np.inf, 1e30, -1e30, 4.001, -4.001)


@pytest.fixture(scope="module", params=[False, True], ids=["stateless", "stateful"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A checked bundle, and the reference of its INT8 model."""
    folder = tmp_path_factory.mktemp("checked")
    reference, _ = make_bundle(folder, stateful=request.param, checks=True)
    return load_bundle(folder), reference


def inputs(bundle: Bundle, n: int, seed: int = 0) -> np.ndarray:
    """Normalised inputs, some of them saturated, some half way between two codes."""
    return integer_graphs.inputs(np.random.default_rng(seed), n, bundle.n_features)


def masks(backend: OnnxBackend, x: np.ndarray, stream: int = 0) -> list[int]:
    """Masks row by row through one pair of arrays."""
    row = np.empty(backend.info().input_shape, np.float32)
    out = np.empty(backend.info().output_shape, np.float32)
    found = []
    for values in x:
        row[0] = values
        found.append(backend.infer(stream, row, out))
    return found


@pytest.mark.parametrize("threads", [1, 2])
def test_the_check_changes_no_bit_of_the_scores(made: Made, threads: int) -> None:
    bundle, reference = made
    x = inputs(bundle, 400)
    backend = OnnxBackend.open(bundle, threads=threads)
    row, out = np.empty((1, bundle.n_features), np.float32), np.empty(3, np.float32)
    expected = reference.run(x)
    for values, scores in zip(x, expected, strict=True):
        row[0] = values
        backend.infer(0, row, out)
        assert out.tobytes() == scores.tobytes()


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_what_is_wrong_with_an_input_is_said_of_that_inference_alone(
    made: Made, precision: str
) -> None:
    bundle, _ = made
    backend = OnnxBackend.open(bundle, precision=precision)
    x = np.zeros((2 * len(BAD), bundle.n_features), dtype=np.float32)
    x[::2, 11] = BAD
    found = [mask & CHECK_INPUT for mask in masks(backend, x)]
    expected = [CHECK_INPUT, 0] * len(BAD)
    if precision == "fp32" or not bundle.state("int8"):
        assert found == expected
    assert found[::2] == expected[::2]
    assert all(type(mask) is int for mask in found)


def test_a_layer_that_saturates_sets_its_bit(made: Made) -> None:
    bundle, _ = made
    checks = bundle.checks
    assert checks is not None
    found = masks(OnnxBackend.open(bundle), inputs(bundle, 400))
    layers = {i for mask in found for i in range(32) if mask >> (CHECK_LAYERS + i) & 1}
    assert layers, "inputs drive some layer into saturation"
    assert max(layers) < len(checks.int8)


def test_streams_do_not_see_each_others_masks(made: Made) -> None:
    bundle, _ = made
    backend = OnnxBackend.open(bundle, precision="fp32")
    bad, good = np.full((1, bundle.n_features), np.inf, dtype=np.float32), inputs(bundle, 1)
    for _ in range(3):
        assert masks(backend, bad, stream=1)[0] & CHECK_INPUT
        assert masks(backend, good, stream=2) == [0]


def test_a_model_without_a_check_has_nothing_to_say(tmp_path: Path) -> None:
    for stateful in (False, True):
        make_bundle(tmp_path / str(stateful), stateful=stateful)
        bundle = load_bundle(tmp_path / str(stateful))
        for precision in ("int8", "fp32"):
            backend = OnnxBackend.open(bundle, precision=precision)
            x = np.full((3, bundle.n_features), np.nan, dtype=np.float32)
            assert masks(backend, x) == [0, 0, 0]


def test_submitted_inferences_answer_as_they_did(made: Made) -> None:
    bundle, reference = made
    backend = OnnxBackend.open(bundle)
    x = inputs(bundle, 5)
    out = np.zeros(3, np.float32)
    for ticket in range(5):
        assert backend.submit(0, ticket, x[ticket : ticket + 1]) is True
    for ticket, scores in enumerate(reference.run(x)):
        assert backend.poll(out) == ticket
        assert out.tobytes() == scores.tobytes()
    assert backend.poll(out) == -1


def test_a_processor_that_hides_nan_is_found_out_and_made_up_for(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, _ = made
    assert not OnnxBackend.open(bundle)._misses_nan, "not on this one"
    true, seen = OnnxBackend.infer, []

    def blind(self: OnnxBackend, stream: int, x: np.ndarray, out: np.ndarray) -> int:
        seen.append(x.copy())
        return true(self, stream, x, out) & ~CHECK_INPUT

    with monkeypatch.context() as patch:
        patch.setattr(OnnxBackend, "infer", blind)
        backend = OnnxBackend.open(bundle)
    assert backend._misses_nan
    assert np.isnan(seen[WARM_UP_RUNS]).sum() == 1
    # The graph says nothing; the backend looks itself.
    x = np.zeros((1, bundle.n_features), dtype=np.float32)
    assert backend._checked(x) & CHECK_INPUT == backend._violations[0] & CHECK_INPUT
    x[0, 2] = np.nan
    backend._mask[0] = 0
    assert backend._checked(x) == CHECK_INPUT
    assert masks(backend, x)[0] & CHECK_INPUT


def test_the_last_bit_is_no_sign(made: Made) -> None:
    bundle, _ = made
    backend = OnnxBackend.open(bundle)
    backend._mask[0] = np.iinfo(np.int32).min
    assert backend._violations[0] == 1 << 31


def test_opening_leaves_no_trace_of_the_planted_nan(made: Made) -> None:
    bundle, reference = made
    x = inputs(bundle, 3)
    row, out = np.empty((1, bundle.n_features), np.float32), np.empty(3, np.float32)
    backend = OnnxBackend.open(bundle)
    for values, scores in zip(x, reference.run(x), strict=True):
        row[0] = values
        backend.infer(0, row, out)
        assert out.tobytes() == scores.tobytes()


def test_masks_keep_no_memory(made: Made) -> None:
    bundle, _ = made
    backend = OnnxBackend.open(bundle)
    x, out = np.zeros((1, bundle.n_features), np.float32), np.empty(3, np.float32)

    def growth() -> int:
        before = sys.getallocatedblocks()
        for _ in range(5_000):
            backend.infer(0, x, out)
        return sys.getallocatedblocks() - before

    assert min(growth() for _ in range(3)) < 10


def test_other_devices_get_the_model_without_its_check(made: Made) -> None:
    import onnxruntime as ort

    from engine.backends.onnx import _check_output, _plain

    bundle, _ = made
    session = ort.InferenceSession(
        _plain(bundle.model_bytes("int8")), providers=["CPUExecutionProvider"]
    )
    assert "violations" not in [output.name for output in session.get_outputs()]
    assert _check_output(bundle, "cuda") is None
    assert _check_output(bundle, "cpu") == "violations"
