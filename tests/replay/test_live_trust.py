"""What can go wrong beside a live engine, injected for real, and the replay of its tape."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from engine import trust
from engine.control import Command, ask
from engine.manifest import INT8_NAME, read_manifest
from engine.trust_events import (
    COMMAND_NAMES,
    HALT,
    INFERENCE_LATE,
    RECALIBRATION,
    SHADOW_LOST,
    SHADOW_UP,
    SWAP,
    SWAP_REFUSED,
    Control,
    decode_event,
)
from feeds import codec, tape, wire
from feeds.tape_reader import TapeReader
from tests.engine import onnx_sessions
from tests.engine.bundles import write_manifest
from tests.replay.processes import Processes, stop

TIMEOUT_S = 180.0
TRUST = """
[shadow]
every = 1
lost_after_ns = 500_000_000
restart_after_ns = 500_000_000
[control]
endpoint = "{control}"
[evidence]
folder = "{evidence}"
"""
# A daemon whose model hangs once, as a device that stalls would make it: where a kernel runs the
# model, and where Python does.
HANGS = """
import ctypes, sys, time
from engine.backends import onnx_native, onnx_providers
from engine.backends.onnx import OnnxBackend
calls, warm, kept = [0], [False], []
def hang():
    calls[0] += warm[0]
    if calls[0] == 50:
        calls[0] += 1
        time.sleep(2.0)
def native():
    init, address = onnx_native.NativeRunner.__init__, ctypes.c_void_p
    kind = ctypes.CFUNCTYPE(address, address, address, address)
    def hanging(self, *arguments):
        init(self, *arguments)
        run = kind(int(self._arena[onnx_native.RUN]))
        def slow(*arguments):
            hang()
            return run(*arguments) or 0
        kept.append(kind(slow))
        self._arena[onnx_native.RUN] = ctypes.cast(kept[-1], address).value
    onnx_native.NativeRunner.__init__ = hanging
def python():
    onnx_providers.find_api = lambda: None
    infer = OnnxBackend.infer
    def hanging(self, *arguments):
        hang()
        return infer(self, *arguments)
    OnnxBackend.infer = hanging
SESSION()
import octick
from engine.daemon import Daemon
run = Daemon.run
async def marked(self, seconds=0.0):
    warm[0] = True
    return await run(self, seconds)
