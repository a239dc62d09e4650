"""Before the first event: every instrument must be defined by a feed.

The tape's header names the instruments with their tick and lot, so the daemon asks each feed's
snapshot service, or waits for the definition in the stream. What arrives meanwhile is kept and
becomes the first events.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import zmq

from engine.config import LimitsConfig
from engine.feed import FeedConnection
from feeds import codec, tape, wire
from feeds.errors import InputError

NOTICE_EVERY_NS: Final = 2_000_000_000
POLL_MS: Final = 20
MAX_EARLY_MESSAGES: Final = 100_000

Notice = Callable[[str], None]


class Handshake:
    """Finds out what each configured instrument is.

    Parameters
    ----------
    feeds : list of FeedConnection
    names : list of (str, str)
        Venue and symbol of the instruments to find.
    limits : LimitsConfig
    now_ns : callable
        The daemon's clock.
    notice : callable
        Told every two seconds what is still missing.

    Attributes
    ----------
    definitions : dict
        (venue, symbol) → `feeds.tape.InstrumentMeta`.
    early : list of (int, bytes)
        Receive time and payload of every message so far, at most `MAX_EARLY_MESSAGES`.
    """

    def __init__(
        self,
        feeds: list[FeedConnection],
        names: list[tuple[str, str]],
        limits: LimitsConfig,
        now_ns: Callable[[], int],
        notice: Notice,
    ) -> None:
        self.definitions: dict[tuple[str, str], tape.InstrumentMeta] = {}
        self.early: list[tuple[int, bytes]] = []
        self._feeds = feeds
        self._names = names
        self._limits = limits
        self._now_ns = now_ns
        self._notice = notice
        self._asked_ns = 0
        self._told_ns = now_ns()
        self._poller = zmq.Poller()
        for feed in feeds:
            self._poller.register(feed.sub, zmq.POLLIN)
            if feed.dealer is not None:
                self._poller.register(feed.dealer, zmq.POLLIN)

    @property
    def missing(self) -> list[tuple[str, str]]:
        """Instruments that nobody has defined yet."""
        return [name for name in self._names if name not in self.definitions]

    @property
    def complete(self) -> bool:
        """Whether every instrument is defined."""
        return not self.missing

    def poll(self) -> None:
        """Ask where it is time to, wait a moment, take what came.

        Raises
        ------
        InputError
            If the only feed does not know an instrument.
        """
        now = self._now_ns()
        if now - self._asked_ns > self._limits.snapshot_timeout_ns:
            self._asked_ns = now
            for feed in self._feeds:
                for name in self.missing:
                    feed.request_snapshot(*name)
        if now - self._told_ns > NOTICE_EVERY_NS:
            self._told_ns = now
            what = ", ".join(".".join(name) for name in self.missing)
            where = ", ".join(feed.config.endpoint for feed in self._feeds)
            self._notice(f"waiting for {what} from {where}")
        self._poller.poll(POLL_MS)
        for feed in self._feeds:
            for payload in feed.answers():
                self._take(payload)
            for payload in feed.early(self._limits.max_drain_messages):
                self._take(payload)
        # Older ones are of no use: a snapshot, asked for by the gap, says what they said.
        del self.early[:-MAX_EARLY_MESSAGES]

    def _take(self, payload: bytes) -> None:
        template = codec.template_id(payload)
        if template == wire.REJECT:
            self._refuse(payload)
            return
        self.early.append((self._now_ns(), payload))
        if template != wire.INSTRUMENT:
            return
        try:
            block = codec.decode_block(payload, wire.INSTRUMENT_DTYPE)
        except InputError:
            return  # the pipeline counts it as malformed
        name = (
            block["venue"].decode("ascii", "replace"),
            block["symbol"].decode("ascii", "replace"),
        )
        if name not in self._names:
            return
        ids = (int(block["source_id"]), int(block["instrument_id"]))
        for other, known in self.definitions.items():
            if other != name and (known.source_id, known.instrument_id) == ids:
                raise InputError(
                    f"two instruments under one id: {'.'.join(other)} and {'.'.join(name)}",
                    where=", ".join(feed.config.endpoint for feed in self._feeds),
                    expected="a source_id of its own for each feed",
                    found=f"source_id {ids[0]}, instrument_id {ids[1]} twice",
                    fix="publish both from one source, or let each feed number its own source_id",
                )
        self.definitions[name] = tape.InstrumentMeta(
            venue=name[0],
            symbol=name[1],
            source_id=ids[0],
            instrument_id=ids[1],
            tick=codec.decimal_text(block["tick_mantissa"], block["tick_exponent"]),
            lot=codec.decimal_text(block["lot_mantissa"], block["lot_exponent"]),
        )

    def _refuse(self, payload: bytes) -> None:
        try:
            block = codec.decode_block(payload, wire.REJECT_DTYPE)
        except InputError:
            return
        venue, symbol, reason = (
            block[field].decode("ascii", "replace") for field in ("venue", "symbol", "reason")
        )
        if block["code"] == wire.REJECT_NOT_YET or len(self._feeds) > 1:
            return  # it is asked again; or another feed may know it
        raise InputError(
            f"unknown symbol {venue}.{symbol}",
            where=self._feeds[0].config.snapshot_endpoint,
            found=reason,
            fix="correct the [[instrument]] of the config, or the feed",
        )
