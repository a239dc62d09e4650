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

import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import zstandard
from numba import njit

from feeds.crc32c import crc32c
from feeds.errors import InputError
from feeds.rawbytes import load_i64, load_u16, load_u32, store_i64, store_u16, store_u32

MAGIC: Final = b"OCTAPE\x00\x01"
FORMAT_VERSION: Final = 1
FILE_HEADER_BYTES: Final = 24
RECORD_HEADER_BYTES: Final = 24
END_PAYLOAD_BYTES: Final = 8
MAX_PAYLOAD_BYTES: Final = 1 << 24
MAX_META_BYTES: Final = 1 << 24
WINDOW_BYTES: Final = 1 << 25
CHUNK_BYTES: Final = 1 << 22
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


class Chunk(NamedTuple):
    """Whole, checked records in ``buf[start:stop]``; ``file_offset`` is where ``start`` stands."""

    buf: np.ndarray
    start: int
    stop: int
    file_offset: int


class Record(NamedTuple):
    """One record; ``payload`` is valid until the next one is asked for."""

    offset: int
    kind: int
    recv_ns: int
    flags: int
    payload: memoryview


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
        SCAN_CLEAN, SCAN_PARTIAL (more bytes needed, or a length of zeros: an unwritten tail),
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
            if length == 0 and crc == 0 and load_i64(buf, at + 8) == 0:
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


