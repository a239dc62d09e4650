# Hot path: free @njit functions.
"""From tape records to signals without Python in between, where the model is a compiled one.

`serve` is `engine.advance.advance` and all of `Pipeline.answer` in one loop: it goes on from signal
to signal until one needs what only Python can do (a trust event, a rule over a violation), or there
is no more room for signals. The same functions are called in the same order, so that the bytes are
those of `Pipeline.answer`.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit

from engine import signals
from engine.advance import FIRED_SLOT, STREAM_RESET, advance
from engine.backends.compiled.native_call import (
    ARENA,
    FRESH,
    OUT,
    STATE_BYTES,
    STEP,
    X,
    copy_bytes,
    run_step,
)
from engine.recent import remember

# Columns of `round`, int64: what a call is told, and what it leaves.
TICKET: Final = 0
BLOCKED: Final = 1  # reasons from outside: halted
PRECISION: Final = 2
NUMERICS: Final = 3
SHADOW: Final = 4
MODE: Final = 5  # what answers
SIGNALS: Final = 6  # written by this call
TRADABLE: Final = 7  # of them
JUDGE: Final = 8  # reasons of the last one, where the rules are to see it; else 0
SUPPRESSED: Final = 9  # and behind it: how many had each of 16 reasons
ROUND_FIELDS: Final = SUPPRESSED + 16


@njit(
    "int64(uint8[::1], int64, int64, uint8[:,::1], int64[:,::1], int64[:,::1], uint8[:,::1],"
    " int64[:,:,::1], int64[:,:,:,::1], int64[:,:,:,::1], int64[:,::1], int64[::1],"
    " int64[:,::1], float64[:,::1], int64[:,::1], int64[::1], int64[::1], int64[::1], float64[::1],"
    " float64[:,::1], float64, float32[:,:,::1], float32[:,::1], uint8[::1],"
    " uint8[:,::1], float32[::1], int64[:,::1], float32[:,:,::1], int64[::1], float64[::1],"
    " int64[:,::1], float64[:,::1], float32[:,::1], int64[::1], int64[::1], int64[::1],"
    " uint8[::1])",
    cache=True,
)
def serve(  # type: ignore[no-untyped-def]
    buf, at, stop, keys, ids, sync_rows, held, windows, fars, tops, depths, flow, fis, ffs, tracks,
    shared, params, facts, vector, norm, clip, seen, x, x_bytes, messages, outputs, guards, scores,
    limits_i, limits_f, about, vectors, outs, native, states, round, out,
):  # fmt: skip
    """Consume whole tape records of ``buf[at:stop]`` and write every signal that they make due.

    Parameters
    ----------
    buf, ..., x_bytes
        As `engine.advance.advance` takes them.
    messages : ndarray of uint8, shape (instruments, message bytes)
        Templates of each instrument's signal.
    outputs : ndarray of float32, shape (classes,)
    guards, scores, limits_i, limits_f : ndarray
        See `engine.controls`.
    about, vectors, outs : ndarray
        See `engine.recent`.
    native, states : ndarray of int64
        The model; see `engine.backends.compiled.native_call`.
    round : ndarray of int64, shape (ROUND_FIELDS,)
    out : ndarray of uint8
        Signals, one behind the other.

    Returns
    -------
    int
        Where to go on. ``shared[FIRED_SLOT]`` says whether a trust event is to be taken first,
        ``round`` how many signals were written and whether the rules are to see the last.
    """
    size = messages.shape[1]
    round[SIGNALS] = round[TRADABLE] = round[JUDGE] = 0
    round[SUPPRESSED:] = 0
    while at < stop and (round[SIGNALS] + 1) * size <= len(out):
        at = advance(
            buf, at, stop, keys, ids, sync_rows, held, windows, fars, tops, depths, flow, fis, ffs,
            tracks, shared, params, facts, vector, norm, clip, seen, x, x_bytes,
        )  # fmt: skip
        slot = shared[FIRED_SLOT]
        if slot < 0:
            return at
        mask = np.int64(0)
        if facts[signals.FACT_REASONS] == 0:
            round[TICKET] += 1
            fresh = tracks[slot, STREAM_RESET]
            if fresh == 1:
                tracks[slot, STREAM_RESET] = 0
                copy_bytes(states[slot], native[FRESH], native[STATE_BYTES])
            mask = run_step(native[STEP], native[X], native[OUT], native[ARENA], states[slot])
            remember(
                about, vectors, outs, round[TICKET], slot, facts[signals.FACT_SIGNAL_SEQ],
                round[MODE], fresh, vector, outputs,
            )  # fmt: skip
        reasons = signals.encode_signal(
            messages[slot], facts, outputs, mask, round[BLOCKED], round[PRECISION],
            round[NUMERICS], round[SHADOW], facts[signals.FACT_RECEIVED], guards[slot],
            scores[slot], limits_i, limits_f,
        )  # fmt: skip
        begin = round[SIGNALS] * size
        for i in range(size):
            out[begin + i] = messages[slot, i]
        round[SIGNALS] += 1
        if reasons == 0:
            round[TRADABLE] += 1
            continue
        for bit in range(16):
            round[SUPPRESSED + bit] += (reasons >> bit) & 1
        if facts[signals.FACT_VALUE_CHECK] != 0:
            round[JUDGE] = reasons
            return at
    return at
