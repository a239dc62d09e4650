"""``octick bench overload``: more messages than usual for a while, and then nothing.

What is sent is known exactly, so everything is held against it: how long each message waited (from
when it left to its record on the engine's tape), whether all arrived, and whether the engine's
book at the end is the sender's. The sender keeps its book with code of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from benchmarks.idle_cores import describe, idle_cores
from benchmarks.provenance import REFERENCE, provenance
from benchmarks.recorded_peak import SECOND_NS, TEN_MS_NS, busiest
from benchmarks.schedules import arrivals_of, in_ticks
from benchmarks.source_tape import source_tape
from benchmarks.wire_setup import ENGINE, SHADOW_EVERY, Wired, wired
from engine.jitter import measure_jitter
from engine.pipeline import Pipeline
from feeds import tape, wire
from feeds.errors import InputError
from feeds.tape_reader import TapeReader
from replay.session import choose_config

MAX_LAG_MS: Final = 1_000.0
MAX_RECOVERY_MS: Final = 100.0
SETTLE_S: Final = 1.0
JITTER_S: Final = 1.0


class OverloadBench(msgspec.Struct, frozen=True):
    """Result of ``octick bench overload``.

    Attributes
    ----------
    ok : bool
        Nothing lost, the books equal, lag and recovery within `MAX_LAG_MS` and `MAX_RECOVERY_MS`.
    offered_per_s : float
        Messages.
    taken_per_s : float
        From the first to the last record on the tape.
    recorded_peak_per_s : float
        Of the source, in its busiest 10 ms.
    lag_p50_ms, lag_p99_ms, lag_max_ms : float
        From when a message left to its receipt, the least such wait taken off.
    told_lag_max_ms : float
        The longest lag that the engine itself told.
    recovery_ms : float
        From when the last message left to its receipt: nothing waits any more then.
    conflations : int
        Times that the engine conflated.
    signals : int
    cpu_share : float
        Of one core, by the engine's threads while it took the load.
    cores_awake : bool
    cores_awake_why : str
        See `benchmarks.idle_cores.IdleCores`.
    """

    ok: bool
    messages: int
    seconds: float
    offered_per_s: float
    taken_per_s: float
    recorded_peak_per_s: float
    lost: int
    gaps: int
    books_equal: bool
    lag_p50_ms: float
    lag_p99_ms: float
    lag_max_ms: float
    told_lag_max_ms: float
    recovery_ms: float
    conflations: int
    signals: int
    cpu_share: float
    sender_late_p99_us: float
    jitter_p99_us: float
    jitter_max_us: float
    source: str
    backend: str
    trigger: str
    shadow_every: int
    core: int
    cores_awake: bool
    cores_awake_why: str
    machine: dict[str, str | int]
    versions: dict[str, str]
    commit: str
    date: str


def bench_overload(
    path: Path | None,
    *,
    rate: int | None = None,
    seconds: float = 60.0,
    model: Path = REFERENCE,
    backend: str = "compiled",
    trigger: str = "top-of-book",
    shadow_every: int = SHADOW_EVERY,
    max_lag_ms: float = MAX_LAG_MS,
    core: int = -1,
    let_sleep: bool = False,
    progress: Callable[[str], Any] = lambda _: None,
) -> OverloadBench:
    """Send a tape of one instrument faster than it was recorded.

    Parameters
    ----------
    path : Path or None
        By default the recording, else a simulated market.
    rate : int, optional
        Messages a second; by default twice the recorded peak.
    seconds : float
    model, backend
        What answers.
    trigger : str
        ``top-of-book`` or ``events``.
    shadow_every : int
        Of how many inferences the shadow answers one; 0 for no shadow.
    max_lag_ms : float
        That ``ok`` allows.
    core : int
        That the engine's hot path keeps to, and both ends keep off; -1: the system's choice.
    let_sleep : bool
        Leave idle cores to the system, in place of keeping them awake.
    progress : callable
        Told what is going on.

    Raises
    ------
    InputError
        If the tape or the bundle cannot be used, or a process does not start.
    """
    progress("preparing the tape")
    with idle_cores(let_sleep=let_sleep) as cores, source_tape(path) as (source, name):
        peak = _peak_per_s(arrivals_of(source))
        offered = rate if rate is not None else round(2 * peak)
        schedule = in_ticks(offered, seconds)
        jitter = measure_jitter(JITTER_S)
        progress("starting the engine")
        with wired(
            *("ipc", source, model, backend),
            trigger=trigger,
            shadow_every=shadow_every,
            sections=f"[loop]\ncore = {core}\n",
            off_core=core,
        ) as on:
            progress(f"{offered:,} messages/s for {seconds:g} s")
            before_s = on.cpu_seconds()
            turn = on.send(ENGINE, schedule, stamp_due=False)
            spent_s = on.cpu_seconds() - before_s
            time.sleep(SETTLE_S)
            on.finish()
            progress("reading what it recorded")
            received, left, sent = _waits(on.tape)
            books_equal = _books_equal(on)
        totals = on.totals
    lag_ns = received - left
    if len(lag_ns) == 0:
        raise InputError("the engine recorded no message", where="octick bench overload")
    lag_ns -= lag_ns.min()
    recovery_ms = float(lag_ns[-1]) / 1e6
    p50, p99, longest = np.percentile(lag_ns, (50, 99, 100)) / 1e6
    lost = len(schedule) - len(received)
    taken_s = float(received[-1] - received[0]) / 1e9
    ok = lost == 0 and totals["gaps"] == 0 and books_equal
    return OverloadBench(
        ok=bool(ok and longest <= max_lag_ms and recovery_ms <= MAX_RECOVERY_MS),
        messages=len(received),
        seconds=seconds,
        offered_per_s=float(offered),
        taken_per_s=round(len(received) / taken_s, 1),
        recorded_peak_per_s=peak,
        lost=lost,
        gaps=totals["gaps"],
        books_equal=books_equal,
        lag_p50_ms=round(float(p50), 3),
        lag_p99_ms=round(float(p99), 3),
        lag_max_ms=round(float(longest), 3),
        told_lag_max_ms=round(totals["lag_max_ms"], 3),
        recovery_ms=round(recovery_ms, 3),
        conflations=totals["conflations"],
        signals=sent,
        cpu_share=round(spent_s / max(seconds, taken_s), 3),
        sender_late_p99_us=turn["late_p99_us"],
        jitter_p99_us=jitter.p99_ns / 1e3,
        jitter_max_us=jitter.max_ns / 1e3,
        source=name,
        backend=backend,
        trigger=trigger,
        shadow_every=shadow_every,
        core=core,
        cores_awake=cores.awake,
        cores_awake_why=cores.why,
        **provenance(),
    )


def _peak_per_s(arrivals: np.ndarray) -> float:
    return busiest(arrivals, TEN_MS_NS) * SECOND_NS / TEN_MS_NS


def _waits(recording: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """When each message was received and when it left, ns by two clocks; and signals."""
    received, left, signals = [], [], 0
    start = wire.AT_SOURCE_TIME
    for record in TapeReader(recording).records():
        if record.kind == tape.SIGNAL:
            signals += 1
        elif record.kind == tape.MARKET:
            template = int.from_bytes(record.payload[2:4], "little")
            if template not in (wire.INSTRUMENT, wire.HEARTBEAT):
                received.append(record.recv_ns)
                left.append(int.from_bytes(record.payload[start : start + 8], "little"))
    return np.array(received, dtype=np.int64), np.array(left, dtype=np.int64), signals


def _books_equal(on: Wired) -> bool:
    """Whether the engine's own events give the sender's book."""
    reader = TapeReader(on.tape)
    pipeline = Pipeline(choose_config([reader.meta], None), None, None, compute_always=True)
    for chunk in reader.chunks():
        at = chunk.start
        while at < chunk.stop:
            at = pipeline.advance(chunk.buf, at, chunk.stop)
    theirs = on.sender_book()
    return all(np.array_equal(pipeline.book(0, side), theirs[side]) for side in range(len(theirs)))


def show(result: OverloadBench) -> None:
    """Print the result, one fact a line."""
    from rich.table import Table

    from feeds.output import wide_console

    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("offered", f"{result.offered_per_s:,.0f} messages/s for {result.seconds:g} s"),
        ("recorded peak", f"{result.recorded_peak_per_s:,.0f} messages/s, busiest 10 ms"),
        ("taken", f"{result.taken_per_s:,.0f} messages/s, {result.cpu_share:.0%} of a core"),
        ("lost", f"{result.lost:,}, {result.gaps:,} gaps"),
        ("books", "equal" if result.books_equal else "DIFFER"),
        (
            "lag",
            f"p50 {result.lag_p50_ms:.2f} ms, p99 {result.lag_p99_ms:.2f} ms, "
            f"max {result.lag_max_ms:.2f} ms (told: {result.told_lag_max_ms:.2f} ms)",
        ),
        ("recovery", f"{result.recovery_ms:.2f} ms after the last message"),
        (
            "signals",
            f"{result.signals:,} ({result.trigger}, {result.backend}, "
            f"shadow on 1 in {result.shadow_every})",
        ),
        ("conflated", f"{result.conflations:,} times"),
        (
            "sender late, host jitter",
            f"p99 {result.sender_late_p99_us:,.0f} µs; p99 {result.jitter_p99_us:.1f} µs, "
            f"max {result.jitter_max_us:,.0f} µs",
        ),
        ("hot path", f"on core {result.core}" if result.core >= 0 else "on any core"),
        ("idle cores", describe(result.cores_awake, result.cores_awake_why)),
        ("measured", f"{result.source}, {result.commit or 'no commit'}, {result.date}"),
    ):
        table.add_row(f"[bold]{name}[/]", value)
    console = wide_console()
    console.print(table)
    console.print("[green]ok[/]" if result.ok else "[red]not within its bounds[/]")
