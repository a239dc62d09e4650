# Hot path: free @njit functions.
"""The engine's books alone: tape records → check → sequence → book, and nothing behind it.

What `engine.advance` does with a record, without features, trigger or signal: the same functions
of `feeds.wire`, `feeds.sync` and `engine.book`, over state of the same shapes. So it is what a
replay costs before anything is computed from the book, and what a library that only rebuilds books
is to be compared with. `BookReplay.book` must be `Pipeline.book`, level by level.

The applied levels can also be written down, in the order in which they went into the books: what
other books are fed with, so that they see what ours saw, loss and held messages included.
"""

from __future__ import annotations

import time
from typing import Final

import numpy as np
from numba import njit

from engine.advance import find_slot
from engine.book import FLOW_FIELDS, apply_levels, apply_snapshot, new_books, side_levels
from engine.config import Config
from feeds import codec, sync, tape, wire
from feeds.inner import inner
from feeds.rawbytes import load_i64, load_u16, load_u32

Records = list[tuple[np.ndarray, int, int]]

# Columns of `counts`, int64.
MESSAGES: Final = 0
LEVELS: Final = 1
DROPPED_LEVELS: Final = 2
LAST_SLOT: Final = 3
ROWS: Final = 4  # of applied levels written down
APPLIED: Final = 5  # messages
COUNT_FIELDS: Final = 6

# Columns of the applied levels, int64.
ROW_MESSAGE: Final = 0  # counts the applied messages
ROW_SLOT: Final = 1
ROW_KIND: Final = 2
ROW_PRICE: Final = 3  # ticks
ROW_QUANTITY: Final = 4  # lots
ROW_EXCHANGE_TIME: Final = 5
ROW_RECEIVED: Final = 6  # by the message that made this one applicable
ROW_FIELDS: Final = 7

# Kinds of rows. A snapshot is a CLEAR and then its levels.
KIND_BID: Final = 0
KIND_ASK: Final = 1
KIND_CLEAR: Final = 2
KIND_TRADE: Final = 3  # plus the aggressor of the wire: unknown, buyer, seller


@inner("int64(uint8[::1], int64)")
def _count_levels(buf, start):  # type: ignore[no-untyped-def]
    at = start + wire.HEADER_BYTES + load_u16(buf, start)
    bids = load_u16(buf, at + 2)
    at += wire.GROUP_HEADER_BYTES + bids * load_u16(buf, at)
    return bids + load_u16(buf, at + 2)


@inner("void(int64[:,::1], int64[::1], int64, int64, int64, int64, int64, int64)")
def _write_row(  # type: ignore[no-untyped-def]
    rows, counts, slot, kind, price, quantity, exchange_ns, received
):
    row = rows[counts[ROWS]]
    row[ROW_MESSAGE] = counts[APPLIED]
    row[ROW_SLOT] = slot
    row[ROW_KIND] = kind
    row[ROW_PRICE] = price
    row[ROW_QUANTITY] = quantity
    row[ROW_EXCHANGE_TIME] = exchange_ns
    row[ROW_RECEIVED] = received
    counts[ROWS] += 1


@inner("void(uint8[::1], int64, int64, int64, int64[:,::1], int64[::1])")
def _write_down(buf, start, slot, received, rows, counts):  # type: ignore[no-untyped-def]
    template = load_u16(buf, start + 2)
    t_ns = load_i64(buf, start + wire.AT_EXCHANGE_TIME)
    if template == wire.TRADE:
        kind = KIND_TRADE + np.int64(buf[start + wire.AT_AGGRESSOR])
        price = load_i64(buf, start + wire.AT_PRICE)
        quantity = load_i64(buf, start + wire.AT_QUANTITY)
        _write_row(rows, counts, slot, kind, price, quantity, t_ns, received)
        return
    if template == wire.SNAPSHOT:
        _write_row(rows, counts, slot, KIND_CLEAR, 0, 0, t_ns, received)
    at = start + wire.HEADER_BYTES + load_u16(buf, start)
    for side in range(2):
        entry = load_u16(buf, at)
        count = load_u16(buf, at + 2)
        at += wire.GROUP_HEADER_BYTES
        for _ in range(count):
            price = load_i64(buf, at)
            quantity = load_i64(buf, at + 8)
            _write_row(rows, counts, slot, side, price, quantity, t_ns, received)
            at += entry


@inner(
    "void(uint8[::1], int64, int64, int64, int64[:,::1], int64[:,:,::1], int64[:,:,::1],"
    " int64[::1], int64[::1], int64[:,::1], int64[::1])"
)
def _apply(buf, start, slot, received, window, far, top, depth, flow, rows, counts):  # type: ignore[no-untyped-def]
    template = load_u16(buf, start + 2)
    if template == wire.DELTA:
        counts[LEVELS] += _count_levels(buf, start)
        counts[DROPPED_LEVELS] += apply_levels(window, far, top, depth, flow, buf, start)
    elif template != wire.TRADE:
        counts[LEVELS] += _count_levels(buf, start)
        counts[DROPPED_LEVELS] += apply_snapshot(window, far, top, depth, buf, start)
    if len(rows) > 0:
        _write_down(buf, start, slot, received, rows, counts)
        counts[APPLIED] += 1


