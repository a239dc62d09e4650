"""How far behind the market the engine is, from two bounds that hold for any source."""

from __future__ import annotations

import struct

import numpy as np

from engine.lag import AGE, LAG, LONGEST, RENEW_NS, emptied, new_lag, received
from feeds import wire

MS = 1_000_000
OFFSET = 1_700_000_000_000_000_000


class Feed:
    """Messages received at monotonic times, sent by a source with a clock of its own."""

    def __init__(self, now_ns: int = 0) -> None:
        self.lag = new_lag(now_ns)
        self._message = np.zeros(wire.HEADER_BYTES + wire.PREFIX_BYTES, dtype=np.uint8)

    def take(self, now_ns: int, sent_ns: int) -> int:
        struct.pack_into("<q", self._message.data, wire.AT_SOURCE_TIME, sent_ns)
        received(self.lag, self._message, 0, len(self._message), now_ns, OFFSET)
        return int(self.lag[LAG])

    def rest(self, now_ns: int) -> None:
        emptied(self.lag, now_ns)

    def settle(self) -> int:
        """Three seconds of messages that wait for nothing; the time after them."""
        for k in range(1, 301):
            self.rest(k * 10 * MS)
            self.take(k * 10 * MS, OFFSET + k * 10 * MS)
        return 3_000 * MS


def test_a_message_that_waits_for_nothing_has_no_lag_whatever_its_clock_says() -> None:
    feed = Feed()
    for offset_ns in (OFFSET, OFFSET - 3_600_000 * MS, 0):
        for k in range(1, 10):
            feed.rest(k * 10 * MS)
            assert feed.take(k * 10 * MS, offset_ns + k * 10 * MS) == 0


def test_messages_that_waited_tell_how_long() -> None:
    feed = Feed()
    now = feed.settle()
    feed.rest(now + 2 * MS)
    # Three come at 3, 4 and 5 ms; all are taken from 50 ms on.
    assert feed.take(now + 50 * MS, OFFSET + now + 3 * MS) == 47 * MS
    assert feed.take(now + 50 * MS, OFFSET + now + 4 * MS) == 46 * MS
    assert feed.take(now + 51 * MS, OFFSET + now + 5 * MS) == 46 * MS
    assert feed.lag[LONGEST] == 47 * MS


def test_lag_is_no_longer_than_since_nothing_waited() -> None:
    feed = Feed()
    feed.rest(0)
    feed.take(0, OFFSET)
    for k in range(1, 100):  # a tape at half its speed: its clock falls behind ours
        feed.rest(k * 10 * MS)
        assert feed.take(k * 10 * MS + MS, OFFSET + k * 5 * MS) <= MS


def test_a_busy_engine_that_keeps_up_has_no_lag() -> None:
    feed = Feed()
    now = feed.settle()
    for k in range(1, 1_000):  # a queue that never empties, every message as young as the first
        assert feed.take(now + k * MS, OFFSET + now + k * MS) == 0


def test_a_clock_that_runs_faster_than_ours_hides_no_lag() -> None:
    feed = Feed()
    feed.rest(0)
    for k in range(1, 3_000):  # a tape at ten times its speed, and a queue that never empties
        feed.take(k * MS, OFFSET + 10 * k * MS)
    assert feed.lag[LAG] == 2_999 * MS


def test_nothing_waiting_ends_a_lag() -> None:
    feed = Feed()
    feed.rest(MS)
    feed.take(90 * MS, OFFSET + 2 * MS)
    assert feed.lag[LAG] > 0
    feed.rest(91 * MS)
    assert feed.lag[LAG] == 0
    assert feed.lag[LONGEST] > 0


def test_clocks_may_drift() -> None:
    """A source whose clock loses a millisecond a second is no engine that falls behind."""
    feed = Feed()
    longest = 0
    for k in range(1, 600):
        now = k * RENEW_NS // 10
        feed.rest(now - MS // 2)
        longest = max(longest, feed.take(now, OFFSET + now - k * MS // 10))
    assert longest <= 2 * MS
    assert feed.lag[AGE] > 50 * MS


def test_a_message_too_short_to_say_when_it_was_sent_waited_since_nothing_did() -> None:
    feed = Feed()
    feed.rest(10 * MS)
    received(feed.lag, np.zeros(8, dtype=np.uint8), 0, 8, 15 * MS, OFFSET)
    assert feed.lag[LAG] == 5 * MS
