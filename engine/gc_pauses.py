"""How often the garbage collector stopped this process, and for how long at most.

CPython collects while it holds the interpreter: whatever thread asks, everything waits. A callback
before and after each collection times exactly that.

Source: Python documentation, ``gc.callbacks``.
"""

from __future__ import annotations

import gc
import time
from typing import Any


class GcPauses:
    """Collections of every generation, whoever asked for them, from `watch` to `close`.

    Attributes
    ----------
    collections : int
    longest_ns, total_ns : int
        Of one pause, and of all together.
    """

    def __init__(self) -> None:
        self.collections = 0
        self.longest_ns = self.total_ns = 0
        self._started_ns = 0

    def watch(self) -> None:
        """Count from now on."""
        gc.callbacks.append(self._note)

    def _note(self, phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            self._started_ns = time.perf_counter_ns()
            return
        pause_ns = time.perf_counter_ns() - self._started_ns
        self.collections += 1
        self.total_ns += pause_ns
        self.longest_ns = max(self.longest_ns, pause_ns)

    def close(self) -> None:
        """Stop counting; what was counted stays. Closing twice is fine."""
        if self._note in gc.callbacks:
            gc.callbacks.remove(self._note)
