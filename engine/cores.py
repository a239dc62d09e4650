"""The hot path first: a core of its own where there is one, and nobody who interrupts it.

With a core of its own, the thread of the event loop keeps to that; every other thread of the
process and every process that it starts keeps off it. What else runs on the machine is the
operator's to keep away, with ``isolcpus`` or a cpuset.

ZeroMQ's threads may be given a core too, and it may be the same one: they have work when the hot
path sleeps. To wake a thread on a core that sleeps takes an interrupt from one core to the other (a
virtual one has to be entered again as well); on its own core it takes a place in a queue, and what
one has just written is in the caches of the other. Under full load two cores carry more.

On any core, the hot path asks for short time slices: woken up, it is let in at once, and what it
wakes in turn (ZeroMQ's thread, by sending) does not take the core from it before it is done.

Nor does the kernel gather its memory into huge pages: the thread that does (khugepaged) takes a
core for milliseconds at a time, any core, and NumPy asks for it with every array of 4 MB.

Source: sched_setaffinity(2), sched_setattr(2), sched(7) on SCHED_BATCH, proc(5), taskset(1),
PR_SET_THP_DISABLE(2const).
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from contextlib import suppress
from pathlib import Path
from typing import Final

from feeds.errors import InputError

SLICE_NS: Final = 100_000  # the shortest that Linux grants
# struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period.
_ATTRIBUTES: Final = struct.Struct("<IIQiIQQQ")
_SCHED_SETATTR: Final = {"x86_64": 314, "aarch64": 274}
ZEROMQ_NAME: Final = "ZMQbg"  # what libzmq's threads are called
_THREADS: Final = Path("/proc/self/task")
_PR_SET_THP_DISABLE: Final = 41
_allowed: set[int] = set()  # before `keep_to`


def be_patient() -> None:
    """Let this thread, woken up, take no core from others, and give it to whoever is woken on it.

    That takes time slices of the usual length: one who asks for short ones is let finish them.
    """
    if not _schedule(os.SCHED_BATCH, 0):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def be_prompt() -> bool:
    """Let this thread, woken up, take its core from whoever has it; whether the system does so.

    By a short time slice: from Linux 6.12 on, a thread that asks for less at a time is let in
    before one that asks for more has used up its own. Elsewhere nothing changes.
    """
    return _schedule(os.SCHED_OTHER, SLICE_NS)


def _schedule(policy: int, slice_ns: int) -> bool:
    number = _SCHED_SETATTR.get(platform.machine())
    libc = ctypes.CDLL(None, use_errno=True)
    if number is None or not hasattr(libc, "syscall"):
        return False
    attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, policy, 0, os.nice(0), 0, slice_ns, 0, 0)
    return bool(libc.syscall(number, 0, attributes, 0) == 0)


def refuse_huge_pages() -> bool:
    """Let nobody gather this process's memory, or its children's; whether the system has it so."""
    libc = ctypes.CDLL(None, use_errno=True)
    return hasattr(libc, "prctl") and libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0


def keep_to(core: int, io_core: int = -1) -> None:
    """Let this thread have a core, and let the others leave it.

    Parameters
    ----------
    core : int
    io_core : int
        That ZeroMQ's threads keep to, the same or another; -1: any other.

    Raises
    ------
    InputError
        If this process may not use a core.
    """
    global _allowed
    before = os.sched_getaffinity(0)
    for key, number in (("core", core), ("io_core", io_core)):
        if number not in before and (key, number) != ("io_core", -1):
            raise InputError(
                "a core that this process may not use",
                where=f"config key 'loop.{key}'",
                expected="one of " + ", ".join(str(number) for number in sorted(before)),
                found=str(number),
            )
    _allowed = before
    others = before - {core} or before
    own = os.getpid()
    for thread in _THREADS.iterdir():
        if int(thread.name) == own:
            continue
        with suppress(ProcessLookupError, FileNotFoundError):
            of_zeromq = (thread / "comm").read_text().startswith(ZEROMQ_NAME)
            own_core = {io_core} if of_zeromq and io_core >= 0 else others
            os.sched_setaffinity(int(thread.name), own_core)
    os.sched_setaffinity(0, {core})


def let_go() -> None:
    """Use every core again."""
    global _allowed
    if _allowed:
        os.sched_setaffinity(0, _allowed)
    _allowed = set()


def beside() -> list[str]:
    """What a child's command line begins with, so that it keeps off the hot path's core."""
    return only_on(_allowed - os.sched_getaffinity(0))


def only_on(cores: set[int]) -> list[str]:
    """What a command line begins with, to keep to some cores; nothing where there are none."""
    if not cores:
        return []
    return ["taskset", "-c", ",".join(str(number) for number in sorted(cores))]
