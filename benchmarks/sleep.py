# Hot path: how a kernel waits for a moment.
"""Sleep until a moment of the monotonic clock, without leaving native code.

An absolute moment, so that nothing between reading the clock and falling asleep adds to the wait.

Source: clock_nanosleep(2), prctl(2).
"""

from __future__ import annotations

import ctypes
from typing import Final

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from feeds.monotonic import CLOCK_MONOTONIC, SECOND_NS

TIMER_ABSTIME: Final = 1
PR_SET_TIMERSLACK: Final = 29
SLACK_NS: Final = 1


def sharpen_sleep() -> None:
    """Let sleeps of this thread end when they should: the default slack is 50 µs (prctl(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl"):
        libc.prctl(PR_SET_TIMERSLACK, SLACK_NS, 0, 0, 0)


@intrinsic
def sleep_until(typingctx, moment_ns):  # type: ignore[no-untyped-def]
    """Sleep until ``moment_ns`` of CLOCK_MONOTONIC: 0, or EINTR where a signal came before."""
    signature = types.int64(types.int64)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        number, small = ir.IntType(64), ir.IntType(32)
        pair = ir.ArrayType(number, 2)
        place = cgutils.alloca_once(builder, pair)
        second = number(SECOND_NS)
        for i, value in enumerate((builder.sdiv(args[0], second), builder.srem(args[0], second))):
            builder.store(value, cgutils.gep_inbounds(builder, place, 0, i))
        pointer = pair.as_pointer()
        kind = ir.FunctionType(small, [small, small, pointer, pointer])
        sleep = cgutils.get_or_insert_function(builder.module, kind, "clock_nanosleep")
        called = builder.call(
            sleep, [small(CLOCK_MONOTONIC), small(TIMER_ABSTIME), place, ir.Constant(pointer, None)]
        )
        return builder.sext(called, number)

    return signature, codegen
