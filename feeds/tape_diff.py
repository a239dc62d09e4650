# Hot path: the free @njit function `compare`; what it finds is explained on the cold path.
"""The first record in which two tapes differ."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec
import numpy as np
from numba import njit

from feeds import tape, wire
from feeds.describe import describe, differences, field_offset
from feeds.rawbytes import load_i64, load_u16, load_u32
from feeds.tape_reader import Chunk, TapeReader

ANY_KIND: Final = 0

_AT_RECEIVED: Final = field_offset(wire.SIGNAL_DTYPE, "received_ns")
_AT_AFTER_EMITTED: Final = field_offset(wire.SIGNAL_DTYPE, "source_time_ns")

# What `compare` stops at.
_ENDED_A: Final = 0
_ENDED_B: Final = 1
_DIFFERS: Final = 2


@njit("boolean(uint8[::1], int64, uint8[::1], int64, int64)", cache=True)
def _same_bytes(a, at_a, b, at_b, length):  # type: ignore[no-untyped-def]
    i = 0
    while i + 8 <= length:
        if load_i64(a, at_a + i) != load_i64(b, at_b + i):
            return False
        i += 8
    while i < length:
        if a[at_a + i] != b[at_b + i]:
            return False
        i += 1
    return True


@njit("int64(uint8[::1], int64, int64, int64)", cache=True)
def next_of_kind(buf, at, stop, kind):  # type: ignore[no-untyped-def]
    """Position of the first record of ``kind`` (`ANY_KIND`: any) in whole records, or ``stop``."""
    while at < stop and kind != ANY_KIND and load_u16(buf, at + 16) != kind:
        at += tape.RECORD_HEADER_BYTES + tape.padded(load_u32(buf, at + 4))
    return at


@njit(
    "UniTuple(int64, 4)(uint8[::1], int64, int64, uint8[::1], int64, int64, int64, boolean)",
    cache=True,
)
def compare(a, at_a, stop_a, b, at_b, stop_b, kind, ignore_receive_time):  # type: ignore[no-untyped-def]
    """Walk two runs of whole records as long as they agree.

    Only records of ``kind`` count (`ANY_KIND`: all). Without receive times, neither those of the
    records nor the wall-clock times inside a Signal are looked at.

    Returns
    -------
    at_a, at_b : int
        The first pair that differs, or where the shorter run ended.
    records : int
        Pairs that agree.
    status : int
        Which run ended (0, 1), or 2 at a difference.
    """
    records = 0
    while True:
        at_a = next_of_kind(a, at_a, stop_a, kind)
        if at_a >= stop_a:
            return at_a, at_b, records, _ENDED_A
        at_b = next_of_kind(b, at_b, stop_b, kind)
        if at_b >= stop_b:
            return at_a, at_b, records, _ENDED_B
        length = load_u32(a, at_a + 4)
        same = length == load_u32(b, at_b + 4) and load_i64(a, at_a + 16) == load_i64(b, at_b + 16)
        if same and not ignore_receive_time:
            same = load_i64(a, at_a + 8) == load_i64(b, at_b + 8)
        if same:
            body_a = at_a + tape.RECORD_HEADER_BYTES
            body_b = at_b + tape.RECORD_HEADER_BYTES
            if (
                ignore_receive_time
                and load_u16(a, at_a + 16) == tape.SIGNAL
                and length >= _AT_AFTER_EMITTED
            ):
                same = _same_bytes(a, body_a, b, body_b, _AT_RECEIVED) and _same_bytes(
                    a,
                    body_a + _AT_AFTER_EMITTED,
                    b,
                    body_b + _AT_AFTER_EMITTED,
                    length - _AT_AFTER_EMITTED,
                )
            else:
                same = _same_bytes(a, body_a, b, body_b, length)
        if not same:
            return at_a, at_b, records, _DIFFERS
        records += 1
        step = tape.RECORD_HEADER_BYTES + tape.padded(length)
        at_a += step
        at_b += step


class FieldDifference(msgspec.Struct, frozen=True):
    """One field of a record as it stands on both tapes; None where a tape has none."""

    field: str
    a: Any
    b: Any


class Difference(msgspec.Struct, frozen=True):
    """The first pair of records that differ.

    ``index`` counts the compared records from 0; an offset is None where that tape ended.
    """

    index: int
    offset_a: int | None
    offset_b: int | None
    fields: list[FieldDifference]


class Comparison(msgspec.Struct, frozen=True):
    """Answer of `diff`; ``same_header`` is told apart, since a header changes no event."""

    a: str
    b: str
    equal: bool
    same_header: bool
    records: int
    difference: Difference | None


class _Side:
    """One tape as a position that moves along its chunks."""

    def __init__(self, path: str | os.PathLike[str], allow_truncated: bool) -> None:
        self.reader = TapeReader(path)
        self._chunks: Iterator[Chunk] = self.reader.chunks(allow_truncated=allow_truncated)
        self.chunk = Chunk(np.empty(0, dtype=np.uint8), 0, 0, self.reader.data_offset)
        self.at = 0
        self.ended = False

    def refill(self) -> None:
        following = next(self._chunks, None)
        if following is None:
            self.ended = True
        else:
            self.chunk, self.at = following, following.start

    @property
    def offset(self) -> int:
        return self.chunk.file_offset + self.at - self.chunk.start

    def describe(self) -> dict[str, Any]:
        """The record here by names and values."""
        length, recv_ns, kind, flags = struct.unpack_from("<IqHH", self.chunk.buf.data, self.at + 4)
        body = self.at + tape.RECORD_HEADER_BYTES
        return {
            "kind": tape.KIND_NAMES.get(kind, f"kind {kind}"),
            "flags": flags,
            "recv_ns": recv_ns,
            **describe(self.chunk.buf[body : body + length].tobytes()),
        }


def _nothing(_: int) -> None:
    pass


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    kind: int = ANY_KIND,
    ignore_receive_time: bool = False,
    allow_truncated: bool = False,
    tick: Callable[[int], None] = _nothing,
) -> Comparison:
    """Compare two tapes record by record, raw or sealed.

    Parameters
    ----------
    a, b : path-like
    kind : int
        Compare only records of this kind; `ANY_KIND` for all.
    ignore_receive_time : bool
        Look at no wall-clock time, neither the records' nor those inside a Signal.
    allow_truncated : bool
        Compare tapes without an END record up to their last whole record.
    tick : callable
        Told how many bytes of ``a`` are read.

    Raises
    ------
    InputError
        If one is no tape or damaged before the first difference.
    """
    one, other = _Side(a, allow_truncated), _Side(b, allow_truncated)
    records = 0
    difference = None
    while True:
        one.at, other.at, count, status = compare(
            one.chunk.buf,
            one.at,
            one.chunk.stop,
            other.chunk.buf,
            other.at,
            other.chunk.stop,
            kind,
            ignore_receive_time,
        )
        records += count
        if status == _ENDED_A and not one.ended:
            one.refill()
            tick(one.reader.file_bytes_read)
            continue
        if status == _ENDED_A:
            # `compare` looks at b only once a has a record: is there one left on b?
            other.at = next_of_kind(other.chunk.buf, other.at, other.chunk.stop, kind)
            while other.at >= other.chunk.stop and not other.ended:
                other.refill()
                other.at = next_of_kind(other.chunk.buf, other.at, other.chunk.stop, kind)
            if not other.ended:
                difference = _explain(records, None, other)
            break
        if status == _ENDED_B and not other.ended:
            other.refill()
            continue
        difference = _explain(records, one, None if other.ended else other)
        break
    return Comparison(
        str(a),
        str(b),
        difference is None,
        one.reader.meta == other.reader.meta,
        records,
        difference,
    )


def _explain(index: int, a: _Side | None, b: _Side | None) -> Difference:
    left = {} if a is None else a.describe()
    right = {} if b is None else b.describe()
    return Difference(
        index,
        None if a is None else a.offset,
        None if b is None else b.offset,
        [FieldDifference(*item) for item in differences(left, right)],
    )
