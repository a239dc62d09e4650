# Hot path: `cue` and `clear`, which `engine.live.take_waiting` rehearses between.
"""Cache warming: the hot path rehearses while it waits, so that its code and data stay close.

What a core has not used for a while leaves its caches, and more so where it shares them with a
neighbour. A message that comes after a millisecond then finds code and data in memory: 2 µs of work
take 5, those of ONNX Runtime 20. So where the hot path waits for a message, it sends one to itself
every ``loop.warm_every_ns`` and takes that all the way to its signal: the same machine code, from
`zmq_recv` to `zmq_send`, on a market, a book and sockets of its own (`engine.rehearsal`). Of the
session itself it only reads the memory that the next message will need.

A rehearsal takes 5 to 15 µs, or what a large model takes, and by that a message is late that comes
meanwhile. So for `REST` times as long as one took there is none, however often they are wanted:
they have a tenth of the waiting at most, and the average message is late by a twentieth of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numba import carray

from engine.backends.native_call import copy_bytes
from engine.handles import new_handles, place, pointer, set_handle
from feeds import libzmq
from feeds.inner import inner
from feeds.libzmq import DONTWAIT, SNDMORE, transfer

REST: Final = 9
LINE_BYTES: Final = 64  # of a cache
AHEAD_BYTES: Final = 1_024  # of the tape, where the next records go
SCRAP_BYTES: Final = 4_096  # of a signal that is received to be forgotten

# Columns of `numbers`, int64.
NEXT: Final = 0  # message to send
FEED: Final = 1  # address of the socket that messages leave by
AUDIENCE: Final = 2  # of the one that signals arrive at
SCRAP: Final = 3  # address of where they are received
REHEARSALS: Final = 4
READ: Final = 5  # sum of what was only read, lest the compiler leave that out
NUMBERS: Final = 6

# The arrays of a rehearsal, by their handles: what `take_waiting` takes, and what is here.
ARRAYS: Final = (
    *("pipeline", "link", "shadow", "tape"),
    *("numbers", "messages", "kept", "read"),
)

_NUMBERS: Final = place(ARRAYS, "numbers")
_MESSAGES: Final = place(ARRAYS, "messages")
_KEPT: Final = place(ARRAYS, "kept")
_READ: Final = place(ARRAYS, "read")


@inner("void(int64[::1], int64[::1])")
def cue(functions, h):  # type: ignore[no-untyped-def]
    """Read what the next message needs, set the rehearsal back, and send it a message.

    Parameters
    ----------
    functions : ndarray of int64
        See `feeds.libzmq.functions`.
    h : ndarray of int64
        Handles of `ARRAYS`.
    """
    numbers = carray(pointer(h[_NUMBERS], np.int64), (h[_NUMBERS + 1],))
    messages = carray(pointer(h[_MESSAGES], np.int64), (h[_MESSAGES + 1], h[_MESSAGES + 2]))
    kept = carray(pointer(h[_KEPT], np.int64), (h[_KEPT + 1], h[_KEPT + 2]))
    read = carray(pointer(h[_READ], np.int64), (h[_READ + 1], h[_READ + 2]))
    for i in range(len(read)):
        some = carray(pointer(read[i, 0], np.uint8), (read[i, 1],))
        for at in range(0, read[i, 1], LINE_BYTES):
            numbers[READ] += some[at]
    for i in range(len(kept)):
        copy_bytes(kept[i, 0], kept[i, 1], kept[i, 2])
    i = numbers[NEXT]
    numbers[NEXT] = i + 1 if i + 1 < len(messages) else 0
    numbers[REHEARSALS] += 1
    send, at = functions[libzmq.SEND], messages[i, 0]
    transfer(send, numbers[FEED], at, 1, DONTWAIT | SNDMORE)  # any byte is a topic
    transfer(send, numbers[FEED], at, messages[i, 1], DONTWAIT)


@inner("void(int64[::1], int64[::1], uint8[::1], int64)")
def clear(functions, h, arena, position):  # type: ignore[no-untyped-def]
    """Forget the rehearsal's signal, and read where the session's next records go.

    Parameters
    ----------
    functions, h
        As `cue` takes them.
    arena : ndarray of uint8
        The window of the session's tape.
    position : int
    """
    numbers = carray(pointer(h[_NUMBERS], np.int64), (h[_NUMBERS + 1],))
    recv = functions[libzmq.RECV]
    for _ in range(2):  # topic and signal
        transfer(recv, numbers[AUDIENCE], numbers[SCRAP], SCRAP_BYTES, DONTWAIT)
    for at in range(position, min(position + AHEAD_BYTES, len(arena)), LINE_BYTES):
        numbers[READ] += arena[at]


class Stage:
    """What `cue` and `clear` work on.

    Parameters
    ----------
    taken : sequence of ndarray
        What `engine.live.take_waiting` takes of the rehearsal: the handles of its pipeline, of its
        link and of no shadow, and its tape.
    feed, audience : int
        Addresses of the sockets that its messages leave by and its signals arrive at.
    messages : sequence of bytes
        Sent in turn.
    kept : sequence of ndarray
        What is set back to its present values before each.

    Attributes
    ----------
    handles : ndarray of int64
    """

    def __init__(
        self,
        taken: Sequence[np.ndarray],
        feed: int,
        audience: int,
        messages: Sequence[bytes],
        kept: Sequence[np.ndarray],
    ) -> None:
        self._numbers = np.zeros(NUMBERS, dtype=np.int64)
        self._scrap = np.zeros(SCRAP_BYTES, dtype=np.uint8)
        self._numbers[FEED], self._numbers[AUDIENCE] = feed, audience
        self._numbers[SCRAP] = self._scrap.ctypes.data
        self._messages = [np.frombuffer(message, dtype=np.uint8) for message in messages]
        self._kept = [(one, one.copy()) for one in kept]
        self._read: list[np.ndarray] = []
        self._arrays = [
            *taken,
            self._numbers,
            np.array([(one.ctypes.data, len(one)) for one in self._messages], dtype=np.int64),
            np.array(
                [(one.ctypes.data, was.ctypes.data, one.nbytes) for one, was in self._kept],
                dtype=np.int64,
            ),
            np.zeros((0, 2), dtype=np.int64),
        ]
        assert len(self._arrays) == len(ARRAYS)
        self.handles: Final = new_handles(self._arrays)

    def set_back(self) -> None:
        """What `cue` does before a message, for one that is not sent by it."""
        for one, was in self._kept:
            one[...] = was

    def read(self, arrays: Sequence[np.ndarray]) -> None:
        """Let every rehearsal read these arrays, so that they stay in the caches."""
        self._read = [one for one in arrays if one.nbytes]
        table = np.array([(one.ctypes.data, one.nbytes) for one in self._read], dtype=np.int64)
        self._arrays[-1] = table.reshape(-1, 2)
        set_handle(self.handles, len(ARRAYS) - 1, self._arrays[-1])

    @property
    def rehearsals(self) -> int:
        """How many there were."""
        return int(self._numbers[REHEARSALS])