class TapeWriter:
    """Appends records to a tape through a mapped window that moves along the file.

    What was appended is in the page cache at once: it survives the process, and after a crash the
    tape is readable up to its last whole record.

    Parameters
    ----------
    path : path-like
        File to make; its folder is made too.
    meta : TapeMeta
    overwrite : bool
        Replace an existing file instead of refusing.
    window_bytes : int
        Size of the mapped window, a multiple of the page size.

    Raises
    ------
    InputError
        If the file exists or cannot be made.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        meta: TapeMeta,
        *,
        overwrite: bool = False,
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        assert window_bytes % mmap.ALLOCATIONGRANULARITY == 0
        self.path = Path(path)
        self.meta = meta
        self.records = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | (os.O_TRUNC if overwrite else os.O_EXCL)
            self._fd = os.open(self.path, flags, 0o644)
        except FileExistsError:
            raise InputError(
                "tape exists already",
                where=str(self.path),
                fix="name another file, or pass --overwrite",
            ) from None
        except OSError as error:
            raise InputError(
                "tape cannot be written", where=str(self.path), found=error.strerror or str(error)
            ) from None
        self._window_bytes = window_bytes
        self._closed = False
        self._window_offset = 0
        self._map: mmap.mmap | None = None
        self.position = 0
        head = file_header(meta)
        self._open_window(0, len(head))
        self.arena[: len(head)] = np.frombuffer(head, dtype=np.uint8)
        self.position = len(head)

    @property
    def bytes_written(self) -> int:
        """Length of the tape so far."""
        return self._window_offset + self.position

    def _open_window(self, file_offset: int, need: int) -> None:
        base = file_offset - file_offset % mmap.ALLOCATIONGRANULARITY
        size = self._window_bytes
        while size < file_offset - base + need:
            size += self._window_bytes
        try:
            # Reserve the blocks now: a full disk is an error here, not a SIGBUS in the hot path.
            os.posix_fallocate(self._fd, base, size)
        except OSError as error:
            os.ftruncate(self._fd, file_offset)
            raise InputError(
                "no room to go on with the tape",
                where=f"{self.path} at byte {file_offset}",
                found=error.strerror or str(error),
                fix="free disk space; everything before this byte is kept",
            ) from None
        # The window before goes when its last array does: a caller may still hold one.
        self._map = mmap.mmap(self._fd, size, access=mmap.ACCESS_WRITE, offset=base)
        self.arena: np.ndarray = np.frombuffer(self._map, dtype=np.uint8)
        self._window_offset = base
        self.position = file_offset - base

    def room(self, need: int) -> tuple[np.ndarray, int]:
        """Array and position with room for ``need`` more bytes; the array may be a new one."""
        if self.position + need > len(self.arena):
            self._open_window(self._window_offset + self.position, need)
        return self.arena, self.position

    def advance(self, position: int, records: int = 1) -> None:
        """Take over ``records`` records written by native code up to ``position``."""
        assert self.position <= position <= len(self.arena)
        self.position = position
        self.records += records

    def append(self, kind: int, recv_ns: int, payload: bytes | memoryview) -> int:
        """Append one record; returns its offset in the file."""
        length = len(payload)
        assert length <= MAX_PAYLOAD_BYTES, "a payload larger than a tape record may be"
        arena, at = self.room(RECORD_HEADER_BYTES + length + 8)
        offset = self._window_offset + at
        body = at + RECORD_HEADER_BYTES
        arena[body : body + length] = np.frombuffer(payload, dtype=np.uint8)
        self.advance(put_record(arena, at, kind, recv_ns, length))
        return offset

    def flush(self) -> None:
        """Force what was written onto the disk."""
        if self._map is not None:
            self._map.flush()

    def close(self) -> None:
        """Write the END record, cut the file to its length, and release it."""
        if self._closed:
            return
        records = self.records
        self.append(END, 0, struct.pack("<Q", records))
        self.records = records
        self._release()

    def _release(self) -> None:
        self._closed = True
        length = self.bytes_written
        self.arena = np.empty(0, dtype=np.uint8)
        self._map = None
        os.ftruncate(self._fd, length)
        os.close(self._fd)
        self._window_offset, self.position = length, 0

    def __enter__(self) -> TapeWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class TapeReader:
    """Reads a tape, raw or sealed, in checked chunks of bounded size.

    Parameters
    ----------
    path : path-like
        A ``.tape`` or ``.tape.zst`` file; told apart by their first bytes.
    chunk_bytes : int
        How much to map or decompress at a time.

    Attributes
    ----------
    meta : TapeMeta
    sealed : bool
    data_offset : int
        Where the first record starts.
    file_bytes : int
        Size of the file as it stands on the disk.
    truncated_at : int or None
        After reading: where the tape ends without an END record.

    Raises
    ------
    InputError
        If the file is missing, is no tape, or its header is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], *, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.path = Path(path)
        self.truncated_at: int | None = None
        self._chunk_bytes = chunk_bytes
        self._file: Any = None
        try:
            with open(self.path, "rb") as file:
                start = file.read(len(MAGIC))
                self.file_bytes = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise InputError(
                "tape cannot be read", where=str(self.path), found=error.strerror or str(error)
            ) from None
        self.sealed = start[:4] == zstandard.FRAME_HEADER
        self.meta, self.data_offset = self._read_header()

    def _stream(self) -> Any:
        file = open(self.path, "rb")  # noqa: SIM115 - closed with the stream
        self._file = file
        if not self.sealed:
            return file
        return zstandard.ZstdDecompressor().stream_reader(
            file, read_across_frames=True, closefd=True
        )

    @property
    def file_bytes_read(self) -> int:
        """How far in the file, as it stands on the disk, reading has come: for progress."""
        return self.file_bytes if self._file.closed else int(self._file.tell())

    def _read_header(self) -> tuple[TapeMeta, int]:
        where = str(self.path)
        with self._stream() as stream:
            try:
                head = _read_whole(stream, FILE_HEADER_BYTES)
                if len(head) < FILE_HEADER_BYTES or head[:8] != MAGIC:
                    raise InputError(
                        "not a tape",
                        where=f"{where} at byte 0",
                        expected=repr(MAGIC),
                        found=repr(head[:8]),
                        fix="convert a raw recording with 'octick tape convert'",
                    )
                version, length, crc, zero = struct.unpack_from("<IIII", head, 8)
                if version != FORMAT_VERSION:
                    raise InputError(
                        "tape of another format version",
                        where=f"{where} at byte 8",
                        expected=str(FORMAT_VERSION),
                        found=str(version),
                    )
                size = padded(length) if length <= MAX_META_BYTES else 0
                text = _read_whole(stream, size)
            except zstandard.ZstdError as error:
                raise InputError("damaged zstd data", where=where, found=str(error)) from None
        text, padding = text[:length], text[length:]
        if (
            len(text) + len(padding) != padded(length)
            or crc != crc32c(np.frombuffer(text, np.uint8).copy(), 0, length)
            or any(padding)
            or zero
        ):
            raise InputError(
                "damaged tape header",
                where=f"{where} at byte {FILE_HEADER_BYTES}",
                expected=f"{length} bytes with CRC32C {crc:08x}",
                found=f"{len(text)} bytes that do not match",
            )
        try:
            meta = msgspec.json.decode(text, type=TapeMeta)
        except msgspec.DecodeError as error:
            raise InputError(
                "tape header of another program", where=where, found=str(error)
            ) from None
        return meta, FILE_HEADER_BYTES + padded(length)

    def chunks(self, *, allow_truncated: bool = False) -> Iterator[Chunk]:
        """Yield chunks of whole records, every CRC checked, in order.

        The END record is not part of a chunk. A chunk's array is valid until the next chunk.

        Raises
        ------
        InputError
            At the first damaged record, or at a missing END unless ``allow_truncated``. What was
            yielded before is good.
        """
        position, records = self.data_offset, 0
        size = self._chunk_bytes
        buf = np.zeros(size, dtype=np.uint8)
        filled = 0
        with self._stream() as stream:
            _skip(stream, self.data_offset)
            while True:
                try:
                    got = _read_into(stream, buf.data[filled:])
                except zstandard.ZstdError as error:
                    raise self._error("damaged zstd data", position, records, str(error)) from None
                filled += got
                stop, count, status = scan(buf, 0, filled)
                records += count
                if status == SCAN_END:
                    start = _end_record_start(buf, stop)
                    if start > 0:
                        yield Chunk(buf, 0, start, position)
                    counted = int(load_end(buf, start))
                    if counted != records:
                        raise self._error(
                            f"the END record counts {counted} records",
                            position + start,
                            records,
                            f"{records} stand before it",
                        )
                    try:
                        more = stop < filled or len(_read_whole(stream, 1)) > 0
                    except zstandard.ZstdError:
                        more = True
                    if more:
                        raise self._error(
                            "bytes after the END record", position + stop, records, "a longer file"
                        )
                    return
                if stop > 0:
                    yield Chunk(buf, 0, stop, position)
                    position += stop
                if status == SCAN_DAMAGED:
                    raise self._error(
                        "damaged record", position, records, "a CRC32C that does not match"
                    )
                if stop == 0 and filled == len(buf):
                    larger = np.zeros(len(buf) * 2, dtype=np.uint8)
                    larger[:filled] = buf
                    buf = larger
                    continue
                if got == 0:
                    self.truncated_at = position
                    if allow_truncated:
                        return
                    raise self._error(
                        "tape cut short", position, records, "no END record: the writer died"
                    )
                rest = filled - stop
                buf[:rest] = buf[stop:filled].copy()
                filled = rest

    def _error(self, what: str, position: int, records: int, found: str) -> InputError:
        inside = " (of the unsealed bytes)" if self.sealed else ""
        return InputError(
            what,
            where=f"{self.path} at byte {position}{inside}",
            found=found,
            fix=f"the {records} records before it are good",
        )

    def records(self, *, allow_truncated: bool = False) -> Iterator[Record]:
        """Yield single records (cold path); errors as in `chunks`."""
        for chunk in self.chunks(allow_truncated=allow_truncated):
            view = chunk.buf.data
            at = chunk.start
            while at < chunk.stop:
                length, recv_ns, kind, flags = struct.unpack_from("<IqHH", chunk.buf.data, at + 4)
                body = at + RECORD_HEADER_BYTES
                yield Record(
                    chunk.file_offset + at - chunk.start,
                    kind,
                    recv_ns,
                    flags,
                    view[body : body + length],
                )
                at = body + padded(length)


