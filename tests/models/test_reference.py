"""The reference model: as shipped, and as its command rebuilds it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner

from engine.backends.onnx import session_options
from engine.bundle import FP32_NAME, INT8_NAME, MANIFEST_NAME, Bundle, load_bundle
from feeds.errors import InputError
from feeds.optimum import bayes_accuracy
from models.cli import reference
from models.dataset import Normalisation
from models.labels import CLASSES, classify
from models.reference import HORIZON, MAX_BUNDLE_BYTES, build, predict, session

FILES = (MANIFEST_NAME, INT8_NAME, FP32_NAME)
CHANCE = 1 / 3


@pytest.fixture(scope="module")
def shipped(reference_bundle: Path) -> Bundle:
    """The bundle in the repository."""
    return load_bundle(reference_bundle)


def measured(bundle: Bundle, seed: int, signal_strength: float) -> dict[str, float]:
    """Accuracies and agreement of a bundle on a session it has not seen."""
    rows, posterior = session(200_000, seed, signal_strength)
    labelled, moves = rows.moves(HORIZON)
    magnitudes = np.sort(np.abs(moves))
    truth = classify(moves, int(magnitudes[len(magnitudes) // 3]))
    x = Normalisation(bundle.mean, bundle.inv_scale, bundle.clip).apply(rows.features_of(labelled))
    int8, fp32 = (predict(bundle, precision, x).argmax(axis=1) for precision in ("int8", "fp32"))
    return {
        "int8": float((int8 == truth).mean()),
        "fp32": float((fp32 == truth).mean()),
        "optimum": bayes_accuracy(truth, posterior[labelled]),
        "agreement": float((int8 == fp32).mean()),
    }


def test_the_shipped_bundle_is_whole_and_small(shipped: Bundle) -> None:
    assert shipped.name == "reference"
    assert shipped.numerics == "exact-int8"
    assert shipped.classes == CLASSES
    assert sorted(path.name for path in shipped.path.iterdir()) == sorted(FILES)
    assert sum((shipped.path / name).stat().st_size for name in FILES) < MAX_BUNDLE_BYTES


def test_every_dense_layer_runs_as_one_qgemm(shipped: Bundle, tmp_path: Path) -> None:
    graph = onnx.load(shipped.int8_path).graph
    dense = sum(node.op_type == "Gemm" for node in graph.node)
    assert dense == 3
    options = session_options(1)
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(shipped.model_bytes("int8"), options, providers=["CPUExecutionProvider"])
    nodes = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert nodes == ["QuantizeLinear"] + ["QGemm"] * dense


def test_scales_are_powers_of_two_and_weights_int8_per_channel(shipped: Bundle) -> None:
    arrays = {
        item.name: onnx.numpy_helper.to_array(item)
        for item in onnx.load(shipped.int8_path).graph.initializer
    }
    scales = [array for name, array in arrays.items() if name.endswith("scale")]
    assert len(scales) == 3 + 2 * 3
    for scale in scales:
        assert np.all(np.frexp(scale)[0] == 0.5)
    for i in range(3):
        weight = arrays[f"dense{i}.weight.q"]
        assert weight.dtype == np.int8
        assert arrays[f"dense{i}.weight.scale"].shape == weight.shape[:1]
        assert not arrays[f"dense{i}.weight.zero_point"].any()


@pytest.mark.parametrize("seed", [71, 72])
def test_it_finds_most_of_what_is_planted(shipped: Bundle, seed: int) -> None:
    found = measured(shipped, seed, 1.0)
    assert found["agreement"] >= 0.97
    assert found["int8"] > CHANCE + 0.25
    assert found["int8"] > found["optimum"] - 0.06
    assert abs(found["int8"] - found["fp32"]) < 0.01


def test_it_finds_nothing_where_nothing_is_planted(shipped: Bundle) -> None:
    assert abs(measured(shipped, 73, 0.0)["int8"] - CHANCE) < 0.06


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    reports = []
    for name, n in (("a", 1), ("b", 2), ("c", 1)):
        torch.set_num_threads(n)
        torch.manual_seed(n)  # the build has generators of its own
        reports.append(
            build(tmp_path / name, messages=120_000, seed=4 if name == "c" else 3, epochs=2)
        )
    torch.set_num_threads(threads)
    for file in FILES:
        first = (tmp_path / "a" / file).read_bytes()
        assert (tmp_path / "b" / file).read_bytes() == first
        assert (tmp_path / "c" / file).read_bytes() != first
    assert reports[0].model_hash == reports[1].model_hash != reports[2].model_hash
    assert reports[0].int8.accuracy > CHANCE + 0.1
    assert f"{load_bundle(tmp_path / 'a').model_hash:016x}" == reports[0].model_hash


def test_the_command_prints_one_json_object(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    done = CliRunner().invoke(
        reference,
        ["--out", str(tmp_path / "bundle"), "--messages", "120000", "--epochs", "2", "--json"],
    )
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    assert report["agreement"] >= 0.97
    assert report["model_hash"] == load_bundle(tmp_path / "bundle").manifest.model_hash


def test_a_session_too_short_writes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    with pytest.raises(InputError, match="too few rows"):
        build(tmp_path / "bundle", messages=2_000)
    assert not (tmp_path / "bundle").exists()
