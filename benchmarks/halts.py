"""``octick bench halt``: how soon each way to halt an engine at full load takes effect."""

from __future__ import annotations

import os
import signal as os_signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from benchmarks.live_engine import LiveEngine, Sent, live_engine
from benchmarks.provenance import REFERENCE, commit, machine
from engine.trust_events import ARM, HALT, Control
from feeds.errors import InputError

FULL_LOAD: Final = ["--speed", "max"]
BETWEEN_S: Final = 0.15
CONFIRMED_WITHIN_MS: Final = 10.0
SECTIONS: Final = '[controls]\nhalt_file = "{folder}/HALT"\n'


class Way(msgspec.Struct, frozen=True):
    """One way to halt.

    Attributes
    ----------
    halts : int
    confirmed_p50_ms, confirmed_max_ms : float
        From the command to its confirmation: the answer on the control socket; else the event on
        the tape, from which on every signal is suppressed.
    tradable_after : int
        Signals that were tradable after the confirmation and before the engine was armed again.
    """

    halts: int
    confirmed_p50_ms: float
    confirmed_max_ms: float
    tradable_after: int


class HaltBench(msgspec.Struct, frozen=True):
    """What was measured; ``ok`` where all came within `CONFIRMED_WITHIN_MS` and nothing slipped."""

    ok: bool
    command: Way
    file: Way
    signal: Way
    signals: int
    messages_per_s: float
    replay_differs: int
    machine: dict[str, str | int]
    commit: str


def bench_halt(
    halts: int, *, model: Path = REFERENCE, progress: Callable[[str], Any] = lambda _: None
) -> HaltBench:
    """Halt and arm an engine ``halts`` times in each way while its feed floods it."""
    asked: dict[str, list[int]] = {"control": [], "file": [], "signal": []}
    answered: list[int] = []
    with live_engine(model, FULL_LOAD, sections=SECTIONS) as session:
        session.wait_until_tradable()
        before, started = session.ask("status")["messages"], time.monotonic()
        for n in range(halts):
            progress(f"halt {n + 1} of {halts}, each way")
            asked["control"].append(time.time_ns())
            session.ask("halt", by="control")
            answered.append(time.time_ns())
            _rest(session)
            asked["file"].append(time.time_ns())
            (session.folder / "HALT").touch()
            time.sleep(BETWEEN_S)
            (session.folder / "HALT").unlink()
            _rest(session)
            asked["signal"].append(time.time_ns())
            os.kill(session.engine.pid, os_signal.SIGUSR1)
            _rest(session)
        rate = (session.ask("status")["messages"] - before) / (time.monotonic() - started)
        session.finish()
        events, sent = session.events(), session.signals()
        verification = session.replay(model).verification
    assert verification is not None
    ways = {}
    for name, times in asked.items():
        taken = [at for at, event in events if event.command == HALT and event.by == name]
        if len(taken) != len(times):
            raise InputError("a halt did not arrive", where=name, found=f"{len(taken)} of {halts}")
        confirmed = answered if name == "control" else taken
        waits = (np.array(confirmed) - np.array(times)) / 1e6
        ways[name] = Way(
            halts=len(times),
            confirmed_p50_ms=round(float(np.median(waits)), 3),
            confirmed_max_ms=round(float(waits.max()), 3),
            tradable_after=sum(_slipped(at, events, sent) for at in taken),
        )
    good = all(
        way.confirmed_max_ms <= CONFIRMED_WITHIN_MS and way.tradable_after == 0
        for way in ways.values()
    )
    return HaltBench(
        ok=good and verification.ok,
        command=ways["control"],
        file=ways["file"],
        signal=ways["signal"],
        signals=len(sent.sent_ns),
        messages_per_s=round(rate),
        replay_differs=verification.differing,
        machine=machine(),
        commit=commit(),
    )


def _rest(session: LiveEngine) -> None:
    """Let signals pass halted, arm, let them pass armed."""
    time.sleep(BETWEEN_S)
    session.ask("arm")
    time.sleep(BETWEEN_S)


def _slipped(at_ns: int, events: list[tuple[int, Control]], sent: Sent) -> int:
    """Tradable signals between a halt and the next arming."""
    armed_ns = min(
        (at for at, event in events if event.command == ARM and at > at_ns), default=2**62
    )
    within = (sent.sent_ns > at_ns) & (sent.sent_ns < armed_ns)
    return int(np.count_nonzero(within & (sent.reasons == 0)))
