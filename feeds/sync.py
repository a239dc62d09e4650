# Hot path: free @njit functions.
"""Sequence, epoch and snapshot synchronisation of one instrument, an explicit state machine.

    SYNCING ──snapshot──▶ SYNCED ──hole, source gap──▶ GAP ──hole closed, snapshot──▶ SYNCED
       ▲                     │                          │
       └─────────────────────┴─── new sequence ─────────┘

An answer of the snapshot service comes on another socket than the stream: it may overtake what the
stream still brings, or be older than the stream's first message. Neither is a loss.

`classify` looks at one message and says what to do with it; the caller does it. A hole holds back
what follows it. It closes by the missing message itself (it was only late) or by a snapshot that
covers it. A new sequence is a higher epoch; or, from a source that breaks the contract, a sequence
that runs backwards within one. One instrument's row knows nothing of another's.

The held messages lie end to end in a byte array, each behind its length, in order of arrival.

Source of the scheme: "Reliable Pub-Sub (Clone Pattern)", ZeroMQ Guide, chapter 5; and each
venue's own rule for joining a diff stream to a snapshot, which the adapters turn into ``seq``.
"""

from __future__ import annotations

from typing import Final

from numba import njit

from feeds.inner import inner
from feeds.rawbytes import load_i64, load_u16, store_i64
from feeds.wire import (
    AT_EPOCH,
    AT_FLAGS,
    AT_SEQ,
    FLAG_ANSWER,
    FLAG_SOURCE_GAP,
    HEARTBEAT,
    INSTRUMENT,
    SNAPSHOT,
)

SYNCING: Final = 0
SYNCED: Final = 1
GAP: Final = 2
STATES: Final = ("SYNCING", "SYNCED", "GAP")

# Columns of an instrument's row, int64.
STATE: Final = 0
EPOCH: Final = 1
LAST_SEQ: Final = 2  # last message in the book
SEEN_SEQ: Final = 3  # highest one received in this epoch
BROKEN: Final = 4  # 1 = the source lost data, or held messages overflowed: only a snapshot heals
HELD_BYTES: Final = 5
WANT_SNAPSHOT: Final = 6  # 1 = ask for one
GAPS: Final = 7
LOST: Final = 8  # messages of this epoch that never came
LATE: Final = 9  # came after all, while the hole was open
DUPLICATES: Final = 10
OLD_EPOCH: Final = 11
RESETS: Final = 12
SNAPSHOTS: Final = 13
COVERED: Final = 14  # came after a snapshot that already holds them
OVERFLOWS: Final = 15
REPEATS: Final = 16  # duplicates since the last message that went into the book
ROW_FIELDS: Final = 17

MAX_REPEATS: Final = 64  # more in a row: the sequence runs backwards, the source started over

# What to do with a message.
DROP: Final = 0
APPLY: Final = 1
REPLACE: Final = 2  # a snapshot, nothing was lost before it
REPLACE_AND_RESET: Final = 3  # a snapshot that heals: what depends on past flow starts anew
HOLD: Final = 4

_LENGTH_BYTES: Final = 8


@inner("void(int64[::1])")
def _open_gap(row):  # type: ignore[no-untyped-def]
    row[STATE] = GAP
    row[GAPS] += 1
    row[WANT_SNAPSHOT] = 1


@inner("void(int64[::1])")
def _start_over(row):  # type: ignore[no-untyped-def]
    """A new sequence: nothing of the one before is of use."""
    row[STATE] = SYNCING
    row[LAST_SEQ] = 0
    row[SEEN_SEQ] = -1
    row[BROKEN] = 0
    row[HELD_BYTES] = 0
    row[REPEATS] = 0
    row[WANT_SNAPSHOT] = 1


@inner("int64(int64[::1])")
def _repeated(row):  # type: ignore[no-untyped-def]
    """Count a duplicate; too many in a row are no duplicates but a source that started over."""
    row[DUPLICATES] += 1
    row[REPEATS] += 1
    if row[REPEATS] <= MAX_REPEATS:
        return DROP
    row[RESETS] += 1
    _start_over(row)
    return HOLD


