# Hot path: `FeedConnection.receive`; everything else here runs rarely.
"""The engine's end of a feed: market data from a SUB socket, snapshots through a DEALER."""

from __future__ import annotations

from typing import Any, Final

import zmq
from zmq.backend import Socket as BackendSocket

from engine.config import FeedConfig, LimitsConfig
from feeds import codec
from feeds.errors import InputError

MAX_TOPIC_BYTES: Final = 256
_NOBLOCK: Final = int(zmq.NOBLOCK)
_RCVMORE: Final = int(zmq.RCVMORE)
# Straight into the binding's core: the Python layer above costs as much as the receive.
_recv_into: Final = BackendSocket.recv_into
_get: Final = BackendSocket.get

NOTHING: Final = -1  # `receive`: no message is waiting
MALFORMED: Final = -2  # `receive`: not two frames, or too large; it was dropped


class FeedConnection:
    """One publisher of market data.

    Parameters
    ----------
    context : zmq.Context
    config : FeedConfig
    limits : LimitsConfig
    names : list of (str, str)
        Venue and symbol of the instruments to subscribe to.

    Attributes
    ----------
    malformed : int
        Messages dropped because they were not [topic, payload] or were too large.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        config: FeedConfig,
        limits: LimitsConfig,
        names: list[tuple[str, str]],
    ) -> None:
        self.config = config
        self.malformed = 0
        self._max_bytes = limits.max_message_bytes
        self._topic = bytearray(MAX_TOPIC_BYTES)
        self.sub: zmq.Socket[Any] = context.socket(zmq.SUB)
        self.sub.setsockopt(zmq.RCVHWM, limits.receive_hwm)
        self.sub.setsockopt(zmq.MAXMSGSIZE, limits.max_message_bytes)
        self.sub.setsockopt(zmq.LINGER, 0)
        for venue, symbol in names:
            self.sub.setsockopt(zmq.SUBSCRIBE, codec.topic("l2", venue, symbol))
        self.dealer: zmq.Socket[Any] | None = None
        try:
            self.sub.connect(config.endpoint)
            if config.snapshot_endpoint:
                self.dealer = context.socket(zmq.DEALER)
                self.dealer.setsockopt(zmq.LINGER, 0)
                self.dealer.setsockopt(zmq.MAXMSGSIZE, limits.max_message_bytes)
                self.dealer.connect(config.snapshot_endpoint)
        except zmq.ZMQError as error:
            raise InputError(
                "feed cannot be connected to",
                where=f"{config.endpoint} / {config.snapshot_endpoint}",
                found=str(error),
                fix="correct the [[feed]] of the config",
            ) from None

    @property
    def sub_fd(self) -> int:
        """File descriptor of the SUB socket, edge-triggered."""
        return int(self.sub.getsockopt(zmq.FD))

    @property
    def dealer_fd(self) -> int:
        """File descriptor of the DEALER socket, edge-triggered; only where there is one."""
        assert self.dealer is not None
        return int(self.dealer.getsockopt(zmq.FD))

    def receive(self, view: memoryview) -> int:
        """Receive one message's payload into ``view`` without waiting.

        Returns
        -------
        int
            Length of the payload, `NOTHING` or `MALFORMED`.
        """
        sub = self.sub
        try:
            _recv_into(sub, self._topic, nbytes=0, flags=_NOBLOCK)
        except zmq.Again:
            return NOTHING
        if not _get(sub, _RCVMORE):
            self.malformed += 1
            return MALFORMED
        length: int = _recv_into(sub, view, nbytes=0, flags=_NOBLOCK)
        if _get(sub, _RCVMORE) or length > len(view):
            while _get(sub, _RCVMORE):
                _recv_into(sub, self._topic, nbytes=0, flags=_NOBLOCK)
            self.malformed += 1
            return MALFORMED
        return length

    def request_snapshot(self, venue: str, symbol: str) -> bool:
        """Ask for a snapshot; False where this feed serves none or its queue is full."""
        if self.dealer is None:
            return False
        try:
            self.dealer.send(codec.encode_snapshot_request(venue, symbol), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def answers(self) -> list[bytes]:
        """Payloads of the snapshot service's answers that have arrived."""
        payloads: list[bytes] = []
        if self.dealer is None:
            return payloads
        while True:
            try:
                frames = self.dealer.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return payloads
            if len(frames) == 2 and len(frames[1]) <= self._max_bytes:
                payloads.append(frames[1])
            else:
                self.malformed += 1

    def close(self) -> None:
        """Close both sockets."""
        self.sub.close()
        if self.dealer is not None:
            self.dealer.close()
