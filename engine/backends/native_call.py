# Hot path: what a kernel calls a model's step through.
"""Calling a model's step from another kernel, by its address: a compiled one or ONNX Runtime's.

The kernels around a model are compiled once and kept; which step they call is known only when a
bundle is opened.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.extending import intrinsic

from feeds.c_functions import WORD, c_function

# Columns of `native`, int64: a model as a kernel runs it.
STEP: Final = 0  # address of the step
X: Final = 1  # of its input, float32
OUT: Final = 2  # of its scores, float32
ARENA: Final = 3
FRESH: Final = 4  # of the state of a fresh stream
STATE_BYTES: Final = 5
NATIVE_FIELDS: Final = 6

STEP_FAILED: Final = -1  # in place of a mask: nothing was inferred, and the state is as it was
ALIGNMENT: Final = 64  # bytes: a cache line, and the widest vector


class NativeModel(NamedTuple):
    """A model, ready to be called by a kernel.

    Attributes
    ----------
    step, arena, fresh : int
        Addresses: of the code, of weights and values, of the state of a fresh stream.
    state_bytes : int
    states : ndarray of int64, shape (streams,)
        Address of each stream's state; copying ``state_bytes`` of ``fresh`` there begins it anew.
    """

    step: int
    arena: int
    fresh: int
    state_bytes: int
    states: np.ndarray


def aligned(size: int) -> int:
    """A size rounded up to whole `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def aligned_bytes(size: int) -> np.ndarray:
    """Zeros, uint8, that begin at a multiple of `ALIGNMENT`."""
    raw = np.zeros(size + ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size]


@intrinsic
@c_function(WORD, [WORD] * 4)
def run_step(typingctx, step, x, out, arena, state):  # type: ignore[no-untyped-def]
    """One step of the code at an address: the mask of the value check, or `STEP_FAILED`."""


@intrinsic
def copy_bytes(typingctx, target, source, n_bytes):  # type: ignore[no-untyped-def]
    """So many bytes from one address to another."""
    signature = types.int64(types.int64, types.int64, types.int64)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        from numba.core import cgutils

        pointer = ir.IntType(8).as_pointer()
        to, of = (builder.inttoptr(address, pointer) for address in args[:2])
        cgutils.raw_memcpy(builder, to, of, args[2], 1)
        return args[2]

    return signature, codegen
