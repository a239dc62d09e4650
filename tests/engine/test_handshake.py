"""What stands between a config and the first event."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest
import zmq

from engine.config import FeedConfig, LimitsConfig
from engine.feed import FeedConnection
from engine.handshake import MAX_EARLY_MESSAGES, Handshake
from feeds import codec, wire
from feeds.errors import InputError

A, B = ("test", "A"), ("test", "B")


class Feed:
    """A publisher and snapshot service of the test's own, and the engine's end of it."""

    def __init__(self, folder: Path, names: list[tuple[str, str]]) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        endpoints = [f"ipc://{folder}/{name}" for name in ("feed", "snapshots")]
        self.pub = self.context.socket(zmq.XPUB)
        self.pub.bind(endpoints[0])
        self.router = self.context.socket(zmq.ROUTER)
        self.router.bind(endpoints[1])
        self.limits = LimitsConfig(snapshot_timeout_ns=1)
        self.connection = FeedConnection(
            self.context, FeedConfig(endpoints[0], endpoints[1]), self.limits, names
        )
        self.notices: list[str] = []
        self.now_ns = 0
        self.handshake = Handshake(
            [self.connection], names, self.limits, self.clock, self.notices.append
        )
        for _ in names:
            self.pub.recv()  # the subscription is there

    def clock(self) -> int:
        self.now_ns += 1_000_000_000
        return self.now_ns

    def define(self, name: tuple[str, str], instrument_id: int) -> bytes:
        one = Decimal("0.5")
        return codec.encode_instrument(1, instrument_id, 1, 0, *name, one, one)

    def answer(self, reply: bytes) -> None:
        """Answer the next request."""
        identity, request = self.router.recv_multipart()
        assert codec.template_id(request) == wire.SNAPSHOT_REQUEST
        self.router.send_multipart([identity, b"l2.test.A", reply])

    def until(self, complete: bool) -> None:
        for _ in range(200):
            self.handshake.poll()
            if self.handshake.complete == complete:
                return
        pytest.fail("the handshake did not come so far")

    def close(self) -> None:
        self.connection.close()
        self.pub.close(0)
        self.router.close(0)
        self.context.term()


@pytest.fixture
def feed(tmp_path: Path):  # type: ignore[no-untyped-def]
    made = Feed(tmp_path, [A, B])
    yield made
    made.close()


def test_it_is_complete_when_every_instrument_is_defined(feed: Feed) -> None:
    feed.handshake.poll()
    feed.answer(feed.define(A, 3))
    feed.pub.send_multipart([b"l2.test.B", feed.define(B, 4)])
    feed.until(complete=True)
    assert feed.handshake.definitions[A].instrument_id == 3
    assert feed.handshake.definitions[B].tick == "0.5"


def test_what_comes_early_is_kept_in_order(feed: Feed) -> None:
    heartbeats = [codec.encode_heartbeat(1, 4, 1, seq, 0, 0) for seq in range(5)]
    for message in heartbeats:
        feed.pub.send_multipart([b"l2.test.B", message])
    feed.pub.send_multipart([b"l2.test.B", feed.define(B, 4)])
    feed.pub.send_multipart([b"l2.test.A", feed.define(A, 3)])
    feed.until(complete=True)
    assert [payload for _, payload in feed.handshake.early][:5] == heartbeats
    times = [recv_ns for recv_ns, _ in feed.handshake.early]
    assert times == sorted(times)
    assert len(times) <= MAX_EARLY_MESSAGES


def test_it_says_what_it_waits_for(feed: Feed) -> None:
    for _ in range(5):
        feed.handshake.poll()
    assert feed.notices
    assert "test.A, test.B" in feed.notices[0]


def test_an_unknown_symbol_is_refused_by_name(feed: Feed) -> None:
    feed.handshake.poll()
    feed.answer(codec.encode_reject(b"test", b"A", wire.REJECT_UNKNOWN, "known: X, Y"))
    with pytest.raises(InputError, match=r"unknown symbol test\.A.*known: X, Y"):
        feed.until(complete=True)


def test_a_book_that_is_not_known_yet_is_asked_for_again(feed: Feed) -> None:
    feed.handshake.poll()
    feed.answer(codec.encode_reject(b"test", b"A", wire.REJECT_NOT_YET, "no snapshot so far"))
    feed.handshake.poll()
    feed.handshake.poll()
    feed.answer(feed.define(B, 4))
    feed.answer(feed.define(A, 3))
    feed.until(complete=True)


def test_two_instruments_under_one_id_are_refused(feed: Feed) -> None:
    feed.pub.send_multipart([b"l2.test.A", feed.define(A, 3)])
    feed.pub.send_multipart([b"l2.test.B", feed.define(B, 3)])
    with pytest.raises(InputError, match=r"two instruments under one id: test\.A and test\.B"):
        feed.until(complete=True)


def test_frames_that_are_no_message_are_counted(feed: Feed) -> None:
    feed.pub.send_multipart([b"l2.test.A"])
    feed.pub.send_multipart([b"l2.test.A", b"a", b"b"])
    feed.pub.send_multipart([b"l2.test.A", bytes(feed.limits.max_message_bytes)])
    feed.pub.send_multipart([b"l2.test.A", feed.define(A, 3)])
    feed.pub.send_multipart([b"l2.test.B", feed.define(B, 4)])
    feed.until(complete=True)
    assert feed.connection.malformed == 2
