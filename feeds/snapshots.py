"""The snapshot service of a publisher: the book as of the last message sent, when somebody asks.

The book is a fold: since the last snapshot, per side and price, the last quantity wins, and zeros
go. It is folded with numpy when a request arrives, or from time to time so that memory is bounded.
Source of the pattern: "Clone" in the ZeroMQ guide, chapter 5 (Hintjens, 2013).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, Final, NamedTuple

import numpy as np
import zmq

from feeds import codec, outgoing, wire
from feeds.tape import InstrumentMeta

MAX_PENDING_ROWS: Final = 1 << 17
MAX_REQUESTS_A_TURN: Final = 8
MAX_LISTED_SYMBOLS: Final = 16

Numbers = Callable[[int], tuple[int, int, int]]


class Book(NamedTuple):
    """One folded book: levels best first, or unknown with ``reason`` said."""

    known: bool
    bids: list[tuple[int, int]]
    asks: list[tuple[int, int]]


class BookFold:
    """Changes of several books, kept until somebody asks what they add up to.

    Parameters
    ----------
    instruments : int
    """

    def __init__(self, instruments: int) -> None:
        self._rows = [_no_rows() for _ in range(instruments)]
        self._known = [False] * instruments
        self._pending: list[np.ndarray] = []
        self.pending_rows = 0

    def clear(self) -> None:
        """Forget all books."""
        self.__init__(len(self._rows))  # type: ignore[misc]

    def absorb(self, changes: np.ndarray) -> None:
        """Take over changes of messages that were sent; folds when too many wait."""
        if len(changes):
            self._pending.append(changes.copy())
            self.pending_rows += len(changes)
        if self.pending_rows > MAX_PENDING_ROWS:
            self.fold()

    def fold(self) -> None:
        """Fold everything that waits into the books."""
        if not self._pending:
            return
        rows = np.concatenate(self._pending)
        self._pending.clear()
        self.pending_rows = 0
        order = np.argsort(rows[:, outgoing.CHANGE_SLOT], kind="stable")
        slots, starts = np.unique(rows[order, outgoing.CHANGE_SLOT], return_index=True)
        for slot, part in zip(slots.tolist(), np.split(rows[order], starts[1:]), strict=True):
            self._known[slot], self._rows[slot] = _folded(
                self._known[slot], np.concatenate((self._rows[slot], part))
            )

    def book(self, slot: int, unabsorbed: np.ndarray) -> Book:
        """The book of ``slot`` after everything absorbed and the ``unabsorbed`` changes."""
        self.fold()
        part = unabsorbed[unabsorbed[:, outgoing.CHANGE_SLOT] == slot]
        known, rows = _folded(self._known[slot], np.concatenate((self._rows[slot], part)))
        bids, asks = (
            rows[rows[:, outgoing.SIDE] == side][:, [outgoing.PRICE, outgoing.QUANTITY]]
            for side in range(2)
        )
        return Book(
            known,
            [(p, q) for p, q in bids[::-1].tolist() if q],
            [(p, q) for p, q in asks.tolist() if q],
        )


def _no_rows() -> np.ndarray:
    return np.zeros((0, outgoing.CHANGE_COLUMNS), dtype=np.int64)


def _folded(known: bool, rows: np.ndarray) -> tuple[bool, np.ndarray]:
    """Last write wins, in order of side and price; zeros stay only while the book is unknown."""
    side = rows[:, outgoing.SIDE]
    marks = np.flatnonzero(side < 0)
    if len(marks):
        epochs = marks[side[marks] == outgoing.EPOCH_MARK]
        if len(epochs):
            rows = rows[epochs[-1] + 1 :]
            known = False
            side = rows[:, outgoing.SIDE]
            marks = np.flatnonzero(side < 0)
    if len(marks):
        known = known and not (side[marks] == outgoing.LOST_MARK).any()
        snapshots = marks[side[marks] == outgoing.SNAPSHOT_MARK]
        deltas = side >= 0
        for at in snapshots.tolist():
            deltas[at : at + 1 + int(rows[at, outgoing.QUANTITY])] = False
        if len(snapshots):
            last = int(snapshots[-1])
            known = not (side[last:] == outgoing.LOST_MARK).any()
            deltas &= rows[:, outgoing.CHANGE_SEQ] > rows[last, outgoing.CHANGE_SEQ]
            whole = rows[last + 1 : last + 1 + int(rows[last, outgoing.QUANTITY])]
            rows = np.concatenate((whole, rows[deltas]))
        else:
            rows = rows[deltas]
    order = np.lexsort((rows[:, outgoing.PRICE], rows[:, outgoing.SIDE]))
    rows = rows[order]
    levels = rows[:, [outgoing.SIDE, outgoing.PRICE]]
    final = np.ones(len(rows), dtype=bool)
    final[:-1] = (levels[1:] != levels[:-1]).any(axis=1)
    if known:
        final &= rows[:, outgoing.QUANTITY] > 0
    return known, rows[final]


class SnapshotService:
    """Answers snapshot requests on a ROUTER socket, between sends, a bounded number at a time.

    Parameters
    ----------
    socket : zmq.Socket
        A bound ROUTER.
    instruments : sequence of InstrumentMeta
    book : callable
        slot → `Book` as of the last message sent.
    numbers : callable
        slot → (epoch, seq, exchange_time_ns) of the last message sent.

    Attributes
    ----------
    served, rejected : int
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        instruments: Sequence[InstrumentMeta],
        book: Callable[[int], Book],
        numbers: Numbers,
    ) -> None:
        self.socket = socket
        self._instruments = instruments
        self._slots = {(x.venue, x.symbol): i for i, x in enumerate(instruments)}
        self._book = book
        self._numbers = numbers
        self.served = 0
        self.rejected = 0

    def serve(self) -> int:
        """Answer what waits, at most `MAX_REQUESTS_A_TURN`; returns how many were taken."""
        for taken in range(MAX_REQUESTS_A_TURN):
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return taken
            for answer in self._answers(frames[-1]):
                try:
                    self.socket.send_multipart([*frames[:-1], *answer], zmq.NOBLOCK)
                except zmq.Again:
                    break  # the client is gone or does not read: it asks again
        return MAX_REQUESTS_A_TURN

    def _answers(self, request: bytes) -> list[list[bytes]]:
        if codec.template_id(request) != wire.SNAPSHOT_REQUEST or len(request) < 56:
            self.rejected += 1
            reject = codec.encode_reject(
                b"", b"", wire.REJECT_MALFORMED, "not a SnapshotRequest of this schema"
            )
            return [[codec.topic("l2", "", ""), reject]]
        venue_bytes = request[8:24].rstrip(b"\0")
        symbol_bytes = request[24:56].rstrip(b"\0")
        venue, symbol = (x.decode("ascii", "replace") for x in (venue_bytes, symbol_bytes))
        topic = codec.topic("l2", venue, symbol)
        slot = self._slots.get((venue, symbol))
        if slot is None:
            self.rejected += 1
            return [
                [
                    topic,
                    codec.encode_reject(
                        venue_bytes, symbol_bytes, wire.REJECT_UNKNOWN, self._unknown()
                    ),
                ]
            ]
        book = self._book(slot)
        if not book.known:
            self.rejected += 1
            reason = "book unknown until the source's next snapshot"
            return [
                [topic, codec.encode_reject(venue_bytes, symbol_bytes, wire.REJECT_NOT_YET, reason)]
            ]
        self.served += 1
        meta = self._instruments[slot]
        epoch, seq, exchange_ns = self._numbers(slot)
        keys: dict[str, Any] = {
            "source_id": meta.source_id,
            "instrument_id": meta.instrument_id,
            "epoch": epoch,
            "seq": seq,
            "exchange_time_ns": exchange_ns,
            "source_time_ns": exchange_ns,
            "flags": wire.FLAG_ANSWER,
        }
        instrument = codec.encode_instrument(
            venue=venue, symbol=symbol, tick=Decimal(meta.tick), lot=Decimal(meta.lot), **keys
        )
        snapshot = codec.encode_book(wire.SNAPSHOT, bids=book.bids, asks=book.asks, **keys)
        return [[topic, instrument], [topic, snapshot]]

    def _unknown(self) -> str:
        names = [f"{x.venue}.{x.symbol}" for x in self._instruments[:MAX_LISTED_SYMBOLS]]
        more = len(self._instruments) - len(names)
        return "unknown symbol; known: " + ", ".join(names) + (f" and {more} more" if more else "")
