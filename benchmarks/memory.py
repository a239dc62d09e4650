"""``octick bench memory``: does a replay's memory grow with what it replays?"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from benchmarks.provenance import REFERENCE, provenance
from feeds.errors import InputError
from feeds.simulator import Simulator
from replay.session import replay_tapes

SEED: Final = 9
SAMPLE_S: Final = 0.1
SETTLED_SHARE: Final = 0.1  # of the samples, at the start: buffers and the model are taken in


class MemoryBench(msgspec.Struct, frozen=True):
    """Resident memory over one replay, in MB, and its slope after the start."""

    messages: int
    signals: int
    messages_per_s: float
    samples: int
    rss_settled_mb: float
    rss_end_mb: float
    growth_mb: float
    digest: str
    machine: dict[str, str | int]
    versions: dict[str, str]
    commit: str
    date: str


def rss_mb() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def bench_memory(
    messages: int, *, model: Path = REFERENCE, progress: Callable[[str], Any] = lambda _: None
) -> MemoryBench:
    """Replay so many simulated messages with inference, and watch the resident memory.

    ``growth_mb`` is the fitted slope times the time of the replay, its first tenth left out.

    Raises
    ------
    InputError
        If the replay is too short to say anything, or the system has no ``/proc``.
    """
    if not Path("/proc/self/statm").exists():
        raise InputError("no /proc/self/statm", where="bench memory", fix="run it on Linux")
    with tempfile.TemporaryDirectory(prefix="octick-bench-") as folder:
        path = Path(folder) / "long.tape"
        progress(f"simulating {messages:,} messages")
        Simulator(seed=SEED).write_tape(path, messages)
        progress(f"replaying {messages:,} messages")
        samples: list[tuple[float, float]] = []
        done = threading.Event()

        def watch() -> None:
            while not done.wait(SAMPLE_S):
                samples.append((time.monotonic(), rss_mb()))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            report = replay_tapes([path], model=model)
        finally:
            done.set()
            watcher.join()
    settled = np.array(samples[int(len(samples) * SETTLED_SHARE) :])
    if len(settled) < 8:
        raise InputError(
            "too short to say anything about memory",
            where="bench memory",
            found=f"{len(settled)} samples",
            fix="replay more messages",
        )
    slope = np.polyfit(settled[:, 0], settled[:, 1], 1)[0]
    return MemoryBench(
        messages=report.messages,
        signals=report.signals,
        messages_per_s=report.messages_per_s,
        samples=len(settled),
        rss_settled_mb=round(float(settled[0, 1]), 1),
        rss_end_mb=round(float(settled[-1, 1]), 1),
        growth_mb=round(float(slope * (settled[-1, 0] - settled[0, 0])), 2),
        digest=report.digest,
        **provenance(),
    )
