"""`octick bench replay`: the keys that the README's figures are read from."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import cli
from feeds.simulator import Simulator

MESSAGES = 3_000


@pytest.mark.parametrize("given", [True, False])
def test_bench_replay_measures_a_tape(
    given: bool, tmp_path: Path, reference_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A named tape, or the simulated market where no recording is found."""
    monkeypatch.setattr("benchmarks.replay.JITTER_S", 0.01)
    monkeypatch.setattr("benchmarks.source_tape.SIMULATED_MESSAGES", MESSAGES)
    monkeypatch.setenv("OCTICK_DATA", str(tmp_path))
    tape = tmp_path / "market.tape"
    Simulator(seed=1, n_instruments=1).write_tape(tape, MESSAGES)
    arguments = ["--json", "--runs", "2", "--model", str(reference_bundle)]
    result = CliRunner().invoke(cli.replay, [str(tape), *arguments] if given else arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert min(found[key] for key in ("levels_per_s", "messages_per_s", "signals_per_s")) > 0
    assert {"machine", "versions", "commit", "date", "jitter_p99_us"} <= set(found)
    assert len(found["features"]["seconds"]) == found["runs"] == 2
    assert found["features"]["messages"] >= MESSAGES
    # A whole vector after every message, none for signals: that is what is measured.
    assert found["features"]["feature_vectors"] > 0.9 * MESSAGES
    assert found["features"]["signals"] == 0
    assert found["signals"]["signals"] > 0
    assert len(found["digest"]) == 64
    # The same levels through the book alone, and through other books.
    assert found["book"]["levels"] == found["features"]["levels"]
    assert found["book_levels_per_s"] > 0
    assert found["dict_book"]["levels"] == found["features"]["levels"]
    assert found["book_over_dict"] > 0
    rivals = {"hftbacktest", "hftbacktest_local"}
    if importlib.util.find_spec("hftbacktest") is None:
        assert set(found["left_out"]) == {"hftbacktest"}
        return
    assert found["left_out"] == {}
    for rival in rivals:
        assert len(found[rival]["seconds"]) == 2
        assert min(found[f"{mine}_over_{rival}"] for mine in ("book", "features")) > 0
    assert found["versions"]["hftbacktest"] in found["hftbacktest"]["library"]


def test_what_runs_beside_ours_is_left_out_and_that_is_said(
    tmp_path: Path, reference_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.replay.JITTER_S", 0.01)
    monkeypatch.setitem(sys.modules, "hftbacktest", None)
    tape = tmp_path / "market.tape"
    Simulator(seed=1, n_instruments=2).write_tape(tape, 500)
    arguments = [str(tape), "--json", "--runs", "1", "--model", str(reference_bundle)]
    missing = json.loads(CliRunner().invoke(cli.replay, arguments).stdout)
    assert missing["hftbacktest"] is missing["book_over_hftbacktest"] is None
    assert missing["hftbacktest_local"] is None
    assert set(missing["left_out"]) == {"hftbacktest"}
    assert "pip install" in missing["left_out"]["hftbacktest"]
    assert missing["dict_book"]["levels"] == missing["book"]["levels"]

    unwanted = json.loads(CliRunner().invoke(cli.replay, [*arguments, "--no-rivals"]).stdout)
    assert unwanted["dict_book"] is unwanted["book_over_dict"] is None
    assert set(unwanted["left_out"]) == {"rivals"}
    assert unwanted["digest"] == missing["digest"]
