"""How long each stage of a process's start took, from the moment the kernel made it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

_AT_START_TIME: Final = 19  # of the fields behind the name in /proc/PID/stat


def age_ns() -> int:
    """Nanoseconds since the kernel started this process, in steps of its clock tick (10 ms).

    0 where the system has no ``/proc``.

    Source: proc_pid_stat(5), field 22, "starttime": ticks since boot.
    """
    try:
        stat = Path("/proc/self/stat").read_text()
    except OSError:
        return 0
    ticks = int(stat.rpartition(")")[2].split()[_AT_START_TIME])
    started_ns = ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) - started_ns


class StartUp:
    """Stages of a start; what came before it was made is the first, ``imports``.

    Attributes
    ----------
    seconds : dict of str to float
        Stage → how long it took, in the order in which they ended.
    """

    def __init__(self) -> None:
        self._last_ns = time.monotonic_ns()
        self.seconds: dict[str, float] = {"imports": round(age_ns() / 1e9, 3)}

    def mark(self, stage: str) -> None:
        """Say that a stage has ended, and the next begins."""
        now_ns = time.monotonic_ns()
        self.seconds[stage] = round((now_ns - self._last_ns) / 1e9, 3)
        self._last_ns = now_ns
