# Hot path: free @njit functions.
"""From tape records to signals without Python in between, where a kernel can run the model.

`serve` is `engine.advance.advance` and all of `Pipeline.answer` in one loop: it goes on from signal
to signal until one needs what only Python can do (a violation that a rule counts, a model on
another device, a trust event that is more than an answer of the shadow that agrees), or there is
no more room for signals. The same functions are called in the same order, so that the bytes are
those of `Pipeline.answer`.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import carray, njit

from engine import signals, trust
from engine.advance import (
    EVENT_AT,
    EVENT_BYTES,
    EVENT_DUE,
    FIRED_SLOT,
    NOTHING_DUE,
    RELEASE_SLOT,
    STREAM_RESET,
    advance,
)
from engine.agreement import take_agreeing
from engine.backends.native_call import (
    ARENA,
    FRESH,
    OUT,
    STATE_BYTES,
    STEP,
    STEP_FAILED,
    X,
    copy_bytes,
    run_step,
)
from engine.controls import DIVERGENCE, INPUT_RULE, MODEL_RULE
from engine.handles import place, pointer
from engine.recent import remember
from feeds.inner import inner
from feeds.monotonic import monotonic_ns

# Columns of `round`, int64: what a call is told, and what it leaves.
TICKET: Final = 0
BLOCKED: Final = 1  # reasons from outside: halted
PRECISION: Final = 2
NUMERICS: Final = 3
SHADOW: Final = 4
MODE: Final = 5  # what answers
LIVE: Final = 6  # 1 = emission and inferences are timed by the clock
OFFSET_NS: Final = 7  # from the monotonic clock to time since the epoch
BUDGET_NS: Final = 8  # of an inference; 0 is none
SIGNALS: Final = 9  # written by this call
TRADABLE: Final = 10  # of them
JUDGE: Final = 11  # reasons of the last one, where the rules are to see it; else 0
NEW_STREAM: Final = 12  # 1 = the model's stream began anew with the last inference
LATE_NS: Final = 13  # what the last inference took, where that is over its budget
NATIVE: Final = 14  # 1 = a kernel can run the model; else a signal that is due is left to Python
FOLLOW: Final = 15  # 1 = trust events are this run's own; else they are left to be passed over
SUPPRESSED: Final = 16  # and behind it: how many had each of 16 reasons
ROUND_FIELDS: Final = SUPPRESSED + 16

# The arrays that `serve` finds by their handles, in this order.
ARRAYS: Final = (
    *("keys", "ids", "sync_rows", "held", "windows", "fars", "tops", "depths", "flow", "fis"),
    *("ffs", "tracks", "shared", "params", "facts", "vector", "norm", "seen", "x", "x_bytes"),
    *("messages", "outputs", "guards", "scores", "limits_i", "limits_f", "about", "vectors"),
    *("outs", "native", "states", "round", "out", "tally", "diverged", "disagreed"),
)


def handle_of(name: str) -> int:
    """Which of `ARRAYS` an array is."""
    return ARRAYS.index(name)


def place_of(name: str) -> int:
    """Where among the handles an array's address stands; its shape stands behind."""
    return place(ARRAYS, name)


