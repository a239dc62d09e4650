# Hot path: `SignalPublisher.publish`; everything else here runs once or on a join.
"""Publishes signals, states and alerts over ZeroMQ, and gives who joins the last value of each.

The socket is an XPUB, so the publisher sees subscriptions arrive and answers each with the last
value of every topic under it (the last value cache of the ZeroMQ guide, chapter 5). ZeroMQ can
only send that to all subscribers of the topic; the client drops what it has by its sequence
number.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any, Final

import numpy as np
import zmq
from zmq.backend import Socket as BackendSocket

from feeds.endpoint import bind, check_endpoint
from feeds.errors import InputError

DEFAULT_SEND_HWM: Final = 100_000
MAX_TOPICS: Final = 65_536
MAX_JOIN_FRAMES: Final = 1_024  # subscription frames taken in one `serve_joins`
LINGER_MS: Final = 1_000  # how long `close` waits for the last messages to leave

_FIRST: Final = int(zmq.NOBLOCK | zmq.SNDMORE)
_LAST: Final = int(zmq.NOBLOCK)
# Straight into the binding's core: the Python layer above it costs more than the copy.
_send: Final = BackendSocket.send


class SignalPublisher:
    """An XPUB socket that remembers the last value of each registered topic.

    Not for use from several threads.

    Parameters
    ----------
    endpoint : str
        Where to bind: ``tcp://``, ``ipc://`` or ``inproc://``; ``tcp://127.0.0.1:*`` takes any
        free port, which `endpoint` then names.
    topics : iterable of bytes
        Every topic that will be published, see `register`.
    send_hwm : int
        Messages queued for each subscriber before it starts to lose.
    context : zmq.Context, optional
        Context to use; one of its own by default.

    Attributes
    ----------
    endpoint : str
        The endpoint in use.
    drops : int
        How often a subscriber's full queue was met. That subscriber then loses messages until it
        has caught up, and counts them itself by their sequence numbers; no other is held up.
    resent : int
        Last values sent again because somebody joined.
    joins : int
        Subscriptions answered.
    foreign : int
        Frames from subscribers that are no subscription; ignored.

    Raises
    ------
    InputError
        If the endpoint is taken or cannot be bound.
    """

    def __init__(
        self,
        endpoint: str,
        topics: Iterable[bytes] = (),
        *,
        send_hwm: int = DEFAULT_SEND_HWM,
        context: zmq.Context[Any] | None = None,
    ) -> None:
        assert send_hwm > 0
        check_endpoint(endpoint, key="publish.endpoint", where="publisher", binds=True)
        self._sent = self.drops = self.resent = self.joins = self.foreign = 0
        self._last: dict[bytes, bytes] = {}
        self._lent: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}
        self.register(topics)
        self._own_context = context is None
        self._context = zmq.Context() if context is None else context
        self._socket = self._context.socket(zmq.XPUB)
        self._socket.setsockopt(zmq.XPUB_VERBOSE, 1)
        # A full queue is an error that `publish` sees, counts, and then lets only its owner feel.
        self._socket.setsockopt(zmq.XPUB_NODROP, 1)
        self._socket.setsockopt(zmq.SNDHWM, send_hwm)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        try:
            self.endpoint = bind(self._socket, endpoint, key="publish.endpoint")
        except InputError:
            self.close()
            raise

    @property
    def fd(self) -> int:
        """File descriptor for an event loop; edge-triggered, so also poll `serve_joins` slowly."""
        return int(self._socket.getsockopt(zmq.FD))

    @property
    def topics(self) -> tuple[bytes, ...]:
        """The registered topics, in order of registration."""
        return tuple(self._last)

    def register(self, topics: Iterable[bytes]) -> None:
        """Make topics known; each then has a last value of its own. Knowing one twice is fine."""
        for topic in topics:
            self._last.setdefault(bytes(topic), b"")
        if len(self._last) > MAX_TOPICS:
            raise InputError(
                "too many topics",
                where="publisher",
                expected=f"at most {MAX_TOPICS}",
                found=str(len(self._last)),
            )

    @property
    def sent(self) -> int:
        """Messages published, by a kernel too; resent last values not counted."""
        return self._sent + sum(int(count[0]) for _, count in self._lent.values())

    @property
    def socket(self) -> zmq.Socket[Any]:
        """The socket itself, for a kernel that sends by it; see `lend`."""
        return self._socket

    def lend(self, topics: Iterable[bytes], last: np.ndarray, sent: np.ndarray) -> None:
        """Let a kernel send some topics' messages by itself.

        Parameters
        ----------
        topics : iterable of bytes
            Registered ones.
        last : ndarray of uint8, shape (topics, bytes)
            Where it keeps the last message of each.
        sent : ndarray of int64, shape (topics,)
            How many it sent.
        """
        for row, topic in enumerate(topics):
            assert topic in self._last
            self._lent[topic] = (last[row], sent[row : row + 1])

    def publish(self, topic: bytes, payload: bytes | memoryview) -> None:
        """Send one message without waiting, and keep it for who joins later.

        Parameters
        ----------
        topic : bytes
            A registered topic.
        payload : bytes-like
            One SBE message; copied.
        """
        last = self._last
        assert topic in last, f"{topic!r} is no registered topic"
        payload = bytes(payload)
        if topic in self._lent:
            row, count = self._lent[topic]
            row[:] = np.frombuffer(payload, dtype=np.uint8)
            count[0] += 1
        else:
            last[topic] = payload
            self._sent += 1
        socket = self._socket
        try:
            _send(socket, topic, _FIRST)
            _send(socket, payload, _LAST)
        except zmq.Again:
            self._send_lossy(topic, payload)

    def _send_lossy(self, topic: bytes, payload: bytes) -> None:
        # Only a first frame can meet a full queue: libzmq counts whole messages.
        self.drops += 1
        self._socket.setsockopt(zmq.XPUB_NODROP, 0)
        try:
            self._socket.send_multipart((topic, payload), zmq.NOBLOCK)
        finally:
            self._socket.setsockopt(zmq.XPUB_NODROP, 1)

    def serve_joins(self) -> int:
        """Answer the subscriptions that arrived with last values; returns how many were sent.

        Cold path: call it when `fd` is readable, and now and then. Takes at most
        `MAX_JOIN_FRAMES` subscriptions; several for one topic are answered once.
        """
        if not int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            return 0  # an exception takes 50 µs where Python is cold
        prefixes = set()
        for _ in range(MAX_JOIN_FRAMES):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            head = frames[0][:1]
            if len(frames) != 1 or head not in (b"\0", b"\1"):
                self.foreign += 1
            elif head == b"\1":
                self.joins += 1
                prefixes.add(frames[0][1:])
        if not prefixes:
            return 0
        starts = tuple(prefixes)
        count = 0
        for topic, kept in self._last.items():
            payload = kept
            if topic in self._lent:
                row, sent = self._lent[topic]
                payload = row.tobytes() if sent[0] else b""
            if payload and topic.startswith(starts):
                try:
                    self._socket.send_multipart((topic, payload), zmq.NOBLOCK)
                except zmq.Again:
                    self._send_lossy(topic, payload)
                count += 1
        self.resent += count
        return count

    def close(self) -> None:
        """Close the socket; the last messages have `LINGER_MS` to leave. Closing twice is fine."""
        if self._socket.closed:
            return
        self._socket.close()
        if self._own_context:
            self._context.term()

    def __enter__(self) -> SignalPublisher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
