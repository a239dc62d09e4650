"""`octick bench start`: one start after another of the shipped config."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from benchmarks import daemon_cli
from benchmarks.start import import_times


def test_stages_add_up_to_the_start_and_nothing_is_compiled_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("benchmarks.start.AFTER_S", 0.2)
    done = CliRunner().invoke(daemon_cli.start, ["--runs", "1", "--json"])
    assert done.exit_code in (0, 1), done.output
    result = json.loads(done.stdout)
    assert result["ok"] == (done.exit_code == 0)
    times = result["start_to_ready_s"]
    assert times["n"] == len(times["runs"]) == 1
    assert 0 < times["p50"] <= times["max"]
    assert result["compilations_after_ready"] == 0
    assert result["compiled"] == []
    assert {"imports", "backend", "handshake", "warm-up", "report"} <= set(result["stages_s"])
    assert sum(result["stages_s"].values()) == pytest.approx(times["p50"], abs=0.1)
    assert {"numba", "engine", "feeds"} <= set(result["imports_s"])
    assert {"machine", "versions", "commit", "date", "jitter"} <= set(result)


def test_import_times_are_summed_by_package() -> None:
    lines = [
        "import time: self [us] | cumulative | imported package\n",
        "import time:    300000 |     300000 |   numba.core\n",
        "import time:    200000 |     500000 | numba\n",
        "import time:     50000 |     550000 | zmq\n",
        "READY: whatever | it | says\n",
    ]
    assert import_times(lines) == {"numba": 0.5, "zmq": 0.05}
