# Hot path: free @njit functions.
"""The simulated market: seeded order flow in integer ticks and lots, written straight as a tape.

One *event* of an instrument is one order-book action: exactly one Delta, with a Trade before it
where an order was executed. ``feeds/SIMULATOR.md`` explains the planted signal; in short:

- a hidden state s in {-1, 0, +1} switches with probability 1/dwell an event;
- with probability `STEP_PROBABILITY` an event moves the mid by half a tick, up with probability
  (1 + drift * s) / 2; nothing else moves the mid, so given s its future is independent of the book;
- any other event is bullish (bid added, ask cancelled, market buy) with probability
  (1 + tilt * s) / 2, else bearish: this is how s shows in the book and in the flow.

Sources: the hump-shaped depth profile (Bouchaud, Mézard and Potters, Quantitative Finance 2,
2002); the exact filter of a hidden Markov chain (Rabiner, Proc. IEEE 77, 1989); event times as in
``feeds/market_state.py``.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit

from feeds.market_state import (
    BEST_ASK,
    BEST_BID,
    DRIFT,
    EVENT_BYTES,
    EVENTS,
    HIDDEN,
    NEXT_NS,
    POSTERIOR,
    PROTECTED_LEVELS,
    RING_MASK,
    SEQ,
    SOURCE_DELAY_NS,
    SPREAD_LIMIT_TICKS,
    SWITCH,
    TILT,
    TRADE_EXCITATION,
    draw_next_time,
    put_delta,
    put_trade,
    share_of,
    uniform,
)
from feeds.rawbytes import store_i64
from feeds.tape import MARKET, put_record
from feeds.wire import AT_PRICE, AT_QUANTITY, HEADER_BYTES, TRADE_BLOCK

STEP_PROBABILITY: Final = 0.12
TRADED_STEP: Final = 0.75  # share of consumed best levels that were traded, not cancelled
TRADE_BASE: Final = 0.1
TRADE_EXCITED: Final = 0.25
TRADE_LIMIT: Final = 0.6
TRADE_DECAY: Final = 0.9
EMPTY_SHARE: Final = 0.125  # of cancels in the deep book: those that empty the level
NARROWING: Final = 0.65  # at a spread of two ticks: share of steps that narrow it

LEVEL_TABLE: Final = 1024  # entries of the table that draws the depth of an order
NEAR_SHARE: Final = 896  # of these entries: geometric; the rest: uniform


def level_table(levels: int) -> np.ndarray:
    """Distances from the best price, int64 of shape (LEVEL_TABLE,): 7/8 near, 1/8 anywhere.

    The near part is geometric with ratio 3/5, counted out in integers.
    """
    table: list[int] = []
    for k in range(levels):
        table += [k] * -(-NEAR_SHARE * 3**k * 2 // 5 ** (k + 1))
    del table[NEAR_SHARE:]
    rest = LEVEL_TABLE - len(table)
    table += [levels * j // rest for j in range(rest)]
    return np.array(table, dtype=np.int64)


def depth_profile(levels: int, base_lots: int) -> np.ndarray:
    """Quantity towards which each level grows, int64 of shape (levels,): a hump behind the best.

    Source: the shape of Bouchaud, Mézard and Potters (2002), figure 1, in integer arithmetic.
    """
    return np.array(
        [base_lots * 40 * (2 * k + 3) // ((k + 7) * (k + 14)) for k in range(levels)],
        dtype=np.int64,
    )


@njit("void(int64, int64, int64, float64[:, ::1], float64[::1])", cache=True)
def learn(i, step, up, floats, parameters):  # type: ignore[no-untyped-def]
    """One step of the exact filter: what this event says about s to one who sees the messages."""
    switch = parameters[SWITCH]
    tilt = parameters[DRIFT] if step else parameters[TILT]
    total = 0.0
    low, middle, high = floats[i, 2], floats[i, 3], floats[i, 4]
    for s in range(3):
        prior = floats[i, POSTERIOR + s]
        prior = (1.0 - switch) * prior + 0.5 * switch * (low + middle + high - prior)
        lean = tilt * (s - 1) * (1 if up else -1)
        floats[i, POSTERIOR + s] = prior * (0.5 + 0.5 * lean)
        total += floats[i, POSTERIOR + s]
    for s in range(3):
        floats[i, POSTERIOR + s] /= total


@njit(
    "int64(uint8[::1], int64, int64, int64, int64, int64[:, ::1], int64[:, :, ::1], uint64[::1],"
    " int64[:, ::1], int64[::1])",
    cache=True,
)
def step_mid(  # type: ignore[no-untyped-def]
    buf, at, i, up, levels, ints, book, rng, caps, changes
):
    """Move the mid by half a tick: consume one best level, or improve the other side's."""
    spread = ints[i, BEST_ASK] - ints[i, BEST_BID]
    narrow = uniform(rng, i) < NARROWING
    if spread == 1:
        narrow = False
    elif spread >= SPREAD_LIMIT_TICKS:
        narrow = True
    count = 0
    if narrow:
        side = 0 if up else 1
        outward = 2 * side - 1
        best = ints[i, BEST_BID + side] - outward
        # A new best queue takes after the one behind it, so that it says as much about s.
        behind = book[i, side, (best + outward) & RING_MASK]
        quantity = share_of(uniform(rng, i), behind)
        ints[i, BEST_BID + side] = best
        book[i, side, best & RING_MASK] = quantity
        changes[0] = best
        changes[1] = quantity
        count = 1
        last = best + outward * levels
        if book[i, side, last & RING_MASK] > 0:
            book[i, side, last & RING_MASK] = 0
            changes[2] = last
            changes[3] = 0
            count = 2
        return put_delta(buf, at, i, ints, side, count, changes)
    side = 1 if up else 0
    outward = 2 * side - 1
    gone = ints[i, BEST_BID + side]
    if uniform(rng, i) < TRADED_STEP:
        body = put_trade(buf, at, i, ints, up)
        store_i64(buf, body + AT_PRICE, gone)
        store_i64(buf, body + AT_QUANTITY, book[i, side, gone & RING_MASK])
        at = put_record(
            buf, at, MARKET, ints[i, NEXT_NS] + SOURCE_DELAY_NS, HEADER_BYTES + TRADE_BLOCK
        )
    book[i, side, gone & RING_MASK] = 0
    best = gone + outward
    ints[i, BEST_BID + side] = best
    changes[0] = gone
    changes[1] = 0
    count = 1
    for k in (PROTECTED_LEVELS - 1, levels - 1):
        price = best + outward * k
        if book[i, side, price & RING_MASK] == 0:
            quantity = share_of(uniform(rng, i), caps[i, k])
            book[i, side, price & RING_MASK] = quantity
            changes[2 * count] = price
            changes[2 * count + 1] = quantity
            count += 1
    return put_delta(buf, at, i, ints, side, count, changes)


