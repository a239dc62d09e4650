"""What the hot path rehearses on while it waits: a market, a book and sockets of its own.

The pipeline is configured as the session's, with one instrument, and every message makes a signal
due; the model is the session's with a stream of its own, so that its code and weights are those
that the next message needs. Sockets are joined within the process. Nothing that is rehearsed is
recorded, published or counted, and no state of the session changes.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from decimal import Decimal
from typing import Any, Final

import msgspec
import zmq

from engine.answering import handle_of
from engine.backends.interface import Backend
from engine.bundle import Bundle
from engine.config import Config, LimitsConfig, OverloadConfig, TriggerConfig
from engine.live_link import LiveLink
from engine.model_input import INV_SCALE, new_norm
from engine.pipeline import Pipeline
from engine.recorder import ScratchTape
from engine.shadow_ring import no_handles
from engine.waiting import NO_DESCRIPTOR, new_alarm
from engine.warming import Stage
from feeds import codec, tape, wire

DEPTH: Final = 30  # levels of a side of the rehearsal's book
BEST_BID: Final = 100_000  # ticks
READ_BYTES: Final = 1 << 14  # of an array: of longer ones, rings and books, a message needs little
ROOM: Final = 1 << 12  # bytes of the tape for a message and its signal
MAX_MESSAGE_BYTES: Final = 1 << 11


def _messages() -> tuple[bytes, list[bytes]]:
    """A snapshot, and messages that may each follow it: two deltas and a trade."""
    bids = [(BEST_BID - i, 5) for i in range(DEPTH)]
    asks = [(BEST_BID + 1 + i, 5) for i in range(DEPTH)]
    snapshot = codec.encode_book(wire.SNAPSHOT, 0, 0, 1, 1, 0, 0, bids, asks)
    there = [(BEST_BID, 6), (BEST_BID - 5, 7), (BEST_BID - 20, 0)]
    back = [(BEST_BID, 5), (BEST_BID - 5, 5), (BEST_BID - 20, 5)]
    beside = [(BEST_BID + 1, 7), (BEST_BID + 10, 3)]
    return snapshot, [
        codec.encode_book(wire.DELTA, 0, 0, 1, 2, 0, 0, there, beside),
        codec.encode_trade(0, 0, 1, 2, 0, 0, BEST_BID + 1, 1, 1, wire.AGGRESSOR_BUY),
        codec.encode_book(wire.DELTA, 0, 0, 1, 2, 0, 0, back, [(p, 5) for p, _ in beside]),
    ]


class Rehearsal:
    """The other end of everything that the hot path touches.

    Parameters
    ----------
    config : Config
        The session's.
    bundle : Bundle
    backend : Backend
    context : zmq.Context
        That the sockets belong to; to be closed before it is terminated.
    offset_ns : int
        From the monotonic clock to time since the UNIX epoch.

    Attributes
    ----------
    handles : ndarray of int64
        See `engine.warming`.
    alarm : int
        See `engine.waiting`; what the next rehearsal is told by.
    """

    def __init__(
        self,
        config: Config,
        bundle: Bundle,
        backend: Backend,
        context: zmq.Context[Any],
        offset_ns: int,
    ) -> None:
        self._pipeline = Pipeline(
            msgspec.structs.replace(
                config,
                instruments=config.instruments[:1],
                trigger=TriggerConfig(kind="events", every_events=1),
            ),
            bundle,
            backend,
        )
        # Whatever the features are: these may be like none that the model was made for.
        norm = self._pipeline.arrays[handle_of("norm")]
        norm[:] = new_norm(norm.shape[1], None)
        norm[INV_SCALE] = 0.0
        self._sockets: list[zmq.Socket[bytes]] = []
        self._feed, sub = self._joined(context, zmq.PUB, "feed")
        out, self._audience = self._joined(context, zmq.XPUB, "signals")
        out.recv()  # the subscription
        link = LiveLink(
            self._pipeline,
            [sub],
            out,
            [codec.topic("signal", *self._pipeline.names[0])],
            msgspec.structs.replace(LimitsConfig(), max_message_bytes=MAX_MESSAGE_BYTES),
            OverloadConfig(conflate_after_ns=0),
            room=ROOM,
            now_ns=time.monotonic_ns(),
            offset_ns=offset_ns,
        )
        self._tape = ScratchTape(2 * ROOM)
        snapshot, self._messages = _messages()
        one = Decimal(1)
        for message in (
            codec.encode_instrument(0, 0, 1, 0, *self._pipeline.names[0], one, one),
            snapshot,
        ):
            at = self._tape.append(tape.MARKET, 0, message)
            self._pipeline.serve(self._tape.arena, at, self._tape.position, time.time_ns, offset_ns)
        self._stage = Stage(
            (self._pipeline.handles, link.handles, no_handles(), self._tape.arena),
            self._feed.underlying,
            self._audience.underlying,
            self._messages,
            (self._pipeline.sync, self._pipeline.guards, link.for_one_message()),
        )
        self._link: Final = link
        self._followed: Pipeline | None = None
        self.handles: Final = self._stage.handles
        self.alarm = new_alarm()

    def _joined(
        self, context: zmq.Context[Any], kind: int, name: str
    ) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        ends = context.socket(kind), context.socket(zmq.SUB)
        self._sockets += ends
        endpoint = f"inproc://rehearsal-{id(self):x}-{name}"
        for end in ends:
            end.setsockopt(zmq.LINGER, 0)
        ends[0].bind(endpoint)
        ends[1].connect(endpoint)
        ends[1].setsockopt(zmq.SUBSCRIBE, b"")
        return ends

    def in_python(self) -> None:
        """Rehearse each message once with every call that Python makes, as a session's first would.

        Loading a compiled function and filling its dispatcher takes milliseconds the first time.
        """
        for message in self._messages:
            self._stage.set_back()
            self._feed.send_multipart([b"", message])
            self._link.take(self._tape, None)
            with suppress(zmq.Again):
                self._audience.recv_multipart(zmq.NOBLOCK)

    def follow(self, pipeline: Pipeline) -> None:
        """Rehearse with what a pipeline was just prepared for, and read what it works on.

        Cheap where it is the same: the hot path is prepared anew behind each signal that Python
        had a hand in.
        """
        if pipeline is not self._followed:
            self._followed = pipeline
            self._stage.read([one for one in pipeline.arrays if one.nbytes <= READ_BYTES])
        serving = pipeline.trust.serving
        self._pipeline.run_natively(None if serving is None else serving.spare_model())

    @property
    def rehearsals(self) -> int:
        """How many there were."""
        return self._stage.rehearsals

    @property
    def sent(self) -> int:
        """How many of them came to a signal."""
        return int(self._link.sent[0])

    def close(self) -> None:
        """Close sockets and alarm. Closing twice is fine."""
        for socket in self._sockets:
            socket.close()
        self._sockets = []
        if self.alarm != NO_DESCRIPTOR:
            os.close(self.alarm)
            self.alarm = NO_DESCRIPTOR
