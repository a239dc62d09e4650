# Hot path: the clock that kernels read.
"""The monotonic clock, read without leaving native code: the same as `time.monotonic_ns`."""

from __future__ import annotations

from typing import Final

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

CLOCK_MONOTONIC: Final = 1  # of clock_gettime(2) on Linux
SECOND_NS: Final = 1_000_000_000


@intrinsic
def monotonic_ns(typingctx):  # type: ignore[no-untyped-def]
    """Nanoseconds of CLOCK_MONOTONIC, int64."""
    signature = types.int64()

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        number, small = ir.IntType(64), ir.IntType(32)
        pair = ir.ArrayType(number, 2)
        place = cgutils.alloca_once(builder, pair)
        kind = ir.FunctionType(small, [small, pair.as_pointer()])
        read = cgutils.get_or_insert_function(builder.module, kind, "clock_gettime")
        builder.call(read, [small(CLOCK_MONOTONIC), place])
        seconds, rest = (builder.load(cgutils.gep_inbounds(builder, place, 0, i)) for i in (0, 1))
        return builder.add(builder.mul(seconds, number(SECOND_NS)), rest)

    return signature, codegen
