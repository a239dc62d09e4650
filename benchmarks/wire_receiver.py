# Hot path: `take_signals`, a free @njit function.
"""Receives signals and holds the time written into each against its own clock, in native code."""

from __future__ import annotations

import time
from typing import Any, Final

import numpy as np
import zmq
from numba import njit

from engine.signals import AT_SOURCE_TIME
from feeds import libzmq
from feeds.libzmq import EAGAIN, EINTR, last_error, more_follows, transfer
from feeds.monotonic import monotonic_ns
from feeds.rawbytes import load_i64

RECEIVE_TIMEOUT_MS: Final = 50
TURN_NS: Final = 100_000_000  # that Python waits for a call at most, but for one receive
MAX_FRAME_BYTES: Final = 1 << 16

# Columns of `state`, int64. The first four are those of `feeds.libzmq.functions`.
SOCKET: Final = 4
NEWEST_NS: Final = 5  # the latest time written into a signal so far
LAST_NS: Final = 6  # when the last one came, by the monotonic clock, or the collecting began
BEGIN_NS: Final = 7  # how long to wait for the first
IDLE_NS: Final = 8  # and for any other
ERROR: Final = 9  # libzmq's
STATE_FIELDS: Final = 10

# Why a call returned.
TURN_ENDED: Final = 0
COMPLETE: Final = 1
IDLE: Final = 2
FAILED: Final = 3


@njit("UniTuple(int64, 2)(int64[::1], uint8[::1], int64[::1], int64)", cache=True, nogil=True)
def take_signals(state, frame, took, count):  # type: ignore[no-untyped-def]
    """Take signals until all have come or none comes any more, for about `TURN_NS`.

    Where none waits it sleeps in the socket, for as long as its RCVTIMEO says.

    Parameters
    ----------
    state : ndarray of int64, shape (STATE_FIELDS,)
    frame : ndarray of uint8
        Room for one frame.
    took : ndarray of int64, shape (m,)
        Out: ns from the time written into a signal to its receipt.
    count : int
        How many of them have come.

    Returns
    -------
    why, count : int
        `TURN_ENDED` to `FAILED`; how many have come now.
    """
    recv, more, socket = state[libzmq.RECV], state[libzmq.GETSOCKOPT], state[SOCKET]
    now = monotonic_ns()
    end = now + TURN_NS
    while count < len(took):
        if now > end:
            return TURN_ENDED, count
        length = transfer(recv, socket, frame.ctypes.data, len(frame), 0)
        if length < 0:
            now = monotonic_ns()
            state[ERROR] = last_error(state[libzmq.ERRNO])
            if state[ERROR] == EINTR:
                return TURN_ENDED, count
            if state[ERROR] != EAGAIN:
                return FAILED, count
            # A feed that has not begun yet is no feed that has ended.
            if now - state[LAST_NS] > (state[IDLE_NS] if count > 0 else state[BEGIN_NS]):
                return IDLE, count
            continue
        # Behind the topic. A message is there as a whole or not at all: nothing waits here.
        frames = 1
        while more_follows(more, socket) == 1:
            length = transfer(recv, socket, frame.ctypes.data, len(frame), 0)
            frames += 1
        now = monotonic_ns()
        if frames != 2 or length < AT_SOURCE_TIME + 8:
            continue
        due = load_i64(frame, AT_SOURCE_TIME)
        if due <= state[NEWEST_NS]:
            continue  # of a timer, or a last value again: it answers no new message
        state[NEWEST_NS] = due
        state[LAST_NS] = now
        took[count] = now - due
        count += 1
    return COMPLETE, count


class Receiver:
    """Times what comes in on one socket.

    Parameters
    ----------
    socket : zmq.Socket
        A connected SUB, this thread's own; its RCVTIMEO is set.
    """

    def __init__(self, socket: zmq.Socket[Any]) -> None:
        self._socket = socket  # the kernel has only its address
        socket.setsockopt(zmq.RCVTIMEO, RECEIVE_TIMEOUT_MS)
        self._frame = np.full(MAX_FRAME_BYTES, 0, dtype=np.uint8)
        self._state = np.zeros(STATE_FIELDS, dtype=np.int64)
        functions = libzmq.functions()
        self._state[: len(functions)] = functions
        self._state[SOCKET] = socket.underlying

    def begin(self, begin_s: float, idle_s: float) -> None:
        """Begin to collect: how long to wait for the first signal, and then for any other."""
        self._state[BEGIN_NS] = round(begin_s * 1e9)
        self._state[IDLE_NS] = round(idle_s * 1e9)
        self._state[LAST_NS] = time.monotonic_ns()

    def collect(self, at_most: int) -> np.ndarray:
        """Ns from the time written into each signal to its receipt; a signal counts once.

        Raises
        ------
        zmq.ZMQError
            If the socket fails.
        """
        took = np.full(at_most, 0, dtype=np.int64)  # written once: no page is missing
        why, count = TURN_ENDED, 0
        while why == TURN_ENDED:
            why, count = take_signals(self._state, self._frame, took, count)
        if why == FAILED:
            raise zmq.ZMQError(int(self._state[ERROR]))
        return took[:count]