@njit(
    "int64(uint8[::1], int64, int64, int64, int64, int64[:, ::1], int64[:, :, ::1], uint64[::1],"
    " int64[:, ::1], int64[::1], int64[::1])",
    cache=True,
)
def change_queue(  # type: ignore[no-untyped-def]
    buf, at, i, up, trade, ints, book, rng, caps, table, changes
):
    """A bullish or bearish event that leaves the mid: market order, limit order or cancel."""
    if trade:
        side = 1 if up else 0
        price = ints[i, BEST_BID + side]
        quantity = book[i, side, price & RING_MASK]
        if quantity > 1:
            traded = share_of(uniform(rng, i), quantity - 2)
            body = put_trade(buf, at, i, ints, up)
            store_i64(buf, body + AT_PRICE, price)
            store_i64(buf, body + AT_QUANTITY, traded)
            at = put_record(
                buf, at, MARKET, ints[i, NEXT_NS] + SOURCE_DELAY_NS, HEADER_BYTES + TRADE_BLOCK
            )
            book[i, side, price & RING_MASK] = quantity - traded
            changes[0] = price
            changes[1] = quantity - traded
            return put_delta(buf, at, i, ints, side, 1, changes)
    k = table[np.int64(uniform(rng, i) * LEVEL_TABLE)]
    cancel = uniform(rng, i) < 0.5
    if cancel:
        side = 1 if up else 0
        price = ints[i, BEST_BID + side] + (2 * side - 1) * k
        quantity = book[i, side, price & RING_MASK]
        left = quantity - share_of(uniform(rng, i), quantity - 2)
        if k >= PROTECTED_LEVELS and quantity > 0 and uniform(rng, i) < EMPTY_SHARE:
            left = 0
        elif quantity < 2:
            cancel = False
        if cancel:
            book[i, side, price & RING_MASK] = left
            changes[0] = price
            changes[1] = left
            return put_delta(buf, at, i, ints, side, 1, changes)
    side = 0 if up else 1
    price = ints[i, BEST_BID + side] + (2 * side - 1) * k
    quantity = book[i, side, price & RING_MASK]
    quantity += share_of(uniform(rng, i), caps[i, k] - quantity)
    book[i, side, price & RING_MASK] = quantity
    changes[0] = price
    changes[1] = quantity
    return put_delta(buf, at, i, ints, side, 1, changes)


