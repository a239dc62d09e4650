# Hot path: free @njit functions.
"""The host's side of a request and its answer, in memory that the GPU reads and writes itself.

Each 64-bit word is written and read in one: 32 bits of data, and above them the number of the
request. See `engine.backends.cuda.source` for what the words are.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from engine.backends.cuda.source import (
    COMMAND_WORD,
    HEADER_WORDS,
    POSITION_WORD,
    STATE_WORD,
)

MAX_SEQUENCE: Final = (1 << 32) - 1
PENDING: Final = -1
RETIRED: Final = -2
_WORD_BYTES: Final = 8


def _address(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    array = context.make_array(signature.args[0])(context, builder, args[0])
    return builder.gep(array.data, [args[1]])


@intrinsic
def _load(typingctx, words, at):  # type: ignore[no-untyped-def]
    """One word, read anew at every call."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        address = _address(context, builder, signature, args)
        return builder.load_atomic(address, "acquire", _WORD_BYTES)

    return types.uint64(words, types.intp), codegen


@intrinsic
def _store(typingctx, words, at, word):  # type: ignore[no-untyped-def]
    """One word, written at once."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        address = _address(context, builder, signature, args)
        assert args[2].type == ir.IntType(64)
        builder.store_atomic(args[2], address, "release", _WORD_BYTES)
        return context.get_dummy_value()

    return types.none(words, types.intp, types.uint64), codegen


@njit("void(uint64[::1], uint8[::1], int64, int64, int64, int64)", cache=True, nogil=True)
def post(
    request: np.ndarray, codes: np.ndarray, sequence: int, command: int, position: int, state: int
) -> None:
    """Write a request.

    Parameters
    ----------
    request : ndarray of uint64, shape (request words,)
    codes : ndarray of uint8
        Where there are fewer than the request has room for, the rest is 0.
    sequence : int
        Of 32 bits.
    command, position, state : int
    """
    stamp = np.uint64(sequence) << np.uint64(32)
    low = np.uint64(MAX_SEQUENCE)
    _store(request, COMMAND_WORD, stamp | np.uint64(command))
    _store(request, POSITION_WORD, stamp | np.uint64(position))
    _store(request, STATE_WORD, stamp | np.uint64(state) & low)
    _store(request, STATE_WORD + 1, stamp | np.uint64(state) >> np.uint64(32))
    for w in range(HEADER_WORDS, len(request)):
        word = np.uint64(0)
        at = 4 * (w - HEADER_WORDS)
        for b in range(min(4, len(codes) - at)):
            word |= np.uint64(codes[at + b]) << np.uint64(8 * b)
        _store(request, w, stamp | word)


@njit("int64(uint64[::1], int32[::1], int64, int64, int64)", cache=True, nogil=True)
def collect(reply: np.ndarray, out: np.ndarray, sequence: int, launch: int, polls: int) -> int:
    """Look for an answer.

    Parameters
    ----------
    reply : ndarray of uint64, shape (reply words,)
    out : ndarray of int32, shape (outputs,)
        Overwritten.
    sequence : int
        Of the request.
    launch : int
        Number of the kernel that stays on the GPU; 0 where none does.
    polls : int
        How often to look, at most.

    Returns
    -------
    int
        The mask of the value check; `PENDING` where the answer is not there yet; `RETIRED` where
        that kernel left before it saw this request.
    """
    stamp = np.uint64(sequence)
    retired = stamp << np.uint64(32) | np.uint64(launch)
    end = len(out) + 1
    mask = np.int64(0)
    at = 0
    for _ in range(polls):
        word = _load(reply, at)
        if word >> np.uint64(32) == stamp:
            if at == 0:
                mask = np.int64(word & np.uint64(MAX_SEQUENCE))
            else:
                out[at - 1] = np.int32(word & np.uint64(MAX_SEQUENCE))
            at += 1
            if at == end:
                return int(mask)
        elif _load(reply, end) == retired:
            return RETIRED
    return PENDING
