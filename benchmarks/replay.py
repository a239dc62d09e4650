"""``octick bench replay``: how fast book, features and model go through a recorded stream.

Measurements over the same records, which lie in memory with their checksums verified, so that the
disk is none of it; on one core, in turn, round after round, after a warm-up that is not counted:

*book*
    Sequence logic and the books alone; see `benchmarks.book_replay`.
*features*
    The pipeline that daemon and replay run, and the whole feature vector after every applied
    message; no signals.
*signals*
    That pipeline with the default trigger: inference and an encoded signal at every change of the
    top of book.
*rivals*
    The levels that went into those books through hftbacktest and through a book of Python dicts,
    already decoded for them. Making their input is not timed.

All must end with the same books, level by level.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from benchmarks.book_replay import DROPPED_LEVELS, LEVELS, MESSAGES, BookReplay, Records
from benchmarks.dict_book import DictBooks
from benchmarks.hftbacktest_rival import HftBacktest
from benchmarks.provenance import REFERENCE, provenance
from benchmarks.replay_report import ReplayBench, RivalRuns, Runs
from benchmarks.source_tape import source_tape
from engine.backends.registry import open_backend
from engine.book import ASK, BID
from engine.bundle import load_bundle
from engine.config import Config, served_by
from engine.digest import Digest
from engine.jitter import measure_jitter
from engine.pipeline import Pipeline
from feeds.errors import InputError
from feeds.tape_reader import TapeReader
from feeds.wire import LEVEL_BYTES
from replay.session import choose_config

MAX_RECORDS_BYTES: Final = 1 << 31
MAX_RIVAL_BYTES: Final = 1 << 26  # decoded for them, they take many times as much
JITTER_S: Final = 1.0


class Rival(Protocol):
    """Another book over the same levels."""

    @property
    def library(self) -> str:
        """What it is, with its version."""

    def run(self) -> float:
        """Build the books anew; returns the seconds it took."""

    def check(self, slot: int, bids: np.ndarray, asks: np.ndarray) -> None:
        """Assert that an instrument's book is this one."""


def bench_replay(
    path: Path | None,
    *,
    runs: int,
    model: Path = REFERENCE,
    backend: str = "compiled",
    rivals: bool = True,
    progress: Callable[[str], Any] = lambda _: None,
) -> ReplayBench:
    """Measure on a tape, by default the recording of `RECORDING`, else a simulated market.

    Parameters
    ----------
    path : Path or None
    runs : int
        Counted runs of each measurement.
    model : Path
        Bundle for the way to the signal.
    backend : str
        What runs it, on its default device.
    rivals : bool
        Whether the other books run beside ours.
    progress : callable
        Told what is going on.

    Raises
    ------
    InputError
        If the tape or the bundle cannot be used.
    """
    progress("preparing the tape")
    with source_tape(path) as (tape, source):
        config, records = _records(tape)
    others: dict[str, Rival] = {}
    left_out = {"rivals": "not asked for"}
    if rivals:
        progress("decoding for the rivals")
        others, left_out = _open_rivals(config, records)
    bundle = load_bundle(model)
    served = served_by(config, backend)
    ours = _Ours(config, records)
    lanes: dict[str, Callable[[], float]] = {
        "book": ours.run_book,
        "features": ours.run_features,
        "signals": lambda: ours.run_signals(Pipeline(served, bundle, opened)),
        **{name: rival.run for name, rival in others.items()},
    }
    core, allowed = pin()
    gc.collect()
    gc.freeze()  # millions of decoded levels are no garbage to look through while we measure
    opened = open_backend(backend, bundle, served.model.device)
    try:
        progress("measuring the host")
        jitter = measure_jitter(JITTER_S)
        seconds = _in_turn(lanes, runs, progress)
    finally:
        opened.close()
        gc.unfreeze()
        if allowed is not None:
            os.sched_setaffinity(0, allowed)
    ours.check(others)
    book, features, signals = (
        Runs(seconds[name], *ours.did[name]) for name in ("book", "features", "signals")
    )

    def over(mine: str, rival: str) -> float | None:
        if rival not in others:
            return None
        # The same levels: the ratio of rates is that of times, the other way round.
        pairs = zip(seconds[mine], seconds[rival], strict=True)
        return statistics.median(theirs / own for own, theirs in pairs)

    def told(name: str) -> RivalRuns | None:
        if name not in others:
            return None
        took = seconds[name]
        rate = features.levels / statistics.median(took)
        return RivalRuns(took, features.levels, rate, others[name].library)

    return ReplayBench(
        levels_per_s=features.levels / features.median_s,
        messages_per_s=features.messages / features.median_s,
        signals_per_s=signals.signals / signals.median_s,
        messages_per_s_with_inference=signals.messages / signals.median_s,
        book_levels_per_s=book.levels / book.median_s,
        book_messages_per_s=book.messages / book.median_s,
        book_over_hftbacktest=over("book", "hftbacktest"),
        features_over_hftbacktest=over("features", "hftbacktest"),
        book_over_hftbacktest_local=over("book", "hftbacktest_local"),
        features_over_hftbacktest_local=over("features", "hftbacktest_local"),
        book_over_dict=over("book", "dict_book"),
        tape=tape.name,
        source=source,
        backend=backend,
        digest=ours.digest(),
        runs=runs,
        book=book,
        features=features,
        signals=signals,
        hftbacktest=told("hftbacktest"),
        hftbacktest_local=told("hftbacktest_local"),
        dict_book=told("dict_book"),
        left_out=left_out,
        core=core,
        jitter_p99_us=jitter.p99_ns / 1e3,
        jitter_max_us=jitter.max_ns / 1e3,
        **provenance(("hftbacktest",) if "hftbacktest" in others else ()),
    )


