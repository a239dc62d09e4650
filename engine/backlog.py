"""Memory for a backlog, there before one comes.

Where the hot path is held up, messages wait in ZeroMQ, in memory of its own thread. The C library
gives what is free at the end of that back to the system soon, takes it again with the next backlog,
a page fault at a time in the thread that receives, and keeps a little more after each one that was
longer than any before: resident memory climbs by steps for as long as records are broken. So the
engine has the library keep what it has, and lets a backlog wait once before it is ready.

Source: mallopt(3), malloc(3) on arenas; ZeroMQ RFC 23/ZMTP for what a frame takes;
zmq_ipc(7) on the abstract namespace.
"""

from __future__ import annotations

import ctypes
import secrets
import time
from typing import Any, Final

import zmq

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
KEPT_BYTES: Final = 1 << 28  # free at the end of an arena, before any of it is given back
MAPPED_BYTES: Final = 1 << 20  # an allocation this large is still a mapping of its own

MESSAGES: Final = 40_000  # some 9 MB: most of a second at 50,000/s
MESSAGE_BYTES: Final = 64
_AT_A_TIME: Final = 500  # whatever waits on the sending side takes memory of the wrong thread
_PAUSE_S: Final = 200e-6
_JOIN_MS: Final = 5


def keep_memory() -> bool:
    """Let the C library keep what is freed; whether it has it so (glibc does)."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    kept = libc.mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
    return bool(kept and libc.mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES))


def make_room(context: zmq.Context[Any], messages: int = MESSAGES) -> None:
    """Let so many messages wait in a socket of a context once; takes some 50 ms."""
    with context.socket(zmq.PUB) as sender, context.socket(zmq.SUB) as receiver:
        for socket in (sender, receiver):
            socket.set_hwm(0)
            socket.linger = 0
        endpoint = f"ipc://@octick-{secrets.token_hex(8)}"  # in no folder, so there is none to fail
        sender.bind(endpoint)
        receiver.subscribe(b"")
        receiver.connect(endpoint)
        sender.send(b"")
        while not receiver.poll(_JOIN_MS):
            sender.send(b"")
        body = bytes(MESSAGE_BYTES)
        for k in range(messages):
            sender.send(body)
            if k % _AT_A_TIME == 0:
                time.sleep(_PAUSE_S)
        sender.send(b"end")
        while receiver.recv() != b"end":
            pass
