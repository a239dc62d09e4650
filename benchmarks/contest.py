"""Contestants on one model, timed in turn: short blocks of each, round after round, one process.

So whatever else the machine does falls on all of them alike. Inputs are put in place outside of the
time that counts; a call is timed from Python, as the engine makes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec
import numpy as np

from benchmarks.power import EnergyCounter, Power, power_of

BLOCK_NS: Final = 4_000_000
MAX_RUNS: Final = 512  # of a block
WARM_UP_RUNS: Final = 200
WARM_UP_NS: Final = 500_000_000
MAX_CONTESTANT_NS: Final = 20_000_000_000  # all its blocks; a slow one then takes no further part


@dataclass
class Lane:
    """One stream of a contestant.

    Attributes
    ----------
    x : ndarray of float32, shape (1, features)
        Where the next input is put.
    out : ndarray of float32
        Where the scores then stand.
    calls : tuple of callable
        Of no argument, one inference each, taken in turn.
    reset : callable
        Starts the stream afresh.
    gives_mask : bool
        Whether a call gives back the mask of the value check.
    """

    x: np.ndarray
    out: np.ndarray
    calls: tuple[Callable[[], object], ...]
    reset: Callable[[], None]
    gives_mask: bool = False
    turn: int = 0

    def step(self, row: np.ndarray) -> object:
        """One inference of a row; what the call gives back."""
        self.x[0] = row
        found = self.calls[self.turn]()
        self.turn = (self.turn + 1) % len(self.calls)
        return found


class Timing(msgspec.Struct, frozen=True):
    """What one contestant took.

    Attributes
    ----------
    p50_us : float
        Median over rounds of each block's median.
    p99_us : float
        Over all calls.
    per_s : float
        Inferences a second of one caller, inputs put in place included; median over rounds.
    runs, rounds : int
    power : Power
    """

    p50_us: float
    p99_us: float
    per_s: float
    runs: int
    rounds: int
    power: Power


@dataclass
class _Clocked:
    """A lane under measurement, and its figures so far."""

    lane: Lane
    rows: np.ndarray
    counter: EnergyCounter | None
    runs: int = 1
    at: int = 0
    spent_ns: int = 0
    took_ns: list[np.ndarray] = field(default_factory=list)
    per_s: list[float] = field(default_factory=list)
    joules: float = 0.0
    seconds: float = 0.0

    def choose_runs(self) -> None:
        """Warm up, and find how many runs fill a block."""
        begin = time.perf_counter_ns()
        last, runs, each = begin, 0, BLOCK_NS
        while runs < 2 or (runs < WARM_UP_RUNS and last - begin < WARM_UP_NS):
            self.lane.step(self._row())
            now = time.perf_counter_ns()
            last, runs, each = now, runs + 1, min(each, now - last)
        self.runs = int(np.clip(BLOCK_NS // max(each, 1), 1, MAX_RUNS))

    def _row(self) -> np.ndarray:
        self.at = (self.at + 1) % len(self.rows)
        row: np.ndarray = self.rows[self.at]
        return row

    def one_by_one(self) -> None:
        """A block of calls, each timed."""
        lane, clock = self.lane, time.perf_counter_ns
        took = np.empty(self.runs, dtype=np.int64)
        lane.step(self._row())  # what ran before has been in the caches
        started = clock()
        for i in range(self.runs):
            lane.x[0] = self._row()
            call = lane.calls[lane.turn]
            begin = clock()
            call()
            took[i] = clock() - begin
            lane.turn = (lane.turn + 1) % len(lane.calls)
        self.spent_ns += clock() - started
        self.took_ns.append(took)

    def back_to_back(self) -> None:
        """A block of calls, timed as a whole."""
        step, rows, clock = self.lane.step, self.rows, time.perf_counter_ns
        order = [rows[(self.at + i) % len(rows)] for i in range(self.runs)]
        before = self.counter.read() if self.counter else 0.0
        begin = clock()
        for row in order:
            step(row)
        took = clock() - begin
        if self.counter:
            self.joules += self.counter.used(before, self.counter.read())
        self.seconds += took / 1e9
        self.spent_ns += took
        self.per_s.append(1e9 * self.runs / took)

    def timing(self) -> Timing:
        """The figures."""
        medians = [float(np.median(block)) for block in self.took_ns]
        every = np.concatenate(self.took_ns)
        return Timing(
            p50_us=round(float(np.median(medians)) / 1e3, 3),
            p99_us=round(float(np.percentile(every, 99)) / 1e3, 3),
            per_s=round(float(np.median(self.per_s)), 1),
            runs=len(every),
            rounds=len(medians),
            power=power_of(self.counter, self.joules, self.seconds, self.runs * len(self.per_s)),
        )


def time_in_turn(
    lanes: Sequence[Lane],
    rows: np.ndarray,
    rounds: int,
    *,
    counters: Sequence[EnergyCounter | None] = (),
    progress: Callable[[float], object] = lambda _: None,
) -> list[Timing]:
    """Time lanes in turn, forwards and backwards alternately.

    Parameters
    ----------
    lanes : sequence of Lane
    rows : ndarray of float32, shape (n, features)
        Inputs, taken in turn.
    rounds : int
    counters : sequence of EnergyCounter or None
        Of each lane.
    progress : callable
        Takes the share that is done.
    """
    watched = counters or (None,) * len(lanes)
    clocked = [_Clocked(lane, rows, c) for lane, c in zip(lanes, watched, strict=True)]
    for item in clocked:
        item.choose_runs()
    for number in range(rounds):
        # No contestant always follows the same one.
        for item in clocked if number % 2 else reversed(clocked):
            if item.spent_ns < MAX_CONTESTANT_NS:
                item.one_by_one()
                item.back_to_back()
        progress((number + 1) / rounds)
    return [item.timing() for item in clocked]
