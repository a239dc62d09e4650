# Hot path of the shadow's process: `answer_stretch`, a free @njit function.
"""A stretch of the shadow's requests in one native call, where kernels can run both models.

Python that runs a few times a second finds neither its code nor its data in the caches, and costs
several times what it costs in a loop. So a stretch takes no Python: each request is taken from the
ring, answered by both models, one inference of batch 1 each, and its answer is given back before
the next is looked at.

Where cores are short, whoever is woken for a message waits behind a long stretch. So it rests now
and then, unless too many requests wait for that.

Source: sched_yield(2).
"""

from __future__ import annotations

from typing import Final

import llvmlite.ir as ir
import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.backends.native_call import (
    ARENA,
    STATE_BYTES,
    STEP,
    STEP_FAILED,
    copy_bytes,
    run_step,
)
from engine.backends.native_call import FRESH as FRESH_STATE
from engine.handles import pointer
from engine.shadow_ring import (
    ALIVE_NS,
    ANSWER_HEAD,
    ANSWER_TAIL,
    FLAGS,
    FRESH,
    GAP,
    META,
    RELOAD,
    REQUEST_HEAD,
    REQUEST_TAIL,
    SLOT,
    STOP,
    pop_request,
    push_answer,
)
from engine.trust_events import SETTLING
from engine.waiting import wait_for
from feeds.monotonic import monotonic_ns

MODELS: Final = 2  # the FP32 twin first
SPRINT_ROWS: Final = 8  # answers in a row, some 120 µs
REST_NS: Final = 1_000_000  # behind them
PRESSED_SHARE: Final = 2  # of the ring's rows, the part from which on there is no rest
SETTLE_ROWS: Final = 256  # of a model with state, before its answers count
# What `answer_stretch` leaves to Python, in ``left``: nothing, or the request in the row behind
# the last one that is answered. From `FAILED` on it says which model's step is to be taken again.
NOTHING: Final = 0
UNTOUCHED: Final = 1
FAILED: Final = 2


@intrinsic
def give_way(typingctx):  # type: ignore[no-untyped-def]
    """Let whoever else waits for this core have it; 0."""
    signature = types.int64()

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(ir.IntType(32), [])
        called = cgutils.get_or_insert_function(builder.module, kind, "sched_yield")
        return builder.sext(builder.call(called, []), ir.IntType(64))

    return signature, codegen


@njit("int64(int64[::1], int64, int64, boolean)", cache=True)
def begin_step(ages, slot, flags, has_state):  # type: ignore[no-untyped-def]
    """Count a stream's step; the flags of its answer.

    Parameters
    ----------
    ages : ndarray of int64, shape (slots,)
        Steps of each stream since its state was last incomplete.
    slot, flags : int
        Of the request.
    has_state : bool
        Whether the models remember anything.

    Returns
    -------
    int
        `SETTLING` where the state is that of too few steps to be the hot path's; else 0.
    """
    if flags & FRESH:
        ages[slot] = SETTLE_ROWS
        return 0
    if not has_state:
        return 0
    if flags & GAP:
        ages[slot] = 0
    ages[slot] += 1
    return SETTLING if ages[slot] <= SETTLE_ROWS else 0


@njit("int64(int64[::1], int64, int64, boolean)", cache=True, nogil=True)
def answer_stretch(h, at, stop, has_state):  # type: ignore[no-untyped-def]
    """Take requests from the ring into rows ``at`` to ``stop`` - 1, and answer them in order.

    It ends early where no request waits, where there is no room for an answer, and where the
    engine says `STOP`; and it leaves to Python a `RELOAD`, a slot that the models have no state
    for, and an inference that failed.

    Parameters
    ----------
    h : ndarray of int64
        Handles (see `engine.handles`) of the ring's header, requests, inputs, answers and
        payloads; of the rows' requests, int64 of shape (rows, META), inputs, float32 of shape
        (rows, n_features), and scores of both models, float32 of shape (rows, MODELS, n_outputs);
        of the models and their states, int64 of shapes (MODELS, NATIVE_FIELDS) and (MODELS, slots),
        see `engine.backends.native_call`, the models' own input and scores left out; of the ages
        of `begin_step`; of the answer at hand, int64 of shape (META,); and of ``left``, int64 of
        shape (1,).
    at, stop : int
    has_state : bool
        Whether the models remember anything.

    Returns
    -------
    int
        The row behind the last one that is answered. ``left`` says whether a request stands there
        that Python has to answer; from `FAILED` on its stream has begun, its answer's flags are in
        the answer at hand, and the scores of the models before the one that failed are there.
    """
    header = carray(pointer(h[0], np.int64), (h[1],))
    requests = carray(pointer(h[5], np.int64), (h[6], h[7]))
    inputs = carray(pointer(h[10], np.float32), (h[11], h[12]))
    answers = carray(pointer(h[15], np.int64), (h[16], h[17]))
    payloads = carray(pointer(h[20], np.uint8), (h[21], h[22]))
    rows = carray(pointer(h[25], np.int64), (h[26], h[27]))
    xs = carray(pointer(h[30], np.float32), (h[31], h[32]))
    score_bytes = 4 * h[38]
    models = carray(pointer(h[40], np.int64), (h[41], h[42]))
    states = carray(pointer(h[45], np.int64), (h[46], h[47]))
    ages = carray(pointer(h[50], np.int64), (h[51],))
    answer = carray(pointer(h[55], np.int64), (h[56],))
    left = carray(pointer(h[60], np.int64), (h[61],))
    left[0] = NOTHING
    sprint = 0
    while at < stop:
        waiting = header[REQUEST_HEAD] - header[REQUEST_TAIL]
        if sprint == SPRINT_ROWS:
            sprint = 0
            if 0 < waiting < len(requests) // PRESSED_SHARE:
                wait_for(0, 0, REST_NS)
        if header[STOP] != 0 or header[ANSWER_HEAD] - header[ANSWER_TAIL] >= len(answers):
            return at
        header[ALIVE_NS] = monotonic_ns()
        if not pop_request(header, requests, inputs, rows[at], xs[at : at + 1]):
            return at
        slot, flags = rows[at, SLOT], rows[at, FLAGS]
        if flags & RELOAD or slot >= states.shape[1]:
            left[0] = UNTOUCHED
            return at
        for i in range(META):
            answer[i] = rows[at, i]
        answer[FLAGS] = begin_step(ages, slot, flags, has_state)
        x_at = h[30] + 4 * at * h[32]
        scores_at = h[35] + MODELS * at * score_bytes
        if flags & FRESH:
            for m in range(MODELS):
                copy_bytes(states[m, slot], models[m, FRESH_STATE], models[m, STATE_BYTES])
        for m in range(MODELS):
            out_at = scores_at + m * score_bytes
            mask = run_step(models[m, STEP], x_at, out_at, models[m, ARENA], states[m, slot])
            if mask == STEP_FAILED:
                left[0] = FAILED + m
                return at
            give_way()
        payload = carray(pointer(scores_at, np.uint8), (MODELS * score_bytes,))
        push_answer(header, answers, payloads, answer, payload)
        at += 1
        sprint += 1
    return at
