"""An order book as it is mostly written in Python: a dict a side, and its prices kept sorted.

The yardstick of what compiled books gain. It is fed with decoded messages, Python integers in
lists of tuples, so it has neither bytes to parse nor losses to find.
"""

from __future__ import annotations

import platform
import time
from bisect import bisect_left, insort
from typing import Final, NamedTuple

import numpy as np

from benchmarks.book_replay import (
    KIND_ASK,
    KIND_BID,
    KIND_CLEAR,
    KIND_TRADE,
    ROW_KIND,
    ROW_MESSAGE,
    ROW_PRICE,
    ROW_QUANTITY,
    ROW_SLOT,
)


class BookMessage(NamedTuple):
    """A decoded message: levels are (price in ticks, quantity in lots), 0 lots remove one."""

    slot: int
    snapshot: bool
    bids: list[tuple[int, int]]
    asks: list[tuple[int, int]]


class DictBook:
    """Both sides of one book.

    Attributes
    ----------
    quantities : tuple of dict
        Price in ticks → quantity in lots; bids, asks.
    prices : tuple of list
        Prices of each side in ascending order.
    """

    def __init__(self) -> None:
        self.quantities: tuple[dict[int, int], dict[int, int]] = ({}, {})
        self.prices: tuple[list[int], list[int]] = ([], [])

    def apply(self, message: BookMessage) -> None:
        """Set the levels of a message; a snapshot replaces all."""
        if message.snapshot:
            for side in range(2):
                self.quantities[side].clear()
                self.prices[side].clear()
        for quantities, prices, levels in zip(
            self.quantities, self.prices, (message.bids, message.asks), strict=True
        ):
            for price, quantity in levels:
                if quantity:
                    if price not in quantities:
                        insort(prices, price)
                    quantities[price] = quantity
                elif price in quantities:
                    del quantities[price]
                    del prices[bisect_left(prices, price)]

    def levels(self, side: int) -> np.ndarray:
        """All levels of a side, best first: int64 of shape (levels, 2), price and quantity."""
        prices = self.prices[side] if side else self.prices[side][::-1]
        pairs = [(price, self.quantities[side][price]) for price in prices]
        return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def decoded_messages(rows: np.ndarray) -> list[BookMessage]:
    """The applied rows of `benchmarks.book_replay` as messages of Python integers, no trades."""
    levels = rows[rows[:, ROW_KIND] < KIND_TRADE]
    messages: list[BookMessage] = []
    last = -1
    columns = (ROW_MESSAGE, ROW_SLOT, ROW_KIND, ROW_PRICE, ROW_QUANTITY)
    for number, slot, kind, price, quantity in levels[:, columns].tolist():
        if number != last:
            last = number
            messages.append(BookMessage(slot, kind == KIND_CLEAR, [], []))
        if kind == KIND_BID:
            messages[-1].bids.append((price, quantity))
        elif kind == KIND_ASK:
            messages[-1].asks.append((price, quantity))
    return messages


class DictBooks:
    """Books of all instruments over the applied rows of `benchmarks.book_replay`.

    Parameters
    ----------
    rows : ndarray of int64, shape (n, ROW_FIELDS)
        Decoded here, once.

    Attributes
    ----------
    books : list of DictBook
        By slot, after the last run.
    """

    def __init__(self, rows: np.ndarray) -> None:
        self.library = f"dict book, CPython {platform.python_version()}"
        self.books: list[DictBook] = []
        self._messages: Final = decoded_messages(rows)
        self._count: Final = 1 + max((message.slot for message in self._messages), default=-1)

    def run(self) -> float:
        """Take all messages into new books; returns the seconds it took."""
        books = self.books = [DictBook() for _ in range(self._count)]
        started = time.perf_counter()
        for message in self._messages:
            books[message.slot].apply(message)
        return time.perf_counter() - started

    def check(self, slot: int, bids: np.ndarray, asks: np.ndarray) -> None:
        """Assert that an instrument's book is this one, level by level."""
        book = self.books[slot] if slot < len(self.books) else DictBook()
        for side, levels in enumerate((bids, asks)):
            assert np.array_equal(book.levels(side), levels), "the dict book has other levels"
