# Hot path: free @njit functions.
"""From tape records to the moment a signal is due: check, sequence, book, features, trigger.

`advance` is the engine's state transition. Daemon, replay and training all run it over tape
records: the daemon first appends what it received to the tape and then advances over it, so that
a replay sees the same bytes. It reads no clock; all times come out of the records.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit

from engine import features, signals, trust
from engine.book import (
    ASK,
    BID,
    apply_levels,
    apply_snapshot,
    best_price,
    best_quantity,
    crossed,
)
from engine.model_input import RUN, normalise
from feeds import sync, tape, wire
from feeds.crc32c import crc32c
from feeds.inner import inner
from feeds.rawbytes import load_i64, load_u16, load_u32

# Columns of `shared`, int64: what belongs to no single instrument.
FIRED_SLOT: Final = 0  # whose signal is due, or NOTHING_DUE, or EVENT_DUE
TIMER_SLOT: Final = 1  # where a timer that makes several instruments fire goes on
LAST_SLOT: Final = 2  # of the message before: most messages follow one of their own kind
MESSAGES: Final = 3
LEVELS: Final = 4
TRADES: Final = 5
TIMERS: Final = 6
REJECTED: Final = 7  # malformed
UNKNOWN: Final = 8  # of an instrument that is not configured
DROPPED_LEVELS: Final = 9  # beyond max_levels
LAST_ERROR: Final = 10  # index into wire.ERRORS of the last malformed message
COMPUTED: Final = 11  # feature vectors
EVENT_AT: Final = 12  # payload of the trust event that is due
EVENT_BYTES: Final = 13
EVENT_TIME: Final = 14
RELEASE_SLOT: Final = 15  # from which on signals held back by conflation are due
RELEASE_TIME: Final = 16
SHARED_FIELDS: Final = 17

NOTHING_DUE: Final = -1
EVENT_DUE: Final = -2  # a record of kind CONTROL or SHADOW

# Columns of `params`, int64.
TRIGGER: Final = 0
EVERY_EVENTS: Final = 1
EVERY_NS: Final = 2
STALE_AFTER_NS: Final = 3
COMPUTE_ALWAYS: Final = 4  # 1 = a whole feature vector after every message, and nothing fires
CONFLATE_NS: Final = 5  # market time between two signals of an instrument; 0 = not conflating
PARAM_FIELDS: Final = 6

TRIGGER_TOP: Final = 0
TRIGGER_EVENTS: Final = 1
TRIGGER_TIME: Final = 2
TRIGGERS: Final = {"top-of-book": TRIGGER_TOP, "events": TRIGGER_EVENTS, "time": TRIGGER_TIME}

# Columns of an instrument's `track`, int64.
TRUST: Final = 0  # the book state that the last signal told
STALE: Final = 1
LAST_RECEIVED: Final = 2
TOP: Final = 3  # best bid, its quantity, best ask, its quantity
EVENTS_SINCE: Final = 7
NEXT_TIME: Final = 8
FIRST_SEQ: Final = 9  # first message since the last signal; 0 = none
SIGNAL_SEQ: Final = 10
EXCHANGE_TIME: Final = 11
SOURCE_TIME: Final = 12
STREAM_RESET: Final = 13  # 1 = the model's stream state starts anew with the next inference
HELD_BACK: Final = 14  # 1 = a signal that was due waits: messages are being conflated
NEXT_CONFLATED: Final = 15  # exchange time from which on the next one may leave
TRACK_FIELDS: Final = 16


@inner("int64(uint8[::1], int64, uint8[:,::1], int64[:,::1], int64)")
def find_slot(buf, start, keys, ids, last_slot):  # type: ignore[no-untyped-def]
    """Slot of the instrument a message is about, or -1; an Instrument message assigns its ids."""
    source_id, instrument_id = wire.instrument_key(buf, start)
    if load_u16(buf, start + 2) == wire.INSTRUMENT:
        for slot in range(len(keys)):
            same = True
            for i in range(keys.shape[1]):
                if buf[start + wire.AT_VENUE + i] != keys[slot, i]:
                    same = False
                    break
            if same:
                ids[slot, 0] = source_id
                ids[slot, 1] = instrument_id
                return slot
        return -1
    if ids[last_slot, 0] == source_id and ids[last_slot, 1] == instrument_id:
        return last_slot
    for slot in range(len(ids)):
        if ids[slot, 0] == source_id and ids[slot, 1] == instrument_id:
            return slot
    return -1


@inner("int64(uint8[::1], int64)")
def _count_levels(buf, start):  # type: ignore[no-untyped-def]
    at = start + wire.HEADER_BYTES + load_u16(buf, start)
    bids = load_u16(buf, at + 2)
    at += wire.GROUP_HEADER_BYTES + bids * load_u16(buf, at)
    return bids + load_u16(buf, at + 2)


@njit(
    "void(uint8[::1], int64, int64, int64[:,::1], int64[:,:,::1], int64[:,:,::1], int64[::1],"
    " int64[::1], int64[::1], float64[::1], int64[::1], int64[::1])",
    cache=True,
)
def _apply(buf, start, reset, window, far, levels, depth, flow, fi, ff, track, shared):  # type: ignore[no-untyped-def]
    """Put one in-sequence message into book and features."""
    template = load_u16(buf, start + 2)
    t_ns = load_i64(buf, start + wire.AT_EXCHANGE_TIME)
    if template == wire.DELTA:
        shared[LEVELS] += _count_levels(buf, start)
        shared[DROPPED_LEVELS] += apply_levels(window, far, levels, depth, flow, buf, start)
        features.on_book(fi, ff, levels, depth, flow, t_ns)
    elif template == wire.TRADE:
        shared[TRADES] += 1
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
        shared[LEVELS] += _count_levels(buf, start)
        shared[DROPPED_LEVELS] += apply_snapshot(window, far, levels, depth, buf, start)
        if reset:
            features.reset(fi, ff)
            track[STREAM_RESET] = 1
        features.on_snapshot(fi, ff, levels, depth, t_ns)
    track[EXCHANGE_TIME] = t_ns
    track[SOURCE_TIME] = load_i64(buf, start + wire.AT_SOURCE_TIME)
    track[EVENTS_SINCE] += 1
    if track[FIRST_SEQ] == 0:
        track[FIRST_SEQ] = load_i64(buf, start + wire.AT_SEQ)


@inner("int64(int64[::1], int64[::1], int64[:,:,::1], int64[::1])")
def _book_state(row, track, levels, depth):  # type: ignore[no-untyped-def]
    if row[sync.STATE] == sync.SYNCING:
        return trust.SYNCING
    if row[sync.STATE] == sync.GAP:
        return trust.GAP
    if track[STALE] == 1:
        return trust.STALE
    if crossed(levels, depth):
        return trust.CROSSED
    return trust.SYNCED


@inner("boolean(int64[::1], int64[::1], int64[:,:,::1], int64[::1])")
def _triggered(params, track, levels, depth):  # type: ignore[no-untyped-def]
    """Is a signal due after the messages just applied? Keeps the trigger's own state."""
    bid, ask = best_price(levels, depth, BID), best_price(levels, depth, ASK)
    bid_quantity = best_quantity(levels, depth, BID)
    ask_quantity = best_quantity(levels, depth, ASK)
    moved = (
        bid != track[TOP]
        or bid_quantity != track[TOP + 1]
        or ask != track[TOP + 2]
        or ask_quantity != track[TOP + 3]
    )
    track[TOP] = bid
    track[TOP + 1] = bid_quantity
    track[TOP + 2] = ask
    track[TOP + 3] = ask_quantity
    kind = params[TRIGGER]
    if kind == TRIGGER_TOP:
        return moved
    if kind == TRIGGER_EVENTS:
        return track[EVENTS_SINCE] >= params[EVERY_EVENTS]
    every = params[EVERY_NS]
    if track[EXCHANGE_TIME] < track[NEXT_TIME]:
        return False
    track[NEXT_TIME] = (track[EXCHANGE_TIME] // every + 1) * every
    return True


@inner("boolean(int64[::1], int64[::1])")
def _held_back(params, track):  # type: ignore[no-untyped-def]
    """While messages are conflated: does a signal that is due wait for later messages?

    Every message still goes into book and features, in order; only signals become fewer.
    """
    if params[CONFLATE_NS] == 0:
        return False
    if track[EXCHANGE_TIME] < track[NEXT_CONFLATED]:
        track[HELD_BACK] = 1
        return True
    track[NEXT_CONFLATED] = track[EXCHANGE_TIME] + params[CONFLATE_NS]
    return False


@inner(
    "void(int64, int64, int64, int64[::1], int64[::1], int64[:,:,::1], int64[::1], int64[::1],"
    " float64[::1], int64[::1], int64[::1], float64[::1], float64[:,::1], float64,"
    " float32[:,::1], float32[:,::1], uint8[::1])"
)
def _state_facts(  # type: ignore[no-untyped-def]
    slot, state, received, row, track, levels, depth, fi, ff, shared, facts, vector, norm, clip,
    seen, x, x_bytes,
):  # fmt: skip
    """Write down what the signal will say, and the model's input where it is tradable so far."""
    reasons = 0
    if state == trust.SYNCING:
        reasons = trust.REASON_SYNCING
    elif state == trust.GAP:
        reasons = trust.REASON_GAP
    elif state == trust.STALE:
        reasons = trust.REASON_STALE
    elif state == trust.CROSSED:
        reasons = trust.REASON_CROSSED
    warm = features.is_warm(fi)
    if warm == 0:
        reasons |= trust.REASON_WARMING_UP
    if depth[BID] == 0 or depth[ASK] == 0:
        reasons |= trust.REASON_EMPTY_SIDE
    value_check = 0
    crc = 0
    if reasons == 0:
        features.compute(fi, ff, levels, depth, track[EXCHANGE_TIME], vector)
        shared[COMPUTED] += 1
        if track[STREAM_RESET] == 1:
            seen[RUN] = np.float32(0.0)
        value_check = normalise(vector, norm, clip, seen, x)
        if value_check != 0:
            reasons |= trust.REASON_VALUE_CHECK
        else:
            crc = crc32c(x_bytes, 0, len(x_bytes))
    track[SIGNAL_SEQ] += 1
    facts[signals.FACT_SIGNAL_SEQ] = track[SIGNAL_SEQ]
    facts[signals.FACT_EPOCH] = row[sync.EPOCH]
    last_seq = row[sync.LAST_SEQ]
    facts[signals.FACT_FIRST_SEQ] = track[FIRST_SEQ] if track[FIRST_SEQ] > 0 else last_seq
    facts[signals.FACT_LAST_SEQ] = last_seq
    facts[signals.FACT_EXCHANGE_TIME] = track[EXCHANGE_TIME]
    facts[signals.FACT_SOURCE_TIME] = track[SOURCE_TIME]
    facts[signals.FACT_BOOK_STATE] = state
    facts[signals.FACT_WARM] = warm
    facts[signals.FACT_REASONS] = reasons
    facts[signals.FACT_VALUE_CHECK] = value_check
    facts[signals.FACT_BEST_BID] = best_price(levels, depth, BID)
    facts[signals.FACT_BEST_ASK] = best_price(levels, depth, ASK)
    facts[signals.FACT_INPUT_CRC] = crc
    facts[signals.FACT_RECEIVED] = received
    track[TRUST] = state
    track[FIRST_SEQ] = 0
    track[EVENTS_SINCE] = 0
    track[HELD_BACK] = 0
    shared[FIRED_SLOT] = slot


@inner("boolean(int64[::1], uint8[::1], int64)")
def _confirms(row, buf, start):  # type: ignore[no-untyped-def]
    """Does a message that changes nothing still say that the book is current?

    A heartbeat does, if it knows of all that is in the book. A message from before does not: a
    source whose sequence ran backwards must not keep its last book looking fresh.
    """
    template = load_u16(buf, start + 2)
    return (
        (template == wire.HEARTBEAT or template == wire.INSTRUMENT)
        and load_i64(buf, start + wire.AT_EPOCH) == row[sync.EPOCH]
        and load_i64(buf, start + wire.AT_SEQ) >= row[sync.LAST_SEQ]
    )


@inner(
    "void(uint8[::1], int64, int64, int64, int64[::1], uint8[::1], int64[:,::1], int64[:,:,::1],"
    " int64[:,:,::1], int64[::1], int64[::1], int64[::1], float64[::1], int64[::1], int64[::1])"
)
def _take(  # type: ignore[no-untyped-def]
    buf, start, length, action, row, held, window, far, levels, depth, flow, fi, ff, track, shared
):  # fmt: skip
    """Do what `sync.classify` said, and then what became possible by it."""
    if action == sync.HOLD:
        sync.hold(row, held, buf, start, length)
        return
    reset = 1 if action == sync.REPLACE_AND_RESET else 0
    _apply(buf, start, reset, window, far, levels, depth, flow, fi, ff, track, shared)
    if row[sync.HELD_BYTES] > 0 or row[sync.STATE] != sync.SYNCED:
        at = 0
        while True:
            at = sync.take_next(row, held, at)
            if at < 0:
                break
            _apply(held, at, 0, window, far, levels, depth, flow, fi, ff, track, shared)
        sync.settle(row, held)


@njit(
    "int64(uint8[::1], int64, int64, uint8[:,::1], int64[:,::1], int64[:,::1], uint8[:,::1],"
    " int64[:,:,::1], int64[:,:,:,::1], int64[:,:,:,::1], int64[:,::1], int64[::1],"
    " int64[:,::1], float64[:,::1], int64[:,::1], int64[::1], int64[::1], int64[::1], float64[::1],"
    " float64[:,::1], float64, float32[:,:,::1], float32[:,::1], uint8[::1])",
    cache=True,
)
def advance(  # type: ignore[no-untyped-def]
    buf, at, stop, keys, ids, sync_rows, held, windows, fars, tops, depths, flow, fis, ffs, tracks,
    shared, params, facts, vector, norm, clip, seen, x, x_bytes,
):  # fmt: skip
    """Consume whole tape records of ``buf[at:stop]`` until one makes a signal due.

    Parameters
    ----------
    buf : ndarray of uint8
        Tape records, CRC already known to be good.
    keys : ndarray of uint8, shape (n, 48)
        Venue and symbol of each slot as they stand in an Instrument message.
    ids : ndarray of int64, shape (n, 2)
        source_id and instrument_id of each slot, -1 until its Instrument message came.
    sync_rows, held : ndarray
        `feeds.sync` rows and held messages of each slot.
    windows, fars, tops, depths, flow : ndarray
        `engine.book` state; ``flow`` is scratch.
    fis, ffs : ndarray
        `engine.features` state of each slot.
    tracks, shared, params, facts : ndarray of int64
        Columns as named in this module and in `engine.signals`.
    vector : ndarray of float64, shape (N_FEATURES,)
        The last feature vector.
    norm, clip, seen : ndarray, float, ndarray
        The model's normalisation, and what its inputs were before; see `engine.model_input`.
    x, x_bytes : ndarray
        The model's input, float32 of shape (1, N_FEATURES), and the same memory as bytes.

    Returns
    -------
    int
        Where to go on: ``stop``, or the position after (for a timer that is due for several
        instruments: at) the record that made ``shared[FIRED_SLOT]`` fire, or after a trust event
        that is to be taken first: then it is EVENT_DUE. ``at`` where a signal that conflation had
        held back is released.
    """
    shared[FIRED_SLOT] = NOTHING_DUE
    for slot in range(shared[RELEASE_SLOT], len(tracks)):
        shared[RELEASE_SLOT] = slot + 1
        track = tracks[slot]
        if track[HELD_BACK] == 1:
            state = _book_state(sync_rows[slot], track, tops[slot], depths[slot])
            _state_facts(
                slot, state, shared[RELEASE_TIME], sync_rows[slot], track, tops[slot],
                depths[slot], fis[slot], ffs[slot], shared, facts, vector, norm, clip, seen[slot],
                x, x_bytes,
            )  # fmt: skip
            return at
    while at < stop:
        length = load_u32(buf, at + 4)
        received = load_i64(buf, at + 8)
        kind = load_u16(buf, at + 16)
        start = at + tape.RECORD_HEADER_BYTES
        after = start + tape.padded(length)
        if kind == tape.TIMER:
            if wire.check(buf, start, start + length) != 0:
                shared[REJECTED] += 1
                at = after
                continue
            now = load_i64(buf, start + wire.HEADER_BYTES)
            for slot in range(shared[TIMER_SLOT], len(tracks)):
                track = tracks[slot]
                if track[STALE] == 0 and track[LAST_RECEIVED] > 0:
                    if now - track[LAST_RECEIVED] > params[STALE_AFTER_NS]:
                        track[STALE] = 1
                        state = _book_state(sync_rows[slot], track, tops[slot], depths[slot])
                        if state != track[TRUST] and params[COMPUTE_ALWAYS] == 0:
                            shared[TIMER_SLOT] = slot + 1
                            _state_facts(
                                slot, state, now, sync_rows[slot], track, tops[slot], depths[slot],
                                fis[slot], ffs[slot], shared, facts, vector, norm, clip,
                                seen[slot], x, x_bytes,
                            )  # fmt: skip
                            return at
            shared[TIMER_SLOT] = 0
            shared[TIMERS] += 1
            at = after
            continue
        at = after
        if kind != tape.MARKET:
            if kind == tape.CONTROL or kind == tape.SHADOW:
                shared[FIRED_SLOT] = EVENT_DUE
                shared[EVENT_AT] = start
                shared[EVENT_BYTES] = length
                shared[EVENT_TIME] = received
                return at
            continue
        shared[MESSAGES] += 1
        error = wire.check(buf, start, start + length)
        if error != 0 or load_u16(buf, start + 2) >= wire.SNAPSHOT_REQUEST:
            shared[REJECTED] += 1
            shared[LAST_ERROR] = error if error != 0 else 3
            continue
        slot = find_slot(buf, start, keys, ids, shared[LAST_SLOT])
        if slot < 0:
            shared[UNKNOWN] += 1
            continue
        shared[LAST_SLOT] = slot
        row, track = sync_rows[slot], tracks[slot]
        levels, depth = tops[slot], depths[slot]
        action = sync.classify(row, held[slot], buf, start)
        if action != sync.DROP or _confirms(row, buf, start):
            track[LAST_RECEIVED] = received
            track[STALE] = 0
        applied = action != sync.DROP and action != sync.HOLD
        if action != sync.DROP:
            _take(
                buf, start, length, action, row, held[slot], windows[slot], fars[slot], levels,
                depth, flow, fis[slot], ffs[slot], track, shared,
            )  # fmt: skip
        state = _book_state(row, track, levels, depth)
        if params[COMPUTE_ALWAYS] == 1:
            if applied and state == trust.SYNCED:
                features.compute(fis[slot], ffs[slot], levels, depth, track[EXCHANGE_TIME], vector)
                shared[COMPUTED] += 1
            continue
        due = False
        if applied and state == trust.SYNCED:
            due = _triggered(params, track, levels, depth) and not _held_back(params, track)
        if due or state != track[TRUST]:
            _state_facts(
                slot, state, received, row, track, levels, depth, fis[slot], ffs[slot], shared,
                facts, vector, norm, clip, seen[slot], x, x_bytes,
            )  # fmt: skip
            return at
    return at
