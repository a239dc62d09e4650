# Hot path: the intrinsics `wait_for` and `set_alarm`, which a kernel sleeps and is woken by.
"""Waiting for a message without going back to the event loop.

What an event loop waits by is a descriptor itself (epoll's), and that can be waited for like any
other. So the hot path waits for the feeds and for whatever the loop would wake up for at once:
where a message comes, it is taken at once, and where anything else happens, the loop has its turn.
The loop's own timers are the only thing that no descriptor tells; so a wait has an end.

What is to be done at a moment soon is told by an alarm, one more descriptor. A wait that ends so
soon would set the core's timer when it begins, and again when a message ends it: the thread then
runs 9.0 µs after the write that wakes it, in place of 3.4 (2026-11-29, a virtual machine). An alarm
sets it once, however many messages come meanwhile (3.6).

Source: poll(2), epoll(7), timerfd_create(2).
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from feeds.monotonic import SECOND_NS

POLLIN: Final = 1
NO_DESCRIPTOR: Final = -1  # poll(2) passes over it
HAPPENED_SHIFT: Final = 48  # where in a `struct pollfd` it is written what has happened
_ABSOLUTE: Final = 1  # TFD_TIMER_ABSTIME
_SMALL: Final = ir.IntType(32)
_NUMBER: Final = ir.IntType(64)
_POINTER: Final = ir.IntType(8).as_pointer()


def loop_descriptor(loop: asyncio.AbstractEventLoop) -> int:
    """What an event loop waits by; `NO_DESCRIPTOR` where it does not say."""
    of_uvloop = getattr(loop, "_get_backend_id", None)
    if of_uvloop is not None:
        return int(of_uvloop())
    selector = getattr(loop, "_selector", None)
    descriptor = getattr(selector, "fileno", None)
    return NO_DESCRIPTOR if descriptor is None else int(descriptor())


def new_alarm() -> int:
    """A descriptor where something happens at the moment that `set_alarm` says; to be closed.

    Raises
    ------
    OSError
        If the process may open no more.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = int(libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_CLOEXEC | os.O_NONBLOCK))
    if descriptor < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return descriptor


def new_descriptors(loop: int, others: Sequence[int]) -> np.ndarray:
    """What `wait_for` waits for, the event loop's descriptor first: int64 of shape (1 + others,).

    Each number is a ``struct pollfd``: the descriptor, and of 16 bits each what it is asked for
    and what has happened.
    """
    rows = np.zeros(1 + len(others), dtype=[("fd", "<i4"), ("events", "<i2"), ("revents", "<i2")])
    rows["fd"] = (loop, *others)
    rows["events"] = POLLIN
    return rows.view(np.int64)


@intrinsic
def wait_for(typingctx: Any, descriptors: Any, n: Any, wait_ns: Any) -> Any:
    """Wait until something has happened, or so many nanoseconds have passed, or for a signal.

    Parameters
    ----------
    descriptors : int
        Address of what `new_descriptors` gives.
    n, wait_ns : int

    Returns
    -------
    int
        How many have something to tell; below 1 where none has.
    """
    signature = types.int64(types.int64, types.int64, types.int64)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        timeout = _times(builder, args[2])
        kind = ir.FunctionType(_SMALL, [_POINTER, _NUMBER, timeout.type, _POINTER])
        called = cgutils.get_or_insert_function(builder.module, kind, "ppoll")
        descriptors = builder.inttoptr(args[0], _POINTER)
        told = builder.call(called, [descriptors, args[1], timeout, _POINTER(None)])
        return builder.sext(told, _NUMBER)

    return signature, codegen


@intrinsic
def set_alarm(typingctx: Any, alarm: Any, at_ns: Any) -> Any:
    """Let something happen at an alarm, and nothing before.

    Parameters
    ----------
    alarm : int
        Of `new_alarm`.
    at_ns : int
        Monotonic time, above 0; one that has passed is now.

    Returns
    -------
    int
        Below 0 where it is no alarm.
    """
    signature = types.int64(types.int64, types.int64)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        once = _times(builder, _NUMBER(0), args[1])
        kind = ir.FunctionType(_SMALL, [_SMALL, _SMALL, once.type, _POINTER])
        called = cgutils.get_or_insert_function(builder.module, kind, "timerfd_settime")
        alarm = builder.trunc(args[0], _SMALL)
        told = builder.call(called, [alarm, _SMALL(_ABSOLUTE), once, _POINTER(None)])
        return builder.sext(told, _NUMBER)

    return signature, codegen


def _times(builder: ir.IRBuilder, *all_ns: Any) -> Any:
    """Nanoseconds as one ``struct timespec`` behind the other; where they stand."""
    place = cgutils.alloca_once(builder, ir.ArrayType(_NUMBER, 2 * len(all_ns)))
    for i, ns in enumerate(all_ns):
        for j, part in enumerate((builder.sdiv, builder.srem)):
            at = cgutils.gep_inbounds(builder, place, 0, 2 * i + j)
            builder.store(part(ns, _NUMBER(SECOND_NS)), at)
    return place
