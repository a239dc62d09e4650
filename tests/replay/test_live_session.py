"""A live session of real processes over ZeroMQ, and its replay from the tape it recorded."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from feeds.tape import SIGNAL
from feeds.tape_reader import TapeReader
from tests.conftest import ROOT
from tests.replay.processes import READY_S, SYMBOLS, Processes, stop


def test_a_recorded_session_replays_to_the_same_signals(
    processes: Processes, reference_bundle: Path
) -> None:
    market = processes.market("--rate", "600", "--seconds", "8")
    engine = processes.engine(processes.config(reference_bundle))
    seen = processes.folder / "seen.jsonl"
    watcher = processes.start("subscribe", processes.endpoint("signals"), "--json", out=seen)
    market.communicate(timeout=READY_S)
    totals = stop(engine)
    assert totals["lost"] == totals["gaps"] == totals["rejected"] == 0
    assert totals["tradable"] > 1_000
    result = processes.verify(reference_bundle)
    assert result["verification"]["differing"] == 0
    assert result["verification"]["recorded"] == result["signals"] == totals["signals"]
    watcher.send_signal(signal.SIGINT)
    watcher.communicate(timeout=30)
    received = [json.loads(line) for line in seen.read_text().splitlines()]
    assert len(received) > 1_000
    assert sum(message["lost_before"] for message in received) == 0


def test_a_session_with_faults_heals_and_still_replays(
    processes: Processes, reference_bundle: Path
) -> None:
    faults = ("drop:0.004:ALPHA", "duplicate:0.004:ALPHA", "reorder:0.004:BETA", "cross:0.001:BETA")
    options = [word for fault in faults for word in ("--fault", fault)]
    market = processes.market("--rate", "600", "--seconds", "8", *options)
    engine = processes.engine(processes.config(reference_bundle))
    told = processes.folder / "alerts.jsonl"
    alerts = ("subscribe", processes.endpoint("signals"), "--topic", "alert.", "--json")
    watcher = processes.start(*alerts, out=told)
    out, err = market.communicate(timeout=READY_S)
    injected = json.loads(out.splitlines()[-1])["faults"]
    assert sum(injected.values()) > 10, err
    totals = stop(engine)
    assert totals["gaps"] > 0
    assert totals["duplicates"] > 0
    assert processes.verify(reference_bundle)["verification"]["differing"] == 0
    with_gaps = {
        record.payload[8 + 16 : 8 + 48].tobytes().rstrip(b"\0").decode()
        for record in TapeReader(processes.tape).records()
        if record.kind == SIGNAL and int.from_bytes(record.payload[8 + 94 : 8 + 96], "little") & 2
    }
    assert "ALPHA" in with_gaps, "its gaps were told"
    assert "GAMMA" not in with_gaps, "and touched no instrument without faults"
    watcher.send_signal(signal.SIGINT)
    watcher.communicate(timeout=READY_S)
    texts = {
        (alert["symbol"], alert["text"]) for alert in map(json.loads, told.read_text().splitlines())
    }
    assert ("ALPHA", "book GAP") in texts
    assert not any(symbol == "GAMMA" for symbol, _ in texts)


def test_a_flooded_session_conflates_loses_nothing_and_replays(
    processes: Processes, reference_bundle: Path
) -> None:
    market = processes.market(*("--speed", "max", "--messages", "60000", "--wait-subscribers", "1"))
    extra = "[overload]\nconflate_after_ns = 1_000_000\nconflate_every_ns = 1_000_000_000\n"
    engine = processes.engine(processes.config(reference_bundle, extra=extra))
    market.communicate(timeout=READY_S)
    processes.wait_for_records(60_000)
    totals = stop(engine)
    assert totals["messages"] >= 60_000
    assert totals["lost"] == totals["gaps"] == 0
    assert totals["conflations"] > 0
    assert totals["lag_max_ms"] > 1.0
    assert totals["signals"] < totals["messages"] / 10, "an instrument has few in a second"
    result = processes.verify(reference_bundle)
    assert result["verification"]["differing"] == 0
    assert result["verification"]["recorded"] == totals["signals"]


def test_a_session_stopped_in_a_flood_tells_what_it_recorded(
    processes: Processes, reference_bundle: Path
) -> None:
    market = processes.market("--speed", "max", "--wait-subscribers", "1")
    engine = processes.engine(processes.config(reference_bundle))
    processes.wait_for_records(2_000)
    totals = stop(engine)
    market.kill()
    result = processes.verify(reference_bundle)
    assert result["messages"] == totals["messages"]
    assert result["verification"]["recorded"] == totals["signals"]


@pytest.mark.parametrize(
    ("how", "rehearses"),
    [("busy_poll = true\nuvloop = false", True), ("", True), ("warm_every_ns = 0", False)],
    ids=["busy", "asleep", "cold"],
)
def test_however_it_waits_a_session_replays_the_same(
    processes: Processes, reference_bundle: Path, how: str, rehearses: bool
) -> None:
    market = processes.market("--rate", "600", "--seconds", "3")
    config = processes.config(reference_bundle, extra=f"[loop]\n{how}\n")
    engine = processes.engine(config)
    market.communicate(timeout=READY_S)
    totals = stop(engine)
    assert totals["lost"] == 0
    assert totals["messages"] > 1_000
    assert (totals["rehearsals"] > 500) == rehearses
    assert processes.verify(reference_bundle)["verification"]["differing"] == 0


def test_a_late_joiner_gets_the_state_first(processes: Processes, reference_bundle: Path) -> None:
    market = processes.market("--rate", "400", "--seconds", "60")
    first = processes.engine(processes.config(reference_bundle), "--no-tape", "--seconds", "1")
    first.communicate(timeout=READY_S)
    engine = processes.engine(processes.config(reference_bundle))
    processes.wait_for_records(200)
    totals = stop(engine, signal.SIGTERM)
    assert totals["synced"] == len(SYMBOLS)
    assert totals["lost"] == 0
    processes.verify(reference_bundle)
    stop(market)


def test_a_killed_engine_leaves_a_readable_tape(
    processes: Processes, reference_bundle: Path
) -> None:
    processes.market("--rate", "600", "--seconds", "60")
    engine = processes.engine(processes.config(reference_bundle))
    processes.wait_for_records(500)
    engine.kill()
    engine.wait()
    reader = TapeReader(processes.tape)
    assert sum(1 for _ in reader.records(allow_truncated=True)) > 500
    assert reader.truncated_at is not None
    done = subprocess.run(
        [sys.executable, "-m", "octick", "tape", "verify", str(processes.tape)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("[model]", "[modell]"), "model"),
        (('symbol = "BETA"', 'symbol = "BETTA"'), "BETTA"),
        (("reference", "no_such_bundle"), "no_such_bundle"),
    ],
    ids=["unknown config key", "unknown symbol", "missing bundle"],
)
def test_a_daemon_that_cannot_start_says_why_in_one_line(
    processes: Processes, reference_bundle: Path, change: tuple[str, str], named: str
) -> None:
    processes.market("--seconds", "60")
    config = processes.config(reference_bundle)
    config.write_text(config.read_text().replace(*change))
    engine = processes.start("run", str(config))
    out, err = engine.communicate(timeout=READY_S)
    assert engine.returncode == 2
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, err
    assert named in errors[0]
    assert out == ""


def test_a_taken_endpoint_is_named(processes: Processes, reference_bundle: Path) -> None:
    processes.market("--seconds", "60")
    config = processes.config(reference_bundle)
    processes.engine(config, "--no-tape")
    second = processes.start("run", str(config), "--no-tape")
    _, err = second.communicate(timeout=READY_S)
    assert second.returncode == 2
    assert processes.endpoint("signals") in err
