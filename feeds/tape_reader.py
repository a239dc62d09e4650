"""Reading a tape, raw or sealed, in checked chunks; see `feeds.tape` for the format."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import zstandard
from numba import njit

from feeds.crc32c import crc32c
from feeds.errors import InputError
from feeds.rawbytes import load_i64
from feeds.tape import (
    END_PAYLOAD_BYTES,
    FILE_HEADER_BYTES,
    FORMAT_VERSION,
    MAGIC,
    MAX_META_BYTES,
    RECORD_HEADER_BYTES,
    SCAN_DAMAGED,
    SCAN_END,
    TapeMeta,
    padded,
    scan,
)

CHUNK_BYTES: Final = 1 << 22


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
        """Yield single records, each with its own copy of the payload; errors as in `chunks`.

        For the cold path: the buffer of a chunk is used again for the next.
        """
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
                    memoryview(bytes(view[body : body + length])),
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