def _records(tape: Path) -> tuple[Config, Records]:
    reader = TapeReader(tape)
    config = choose_config([reader.meta], None)
    records: Records = []
    size = 0
    for chunk in reader.chunks():
        size += chunk.stop - chunk.start
        if size > MAX_RECORDS_BYTES:
            raise InputError(
                "tape too large to measure in memory",
                where=str(tape),
                expected=f"at most {MAX_RECORDS_BYTES} bytes",
                fix="measure a shorter one",
            )
        records.append((chunk.buf[chunk.start : chunk.stop].copy(), 0, chunk.stop - chunk.start))
    return config, records


def pin() -> tuple[int | None, set[int] | None]:
    """Stay on one core, where the platform lets us; returns it, and what was allowed before."""
    if not hasattr(os, "sched_setaffinity"):
        return None, None
    allowed = os.sched_getaffinity(0)
    core = max(allowed)
    os.sched_setaffinity(0, {core})
    return core, allowed


def _open_rivals(config: Config, records: Records) -> tuple[dict[str, Rival], dict[str, str]]:
    """The other books by name, and of those that cannot run here, why not."""
    size = sum(stop - start for _, start, stop in records)
    if size > MAX_RIVAL_BYTES:
        return {}, {"rivals": f"the tape has {size:,} bytes, more than {MAX_RIVAL_BYTES:,}"}
    replay = BookReplay(config, size // LEVEL_BYTES)
    replay.run(records)
    dropped = int(replay.counts[DROPPED_LEVELS])
    if dropped:
        return {}, {"rivals": f"they would keep {dropped:,} levels that our full books dropped"}
    rows = replay.rows()
    found: dict[str, Rival] = {}
    left_out = {}
    try:
        found["hftbacktest"] = HftBacktest(rows, exchange=True)
        found["hftbacktest_local"] = HftBacktest(rows, exchange=False)
    except InputError as error:
        left_out["hftbacktest"] = str(error)
    found["dict_book"] = DictBooks(rows)
    return found, left_out


def _in_turn(
    lanes: dict[str, Callable[[], float]], runs: int, progress: Callable[[str], Any]
) -> dict[str, list[float]]:
    """Seconds of each run of each lane."""
    for name, run in lanes.items():
        progress(f"warming up: {name}")
        run()
    seconds: dict[str, list[float]] = {name: [] for name in lanes}
    for number in range(runs):
        progress(f"round {number + 1} of {runs}")
        # No lane always follows the same one.
        for name in lanes if number % 2 == 0 else reversed(lanes):
            seconds[name].append(lanes[name]())
    return seconds


class _Ours:
    """The engine over the records: what runs, what its last run did, and whether books agree."""

    def __init__(self, config: Config, records: Records) -> None:
        self._config, self._records = config, records
        self._book = BookReplay(config)
        self._features = Pipeline(config, None, None, compute_always=True)
        self._signals = Pipeline(config, None, None)
        self._digests: set[str] = set()

    def run_book(self) -> float:
        self._book = BookReplay(self._config)
        return self._book.run(self._records)

    def run_features(self) -> float:
        pipeline = self._features = Pipeline(self._config, None, None, compute_always=True)
        started = time.perf_counter()
        for buf, start, stop in self._records:
            at = start
            while at < stop:
                at = pipeline.advance(buf, at, stop)
        return time.perf_counter() - started

    def run_signals(self, pipeline: Pipeline) -> float:
        self._signals = pipeline
        digest = Digest()
        started = time.perf_counter()
        for buf, start, stop in self._records:
            at = start
            while at < stop:
                at = pipeline.serve(buf, at, stop)
                if pipeline.served:
                    digest.update_all(pipeline.served, pipeline.signal_bytes)
        seconds = time.perf_counter() - started
        self._digests.add(digest.hexdigest())
        return seconds

    @property
    def did(self) -> dict[str, tuple[int, int, int, int]]:
        """Messages, levels, feature vectors and signals of the last run, by lane."""
        counts = self._book.counts
        found = {"book": (int(counts[MESSAGES]), int(counts[LEVELS]), 0, 0)}
        for name, pipeline in (("features", self._features), ("signals", self._signals)):
            counters = pipeline.counters
            columns = ("messages", "book_levels", "feature_vectors", "signals")
            messages, levels, vectors, signals = (counters[column] for column in columns)
            found[name] = (messages, levels, vectors, signals)
        return found

    def check(self, rivals: dict[str, Rival]) -> None:
        """Assert that all did the same and ended with the same books."""
        assert len({done[:2] for done in self.did.values()}) == 1, "lanes saw other messages"
        for slot in range(len(self._features.names)):
            sides = [self._features.book(slot, side) for side in (BID, ASK)]
            for side, levels in zip((BID, ASK), sides, strict=True):
                for other in (self._book, self._signals):
                    assert np.array_equal(other.book(slot, side), levels), "books differ"
            for rival in rivals.values():
                rival.check(slot, *sides)

    def digest(self) -> str:
        """Of the signals."""
        assert len(self._digests) == 1, "runs over the same records gave different signals"
        return next(iter(self._digests))
