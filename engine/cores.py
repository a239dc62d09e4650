"""A core of its own for the hot path.

The thread of the event loop keeps to one core; every other thread of the process (ZeroMQ's, above
all) and every process that it starts keeps off it. What else runs on the machine is the operator's
to keep away, with ``isolcpus`` or a cpuset.

Source: sched_setaffinity(2), proc(5), taskset(1).
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from feeds.errors import InputError

_THREADS: Final = Path("/proc/self/task")
_allowed: set[int] = set()  # before `keep_to`


def keep_to(core: int) -> None:
    """Let this thread have a core, and let the others leave it.

    Raises
    ------
    InputError
        If this process may not use the core.
    """
    global _allowed
    before = os.sched_getaffinity(0)
    if core not in before:
        raise InputError(
            "a core that this process may not use",
            where="config key 'loop.core'",
            expected="one of " + ", ".join(str(number) for number in sorted(before)),
            found=str(core),
        )
    _allowed = before
    others = before - {core} or before
    own = os.getpid()
    for thread in _THREADS.iterdir():
        if int(thread.name) != own:
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread.name), others)
    os.sched_setaffinity(0, {core})


def let_go() -> None:
    """Use every core again."""
    global _allowed
    if _allowed:
        os.sched_setaffinity(0, _allowed)
    _allowed = set()


def beside() -> list[str]:
    """What a child's command line begins with, so that it keeps off the hot path's core."""
    others = _allowed - os.sched_getaffinity(0)
    if not others:
        return []
    return ["taskset", "-c", ",".join(str(number) for number in sorted(others))]