@inner("int64(uint8[::1], int64, int64)")
def _held_seq(held, stop, seq):  # type: ignore[no-untyped-def]
    """1 if a held message has this seq."""
    at = 0
    while at < stop:
        if load_i64(held, at + _LENGTH_BYTES + AT_SEQ) == seq:
            return 1
        at += _LENGTH_BYTES + load_i64(held, at)
    return 0


@njit("int64(int64[::1], uint8[::1], uint8[::1], int64)", cache=True)
def classify(row, held, buf, start):  # type: ignore[no-untyped-def]
    """Take note of the checked market message at ``buf[start]`` and say what to do with it.

    Parameters
    ----------
    row : ndarray of int64, shape (ROW_FIELDS,)
        The instrument's state, updated.
    held : ndarray of uint8, shape (max_pending_bytes,)
        Messages held back; read only.

    Returns
    -------
    int
        DROP, APPLY, REPLACE, REPLACE_AND_RESET or HOLD. After APPLY or a replacement the caller
        works through `take_next` until it finds nothing, and then calls `settle`.
    """
    template = load_u16(buf, start + 2)
    epoch = load_i64(buf, start + AT_EPOCH)
    seq = load_i64(buf, start + AT_SEQ)
    flags = load_i64(buf, start + AT_FLAGS)

    if epoch < row[EPOCH]:
        row[OLD_EPOCH] += 1
        return DROP
    if epoch > row[EPOCH]:
        if row[EPOCH] != 0:
            row[RESETS] += 1
        row[EPOCH] = epoch
        _start_over(row)

    if (
        template == SNAPSHOT
        and flags & FLAG_ANSWER == 0
        and row[STATE] != SYNCING
        and seq < row[LAST_SEQ]
    ):
        # The book opens again further back: a source that started over without a new epoch.
        row[RESETS] += 1
        _start_over(row)

    last = row[LAST_SEQ]
    seen = row[SEEN_SEQ]
    state = row[STATE]
    takes_seq = template != HEARTBEAT and template != INSTRUMENT and flags & FLAG_ANSWER == 0

    if flags & FLAG_SOURCE_GAP and state != SYNCING and (not takes_seq or seq > last):
        if state == SYNCED:
            _open_gap(row)
            state = GAP
        row[BROKEN] = 1
        row[WANT_SNAPSHOT] = 1

    if not takes_seq and template != SNAPSHOT:
        if flags & FLAG_ANSWER:
            return DROP  # it may overtake what the stream still brings: no sign of a loss
        if seen < 0 and state == SYNCED and seq > last:
            # The answer was made before the subscription took hold: nothing is lost.
            _start_over(row)
            return DROP
        if seen >= 0 and seq > seen:
            row[LOST] += seq - seen
            row[SEEN_SEQ] = seq
        if state == SYNCED and seq > last:
            _open_gap(row)
        return DROP

    if takes_seq:
        if seen >= 0 and seq > seen + 1:
            row[LOST] += seq - seen - 1
        row[SEEN_SEQ] = max(seen, seq)

    if template == SNAPSHOT:
        if state == SYNCED and not takes_seq:
            return DROP  # an answer nobody needs any more
        if state != SYNCING and seq <= last:
            return _repeated(row) if takes_seq else DROP
        row[SNAPSHOTS] += 1
        row[REPEATS] = 0
        row[LAST_SEQ] = seq
        row[BROKEN] = 0
        row[WANT_SNAPSHOT] = 0
        if state == SYNCED and seq == last + 1:
            return REPLACE
        if state == SYNCED:
            row[GAPS] += 1
        row[STATE] = SYNCED
        return REPLACE_AND_RESET

    if state == SYNCED:
        if seq == last + 1:
            row[LAST_SEQ] = seq
            row[REPEATS] = 0
            return APPLY
        if seen < 0 and seq > last:
            _start_over(row)  # as above, told by the first message of the stream
            row[SEEN_SEQ] = seq
            return HOLD
        if seq <= last:
            if seq <= seen:
                return _repeated(row)
            row[COVERED] += 1
            return DROP
        _open_gap(row)
        return HOLD

    if state == GAP:
        if seq <= last:
            return _repeated(row)
        if seq <= seen:
            if _held_seq(held, row[HELD_BYTES], seq):
                return _repeated(row)
            row[LATE] += 1
            row[LOST] -= 1
        if seq == last + 1 and row[BROKEN] == 0:
            row[LAST_SEQ] = seq
            row[REPEATS] = 0
            return APPLY
    return HOLD


