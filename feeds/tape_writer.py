"""Appending to a tape; see `feeds.tape` for the format."""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Final

import numpy as np

from feeds.errors import InputError
from feeds.tape import (
    END,
    MAX_PAYLOAD_BYTES,
    RECORD_HEADER_BYTES,
    TapeMeta,
    file_header,
    put_record,
)

WINDOW_BYTES: Final = 1 << 25
TOUCH_BYTES: Final = 1 << 17  # of a window that are touched at a time: at worst, two milliseconds
AHEAD_BYTES: Final = 1 << 19  # touched ahead, where there are turns enough to


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
        self.position = self._touched = file_offset - base

    def room(self, need: int) -> tuple[np.ndarray, int]:
        """Array and position with room for ``need`` more bytes; the array may be a new one."""
        if self.position + need > len(self.arena):
            self._open_window(self._window_offset + self.position, need)
        return self.arena, self.position

    def touch_ahead(self) -> None:
        """Touch what is written next, if it is time to.

        The system gives a page of the file when it is first written to, some 25 µs for one by
        itself and less than 1 in a row. To be called where nobody waits.
        """
        begin = max(self.position, self._touched)
        if begin - self.position < AHEAD_BYTES - TOUCH_BYTES // 2:
            page = mmap.PAGESIZE
            first = -(-begin // page) * page
            self._touched = min(first + TOUCH_BYTES, len(self.arena))
            self.arena[first : self._touched : page] = 0

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
