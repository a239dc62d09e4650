"""``octick bench features``: nanoseconds an update of all features, stage by stage.

The applied messages of a recording (or of a simulated market) go through the engine's own kernels,
the book included, on one core. Three measurements, run after run in turn:

*passes*
    Untimed inside: book alone, with the features' state, with a whole vector after each message.
    Their differences are means, as the engine sees them: nothing waits for a clock.
*single updates*
    State and vector of every message between two readings of the clock, whose cost is taken off.
    These give medians and tails; waiting for a reading costs them the overlap with what follows.
*stages*
    The same between the kernels that an update is made of.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from benchmarks import feature_kernels as kernels
from benchmarks.feature_stages import COMPUTE, GROUPS, TABLE, Stage
from benchmarks.provenance import provenance
from benchmarks.replay import pin
from benchmarks.source_tape import default_tape
from engine import features
from engine.book import FLOW_FIELDS, new_books
from engine.config import Config
from engine.jitter import Jitter, measure_jitter
from feeds import sync
from feeds.errors import InputError
from feeds.tape_reader import TapeReader
from replay.session import choose_config

DEFAULT_RUNS: Final = 5
JITTER_S: Final = 1.0
PASSES_A_RUN: Final = 5  # untimed inside, and short
REACHES: Final = (kernels.REACH_BOOK, kernels.REACH_STATE, kernels.REACH_VECTOR)
MAX_RECORDS_BYTES: Final = 1 << 30
KINDS: Final = {"delta": "on_book", "trade": "on_trade"}  # and the stage that tells one


class StageCost(msgspec.Struct, frozen=True, kw_only=True):
    """What one stage takes where it runs, the clock's cost taken off; medians over runs.

    Means, not medians, of the messages: a clock that steps by ten nanoseconds or more cannot tell
    short stages apart one by one.

    Attributes
    ----------
    stage : str
        The kernel.
    part : str
        "update" or "compute".
    within : tuple of str
        The stages that it is a part of; empty where it stands for itself.
    features : tuple of str
        What it makes ("compute"), or keeps something for ("update").
    ns, p99_ns : float
        Mean without the slowest hundredth, which is the host's; and where that begins.
    ns_each : float or None
        ``ns`` over the number of features; None where the cost is shared and cannot be divided.
    share : float
        Of all messages, those in which it ran.
    """

    stage: str
    part: str
    within: tuple[str, ...]
    features: tuple[str, ...]
    ns: float
    p99_ns: float
    ns_each: float | None
    share: float


class KindCost(msgspec.Struct, frozen=True):
    """State and all features after one kind of message, timed one by one: ``n`` a pass."""

    kind: str
    n: int
    p50_ns: float
    p99_ns: float


class GroupCost(msgspec.Struct, frozen=True):
    """A group of the catalogue: what the stages that make it take, summed, and divided."""

    group: str
    stages: tuple[str, ...]
    features: int
    ns: float
    ns_each: float


class FeaturesBench(msgspec.Struct, frozen=True, kw_only=True):
    """Result of ``octick bench features``.

    Attributes
    ----------
    update_p50_ns, update_p99_ns : float
        State and all features of one message, timed one by one.
    state_p50_ns, compute_p50_ns : float
        Its two halves, each timed by itself.
    update_mean_ns, state_mean_ns, compute_mean_ns, book_mean_ns : float
        From the passes: differences, and what the book alone takes.
    clock_ns : float
        Median of what two readings of the clock are apart with nothing in between, taken off.
    kinds : list of KindCost
        The first two figures by kind of message: most are trades, which do less.
    stages : list of StageCost
    groups : list of GroupCost
    rest_of_on_book_ns, rest_of_on_trade_ns : float
        Medians of what a whole update takes beyond its stages above, message by message. Stages
        waited for one by one take longer than together, so it can fall short, even below 0.
    updates : int
        Messages of a pass.
    source : str
    runs : int
    core : int or None
    jitter, machine, versions, commit, date
    """

    update_p50_ns: float
    update_p99_ns: float
    state_p50_ns: float
    compute_p50_ns: float
    update_mean_ns: float
    state_mean_ns: float
    compute_mean_ns: float
    book_mean_ns: float
    clock_ns: float
    kinds: list[KindCost]
    stages: list[StageCost]
    groups: list[GroupCost]
    rest_of_on_book_ns: float
    rest_of_on_trade_ns: float
    updates: int
    source: str
    runs: int
    core: int | None
    jitter: Jitter
    machine: dict[str, str | int]
    versions: dict[str, str]
    commit: str
    date: str


@dataclass(frozen=True)
class Updates:
    """The applied messages of one instrument, end to end.

    Attributes
    ----------
    buf : ndarray of uint8
    starts, resets : ndarray of int64, shape (n,)
        Where each begins, and whether the features begin anew with it.
    max_levels : int
        Of the book.
    source : str
    """

    buf: np.ndarray
    starts: np.ndarray
    resets: np.ndarray
    max_levels: int
    source: str


def read_updates(path: Path, config: Config, source: str) -> Updates:
    """What a tape of one instrument applies to book and features, in order.

    Raises
    ------
    InputError
        If it holds another number of instruments, nothing at all, or more than memory should.
    """
    if len(config.instruments) != 1:
        raise InputError(
            "this is measured on one instrument",
            where=str(path),
            expected="a tape of one",
            found=f"{len(config.instruments)} instruments",
        )
    row = np.zeros(sync.ROW_FIELDS, dtype=np.int64)
    row[sync.WANT_SNAPSHOT] = 1
    held = np.zeros(config.limits.max_pending_bytes, dtype=np.uint8)
    chunks = [chunk.buf[chunk.start : chunk.stop].copy() for chunk in TapeReader(path).chunks()]
    size = sum(len(chunk) for chunk in chunks)
    if size > MAX_RECORDS_BYTES:
        raise InputError(
            "tape too large to measure in memory",
            where=str(path),
            expected=f"at most {MAX_RECORDS_BYTES} bytes",
        )
    buf = np.zeros(size, dtype=np.uint8)
    most = size // kernels.MIN_RECORD_BYTES + 1
    starts, resets = np.zeros(most, dtype=np.int64), np.zeros(most, dtype=np.int64)
    filled = n = 0
    for chunk in chunks:
        filled, n = kernels.collect_updates(chunk, row, held, buf, starts, resets, filled, n)
    if n == 0:
        raise InputError("no message is ever applied", where=str(path), expected="a snapshot")
    levels = config.book.max_levels
    return Updates(buf[:filled].copy(), starts[:n].copy(), resets[:n].copy(), levels, source)


class Passes:
    """Passes over the same updates, each from an empty book and fresh features.

    Attributes
    ----------
    vector : ndarray of float64, shape (N_FEATURES,)
        The features after the last message of the last pass that made them.
    scratch : ndarray of float64, shape (N_FEATURES,)
        Those of them that a staged pass made a second time, part by part.
    """

    def __init__(self, updates: Updates) -> None:
        self._updates = updates
        self._messages = (updates.buf, updates.starts, updates.resets)
        self.vector = np.zeros(features.N_FEATURES)
        self.scratch = np.zeros(features.N_FEATURES)

    def _fresh(self) -> tuple[np.ndarray, ...]:
        books = [array[0] for array in new_books(1, self._updates.max_levels)]
        fi = np.zeros(features.STATE_I, dtype=np.int64)
        ff = np.zeros(features.STATE_F)
        features.reset(fi, ff)
        self.vector[:] = 0.0
        return (*books, np.zeros(FLOW_FIELDS, dtype=np.int64), fi, ff)

    def run(self, reach: int) -> float:
        """Nanoseconds a message of an untimed pass that goes as far as ``reach``."""
        state = self._fresh()
        begin = time.perf_counter_ns()
        kernels.run_pass(*self._messages, reach, *state, self.vector)
        return (time.perf_counter_ns() - begin) / len(self._updates.starts)

    def timed(self) -> np.ndarray:
        """Columns of every message, int64 of shape (n, TIMED_FIELDS)."""
        took = np.zeros((len(self._updates.starts), kernels.TIMED_FIELDS), dtype=np.int64)
        for split in (0, 1):
            kernels.timed_pass(*self._messages, split, *self._fresh(), self.vector, took)
        return took

    def staged(self) -> np.ndarray:
        """Columns of every message, int64 of shape (n, len(STAGES))."""
        took = np.zeros((len(self._updates.starts), len(kernels.STAGES)), dtype=np.int64)
        state = self._fresh()
        kernels.staged_pass(*self._messages, *state, self.vector, self.scratch, took)
        return took


def bench_features(
    runs: int = DEFAULT_RUNS,
    *,
    progress: Callable[[str, float], Any] = lambda stage, share: None,
) -> FeaturesBench:
    """Measure on the recording of `benchmarks.provenance`, else on a simulated market.

    Parameters
    ----------
    runs : int
        Passes of each kind, in turn.
    progress : callable
        Takes the stage and its share done.
    """
    with tempfile.TemporaryDirectory(prefix="octick-bench-") as folder:
        progress("preparing the tape", 0.0)
        path, source = default_tape(Path(folder))
        updates = read_updates(path, choose_config([TapeReader(path).meta], None), source)
    passes = Passes(updates)
    core, allowed = pin()
    try:
        means: list[list[float]] = []
        timed: list[np.ndarray] = []
        staged: list[np.ndarray] = []
        left: list[list[float]] = []
        for number in range(-1, runs):
            progress("passes in turn", max(number, 0) / runs)
            ran = [[passes.run(reach) for reach in REACHES] for _ in range(PASSES_A_RUN)]
            singles, stages = passes.timed(), passes.staged()
            if number >= 0:  # the first warms up
                means += ran
                timed.append(_quantiles(singles, stages))
                staged.append(_stage_figures(stages))
                left.append([_rest(stages, "on_book"), _rest(stages, "on_trade")])
        jitter = measure_jitter(JITTER_S)
    finally:
        if allowed is not None:
            os.sched_setaffinity(0, allowed)
    middle = np.median(timed, axis=0)
    clock_ns = float(middle[0, 0, kernels.EMPTY])
    whole = middle[:, :, kernels.WHOLE] - clock_ns
    figures = np.median(staged, axis=0)
    costs = [_cost(stage, figures[kernels.STAGES.index(stage.name)]) for stage in TABLE]
    rests = np.median(left, axis=0)
    return FeaturesBench(
        update_p50_ns=_round(whole[0, 0]),
        update_p99_ns=_round(whole[0, 1]),
        state_p50_ns=_round(middle[0, 0, kernels.FOLD] - clock_ns),
        compute_p50_ns=_round(middle[0, 0, kernels.COMPUTE] - clock_ns),
        update_mean_ns=_round(statistics.median(run[2] - run[0] for run in means)),
        state_mean_ns=_round(statistics.median(run[1] - run[0] for run in means)),
        compute_mean_ns=_round(statistics.median(run[2] - run[1] for run in means)),
        book_mean_ns=_round(statistics.median(run[0] for run in means)),
        clock_ns=_round(clock_ns),
        kinds=[
            KindCost(kind, int(_ran(stages, name).sum()), _round(p50), _round(p99))
            for (kind, name), (p50, p99) in zip(KINDS.items(), whole[1:], strict=True)
        ],
        stages=costs,
        groups=[_group(name, names, costs) for name, names in GROUPS.items()],
        rest_of_on_book_ns=_round(rests[0]),
        rest_of_on_trade_ns=_round(rests[1]),
        updates=len(updates.starts),
        source=source,
        runs=runs,
        core=core,
        jitter=jitter,
        **provenance(),
    )


def _round(ns: float) -> float:
    return round(float(ns), 1)


def _quantiles(took: np.ndarray, stages: np.ndarray) -> np.ndarray:
    """p50 and p99 of each column: of all messages, then of each kind."""
    every = np.ones(len(took), dtype=bool)
    rows = np.zeros((1 + len(KINDS), 2, took.shape[1]))
    for i, mine in enumerate((every, *(_ran(stages, name) for name in KINDS.values()))):
        if mine.any():
            rows[i] = np.percentile(took[mine], (50, 99), axis=0)
    return rows


def _ran(took: np.ndarray, name: str) -> np.ndarray:
    found: np.ndarray = took[:, kernels.STAGES.index(name)] != kernels.NOT_RUN
    return found


def _mean(took: np.ndarray) -> float:
    """Mean without the slowest hundredth."""
    return float(took[took <= np.percentile(took, 99)].mean())


def _clock(took: np.ndarray) -> float:
    return _mean(took[:, kernels.STAGES.index("empty")])


def _stage_figures(took: np.ndarray) -> np.ndarray:
    """Mean, p99 and share of each stage where it ran, the clock taken off."""
    clock = _clock(took)
    rows = np.zeros((len(kernels.STAGES), 3))
    for i, name in enumerate(kernels.STAGES):
        ran = took[_ran(took, name), i]
        if len(ran):
            p99 = float(np.percentile(ran, 99))
            rows[i] = _mean(ran) - clock, p99 - clock, len(ran) / len(took)
    return rows


def _rest(took: np.ndarray, whole: str) -> float:
    """What a stage takes beyond those within it."""
    rows = took[_ran(took, whole)]
    if not len(rows):
        return 0.0
    clock = _clock(took)
    inside = [kernels.STAGES.index(stage.name) for stage in TABLE if whole in stage.within]
    columns = rows[:, inside]
    parts = np.where(columns == kernels.NOT_RUN, 0.0, columns - clock).sum(axis=1)
    return float(np.median(rows[:, kernels.STAGES.index(whole)] - clock - parts))


def _cost(stage: Stage, figures: np.ndarray) -> StageCost:
    mean, p99, share = (float(figure) for figure in figures)
    # The decays serve many; the rest of `compute` makes what it is listed with.
    divides = stage.part == COMPUTE and stage.name != "clock_decays"
    return StageCost(
        stage=stage.name,
        part=stage.part,
        within=stage.within,
        features=stage.features,
        ns=_round(mean),
        p99_ns=_round(p99),
        ns_each=round(mean / len(stage.features), 2) if divides else None,
        share=round(share, 4),
    )


def _group(name: str, names: Sequence[str], costs: Sequence[StageCost]) -> GroupCost:
    mine = [cost for cost in costs if cost.stage in names]
    ns = sum(cost.ns for cost in mine)
    count = len({feature for cost in mine for feature in cost.features})
    return GroupCost(name, tuple(names), count, _round(ns), round(ns / count, 2))


def show(result: FeaturesBench) -> None:
    """The whole, the stages, the groups, and what it was measured on."""
    from rich.table import Table

    from feeds.output import wide_console

    console = wide_console()
    table = Table("", "p50, ns", "p99, ns", "mean of a pass, ns", title="one update")
    table.add_row(
        "state and all features",
        f"{result.update_p50_ns:,.0f}",
        f"{result.update_p99_ns:,.0f}",
        f"{result.update_mean_ns:,.0f}",
    )
    for kind in result.kinds:
        name = f"  after a {kind.kind} ({kind.n:,} of {result.updates:,})"
        table.add_row(name, f"{kind.p50_ns:,.0f}", f"{kind.p99_ns:,.0f}", "")
    halves = (
        ("… the state", result.state_p50_ns, result.state_mean_ns),
        (f"… {features.N_FEATURES} features of it", result.compute_p50_ns, result.compute_mean_ns),
    )
    for name, p50, mean in halves:
        table.add_row(name, f"{p50:,.0f}", "", f"{mean:,.0f}")
    table.add_row("(the book before it)", "", "", f"{result.book_mean_ns:,.0f}")
    console.print(table)
    table = Table("stage", "runs in", "mean, ns", "p99, ns", "features", "ns each")
    table.title = "stages, each waited for: together they take longer than the whole"
    for cost in result.stages:
        name = f"  of which {cost.stage}" if cost.within else cost.stage
        each = "shared" if cost.ns_each is None else f"{cost.ns_each:.2f}"
        count = f"{len(cost.features)}" if cost.part == COMPUTE else f"for {len(cost.features)}"
        table.add_row(
            name, f"{cost.share:.1%}", f"{cost.ns:,.1f}", f"{cost.p99_ns:,.0f}", count, each
        )
    console.print(table)
    table = Table("group", "stages", "features", "ns", "ns each")
    table.title = "groups: no feature of a group is timed alone, they share their stages' work"
    for group in result.groups:
        table.add_row(
            group.group,
            " + ".join(group.stages),
            str(group.features),
            f"{group.ns:,.1f}",
            f"{group.ns_each:.2f}",
        )
    console.print(table)
    jitter = result.jitter
    console.print(
        f"the rest of on_book {result.rest_of_on_book_ns:g} ns, of on_trade"
        f" {result.rest_of_on_trade_ns:g} ns, by difference; a reading of the clock,"
        f" {result.clock_ns:g} ns, is taken off each",
        highlight=False,
    )
    console.print(
        f"{result.source}: {result.updates:,} messages, {result.runs} runs in turn;"
        f" host jitter: p99 {jitter.p99_ns / 1e3:g} us, max {jitter.max_ns / 1e3:g} us",
        highlight=False,
    )
    on = ", ".join(str(value) for value in result.machine.values())
    with_ = ", ".join(f"{name} {text}" for name, text in result.versions.items())
    console.print(
        f"{on}, core {result.core}; {with_}; {result.commit}; {result.date}",
        markup=False,
        highlight=False,
    )
