"""Sender, engine, echo and receivers over one transport, for ``octick bench latency``."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from benchmarks.processes import Lines, children, last_json, octick, stop
from benchmarks.provenance import ROOT
from engine.bundle import load_bundle
from engine.cores import only_on
from engine.signals import AT_OUTPUTS
from feeds import codec
from feeds.errors import InputError
from feeds.tape_reader import TapeReader
from feeds.wire import OUTPUT_BYTES

WARM_SHARE: Final = 0.1  # of each turn, not counted
BEGIN_S: Final = 20.0
IDLE_S: Final = 1.0
REST_S: Final = 0.3  # between turns, so that each signal belongs to one
# The model may not know the market that it is measured on: what is measured is its speed.
NO_MOVES: Final = (
    "[failover]\nviolations = 0\ninput_violations = 0\ndivergences = 0\ndisagreement_rate = 0.0\n"
)
SHADOW_EVERY: Final = 10  # inferences
ENGINE: Final = 0
ECHO: Final = 1


class Turn(NamedTuple):
    """One load sent once to one of both: latencies in ns, and when it was, by the wall clock."""

    took: np.ndarray
    lost: int
    late_p99_us: float
    began_ns: int
    ended_ns: int


class _End:
    """A process of `benchmarks.wire_ends`: commands in, answers out, an object a line."""

    def __init__(
        self, alive: list[subprocess.Popen[str]], *arguments: str, off_core: int = -1
    ) -> None:
        others = os.sched_getaffinity(0) - {off_core} if off_core >= 0 else set()
        self.child = subprocess.Popen(
            [*only_on(others), sys.executable, "-m", "benchmarks.wire_ends", *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        alive.append(self.child)

    def tell(self, **command: Any) -> None:
        """Send a command."""
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps(command) + "\n")
        self.child.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """Wait for an answer."""
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise InputError("a process of the benchmark ended", where="benchmarks.wire_ends")
        heard: dict[str, Any] = json.loads(line)
        return heard


class Wired:
    """All that is on a wire; use `wired`.

    Attributes
    ----------
    tape : Path
        What the engine records.
    totals : dict
        The engine's closing line, once it has stopped.
    """

    def __init__(
        self,
        folder: Path,
        engine: subprocess.Popen[str],
        lines: Lines,
        sender: _End,
        receivers: Sequence[_End],
    ) -> None:
        self.tape = folder / "session.tape"
        self.totals: dict[str, Any] = {}
        self._folder = folder
        self._engine = engine
        self._lines = lines
        self._sender = sender
        self._receivers = receivers

    def finish(self) -> None:
        """Stop the engine, take its totals."""
        stop(self._engine)
        self.totals = last_json(self._lines.finish(), "octick run")
        if self.totals["mode"] != "INT8":
            raise InputError(
                "the engine moved away from INT8", where="octick run", found=self.totals["mode"]
            )

    def send(self, to: int, schedule_ns: np.ndarray, *, stamp_due: bool = True) -> dict[str, Any]:
        """Send a load to engine or echo; what the sender says of it.

        Parameters
        ----------
        to : int
            `ENGINE` or `ECHO`.
        schedule_ns : ndarray of int64
            When messages leave, ns from now.
        stamp_due : bool
            Each says when it should have left; else when it left.
        """
        schedule = self._folder / "schedule.npy"
        np.save(schedule, schedule_ns)
        self._sender.tell(to=to, schedule=str(schedule), stamp_due=stamp_due)
        return self._sender.hear()

    def turn(self, to: int, schedule_ns: np.ndarray) -> Turn:
        """Send a load to engine or echo, and time what comes back."""
        out = self._folder / "took.npy"
        receiver = self._receivers[to]
        receiver.tell(count=len(schedule_ns), idle_s=IDLE_S, begin_s=BEGIN_S, out=str(out))
        receiver.hear()
        time.sleep(REST_S)
        began_ns = time.time_ns()
        sent = self.send(to, schedule_ns)
        received = receiver.hear()["received"]
        ended_ns = time.time_ns()
        took = np.load(out)
        skip = round(WARM_SHARE * len(took))
        lost = len(schedule_ns) - received
        return Turn(took[skip:], lost, sent["late_p99_us"], began_ns, ended_ns)

    def sender_book(self) -> list[list[tuple[int, int]]]:
        """Bids and asks of what was sent to the engine, best first."""
        self._sender.tell(book=ENGINE)
        return [[(p, q) for p, q in side] for side in self._sender.hear()["sides"]]

    def cpu_seconds(self) -> float:
        """What the engine's threads have used of all cores."""
        fields = Path(f"/proc/{self._engine.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def last_core() -> int:
    """Of several that this process may use the last; -1 where there is but one."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[-1] if len(cores) > 1 else -1


@contextmanager
def wired(
    transport: str,
    source: Path,
    model: Path,
    backend: str,
    *,
    trigger: str = "events",
    shadow_every: int = SHADOW_EVERY,
    sections: str = "",
    off_core: int = -1,
) -> Iterator[Wired]:
    """Start all processes.

    Parameters
    ----------
    transport : str
        ``ipc`` or ``tcp``.
    source : Path
        A tape of one instrument, whose messages are sent.
    model : Path
    backend : str
        What runs it.
    trigger : str
        ``events`` makes a signal due after every message.
    shadow_every : int
    sections : str
        More of the engine's config, in TOML.
    off_core : int
        That sender and receivers keep off, as they would if it were isolated; -1: none. The echo
        may use every core.
    """
    meta = TapeReader(source).meta.instruments[0]
    topic = codec.topic("signal", meta.venue, meta.symbol).decode()
    signal_bytes = AT_OUTPUTS + OUTPUT_BYTES * load_bundle(model).n_outputs
    with tempfile.TemporaryDirectory(prefix="octick-bench-") as name, children() as alive:
        folder = Path(name)
        feed, echo_feed, signals, echoed = _endpoints(transport, folder)
        config = folder / "engine.toml"
        config.write_text(
            f'[[feed]]\nendpoint = "{feed}"\n'
            f'[[instrument]]\nvenue = "{meta.venue}"\nsymbol = "{meta.symbol}"\n'
            f'[model]\nbundle = "{model}"\nbackend = "{backend}"\n'
            f'[publish]\nendpoint = "{signals}"\n'
            f'[tape]\npath = "{folder / "session.tape"}"\n'
            f'[trigger]\nkind = "{trigger}"\n[shadow]\nevery = {shadow_every}\n'
            f"{NO_MOVES}{sections}"
        )
        sender = _End(alive, "send", str(source), feed, echo_feed, off_core=off_core)
        sender.hear()
        engine = octick("run", str(config), "--json")
        alive.append(engine)
        assert engine.stdout is not None
        assert engine.stderr is not None
        lines = Lines(engine.stdout)
        Lines(engine.stderr).wait_for("READY", engine, "octick run")
        _End(alive, "echo", echo_feed, echoed, topic, str(signal_bytes)).hear()
        receivers = [
            _End(alive, "receive", endpoint, off_core=off_core) for endpoint in (signals, echoed)
        ]
        for receiver in receivers:
            receiver.hear()
        yield Wired(folder, engine, lines, sender, receivers)


def _endpoints(transport: str, folder: Path) -> list[str]:
    if transport == "ipc":
        return [f"ipc://{folder}/{name}" for name in ("feed", "echo-feed", "signals", "echoed")]
    endpoints = []
    taken = [socket.socket() for _ in range(4)]
    for one in taken:
        one.bind(("127.0.0.1", 0))
        endpoints.append(f"tcp://127.0.0.1:{one.getsockname()[1]}")
    for one in taken:
        one.close()
    return endpoints
