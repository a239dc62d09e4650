"""libzmq's functions by their addresses."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import zmq
from numba import njit

from feeds import libzmq
from feeds.errors import InputError
from feeds.libzmq import DONTWAIT, EAGAIN, SNDMORE, last_error, more_follows, transfer


@njit
def send_two(function, socket, frame):  # type: ignore[no-untyped-def]
    transfer(function, socket, frame.ctypes.data, len(frame), DONTWAIT | SNDMORE)
    return transfer(function, socket, frame.ctypes.data, len(frame), DONTWAIT)


@njit
def receive(functions, socket, out):  # type: ignore[no-untyped-def]
    got = transfer(functions[0], socket, out.ctypes.data, len(out), DONTWAIT)
    error = last_error(functions[3]) if got < 0 else 0
    return got, more_follows(functions[2], socket), error


def test_frames_go_through_the_sockets_of_the_binding() -> None:
    functions = libzmq.functions()
    with zmq.Context() as context, context.socket(zmq.PAIR) as a, context.socket(zmq.PAIR) as b:
        a.bind("inproc://pair")
        b.connect("inproc://pair")
        frame = np.arange(40, dtype=np.uint8)
        assert send_two(functions[libzmq.SEND], a.underlying, frame) == 40
        out = np.zeros(16, dtype=np.uint8)
        assert receive(functions, b.underlying, out) == (40, 1, 0)  # cut, and told so
        assert out.tolist() == list(range(16))
        assert receive(functions, b.underlying, out) == (40, 0, 0)
        assert receive(functions, b.underlying, out) == (-1, 0, EAGAIN)
        a.send(b"from Python")
        assert receive(functions, b.underlying, out) == (11, 0, 0)
        assert out[:11].tobytes() == b"from Python"


def test_a_binding_that_hides_its_libzmq_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(name: str) -> object:
        return object()

    monkeypatch.setattr(ctypes, "CDLL", hidden)
    with pytest.raises(InputError, match="libzmq"):
        libzmq.functions()
