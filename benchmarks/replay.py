"""``octick bench replay``: how fast book, features and model go through a recorded stream.

Two measurements over the same records, which lie in memory with their checksums verified, so that
the disk is none of it. Both drive the pipeline that daemon and replay run, on one core, after a
warm-up run that is not counted:

*features*
    Book and sequence logic, and the whole feature vector after every applied message; no signals.
*signals*
    The default trigger: inference and an encoded signal at every change of the top of book.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from benchmarks.provenance import (
    RECORDING,
    REFERENCE,
    VENUE,
    commit,
    machine,
    recorded,
    versions,
)
from engine.backends.registry import open_backend
from engine.bundle import load_bundle
from engine.config import Config, served_by
from engine.digest import Digest
from engine.jitter import measure_jitter
from engine.pipeline import Pipeline
from feeds.errors import InputError
from feeds.tape_reader import TapeReader
from replay.session import choose_config

SIMULATED_MESSAGES: Final = 200_000
SIMULATED_SEED: Final = 1
MAX_RECORDS_BYTES: Final = 1 << 31
JITTER_S: Final = 1.0

Records = list[tuple[np.ndarray, int, int]]


class Runs(msgspec.Struct, frozen=True):
    """One measurement: seconds of each run, and what one run did."""

    seconds: list[float]
    messages: int
    levels: int
    feature_vectors: int
    signals: int

    @property
    def median_s(self) -> float:
        """Median of the runs."""
        return statistics.median(self.seconds)


class ReplayBench(msgspec.Struct, frozen=True):
    """Result of ``octick bench replay``.

    ``levels_per_s`` and ``messages_per_s`` are those of book and all features without inference,
    ``signals_per_s`` that of the whole way to the signal; all medians. ``jitter_p99_us`` and
    ``jitter_max_us`` say how long the host took the core away in a loop that does nothing.
    """

    levels_per_s: float
    messages_per_s: float
    signals_per_s: float
    messages_per_s_with_inference: float
    tape: str
    source: str
    backend: str
    digest: str
    runs: int
    features: Runs
    signals: Runs
    core: int | None
    jitter_p99_us: float
    jitter_max_us: float
    machine: dict[str, str | int]
    versions: dict[str, str]
    commit: str
    date: str


def bench_replay(
    path: Path | None,
    *,
    runs: int,
    model: Path = REFERENCE,
    backend: str = "compiled",
    progress: Callable[[str], Any] = lambda _: None,
) -> ReplayBench:
    """Measure on a tape, by default the recording of `RECORDING`, else a simulated market.

    Parameters
    ----------
    path : Path or None
    runs : int
        Counted runs of each measurement.
    model : Path
        Bundle for the second measurement.
    backend : str
        What runs it, on its default device.
    progress : callable
        Told what is going on.

    Raises
    ------
    InputError
        If the tape or the bundle cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="octick-bench-") as folder:
        progress("preparing the tape")
        tape, source = (path, "given") if path is not None else _default_tape(Path(folder))
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
            records.append(
                (chunk.buf[chunk.start : chunk.stop].copy(), 0, chunk.stop - chunk.start)
            )
    core, allowed = _pin()
    try:
        progress("measuring the host")
        jitter = measure_jitter(JITTER_S)
        progress("book and features")
        features = _measure(lambda: _features_run(config, records), runs)
        progress("with inference")
        signals, digest = _measure_signals(config, records, model, backend, runs)
    finally:
        if allowed is not None:
            os.sched_setaffinity(0, allowed)
    return ReplayBench(
        levels_per_s=features.levels / features.median_s,
        messages_per_s=features.messages / features.median_s,
        signals_per_s=signals.signals / signals.median_s,
        messages_per_s_with_inference=signals.messages / signals.median_s,
        tape=tape.name,
        source=source,
        backend=backend,
        digest=digest,
        runs=runs,
        features=features,
        signals=signals,
        core=core,
        jitter_p99_us=jitter.p99_ns / 1e3,
        jitter_max_us=jitter.max_ns / 1e3,
        machine=machine(),
        versions=versions(),
        commit=commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _default_tape(folder: Path) -> tuple[Path, str]:
    recording = recorded(RECORDING)
    if recording is not None:
        from feeds.venues.convert import convert

        target = folder / "recording.tape"
        convert(recording, VENUE, out=target)
        return target, recording.name
    from feeds.simulator import Simulator

    target = folder / "simulated.tape"
    Simulator(seed=SIMULATED_SEED, n_instruments=1).write_tape(target, SIMULATED_MESSAGES)
    return target, f"simulator seed={SIMULATED_SEED}"


def _pin() -> tuple[int | None, set[int] | None]:
    """Stay on one core, where the platform lets us; returns it, and what was allowed before."""
    if not hasattr(os, "sched_setaffinity"):
        return None, None
    allowed = os.sched_getaffinity(0)
    core = max(allowed)
    os.sched_setaffinity(0, {core})
    return core, allowed


def _measure(run: Callable[[], tuple[float, Pipeline]], runs: int) -> Runs:
    run()
    done = [run() for _ in range(runs)]
    counters = done[-1][1].counters
    return Runs(
        [seconds for seconds, _ in done],
        counters["messages"],
        counters["book_levels"],
        counters["feature_vectors"],
        counters["signals"],
    )


def _features_run(config: Config, records: Records) -> tuple[float, Pipeline]:
    pipeline = Pipeline(config, None, None, compute_always=True)
    started = time.perf_counter()
    for buf, start, stop in records:
        at = start
        while at < stop:
            at = pipeline.advance(buf, at, stop)
    return time.perf_counter() - started, pipeline


def _measure_signals(
    config: Config, records: Records, model: Path, backend_name: str, runs: int
) -> tuple[Runs, str]:
    bundle = load_bundle(model)
    config = served_by(config, backend_name)
    backend = open_backend(backend_name, bundle, config.model.device)
    digests = set()

    def run() -> tuple[float, Pipeline]:
        pipeline = Pipeline(config, bundle, backend)
        digest = Digest()
        started = time.perf_counter()
        for buf, start, stop in records:
            at = start
            while at < stop:
                at = pipeline.serve(buf, at, stop)
                if pipeline.served:
                    digest.update_all(pipeline.served, pipeline.signal_bytes)
        seconds = time.perf_counter() - started
        digests.add(digest.hexdigest())
        return seconds, pipeline

    try:
        measured = _measure(run, runs)
    finally:
        backend.close()
    assert len(digests) == 1, "runs over the same records gave different signals"
    return measured, digests.pop()


def show(result: ReplayBench) -> None:
    """Print the result as a table."""
    from rich.table import Table

    from feeds.output import wide_console

    table = Table(
        "measured", "median", "fastest", "slowest", title=f"octick bench replay, {result.runs} runs"
    )
    for name, runs, amount, unit in (
        ("book + all features", result.features, result.features.levels, "levels/s"),
        ("book + all features", result.features, result.features.messages, "messages/s"),
        ("… to the signal", result.signals, result.signals.messages, "messages/s"),
        ("… to the signal", result.signals, result.signals.signals, "signals/s"),
    ):
        rates = [
            amount / seconds for seconds in (runs.median_s, min(runs.seconds), max(runs.seconds))
        ]
        table.add_row(name, f"{rates[0]:,.0f} {unit}", *(f"{rate:,.0f}" for rate in rates[1:]))
    console = wide_console()
    console.print(table)
    features = result.features
    console.print(
        f"{result.source}: {features.messages:,} messages, {features.levels:,} levels, "
        f"{features.feature_vectors:,} feature vectors, {result.signals.signals:,} signals "
        f"({result.backend})"
    )
    console.print(
        f"host jitter: p99 {result.jitter_p99_us:.1f} µs, max {result.jitter_max_us:.1f} µs; "
        f"{result.machine['cpu']}, core {result.core}; "
        + ", ".join(f"{name} {number}" for name, number in result.versions.items())
    )
    console.print(f"commit {result.commit or 'none'}, {result.date}, digest {result.digest}")
