# Hot path: the free @njit function `next_hit`; the rest runs once.
"""What a tape holds about one signal: its market messages, the events before it, its record."""

from __future__ import annotations

import os
import struct
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numba import njit

from engine.advance import find_slot
from engine.trust_events import Control, ShadowAnswer, decode_event
from feeds import codec, tape, wire
from feeds.describe import describe, field_offset, template_name
from feeds.errors import InputError
from feeds.rawbytes import load_i64, load_u16, load_u32
from feeds.tape_reader import TapeReader

MAX_EVENTS: Final = 10
MAX_MESSAGES: Final = 1 << 20  # market messages of one signal that are told apart
MAX_SHOWN_LEVELS: Final = 10  # a side, of the last message

# What `next_hit` looks for, int64.
FROM_SEQ: Final = 0
TO_SEQ: Final = 1
EPOCH: Final = 2
LIMIT: Final = 3  # nothing of the market from here on led to the signal
BY_TIMER: Final = 4
SIGNAL_SEQ: Final = 5
WANTED_FIELDS: Final = 6

NAME_BYTES: Final = 48  # venue and symbol, one behind the other
AT_NAME_OF_SIGNAL: Final = field_offset(wire.SIGNAL_DTYPE, "venue")
AT_SEQ_OF_SIGNAL: Final = field_offset(wire.SIGNAL_DTYPE, "signal_seq")
AT_NAME_OF_ANSWER: Final = field_offset(wire.SHADOW_ANSWER_DTYPE, "venue")
AT_SEQ_OF_ANSWER: Final = field_offset(wire.SHADOW_ANSWER_DTYPE, "signal_seq")


@njit(
    "boolean(uint8[::1], int64, int64, int64, int64, uint8[:,::1], int64)",
    cache=True,
)
def _is_about(buf, start, length, at_name, at_seq, keys, seq):  # type: ignore[no-untyped-def]
    """Is a Signal or ShadowAnswer about this instrument's signal ``seq``?"""
    if length < max(at_name + NAME_BYTES, at_seq + 8):
        return False
    if load_i64(buf, start + at_seq) != seq:
        return False
    for i in range(NAME_BYTES):  # noqa: SIM110 - as Numba compiles it
        if buf[start + at_name + i] != keys[0, i]:
            return False
    return True


@njit("int64(uint8[::1], int64, int64, uint8[:,::1], int64[:,::1], int64[::1])", cache=True)
def next_hit(buf, at, stop, keys, ids, wanted):  # type: ignore[no-untyped-def]
    """Position of the first record of ``buf[at:stop]`` that has to do with the signal, or ``stop``.

    Parameters
    ----------
    keys : ndarray of uint8, shape (1, 48)
        Venue and symbol as they stand in an Instrument message.
    ids : ndarray of int64, shape (1, 2)
        The instrument's ids, -1 until its Instrument message came; kept from call to call.
    wanted : ndarray of int64, shape (WANTED_FIELDS,)
        LIMIT counts from ``buf[0]``.
    """
    limit = wanted[LIMIT]
    while at < stop:
        length = load_u32(buf, at + 4)
        kind = load_u16(buf, at + 16)
        start = at + tape.RECORD_HEADER_BYTES
        after = start + tape.padded(length)
        if kind == tape.MARKET:
            if after <= limit and wire.check(buf, start, start + length) == 0:
                template = load_u16(buf, start + 2)
                slot = np.int64(-1)
                if template < wire.SNAPSHOT_REQUEST:
                    slot = find_slot(buf, start, keys, ids, np.int64(0))
                if slot == 0 and after == limit and wanted[BY_TIMER] == 0:
                    return at
                changes = (
                    template == wire.SNAPSHOT or template == wire.DELTA or template == wire.TRADE
                )
                if slot == 0 and changes and load_i64(buf, start + wire.AT_EPOCH) == wanted[EPOCH]:
                    seq = load_i64(buf, start + wire.AT_SEQ)
                    if (wanted[FROM_SEQ] <= seq and seq <= wanted[TO_SEQ]) or seq == wanted[TO_SEQ]:
                        return at
        elif kind == tape.TIMER:
            if at == limit and wanted[BY_TIMER] == 1:
                return at
        elif kind == tape.CONTROL:
            if after <= limit:
                return at
        elif kind == tape.SIGNAL:
            if _is_about(
                buf, start, length, AT_NAME_OF_SIGNAL, AT_SEQ_OF_SIGNAL, keys, wanted[SIGNAL_SEQ]
            ):
                return at
        elif kind == tape.SHADOW:
            if _is_about(
                buf, start, length, AT_NAME_OF_ANSWER, AT_SEQ_OF_ANSWER, keys, wanted[SIGNAL_SEQ]
            ):
                return at
        at = after
    return stop


