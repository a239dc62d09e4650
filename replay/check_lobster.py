"""The engine's book, fed with a LOBSTER message file, against the orderbook file beside it.

Compared is, after each event, every level that the messages determine. A level that only moved
into view at the bottom is told by the orderbook row alone; it is taken over from there, and counts
from the next event on.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from engine.book import (
    ASK,
    BID,
    FLOW_FIELDS,
    apply_levels,
    apply_snapshot,
    crossed,
    new_books,
    side_levels,
)
from feeds import codec, wire
from feeds.venues import lobster_files as fl
from feeds.venues.lobster_names import find_files
from feeds.venues.recording import Recording
from replay.verdict import Difference, Verdict

_COLUMNS: Final = ("ask_price", "ask_size", "bid_price", "bid_size")


class _Book:
    """The engine's book of one instrument, fed with canonical messages."""

    def __init__(self, levels: int) -> None:
        # One level more than is visible: a new one is set before the one it pushes out goes.
        books = new_books(1, levels + 1)
        self.window, self.far, self.top, self.depth = (array[0] for array in books)
        self._flow = np.zeros(FLOW_FIELDS, dtype=np.int64)
        self._levels = levels

    def load(self, row: np.ndarray) -> None:
        """Start from an orderbook row."""
        start = np.zeros((2, 2, self._levels), dtype=np.int64)
        count = np.zeros(2, dtype=np.int64)
        fl.read_row(row, start, count)
        sides = [start[side, :, : count[side]].T.tolist() for side in (BID, ASK)]
        apply_snapshot(
            self.window, self.far, self.top, self.depth, _message(wire.SNAPSHOT, sides), 0
        )

    def apply(self, changes: list[list[int]]) -> None:
        """Apply what an event changed."""
        sides: list[list[list[int]]] = [[], []]
        for side, price, size in changes:
            sides[side].append([price, size])
        message = _message(wire.DELTA, sides)
        apply_levels(self.window, self.far, self.top, self.depth, self._flow, message, 0)

    def row(self) -> np.ndarray:
        """The book as the orderbook file would write it, int64 of shape (levels, 4)."""
        row = np.tile(
            np.array([fl.NO_PRICE, 0, -fl.NO_PRICE, 0], dtype=np.int64), (self._levels, 1)
        )
        for side, column in ((ASK, 0), (BID, 2)):
            # A level too many shows in the last row, where it cannot be equal.
            found = side_levels(self.window, self.far, side)
            row[: len(found), column : column + 2] = found[: self._levels]
            if len(found) > self._levels:
                row[-1, column : column + 2] = found[-1]
        return row


def _message(template: int, sides: list[list[list[int]]]) -> np.ndarray:
    pairs = [[(price, size) for price, size in side] for side in sides]
    message = codec.encode_book(template, 0, 0, 1, 1, 0, 0, pairs[BID], pairs[ASK])
    return np.frombuffer(bytearray(message), dtype=np.uint8)


def check(recording: Recording, symbol: str | None) -> Verdict:
    """`replay.check.check` for a LOBSTER message file."""
    files = find_files(recording.path, symbol)
    book = _Book(files.levels)
    lines = updates = equal = crossings = halts = trades = revealed = 0
    first: Difference | None = None
    for step in fl.steps(files, recording, Recording(files.orderbook)):
        lines += 1
        kind = int(step.event[fl.E_TYPE])
        halts += kind == fl.HALT
        trades += fl.EXECUTION <= kind <= fl.CROSS
        revealed += step.revealed
        if step.line == 1:
            book.load(step.row)
            continue
        if step.n:
            book.apply(step.changes[: step.n].tolist())
        updates += 1
        crossings += bool(crossed(book.top, book.depth))
        found = book.row().ravel()
        wrong = np.flatnonzero(found != _plain(step.row))
        equal += len(wrong) == 0
        if len(wrong) and first is None:
            first = _difference(step, int(wrong[0]), found)
    return Verdict(
        file=str(recording.path),
        venue="lobster",
        symbol=files.symbol,
        lines=lines,
        updates=updates,
        compared=updates,
        equal=equal,
        crossed=crossings,
        gaps=0,
        not_compared={},
        counts={
            "trades": trades,
            "halts": halts,
            "levels": files.levels,
            "revealed_levels": revealed,
        },
        first_difference=first,
    )


def _plain(row: np.ndarray) -> np.ndarray:
    """An orderbook row in which every level that does not exist is written the same way."""
    plain = row.reshape(-1, 4).copy()
    for column, price in ((0, fl.NO_PRICE), (2, -fl.NO_PRICE)):
        missing = (plain[:, column + 1] <= 0) | (np.abs(plain[:, column]) == fl.NO_PRICE)
        plain[missing, column : column + 2] = (price, 0)
    return plain.ravel()


def _difference(step: fl.Step, wrong: int, found: np.ndarray) -> Difference:
    level, column = divmod(wrong, 4)
    name = f"{_COLUMNS[column]}_{level + 1}"
    return Difference(step.line, {name: str(int(step.row[wrong]))}, {name: str(int(found[wrong]))})
