"""A small Binance in memory that writes recordings, lines as ``<receive ns> <JSON>``.

It keeps the true book, so a test can ask what a correct conversion must say.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

START_MS = 1_700_000_000_000
COMPACT = (",", ":")


class MockBinance:
    """One symbol on ``binance-usdm``, ``binance-coinm`` or ``binance-spot``.

    Attributes
    ----------
    bids, asks : dict
        The true book: price in ticks to quantity in lots.
    """

    def __init__(
        self,
        venue: str,
        symbol: str = "TESTUSDT",
        *,
        seed: int = 1,
        price_decimals: int = 2,
        quantity_decimals: int = 3,
    ) -> None:
        self.venue, self.symbol = venue, symbol
        self.spot, self.coinm = venue == "binance-spot", venue == "binance-coinm"
        self.price_decimals, self.quantity_decimals = price_decimals, quantity_decimals
        self.random = random.Random(seed)
        self.bids = {10_000 - i: self._lots() for i in range(1, 60)}
        self.asks = {10_000 + i: self._lots() for i in range(1, 60)}
        self.update_id = 1_000_000
        self.diff_id = self.update_id
        self.now_ms = START_MS
        self.changed: tuple[dict[int, int], dict[int, int]] = ({}, {})
        self.trade_id = 500
        self.first_id = 0
        self._stated = self.top()
        self._received_ns = 0

    def _lots(self) -> int:
        return self.random.randint(1, 5_000)

    def top(self) -> tuple[int, int, int, int]:
        """Best bid and quantity, best ask and quantity."""
        bid, ask = max(self.bids), min(self.asks)
        return bid, self.bids[bid], ask, self.asks[ask]

    def price(self, ticks: int) -> str:
        """Ticks as the exchange writes them."""
        return f"{ticks / 10**self.price_decimals:.{self.price_decimals}f}"

    def quantity(self, lots: int) -> str:
        """Lots as the exchange writes them."""
        return f"{lots / 10**self.quantity_decimals:.{self.quantity_decimals}f}"

    def receive_ns(self) -> int:
        """Receive time of what is sent now; the clocks differ, as they do."""
        now_ns = self.now_ms * 1_000_000 - 1_270_000_000 + self.random.randint(0, 999_999)
        self._received_ns = max(self._received_ns + 1, now_ns)
        return self._received_ns

    def line(self, message: dict[str, Any]) -> bytes:
        """One line of a recording."""
        return f"{self.receive_ns()} {json.dumps(message, separators=COMPACT)}".encode()

    def _stream(self, name: str, data: dict[str, Any]) -> bytes:
        return self.line({"stream": f"{self.symbol.lower()}@{name}", "data": data})

    def change(self, side: int, ticks: int, lots: int) -> list[bytes]:
        """Change one level; gives the ticker's line where that moves the top of the book."""
        book = (self.bids, self.asks)[side]
        self.update_id += 1 if self.spot else self.random.randint(1, 4)
        if not self.changed[0] and not self.changed[1]:
            self.first_id = self.update_id
        if lots:
            book[ticks] = lots
        else:
            book.pop(ticks, None)
        self.changed[side][ticks] = lots
        top = self.top()
        if top == self._stated:
            return []
        self._stated = top
        return [self.ticker()]

    def ticker(self) -> bytes:
        """The bookTicker as of now."""
        bid, bid_lots, ask, ask_lots = self.top()
        data: dict[str, Any] = {"u": self.update_id, "s": self.symbol}
        if not self.spot:
            data = {"e": "bookTicker", **data}
        if self.coinm:
            data["ps"] = "TESTUSD"
        data |= {
            "b": self.price(bid),
            "B": self.quantity(bid_lots),
            "a": self.price(ask),
            "A": self.quantity(ask_lots),
        }
        if not self.spot:
            data |= {"T": self.now_ms, "E": self.now_ms + 1}
        return self._stream("bookTicker", data)

    def diff(self) -> bytes:
        """Everything that changed since the last diff."""
        data: dict[str, Any] = {"e": "depthUpdate", "E": self.now_ms + 2}
        if not self.spot:
            data["T"] = self.now_ms
        data["s"] = self.symbol
        if self.coinm:
            data["ps"] = "TESTUSD"
        first = self.diff_id + 1 if self.spot else (self.first_id or self.update_id)
        data |= {"U": first, "u": self.update_id}
        if not self.spot:
            data["pu"] = self.diff_id
        for key, levels in zip("ba", self.changed, strict=True):
            data[key] = [[self.price(p), self.quantity(q)] for p, q in sorted(levels.items())]
        self.diff_id = self.update_id
        self.changed = ({}, {})
        self.first_id = 0
        return self._stream("depth@0ms", data)

    def snapshot(self, depth: int = 1000) -> bytes:
        """The REST order book as of now."""
        data: dict[str, Any] = {"lastUpdateId": self.update_id}
        if not self.spot:
            data |= {"E": self.now_ms + 1, "T": self.now_ms}
        if self.coinm:
            data |= {"symbol": self.symbol, "pair": "TESTUSD"}
        for key, book, reverse in (("bids", self.bids, True), ("asks", self.asks, False)):
            prices = sorted(book, reverse=reverse)[:depth]
            data[key] = [[self.price(p), self.quantity(book[p])] for p in prices]
        return self.line(data)

    def trade(self, lots: int = 7, maker: bool = True, **more: Any) -> bytes:
        """A trade at the best bid or ask."""
        self.trade_id += 1
        price = self.top()[0 if maker else 2]
        data: dict[str, Any] = {
            "e": "trade", "E": self.now_ms + 1, "T": self.now_ms, "s": self.symbol,
            "t": self.trade_id, "p": self.price(price), "q": self.quantity(lots),
        }  # fmt: skip
        if self.spot:
            data |= {"m": maker, "M": True}
        else:
            data |= {"X": "MARKET", "m": maker}
        return self._stream("trade", data | more)

    def activity(self, changes: int = 8) -> list[bytes]:
        """Some changes near the top with their tickers, sometimes a trade."""
        lines: list[bytes] = []
        for _ in range(changes):
            self.now_ms += self.random.randint(0, 3)
            side = self.random.randint(0, 1)
            bid, _, ask, _ = self.top()
            far = self.random.randint(0, 12)
            ticks = min(bid + 2 - far, ask - 1) if side == 0 else max(ask - 2 + far, bid + 1)
            alone = len((self.bids, self.asks)[side]) < 20
            remove = self.random.random() < 0.45 and not alone
            lines += self.change(side, ticks, 0 if remove else self._lots())
            if self.random.random() < 0.2:
                lines.append(self.trade(maker=self.random.random() < 0.5))
        return lines

    def session(self, diffs: int = 60, *, before: int = 5, late: int = 2) -> list[bytes]:
        """A recording: ``before`` diffs, the snapshot, then more diffs.

        The snapshot is taken ``late`` diffs before it arrives, so that many must be kept.
        """
        lines = [self.ticker()]
        held = b""
        for i in range(diffs):
            lines += self.activity()
            if i == before - late:
                held = self.snapshot()
            lines.append(self.diff())
            if i == before:
                lines.append(self.line(message(held)))
        lines += self.change(0, self.top()[0], self._lots())
        return lines


def write(path: Path, lines: Iterable[bytes]) -> Path:
    """A plain recording."""
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def edit(line: bytes, **changes: Any) -> bytes:
    """A line with fields of its message replaced; None removes one."""
    stamp, _, text = line.partition(b" ")
    message = json.loads(text)
    data = message.get("data", message)
    for key, value in changes.items():
        if value is None:
            del data[key]
        else:
            data[key] = value
    return stamp + b" " + json.dumps(message, separators=COMPACT).encode()


def message(line: bytes) -> dict[str, Any]:
    """The message of a line, without its stream."""
    found = json.loads(line.partition(b" ")[2])
    data: dict[str, Any] = found.get("data", found)
    return data


def is_diff(line: bytes) -> bool:
    """True for a depth diff."""
    return message(line).get("e") == "depthUpdate"


def is_snapshot(line: bytes) -> bool:
    """True for a REST snapshot."""
    return "lastUpdateId" in message(line)