Daemon.run = marked
octick.main()
"""


class Session:
    """One engine under test and its control socket."""

    def __init__(self, processes: Processes, bundle: Path, extra: str = "") -> None:
        self.processes = processes
        self.bundle = bundle
        self.endpoint = processes.endpoint("control")
        self.evidence = processes.folder / "evidence"
        sections = TRUST.format(control=self.endpoint, evidence=self.evidence) + extra
        self.config = processes.config(bundle, extra=sections)

    def ask(self, name: Any, **fields: str) -> dict[str, Any]:
        return ask(self.endpoint, Command(name, **fields), timeout_s=TIMEOUT_S)

    def until(self, good: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            status = self.ask("status")
            if good(status):
                return status
            time.sleep(0.02)
        pytest.fail(f"never came: {what}; last {status}")

    def events(self, *, live: bool = False) -> list[Control]:
        found = [
            decode_event(bytes(record.payload))
            for record in TapeReader(self.processes.tape).records(allow_truncated=live)
            if record.kind == tape.CONTROL
        ]
        return [event for event in found if isinstance(event, Control)]

    def commands(self) -> list[int]:
        return [event.command for event in self.events()]

    def signals(self) -> list[np.void]:
        return [
            codec.decode_block(bytes(record.payload), wire.SIGNAL_DTYPE)
            for record in TapeReader(self.processes.tape).records()
            if record.kind == tape.SIGNAL
        ]

    def verify(self) -> dict[str, Any]:
        result = self.processes.verify(self.bundle)
        assert result["verification"]["differing"] == 0
        assert result["trust_events"]
        return result


def assert_no_tick_missed(signals: list[np.void]) -> None:
    for symbol in {bytes(s["symbol"]) for s in signals}:
        seqs = [int(s["signal_seq"]) for s in signals if bytes(s["symbol"]) == symbol]
        assert seqs == list(range(1, len(seqs) + 1))


def perturbed(bundle: Path, folder: Path) -> Path:
    """A bundle whose INT8 weights have gone wrong, whole and with hashes that fit."""
    shutil.copytree(bundle, folder)
    path = folder / INT8_NAME
    model = onnx.load(path)
    weights = [
        item
        for item in model.graph.initializer
        if item.data_type == onnx.TensorProto.INT8 and len(item.dims) == 2
    ]
    values = numpy_helper.to_array(weights[0])
    weights[0].CopyFrom(numpy_helper.from_array(np.roll(values, 7, axis=1), weights[0].name))
    path.write_bytes(model.SerializeToString(deterministic=True))
    manifest = msgspec.structs.replace(
        read_manifest(bundle / "manifest.json"),
        int8_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )
    write_manifest(folder, manifest)
    return folder


def test_a_model_that_has_gone_wrong_is_demoted_with_evidence_and_no_tick_is_missed(
    processes: Processes, reference_bundle: Path
) -> None:
    bundle = perturbed(reference_bundle, processes.folder / "wrong")
    extra = "[failover]\ndivergence = 1.0\ndivergences = 8\ndivergences_in = 64\n"
    session = Session(processes, bundle, extra)
    processes.market("--rate", "600", "--seconds", "60")
    engine = processes.engine(session.config)
    status = session.until(lambda s: s["mode"] == "FP32", "FP32")
    assert status["shadow_state"] == "diverged"
    session.until(lambda s: s["tradable"] > 200, "tradable signals of FP32")
    stop(engine)
    signals = session.signals()
    assert_no_tick_missed(signals)
    precisions = [int(s["precision"]) for s in signals if s["reasons"] == 0]
    switch = precisions.index(trust.PRECISION_FP32)
    assert set(precisions[switch:]) == {trust.PRECISION_FP32}
    answers = [record.kind for record in TapeReader(processes.tape).records()]
    assert answers.count(tape.SHADOW) > 8
    (file,) = session.evidence.iterdir()
    evidence = json.loads(file.read_text())
    assert evidence["rule"] == "divergences"
    assert (evidence["from"], evidence["to"]) == ("INT8", "FP32")
    assert set(evidence["scores"]) == {"int8", "fp32"}
    assert session.verify()["transitions"] == 1


def test_a_shadow_that_dies_or_stops_is_said_and_comes_back_by_itself(
    processes: Processes, reference_bundle: Path
) -> None:
    session = Session(processes, reference_bundle)
    processes.market("--rate", "300", "--seconds", "90")
    engine = processes.engine(session.config)
    status = session.until(lambda s: s["shadow_answers"] > 20, "answers")
    assert status["shadow_state"] == "agreeing"
    os.kill(status["shadow_pid"], signal.SIGKILL)
    session.until(lambda s: s["shadow_state"] == "lost", "lost")
    status = session.until(lambda s: s["shadow_state"] == "agreeing", "back")
    assert status["shadow_restarts"] >= 1

    os.kill(status["shadow_pid"], signal.SIGSTOP)
    session.until(lambda s: s["shadow_state"] == "lost", "lost again")
    os.kill(status["shadow_pid"], signal.SIGCONT)
    back = session.until(lambda s: s["shadow_state"] == "agreeing", "back again")

    os.kill(back["shadow_pid"], signal.SIGSTOP)  # and never goes on
    status = session.until(
        lambda s: s["shadow_state"] == "agreeing" and s["shadow_pid"] != back["shadow_pid"],
        "another one in its place",
    )
    session.until(lambda s: s["shadow_answers"] > back["shadow_answers"] + 20, "answers again")
    totals = stop(engine)
    assert totals["lost"] == 0
    commands = session.commands()
    # At least: a machine with other things to do may make it silent once more.
    assert commands.count(SHADOW_LOST) >= 3
    assert commands.count(SHADOW_UP) >= 4
    signals = session.signals()
    assert_no_tick_missed(signals)
    states = {int(s["shadow_state"]) for s in signals}
    assert {trust.SHADOW_AGREEING, trust.SHADOW_LOST} <= states
    session.verify()
    with pytest.raises(ProcessLookupError):
        os.kill(status["shadow_pid"], 0)


@pytest.mark.parametrize("kind", onnx_sessions.KINDS)
def test_an_inference_that_hangs_is_reported_suppressed_and_halts(
    processes: Processes, reference_bundle: Path, kind: str
) -> None:
    session = Session(processes, reference_bundle)
    processes.market("--rate", "600", "--seconds", "60")
    engine = processes.ready(
        processes.python("-c", HANGS.replace("SESSION", kind), "run", str(session.config), "--json")
    )
    status = session.until(lambda s: s["mode"] == "HALTED", "HALTED")
    assert status["halted_why"].startswith("hang_ns: 2,")
    assert status["suppressed"]["LATE"] == 1
    armed = session.ask("arm", by="Ada")
    session.until(lambda s: s["tradable"] > armed["tradable"] + 200, "tradable signals")
    stop(engine)
    late = [event for event in session.events() if event.command == INFERENCE_LATE]
    assert len(late) == 1
    assert late[0].value >= 2_000_000_000
    signals = session.signals()
    assert_no_tick_missed(signals)
    (held,) = [s for s in signals if s["reasons"] & trust.REASON_LATE]
    assert int(held["signal_seq"]) == late[0].signal_seq
    assert int(held["predicted_class"]) == trust.NO_CLASS
    session.verify()


def test_halts_commands_and_refused_bundles_of_one_session_replay_to_the_same_digest(
    processes: Processes, reference_bundle: Path
) -> None:
    halt_file = processes.folder / "HALT"
    extra = f'[controls]\nstart_halted = true\nhalt_file = "{halt_file}"\n'
    session = Session(processes, reference_bundle, extra)
    processes.market("--rate", "600", "--seconds", "120")
    engine = processes.engine(session.config)
    status = session.until(lambda s: s["suppressed"]["HALTED"] > 50, "halted signals")
    assert status["mode"] == "HALTED"
    assert status["halted_why"] == "start_halted"
    assert status["tradable"] == 0
    assert "nobody named" in session.ask("arm")["error"], "only a named person may"
    assert session.ask("arm", by="Ada")["mode"] == "INT8"
    session.until(lambda s: s["tradable"] > 20, "tradable signals")

    assert session.ask("halt", by="Ada", reason="news")["mode"] == "HALTED"
    session.ask("arm", by="Ada")
    halt_file.touch()
    session.until(lambda s: s["mode"] == "HALTED", "halted by the file")
    halt_file.unlink()
    time.sleep(0.05)
    session.ask("arm", by="Ada")
    engine.send_signal(signal.SIGUSR1)
    session.until(lambda s: s["mode"] == "HALTED", "halted by the signal")
    session.ask("arm", by="Ada")

    assert session.ask("demote", by="Ada")["mode"] == "FP32"
    assert session.ask("promote", by="Ada")["mode"] == "INT8"
    assert "no model served before" in session.ask("rollback")["error"]
    wrong = perturbed(reference_bundle, processes.folder / "wrong")
    worse = session.ask("swap", bundle=str(wrong), by="Ada")
    assert not worse["ok"]
    assert "refused" in worse["error"]
    torn = processes.folder / "torn"
    shutil.copytree(reference_bundle, torn)
    (torn / INT8_NAME).write_bytes((torn / INT8_NAME).read_bytes()[:-9])
    assert "SHA-256" in session.ask("swap", bundle=str(torn))["error"]
    nowhere = session.ask("swap", bundle=str(processes.folder / "nowhere"))
    assert "nowhere" in nowhere["error"]
    status = session.ask("status")
    assert status["bundle"] == str(reference_bundle)
    assert status["swaps"] == 0
    stop(engine)

    commands = session.commands()
    assert commands.count(HALT) == 3
    assert commands.count(SWAP_REFUSED) == 3, [COMMAND_NAMES[c] for c in commands]
    events = list(TapeReader(processes.tape).records())
    halted = armed = False
    for record in events:
        if record.kind == tape.CONTROL:
            event = decode_event(bytes(record.payload))
            assert isinstance(event, Control)
            halted = event.command == HALT or (halted and event.by != "Ada")
            armed = armed or event.by == "Ada"
        elif record.kind == tape.SIGNAL and (halted or not armed):
            block = codec.decode_block(bytes(record.payload), wire.SIGNAL_DTYPE)
            assert block["reasons"] != 0, "nothing is tradable while it is halted"
    assert session.verify()["transitions"] == 9


@pytest.mark.slow
def test_a_recalibration_from_the_live_tape_takes_over_and_a_rollback_undoes_it(
    processes: Processes, reference_bundle: Path
) -> None:
    made = processes.folder / "recalibrated"
    extra = f'[recalibration]\nfolder = "{made}"\nrows = 8_000\n'
    session = Session(processes, reference_bundle, extra)
    processes.market("--rate", "2000", "--seconds", "180")
    engine = processes.engine(session.config)
    session.until(lambda s: s["tradable"] > 12_000, "rows to calibrate from")
    answer = session.ask("recalibrate", by="Ada")
    assert answer["ok"], answer
    after = session.until(lambda s: s["tradable"] > answer["tradable"] + 200, "signals after it")
    events = [event.command for event in session.events(live=True)]
    assert RECALIBRATION in events
    if SWAP in events:
        assert after["bundle"].startswith(str(made))
        assert after["previous_bundle"] == str(reference_bundle)
        assert session.ask("rollback", by="Ada")["bundle"] == str(reference_bundle)
        session.until(lambda s: s["tradable"] > after["tradable"] + 200, "signals of the old one")
    totals = stop(engine)
    assert totals["lost"] == 0
    assert_no_tick_missed(session.signals())
    session.verify()


def test_the_control_command_line_says_what_happened(
    processes: Processes, reference_bundle: Path
) -> None:
    session = Session(processes, reference_bundle)
    processes.market("--rate", "300", "--seconds", "60")
    engine = processes.engine(session.config)

    def control(*args: str) -> subprocess.CompletedProcess[str]:
        child = processes.start("control", *args, "--endpoint", session.endpoint)
        out, err = child.communicate(timeout=TIMEOUT_S)
        return subprocess.CompletedProcess(args, child.returncode, out, err)

    done = control("status")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("mode        INT8")
    done = control("halt", "--reason", "lunch", "--by", "Ada", "--json")
    assert json.loads(done.stdout)["halted_why"] == "halt: lunch"
    assert control("arm").returncode == 2, "--by is needed"
    assert "mode        INT8" in control("arm", "--by", "Ada").stdout
    done = control("rollback")
    assert done.returncode == 1
    assert done.stderr.startswith("refused: no model served before")
    stop(engine)
    done = control("status", "--timeout", "0.2")
    assert done.returncode == 2
    assert "no engine answered" in done.stderr
