"""The sockets of a publisher: the feed, and beside it the snapshot service.

The feed is an XPUB, so that subscriptions can be counted; subscribers see a PUB.
Source: RFC 29/PUBSUB and ``zmq_setsockopt(3)`` for XPUB_NODROP and XPUB_VERBOSER.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Final

import zmq

from feeds.endpoint import bind
from feeds.snapshots import SnapshotService

SEND_HWM: Final = 100_000
LINGER_MS: Final = 2_000
MAX_POLL_MS: Final = 100
SETTLE_MS: Final = 100  # after the awaited subscribers came: for the rest of their topics
MAX_SUBSCRIPTIONS_A_TURN: Final = 64
MAX_SUBSCRIPTIONS: Final = 65_536
TOPIC_FLAGS: Final = int(zmq.SNDMORE | zmq.NOBLOCK)


class Outlet:
    """A bound feed and, if asked for, a bound ROUTER for the snapshot service.

    Parameters
    ----------
    bind_to : str
    snapshots : str or None
    lossless : bool
        Wait for slow subscribers instead of dropping what does not fit their queue.
    send_hwm : int
        Messages that may wait for one subscriber.

    Attributes
    ----------
    endpoint, snapshot_endpoint : str
        Where they are bound; the second is empty without a service.
    service : SnapshotService or None
        Set by the owner; answers on `router`.
    stopped : threading.Event
        Ends every wait.

    Raises
    ------
    InputError
        If an endpoint cannot be bound.
    """

    def __init__(
        self, bind_to: str, snapshots: str | None, *, lossless: bool, send_hwm: int = SEND_HWM
    ) -> None:
        self.stopped = threading.Event()
        self.service: SnapshotService | None = None
        self.snapshot_endpoint = ""
        self._subscriptions: dict[bytes, int] = {}
        self._poller = zmq.Poller()
        self._context = zmq.Context()
        try:
            self.feed = self._context.socket(zmq.XPUB)
            self.feed.set_hwm(send_hwm)
            self.feed.setsockopt(zmq.LINGER, LINGER_MS)
            self.feed.setsockopt(zmq.XPUB_VERBOSER, 1)
            self.feed.setsockopt(zmq.XPUB_NODROP, int(lossless))
            self.endpoint = bind(self.feed, bind_to, key="--bind")
            self._poller.register(self.feed, zmq.POLLIN)
            self.router = self._context.socket(zmq.ROUTER)
            self.router.setsockopt(zmq.LINGER, LINGER_MS)
            if snapshots:
                self.snapshot_endpoint = bind(self.router, snapshots, key="--snapshots")
                self._poller.register(self.router, zmq.POLLIN)
        except BaseException:
            self._context.destroy(linger=0)
            raise

    def send(self, topic: bytes, payload: bytes | memoryview) -> bool:
        """Send one message; where lossless, when there is room. False if stopped meanwhile."""
        while True:
            try:
                self.feed.send(topic, TOPIC_FLAGS)
                break
            except zmq.Again:
                if not self.wait_for_room():
                    return False
        self.feed.send(payload)
        return True

    def wait_for_room(self) -> bool:
        """Serve while a subscriber's queue is full; False if stopped."""
        self.serve()
        self.feed.poll(MAX_POLL_MS, zmq.POLLOUT)
        return not self.stopped.is_set()

    def serve(self) -> None:
        """Answer snapshot requests and take in subscriptions, a bounded number."""
        if self.service is not None:
            self.service.serve()
        for _ in range(MAX_SUBSCRIPTIONS_A_TURN):
            try:
                frame = self.feed.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            prefix = frame[1:]
            if frame[:1] == b"\1" and len(self._subscriptions) < MAX_SUBSCRIPTIONS:
                self._subscriptions[prefix] = self._subscriptions.get(prefix, 0) + 1
            elif frame[:1] == b"\0" and prefix in self._subscriptions:
                self._subscriptions[prefix] -= 1

    def poll(self, timeout_ms: int) -> None:
        """Sleep until a request or subscription comes, at most `MAX_POLL_MS`."""
        self._poller.poll(min(timeout_ms, MAX_POLL_MS))

    def subscribers(self, topics: Sequence[bytes]) -> int:
        """Subscriptions that match the topic which has most of them."""
        return max(
            sum(n for prefix, n in self._subscriptions.items() if topic.startswith(prefix))
            for topic in topics
        )

    def wait_subscribers(self, topics: Sequence[bytes], count: int) -> None:
        """Serve until some topic has so many subscribers, and no more of them come in."""
        while not self.stopped.is_set():
            self.serve()
            if self.subscribers(topics) >= count:
                while self.feed.poll(SETTLE_MS, zmq.POLLIN) and not self.stopped.is_set():
                    self.serve()
                return
            self.poll(MAX_POLL_MS)

    def close(self) -> None:
        """Release the sockets; what was sent still goes out, for at most `LINGER_MS`."""
        self._context.destroy()
