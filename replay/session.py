# Hot path: `Session.run`; what stands around it opens and closes.
"""One replay: the engine's pipeline over tapes, without ZeroMQ in between.

The pipeline is the object that the daemon runs, and gets the bytes that the daemon got. Neither
the pace, nor the threads of the model's runtime, nor the order in which tapes are named can
change a signal.
"""

from __future__ import annotations

import os
import signal as os_signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FrameType
from typing import Any, Final

import msgspec
import numpy as np
from numba import njit

from engine.config import Config, config_hash
from engine.digest import Digest
from engine.evidence import gather, write
from engine.features import SCHEMA_HASH
from engine.hashes import code_hash
from engine.pipeline import Pipeline
from engine.trust_keeper import Move
from feeds import tape
from feeds.rawbytes import load_i64, load_u32
from replay.merge import TapeStream, load_time
from replay.opening import choose_config, opened
from replay.verify import Verification, Verifier

__all__ = [
    "MAX_SPEED",
    "Report",
    "Session",
    "choose_config",
    "due_until",
    "interruptible",
    "replay_tapes",
]

MAX_SPEED: Final = 0.0
SLEEP_SLICE_S: Final = 0.05


class Report(msgspec.Struct, frozen=True):
    """What a replay gave. Rates are those of this machine, everything else is the same anywhere.

    Attributes
    ----------
    messages, book_levels, trades, gaps, lost, duplicates, rejected : int
    signals, tradable : int
    suppressed : dict of str to int
        Signals by reason; one signal may have several.
    seconds, messages_per_s, levels_per_s : float
    digest : str
        SHA-256 over the canonical bytes of all signals, suppressed ones included.
    model_hash, config_hash, feature_hash, code_hash : str
        16 hex digits.
    transitions, swaps : int
        Moves between INT8, FP32 and HALTED; other models that took over.
    trust_events : bool
        Commands and shadow answers on the tape were followed: they belong to this model and config.
    truncated, interrupted : bool
        A tape had no END record; the replay was stopped by hand.
    counters : dict of str to int
        Everything that the pipeline counts.
    tapes : list of str
    out : str
        The Parquet file, "" without one.
    verification : Verification or None
    """

    messages: int
    signals: int
    tradable: int
    messages_per_s: float
    digest: str
    book_levels: int
    levels_per_s: float
    trades: int
    gaps: int
    lost: int
    duplicates: int
    rejected: int
    unknown_instrument: int
    suppressed: dict[str, int]
    seconds: float
    model_hash: str
    config_hash: str
    feature_hash: str
    code_hash: str
    transitions: int
    swaps: int
    trust_events: bool
    truncated: bool
    interrupted: bool
    counters: dict[str, int]
    tapes: list[str]
    out: str
    verification: Verification | None


