"""What stands at the ends of the wire in ``octick bench latency``, each a process of its own.

``send`` publishes a tape's messages when a schedule says so and never waits for an answer; the
time at which each *should* leave is written into it, so that what is late at the start counts as
late at the end (coordinated omission, G. Tene, "How NOT to measure latency", 2013). ``receive``
takes signals and holds that time against its own clock. ``echo`` is the limit: it receives and
sends as plainly as pyzmq can, and computes nothing.

Each takes one JSON object a line on its standard input and answers with one.
"""

from __future__ import annotations

import json
import select
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

import numpy as np
import zmq

from benchmarks.sleep import sharpen_sleep
from benchmarks.wire_receiver import Receiver
from benchmarks.wire_sender import Sender, load_market
from engine.signals import AT_SOURCE_TIME as AT_SIGNAL_SOURCE_TIME
from feeds import wire

DEFINE_EVERY_S: Final = 0.02
HWM: Final = 1_000_000
_TIME_BYTES: Final = 8


def _commands() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        yield json.loads(line)


def _answer(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def _socket(context: zmq.Context[Any], kind: int) -> zmq.Socket[Any]:
    socket = context.socket(kind)
    socket.set_hwm(HWM)
    return socket


def send(tape: str, *endpoints: str) -> None:
    """Publish a tape at each endpoint: {to, schedule, stamp_due} sends, {book} asks for it."""
    sharpen_sleep()
    context: zmq.Context[Any] = zmq.Context()
    market, senders = load_market(tape), []
    for endpoint in endpoints:
        socket = _socket(context, zmq.PUB)
        socket.bind(endpoint)
        senders.append(Sender(market, socket))
    _answer(ready=True)
    # Until the first command an engine may be waiting for what there is.
    while not select.select([sys.stdin], [], [], DEFINE_EVERY_S)[0]:
        for sender in senders:
            sender.define()
    for command in _commands():
        if "book" in command:
            _answer(sides=senders[command["book"]].sides())
            continue
        sender = senders[command["to"]]
        late = sender.send(np.load(command["schedule"]), command["stamp_due"])
        p50, p99 = np.percentile(late, (50, 99)) / 1e3
        _answer(sent=len(late), late_p50_us=float(p50), late_p99_us=float(p99))


def receive(endpoint: str) -> None:
    """Time signals: {count, begin_s, idle_s, out} collects, and writes ns from due to received."""
    context: zmq.Context[Any] = zmq.Context()
    socket = _socket(context, zmq.SUB)
    # Whatever comes first says that the way stands: the engine tells its state every second.
    socket.setsockopt(zmq.SUBSCRIBE, b"")
    socket.connect(endpoint)
    socket.recv_multipart()
    socket.setsockopt(zmq.SUBSCRIBE, b"signal.")
    socket.setsockopt(zmq.UNSUBSCRIBE, b"")
    receiver = Receiver(socket)
    _answer(ready=True)
    for command in _commands():
        receiver.begin(command["begin_s"], command["idle_s"])
        _answer(listening=True)
        took = receiver.collect(command["count"])
        np.save(command["out"], took)
        _answer(received=len(took))


def echo(inward: str, outward: str, topic: str, signal_bytes: str) -> None:
    """Receive on SUB and send on PUB, blocking: the plainest engine there can be."""
    context: zmq.Context[Any] = zmq.Context()
    sub, pub = _socket(context, zmq.SUB), _socket(context, zmq.PUB)
    sub.setsockopt(zmq.SUBSCRIBE, b"l2.")
    sub.connect(inward)
    pub.bind(outward)
    name, out = topic.encode(), bytearray(int(signal_bytes))
    sub.recv_multipart()
    _answer(ready=True)
    at, end = AT_SIGNAL_SOURCE_TIME, AT_SIGNAL_SOURCE_TIME + _TIME_BYTES
    first, last = wire.AT_SOURCE_TIME, wire.AT_SOURCE_TIME + _TIME_BYTES
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
