"""A live session of real processes over ZeroMQ, and its replay from the tape it recorded."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from feeds.errors import InputError
from feeds.tape import SIGNAL
from feeds.tape_reader import TapeReader
from tests.conftest import ROOT

READY_S = 180.0
SYMBOLS = ("ALPHA", "BETA", "GAMMA")


class Processes:
    """Children of one test, all gone at its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.children: list[subprocess.Popen[str]] = []
        self.tape = folder / "session.tape"

    def endpoint(self, name: str) -> str:
        return f"ipc://{self.folder}/{name}"

    def start(self, *args: str, out: Path | None = None) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-m", "octick", *args],
            stdout=subprocess.PIPE if out is None else out.open("w"),
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        self.children.append(child)
        return child

    def config(self, bundle: Path, symbols: tuple[str, ...] = SYMBOLS, extra: str = "") -> Path:
        text = (
            f'[[feed]]\nendpoint = "{self.endpoint("feed")}"\n'
            f'snapshot_endpoint = "{self.endpoint("snapshots")}"\n'
            f'[model]\nbundle = "{bundle}"\n[publish]\nendpoint = "{self.endpoint("signals")}"\n'
            f'[tape]\npath = "{self.tape}"\n[limits]\nsnapshot_timeout_ns = 100_000_000\n{extra}'
        )
        for symbol in symbols:
            text += f'[[instrument]]\nvenue = "sim"\nsymbol = "{symbol}"\n'
        path = self.folder / "engine.toml"
        path.write_text(text)
        return path

    def engine(self, config: Path, *args: str) -> subprocess.Popen[str]:
        """A daemon that has said READY."""
        child = self.start("run", str(config), "--json", *args)
        assert child.stderr is not None
        deadline = time.monotonic() + READY_S
        seen = ""
        while time.monotonic() < deadline:
            line = child.stderr.readline()
            seen += line
            if line.startswith("READY"):
                return child
            if not line:
                break
        pytest.fail(f"the engine did not become ready: {seen}")

    def market(self, *args: str) -> subprocess.Popen[str]:
        return self.start(
            *("publish", "sim", "--bind", self.endpoint("feed")),
            *("--snapshots", self.endpoint("snapshots"), "--instruments", "3", "--json", *args),
        )

    def wait_for_records(self, count: int) -> None:
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            # The engine writes on meanwhile: the last record may be read half done.
            with contextlib.suppress(InputError):
                if sum(1 for _ in TapeReader(self.tape).records(allow_truncated=True)) > count:
                    return
        pytest.fail(f"the tape did not grow to {count} records")

    def verify(self, bundle: Path) -> dict[str, Any]:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "octick", "replay", str(self.tape)),
                *("--model", str(bundle), "--verify", "--json"),
            ],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr + done.stdout
        result: dict[str, Any] = json.loads(done.stdout)
        return result


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path)
    yield made
    for child in made.children:
        if child.poll() is None:
            child.kill()
        child.communicate()


def stop(child: subprocess.Popen[str], number: int = signal.SIGINT) -> dict[str, Any]:
    """End a child as an operator would; its closing JSON."""
    child.send_signal(number)
    out, err = child.communicate(timeout=30)
    assert child.returncode == 0, err
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


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


def test_busy_polling_records_and_replays_the_same(
    processes: Processes, reference_bundle: Path
) -> None:
    market = processes.market("--rate", "600", "--seconds", "3")
    config = processes.config(reference_bundle, extra="[loop]\nbusy_poll = true\nuvloop = false\n")
    engine = processes.engine(config)
    market.communicate(timeout=READY_S)
    totals = stop(engine)
    assert totals["lost"] == 0
    assert totals["messages"] > 1_000
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
