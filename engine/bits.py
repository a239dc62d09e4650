# Hot path: free @njit functions.
"""The highest and lowest set bit of a 64-bit word, one instruction each."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


def _count(name: str, context: Any, builder: Any, word: Any) -> Any:
    count = builder.module.declare_intrinsic(
        name, [ir.IntType(64)], ir.FunctionType(ir.IntType(64), [ir.IntType(64), ir.IntType(1)])
    )
    return builder.call(count, [word, ir.Constant(ir.IntType(1), 1)])


@intrinsic
def highest_bit(typingctx, word):  # type: ignore[no-untyped-def]
    """Index of the highest set bit of an int64 that is not 0."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        zeros = _count("llvm.ctlz", context, builder, args[0])
        return builder.sub(ir.Constant(ir.IntType(64), 63), zeros)

    return types.int64(types.int64), codegen


@intrinsic
def lowest_bit(typingctx, word):  # type: ignore[no-untyped-def]
    """Index of the lowest set bit of an int64 that is not 0."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        return _count("llvm.cttz", context, builder, args[0])

    return types.int64(types.int64), codegen