@njit("int64(uint8[::1], int64)", cache=True)
def load_end(buf, at):  # type: ignore[no-untyped-def]
    """The number of records that the END record at ``at`` counts."""
    return load_i64(buf, at + RECORD_HEADER_BYTES)


def _end_record_start(buf: np.ndarray, after: int) -> int:
    return after - RECORD_HEADER_BYTES - END_PAYLOAD_BYTES


def _read_into(stream: Any, view: memoryview) -> int:
    total = 0
    while total < len(view):
        got = stream.readinto(view[total:])
        if not got:
            break
        total += got
    return total


def _read_whole(stream: Any, length: int) -> bytes:
    data = bytearray(length)
    got = _read_into(stream, memoryview(data))
    return bytes(data[:got])


def _skip(stream: Any, length: int) -> None:
    _read_whole(stream, length)


def seal(source: str | os.PathLike[str], target: str | os.PathLike[str], level: int = 6) -> int:
    """Compress a tape into zstd frames of `ZSTD_FRAME_BYTES`; returns the bytes written."""
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=True)
    with open(source, "rb") as raw, open(target, "wb") as out:
        while block := raw.read(ZSTD_FRAME_BYTES):
            out.write(compressor.compress(block))
        out.flush()
        os.fsync(out.fileno())
        return out.tell()
