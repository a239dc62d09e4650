# Hot path: free @njit functions.
"""Joining Binance's diff stream to its REST snapshot, and the shelf of diffs that wait for one.

    WAITING ──snapshot──▶ LINKING ──first diff that follows it──▶ SYNCED
       ▲                     │                                      │
       └─────────────────────┴────────────── hole ──────────────────┘

The venue's rule, from "How to manage a local order book correctly" (developers.binance.com):

- USD-M and COIN-M futures: drop events with ``u < lastUpdateId``; the first one processed has
  ``U <= lastUpdateId <= u``; from then on ``pu`` equals the previous ``u``.
- Spot: drop events with ``u <= lastUpdateId``; the first one processed has
  ``U <= lastUpdateId + 1 <= u``; from then on ``U`` equals the previous ``u + 1``.

A diff builds on the book as of one update id: ``pu`` for futures, ``U - 1`` for spot. Futures ids
have holes between one ``u`` and the next ``U``, in which the book does not change and in which a
``lastUpdateId`` may fall, so the first diff is asked to build on an id at or before the snapshot's,
which the venue's rule implies. Everything that the rule accepts is accepted.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from feeds.inner import inner
from feeds.venues.binance_fields import (
    ASKS,
    BIDS,
    ENGINE_NS,
    EVENT_NS,
    FIRST_ID,
    LAST_ID,
    PREVIOUS_ID,
    RECEIVED_NS,
)

WAITING: Final = 0
LINKING: Final = 1
SYNCED: Final = 2

# Columns of the state, int64.
SPOT_RULE: Final = 0
PHASE: Final = 1
ANCHOR_ID: Final = 2  # lastUpdateId of the snapshot in the book
BOOK_ID: Final = 3  # u of the last diff in the book
SHELF_USED: Final = 4
LINES: Final = 5
DIFFS: Final = 6
APPLIED: Final = 7
BUFFERED: Final = 8  # diffs that waited for a snapshot
OLD: Final = 9  # diffs that a snapshot already held, or that came twice
FORGOTTEN: Final = 10  # waiting diffs given up because the shelf was full
GAPS: Final = 11
SNAPSHOTS: Final = 12  # taken
SNAPSHOTS_UNUSED: Final = 13  # not needed, or older than the diffs at hand
TRADES: Final = 14
OFF_BOOK: Final = 15
TICKERS: Final = 16
OTHERS: Final = 17
OTHER_SYMBOLS: Final = 18
BACKWARDS: Final = 19  # receive time ran backwards
CLOCK: Final = 20  # latest receive time, ns
EXCHANGE_CLOCK: Final = 21  # latest exchange time, ns
MANY_SYMBOLS: Final = 22  # 1: lines of other symbols are expected
NAMELESS: Final = 23  # snapshots that name no symbol
SLOW_LINES: Final = 24  # lines that took the full decoder
TRADE_STREAM: Final = 25  # kind of the first trade; the other kind would count trades twice
STATE_FIELDS: Final = 32

# What to do with a diff or a snapshot.
DROP: Final = 0
TAKE: Final = 1
SHELVE: Final = 2
GAP: Final = 3

# A shelved diff: its size in words, then these, then its levels.
SHELF_WORDS: Final = 1 << 21
D_SIZE: Final = 0
D_FIRST: Final = 1
D_LAST: Final = 2
D_PREVIOUS: Final = 3
D_RECEIVED: Final = 4
D_EXCHANGE: Final = 5
D_BIDS: Final = 6
D_ASKS: Final = 7
D_LINE: Final = 8
D_LEVELS: Final = 9


def new_state(spot: bool, many_symbols: bool) -> np.ndarray:
    """State of one instrument at the start of a recording, int64 of shape (STATE_FIELDS,)."""
    state = np.zeros(STATE_FIELDS, dtype=np.int64)
    state[SPOT_RULE] = spot
    state[MANY_SYMBOLS] = many_symbols
    return state


def new_shelf() -> np.ndarray:
    """Room for waiting diffs, int64 of shape (SHELF_WORDS,)."""
    return np.empty(SHELF_WORDS, dtype=np.int64)


@inner("int64(int64[::1])")
def exchange_ns(fields):  # type: ignore[no-untyped-def]
    """Matching-engine time of a line, else its event time; 0 where it has neither."""
    return fields[ENGINE_NS] if fields[ENGINE_NS] > 0 else fields[EVENT_NS]


@inner("int64(int64[::1], int64, int64, int64)")
def judge_diff(state, first, last, previous):  # type: ignore[no-untyped-def]
    """DROP, TAKE, SHELVE or GAP for a diff; after TAKE it counts as applied.

    After GAP the phase is WAITING and the diff still has to be shelved.
    """
    phase = state[PHASE]
    if phase == WAITING:
        return SHELVE
    spot = state[SPOT_RULE] == 1
    builds_on = first - 1 if spot else previous
    if phase == LINKING:
        anchor = state[ANCHOR_ID]
        if last < anchor or (spot and last == anchor):
            state[OLD] += 1
            return DROP
        follows = builds_on <= anchor
    else:
        if last <= state[BOOK_ID]:
            state[OLD] += 1
            return DROP
        follows = builds_on == state[BOOK_ID]
    if not follows:
        state[PHASE] = WAITING
        state[GAPS] += 1
        return GAP
    state[PHASE] = SYNCED
    state[BOOK_ID] = last
    state[APPLIED] += 1
    return TAKE


@inner("int64(int64[::1], int64[::1], int64)")
def judge_snapshot(state, shelf, last_update):  # type: ignore[no-untyped-def]
    """TAKE where the snapshot can carry the book on, else DROP.

    A book that is whole needs none: a REST snapshot reaches only so deep and may be older. One
    whose id lies before the oldest waiting diff cannot be joined to it.
    """
    if state[PHASE] == SYNCED or (state[PHASE] == LINKING and last_update < state[ANCHOR_ID]):
        state[SNAPSHOTS_UNUSED] += 1
        return DROP
    spot = state[SPOT_RULE] == 1
    at = 0
    while at < state[SHELF_USED]:
        last = shelf[at + D_LAST]
        if last > last_update or (not spot and last == last_update):
            builds_on = shelf[at + D_FIRST] - 1 if spot else shelf[at + D_PREVIOUS]
            if builds_on > last_update:
                state[SNAPSHOTS_UNUSED] += 1
                return DROP
            break
        at += shelf[at + D_SIZE]
    state[PHASE] = LINKING
    state[ANCHOR_ID] = last_update
    state[SNAPSHOTS] += 1
    return TAKE


@inner("void(int64[::1], int64[::1], int64[::1], int64[::1])")
def shelve(state, shelf, fields, levels):  # type: ignore[no-untyped-def]
    """Keep a diff until a snapshot comes; a full shelf forgets its older half."""
    words = 2 * (fields[BIDS] + fields[ASKS])
    size = D_LEVELS + words
    used = state[SHELF_USED]
    if used + size > len(shelf):
        at = 0
        while at < used and (at < used // 2 or used - at + size > len(shelf)):
            at += shelf[at + D_SIZE]
            state[FORGOTTEN] += 1
        for i in range(at, used):
            shelf[i - at] = shelf[i]
        used -= at
    shelf[used + D_SIZE] = size
    shelf[used + D_FIRST] = fields[FIRST_ID]
    shelf[used + D_LAST] = fields[LAST_ID]
    shelf[used + D_PREVIOUS] = fields[PREVIOUS_ID]
    shelf[used + D_RECEIVED] = fields[RECEIVED_NS]
    shelf[used + D_EXCHANGE] = exchange_ns(fields)
    shelf[used + D_BIDS] = fields[BIDS]
    shelf[used + D_ASKS] = fields[ASKS]
    shelf[used + D_LINE] = state[LINES]
    at = used + D_LEVELS
    for i in range(words):
        shelf[at + i] = levels[i]
    state[SHELF_USED] = used + size
    state[BUFFERED] += 1


@inner("void(int64[::1], int64[::1], int64)")
def keep_from(state, shelf, at):  # type: ignore[no-untyped-def]
    """Take the diffs before ``at`` off the shelf."""
    used = state[SHELF_USED]
    for i in range(at, used):
        shelf[i - at] = shelf[i]
    state[SHELF_USED] = used - at


@inner("int64(int64[::1], int64[::1])")
def tick_clock(state, fields):  # type: ignore[no-untyped-def]
    """Latest receive time so far, so that a tape's never runs backwards; counts where it did."""
    received = fields[RECEIVED_NS]
    if received < state[CLOCK]:
        state[BACKWARDS] += 1
    else:
        state[CLOCK] = received
    return state[CLOCK]


@inner("int64(int64[::1], int64[::1])")
def snapshot_order(fields, levels):  # type: ignore[no-untyped-def]
    """-1 where bids strictly fall and asks strictly rise, else the index of the level at fault."""
    bids = fields[BIDS]
    for i in range(1, bids):
        if levels[2 * i] >= levels[2 * i - 2]:
            return i
    for i in range(bids + 1, bids + fields[ASKS]):
        if levels[2 * i] <= levels[2 * i - 2]:
            return i
    return -1
