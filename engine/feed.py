# Cold path: a running engine receives by `engine.live`, over the same sockets.
"""The engine's end of a feed: market data from a SUB socket, snapshots through a DEALER."""

from __future__ import annotations

from typing import Any

import zmq

from engine.config import FeedConfig, LimitsConfig
from feeds import codec
from feeds.errors import InputError


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
    def dealer_fd(self) -> int:
        """File descriptor of the DEALER socket, edge-triggered; only where there is one."""
        assert self.dealer is not None
        return int(self.dealer.getsockopt(zmq.FD))

    def early(self, most: int) -> list[bytes]:
        """Payloads of at most ``most`` messages that have arrived; for before the engine runs."""
        payloads: list[bytes] = []
        for _ in range(most):
            try:
                frames = self.sub.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._keep(frames, payloads)
        return payloads

    def _keep(self, frames: list[bytes], payloads: list[bytes]) -> None:
        if len(frames) == 2 and len(frames[1]) <= self._max_bytes:
            payloads.append(frames[1])
        else:
            self.malformed += 1

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
        if self.dealer is None or not int(self.dealer.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            return payloads
        while True:
            try:
                frames = self.dealer.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return payloads
            self._keep(frames, payloads)

    def close(self) -> None:
        """Close both sockets."""
        self.sub.close()
        if self.dealer is not None:
            self.dealer.close()
