"""``octick bench swap``: hot swaps under load: ticks missed, memory, latency around each."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from benchmarks.live_engine import Sent, live_engine
from benchmarks.provenance import REFERENCE, commit, machine
from engine.trust_events import SWAP
from feeds.errors import InputError

LOAD: Final = ["--rate", "250"]
SECTIONS: Final = "[shadow]\nevery = 1\n"
NEAR_NS: Final = 100_000_000  # a tick this close to a swap is around it
SETTLED_SWAPS: Final = 50  # before memory is watched: both models, both shadows are in
MAX_MB_A_100: Final = 1.0
MAX_P99_RATIO: Final = 1.5


class SwapBench(msgspec.Struct, frozen=True):
    """What was measured.

    Attributes
    ----------
    ok : bool
    swaps, signals : int
    missed, doubled : int
        Ticks without a signal or with two, by ``signal_seq``.
    rss_mb_a_100_swaps : float
        Slope of the engine's resident memory.
    near_p99_us, far_p99_us, p99_ratio : float
        Receipt to sent of ticks within `NEAR_NS` of a swap, and of the others.
    swap_p50_ms : float
        From the command to the answer, opening the candidate included.
    replay_differs : int
        Signals of the replay that are not the recorded ones.
    """

    ok: bool
    swaps: int
    signals: int
    missed: int
    doubled: int
    rss_mb_a_100_swaps: float
    near_p50_us: float
    far_p50_us: float
    near_p99_us: float
    far_p99_us: float
    p99_ratio: float
    swap_p50_ms: float
    replay_differs: int
    machine: dict[str, str | int]
    commit: str


def bench_swap(
    swaps: int,
    other: Path,
    *,
    model: Path = REFERENCE,
    pause_s: float = 0.1,
    progress: Callable[[str], Any] = lambda _: None,
) -> SwapBench:
    """Swap two bundles back and forth under a live feed.

    Raises
    ------
    InputError
        If a swap is refused.
    """
    waits, memory = [], []
    with live_engine(model, LOAD, sections=SECTIONS) as session:
        session.wait_until_tradable()
        for n in range(swaps):
            progress(f"swap {n + 1} of {swaps}")
            started = time.perf_counter()
            answer = session.ask("swap", bundle=str((other, model)[n % 2]))
            if not answer["ok"]:
                raise InputError("a swap was refused", where="bench", found=answer["error"])
            waits.append(time.perf_counter() - started)
            memory.append(session.rss_mb())
            time.sleep(pause_s)
        session.finish()
        events, sent = session.events(), session.signals()
        verification = session.replay(model).verification
    assert verification is not None
    at = np.array([at for at, event in events if event.command == SWAP])
    latency = (sent.sent_ns - sent.received_ns) / 1e3
    tradable = sent.reasons == 0
    near = np.abs(sent.sent_ns[:, None] - at[None, :]).min(axis=1) <= NEAR_NS
    missed, doubled = _missed_and_doubled(sent)
    settled = np.array(memory[min(SETTLED_SWAPS, swaps // 2) :])
    slope = float(np.polyfit(np.arange(len(settled)), settled, 1)[0]) * 100
    near_us, far_us = latency[near & tradable], latency[~near & tradable]
    ratio = float(np.percentile(near_us, 99) / np.percentile(far_us, 99))
    return SwapBench(
        ok=(missed, doubled) == (0, 0)
        and slope < MAX_MB_A_100
        and ratio <= MAX_P99_RATIO
        and verification.ok,
        swaps=len(at),
        signals=len(latency),
        missed=missed,
        doubled=doubled,
        rss_mb_a_100_swaps=round(slope, 3),
        near_p50_us=round(float(np.median(near_us)), 1),
        far_p50_us=round(float(np.median(far_us)), 1),
        near_p99_us=round(float(np.percentile(near_us, 99)), 1),
        far_p99_us=round(float(np.percentile(far_us, 99)), 1),
        p99_ratio=round(ratio, 3),
        swap_p50_ms=round(float(np.median(waits)) * 1e3, 1),
        replay_differs=verification.differing,
        machine=machine(),
        commit=commit(),
    )


def _missed_and_doubled(sent: Sent) -> tuple[int, int]:
    missed = doubled = 0
    for slot in np.unique(sent.slot):
        steps = np.diff(sent.signal_seq[sent.slot == slot])
        missed += int(np.maximum(steps - 1, 0).sum())
        doubled += int(np.count_nonzero(steps < 1))
    return missed, doubled
