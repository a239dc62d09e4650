# Hot path: free @njit functions.
"""Canonical messages of one instrument, written as tape records straight into a tape's window."""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit

from feeds.inner import inner
from feeds.rawbytes import store_i64, store_u16
from feeds.tape import MARKET, RECORD_HEADER_BYTES, put_record
from feeds.venues.binance_fields import AGGRESSOR, PRICE, QUANTITY, RECEIVED_NS, TRADE_ID
from feeds.venues.binance_sync import exchange_ns
from feeds.wire import (
    AT_AGGRESSOR,
    AT_PRICE,
    AT_QUANTITY,
    AT_TRADE_ID,
    DELTA,
    FLAG_SOURCE_GAP,
    GROUP_HEADER_BYTES,
    HEADER_BYTES,
    LEVEL_BYTES,
    PREFIX_BYTES,
    TRADE_BLOCK,
    put_prefix,
)
from feeds.wire import TRADE as TRADE_MESSAGE

EPOCH: Final = 1  # a conversion has no restarts

# Columns of `out`, int64: where messages go.
O_SOURCE: Final = 0
O_INSTRUMENT: Final = 1
O_SEQ: Final = 2
O_DELTAS: Final = 3
O_FIELDS: Final = 4


@njit(
    "int64(uint8[::1], int64, int64[::1], int64, int64, int64, int64, int64, int64[::1], int64,"
    " int64, int64)",
    cache=True,
)
def put_book(  # type: ignore[no-untyped-def]
    arena, at, out, template, clock_ns, exchange, source_ns, flags, words, start, bids, asks
):
    """Write a Snapshot or Delta record; returns where the next record starts.

    ``words[start:]`` holds the levels as price, quantity, …, bids first. Levels without quantity
    are left out of a Snapshot, which has no use for them.
    """
    out[O_SEQ] += 1
    out[O_DELTAS] += template == DELTA
    body = at + RECORD_HEADER_BYTES
    to = put_prefix(
        arena,
        body,
        template,
        PREFIX_BYTES,
        out[O_SOURCE],
        out[O_INSTRUMENT],
        EPOCH,
        out[O_SEQ],
        exchange,
        source_ns,
        flags,
    )
    first = start
    for side in range(2):
        count = bids if side == 0 else asks
        group = to
        to += GROUP_HEADER_BYTES
        written = 0
        for i in range(first, first + 2 * count, 2):
            quantity = words[i + 1]
            if quantity != 0 or template == DELTA:
                store_i64(arena, to, words[i])
                store_i64(arena, to + 8, quantity)
                to += LEVEL_BYTES
                written += 1
        store_u16(arena, group, LEVEL_BYTES)
        store_u16(arena, group + 2, written)
        first += 2 * count
    return put_record(arena, at, MARKET, clock_ns, to - body)


@inner("int64(uint8[::1], int64, int64[::1], int64[::1], int64)")
def put_trade(arena, at, out, fields, clock_ns):  # type: ignore[no-untyped-def]
    """Write a Trade record; returns where the next record starts."""
    out[O_SEQ] += 1
    body = at + RECORD_HEADER_BYTES
    put_prefix(
        arena,
        body,
        TRADE_MESSAGE,
        TRADE_BLOCK,
        out[O_SOURCE],
        out[O_INSTRUMENT],
        EPOCH,
        out[O_SEQ],
        exchange_ns(fields),
        fields[RECEIVED_NS],
        0,
    )
    store_i64(arena, body + AT_PRICE, fields[PRICE])
    store_i64(arena, body + AT_QUANTITY, fields[QUANTITY])
    store_i64(arena, body + AT_TRADE_ID, fields[TRADE_ID])
    store_i64(arena, body + AT_AGGRESSOR, fields[AGGRESSOR])
    return put_record(arena, at, MARKET, clock_ns, HEADER_BYTES + TRADE_BLOCK)


@inner("int64(uint8[::1], int64, int64[::1], int64, int64, int64)")
def put_gap(arena, at, out, clock, exchange, received):  # type: ignore[no-untyped-def]
    """Write the empty Delta that says: the venue's data has a hole here."""
    nothing = np.empty(0, dtype=np.int64)
    return put_book(
        arena, at, out, DELTA, clock, exchange, received, FLAG_SOURCE_GAP, nothing, 0, 0, 0
    )


def room_for(text_bytes: int, shelf_words: int) -> int:
    """Bytes that the records of so much text, and of a shelf that it may set free, can take.

    A level takes at least 10 bytes of text and 16 on the tape, a message at least 60 and at most
    176 with a gap before it; a shelved diff's 8 words take 88 bytes, its levels what they take.
    """
    return 4 * text_bytes + 16 * shelf_words + 4096
