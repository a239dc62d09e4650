# Hot path: free @njit functions.
"""From tape records to what a publisher sends: places, numbers of its own, changes of the book.

A published stream has the epoch of its publisher, and goes on without a hole when a tape starts
over. Both are written into the common prefix of the messages where they stand; the records' CRCs
are checked before and no longer needed.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit

from feeds.inner import inner
from feeds.rawbytes import load_i64, load_u16, load_u32, store_i64
from feeds.tape import MARKET, RECORD_HEADER_BYTES, padded
from feeds.wire import (
    AT_EPOCH,
    AT_EXCHANGE_TIME,
    AT_FLAGS,
    AT_INSTRUMENT_ID,
    AT_SEQ,
    AT_SOURCE_ID,
    AT_SOURCE_TIME,
    DELTA,
    FLAG_ANSWER,
    FLAG_SOURCE_GAP,
    GROUP_HEADER_BYTES,
    HEADER_BYTES,
    HEARTBEAT,
    INSTRUMENT,
    SNAPSHOT,
    TIMER,
    check,
)

# Columns of `places`: one row for each message that goes out.
OFFSET: Final = 0
LENGTH: Final = 1
SLOT: Final = 2
RECV_NS: Final = 3
OUT_EPOCH: Final = 4  # as of after the message
OUT_SEQ: Final = 5
EXCHANGE_NS: Final = 6
ROWS: Final = 7  # rows of `changes` written up to and with this message
PLACE_COLUMNS: Final = 8

# Columns of `changes`, and the markers that stand in its SIDE column.
CHANGE_SLOT: Final = 0
SIDE: Final = 1
PRICE: Final = 2
QUANTITY: Final = 3  # of a SNAPSHOT_MARK: rows that belong to it
CHANGE_SEQ: Final = 4
CHANGE_COLUMNS: Final = 5
SNAPSHOT_MARK: Final = -1
LOST_MARK: Final = -2
EPOCH_MARK: Final = -3

# Columns of `numbers`: the state of one instrument.
FIRST_EPOCH: Final = 0  # of this pass over the tape; -1 before the first message
LAST_EPOCH: Final = 1
FIRST_SEQ: Final = 2
LAST_SEQ: Final = 3
EPOCH_BASE: Final = 4  # epoch that FIRST_EPOCH becomes; -1: what it is
SEQ_SHIFT: Final = 5  # added to the seqs of FIRST_EPOCH
SENT_EPOCH: Final = 6
SENT_SEQ: Final = 7
KNOWN: Final = 8  # 1 while the messages so far determine the book
LAST_EXCHANGE_NS: Final = 9
NUMBERS: Final = 10

_SHORTEST_RECORD: Final = RECORD_HEADER_BYTES + HEADER_BYTES


def most_places(stop: int) -> int:
    """Rows of `places` that suffice for ``stop`` bytes of records."""
    return stop // _SHORTEST_RECORD + 1


def most_changes(stop: int) -> int:
    """Rows of `changes` that suffice for ``stop`` bytes of records."""
    return stop // 16 + 2 * most_places(stop)


@inner("int64(int64[:, ::1], int64, int64)")
def find_slot(keys, source_id, instrument_id):  # type: ignore[no-untyped-def]
    """Row of ``keys`` (source_id, instrument_id), or -1."""
    n = len(keys)
    if instrument_id < n:
        if keys[instrument_id, 0] == source_id and keys[instrument_id, 1] == instrument_id:
            return instrument_id
    for i in range(n):
        if keys[i, 0] == source_id and keys[i, 1] == instrument_id:
            return i
    return -1


@inner("int64(uint8[::1], int64, int64, int64, int64[:, ::1], int64)")
def put_changes(buf, start, slot, seq, changes, row):  # type: ignore[no-untyped-def]
    """Append the levels of a checked Snapshot or Delta to ``changes``; returns the next row."""
    at = start + HEADER_BYTES + load_u16(buf, start)
    for side in range(2):
        entry = load_u16(buf, at)
        count = load_u16(buf, at + 2)
        at += GROUP_HEADER_BYTES
        for _ in range(count):
            changes[row, CHANGE_SLOT] = slot
            changes[row, SIDE] = side
            changes[row, PRICE] = load_i64(buf, at)
            changes[row, QUANTITY] = load_i64(buf, at + 8)
            changes[row, CHANGE_SEQ] = seq
            row += 1
            at += entry
    return row


@njit("int64(int64[:, ::1], int64, int64, int64, int64)", cache=True)
def put_mark(changes, row, slot, mark, seq):  # type: ignore[no-untyped-def]
    """Append a marker to ``changes``; returns the next row."""
    changes[row, CHANGE_SLOT] = slot
    changes[row, SIDE] = mark
    changes[row, PRICE] = 0
    changes[row, QUANTITY] = 0
    changes[row, CHANGE_SEQ] = seq
    return row + 1


@njit(
    "UniTuple(int64, 3)(uint8[::1], int64, int64, int64[:, ::1], int64[:, ::1], int64,"
    " int64[:, ::1], int64[:, ::1])",
    cache=True,
)
def index_records(buf, start, stop, keys, numbers, shift_ns, places, changes):  # type: ignore[no-untyped-def]
    """Find the market messages in whole records, and give them the publisher's numbers.

    Parameters
    ----------
    buf : ndarray of uint8
        Records in ``buf[start:stop]``; epoch, seq and times of the messages are rewritten.
    keys : ndarray of int64, shape (n, 2)
        (source_id, instrument_id) of each instrument.
    numbers : ndarray of int64, shape (n, NUMBERS)
        State, see the constants.
    shift_ns : int
        Added to every time.
    places : ndarray of int64, shape (m, PLACE_COLUMNS)
        Out: the messages to send.
    changes : ndarray of int64, shape (k, CHANGE_COLUMNS)
        Out: what they do to the books. Seqs in it are the tape's, within one epoch.

    Returns
    -------
    messages, rows, refused : int
        Rows written to ``places`` and ``changes``; records with a malformed message or one of an
        instrument that is not in ``keys``.
    """
    at = start
    count = 0
    row = 0
    refused = 0
    while at < stop:
        length = load_u32(buf, at + 4)
        recv_ns = load_i64(buf, at + 8)
        kind = load_u16(buf, at + 16)
        body = at + RECORD_HEADER_BYTES
        at = body + padded(length)
        if kind != MARKET:
            continue
        if check(buf, body, body + length) != 0:
            refused += 1
            continue
        template = load_u16(buf, body + 2)
        if template == TIMER:
            continue
        slot = find_slot(
            keys, load_u32(buf, body + AT_SOURCE_ID), load_u32(buf, body + AT_INSTRUMENT_ID)
        )
        if slot < 0:
            refused += 1
            continue
        epoch = load_i64(buf, body + AT_EPOCH)
        seq = load_i64(buf, body + AT_SEQ)
        takes_seq = template != HEARTBEAT and template != INSTRUMENT
        last = numbers[slot, LAST_SEQ]
        if numbers[slot, EPOCH_BASE] < 0:
            numbers[slot, EPOCH_BASE] = epoch
        if numbers[slot, FIRST_EPOCH] < 0:
            if takes_seq:
                numbers[slot, FIRST_EPOCH] = epoch
                numbers[slot, LAST_EPOCH] = epoch
                numbers[slot, FIRST_SEQ] = seq
                last = seq - 1
                if numbers[slot, SENT_SEQ] > 0:
                    # A tape that starts over: go on with the next number.
                    numbers[slot, SEQ_SHIFT] = numbers[slot, SENT_SEQ] + 1 - seq
        elif epoch > numbers[slot, LAST_EPOCH]:
            numbers[slot, LAST_EPOCH] = epoch
            numbers[slot, LAST_SEQ] = 0
            last = 0
            numbers[slot, KNOWN] = 0
            row = put_mark(changes, row, slot, EPOCH_MARK, 0)
        elif epoch < numbers[slot, LAST_EPOCH]:
            refused += 1
            continue
        first_epoch = numbers[slot, FIRST_EPOCH]
        shift = 0
        if first_epoch < 0:
            first_epoch = epoch
        if epoch == first_epoch:
            shift = numbers[slot, SEQ_SHIFT]
        flags = load_i64(buf, body + AT_FLAGS)
        if template == SNAPSHOT and numbers[slot, KNOWN] == 1:
            if seq <= last or flags & FLAG_ANSWER:
                continue  # an answer of a snapshot service that changes nothing
        if flags & FLAG_SOURCE_GAP or (takes_seq and seq > last + 1):
            numbers[slot, KNOWN] = 0
            row = put_mark(changes, row, slot, LOST_MARK, seq)
        if template == SNAPSHOT:
            numbers[slot, KNOWN] = 1
            mark = row
            row = put_mark(changes, row, slot, SNAPSHOT_MARK, seq)
            row = put_changes(buf, body, slot, seq, changes, row)
            changes[mark, QUANTITY] = row - mark - 1
        elif template == DELTA:
            row = put_changes(buf, body, slot, seq, changes, row)
        if takes_seq:
            last = max(last, seq)
            numbers[slot, LAST_SEQ] = last
        out_epoch = numbers[slot, EPOCH_BASE] + epoch - first_epoch
        if not takes_seq and numbers[slot, FIRST_EPOCH] < 0:
            out_seq = numbers[slot, SENT_SEQ]
        else:
            out_seq = seq + shift
            numbers[slot, SENT_SEQ] = last + shift
        exchange_ns = load_i64(buf, body + AT_EXCHANGE_TIME) + shift_ns
        numbers[slot, SENT_EPOCH] = out_epoch
        numbers[slot, LAST_EXCHANGE_NS] = max(numbers[slot, LAST_EXCHANGE_NS], exchange_ns)
        store_i64(buf, body + AT_EPOCH, out_epoch)
        store_i64(buf, body + AT_SEQ, out_seq)
        if shift_ns != 0:
            store_i64(buf, body + AT_EXCHANGE_TIME, exchange_ns)
            source_ns = load_i64(buf, body + AT_SOURCE_TIME)
            store_i64(buf, body + AT_SOURCE_TIME, source_ns + shift_ns)
        places[count, OFFSET] = body
        places[count, LENGTH] = length
        places[count, SLOT] = slot
        places[count, RECV_NS] = recv_ns + shift_ns
        places[count, OUT_EPOCH] = out_epoch
        places[count, OUT_SEQ] = numbers[slot, SENT_SEQ]
        places[count, EXCHANGE_NS] = numbers[slot, LAST_EXCHANGE_NS]
        places[count, ROWS] = row
        count += 1
    return count, row, refused


def start_over(numbers: np.ndarray) -> None:
    """Prepare ``numbers`` for another pass over the same tape.

    Seqs go on where they ended; an instrument whose epoch rose on the tape gets one more epoch.
    """
    restarted = numbers[:, LAST_EPOCH] > numbers[:, FIRST_EPOCH]
    numbers[restarted, EPOCH_BASE] = numbers[restarted, SENT_EPOCH] + 1
    numbers[restarted, SENT_SEQ] = 0
    numbers[:, SEQ_SHIFT] = 0
    numbers[:, FIRST_EPOCH] = -1
    numbers[:, LAST_SEQ] = 0
    numbers[:, KNOWN] = 0
