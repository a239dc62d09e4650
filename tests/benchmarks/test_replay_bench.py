"""`octick bench replay`: the keys that the README's figures are read from."""

from __future__ import annotations

import json
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
    monkeypatch.setattr("benchmarks.replay.SIMULATED_MESSAGES", MESSAGES)
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
