"""The publisher over real sockets: last value on join, slow subscribers, taken endpoints."""

from __future__ import annotations

import socket as os_socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from engine.publisher import MAX_TOPICS, SignalPublisher
from feeds.errors import InputError

A, B = b"signal.sim.ALPHA", b"signal.sim.BETA"
WAIT_MS = 5_000


@pytest.fixture
def publisher() -> Iterator[SignalPublisher]:
    with SignalPublisher("tcp://127.0.0.1:*", [A, B, b"state.engine"]) as made:
        yield made


def join(publisher: SignalPublisher, context: zmq.Context, prefix: bytes = b"") -> zmq.Socket:
    """A subscriber whose subscription the publisher has seen and answered."""
    socket = context.socket(zmq.SUB)
    socket.subscribe(prefix)
    socket.connect(publisher.endpoint)
    assert publisher._socket.poll(WAIT_MS)
    publisher.serve_joins()
    return socket


def take(socket: zmq.Socket) -> list[bytes]:
    assert socket.poll(WAIT_MS), "nothing came"
    return socket.recv_multipart()


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    made = zmq.Context()
    yield made
    made.destroy(linger=0)


def test_who_joins_gets_the_last_value_of_each_topic(
    publisher: SignalPublisher, context: zmq.Context
) -> None:
    for number in range(3):
        publisher.publish(A, b"a%d" % number)
    publisher.publish(B, b"b0")
    socket = join(publisher, context, b"signal.")
    assert [take(socket), take(socket)] == [[A, b"a2"], [B, b"b0"]]
    publisher.publish(A, b"a3")
    assert take(socket) == [A, b"a3"]
    assert publisher.sent == 5
    assert publisher.resent == 2


def test_a_topic_that_has_no_value_yet_sends_none(
    publisher: SignalPublisher, context: zmq.Context
) -> None:
    socket = join(publisher, context)
    publisher.publish(B, b"first")
    assert take(socket) == [B, b"first"]
    assert publisher.resent == 0


def test_only_matching_topics_are_resent(publisher: SignalPublisher, context: zmq.Context) -> None:
    publisher.publish(A, b"a")
    publisher.publish(B, b"b")
    join(publisher, context, B)
    assert publisher.resent == 1


def test_a_second_subscriber_of_the_same_topic_is_answered_too(
    publisher: SignalPublisher, context: zmq.Context
) -> None:
    publisher.publish(A, b"a")
    first, second = join(publisher, context, A), join(publisher, context, A)
    assert take(first) == [A, b"a"]
    assert take(second) == [A, b"a"]


def test_a_buffer_that_is_used_again_does_not_change_the_last_value(
    publisher: SignalPublisher, context: zmq.Context
) -> None:
    arena = bytearray(b"good")
    publisher.publish(A, memoryview(arena))
    arena[:] = b"evil"
    assert take(join(publisher, context)) == [A, b"good"]


def test_an_unregistered_topic_is_a_bug(publisher: SignalPublisher) -> None:
    with pytest.raises(AssertionError, match="registered"):
        publisher.publish(b"signal.sim.OTHER", b"x")


def test_topics_are_bounded(publisher: SignalPublisher) -> None:
    with pytest.raises(InputError, match="too many topics"):
        publisher.register(b"t%d" % number for number in range(MAX_TOPICS + 1))


def test_a_slow_subscriber_is_counted_and_holds_nobody_up(tmp_path: Path) -> None:
    context = zmq.Context()
    with SignalPublisher("inproc://slow", [A], send_hwm=4, context=context) as publisher:
        slow, quick = context.socket(zmq.SUB), context.socket(zmq.SUB)
        for socket, hwm in ((slow, 1), (quick, 10_000)):
            socket.setsockopt(zmq.RCVHWM, hwm)
            socket.subscribe(b"")
            socket.connect("inproc://slow")
            assert publisher._socket.poll(WAIT_MS)
            publisher.serve_joins()
        for number in range(100):
            publisher.publish(A, b"%d" % number)
        assert [take(quick)[1] for _ in range(100)] == [b"%d" % number for number in range(100)]
        assert publisher.drops > 0
        assert publisher.sent == 100
        got = [take(slow)[1]]
        while slow.poll(0):
            got.append(slow.recv_multipart()[1])
        assert got == [b"%d" % number for number in range(len(got))], "whole messages, in order"
        assert len(got) < 100
    context.destroy(linger=0)


def test_the_last_messages_leave_before_closing(context: zmq.Context) -> None:
    publisher = SignalPublisher("tcp://127.0.0.1:*", [A])
    socket = join(publisher, context)
    for number in range(1_000):
        publisher.publish(A, b"%d" % number)
    publisher.close()
    publisher.close()
    assert [take(socket)[1] for _ in range(1_000)][-1] == b"999"


def test_a_frame_that_is_no_subscription_is_ignored(
    publisher: SignalPublisher, context: zmq.Context
) -> None:
    publisher.publish(A, b"a")
    socket = context.socket(zmq.XSUB)
    socket.connect(publisher.endpoint)
    socket.send_multipart([b"\x07what", b"is this"])
    socket.send(b"\x01" + A)
    while not publisher.resent:
        assert publisher._socket.poll(WAIT_MS)
        publisher.serve_joins()
    assert publisher.foreign == 1
    assert take(socket) == [A, b"a"]


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_a_taken_endpoint_is_refused_and_the_owner_goes_on(
    transport: str, tmp_path: Path, context: zmq.Context
) -> None:
    endpoint = "tcp://127.0.0.1:*" if transport == "tcp" else f"ipc://{tmp_path / 's'}"
    with SignalPublisher(endpoint, [A]) as owner:
        with pytest.raises(InputError, match="is taken"):
            SignalPublisher(owner.endpoint, [A])
        owner.publish(A, b"still here")
        assert take(join(owner, context)) == [A, b"still here"]


def test_a_socket_file_left_behind_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with os_socket.socket(os_socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with SignalPublisher(f"ipc://{path}", [A]) as publisher:
        publisher.publish(A, b"a")


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be bound"):
        SignalPublisher("tcp://192.0.2.1:5555", [A])
