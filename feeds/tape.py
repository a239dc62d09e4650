"""The tape: one file format for recorded sessions and converted historical ticks.

A tape is a header and then records, each with its receive time and a CRC32C, in the order in
which the engine took them. Everything is little-endian; every record starts at a multiple of 8.

======  ====  =====================================================================
offset  size  header of the file
======  ====  =====================================================================
0       8     ``OCTAPE\\x00\\x01``
8       4     format version
12      4     length of the JSON that follows
16      4     CRC32C of the JSON
20      4     0
24      n     `TapeMeta` as JSON, padded with zeros to a multiple of 8
======  ====  =====================================================================

======  ====  =====================================================================
offset  size  header of a record
======  ====  =====================================================================
0       4     CRC32C over the rest of this header and the payload
4       4     length of the payload
8       8     receive time, int64 ns since the UNIX epoch
16      2     kind
18      2     flags, 0
20      4     0
24      n     payload: an SBE message, padded with zeros to a multiple of 8
======  ====  =====================================================================

A record of kind END closes a tape; its payload counts the records before it. A tape without one
was cut short: the writer died, and everything up to the last whole record is good. A sealed tape
(``.tape.zst``) is the same bytes through zstd in several frames, so ``zstd -d`` unseals it.
"""

from __future__ import annotations

import os
import struct
from typing import Any, Final

import msgspec
import numpy as np
import zstandard
from numba import njit

from feeds.crc32c import crc32c
from feeds.errors import InputError
from feeds.inner import inner
from feeds.rawbytes import load_u16, load_u32, store_i64, store_u16, store_u32

MAGIC: Final = b"OCTAPE\x00\x01"
FORMAT_VERSION: Final = 1
FILE_HEADER_BYTES: Final = 24
RECORD_HEADER_BYTES: Final = 24
END_PAYLOAD_BYTES: Final = 8
MAX_PAYLOAD_BYTES: Final = 1 << 24
MAX_META_BYTES: Final = 1 << 24
ZSTD_FRAME_BYTES: Final = 1 << 24

MARKET: Final = 1
TIMER: Final = 2
CONTROL: Final = 3
SHADOW: Final = 4
SIGNAL: Final = 16
END: Final = 255
KIND_NAMES: Final = {
    MARKET: "market",
    TIMER: "timer",
    CONTROL: "control",
    SHADOW: "shadow",
    SIGNAL: "signal",
    END: "end",
}

# What `scan` can find at the position where it stops.
SCAN_CLEAN: Final = 0
SCAN_PARTIAL: Final = 1
SCAN_DAMAGED: Final = 2
SCAN_END: Final = 3


class InstrumentMeta(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One instrument of a tape; ``tick`` and ``lot`` are exact decimals as text."""

    venue: str
    symbol: str
    source_id: int
    instrument_id: int
    tick: str
    lot: str


class TapeMeta(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the header of a tape says.

    ``config`` is the part of the engine's config that can change a signal, so that a recorded
    session replays without any other file; a converted tape has none.
    """

    created_ns: int
    source: str
    instruments: list[InstrumentMeta]
    engine_epoch: int = 0
    config: dict[str, Any] | None = None
    hashes: dict[str, str] = {}


@njit("int64(int64)", cache=True)
def padded(length):  # type: ignore[no-untyped-def]
    """``length`` rounded up to a multiple of 8."""
    return (length + 7) & ~7


@njit("int64(uint8[::1], int64, int64, int64, int64)", cache=True)
def put_record(buf, at, kind, recv_ns, length):  # type: ignore[no-untyped-def]
    """Close a record whose payload already stands at ``at + RECORD_HEADER_BYTES``.

    Writes header, zero padding and checksum; returns where the next record starts.
    """
    store_u32(buf, at + 4, length)
    store_i64(buf, at + 8, recv_ns)
    store_u16(buf, at + 16, kind)
    store_u16(buf, at + 18, 0)
    store_u32(buf, at + 20, 0)
    end = at + RECORD_HEADER_BYTES + length
    after = at + RECORD_HEADER_BYTES + padded(length)
    for i in range(end, after):
        buf[i] = 0
    store_u32(buf, at, crc32c(buf, at + 4, end))
    return after


@inner("boolean(uint8[::1], int64, int64)")
def _is_blank(buf, start, stop):  # type: ignore[no-untyped-def]
    for i in range(start, stop):  # noqa: SIM110 - as Numba compiles it
        if buf[i] != 0:
            return False
    return True


@njit("UniTuple(int64, 3)(uint8[::1], int64, int64)", cache=True)
def scan(buf, start, stop):  # type: ignore[no-untyped-def]
    """Walk whole records of ``buf[start:stop]``, checking each CRC.

    Returns
    -------
    position : int
        Where the walk stopped: `stop`, the first record that is not whole or not good, or just
        after the END record.
    records : int
        Good records passed, END not counted.
    status : int
        SCAN_CLEAN, SCAN_PARTIAL (more bytes needed, or an unwritten or unfinished tail),
        SCAN_DAMAGED or SCAN_END.
    """
    at = start
    records = 0
    while at < stop:
        if at + RECORD_HEADER_BYTES > stop:
            return at, records, SCAN_PARTIAL
        length = load_u32(buf, at + 4)
        if length > MAX_PAYLOAD_BYTES:
            return at, records, SCAN_DAMAGED
        end = at + RECORD_HEADER_BYTES + length
        after = at + RECORD_HEADER_BYTES + padded(length)
        if after > stop:
            return at, records, SCAN_PARTIAL
        crc = load_u32(buf, at)
        if crc != crc32c(buf, at + 4, end):
            # The CRC is written last: without it, and with nothing behind it, the record is one
            # that its writer did not finish.
            if crc == 0 and _is_blank(buf, after, min(after + RECORD_HEADER_BYTES, stop)):
                return at, records, SCAN_PARTIAL
            return at, records, SCAN_DAMAGED
        for i in range(end, after):
            if buf[i] != 0:  # the CRC does not cover the padding
                return at, records, SCAN_DAMAGED
        if load_u16(buf, at + 16) == END:
            if length != END_PAYLOAD_BYTES:
                return at, records, SCAN_DAMAGED
            return after, records, SCAN_END
        records += 1
        at = after
    return at, records, SCAN_CLEAN


def file_header(meta: TapeMeta) -> bytes:
    """The bytes a tape starts with."""
    text = msgspec.json.encode(meta)
    if len(text) > MAX_META_BYTES:
        raise InputError("tape header too large", where="tape", found=f"{len(text)} bytes")
    crc = crc32c(np.frombuffer(text, dtype=np.uint8).copy(), 0, len(text))
    return (
        MAGIC
        + struct.pack("<IIII", FORMAT_VERSION, len(text), crc, 0)
        + text.ljust(padded(len(text)), b"\0")
    )


def seal(source: str | os.PathLike[str], target: str | os.PathLike[str], level: int = 6) -> int:
    """Compress a tape into zstd frames of `ZSTD_FRAME_BYTES`; returns the bytes written."""
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=True)
    with open(source, "rb") as raw, open(target, "wb") as out:
        while block := raw.read(ZSTD_FRAME_BYTES):
            out.write(compressor.compress(block))
        out.flush()
        os.fsync(out.fileno())
        return out.tell()
