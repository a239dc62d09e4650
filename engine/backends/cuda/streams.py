"""Where each stream's state lies in device memory, and how many steps it has done.

A step reads nothing of a state that its stream has not written before, so memory is never
initialised, and a stream is reset by calling its position 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

CHUNK_BYTES: Final = 1 << 20
MAX_CHUNK_STREAMS: Final = 1 << 10
# A kernel only asks whether a position is 0, whether it is beyond a lag, and for its lower bits.
MAX_POSITION: Final = 1 << 31
WRAPPED_POSITION: Final = 1 << 30


class Stream:
    """One instrument's state.

    Attributes
    ----------
    address : int
        In device memory.
    position : int
        Steps that it has done.
    """

    __slots__ = ("address", "position")

    def __init__(self, address: int) -> None:
        self.address = address
        self.position = 0

    def advance(self) -> None:
        """One more step is done."""
        self.position += 1
        if self.position == MAX_POSITION:
            self.position = WRAPPED_POSITION


class Streams:
    """All streams of one model; memory comes in chunks and is never moved.

    Parameters
    ----------
    state_bytes : int
        Of each stream.
    allocate : callable
        From a number of bytes to an array in device memory, whose address is ``data.ptr``.
    """

    def __init__(self, state_bytes: int, allocate: Callable[[int], Any]) -> None:
        self._bytes, self._allocate = state_bytes, allocate
        self._chunks: list[Any] = []
        self._free: list[int] = []  # addresses, the next one last
        self._streams: dict[int, Stream] = {}

    def find(self, stream: int) -> Stream | None:
        """A stream that has begun."""
        return self._streams.get(stream)

    @property
    def full(self) -> bool:
        """Whether the next new stream needs another chunk."""
        return bool(self._bytes) and not self._free

    def begin(self, stream: int) -> Stream:
        """Give a new stream its place.

        Raises
        ------
        RuntimeError
            If there is no device memory left.
        """
        if self.full:
            self._add_chunk()
        own = Stream(self._free.pop() if self._bytes else 0)
        self._streams[stream] = own
        return own

    def reset(self, stream: int) -> None:
        """Start a stream afresh; nothing to do for one that has not begun."""
        own = self._streams.get(stream)
        if own is not None:
            own.position = 0

    def _add_chunk(self) -> None:
        count = min(max(CHUNK_BYTES // self._bytes, 1), MAX_CHUNK_STREAMS)
        try:
            chunk = self._allocate(count * self._bytes)
        except MemoryError as error:
            raise RuntimeError(f"no device memory for another stream: {error}") from None
        self._chunks.append(chunk)
        begin = chunk.data.ptr
        self._free = [begin + i * self._bytes for i in range(count - 1, -1, -1)]
