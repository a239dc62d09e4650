"""What a publisher is about to send, and what it has sent: chunks, numbers and books of a source.

A tape or a simulator comes in chunks of records. Each chunk is indexed and renumbered in native
code before its first message leaves; books and numbers "as of the last message sent" are then a
matter of how many of its messages have left.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np

from feeds import outgoing
from feeds.simulator import Simulator
from feeds.snapshots import Book, BookFold
from feeds.tape import InstrumentMeta
from feeds.tape_reader import Chunk, TapeReader

SIMULATOR_CHUNK_BYTES: Final = 1 << 16
LOOP_PAUSE_NS: Final = 1_000_000  # between the end of a tape and its next pass


class Batch(NamedTuple):
    """Messages that may leave next: ``places`` and ``changes`` as in `feeds.outgoing`."""

    view: memoryview
    places: np.ndarray
    changes: np.ndarray
    before: np.ndarray


class Departures:
    """The messages of a source in order, with the numbers that subscribers see.

    Parameters
    ----------
    source : Simulator or TapeReader
    messages, seconds
        Limits for a simulator.
    epoch : int, optional
        What the source's first epoch becomes; by default the time now, in ns.
    keep_epoch : bool
        Leave epochs as they are.
    loop : bool
        Start a tape over at its end.

    Attributes
    ----------
    instruments : list of InstrumentMeta
    sent : int
        How many messages of the current batch have left; set by the publisher.
    refused, loops : int
        Records left out, passes ended.
    """

    def __init__(
        self,
        source: Simulator | TapeReader,
        *,
        messages: int | None = None,
        seconds: float | None = None,
        epoch: int | None = None,
        keep_epoch: bool = False,
        loop: bool = False,
    ) -> None:
        self._source = source
        self._messages = messages
        self._seconds = seconds
        self._loop = loop and isinstance(source, TapeReader)
        self.instruments: list[InstrumentMeta] = (
            source.instruments if isinstance(source, Simulator) else source.meta.instruments
        )
        self._keys = np.array(
            [(x.source_id, x.instrument_id) for x in self.instruments], dtype=np.int64
        ).reshape(-1, 2)
        self._numbers = np.zeros((len(self.instruments), outgoing.NUMBERS), dtype=np.int64)
        self._numbers[:, outgoing.FIRST_EPOCH] = -1
        own_epoch = -1 if keep_epoch else (time.time_ns() if epoch is None else epoch)
        self._numbers[:, [outgoing.EPOCH_BASE, outgoing.SENT_EPOCH]] = own_epoch
        self.books = BookFold(len(self.instruments))
        self._batch: Batch | None = None
        self.sent = 0
        self.refused = 0
        self.loops = 0

    def _chunks(self) -> Iterator[Chunk]:
        if isinstance(self._source, Simulator):
            return self._source.chunks(
                self._messages, self._seconds, chunk_bytes=SIMULATOR_CHUNK_BYTES
            )
        return self._source.chunks()

    def batches(self) -> Iterator[Batch]:
        """The batches of one pass or, in a loop, of endless passes.

        A batch counts as left as far as `sent` says when the next one is asked for.
        """
        shift_ns, first_ns, last_ns = 0, None, 0
        while True:
            for buf, start, stop, _ in self._chunks():
                batch, refused = self._index(buf, start, stop, shift_ns)
                self.refused += refused
                if not len(batch.places):
                    continue
                if first_ns is None:
                    first_ns = int(batch.places[0, outgoing.RECV_NS])
                last_ns = int(batch.places[:, outgoing.RECV_NS].max())
                self._batch, self.sent = batch, 0
                yield batch
                self.books.absorb(self._sent_changes())
                self._batch = None
            if not self._loop or first_ns is None:
                return
            shift_ns = last_ns - first_ns + LOOP_PAUSE_NS
            outgoing.start_over(self._numbers)
            self.books.clear()
            self.loops += 1

    def _index(self, buf: np.ndarray, start: int, stop: int, shift_ns: int) -> tuple[Batch, int]:
        size = stop - start
        places = np.zeros((outgoing.most_places(size), outgoing.PLACE_COLUMNS), dtype=np.int64)
        changes = np.zeros((outgoing.most_changes(size), outgoing.CHANGE_COLUMNS), dtype=np.int64)
        before = self._numbers.copy()
        count, rows, refused = outgoing.index_records(
            buf, start, stop, self._keys, self._numbers, shift_ns, places, changes
        )
        return Batch(memoryview(buf.data), places[:count], changes[:rows], before), refused

    def _sent_changes(self) -> np.ndarray:
        if self._batch is None or self.sent == 0:
            return np.zeros((0, outgoing.CHANGE_COLUMNS), dtype=np.int64)
        return self._batch.changes[: int(self._batch.places[self.sent - 1, outgoing.ROWS])]

    def book(self, slot: int) -> Book:
        """The book of an instrument as of the last message that left."""
        return self.books.book(slot, self._sent_changes())

    def numbers(self, slot: int) -> tuple[int, int, int]:
        """(epoch, seq, exchange_time_ns) as of the last message that left; epoch -1: none yet."""
        state = self._numbers[slot] if self._batch is None else self._batch.before[slot]
        if self._batch is not None:
            places = self._batch.places[: self.sent]
            own = np.flatnonzero(places[:, outgoing.SLOT] == slot)
            if len(own):
                last = places[own[-1]]
                return (
                    int(last[outgoing.OUT_EPOCH]),
                    int(last[outgoing.OUT_SEQ]),
                    int(last[outgoing.EXCHANGE_NS]),
                )
        epoch = int(state[outgoing.SENT_EPOCH])
        if epoch < 0:  # kept as it is: the first message says what it is
            epoch = int(self._numbers[slot, outgoing.EPOCH_BASE])
        return epoch, int(state[outgoing.SENT_SEQ]), int(state[outgoing.LAST_EXCHANGE_NS])
