# Kernels that run the engine's own feature kernels between two readings of the clock.
"""Passes over the applied messages of one instrument: book, feature state, feature vector.

The clock is read in native code by its vDSO call, which waits for the instructions before it (Linux
kernel, ``rdtsc_ordered``): what stands between two readings is done when it has been timed, and
does not overlap with what follows, as it would in the engine. The cost of a reading is measured
beside each and taken off by the caller.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit

from engine import feature_state as at
from engine import feature_updates, features
from engine.book import apply_levels, apply_snapshot
from engine.feature_specs import NAMES
from engine.feature_state import clock_decays
from feeds import sync, tape, wire
from feeds.inner import inner
from feeds.monotonic import monotonic_ns
from feeds.rawbytes import load_i64, load_u16, load_u32

MIN_RECORD_BYTES: Final = tape.RECORD_HEADER_BYTES + 8

# How far a pass goes.
REACH_BOOK: Final = 0
REACH_STATE: Final = 1
REACH_VECTOR: Final = 2

# Columns of a timed pass, nanoseconds.
EMPTY: Final = 0  # between two readings with nothing in between
WHOLE: Final = 1  # state and vector, in one
FOLD: Final = 2  # the state alone
COMPUTE: Final = 3  # the vector alone
TIMED_FIELDS: Final = 4

# Columns of a staged pass, nanoseconds; NOT_RUN where the message has no such stage.
NOT_RUN: Final = -1
STAGES: Final = (
    "empty",
    "on_book",
    "on_trade",
    "on_snapshot",
    "_advance",
    "_follow_side bid",
    "_follow_side ask",
    "_measure",
    "_learn_microprice",
    "_fill_buckets",
    "clock_decays",
    "_stage_logs",
    "_put_quotients",
    "_put_logs",
    "_put_ratios",
    "_put_block",
    "_put_flow",
    "_put_momentum",
    "_put_slope",
)
_EMPTY: Final = STAGES.index("empty")
_ON_BOOK: Final = STAGES.index("on_book")
_ON_TRADE: Final = STAGES.index("on_trade")
_ON_SNAPSHOT: Final = STAGES.index("on_snapshot")
_ADVANCE: Final = STAGES.index("_advance")
_BID: Final = STAGES.index("_follow_side bid")
_ASK: Final = STAGES.index("_follow_side ask")
_MEASURE: Final = STAGES.index("_measure")
_LEARN: Final = STAGES.index("_learn_microprice")
_BUCKETS: Final = STAGES.index("_fill_buckets")
_DECAYS: Final = STAGES.index("clock_decays")
_STAGE_LOGS: Final = STAGES.index("_stage_logs")
_QUOTIENTS: Final = STAGES.index("_put_quotients")
_LOGS: Final = STAGES.index("_put_logs")
_RATIOS: Final = STAGES.index("_put_ratios")
_BLOCK: Final = STAGES.index("_put_block")
_FLOW: Final = STAGES.index("_put_flow")
_MOMENTUM: Final = STAGES.index("_put_momentum")
_SLOPE: Final = STAGES.index("_put_slope")

_AT_MOMENTUM: Final = NAMES.index("momentum_4_updates")
_AT_SHAPE: Final = NAMES.index("bid_slope")
_HALF_PI: Final = 1.5707963267948966


@inner("int64(uint8[::1], int64, int64, uint8[::1], int64, int64[::1], int64[::1], int64, int64)")
def _keep(buf, start, length, out, filled, starts, resets, n, reset):  # type: ignore[no-untyped-def]
    """Append an applied message; returns where the next one goes, 8-byte aligned as on a tape."""
    for i in range(length):
        out[filled + i] = buf[start + i]
    starts[n] = filled
    resets[n] = reset
    return filled + ((length + 7) & ~7)


@njit(
    "UniTuple(int64, 2)(uint8[::1], int64[::1], uint8[::1], uint8[::1], int64[::1], int64[::1],"
    " int64, int64)",
    cache=True,
)
def collect_updates(buf, row, held, out, starts, resets, filled, n):  # type: ignore[no-untyped-def]
    """Go through whole tape records of one instrument and keep what changes its features.

    Parameters
    ----------
    buf : ndarray of uint8
        Records with good checksums.
    row, held : ndarray
        Of `feeds.sync`, as they stand after the records before.
    out : ndarray of uint8
        Receives the messages in the order in which they are applied.
    starts, resets : ndarray of int64
        Receive where each begins, and 1 where it begins everything anew.
    filled, n : int
        Bytes and messages that are there already.

    Returns
    -------
    filled, n : int
        With these records.
    """
    at_record = 0
    while at_record < len(buf):
        length = np.int64(load_u32(buf, at_record + 4))
        kind = load_u16(buf, at_record + 16)
        start = at_record + tape.RECORD_HEADER_BYTES
        at_record = start + tape.padded(length)
        if kind != tape.MARKET or wire.check(buf, start, start + length) != 0:
            continue
        action = sync.classify(row, held, buf, start)
        if action == sync.DROP:
            continue
        if action == sync.HOLD:
            sync.hold(row, held, buf, start, length)
            continue
        reset = 1 if action == sync.REPLACE_AND_RESET else 0
        filled = _keep(buf, start, length, out, filled, starts, resets, n, reset)
        n += 1
        place = 0
        while True:
            place = sync.take_next(row, held, place)
            if place < 0:
                break
            size = load_i64(held, place - 8)
            filled = _keep(held, place, size, out, filled, starts, resets, n, 0)
            n += 1
        sync.settle(row, held)
    return filled, n


@inner(
    "void(uint8[::1], int64, int64[:,::1], int64[:,:,::1], int64[:,:,::1], int64[::1], int64[::1])"
)
def _take_book(buf, start, window, far, levels, depth, flow):  # type: ignore[no-untyped-def]
    template = load_u16(buf, start + 2)
    if template == wire.DELTA:
        apply_levels(window, far, levels, depth, flow, buf, start)
    elif template == wire.SNAPSHOT:
        apply_snapshot(window, far, levels, depth, buf, start)


@inner("void(uint8[::1], int64, int64[:,:,::1], int64[::1], int64[::1], int64[::1], float64[::1])")
def _fold(buf, start, levels, depth, flow, fi, ff):  # type: ignore[no-untyped-def]
    """Take a message that the book has into the state of the features."""
    template = load_u16(buf, start + 2)
    t_ns = load_i64(buf, start + wire.AT_EXCHANGE_TIME)
    if template == wire.DELTA:
        features.on_book(fi, ff, levels, depth, flow, t_ns)
    elif template == wire.TRADE:
        features.on_trade(
            fi,
            ff,
            levels,
            depth,
            load_i64(buf, start + wire.AT_PRICE),
            load_i64(buf, start + wire.AT_QUANTITY),
            np.int64(buf[start + wire.AT_AGGRESSOR]),
            t_ns,
        )
    else:
        features.on_snapshot(fi, ff, levels, depth, t_ns)


@njit(
    "void(uint8[::1], int64[::1], int64[::1], int64, int64[:,::1], int64[:,:,::1],"
    " int64[:,:,::1], int64[::1], int64[::1], int64[::1], float64[::1], float64[::1])",
    cache=True,
)
def run_pass(  # type: ignore[no-untyped-def]
    buf, starts, resets, reach, window, far, levels, depth, flow, fi, ff, vector
):
    """Apply all messages as far as ``reach`` says: the book, the state, a vector each."""
    for i in range(len(starts)):
        start = starts[i]
        _take_book(buf, start, window, far, levels, depth, flow)
        if reach >= REACH_STATE:
            if resets[i] == 1:
                features.reset(fi, ff)
            _fold(buf, start, levels, depth, flow, fi, ff)
        if reach >= REACH_VECTOR:
            t_ns = load_i64(buf, start + wire.AT_EXCHANGE_TIME)
            features.compute(fi, ff, levels, depth, t_ns, vector)


@njit(
    "void(uint8[::1], int64[::1], int64[::1], int64, int64[:,::1], int64[:,:,::1],"
    " int64[:,:,::1], int64[::1], int64[::1], int64[::1], float64[::1], float64[::1],"
    " int64[:,::1])",
    cache=True,
)
def timed_pass(  # type: ignore[no-untyped-def]
    buf, starts, resets, split, window, far, levels, depth, flow, fi, ff, vector, took
):
    """Time every single update into ``took``, shape (messages, TIMED_FIELDS).

    With ``split`` 0 state and vector as one, else each of the two.
    """
    for i in range(len(starts)):
        start = starts[i]
        _take_book(buf, start, window, far, levels, depth, flow)
        if resets[i] == 1:
            features.reset(fi, ff)
        t_ns = load_i64(buf, start + wire.AT_EXCHANGE_TIME)
        before = monotonic_ns()
        begin = monotonic_ns()
        _fold(buf, start, levels, depth, flow, fi, ff)
        if split == 0:
            features.compute(fi, ff, levels, depth, t_ns, vector)
            took[i, WHOLE] = monotonic_ns() - begin
        else:
            middle = monotonic_ns()
            features.compute(fi, ff, levels, depth, t_ns, vector)
            took[i, COMPUTE] = monotonic_ns() - middle
            took[i, FOLD] = middle - begin
        took[i, EMPTY] = begin - before


@inner("void(uint8[::1], int64, int64[:,:,::1], int64[::1], int64[::1], float64[::1], int64[::1])")
def _time_state_stages(buf, start, levels, depth, fi, ff, took):  # type: ignore[no-untyped-def]
    """The stages of one update, on state rows that nobody needs any more."""
    template = load_u16(buf, start + 2)
    t_ns = load_i64(buf, start + wire.AT_EXCHANGE_TIME)
    t0 = monotonic_ns()
    feature_updates._advance(fi, ff, t_ns)
    t1 = monotonic_ns()
    took[_ADVANCE] = t1 - t0
    if template == wire.TRADE:
        lots = load_i64(buf, start + wire.AT_QUANTITY)
        sign = np.int64(1) if buf[start + wire.AT_AGGRESSOR] == 1 else np.int64(-1)
        if ff[at.MEAN_TRADE] > 0.0:
            t0 = monotonic_ns()
            feature_updates._fill_buckets(fi, ff, sign, lots)
            took[_BUCKETS] = monotonic_ns() - t0
        return
    t0 = monotonic_ns()
    feature_updates._follow_side(fi, ff, levels, depth[0], 0)
    t1 = monotonic_ns()
    feature_updates._follow_side(fi, ff, levels, depth[1], 1)
    t2 = monotonic_ns()
    move = feature_updates._measure(fi, ff)
    t3 = monotonic_ns()
    took[_BID] = t1 - t0
    took[_ASK] = t2 - t1
    took[_MEASURE] = t3 - t2
    if move != 0 and template == wire.DELTA:
        t0 = monotonic_ns()
        feature_updates._learn_microprice(fi, ff, move)
        took[_LEARN] = monotonic_ns() - t0


@inner("void(int64[::1], float64[::1], int64, float64[::1], float64[::1], int64[::1])")
def _time_vector_stages(fi, ff, t_ns, vector, scratch, took):  # type: ignore[no-untyped-def]
    """`engine.features.compute`, stage by stage, and again the parts of it that can be called."""
    last = fi[at.LAST_NS]
    now = max(min(max(t_ns, 0), at.MAX_TIME_NS), last)
    t0 = monotonic_ns()
    fast, middle, slow = clock_decays(now - last if last >= 0 else 0)
    bipower = _HALF_PI * (ff[at.BIPOWER_16S] * slow)
    t1 = monotonic_ns()
    features._stage_logs(fi, ff, now, fast, slow, bipower, vector)
    t2 = monotonic_ns()
    features._put_quotients(fi, ff, fast, middle, slow, vector)
    t3 = monotonic_ns()
    typical = features._put_logs(vector)
    t4 = monotonic_ns()
    features._put_ratios(fi, ff, slow, bipower, vector)
    t5 = monotonic_ns()
    features._put_block(fi, ff, typical, vector)
    t6 = monotonic_ns()
    took[_DECAYS] = t1 - t0
    took[_STAGE_LOGS] = t2 - t1
    took[_QUOTIENTS] = t3 - t2
    took[_LOGS] = t4 - t3
    took[_RATIOS] = t5 - t4
    took[_BLOCK] = t6 - t5
    size = ff[at.LEVEL_LOTS]
    t0 = monotonic_ns()
    for j in range(6):
        features._put_flow(scratch, j, ff[at.EVENT_OFI_8 + j], size)
    for j in range(3):
        features._put_flow(scratch, 6 + j, ff[at.OFI_1S + j] * fast, size)
    t1 = monotonic_ns()
    for j in range(3):
        features._put_momentum(
            scratch, _AT_MOMENTUM + j, ff[at.EVENT_MOVES + j], ff[at.EVENT_SQUARES + j]
        )
    features._put_momentum(
        scratch, _AT_MOMENTUM + 3, ff[at.MOVES_1S] * fast, ff[at.SQUARES_1S] * fast
    )
    features._put_momentum(
        scratch, _AT_MOMENTUM + 4, ff[at.MOVES_4S] * middle, ff[at.SQUARES_4S] * middle
    )
    features._put_momentum(
        scratch, _AT_MOMENTUM + 5, ff[at.MOVES_16S] * slow, ff[at.SQUARES_16S] * slow
    )
    t2 = monotonic_ns()
    features._put_slope(fi, 0, 1, scratch, _AT_SHAPE)
    features._put_slope(fi, 1, -1, scratch, _AT_SHAPE + 1)
    t3 = monotonic_ns()
    took[_FLOW] = t1 - t0
    took[_MOMENTUM] = t2 - t1
    took[_SLOPE] = t3 - t2


@njit(
    "void(uint8[::1], int64[::1], int64[::1], int64[:,::1], int64[:,:,::1], int64[:,:,::1],"
    " int64[::1], int64[::1], int64[::1], float64[::1], float64[::1], float64[::1],"
    " int64[:,::1])",
    cache=True,
)
def staged_pass(  # type: ignore[no-untyped-def]
    buf, starts, resets, window, far, levels, depth, flow, fi, ff, vector, scratch, took
):
    """Time every stage of every update into ``took``, shape (messages, len(STAGES)).

    ``scratch`` receives a second time the features whose part of a stage can be called alone.
    """
    spare_i = fi.copy()
    spare_f = ff.copy()
    for i in range(len(starts)):
        start = starts[i]
        _take_book(buf, start, window, far, levels, depth, flow)
        if resets[i] == 1:
            features.reset(fi, ff)
        t_ns = load_i64(buf, start + wire.AT_EXCHANGE_TIME)
        template = load_u16(buf, start + 2)
        row = took[i]
        row[:] = NOT_RUN
        spare_i[:] = fi
        spare_f[:] = ff
        _time_state_stages(buf, start, levels, depth, spare_i, spare_f, row)
        before = monotonic_ns()
        begin = monotonic_ns()
        _fold(buf, start, levels, depth, flow, fi, ff)
        end = monotonic_ns()
        row[_EMPTY] = begin - before
        if template == wire.DELTA:
            row[_ON_BOOK] = end - begin
        elif template == wire.TRADE:
            row[_ON_TRADE] = end - begin
        else:
            row[_ON_SNAPSHOT] = end - begin
        _time_vector_stages(fi, ff, t_ns, vector, scratch, row)