@inner("int64(int64[::1], uint8[::1], uint8[::1], int64, int64)")
def hold(row, held, buf, start, length):  # type: ignore[no-untyped-def]
    """Keep a message until its turn; returns 0, or 1 where there is no room.

    Without room all held messages go (they are useless without their hole's snapshot, and a
    newer snapshot covers them); only a snapshot heals then.
    """
    used = row[HELD_BYTES]
    size = _LENGTH_BYTES + ((length + 7) & ~7)
    if used + size > len(held):
        row[HELD_BYTES] = 0
        row[OVERFLOWS] += 1
        row[WANT_SNAPSHOT] = 1
        row[BROKEN] = 1
        return 1
    store_i64(held, used, size - _LENGTH_BYTES)
    for i in range(length):
        held[used + _LENGTH_BYTES + i] = buf[start + i]
    row[HELD_BYTES] = used + size
    return 0


@njit("int64(int64[::1], uint8[::1], int64)", cache=True)
def take_next(row, held, cursor):  # type: ignore[no-untyped-def]
    """Find the held message that continues the book, and count it in.

    Parameters
    ----------
    cursor : int
        Where the last found message stands, or 0: messages are held mostly in order, so the
        search goes on from there and wraps around once.

    Returns
    -------
    int
        Offset of the message in ``held``, or -1.
    """
    stop = row[HELD_BYTES]
    wanted = row[LAST_SEQ] + 1
    if row[STATE] == SYNCING or row[BROKEN] == 1:
        return -1
    begin = max(cursor - _LENGTH_BYTES, 0)
    for lap in range(2):
        at = begin if lap == 0 else 0
        limit = stop if lap == 0 else begin
        while at < limit:
            body = at + _LENGTH_BYTES
            if load_i64(held, body + AT_SEQ) == wanted:
                if load_i64(held, body + AT_FLAGS) & FLAG_SOURCE_GAP:
                    return -1
                row[LAST_SEQ] = wanted
                return body
            at += _LENGTH_BYTES + load_i64(held, at)
    return -1


@inner("void(int64[::1], uint8[::1])")
def settle(row, held):  # type: ignore[no-untyped-def]
    """After `take_next` found no more: is the stream whole again, or is there another hole?"""
    if row[HELD_BYTES] == 0:
        if row[STATE] == GAP and row[BROKEN] == 0 and row[LAST_SEQ] >= row[SEEN_SEQ]:
            row[STATE] = SYNCED
            row[WANT_SNAPSHOT] = 0
        return
    last = row[LAST_SEQ]
    stop = row[HELD_BYTES]
    ahead = 0
    broken = 0
    at = 0
    while at < stop:
        body = at + _LENGTH_BYTES
        if load_i64(held, body + AT_SEQ) > last:
            ahead += 1
            if load_i64(held, body + AT_FLAGS) & FLAG_SOURCE_GAP:
                broken = 1
        at = body + load_i64(held, at)
    if ahead > 0:
        if row[STATE] == SYNCED:
            _open_gap(row)
        row[BROKEN] = max(row[BROKEN], broken)
        row[WANT_SNAPSHOT] = 1
    else:
        row[HELD_BYTES] = 0
        row[STATE] = SYNCED
        row[WANT_SNAPSHOT] = 0
