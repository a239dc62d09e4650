"""The receiver of ``octick bench latency``: each signal once, and an end when none comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import zmq

from benchmarks.wire_receiver import MAX_FRAME_BYTES, Receiver
from engine.signals import AT_SOURCE_TIME

SECOND_NS = 1_000_000_000
LONG_S = 60.0
SHORT_S = 0.02


class Wire(NamedTuple):
    receiver: Receiver
    pub: zmq.Socket[bytes]

    def publish(self, *times_ns: int) -> None:
        for time_ns in times_ns:
            self.pub.send_multipart([b"signal.a", signal(time_ns)])


def signal(time_ns: int) -> bytes:
    return bytes(AT_SOURCE_TIME) + time_ns.to_bytes(8, "little") + bytes(20)


@pytest.fixture
def wire(tmp_path: Path) -> Iterator[Wire]:
    with zmq.Context() as context, context.socket(zmq.PUB) as pub, context.socket(zmq.SUB) as sub:
        pub.linger = 0
        pub.bind(f"ipc://{tmp_path}/signals")
        sub.setsockopt(zmq.SUBSCRIBE, b"signal.")
        sub.connect(f"ipc://{tmp_path}/signals")
        while not sub.poll(5):
            pub.send_multipart([b"signal.a", signal(0)])
        yield Wire(Receiver(sub), pub)


def test_a_signal_is_timed_from_what_is_written_into_it(wire: Wire) -> None:
    before = time.monotonic_ns()
    due = [before - 5 * SECOND_NS, before - 3 * SECOND_NS, before - SECOND_NS]
    wire.receiver.begin(LONG_S, LONG_S)
    wire.publish(*due)
    took = wire.receiver.collect(3)
    now = time.monotonic_ns()
    assert len(took) == 3, "complete: it waits for no more"
    for one, due_ns in zip(took, due, strict=True):
        assert before - due_ns < one < now - due_ns


def test_a_signal_that_answers_no_newer_message_does_not_count(wire: Wire) -> None:
    now = time.monotonic_ns()
    wire.receiver.begin(LONG_S, SHORT_S)
    wire.publish(now, now, now + 1, now - 1, now + 1, now + 2)
    assert len(wire.receiver.collect(100)) == 3
    wire.receiver.begin(SHORT_S, SHORT_S)
    wire.publish(now + 1, now + 2)
    assert len(wire.receiver.collect(100)) == 0, "nor in a later turn"


def test_it_ends_when_no_signal_comes_any_more(wire: Wire) -> None:
    wire.receiver.begin(LONG_S, SHORT_S)
    wire.publish(time.monotonic_ns())
    began = time.monotonic_ns()
    assert len(wire.receiver.collect(2)) == 1
    assert time.monotonic_ns() - began > SHORT_S * SECOND_NS


def test_a_feed_that_has_not_begun_is_none_that_has_ended(wire: Wire) -> None:
    began, waits_s = time.monotonic_ns(), 0.3
    late = threading.Timer(waits_s, wire.publish, [began])
    wire.receiver.begin(LONG_S, SHORT_S)
    late.start()
    took = wire.receiver.collect(2)
    late.join()
    assert len(took) == 1
    assert took[0] > waits_s * SECOND_NS


def test_one_that_never_begins_ends_too(wire: Wire) -> None:
    wire.receiver.begin(SHORT_S, LONG_S)
    assert len(wire.receiver.collect(2)) == 0


def test_what_is_no_signal_is_left_out_and_hides_none(wire: Wire) -> None:
    now = time.monotonic_ns()
    wrong = signal(now - 5 * SECOND_NS)
    wire.receiver.begin(LONG_S, LONG_S)
    wire.pub.send(b"signal.a" + wrong[len(b"signal.a") :])
    wire.pub.send_multipart([b"signal.a", b"short"])
    wire.pub.send_multipart([b"signal.a", wrong, wrong])
    wire.publish(now + 1)
    wire.pub.send_multipart([b"signal.a", signal(now + 2) + bytes(MAX_FRAME_BYTES)])
    took = wire.receiver.collect(2)
    assert len(took) == 2
    assert np.all(took < time.monotonic_ns() - now)
