"""``octick bench latency``: tick to signal, in the engine and over the wire, beside a plain echo.

Every message makes a signal due (trigger: each event), so that engine and echo answer the same
messages; recording, value check and shadow are on. The sender follows a schedule and writes the
time at which each message should leave into it, the receiver holds that against its clock: what
was late at the start is late at the end. Engine and echo take turns at every load, and ratios are
those of one turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from benchmarks.idle_cores import describe, idle_cores
from benchmarks.provenance import REFERENCE, provenance
from benchmarks.schedules import arrivals_of, as_recorded, evenly
from benchmarks.signal_latency import signal_rows
from benchmarks.source_tape import source_tape
from benchmarks.stages import Stage, time_stages
from benchmarks.wire_setup import ECHO, ENGINE, SHADOW_EVERY, WARM_SHARE, Turn, Wired, wired
from engine.config import LoopConfig
from engine.jitter import Jitter, measure_jitter
from engine.wakes import Wakes, measure_wakes
from feeds.tape_reader import TapeReader
from replay.session import choose_config

TRANSPORTS: Final = ("ipc", "tcp")
RATES: Final = (1_000, 10_000, 50_000)
RECORDED: Final = 0  # as a rate: the recording's own arrival times
JITTER_S: Final = 1.0
WARM_MESSAGES: Final = 500
HEADLINE: Final = ("ipc", 1_000)


class Quantiles(msgspec.Struct, frozen=True):
    """Of a latency, in microseconds; medians over the turns. ``n`` counts all turns."""

    p50_us: float
    p99_us: float
    p999_us: float
    max_us: float
    n: int


class Cell(msgspec.Struct, frozen=True):
    """One transport at one load.

    ``in_process`` is from message received to signal sent, ``wire`` and ``echo`` from when a
    message should leave its publisher to its signal's receipt. ``late_p99_us`` is how late the
    sender itself was; ``lost`` counts signals that did not arrive.
    """

    transport: str
    load: str
    offered_per_s: float
    in_process: Quantiles
    wire: Quantiles
    echo: Quantiles
    wire_over_echo_p50: float
    wire_over_echo_p99: float
    late_p99_us: float
    lost: int
    echo_lost: int


class WakeControl(msgspec.Struct, frozen=True):
    """What waking a thread took on this host, in microseconds; see `engine.wakes`.

    ``call_…`` is part of every signal that is sent, ``run_…`` of every hop over the wire.
    """

    call_p50_us: float
    call_p99_us: float
    run_p50_us: float
    run_p99_us: float
    n: int


class LatencyBench(msgspec.Struct, frozen=True):
    """Result of ``octick bench latency``; the first figures are those of `HEADLINE`.

    ``cores_awake`` and ``cores_awake_why`` are those of `benchmarks.idle_cores.IdleCores`.
    """

    in_process: Quantiles
    wire: Quantiles
    echo: Quantiles
    jitter: Quantiles
    wake: WakeControl
    wire_over_echo_p50: float
    wire_over_echo_p99: float
    cells: list[Cell]
    stages: list[Stage]
    backend: str
    source: str
    runs: int
    seconds: float
    busy_poll: bool
    warm_us: int
    core: int
    io_core: int
    shadow_every: int
    cores_awake: bool
    cores_awake_why: str
    totals: list[dict[str, Any]]
    machine: dict[str, str | int]
    versions: dict[str, str]
    commit: str
    date: str


def bench_latency(
    path: Path | None,
    *,
    transports: Sequence[str] = TRANSPORTS,
    rates: Sequence[int] = (*RATES, RECORDED),
    runs: int = 3,
    seconds: float = 3.0,
    model: Path = REFERENCE,
    backend: str = "compiled",
    busy_poll: bool = False,
    warm_us: int | None = None,
    core: int = -1,
    io_core: int = -1,
    shadow_every: int = SHADOW_EVERY,
    let_sleep: bool = False,
    progress: Callable[[str], Any] = lambda _: None,
) -> LatencyBench:
    """Measure on a tape of one instrument, by default the recording, else a simulated market.

    Parameters
    ----------
    path : Path or None
    transports : sequence of str
    rates : sequence of int
        Messages a second; `RECORDED` are the tape's own arrival times.
    runs : int
        Turns of engine and echo at each load.
    seconds : float
        Of each turn.
    model, backend
        What answers.
    busy_poll : bool
        Let the engine never sleep.
    warm_us : int or None
        How often it rehearses while it waits, 0 for never; see `engine.warming`. By default as
        often as an engine whose config does not say.
    core, io_core : int
        That the engine's hot path and its ZeroMQ threads keep to; see `engine.config.LoopConfig`.
        Sender and receivers keep off the first, as they would if it were isolated.
    shadow_every : int
        Of how many inferences the shadow answers one; 0 for no shadow.
    let_sleep : bool
        Leave idle cores to the system, in place of keeping them awake.
    progress : callable
        Told what is going on.

    Raises
    ------
    InputError
        If the tape or the bundle cannot be used, or a process does not start.
    """
    cells, totals = [], []
    if warm_us is None:
        warm_us = LoopConfig().warm_every_ns // 1_000
    # Every message is to be answered: what comes late counts as late.
    sections = (
        f"[loop]\nbusy_poll = {str(busy_poll).lower()}\nwarm_every_ns = {warm_us * 1_000}\n"
        f"core = {core}\nio_core = {io_core}\n"
        "[overload]\nconflate_after_ns = 0\n"
    )
    progress("preparing the tape")
    with idle_cores(let_sleep=let_sleep) as cores, source_tape(path) as (source, name):
        arrivals = arrivals_of(source)
        progress("measuring the host")
        jitter, wakes = [measure_jitter(JITTER_S)], [measure_wakes()]
        stages: list[Stage] = []
        if backend == "compiled":
            progress("stage by stage")
            stages = time_stages(source, model, choose_config([TapeReader(source).meta], None))
        for transport in transports:
            progress(f"{transport}: starting the engine")
            with wired(
                *(transport, source, model, backend),
                shadow_every=shadow_every,
                sections=sections,
                off_core=core,
            ) as on:
                _warm(on)
                turns: dict[int, list[tuple[Turn, Turn]]] = {rate: [] for rate in rates}
                for rate in rates:
                    schedule = _schedule(rate, seconds, arrivals)
                    for run in range(runs):
                        progress(f"{transport}, {_load(rate)}: run {run + 1} of {runs}")
                        turns[rate].append(_turns(on, schedule, engine_first=run % 2 == 0))
                jitter.append(measure_jitter(JITTER_S))
                wakes.append(measure_wakes())
                on.finish()
                totals.append(on.totals)
                inside = signal_rows(on.tape)
            for rate, pairs in turns.items():
                offered = len(_schedule(rate, seconds, arrivals)) / seconds
                cells.append(_cell(transport, rate, offered, pairs, inside))
    first = next(
        (one for one in cells if (one.transport, one.load) == (HEADLINE[0], _load(HEADLINE[1]))),
        cells[0],
    )
    return LatencyBench(
        in_process=first.in_process,
        wire=first.wire,
        echo=first.echo,
        jitter=_jitter(jitter),
        wake=_wake(wakes),
        wire_over_echo_p50=first.wire_over_echo_p50,
        wire_over_echo_p99=first.wire_over_echo_p99,
        cells=cells,
        stages=stages,
        backend=backend,
        source=name,
        runs=runs,
        seconds=seconds,
        busy_poll=busy_poll,
        warm_us=warm_us,
        core=core,
        io_core=io_core,
        shadow_every=shadow_every,
        cores_awake=cores.awake,
        cores_awake_why=cores.why,
        totals=totals,
        **provenance(),
    )


def _load(rate: int) -> str:
    return "as recorded" if rate == RECORDED else f"{rate:,}/s"


def _schedule(rate: int, seconds: float, arrivals: np.ndarray) -> np.ndarray:
    return as_recorded(arrivals, seconds) if rate == RECORDED else evenly(rate, seconds)


def _turns(on: Wired, schedule: np.ndarray, *, engine_first: bool) -> tuple[Turn, Turn]:
    if engine_first:
        return on.turn(ENGINE, schedule), on.turn(ECHO, schedule)
    echoed = on.turn(ECHO, schedule)
    return on.turn(ENGINE, schedule), echoed


def _warm(on: Wired) -> None:
    """Let books open and features fill before anything is counted."""
    schedule = evenly(RATES[0], WARM_MESSAGES / RATES[0])
    for to in (ENGINE, ECHO):
        on.turn(to, schedule)


def _quantiles(turns: Sequence[np.ndarray]) -> Quantiles:
    """Medians over the turns; NaN where nothing arrived."""
    rows = [
        np.percentile(took, (50, 99, 99.9, 100)) / 1e3 if len(took) else np.full(4, np.nan)
        for took in turns
    ]
    middle = np.median(np.array(rows), axis=0)
    return _rounded(middle, sum(len(took) for took in turns))


def _rounded(values: np.ndarray, n: int) -> Quantiles:
    p50, p99, p999, most = (round(float(x), 3) for x in values)
    return Quantiles(p50, p99, p999, most, n)


def _cell(
    transport: str,
    rate: int,
    offered: float,
    pairs: Sequence[tuple[Turn, Turn]],
    inside: np.ndarray,
) -> Cell:
    within = []
    for ours, _ in pairs:
        during = inside[(inside[:, 0] >= ours.began_ns) & (inside[:, 0] <= ours.ended_ns), 1]
        within.append(during[round(WARM_SHARE * len(during)) :])
    ratios = [
        np.percentile(ours.took, (50, 99)) / np.percentile(echoed.took, (50, 99))
        for ours, echoed in pairs
        if len(ours.took) and len(echoed.took)
    ]
    p50, p99 = np.median(np.array(ratios), axis=0) if ratios else (np.nan, np.nan)
    return Cell(
        transport=transport,
        load=_load(rate),
        offered_per_s=round(offered, 1),
        in_process=_quantiles(within),
        wire=_quantiles([ours.took for ours, _ in pairs]),
        echo=_quantiles([echoed.took for _, echoed in pairs]),
        wire_over_echo_p50=round(float(p50), 3),
        wire_over_echo_p99=round(float(p99), 3),
        late_p99_us=round(float(np.median([ours.late_p99_us for ours, _ in pairs])), 2),
        lost=sum(ours.lost for ours, _ in pairs),
        echo_lost=sum(echoed.lost for _, echoed in pairs),
    )


def _jitter(measured: Sequence[Jitter]) -> Quantiles:
    rows = [(one.p50_ns, one.p99_ns, one.p999_ns, one.max_ns) for one in measured]
    middle = np.median(np.array(rows), axis=0) / 1e3
    return _rounded(middle, sum(one.readings for one in measured))


def _wake(measured: Sequence[Wakes]) -> WakeControl:
    rows = [(one.call_p50_ns, one.call_p99_ns, one.run_p50_ns, one.run_p99_ns) for one in measured]
    call_p50, call_p99, run_p50, run_p99 = np.median(np.array(rows), axis=0).round().tolist()
    return WakeControl(
        call_p50_us=call_p50 / 1e3,
        call_p99_us=call_p99 / 1e3,
        run_p50_us=run_p50 / 1e3,
        run_p99_us=run_p99 / 1e3,
        n=sum(one.wakes for one in measured),
    )


def _placed(result: LatencyBench) -> str:
    """Where and how the hot path waits."""
    parts = [f"on core {result.core}" if result.core >= 0 else "on any core"]
    if result.core >= 0 and result.io_core >= 0:
        parts.append(f"ZeroMQ's threads on core {result.io_core}")
    parts.append("never sleeps" if result.busy_poll else "sleeps where nothing comes")
    parts.append(f"rehearses every {result.warm_us} µs" if result.warm_us else "never rehearses")
    return ", ".join(parts)


def show(result: LatencyBench) -> None:
    """Print the result as a table."""
    from rich.table import Table

    from feeds.output import wide_console

    table = Table(
        *("", "load", "in process p50", "p99", "wire p50", "p99", "echo p50", "p99"),
        *("wire ÷ echo p50", "p99", "lost"),
        title=f"octick bench latency, µs, {result.backend}, medians of {result.runs} runs",
    )
    for cell in result.cells:
        numbers = [
            value
            for one in (cell.in_process, cell.wire, cell.echo)
            for value in (one.p50_us, one.p99_us)
        ]
        table.add_row(
            *(cell.transport, cell.load, *(f"{value:,.1f}" for value in numbers)),
            *(f"{cell.wire_over_echo_p50:.2f}", f"{cell.wire_over_echo_p99:.2f}"),
            f"{cell.lost:,}" + (f" (echo {cell.echo_lost:,})" if cell.echo_lost else ""),
        )
    console = wide_console()
    console.print(table)
    if result.stages:
        console.print(
            "stages, median ns: "
            + ", ".join(f"{one.stage} {one.p50_ns:,}" for one in result.stages)
        )
    jitter, wake = result.jitter, result.wake
    console.print(
        f"{result.source}, {result.seconds:g} s a run, a signal after every message; recording and "
        f"value check on, shadow on 1 in {result.shadow_every}"
    )
    console.print(f"hot path: {_placed(result)}")
    console.print(f"idle cores: {describe(result.cores_awake, result.cores_awake_why)}")
    console.print(
        f"host jitter: p50 {jitter.p50_us:.2f} µs, p99 {jitter.p99_us:.2f} µs, max "
        f"{jitter.max_us:,.0f} µs; {result.machine['cpu']}; "
        + ", ".join(f"{name} {number}" for name, number in result.versions.items())
    )
    console.print(
        f"to wake a thread: the call p50 {wake.call_p50_us:.1f} µs, p99 {wake.call_p99_us:.1f} µs; "
        f"until it runs p50 {wake.run_p50_us:.1f} µs, p99 {wake.run_p99_us:.1f} µs"
    )
    console.print(f"commit {result.commit or 'none'}, {result.date}")