@njit(
    "UniTuple(int64, 3)(uint8[::1], int64, int64, int64, int64, int64[:, ::1], float64[:, ::1],"
    " uint64[::1], int64[:, :, ::1], int64[:, ::1], int64[::1], float64[::1], int64, int64[:, ::1],"
    " float64[:, ::1])",
    cache=True,
)
def generate(  # type: ignore[no-untyped-def]
    buf,
    at,
    stop,
    max_messages,
    until_ns,
    ints,
    floats,
    rng,
    book,
    caps,
    table,
    parameters,
    levels,
    truth_ints,
    truth_floats,
):
    """Write the next events of all instruments, in time order, as tape records.

    Parameters
    ----------
    buf : ndarray of uint8
        Records go to ``buf[at:stop]``; an event starts only where `EVENT_BYTES` are free.
    max_messages : int
        Start no event once so many messages are written (a Trade and its Delta stay together).
    until_ns : int
        Start no event at or after this exchange time.
    ints, floats, rng, book : ndarray
        State, see the constants above.
    caps : ndarray of int64, shape (n, levels)
        Quantity towards which a level grows, by distance from the best price.
    table : ndarray of int64, shape (LEVEL_TABLE,)
        Distances from the best price, drawn uniformly.
    parameters : ndarray of float64, shape (PARAMETERS,)
    levels : int
    truth_ints : ndarray of int64, shape (m, 4)
        Out, a row for each event: instrument, seq of its Delta, hidden state, mid in half ticks.
        With m = 0 nothing is written; else an event starts only while a row is free.
    truth_floats : ndarray of float64, shape (m, 3)
        Out: the filter's P(s = -1, 0, +1) after the event.

    Returns
    -------
    position, messages, events : int
    """
    instruments = len(ints)
    changes = np.zeros(8, dtype=np.int64)
    floor_ticks = 4 * levels
    messages = 0
    events = 0
    rows = len(truth_ints)
    while messages < max_messages and at + EVENT_BYTES <= stop and (rows == 0 or events < rows):
        i = 0
        for j in range(1, instruments):
            if ints[j, NEXT_NS] < ints[i, NEXT_NS]:
                i = j
        if ints[i, NEXT_NS] >= until_ns:
            break
        if uniform(rng, i) < parameters[SWITCH]:
            other = 1 if uniform(rng, i) < 0.5 else 2
            ints[i, HIDDEN] = (ints[i, HIDDEN] + 1 + other) % 3 - 1
        s = ints[i, HIDDEN]
        before = ints[i, SEQ]
        floats[i, TRADE_EXCITATION] *= TRADE_DECAY
        if uniform(rng, i) < STEP_PROBABILITY:
            up = uniform(rng, i) < 0.5 + 0.5 * parameters[DRIFT] * s
            if ints[i, BEST_BID] < floor_ticks:
                up = True
            learn(i, 1, up, floats, parameters)
            at = step_mid(buf, at, i, up, levels, ints, book, rng, caps, changes)
        else:
            up = uniform(rng, i) < 0.5 + 0.5 * parameters[TILT] * s
            chance = min(TRADE_BASE + TRADE_EXCITED * floats[i, TRADE_EXCITATION], TRADE_LIMIT)
            trade = uniform(rng, i) < chance
            learn(i, 0, up, floats, parameters)
            at = change_queue(buf, at, i, up, trade, ints, book, rng, caps, table, changes)
        sent = ints[i, SEQ] - before
        if sent == 2:
            floats[i, TRADE_EXCITATION] += 1.0 - TRADE_DECAY
        if rows > 0:
            truth_ints[events, 0] = i
            truth_ints[events, 1] = ints[i, SEQ]
            truth_ints[events, 2] = s
            truth_ints[events, 3] = ints[i, BEST_BID] + ints[i, BEST_ASK]
            for k in range(3):
                truth_floats[events, k] = floats[i, POSTERIOR + k]
        ints[i, EVENTS] += 1
        messages += sent
        events += 1
        draw_next_time(i, ints, floats, rng, parameters)
    return at, messages, events
