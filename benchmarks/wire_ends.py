"""What stands at the ends of the wire in ``octick bench latency``, each a process of its own.

``send`` publishes a tape's messages when a schedule says so and never waits for an answer; the
time at which each *should* leave is written into it, so that what is late at the start counts as
late at the end (coordinated omission, G. Tene, "How NOT to measure latency", 2013). ``receive``
takes signals and holds that time against its own clock. ``echo`` is the limit: it receives and
sends as plainly as pyzmq can, and computes nothing.

Each takes one JSON object a line on its standard input and answers with one.
"""

from __future__ import annotations

import ctypes
import json
import select
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from decimal import Decimal
from typing import Any, Final

import numpy as np
import zmq
from zmq.backend import Socket as BackendSocket

from engine.signals import AT_SOURCE_TIME as AT_SIGNAL_SOURCE_TIME
from feeds import codec, outgoing, wire
from feeds.departures import Departures
from feeds.tape_reader import TapeReader

SPIN_NS: Final = 20_000  # of a wait, before a message is due
DEFINE_EVERY_S: Final = 0.02
RECEIVE_TIMEOUT_MS: Final = 50
HWM: Final = 1_000_000
NOT_DUE_NS: Final = 0  # when what is on no schedule should leave
PR_SET_TIMERSLACK: Final = 29
_FIRST: Final = int(zmq.SNDMORE)
_TIME: Final = struct.Struct("<q")


def _commands() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        yield json.loads(line)


