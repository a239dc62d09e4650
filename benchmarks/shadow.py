"""``octick bench shadow``: what the shadow costs the hot path, well, slow, stopped or dead."""

from __future__ import annotations

import os
import signal as os_signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from benchmarks.provenance import REFERENCE, commit, machine
from engine.backends.registry import open_backend
from engine.bundle import load_bundle
from engine.config import ShadowConfig, default_config
from engine.drift import DriftConfig
from engine.pipeline import Pipeline
from engine.shadow import Health, Shadow
from feeds.errors import InputError
from feeds.simulator import Simulator
from feeds.tape import RECORD_HEADER_BYTES, padded

CONDITIONS: Final = ("none", "none again", "up", "slow", "stopped", "killed")
TICK_NS: Final = 1_000_000  # a tick every millisecond, as a busy feed has them
READY_S: Final = 60.0
WARM_MESSAGES: Final = 4_000
MAX_RATIO: Final = 1.05
TURN_TICKS: Final = 200
SLOW_TICKS: Final = 10  # of a turn, in which the slow shadow works
POLL_NS: Final = ShadowConfig().poll_ns


class Condition(msgspec.Struct, frozen=True):
    """Latency of a tick (advance, infer, encode, hand to the shadow), medians over the rounds.

    ``p99_ratio`` is the median over the rounds of p99 against that of "none" in the same round.
    """

    p50_us: float
    p99_us: float
    p50_ratio: float
    p99_ratio: float
    missed: int


class ShadowBench(msgspec.Struct, frozen=True):
    """What was measured; ``ok`` where no state of the shadow costs p99 more than `MAX_RATIO`."""

    ok: bool
    rounds: int
    ticks: int
    conditions: dict[str, Condition]
    machine: dict[str, str | int]
    commit: str


class _Ticks:
    """An endless simulated market, one message at a time, into a pipeline."""

    def __init__(self, pipeline: Pipeline, simulator: Simulator) -> None:
        self.pipeline = pipeline
        self._chunks = simulator.chunks()
        self._buf, self._at, self._stop, _ = next(self._chunks)

    def message(self) -> bool:
        """Take one message; whether a signal is due."""
        if self._at >= self._stop:
            self._buf, self._at, self._stop, _ = next(self._chunks)
        length = int.from_bytes(self._buf[self._at + 4 : self._at + 8].tobytes(), "little")
        after = self._at + RECORD_HEADER_BYTES + padded(length)
        self.pipeline.advance(self._buf, self._at, after)
        self._at = after
        return self.pipeline.fired


def bench_shadow(
    rounds: int,
    ticks: int,
    *,
    model: Path = REFERENCE,
    progress: Callable[[str], Any] = lambda _: None,
) -> ShadowBench:
    """Measure ticks at a steady pace, the conditions in turns of `TURN_TICKS` in one process."""
    simulator = Simulator(seed=7)
    config = default_config((item.venue, item.symbol) for item in simulator.instruments)
    bundle = load_bundle(model)
    pipeline = Pipeline(config, bundle, open_backend("onnx", bundle))
    feed = _Ticks(pipeline, simulator)
    for _ in range(WARM_MESSAGES):
        if feed.message():
            pipeline.answer(time.time_ns)
    shadows = {name: _shadow(pipeline) for name in CONDITIONS[2:]}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in CONDITIONS}
    try:
        for shadow in shadows.values():
            os.kill(shadow.pid, os_signal.SIGSTOP)  # it wakes for its own turns
        os.kill(shadows["killed"].pid, os_signal.SIGKILL)
        for n in range(rounds):
            progress(f"round {n + 1} of {rounds}")
            spent: dict[str, list[np.ndarray]] = {name: [] for name in CONDITIONS}
            for turn in range(max(1, ticks // TURN_TICKS)):
                k = (n + turn) % len(CONDITIONS)
                for name in CONDITIONS[k:] + CONDITIONS[:k]:
                    spent[name].append(_turn(feed, shadows.get(name), name))
            for name, parts in spent.items():
                whole = np.concatenate(parts) / 1e3
                p50, p99 = np.percentile(whole, (50, 99))
                found[name].append((float(p50), float(p99)))
    finally:
        for shadow in shadows.values():
            with suppress(ProcessLookupError):
                os.kill(shadow.pid, os_signal.SIGCONT)
            shadow.close()
    pipeline.close()
    base = np.array(found["none"])
    conditions = {}
    for name, pairs in found.items():
        both = np.array(pairs)
        ratio = np.median(both / base, axis=0)
        conditions[name] = Condition(
            p50_us=round(float(np.median(both[:, 0])), 2),
            p99_us=round(float(np.median(both[:, 1])), 2),
            p50_ratio=round(float(ratio[0]), 3),
            p99_ratio=round(float(ratio[1]), 3),
            missed=shadows[name].missed if name in shadows else 0,
        )
    worst = max(conditions[name].p99_ratio for name in CONDITIONS[2:])
    return ShadowBench(
        ok=worst <= MAX_RATIO * max(1.0, conditions["none again"].p99_ratio),
        rounds=rounds,
        ticks=ticks,
        conditions=conditions,
        machine=machine(),
        commit=commit(),
    )


def _shadow(pipeline: Pipeline) -> Shadow:
    assert pipeline.trust.loaded is not None
    config = ShadowConfig(every=1, restart_after_ns=3_600_000_000_000)
    bundle = pipeline.trust.loaded.bundle
    shadow = Shadow(config, DriftConfig(), bundle, pipeline.names, time.monotonic_ns())
    deadline = time.monotonic() + READY_S
    while shadow.poll(time.monotonic_ns())[1] is not Health.UP:
        if time.monotonic() > deadline:
            shadow.close()
            raise InputError("the shadow did not become ready", where="bench shadow")
        time.sleep(0.01)
    return shadow


def _turn(feed: _Ticks, shadow: Shadow | None, name: str) -> np.ndarray:
    """Nanoseconds of each tick of one turn."""
    pipeline = feed.pipeline
    awake = shadow is not None and name in ("up", "slow")
    if shadow is not None and awake:
        os.kill(shadow.pid, os_signal.SIGCONT)
    spent = np.zeros(TURN_TICKS, dtype=np.int64)
    polled = time.monotonic_ns()
    n = 0
    next_ns = time.perf_counter_ns()
    while n < TURN_TICKS:
        while time.perf_counter_ns() < next_ns:
            pass
        started = time.perf_counter_ns()
        if not feed.message():
            continue
        pipeline.answer(time.time_ns)
        if shadow is not None:
            seq, fresh = pipeline.signal_seq, pipeline.fresh
            shadow.submit(pipeline.ticket, pipeline.slot, seq, fresh, pipeline.x)
        spent[n] = time.perf_counter_ns() - started
        n += 1
        next_ns = started + TICK_NS
        now = time.monotonic_ns()
        if shadow is not None and now - polled > POLL_NS:
            shadow.poll(now)  # between ticks, as the daemon does
            polled = now
        if shadow is not None and name == "slow" and n == SLOW_TICKS:
            os.kill(shadow.pid, os_signal.SIGSTOP)
    if shadow is not None and awake:
        os.kill(shadow.pid, os_signal.SIGSTOP)
    return spent
