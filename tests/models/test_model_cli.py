"""The commands, as a person calls them: from a tape to a verified bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from engine.bundle import load_bundle
from feeds.errors import InputError
from feeds.simulator import Simulator
from models.bundle_cli import info, quantize, report, verify
from models.cli import train
from models.export import REPORT_NAME
from models.search_cli import tune

pytestmark = pytest.mark.slow


def call(command: Any, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(item) for item in arguments])


def answer(command: Any, *arguments: object) -> dict[str, Any]:
    done = call(command, *arguments, "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def tape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short simulated session."""
    path = tmp_path_factory.mktemp("tape") / "session.tape"
    Simulator(seed=4, n_instruments=2).write_tape(path, 50_000)
    return path


@pytest.fixture(scope="module")
def run(tape: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained on it."""
    out = tmp_path_factory.mktemp("run") / "gru"
    found = answer(
        train, "--tape", tape, "--arch", "gru", "--horizon", 50, "--epochs", 4, "--out", out
    )
    assert found["spec"]["arch"] == "gru"
    assert found["data"]["horizon"] == 50
    assert found["metrics"]["following"]["trades"] > 0
    assert set(found["baselines"]) == {"logistic"}
    return out


@pytest.fixture(scope="module")
def bundle(run: Path) -> Path:
    """And quantised."""
    found = answer(quantize, run, "--rows", 2_000)
    assert found["numerics"] == "exact-int8"
    assert found["failed"] == []
    return Path(found["bundle"])


def test_four_commands_lead_from_a_tape_to_a_verified_bundle(bundle: Path, tape: Path) -> None:
    found = answer(verify, bundle, "--tape", tape)
    assert found["ok"]
    assert found["system"]["tradable"] > 1_000
    assert found["system"]["agreement"] >= 0.97
    html = (bundle / REPORT_NAME).read_text()
    assert "<svg" in html
    assert "http" not in html.replace("http-equiv", "")
    (row,) = answer_list(report, bundle.parent)
    assert row["architecture"] == "gru"
    assert row["agreement"] > 0.97
    facts = answer(info, bundle)
    assert facts["model"] == load_bundle(bundle).manifest.model_hash
    assert facts["label"]["horizon"] == 50


def answer_list(command: Any, *arguments: object) -> list[dict[str, Any]]:
    done = call(command, *arguments, "--json")
    assert done.exit_code == 0, done.output
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_a_failed_check_exits_with_1(bundle: Path, tmp_path: Path, run: Path) -> None:
    import shutil

    import msgspec

    from engine.manifest import MANIFEST_NAME, Manifest
    from models.export import write_manifest

    free = tmp_path / "free"
    answer(quantize, run, "--scales", "free", "--rows", 2_000, "--out", free)
    manifest = msgspec.json.decode((free / MANIFEST_NAME).read_bytes(), type=Manifest)
    # What the bundle claims is more than it keeps.
    write_manifest(free, msgspec.structs.replace(manifest, numerics="exact-int8", bound=0.0))
    done = call(verify, free, "--level", "operator")
    assert done.exit_code == 1
    shutil.rmtree(free)


def test_the_same_command_again_gives_the_finished_run(run: Path, tape: Path) -> None:
    arguments = ["--tape", tape, "--arch", "gru", "--horizon", 50, "--epochs", 4, "--out", run]
    before = (run / "weights.npz").stat().st_mtime_ns
    answer(train, *arguments)
    assert (run / "weights.npz").stat().st_mtime_ns == before
    done = call(train, *arguments[:-2], "--epochs", 2, "--out", run)
    assert isinstance(done.exception, InputError)
    assert "another run" in str(done.exception)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--arch", "mlp"], "--tape"),
        (["--arch", "mlp", "--simulate", 10, "--tape", "TAPE"], "--tape"),
        (["--arch", "mlp", "--simulate", 50_000, "--trigger", "time"], "time:NANOSECONDS"),
    ],
)
def test_wrong_usage_exits_with_2(
    arguments: list[object], told: str, tape: Path, tmp_path: Path
) -> None:
    arguments = [tape if item == "TAPE" else item for item in arguments]
    done = call(train, *arguments, "--out", tmp_path / "run")
    assert done.exit_code == 2
    assert told in done.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--arch", "rnn", "--simulate", 5_000], "unknown architecture"),
        (["--arch", "mlp", "--simulate", 5_000, "--horizon", 50_000], "horizon of 50000"),
    ],
)
def test_bad_input_is_one_line(arguments: list[object], told: str, tmp_path: Path) -> None:
    done = call(train, *arguments, "--out", tmp_path / "run")
    assert isinstance(done.exception, InputError)
    assert told in str(done.exception)
    assert "\n" not in str(done.exception)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    done = call(quantize, tmp_path)
    assert isinstance(done.exception, InputError)
    assert "no finished training run" in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_no_signal_means_nothing_to_find(tmp_path: Path) -> None:
    found = answer(
        train,
        *("--simulate", 120_000, "--signal-strength", 0, "--arch", "mlp"),
        *("--epochs", 1, "--out", tmp_path / "run"),
    )
    assert abs(found["metrics"]["balanced_accuracy"] - 1 / 3) < 0.05
    assert np.isclose(found["metrics"]["information_coefficient"], 0.0, atol=0.1)


def test_what_a_search_measured_stands_in_later_reports(run: Path, tmp_path: Path) -> None:
    found = answer(tune, run, "--trials", 2, "--searcher", "random")
    assert len(found["points"]) == 2
    assert 1 <= len(found["front"]) <= 2
    assert sum(point["on_front"] for point in found["points"]) == len(found["front"])
    assert Path(found["plot"]).read_bytes().startswith(b"\x89PNG")
    answer(quantize, run, "--rows", 2_000, "--out", tmp_path / "bundle")
    assert "No search was given" not in (tmp_path / "bundle" / REPORT_NAME).read_text()
    done = call(tune, run, "--trials", 2, "--searcher", "random")
    assert isinstance(done.exception, InputError)  # a log is never overwritten
    again = answer(tune, run, "--trials", 2, "--searcher", "random", "--resume")
    assert again["points"] == found["points"]
