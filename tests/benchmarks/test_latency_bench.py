"""``octick bench latency`` and ``octick bench overload``, small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import idle_cores as idling
from benchmarks.idle_cores import BY_OTHERS, LET_SLEEP, describe, idle_cores
from benchmarks.overload import _peak_per_s
from benchmarks.schedules import TICK_NS, arrivals_of, as_recorded, evenly, in_ticks
from benchmarks.stages import STAGES, time_stages
from benchmarks.wire_setup import wired
from engine import wakefulness
from engine.host import idle_driver
from engine.wakefulness import refusal
from feeds.errors import InputError
from feeds.simulator import Simulator
from feeds.tape_reader import TapeReader
from replay.session import choose_config
from tests.conftest import ROOT

REFERENCE = ROOT / "models" / "reference"
SECOND_NS = 1_000_000_000
CORES = sorted(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("market") / "market.tape"
    Simulator(seed=6, n_instruments=1).write_tape(path, 4_000)
    return path


def bench(*arguments: str) -> tuple[int, dict[str, object]]:
    done = subprocess.run(
        [sys.executable, "-m", "octick", "bench", *arguments, "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return done.returncode, found


def test_a_rate_is_a_schedule_and_not_a_pause_after_each_message() -> None:
    schedule = evenly(1_000, 2.0)
    assert len(schedule) == 2_000
    assert np.all(np.diff(schedule) == SECOND_NS // 1_000)


def test_recorded_times_are_those_of_the_busiest_stretch() -> None:
    arrivals = np.array([0, 1, 2, 10, 11, 12, 13, 14, 30], dtype=np.int64) * SECOND_NS
    assert as_recorded(arrivals, 4.5).tolist() == [k * SECOND_NS for k in range(5)]


def test_the_peak_is_that_of_the_busiest_ten_milliseconds() -> None:
    arrivals = np.array([0, 20, 21, 22, 23, 40, 60], dtype=np.int64) * 1_000_000
    assert _peak_per_s(arrivals) == 400.0


def test_an_overload_leaves_tick_by_tick() -> None:
    schedule = in_ticks(5_000, 1.0)
    assert len(schedule) == 5_000
    assert np.all(schedule % TICK_NS == 0)
    assert np.bincount(schedule // TICK_NS).tolist() == [5] * 1_000


def test_a_tape_of_several_instruments_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "two.tape"
    Simulator(seed=6, n_instruments=2).write_tape(path, 100)
    with pytest.raises(InputError, match="several instruments"):
        arrivals_of(path)


def test_every_stage_of_a_tick_is_timed(market: Path) -> None:
    config = choose_config([TapeReader(market).meta], None)
    stages = {one.stage: one for one in time_stages(market, REFERENCE, config)}
    assert tuple(stages) == STAGES
    assert {one.n for one in stages.values()} == {stages["send"].n}
    assert stages["send"].n > 3_000
    assert all(0 <= one.p50_ns <= one.p99_ns for one in stages.values())
    assert stages["features"].p50_ns > 0


def test_a_machine_that_refuses_is_measured_as_it_is_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wakefulness, "DEVICE", Path("dev/no_such_device"))
    monkeypatch.setattr(idling, "cores_stay_awake", lambda: False)
    with idle_cores(let_sleep=False) as cores:
        assert not cores.awake
        line = describe(*cores)
    assert "No such file or directory" in line
    assert "\n" not in line


def test_a_request_without_effect_is_not_told_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "device").touch()
    monkeypatch.setattr(wakefulness, "DEVICE", tmp_path / "device")
    monkeypatch.setattr(idling, "cores_stay_awake", lambda: False)
    with idle_cores(let_sleep=False) as cores:
        assert not cores.awake
        assert "doctor" in cores.why


def test_latency_stands_beside_an_echo_of_the_same_messages(market: Path) -> None:
    code, result = bench(
        *("latency", str(market), "--transport", "ipc", "--rate", "500", "--rate", "0"),
        *("--runs", "1", "--seconds", "1"),
    )
    assert code == 0
    for key in ("in_process", "wire", "echo", "jitter"):
        part = result[key]
        assert isinstance(part, dict)
        assert 0 < part["p50_us"] <= part["p99_us"] <= part["max_us"]
        assert part["n"] > 0
    wake = result["wake"]
    assert isinstance(wake, dict)
    # No order between the two: who wakes may lose its core within the call, and be back long after.
    assert 0 < wake["call_p50_us"] <= wake["call_p99_us"]
    assert 0 < wake["run_p50_us"] <= wake["run_p99_us"]
    cells = result["cells"]
    assert isinstance(cells, list)
    assert [cell["load"] for cell in cells] == ["500/s", "as recorded"]
    first = cells[0]
    assert first["lost"] == first["echo_lost"] == 0
    assert first["wire"]["n"] == first["echo"]["n"] == 450, "a tenth warms up"
    assert first["in_process"]["p50_us"] < first["wire"]["p50_us"]
    ratio = first["wire"]["p50_us"] / first["echo"]["p50_us"]
    assert result["wire_over_echo_p50"] == pytest.approx(ratio, rel=0.01)
    assert result["cores_awake"] or result["cores_awake_why"]
    if not refusal() and idle_driver(Path("/")) not in ("", "none"):
        assert (result["cores_awake"], result["cores_awake_why"]) == (True, "")


@pytest.mark.skipif(len(CORES) < 2, reason="one core: nowhere else to go")
def test_both_ends_keep_off_the_engine_s_core(market: Path) -> None:
    core = CORES[-1]
    with wired("ipc", market, REFERENCE, "compiled", off_core=core) as on:
        allowed = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "cmdline").read_bytes().decode().split("\0")
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if "benchmarks.wire_ends" in words and parent == os.getpid():
                role = words[words.index("benchmarks.wire_ends") + 1]
                allowed[role] = os.sched_getaffinity(int(path.name))
        on.finish()
    rest = set(CORES) - {core}
    assert allowed == {"send": rest, "receive": rest, "echo": set(CORES)}


def test_an_overload_is_held_against_what_was_sent(market: Path) -> None:
    code, result = bench(
        *("overload", str(market), "--rate", "3000", "--seconds", "1", "--let-sleep")
    )
    assert result["messages"] == 3_000
    # Another program may keep them awake all the same.
    assert result["cores_awake_why"] == (BY_OTHERS if result["cores_awake"] else LET_SLEEP)
    assert result["lost"] == result["gaps"] == 0
    assert result["books_equal"] is True
    assert 0 <= result["lag_p50_ms"] <= result["lag_max_ms"]  # type: ignore[operator]
    assert result["recovery_ms"] <= result["lag_max_ms"]  # type: ignore[operator]
    assert (code == 0) == result["ok"]