@dataclass
class Found:
    """What was found.

    Attributes
    ----------
    kinds : Counter
        Market messages that changed the book or traded, from the signal's first_seq to its
        last_seq, by kind; one that came twice counts once.
    last : dict
        The one with last_seq, described; at most `MAX_SHOWN_LEVELS` levels a side.
    made_due : dict
        The record that made the signal due, described: a market message or a timer.
    events : deque of (int, Control)
        The last `MAX_EVENTS` trust events before the signal, with their times.
    recorded : bytes or None
        The signal as it was recorded.
    answer : ShadowAnswer or None
        What the shadow said of its inference.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    last: dict[str, Any] = field(default_factory=dict)
    made_due: dict[str, Any] = field(default_factory=dict)
    events: deque[tuple[int, Control]] = field(default_factory=lambda: deque(maxlen=MAX_EVENTS))
    recorded: bytes | None = None
    answer: ShadowAnswer | None = None


def search(path: str | os.PathLike[str], signal: np.void, until: int, *, by_timer: bool) -> Found:
    """Look through a tape for what has to do with a signal.

    Parameters
    ----------
    path : path-like
    signal : ndarray scalar of SIGNAL_DTYPE
        As replayed.
    until : int
        Bytes of records that the engine had taken when the signal was due.
    by_timer : bool
        A timer, which begins at ``until``, made it due.

    Raises
    ------
    InputError
        If the tape is damaged before the signal. What is behind it may be damaged, or missing.
    """
    found = Found()
    seen: set[tuple[int, int]] = set()
    keys = np.frombuffer(
        signal["venue"].ljust(16, b"\0") + signal["symbol"].ljust(32, b"\0"), dtype=np.uint8
    ).reshape(1, NAME_BYTES)
    keys, ids = keys.copy(), np.full((1, 2), -1, dtype=np.int64)
    wanted = np.zeros(WANTED_FIELDS, dtype=np.int64)
    wanted[FROM_SEQ], wanted[TO_SEQ] = signal["first_seq"], signal["last_seq"]
    wanted[EPOCH], wanted[SIGNAL_SEQ] = signal["source_epoch"], signal["signal_seq"]
    wanted[BY_TIMER] = by_timer
    reader = TapeReader(path)
    done = 0
    try:
        for chunk in reader.chunks(allow_truncated=True):
            limit = wanted[LIMIT] = until - done + chunk.start
            at = next_hit(chunk.buf, chunk.start, chunk.stop, keys, ids, wanted)
            while at < chunk.stop:
                _take(found, chunk.buf, at, int(limit), seen, wanted)
                length = int.from_bytes(chunk.buf[at + 4 : at + 8].tobytes(), "little")
                at += tape.RECORD_HEADER_BYTES + int(tape.padded(length))
                at = next_hit(chunk.buf, at, chunk.stop, keys, ids, wanted)
            done += chunk.stop - chunk.start
            if done > until and found.recorded is not None and found.answer is not None:
                break
    except InputError:
        if done <= until:
            raise
    return found


def _take(
    found: Found,
    buf: np.ndarray,
    at: int,
    limit: int,
    seen: set[tuple[int, int]],
    wanted: np.ndarray,
) -> None:
    """Note one record that was hit."""
    length, at_ns, kind = struct.unpack_from("<IqH", buf.data, at + 4)
    start = at + tape.RECORD_HEADER_BYTES
    message = bytes(buf[start : start + length])
    if kind == tape.SIGNAL:
        if found.recorded is None:
            found.recorded = message
    elif kind == tape.TIMER:
        found.made_due = describe(message)
    elif kind == tape.MARKET:
        if start + int(tape.padded(length)) == limit and not wanted[BY_TIMER]:
            found.made_due = _short(describe(message))
        template = codec.template_id(message)
        seq = int.from_bytes(message[wire.AT_SEQ : wire.AT_SEQ + 8], "little")
        epoch = int.from_bytes(message[wire.AT_EPOCH : wire.AT_EPOCH + 8], "little")
        changes = template in (wire.SNAPSHOT, wire.DELTA, wire.TRADE)
        if not changes or epoch != wanted[EPOCH]:
            return
        if seq == wanted[TO_SEQ]:
            found.last = _short(describe(message))
        elif not wanted[FROM_SEQ] <= seq < wanted[TO_SEQ]:
            return
        if (seq, template) not in seen and len(seen) < MAX_MESSAGES:
            seen.add((seq, template))
            found.kinds[template_name(template)] += 1
    else:
        event = decode_event(message)
        if isinstance(event, ShadowAnswer):
            found.answer = event
        else:
            found.events.append((at_ns, event))


def _short(described: dict[str, Any]) -> dict[str, Any]:
    """A described message with its best levels alone, and how many there are."""
    out = dict(described)
    for side in ("bids", "asks"):
        if side in out and len(out[side]) > MAX_SHOWN_LEVELS:
            out[f"{side}_in_message"] = len(out[side])
            out[side] = out[side][:MAX_SHOWN_LEVELS]
    return out
