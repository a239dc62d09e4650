"""Appending to a tape; see `feeds.tape` for the format."""

from __future__ import annotations

import mmap
import os
import struct
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple

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

WINDOW_BYTES: Final = 1 << 24
ZEROS: Final = bytes(1 << 17)  # written at a time: the system lets nobody in meanwhile
TOUCH_BYTES: Final = 1 << 17  # of a window that are touched at a time: some 20 µs
AHEAD_BYTES: Final = 1 << 19  # touched ahead


class _Window(NamedTuple):
    """A part of the file, and where it is mapped."""

    offset: int
    arena: np.ndarray


class TapeWriter:
    """Appends records to a tape through a mapped window that moves along the file.

    What was appended is in the page cache at once: it survives the process, and after a crash the
    tape is readable up to its last whole record.

    Reserving a window's blocks may wait for the disk, and letting one go takes a millisecond. So
    whoever writes for a hot path says ``most``, and a thread does both: the next window is ready
    before it is needed.

    Parameters
    ----------
    path : path-like
        File to make; its folder is made too.
    meta : TapeMeta
    overwrite : bool
        Replace an existing file instead of refusing.
    window_bytes : int
        Size of the mapped window, a multiple of the page size.
    most : int
        The most that `room` is asked for, if the next window is to be made ready by a thread;
        0: by whoever asks.

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
        most: int = 0,
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
        self._window_bytes = max(window_bytes, _pages(2 * most))
        self._most = most
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tape") if most else None
        self._next: Future[_Window] | None = None
        self._closed = False
        self._reserved = 0  # of the file
        self._window_offset = self.position = 0
        self.arena: np.ndarray = np.empty(0, dtype=np.uint8)
        head = file_header(meta)
        self._move_on(len(head))
        self.arena[: len(head)] = np.frombuffer(head, dtype=np.uint8)
        self.position = len(head)

    @property
    def bytes_written(self) -> int:
        """Length of the tape so far."""
        return self._window_offset + self.position

    def room(self, need: int) -> tuple[np.ndarray, int]:
        """Array and position with room for ``need`` more bytes; the array may be a new one."""
        if self.position + need > len(self.arena):
            self._move_on(need)
        return self.arena, self.position

    def _move_on(self, need: int) -> None:
        """Go over to a window with room for ``need`` bytes behind what was written."""
        at = self.bytes_written
        window = self._made_ready()
        if window is None or not window.offset <= at <= window.offset + len(window.arena) - need:
            base = _page_of(at)
            try:
                window = self._make_window(base, max(self._window_bytes, _pages(at - base + need)))
            except OSError as error:
                self._reserved = self._window_offset + len(self.arena)
                os.ftruncate(self._fd, self._reserved)
                raise InputError(
                    "no room to go on with the tape",
                    where=f"{self.path} at byte {at}",
                    found=error.strerror or str(error),
                    fix="free disk space; everything before this byte is kept",
                ) from None
        before = self.arena
        self._window_offset, self.arena = window
        self.position = self._touched = at - window.offset
        if self._thread is not None:
            offset = _page_of(window.offset + len(window.arena) - self._most)
            self._next = self._thread.submit(self._make_window, offset, self._window_bytes, before)

    def _made_ready(self) -> _Window | None:
        ready, self._next = self._next, None
        try:
            return None if ready is None else ready.result()
        except OSError:
            return None  # and what is wrong is told when it is tried again

    def _make_window(self, offset: int, size: int, before: np.ndarray | None = None) -> _Window:
        """Reserve a part of the file and map it; ``before`` is let go, if nobody else holds it.

        For a hot path zeros are written behind what was reserved so far, and so a page is in memory
        before the window is written to. Otherwise the first write to one reads the disk's
        read-ahead, however much that is: at 8 MB, 2 to 30 ms for one page.
        """
        del before  # it goes with the thread's task
        begin, end = max(offset, self._reserved), offset + size
        if begin < end:
            # Reserve the blocks now: a full disk is an error here, not a SIGBUS in the hot path.
            os.posix_fallocate(self._fd, begin, end - begin)
            while self._thread is not None and begin < end:
                begin += os.pwrite(self._fd, ZEROS[: end - begin], begin)
            self._reserved = end
        mapped = mmap.mmap(self._fd, size, access=mmap.ACCESS_WRITE, offset=offset)
        return _Window(offset, np.frombuffer(mapped, dtype=np.uint8))

    def touch_ahead(self) -> None:
        """Touch what is written next, if it is time to. To be called where nobody waits.

        The system makes a page writable when it is first written to: some 25 µs for one by itself,
        and less than 1 in a row.
        """
        page, end = mmap.PAGESIZE, len(self.arena)
        while self._touched < min(self.position + AHEAD_BYTES - TOUCH_BYTES // 2, end):
            first = -(-max(self.position, self._touched) // page) * page
            self._touched = min(first + TOUCH_BYTES, end)
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
        if self._thread is not None:
            self._thread.shutdown()
        self._next = None
        self.arena = np.empty(0, dtype=np.uint8)
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


def _page_of(offset: int) -> int:
    return offset - offset % mmap.ALLOCATIONGRANULARITY


def _pages(n_bytes: int) -> int:
    return -(-n_bytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
