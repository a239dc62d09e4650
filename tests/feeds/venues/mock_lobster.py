"""A limit order book in memory that writes LOBSTER's two files."""

from __future__ import annotations

import random
from pathlib import Path

NO_PRICE = 9_999_999_999


class MockLobster:
    """Orders of any depth; the files know the best ``levels`` of each side.

    Attributes
    ----------
    messages, rows : list of str
        Lines of the two files.
    """

    def __init__(self, levels: int = 3, seed: int = 1, date: str = "2012-06-21") -> None:
        self.levels, self.date = levels, date
        self.random = random.Random(seed)
        self.books: tuple[dict[int, int], dict[int, int]] = ({}, {})
        self.messages: list[str] = []
        self.rows: list[str] = []
        self.now_ns = 34_200_000_000_000
        for i in range(1, 8):
            self.books[0][1_000_000 - 100 * i] = 100 * i
            self.books[1][1_000_000 + 100 * i] = 100 * i

    def visible(self, side: int) -> list[tuple[int, int]]:
        """The best levels of a side, best first."""
        book = self.books[side]
        prices = sorted(book, reverse=side == 0)[: self.levels]
        return [(price, book[price]) for price in prices]

    def row(self) -> str:
        """The orderbook file's line as of now."""
        bids, asks = self.visible(0), self.visible(1)
        cells: list[int] = []
        for i in range(self.levels):
            cells += asks[i] if i < len(asks) else (NO_PRICE, 0)
            cells += bids[i] if i < len(bids) else (-NO_PRICE, 0)
        return ",".join(map(str, cells))

    def write_line(self, kind: int, size: int, price: int, direction: int) -> None:
        """One event in both files."""
        self.now_ns += self.random.randint(0, 5_000_000)
        seconds, ns = divmod(self.now_ns, 1_000_000_000)
        time = f"{seconds}.{ns:09d}".rstrip("0").rstrip(".")
        order = self.random.randint(1, 10**8)
        self.messages.append(f"{time},{kind},{order},{size},{price},{direction}")
        self.rows.append(self.row())

    def event(self) -> None:
        """A random event; written where it shows, as LOBSTER does."""
        side = self.random.randint(0, 1)
        book, direction = self.books[side], 1 if side == 0 else -1
        best = [max(self.books[0], default=999_900), min(self.books[1], default=1_000_100)]
        draw = self.random.random()
        before = self.row()
        if draw < 0.1:
            self.write_line(5, self.random.randint(1, 50), best[0] + 50, direction)
            return
        if draw < 0.55 or len(book) < 2:
            away = 100 * self.random.randint(-1, 6)
            price = best[side] - away if side == 0 else best[side] + away
            if (side == 0 and price >= best[1]) or (side == 1 and price <= best[0]):
                return
            size = self.random.randint(1, 300)
            book[price] = book.get(price, 0) + size
            kind = 1
        else:
            price = self.random.choice(sorted(book, reverse=side == 0)[:4])
            kind = self.random.choice((2, 3, 3, 4))
            if kind == 4:
                price = best[side]
            size = book[price] if kind == 3 else self.random.randint(1, book[price])
            book[price] -= size
            if book[price] == 0:
                del book[price]
        if self.row() != before:
            self.write_line(kind, size, price, direction)

    def session(self, events: int = 400) -> MockLobster:
        """Events until so many lines are written."""
        while len(self.messages) < events:
            self.event()
        return self

    def save(self, folder: Path) -> Path:
        """Write both files; gives the message file."""
        name = f"TEST_{self.date}_34200000_57600000_{{}}_{self.levels}.csv"
        for kind, lines in (("message", self.messages), ("orderbook", self.rows)):
            (folder / name.format(kind)).write_text("".join(line + "\n" for line in lines))
        return folder / name.format("message")
