"""Where the daemon's events go before the engine advances over them.

With a tape that is the tape itself; without one it is `ScratchTape`, a ring in memory with the
same interface, so that both run the same code.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from feeds.tape import MAX_PAYLOAD_BYTES, RECORD_HEADER_BYTES, TapeMeta, padded, put_record
from feeds.tape_writer import TapeWriter

SCRATCH_BYTES: Final = 1 << 25


class Recorder(Protocol):
    """What `TapeWriter` and `ScratchTape` have in common."""

    records: int

    def room(self, need: int) -> tuple[np.ndarray, int]:
        """Array and position with room for ``need`` bytes."""
        ...

    def advance(self, position: int, records: int = 1) -> None:
        """Take over records written in place."""
        ...

    def append(self, kind: int, recv_ns: int, payload: bytes | memoryview) -> int:
        """Append one record."""
        ...

    def touch_ahead(self) -> None:
        """Touch the memory that is written next, where nobody waits."""
        ...

    def close(self) -> None:
        """Finish; nothing may be appended afterwards."""
        ...


class ScratchTape:
    """A tape that forgets: the same records in a ring of memory.

    Parameters
    ----------
    size : int
        Bytes of the ring; at least the largest request for room.
    """

    def __init__(self, size: int = SCRATCH_BYTES) -> None:
        self.arena = np.full(size, 0, dtype=np.uint8)  # and not np.zeros, which has no pages yet
        self.position = 0
        self.records = 0

    def room(self, need: int) -> tuple[np.ndarray, int]:
        """The ring and where to write; starts over where the rest is too short."""
        assert need <= len(self.arena), "more room than the ring has"
        if self.position + need > len(self.arena):
            self.position = 0
        return self.arena, self.position

    def advance(self, position: int, records: int = 1) -> None:
        """Take over records written in place."""
        self.position = position
        self.records += records

    def touch_ahead(self) -> None:
        """Nothing to touch: all of it is there from the start."""

    def append(self, kind: int, recv_ns: int, payload: bytes | memoryview) -> int:
        """Append one record; returns its offset in the ring."""
        length = len(payload)
        assert length <= MAX_PAYLOAD_BYTES
        arena, at = self.room(RECORD_HEADER_BYTES + length + 8)
        body = at + RECORD_HEADER_BYTES
        arena[body : body + length] = np.frombuffer(payload, dtype=np.uint8)
        self.advance(put_record(arena, at, kind, recv_ns, length))
        return at

    def close(self) -> None:
        """Nothing to finish."""


def insert_record(recorder: Recorder, at: int, kind: int, recv_ns: int, payload: bytes) -> int:
    """Put one record before the one at ``at``; returns its size, by which all after it moved.

    For the rare event that is known only after the record that it has to precede. There must be
    room for it.
    """
    arena, end = recorder.room(0)
    size = RECORD_HEADER_BYTES + int(padded(len(payload)))
    assert end + size <= len(arena), "no room was kept for it"
    arena[at + size : end + size] = arena[at:end].copy()
    body = at + RECORD_HEADER_BYTES
    arena[body : body + len(payload)] = np.frombuffer(payload, dtype=np.uint8)
    put_record(arena, at, kind, recv_ns, len(payload))
    recorder.advance(end + size)
    return size


def open_recorder(path: str, meta: TapeMeta, most: int) -> Recorder:
    """A tape at ``path`` (strftime patterns are filled in with UTC), or a scratch one for "".

    ``most`` is the most that will be asked for at a time, bytes.
    """
    if not path:
        return ScratchTape()
    return TapeWriter(Path(time.strftime(path, time.gmtime())), meta, most=most)
