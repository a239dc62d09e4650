"""The reference model: as shipped, and as its command rebuilds it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from engine.backends.qdq_graph import without_checks
from engine.bundle import Bundle, check_files, load_bundle
from engine.manifest import FP32_NAME, INT8_NAME, MANIFEST_NAME
from feeds.errors import InputError
from feeds.optimum import bayes_accuracy
from models.cli import reference
from models.dataset import Normalisation
from models.export import CALIBRATION_NAME, GOLDEN_NAME, RESEARCH_FP32_NAME, RESEARCH_INT8_NAME
from models.foreign.runtime import fused_nodes
from models.labels import CLASSES, classify, smoothed_move
from models.reference import HORIZON, MAX_BUNDLE_BYTES, build
from models.source import SOURCE_NAME
from models.step_session import StepSession
from models.train_run import simulated_rows
from models.verify import verify
from models.verify_system import TapeSource, recorded_rows

FILES = {
    MANIFEST_NAME,
    INT8_NAME,
    FP32_NAME,
    RESEARCH_INT8_NAME,
    RESEARCH_FP32_NAME,
    GOLDEN_NAME,
    CALIBRATION_NAME,
    SOURCE_NAME,
}
CHANCE = 1 / 3


@pytest.fixture(scope="module")
def shipped(reference_bundle: Path) -> Bundle:
    """The bundle in the repository."""
    return load_bundle(reference_bundle)


def measured(bundle: Bundle, seed: int, signal_strength: float) -> dict[str, float]:
    """Accuracies and agreement of a bundle on a session it has not seen."""
    rows, posterior = simulated_rows(150_000, seed, signal_strength)
    moves, chosen = [], []
    for slot in np.unique(rows.slot):
        own = np.flatnonzero(rows.slot == slot)
        ahead = smoothed_move(rows.mid_half_ticks[own], HORIZON)
        moves.append(ahead)
        chosen.append(own[: len(ahead)])
    move, labelled = np.concatenate(moves), np.concatenate(chosen)
    magnitudes = np.sort(np.abs(move))
    truth = classify(move, int(magnitudes[len(magnitudes) // 3]))
    x = Normalisation(bundle.mean, bundle.inv_scale, bundle.clip).apply(rows.vector[labelled])
    int8, fp32 = (
        StepSession(bundle.model_bytes(name), bundle.state(name)).run(x).argmax(axis=1)
        for name in ("int8", "fp32")
    )
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
    assert {path.name for path in shipped.path.iterdir()} == FILES
    check_files(shipped)
    assert sum((shipped.path / name).stat().st_size for name in FILES) < MAX_BUNDLE_BYTES


def test_the_shipped_bundle_verifies(shipped: Bundle) -> None:
    rows = recorded_rows(shipped, TapeSource(None))
    found = verify(shipped, rows, levels=("operator", "subgraph"))
    assert found.ok, [check for check in found.checks if not check.ok]


def test_every_dense_layer_runs_as_one_qgemm(shipped: Bundle) -> None:
    model = onnx.load(shipped.int8_path)
    dense = sum(node.op_type == "Gemm" for node in model.graph.node)
    assert dense == 3
    assert fused_nodes(without_checks(model)) == {"QGemm": dense, "QuantizeLinear": 1}
    assert fused_nodes(model)["QGemm"] == dense


@pytest.mark.parametrize("seed", [71, 72])
def test_it_finds_most_of_what_is_planted(shipped: Bundle, seed: int) -> None:
    found = measured(shipped, seed, 1.0)
    assert found["agreement"] >= 0.97
    assert found["int8"] > CHANCE + 0.25
    assert found["int8"] > found["optimum"] - 0.06
    assert abs(found["int8"] - found["fp32"]) < 0.01


def test_it_finds_nothing_where_nothing_is_planted(shipped: Bundle) -> None:
    assert abs(measured(shipped, 73, 0.0)["int8"] - CHANCE) < 0.06


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    reports = []
    for name, n in (("a", 1), ("b", 2), ("c", 1)):
        torch.set_num_threads(n)
        torch.manual_seed(n)  # the build has generators of its own
        reports.append(
            build(tmp_path / name, messages=120_000, seed=4 if name == "c" else 3, epochs=3)
        )
    torch.set_num_threads(threads)
    for file in FILES:
        first = (tmp_path / "a" / file).read_bytes()
        assert (tmp_path / "b" / file).read_bytes() == first, file
        assert (tmp_path / "c" / file).read_bytes() != first, file
    assert reports[0].model_hash == reports[1].model_hash != reports[2].model_hash
    assert reports[0].made.comparison.int8.accuracy > CHANCE + 0.1
    assert f"{load_bundle(tmp_path / 'a').model_hash:016x}" == reports[0].model_hash


@pytest.mark.slow
def test_the_command_prints_one_json_object(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        reference,
        ["--out", str(tmp_path / "bundle"), "--messages", "120000", "--epochs", "3", "--json"],
    )
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["agreement"] >= 0.97
    assert report["model_hash"] == load_bundle(tmp_path / "bundle").manifest.model_hash


def test_a_session_too_short_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="too few rows"):
        build(tmp_path / "bundle", messages=2_000)
    assert not (tmp_path / "bundle").exists()
