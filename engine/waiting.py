# Hot path: the intrinsic `wait_for`, which a kernel sleeps by.
"""Waiting for a message without going back to the event loop.

What an event loop waits by is a descriptor itself (epoll's), and that can be waited for like any
other. So the hot path waits for the feeds and for whatever the loop would wake up for at once:
where a message comes, it is taken at once, and where anything else happens, the loop has its turn.
The loop's own timers are the only thing that no descriptor tells; so a wait has an end.

Source: poll(2), epoll(7).
"""

from __future__ import annotations

import asyncio
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


def loop_descriptor(loop: asyncio.AbstractEventLoop) -> int:
    """What an event loop waits by; `NO_DESCRIPTOR` where it does not say."""
    of_uvloop = getattr(loop, "_get_backend_id", None)
    if of_uvloop is not None:
        return int(of_uvloop())
    selector = getattr(loop, "_selector", None)
    descriptor = getattr(selector, "fileno", None)
    return NO_DESCRIPTOR if descriptor is None else int(descriptor())


def new_descriptors(loop: int, feeds: Sequence[int]) -> np.ndarray:
    """What `wait_for` waits for, the event loop's descriptor first: int64 of shape (1 + feeds,).

    Each number is a ``struct pollfd``: the descriptor, and of 16 bits each what it is asked for
    and what has happened.
    """
    rows = np.zeros(1 + len(feeds), dtype=[("fd", "<i4"), ("events", "<i2"), ("revents", "<i2")])
    rows["fd"] = (loop, *feeds)
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
        small, number, pointer = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
        pair = ir.ArrayType(number, 2)
        place = cgutils.alloca_once(builder, pair)
        for i, part in enumerate((builder.sdiv, builder.srem)):
            at = cgutils.gep_inbounds(builder, place, 0, i)
            builder.store(part(args[2], number(SECOND_NS)), at)
        kind = ir.FunctionType(small, [pointer, number, pair.as_pointer(), pointer])
        called = cgutils.get_or_insert_function(builder.module, kind, "ppoll")
        descriptors = builder.inttoptr(args[0], pointer)
        told = builder.call(called, [descriptors, args[1], place, pointer(None)])
        return builder.sext(told, number)

    return signature, codegen