def _answer(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def _sharpen_sleep() -> None:
    """Let sleeps of this thread end when they should: the default slack is 50 µs (prctl(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl"):
        libc.prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)


class Sender:
    """Publishes a tape, endlessly, at one endpoint.

    Parameters
    ----------
    tape : str
    endpoint : str
    """

    def __init__(self, tape: str, endpoint: str) -> None:
        reader = TapeReader(tape)
        self._departures = Departures(reader, loop=True)
        self._meta = self._departures.instruments
        self._topics = [codec.topic("l2", meta.venue, meta.symbol) for meta in self._meta]
        self._batches = self._departures.batches()
        self._batch = next(self._batches)
        self._at = 0
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.PUB)
        self._socket.set_hwm(HWM)
        self._socket.bind(endpoint)

    def define(self) -> None:
        """Say which instruments there are."""
        for slot, meta in enumerate(self._meta):
            epoch, seq, at_ns = self._departures.numbers(slot)
            key = (meta.source_id, meta.instrument_id, max(epoch, 0), seq)
            names = (meta.venue, meta.symbol, Decimal(meta.tick), Decimal(meta.lot))
            message = codec.encode_instrument(*key, *names, at_ns, NOT_DUE_NS)
            self._socket.send_multipart([self._topics[slot], message])

    def sides(self) -> list[list[tuple[int, int]]]:
        """The book as of the last message sent: bids and asks, best first."""
        book = self._departures.book(0)
        return [book.bids, book.asks]

    def send(self, schedule_ns: np.ndarray, stamp_due: bool) -> np.ndarray:
        """Send a message at each time of a schedule, ns from now on; returns how late each was."""
        late = np.zeros(len(schedule_ns), dtype=np.int64)
        send, socket, pack = BackendSocket.send, self._socket, _TIME.pack_into
        clock, due_at = time.monotonic_ns, (schedule_ns + time.monotonic_ns()).tolist()
        for n, due_ns in enumerate(due_at):
            topic, message = self._next()
            pack(message, wire.AT_SOURCE_TIME, due_ns)
            left_ns = due_ns - clock()
            if left_ns > SPIN_NS:
                time.sleep((left_ns - SPIN_NS) * 1e-9)
            while clock() < due_ns:
                pass
            if not stamp_due:
                pack(message, wire.AT_SOURCE_TIME, clock())
            send(socket, topic, _FIRST)
            send(socket, message)
            late[n] = clock() - due_ns
        self._departures.sent = self._at
        return late

    def _next(self) -> tuple[bytes, memoryview]:
        """The next message that changes a book; the others make no signal due and are left out."""
        while True:
            if self._at == len(self._batch.places):
                self._departures.sent = self._at
                self._batch, self._at = next(self._batches), 0
            place = self._batch.places[self._at]
            self._at += 1
            start, size = int(place[outgoing.OFFSET]), int(place[outgoing.LENGTH])
            topic = self._topics[place[outgoing.SLOT]]
            message = self._batch.view[start : start + size]
            if codec.template_id(message) not in (wire.INSTRUMENT, wire.HEARTBEAT):
                return topic, message


def send(tape: str, *endpoints: str) -> None:
    """Publish a tape at each endpoint: {to, schedule, stamp_due} sends, {book} asks for it."""
    _sharpen_sleep()
    senders = [Sender(tape, endpoint) for endpoint in endpoints]
    _answer(ready=True)
    while True:
        # Until the first command an engine may be waiting for what there is.
        if not select.select([sys.stdin], [], [], DEFINE_EVERY_S)[0]:
            for sender in senders:
                sender.define()
            continue
        break
    for command in _commands():
        if "book" in command:
            _answer(sides=senders[command["book"]].sides())
            continue
        sender = senders[command["to"]]
        late = sender.send(np.load(command["schedule"]), command["stamp_due"])
        p50, p99 = np.percentile(late, (50, 99)) / 1e3
        _answer(sent=len(late), late_p50_us=float(p50), late_p99_us=float(p99))


def receive(endpoint: str) -> None:
    """Time signals: {count, idle_s, out} collects, and writes ns from due to received."""
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.SUB)
    socket.set_hwm(HWM)
    # Whatever comes first says that the way stands: the engine tells its state every second.
    socket.setsockopt(zmq.SUBSCRIBE, b"")
    socket.connect(endpoint)
    socket.recv_multipart()
    socket.setsockopt(zmq.SUBSCRIBE, b"signal.")
    socket.setsockopt(zmq.UNSUBSCRIBE, b"")
    socket.setsockopt(zmq.RCVTIMEO, RECEIVE_TIMEOUT_MS)
    _answer(ready=True)
    newest = NOT_DUE_NS
    for command in _commands():
        took, count = np.zeros(command["count"], dtype=np.int64), 0
        recv, clock, unpack = BackendSocket.recv, time.monotonic_ns, _TIME.unpack_from
        begun = False
        last_ns = clock()
        _answer(listening=True)
        while count < len(took):
            try:
                recv(socket)
                message = recv(socket)
            except zmq.Again:
                # A feed that has not begun yet is no feed that has ended.
                idle_s = (clock() - last_ns) / 1e9
                if idle_s > (command["idle_s"] if begun else command["begin_s"]):
                    break
                continue
            now_ns = clock()
            (due_ns,) = unpack(message, AT_SIGNAL_SOURCE_TIME)
            if due_ns <= newest:
                continue  # of a timer, or a last value again: it answers no new message
            newest = due_ns
            took[count] = now_ns - due_ns
            count += 1
            last_ns, begun = now_ns, True
        np.save(command["out"], took[:count])
        _answer(received=count)


def echo(inward: str, outward: str, topic: str, signal_bytes: str) -> None:
    """Receive on SUB and send on PUB, blocking: the plainest engine there can be."""
    context: zmq.Context[Any] = zmq.Context()
    sub, pub = context.socket(zmq.SUB), context.socket(zmq.PUB)
    for socket in (sub, pub):
        socket.set_hwm(HWM)
    sub.setsockopt(zmq.SUBSCRIBE, b"l2.")
    sub.connect(inward)
    pub.bind(outward)
    name, out = topic.encode(), bytearray(int(signal_bytes))
    sub.recv_multipart()
    _answer(ready=True)
    at, end = AT_SIGNAL_SOURCE_TIME, AT_SIGNAL_SOURCE_TIME + _TIME.size
    first, last = wire.AT_SOURCE_TIME, wire.AT_SOURCE_TIME + _TIME.size
    while True:
        _, message = sub.recv_multipart()
        out[at:end] = message[first:last]
        pub.send_multipart([name, out])


def main(role: str, *arguments: str) -> None:
    """Play a role until the commands end, or Ctrl-C."""
    with suppress(KeyboardInterrupt):
        if role == "send":
            send(*arguments)
        elif role == "receive":
            receive(*arguments)
        else:
            echo(*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