@inner(
    "int64(uint8[::1], int64, int64, uint8[:,::1], int64[:,::1], int64[:,::1], uint8[:,::1],"
    " int64[:,:,::1], int64[:,:,:,::1], int64[:,:,:,::1], int64[:,::1], int64[::1],"
    " int64[:,::1], float64[:,::1], int64[:,::1], int64[::1], int64[::1], int64[::1], float64[::1],"
    " float64[:,::1], float64, float32[:,:,::1], float32[:,::1], uint8[::1],"
    " uint8[:,::1], float32[::1], int64[:,::1], float32[:,:,::1], int64[::1], float64[::1],"
    " int64[:,::1], float64[:,::1], float32[:,::1], int64[::1], int64[::1], int64[::1],"
    " uint8[::1], int64[::1], uint8[::1], uint8[::1])"
)
def _serve(  # type: ignore[no-untyped-def]
    buf, at, stop, keys, ids, sync_rows, held, windows, fars, tops, depths, flow, fis, ffs, tracks,
    shared, params, facts, vector, norm, clip, seen, x, x_bytes, messages, outputs, guards, scores,
    limits_i, limits_f, about, vectors, outs, native, states, round, out, tally, diverged,
    disagreed,
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
        The model; see `engine.backends.native_call`.
    round : ndarray of int64, shape (ROUND_FIELDS,)
    out : ndarray of uint8
        Signals, one behind the other.
    tally, diverged, disagreed : ndarray
        See `engine.agreement`.

    Returns
    -------
    int
        Where to go on. ``shared[FIRED_SLOT]`` says whether a trust event is to be taken first (or,
        where only Python can run the model, whose signal is due), ``round`` how many signals were
        written and whether the rules are to see the last.
    """
    size = messages.shape[1]
    for i in range(SIGNALS, LATE_NS + 1):
        round[i] = 0
    round[SUPPRESSED:] = 0
    live = round[LIVE] == 1
    while (at < stop or shared[RELEASE_SLOT] < len(tracks)) and (
        (round[SIGNALS] + 1) * size <= len(out)
    ):
        at = advance(
            buf, at, stop, keys, ids, sync_rows, held, windows, fars, tops, depths, flow, fis, ffs,
            tracks, shared, params, facts, vector, norm, clip, seen, x, x_bytes,
        )  # fmt: skip
        slot = shared[FIRED_SLOT]
        if slot == EVENT_DUE and round[FOLLOW] == 1:
            if take_agreeing(
                buf, shared[EVENT_AT], shared[EVENT_BYTES], about, outs, limits_f[DIVERGENCE],
                tally, diverged, disagreed,
            ):  # fmt: skip
                shared[FIRED_SLOT] = NOTHING_DUE
                continue
        if slot < 0 or round[NATIVE] == 0:
            return at
        mask = np.int64(0)
        blocked = round[BLOCKED]
        emitted = facts[signals.FACT_RECEIVED]
        if facts[signals.FACT_REASONS] == 0:
            round[TICKET] += 1
            fresh = tracks[slot, STREAM_RESET]
            round[NEW_STREAM] = fresh
            if fresh == 1:
                tracks[slot, STREAM_RESET] = 0
                copy_bytes(states[slot], native[FRESH], native[STATE_BYTES])
            began = monotonic_ns() if live else 0
            mask = run_step(native[STEP], native[X], native[OUT], native[ARENA], states[slot])
            if mask == STEP_FAILED:  # Python tries it again, and says why
                round[TICKET] -= 1
                tracks[slot, STREAM_RESET] = fresh
                round[NATIVE] = 0
                return at
            if live and 0 < round[BUDGET_NS] < monotonic_ns() - began:
                round[LATE_NS] = monotonic_ns() - began
                blocked |= trust.REASON_LATE
            remember(
                about, vectors, outs, round[TICKET], slot, facts[signals.FACT_SIGNAL_SEQ],
                round[MODE], fresh, vector, outputs,
            )  # fmt: skip
        if live:
            emitted = monotonic_ns() + round[OFFSET_NS]
        reasons = signals.encode_signal(
            messages[slot], facts, outputs, mask, blocked, round[PRECISION], round[NUMERICS],
            round[SHADOW], emitted, guards[slot], scores[slot], limits_i, limits_f,
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
        check = facts[signals.FACT_VALUE_CHECK]
        counted = np.int64(0)
        if check != 0:
            of_input = check & trust.CHECKS_OF_INPUT != 0
            counted = limits_i[INPUT_RULE] if of_input else limits_i[MODEL_RULE]
        if counted != 0 or round[LATE_NS] > 0:
            round[JUDGE] = reasons
            return at
    return at


@njit("int64(int64[::1], uint8[::1], int64, int64, float64, int64)", cache=True)
def serve(h, buf, at, stop, clip, room):  # type: ignore[no-untyped-def]
    """Consume whole tape records of ``buf[at:stop]`` and write every signal that they make due.

    Parameters
    ----------
    h : ndarray of int64
        Handles of `ARRAYS`; see `engine.handles`.
    buf : ndarray of uint8
    at, stop : int
    clip : float
        Of the model's input.
    room : int
        Bytes of ``out`` that may be used.

    Returns
    -------
    int
        As `_serve` gives it.
    """
    keys = carray(pointer(h[0], np.uint8), (h[1], h[2]))
    ids = carray(pointer(h[5], np.int64), (h[6], h[7]))
    sync_rows = carray(pointer(h[10], np.int64), (h[11], h[12]))
    held = carray(pointer(h[15], np.uint8), (h[16], h[17]))
    windows = carray(pointer(h[20], np.int64), (h[21], h[22], h[23]))
    fars = carray(pointer(h[25], np.int64), (h[26], h[27], h[28], h[29]))
    tops = carray(pointer(h[30], np.int64), (h[31], h[32], h[33], h[34]))
    depths = carray(pointer(h[35], np.int64), (h[36], h[37]))
    flow = carray(pointer(h[40], np.int64), (h[41],))
    fis = carray(pointer(h[45], np.int64), (h[46], h[47]))
    ffs = carray(pointer(h[50], np.float64), (h[51], h[52]))
    tracks = carray(pointer(h[55], np.int64), (h[56], h[57]))
    shared = carray(pointer(h[60], np.int64), (h[61],))
    params = carray(pointer(h[65], np.int64), (h[66],))
    facts = carray(pointer(h[70], np.int64), (h[71],))
    vector = carray(pointer(h[75], np.float64), (h[76],))
    norm = carray(pointer(h[80], np.float64), (h[81], h[82]))
    seen = carray(pointer(h[85], np.float32), (h[86], h[87], h[88]))
    x = carray(pointer(h[90], np.float32), (h[91], h[92]))
    x_bytes = carray(pointer(h[95], np.uint8), (h[96],))
    messages = carray(pointer(h[100], np.uint8), (h[101], h[102]))
    outputs = carray(pointer(h[105], np.float32), (h[106],))
    guards = carray(pointer(h[110], np.int64), (h[111], h[112]))
    scores = carray(pointer(h[115], np.float32), (h[116], h[117], h[118]))
    limits_i = carray(pointer(h[120], np.int64), (h[121],))
    limits_f = carray(pointer(h[125], np.float64), (h[126],))
    about = carray(pointer(h[130], np.int64), (h[131], h[132]))
    vectors = carray(pointer(h[135], np.float64), (h[136], h[137]))
    outs = carray(pointer(h[140], np.float32), (h[141], h[142]))
    native = carray(pointer(h[145], np.int64), (h[146],))
    states = carray(pointer(h[150], np.int64), (h[151],))
    round = carray(pointer(h[155], np.int64), (h[156],))
    out = carray(pointer(h[160], np.uint8), (room,))
    tally = carray(pointer(h[165], np.int64), (h[166],))
    diverged = carray(pointer(h[170], np.uint8), (h[171],))
    disagreed = carray(pointer(h[175], np.uint8), (h[176],))
    return _serve(
        buf, at, stop, keys, ids, sync_rows, held, windows, fars, tops, depths, flow, fis, ffs,
        tracks, shared, params, facts, vector, norm, clip, seen, x, x_bytes, messages, outputs,
        guards, scores, limits_i, limits_f, about, vectors, outs, native, states, round, out,
        tally, diverged, disagreed,
    )  # fmt: skip


@njit("int64(int64[::1], int64, int64, int64, int64)", cache=True)
def complete(h, inferred, mask, blocked, emitted_ns):  # type: ignore[no-untyped-def]
    """Remember and encode an inference that was made outside, as `serve` does for its own.

    Parameters
    ----------
    h : ndarray of int64
        As `serve` takes it. ``round`` says whose inference it was, and who answered.
    inferred : int
        0 where there was none: nothing is remembered then.
    mask, blocked, emitted_ns : int
        See `engine.signals.encode_signal`.

    Returns
    -------
    int
        The reasons against the signal.
    """
    shared = carray(pointer(h[60], np.int64), (h[61],))
    facts = carray(pointer(h[70], np.int64), (h[71],))
    vector = carray(pointer(h[75], np.float64), (h[76],))
    messages = carray(pointer(h[100], np.uint8), (h[101], h[102]))
    outputs = carray(pointer(h[105], np.float32), (h[106],))
    guards = carray(pointer(h[110], np.int64), (h[111], h[112]))
    scores = carray(pointer(h[115], np.float32), (h[116], h[117], h[118]))
    limits_i = carray(pointer(h[120], np.int64), (h[121],))
    limits_f = carray(pointer(h[125], np.float64), (h[126],))
    about = carray(pointer(h[130], np.int64), (h[131], h[132]))
    vectors = carray(pointer(h[135], np.float64), (h[136], h[137]))
    outs = carray(pointer(h[140], np.float32), (h[141], h[142]))
    round = carray(pointer(h[155], np.int64), (h[156],))
    slot = shared[FIRED_SLOT]
    if inferred != 0:
        remember(
            about, vectors, outs, round[TICKET], slot, facts[signals.FACT_SIGNAL_SEQ],
            round[MODE], round[NEW_STREAM], vector, outputs,
        )  # fmt: skip
    return signals.encode_signal(
        messages[slot], facts, outputs, mask, blocked, round[PRECISION], round[NUMERICS],
        round[SHADOW], emitted_ns, guards[slot], scores[slot], limits_i, limits_f,
    )  # fmt: skip
