# Hot path: free @njit functions.
"""Little-endian integers in a byte array, loaded and stored without alignment or a view.

Numba has no pointer cast, and a structured view of a message costs an array object. These
intrinsics compile to one unaligned load or store each, so decoding a fixed SBE block is a
handful of moves. All functions trust their caller: bounds are checked once a message, by
``feeds.wire.check``.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


def _pointer(context: Any, builder: Any, sig: Any, args: Any, bits: int) -> Any:
    array = context.make_array(sig.args[0])(context, builder, args[0])
    address = builder.gep(array.data, [args[1]])
    return builder.bitcast(address, ir.IntType(bits).as_pointer())


def _loader(bits: int, signed: bool) -> Any:
    result = types.int64 if signed or bits < 64 else types.uint64

    @intrinsic
    def load(typingctx, buf, offset):  # type: ignore[no-untyped-def]
        """Load an integer at a byte offset of a contiguous uint8 array."""

        def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
            pointer = _pointer(context, builder, sig, args, bits)
            value = builder.load(pointer, align=1)
            if bits == 64:
                return value
            extend = builder.sext if signed else builder.zext
            return extend(value, ir.IntType(64))

        return result(types.Array(types.uint8, 1, "C"), types.int64), codegen

    return load


def _storer(bits: int) -> Any:
    @intrinsic
    def store(typingctx, buf, offset, value):  # type: ignore[no-untyped-def]
        """Store the low bits of an integer at a byte offset of a contiguous uint8 array."""

        def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
            pointer = _pointer(context, builder, sig, args, bits)
            value = args[2]
            if bits < 64:
                value = builder.trunc(value, ir.IntType(bits))
            builder.store(value, pointer, align=1)
            return cgutils.get_null_value(ir.IntType(8).as_pointer())

        signature = types.none(types.Array(types.uint8, 1, "C"), types.int64, types.int64)
        return signature, codegen

    return store


@intrinsic
def load_f32(typingctx, buf, offset):  # type: ignore[no-untyped-def]
    """Load a float32 at a byte offset of a contiguous uint8 array."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        array = context.make_array(sig.args[0])(context, builder, args[0])
        address = builder.gep(array.data, [args[1]])
        return builder.load(builder.bitcast(address, ir.FloatType().as_pointer()), align=1)

    return types.float32(types.Array(types.uint8, 1, "C"), types.int64), codegen


@intrinsic
def store_f32(typingctx, buf, offset, value):  # type: ignore[no-untyped-def]
    """Store a float32 at a byte offset of a contiguous uint8 array."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        array = context.make_array(sig.args[0])(context, builder, args[0])
        address = builder.gep(array.data, [args[1]])
        pointer = builder.bitcast(address, ir.FloatType().as_pointer())
        builder.store(args[2], pointer, align=1)
        return cgutils.get_null_value(ir.IntType(8).as_pointer())

    signature = types.none(types.Array(types.uint8, 1, "C"), types.int64, types.float32)
    return signature, codegen


load_u8 = _loader(8, signed=False)
load_i8 = _loader(8, signed=True)
load_u16 = _loader(16, signed=False)
load_u32 = _loader(32, signed=False)
load_i64 = _loader(64, signed=True)
store_u8 = _storer(8)
store_u16 = _storer(16)
store_u32 = _storer(32)
store_i64 = _storer(64)