@njit(
    "void(uint8[::1], int64, int64, uint8[:,::1], int64[:,::1], int64[:,::1], uint8[:,::1],"
    " int64[:,:,::1], int64[:,:,:,::1], int64[:,:,:,::1], int64[:,::1], int64[::1],"
    " int64[:,::1], int64[::1])",
    cache=True,
)
def advance_books(  # type: ignore[no-untyped-def]
    buf, at, stop, keys, ids, sync_rows, held, windows, fars, tops, depths, flow, rows, counts
):
    """Take whole tape records of ``buf[at:stop]`` into the books.

    Parameters
    ----------
    buf, keys, ids, sync_rows, held, windows, fars, tops, depths, flow
        As `engine.advance.advance` takes them.
    rows : ndarray of int64, shape (n, ROW_FIELDS)
        Takes the applied levels and trades; with n = 0 they are not written down.
    counts : ndarray of int64, shape (COUNT_FIELDS,)
    """
    while at < stop:
        length = load_u32(buf, at + 4)
        received = load_i64(buf, at + 8)
        kind = load_u16(buf, at + 16)
        start = at + tape.RECORD_HEADER_BYTES
        at = start + tape.padded(length)
        if kind != tape.MARKET:
            continue
        counts[MESSAGES] += 1
        if wire.check(buf, start, start + length) != 0:
            continue
        if load_u16(buf, start + 2) >= wire.SNAPSHOT_REQUEST:
            continue
        slot = find_slot(buf, start, keys, ids, counts[LAST_SLOT])
        if slot < 0:
            continue
        counts[LAST_SLOT] = slot
        row, kept = sync_rows[slot], held[slot]
        action = sync.classify(row, kept, buf, start)
        if action == sync.DROP:
            continue
        if action == sync.HOLD:
            sync.hold(row, kept, buf, start, length)
            continue
        window, far, top, depth = windows[slot], fars[slot], tops[slot], depths[slot]
        _apply(buf, start, slot, received, window, far, top, depth, flow, rows, counts)
        if row[sync.HELD_BYTES] > 0 or row[sync.STATE] != sync.SYNCED:
            cursor = 0
            while True:
                cursor = sync.take_next(row, kept, cursor)
                if cursor < 0:
                    break
                _apply(kept, cursor, slot, received, window, far, top, depth, flow, rows, counts)
            sync.settle(row, kept)


class BookReplay:
    """Books of a config's instruments, and a run of tape records into them.

    Parameters
    ----------
    config : Config
        Its instruments, book and limits.
    max_rows : int
        Room for applied levels and trades; 0 = they are not written down. The bytes of the
        records divided by `feeds.wire.LEVEL_BYTES` are enough: a record's headers have room for
        what is not a level.
    """

    def __init__(self, config: Config, max_rows: int = 0) -> None:
        names = sorted({(item.venue, item.symbol) for item in config.instruments})
        where = "config key 'instrument'"
        keys = b"".join(
            codec.ascii_field(venue, 16, where) + codec.ascii_field(symbol, 32, where)
            for venue, symbol in names
        )
        n = len(names)
        self.names: Final = names
        self.counts: Final = np.zeros(COUNT_FIELDS, dtype=np.int64)
        self._rows: Final = np.empty((max_rows, ROW_FIELDS), dtype=np.int64)
        self._books: Final = new_books(n, config.book.max_levels)
        self._state: Final = (
            np.frombuffer(keys, dtype=np.uint8).reshape(n, 48).copy(),
            np.full((n, 2), -1, dtype=np.int64),
            np.zeros((n, sync.ROW_FIELDS), dtype=np.int64),
            np.zeros((n, config.limits.max_pending_bytes), dtype=np.uint8),
            *self._books,
            np.zeros(FLOW_FIELDS, dtype=np.int64),
            self._rows,
            self.counts,
        )

    def run(self, records: Records) -> float:
        """Take all records; returns the seconds it took."""
        started = time.perf_counter()
        for buf, start, stop in records:
            advance_books(buf, start, stop, *self._state)
        return time.perf_counter() - started

    def book(self, slot: int, side: int) -> np.ndarray:
        """All levels of a side, best first: int64 of shape (levels, 2), price and quantity."""
        window, far = self._books[:2]
        levels: np.ndarray = side_levels(window[slot], far[slot], side)
        return levels

    def rows(self) -> np.ndarray:
        """The applied levels and trades: int64 of shape (rows, ROW_FIELDS)."""
        return self._rows[: self.counts[ROWS]]
