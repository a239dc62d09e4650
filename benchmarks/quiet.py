"""``octick bench quiet``: a silent feed is told from a quiet market.

A day of event time through the pipeline: heartbeats and timers as the daemon makes them, hardly a
trade. None of it may be called stale; and once the feed falls silent, with the socket still open,
it must be within the limit.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any, Final

import msgspec
import numpy as np

from benchmarks.provenance import commit, machine
from engine import trust
from engine.config import LimitsConfig, TrustConfig, default_config
from engine.pipeline import Pipeline
from feeds import codec, tape, wire

DAY_S: Final = 86_400
HEARTBEAT_NS: Final = 1_000_000_000
DELTA_EVERY_S: Final = 60  # a quiet market moves about once a minute
START_NS: Final = 1_767_623_400_000_000_000
SECOND_NS: Final = 1_000_000_000


class QuietBench(msgspec.Struct, frozen=True):
    """What was found; ``ok`` with no false alarm and the silence found within its limit.

    Attributes
    ----------
    seconds, timers, heartbeats : int
        Of the quiet day.
    false_stale : int
        Signals of that day that call the book stale.
    stale_after_s : float
        From the last message of the feed to the signal that says STALE.
    limit_s : float
        ``trust.stale_after_ns`` and one timer.
    """

    ok: bool
    seconds: int
    timers: int
    heartbeats: int
    false_stale: int
    stale_after_s: float
    limit_s: float
    machine: dict[str, str | int]
    commit: str


def bench_quiet(
    seconds: int = DAY_S, *, progress: Callable[[int], Any] = lambda _: None
) -> QuietBench:
    """Run a quiet day, then a silence."""
    config = default_config([("sim", "QUIET")])
    pipeline = Pipeline(config, None, None)
    timer_ns = LimitsConfig().timer_ns
    feed = _Feed(pipeline)
    feed.market(START_NS, codec.encode_instrument(1, 0, 1, 0, "sim", "QUIET", *_UNITS))
    bids, asks = [(99, 10), (98, 10)], [(101, 10), (102, 10)]
    feed.market(
        START_NS, codec.encode_book(wire.SNAPSHOT, 1, 0, 1, 1, START_NS, START_NS, bids, asks)
    )
    seq, timers, heartbeats = 1, 0, 0
    now = START_NS
    for second in range(seconds):
        for now in range(
            START_NS + second * SECOND_NS + timer_ns,
            START_NS + (second + 1) * SECOND_NS + 1,
            timer_ns,
        ):
            feed.take(tape.TIMER, now, codec.encode_timer(now))
            timers += 1
        if second % DELTA_EVERY_S == DELTA_EVERY_S - 1:
            seq += 1
            lots = [(99, 10 + seq % 7)]
            feed.market(now, codec.encode_book(wire.DELTA, 1, 0, 1, seq, now, now, lots, []))
        feed.market(now, codec.encode_heartbeat(1, 0, 1, seq, now, now))
        heartbeats += 1
        if second % 600 == 0:
            progress(second)
    false = feed.stale
    silent_ns = now
    limit_ns = TrustConfig().stale_after_ns + timer_ns
    while feed.stale == false and now < silent_ns + 10 * limit_ns:
        now += timer_ns
        feed.take(tape.TIMER, now, codec.encode_timer(now))
    after_ns = now - silent_ns
    return QuietBench(
        ok=false == 0 and after_ns <= limit_ns,
        seconds=seconds,
        timers=timers,
        heartbeats=heartbeats,
        false_stale=false,
        stale_after_s=after_ns / 1e9,
        limit_s=limit_ns / 1e9,
        machine=machine(),
        commit=commit(),
    )


_UNITS: Final = (Decimal(1), Decimal(1))


class _Feed:
    """Puts one record after another into a pipeline, and counts the signals that say STALE."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._buf = np.zeros(4_096, dtype=np.uint8)
        self.stale = 0

    def market(self, recv_ns: int, payload: bytes) -> None:
        self.take(tape.MARKET, recv_ns, payload)

    def take(self, kind: int, recv_ns: int, payload: bytes) -> None:
        buf, pipeline, body = self._buf, self._pipeline, tape.RECORD_HEADER_BYTES
        buf[body : body + len(payload)] = np.frombuffer(payload, dtype=np.uint8)
        end = tape.put_record(buf, 0, kind, recv_ns, len(payload))
        at = 0
        while at < end:
            at = pipeline.advance(buf, at, end)
            if pipeline.fired:
                block = codec.decode_block(pipeline.answer(), wire.SIGNAL_DTYPE)
                self.stale += int(block["book_state"]) == trust.STALE