@njit("int64(uint8[::1], int64, int64, int64)", cache=True)
def due_until(buf, at, stop, until_ns):  # type: ignore[no-untyped-def]
    """Position of the first of the whole records that was received after ``until_ns``."""
    while at < stop and load_i64(buf, at + 8) <= until_ns:
        at += tape.RECORD_HEADER_BYTES + tape.padded(load_u32(buf, at + 4))
    return at


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that a replay stops between two signals.

    A second Ctrl-C interrupts at once.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {
        number: os_signal.signal(number, ask) for number in (os_signal.SIGINT, os_signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            os_signal.signal(number, handler)


class Session:
    """A pipeline, and what each of its signals goes to.

    Parameters
    ----------
    pipeline : Pipeline
    sinks : sequence of callable
        Each takes every signal, a memoryview that is valid only during the call.
    stop : threading.Event
        Set to stop between two signals.
    speed : float
        Times the recorded pace; `MAX_SPEED` for as fast as it goes.

    Attributes
    ----------
    digest : Digest
    interrupted : bool
    """

    def __init__(
        self,
        pipeline: Pipeline,
        sinks: Sequence[Callable[[memoryview], None]],
        stop: threading.Event,
        speed: float = MAX_SPEED,
    ) -> None:
        self.pipeline = pipeline
        self.digest = Digest()
        self.interrupted = False
        self._sinks = tuple(sinks)
        self._stop = stop
        self._speed = speed
        self._first_ns = -1
        self._started_ns = 0

    def run(self, chunks: Iterator[tuple[np.ndarray, int, int]]) -> None:
        """Consume all chunks, or stop where asked to."""
        for buf, start, stop in chunks:
            if self._speed == MAX_SPEED:
                self._advance(buf, start, stop)
            else:
                self._paced(buf, start, stop)
            if self._stop.is_set():
                self.interrupted = True
                return

    def _advance(self, buf: np.ndarray, at: int, stop: int) -> None:
        pipeline, sinks, asked = self.pipeline, self._sinks, self._stop.is_set
        size = pipeline.signal_bytes
        while at < stop:
            at = pipeline.serve(buf, at, stop)
            served = pipeline.served
            if len(served):
                self.digest.update_all(served, size)
                for begin in range(0, len(served), size) if sinks else ():
                    for sink in sinks:
                        sink(served[begin : begin + size])
            if asked():
                return

    def _paced(self, buf: np.ndarray, at: int, stop: int) -> None:
        while at < stop and not self._stop.is_set():
            recv_ns = load_time(buf, at)
            if self._first_ns < 0:
                self._first_ns, self._started_ns = recv_ns, time.monotonic_ns()
            elapsed_ns = int((time.monotonic_ns() - self._started_ns) * self._speed)
            early_s = (recv_ns - self._first_ns - elapsed_ns) / self._speed / 1e9
            if early_s > 0:
                self._stop.wait(min(early_s, SLEEP_SLICE_S))
                continue
            after = max(
                due_until(buf, at, stop, self._first_ns + elapsed_ns),
                due_until(buf, at, stop, recv_ns),
            )
            self._advance(buf, at, after)
            at = after


def replay_tapes(
    paths: Sequence[str | os.PathLike[str]],
    *,
    model: str | os.PathLike[str] | None = None,
    config: str | os.PathLike[str] | Config | None = None,
    out: str | os.PathLike[str] | None = None,
    inference: bool = True,
    backend: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    speed: float = MAX_SPEED,
    verify: bool = False,
    overwrite: bool = False,
    allow_truncated: bool = False,
    evidence: str | os.PathLike[str] | None = None,
    watch: Callable[[int], Any] | None = None,
) -> Report:
    """Run the engine over tapes.

    Parameters
    ----------
    paths : sequence of path-like
        Merged in order of receive time, see `replay.merge`.
    model : path-like, optional
        Bundle; default is the config's.
    config : path-like or Config, optional
        Default is what the tape recorded, else the default over the tape's instruments.
    out : path-like, optional
        Parquet file for the signals.
    inference : bool
        False runs book, features and triggers alone; signals then have no outputs.
    backend, device : str, optional
        What runs the model; default is the config's.
    threads : int, optional
        Of the model's runtime.
    speed : float
        Times the recorded pace; `MAX_SPEED` for as fast as it goes.
    verify : bool
        Compare with the signals that are recorded on the tape; takes one tape.
    overwrite : bool
        Replace an existing ``out``.
    allow_truncated : bool
        Take tapes without an END record up to their last whole record.
    evidence : path-like, optional
        Folder for an evidence file of each move between INT8, FP32 and HALTED.
    watch : callable, optional
        Told the bytes of all files, then it gives back a callable that is told the bytes read.

    Raises
    ------
    InputError
        For damaged tapes, a bundle or config that cannot be used, or an ``out`` that exists.
        What was written before is kept, and readable.
    """
    assert paths, "nothing to replay"
    stream = TapeStream(paths, allow_truncated=allow_truncated)
    if watch is not None:
        stream.tick = watch(stream.file_bytes)
    with ExitStack() as stack:
        setting = stack.enter_context(
            opened(
                stream.metas,
                model=model,
                config=config,
                inference=inference,
                backend=backend,
                device=device,
                threads=threads,
            )
        )
        pipeline, chosen, bundle = setting.pipeline, setting.config, setting.bundle
        stop = stack.enter_context(interruptible())
        hashes = {
            "model": f"{0 if bundle is None else bundle.model_hash:016x}",
            "config": f"{config_hash(chosen):016x}",
            "feature": f"{SCHEMA_HASH:016x}",
            "code": f"{code_hash():016x}",
        }
        sinks: list[Callable[[memoryview], None]] = []
        verifier = None
        if verify:
            verifier = Verifier(
                paths[0], instruments=len(pipeline.names), allow_truncated=allow_truncated
            )
            sinks.append(verifier.take)
        if out is not None:
            metadata = {f"octick.{name}_hash": value for name, value in hashes.items()}
            from feeds.signal_table import SignalFile

            file = stack.enter_context(SignalFile(out, metadata=metadata, overwrite=overwrite))
            sinks.append(file.append)
        if evidence is not None:
            pipeline.trust.on_move = partial(_write_evidence, pipeline, chosen, str(evidence))
        session = Session(pipeline, sinks, stop, speed)
        started = time.perf_counter()
        session.run(stream.chunks())
        seconds = time.perf_counter() - started
        verification = None
        if verifier is not None and not session.interrupted:
            verification = verifier.finish(truncated=stream.truncated)
    counters = pipeline.counters
    return Report(
        messages=counters["messages"],
        signals=counters["signals"],
        tradable=counters["tradable"],
        messages_per_s=counters["messages"] / seconds,
        digest=session.digest.hexdigest(),
        book_levels=counters["book_levels"],
        levels_per_s=counters["book_levels"] / seconds,
        trades=counters["trades"],
        gaps=counters["gaps"],
        lost=counters["lost"],
        duplicates=counters["duplicates"],
        rejected=counters["rejected"],
        unknown_instrument=counters["unknown_instrument"],
        suppressed=dict(pipeline.suppressed),
        seconds=seconds,
        model_hash=hashes["model"],
        config_hash=hashes["config"],
        feature_hash=hashes["feature"],
        code_hash=hashes["code"],
        transitions=pipeline.trust.failover.transitions,
        swaps=pipeline.trust.swaps,
        trust_events=setting.followed,
        truncated=stream.truncated,
        interrupted=session.interrupted,
        counters=counters,
        tapes=[str(path) for path in paths],
        out="" if out is None else str(out),
        verification=verification,
    )


def _write_evidence(pipeline: Pipeline, config: Config, folder: str, move: Move) -> None:
    write(folder, gather(pipeline, config, move))
