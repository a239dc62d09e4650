"""A market and an engine as processes, commanded over the control socket, read from its tape."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from benchmarks.processes import Lines, children, last_json, octick, stop
from engine.control import Command, ask
from engine.signals import AT_RECEIVED
from engine.trust_events import Control, decode_event
from feeds import tape, wire
from feeds.codec import decode_block
from feeds.errors import InputError
from feeds.tape_reader import TapeReader
from replay.session import Report, replay_tapes

CONTROL_TIMEOUT_S: Final = 120.0
STARTED_S: Final = 120.0
INSTRUMENTS: Final = ("ALPHA", "BETA", "GAMMA", "DELTA")


class Sent(NamedTuple):
    """Signals of a tape, in order.

    Attributes
    ----------
    sent_ns, received_ns : ndarray of int64
        When each left, and when the message that made it due had come.
    reasons : ndarray of int64
    last_seq, signal_seq, slot : ndarray of int64
        ``slot`` numbers the instruments as they come.
    """

    sent_ns: np.ndarray
    received_ns: np.ndarray
    reasons: np.ndarray
    last_seq: np.ndarray
    signal_seq: np.ndarray
    slot: np.ndarray


class LiveEngine:
    """One session; use `live_engine`.

    Attributes
    ----------
    folder, tape : Path
    engine : subprocess.Popen
    totals, market_totals : dict
        The closing lines of engine and market, once they have stopped.
    """

    def __init__(
        self, folder: Path, engine: subprocess.Popen[str], market: subprocess.Popen[str]
    ) -> None:
        self.folder = folder
        self.tape = folder / "session.tape"
        self.engine = engine
        self._market = market
        self.totals: dict[str, Any] = {}
        self.market_totals: dict[str, Any] = {}
        self._lines: list[Lines] = []

    @property
    def endpoint(self) -> str:
        """Of the control socket."""
        return f"ipc://{self.folder}/control"

    def ask(self, name: Any, *, by: str = "bench", **fields: str) -> dict[str, Any]:
        """Send a command; the engine's answer."""
        return ask(self.endpoint, Command(name, by, **fields), timeout_s=CONTROL_TIMEOUT_S)

    def wait_until_tradable(self) -> None:
        """Wait until the engine's features are warm."""
        self.wait_for(lambda status: status["tradable"] > 0, "a tradable signal")

    def wait_for(self, good: Any, what: str) -> dict[str, Any]:
        """Wait until the status says so."""
        deadline = time.monotonic() + STARTED_S
        while time.monotonic() < deadline:
            status = self.ask("status")
            if good(status):
                return status
            time.sleep(0.05)
        raise InputError("the engine did not come that far", where="bench", expected=what)

    def rss_mb(self) -> float:
        """Anonymous resident memory of the engine: without the mapped pages of its tape."""
        for line in Path(f"/proc/{self.engine.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024 / 1e6
        raise InputError("no RssAnon in /proc", where="bench", fix="run it on Linux 4.5 or newer")

    def finish(self) -> None:
        """Stop both, take the engine's totals."""
        stop(self.engine)
        stop(self._market)
        self.totals = last_json(self._lines[0].finish(), "octick run")
        self.market_totals = last_json(self._lines[2].finish(), "octick publish")

    @property
    def running(self) -> bool:
        """Whether the market still publishes.

        Raises
        ------
        InputError
            If the engine has ended.
        """
        if self.engine.poll() is not None:
            raise InputError(
                "the engine ended by itself",
                where="octick run",
                found=" ".join("".join(self._lines[1].finish()).split())[-300:] or "no output",
            )
        return self._market.poll() is None

    def events(self) -> list[tuple[int, Control]]:
        """Commands and observations on the tape, with the time at which each was taken."""
        return [
            (record.recv_ns, event)
            for record in TapeReader(self.tape).records()
            if record.kind == tape.CONTROL
            and isinstance(event := decode_event(bytes(record.payload)), Control)
        ]

    def signals(self) -> Sent:
        """Every signal of the tape."""
        rows, slots = [], {}  # type: ignore[var-annotated]
        for record in TapeReader(self.tape).records():
            if record.kind == tape.SIGNAL:
                block = decode_block(record.payload, wire.SIGNAL_DTYPE)
                slot = slots.setdefault(bytes(block["symbol"]), len(slots))
                rows.append(
                    (
                        record.recv_ns,
                        int.from_bytes(record.payload[AT_RECEIVED : AT_RECEIVED + 8], "little"),
                        int(block["reasons"]),
                        int(block["last_seq"]),
                        int(block["signal_seq"]),
                        slot,
                    )
                )
        return Sent(*np.array(rows, dtype=np.int64).T)

    def replay(self, model: Path) -> Report:
        """Replay the tape and hold every signal against the recorded one."""
        return replay_tapes([self.tape], model=model, verify=True)


@contextmanager
def live_engine(
    bundle: Path,
    market: list[str],
    *,
    sections: str = "",
    backend: str = "onnx",
    ready_within_s: float = STARTED_S,
) -> Iterator[LiveEngine]:
    """Start a simulated market and an engine on it.

    Parameters
    ----------
    market : list of str
        Options of ``octick publish sim``.
    sections : str
        More of the engine's config, in TOML; ``{folder}`` in it is the session's folder.
    backend : str
        What runs the model.
    """
    with tempfile.TemporaryDirectory(prefix="octick-bench-") as name, children() as alive:
        folder = Path(name)
        config = folder / "engine.toml"
        text = (
            f'[[feed]]\nendpoint = "ipc://{folder}/feed"\n'
            f'snapshot_endpoint = "ipc://{folder}/snapshots"\n'
            f'[model]\nbundle = "{bundle}"\nbackend = "{backend}"\n'
            f'[publish]\nendpoint = "ipc://{folder}/signals"\n'
            f'[tape]\npath = "{folder}/session.tape"\n'
            f'[control]\nendpoint = "ipc://{folder}/control"\n'
        )
        text += sections.replace("{folder}", name)
        for symbol in INSTRUMENTS:
            text += f'[[instrument]]\nvenue = "sim"\nsymbol = "{symbol}"\n'
        config.write_text(text)
        engine = octick("run", str(config), "--json")
        source = octick(
            *("publish", "sim", "--bind", f"ipc://{folder}/feed"),
            *("--snapshots", f"ipc://{folder}/snapshots", "--json", *market),
        )
        alive += [engine, source]
        session = LiveEngine(folder, engine, source)
        pipes = (engine.stdout, engine.stderr, source.stdout, source.stderr)
        session._lines = [Lines(pipe) for pipe in pipes if pipe is not None]
        session._lines[1].wait_for("READY", engine, "octick run")
        yield session
