"""One line of a raw Binance recording, judged with a full JSON decoder.

The scanner in `binance_json` hands over every line that it does not recognise. Such a line
is either well-formed in another way (white space, another order, a stream that is not needed), and
then fills the same fields, or wrong, and then the error says what is wrong with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any, Final

import msgspec
import numpy as np

from feeds.errors import InputError
from feeds.venues import binance_fields as bj
from feeds.venues.json_scan import MAX_DECIMALS
from feeds.wire import AGGRESSOR_BUY, AGGRESSOR_SELL, MAX_LEVELS_A_GROUP

VENUES: Final = {"binance-usdm": bj.USDM, "binance-coinm": bj.COINM, "binance-spot": bj.SPOT}
_NAMES: Final = {code: name for name, code in VENUES.items()}
_DECIMAL: Final = re.compile(r"(\d+)(?:\.(\d+))?")
_MAX_VALUE: Final = 10**18
_MAX_SHOWN: Final = 60


class _Message(msgspec.Struct):
    """Any of the messages; the fields that a kind must have are asked for by `_need`."""

    e: str = ""
    event: int | None = msgspec.field(default=None, name="E")
    engine: int | None = msgspec.field(default=None, name="T")
    symbol_s: str | None = msgspec.field(default=None, name="s")
    symbol: str | None = None
    ps: str | None = None
    pair: str | None = None
    first: int | None = msgspec.field(default=None, name="U")
    last: int | None = msgspec.field(default=None, name="u")
    previous: int | None = msgspec.field(default=None, name="pu")
    last_update: int | None = msgspec.field(default=None, name="lastUpdateId")
    b: Any = None
    a: Any = None
    bid_quantity: str | None = msgspec.field(default=None, name="B")
    ask_quantity: str | None = msgspec.field(default=None, name="A")
    bids: Any = None
    asks: Any = None
    t: int | None = None
    p: str | None = None
    q: str | None = None
    m: bool | None = None
    market: str | None = msgspec.field(default=None, name="X")


class _Bad(Exception):  # noqa: N818 - never leaves this module
    """(what, expected, found, fix) of a bad line."""


class LineDecoder:
    """Decodes single lines into the arrays that the scanner fills.

    Parameters
    ----------
    venue : int
        USDM, COINM or SPOT of `binance_json`.
    fields, levels : ndarray of int64
        As `binance_json.scan_line` fills them.

    Attributes
    ----------
    symbol : str
        Symbol of the last line decoded; "" where the line has none.
    """

    def __init__(self, venue: int, fields: np.ndarray, levels: np.ndarray) -> None:
        self.venue, self.fields, self.levels = venue, fields, levels
        self.symbol = ""
        self._scales = (0, 0)

    def decode(
        self, line: bytes, wanted: str, scales: tuple[int, int], where: Callable[[], str]
    ) -> int:
        """Fill the arrays from ``line`` and return its kind, never UNRECOGNISED.

        Parameters
        ----------
        line : bytes
            Without its newline.
        wanted : str
            The symbol wanted, or "" for any.
        scales : (int, int)
            Decimal places of prices and of quantities.
        where : callable
            Says file, line and offset; called for an error only.

        Raises
        ------
        InputError
            If the line is damaged or of another venue.
        """
        self.fields[:] = 0
        self.fields[bj.PREVIOUS_ID] = -1
        self.fields[bj.ON_BOOK] = 1
        self.symbol = ""
        self._scales = scales
        try:
            kind = self._decode(line, wanted)
        except _Bad as bad:
            what, expected, found, fix = (*bad.args, "", "", "")[:4]
            raise InputError(what, where=where(), expected=expected, found=found, fix=fix) from None
        self.fields[bj.KIND] = kind
        self.fields[bj.HAS_SYMBOL] = self.symbol != ""
        return kind

    def _decode(self, line: bytes, wanted: str) -> int:
        stamp, _, text = line.strip().partition(b" ")
        if not stamp and not text:
            return bj.BLANK
        if not stamp.isdigit() or not 0 < int(stamp) < 2**63:
            raise _Bad("damaged line", "'<receive time in ns> <JSON>'", _shown(line))
        self.fields[bj.RECEIVED_NS] = int(stamp)
        try:
            message = msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _Bad("damaged line", "JSON after the receive time", str(error)) from None
        if isinstance(message, dict) and isinstance(message.get("data"), dict):
            message = message["data"]
        if not isinstance(message, dict):
            return bj.OTHER
        event = message.get("e")
        known = event in ("depthUpdate", "trade", "aggTrade", "bookTicker")
        ticker = "e" not in message and {"u", "s", "b", "B", "a", "A"} <= message.keys()
        if not known and not ticker and "lastUpdateId" not in message:
            return bj.OTHER
        try:
            data = msgspec.convert(message, _Message)
        except msgspec.ValidationError as error:
            raise _Bad("damaged line", "a Binance message", str(error)) from None
        self.symbol = data.symbol_s or data.symbol or ""
        if data.last_update is not None:
            kind = self._snapshot(data)
        elif event == "depthUpdate":
            kind = self._diff(data)
        elif event in ("trade", "aggTrade"):
            kind = self._trade(data)
        else:
            kind = self._ticker(data)
        if self.symbol and wanted and self.symbol != wanted:
            return bj.OTHER_SYMBOL
        return kind

    def _other_venue(self, what: str, found: int) -> _Bad:
        return _Bad(
            f"{what} of another venue",
            _NAMES[self.venue],
            _NAMES[found],
            f"pass --venue {_NAMES[found]}",
        )

    def _ids(self, data: _Message) -> None:
        for name, column, value in (
            ("U", bj.FIRST_ID, data.first),
            ("u", bj.LAST_ID, data.last if data.last is not None else data.last_update),
            ("pu", bj.PREVIOUS_ID, data.previous),
        ):
            if value is not None:
                self.fields[column] = _unsigned(name, value)
        for name, column, value in (
            ("E", bj.EVENT_NS, data.event),
            ("T", bj.ENGINE_NS, data.engine),
        ):
            if value is not None:
                self.fields[column] = bj.time_ns(min(_unsigned(name, value), 2**53))

    def _diff(self, data: _Message) -> int:
        bids, asks = data.b, data.a
        _need(E=data.event, s=data.symbol_s, U=data.first, u=data.last, b=bids, a=asks)
        seems = bj.SPOT if data.previous is None else bj.USDM if data.ps is None else bj.COINM
        if seems != self.venue:
            raise self._other_venue("a depth update", seems)
        self._ids(data)
        if self.fields[bj.FIRST_ID] > self.fields[bj.LAST_ID]:
            raise _Bad("damaged line", "update ids U <= u", f"U {data.first}, u {data.last}")
        self._levels(bids, asks)
        return bj.DIFF

    def _snapshot(self, data: _Message) -> int:
        _need(bids=data.bids, asks=data.asks)
        if (data.pair is not None or data.ps is not None) != (self.venue == bj.COINM):
            found = bj.USDM if self.venue == bj.COINM else bj.COINM
            raise self._other_venue("a REST snapshot", found)
        self._ids(data)
        self._levels(data.bids, data.asks)
        return bj.SNAPSHOT

    def _ticker(self, data: _Message) -> int:
        _need(
            s=data.symbol_s,
            u=data.last,
            b=data.b,
            B=data.bid_quantity,
            a=data.a,
            A=data.ask_quantity,
        )
        seems = bj.SPOT if data.e == "" else bj.USDM if data.ps is None else bj.COINM
        if seems != self.venue:
            raise self._other_venue("a bookTicker", seems)
        self._ids(data)
        fields = self.fields
        fields[bj.BID_PRICE] = self._number(data.b, 0, "a bid price")
        fields[bj.ASK_PRICE] = self._number(data.a, 0, "an ask price")
        fields[bj.BID_QUANTITY] = self._number(data.bid_quantity, 1, "a bid quantity")
        fields[bj.ASK_QUANTITY] = self._number(data.ask_quantity, 1, "an ask quantity")
        return bj.TICKER

    def _trade(self, data: _Message) -> int:
        aggregated = data.e == "aggTrade"
        _need(s=data.symbol_s, T=data.engine, p=data.p, q=data.q, m=data.m)
        trade_id = data.a if aggregated else data.t
        if not isinstance(trade_id, int):
            raise _Bad("damaged line", f"an integer '{'a' if aggregated else 't'}'")
        self._ids(data)
        fields = self.fields
        fields[bj.TRADE_ID] = _unsigned("trade id", trade_id)
        fields[bj.AGGRESSOR] = AGGRESSOR_SELL if data.m else AGGRESSOR_BUY
        fields[bj.PRICE] = self._number(data.p, 0, "a price")
        fields[bj.QUANTITY] = self._number(data.q, 1, "a quantity")
        if data.market not in (None, "MARKET"):
            fields[bj.ON_BOOK] = 0
        if fields[bj.QUANTITY] == 0 and fields[bj.QUANTITY_NEEDS] == 0:
            fields[bj.ON_BOOK] = 0
        if fields[bj.ON_BOOK] and fields[bj.PRICE] == 0 and fields[bj.PRICE_NEEDS] == 0:
            raise _Bad("a price that is not positive", "more than 0", str(data.p))
        return bj.AGG_TRADE if aggregated else bj.TRADE

    def _levels(self, bids: Any, asks: Any) -> None:
        used = 0
        for side, column in ((bids, bj.BIDS), (asks, bj.ASKS)):
            if not isinstance(side, list):
                raise _Bad("damaged line", "a list of [price, quantity]", _shown(side))
            if len(side) > MAX_LEVELS_A_GROUP:
                raise _Bad("too many levels", f"at most {MAX_LEVELS_A_GROUP} a side")
            for level in side:
                if not isinstance(level, list | tuple) or len(level) < 2:
                    raise _Bad("damaged line", "a level [price, quantity]", _shown(level))
                needs = self.fields[bj.PRICE_NEEDS]
                self.fields[bj.PRICE_NEEDS] = 0
                price = self._number(level[0], 0, "a price")
                if price == 0 and self.fields[bj.PRICE_NEEDS] == 0:
                    raise _Bad("a price that is not positive", "more than 0", _shown(level[0]))
                self.fields[bj.PRICE_NEEDS] = max(needs, self.fields[bj.PRICE_NEEDS])
                self.levels[2 * used] = price
                self.levels[2 * used + 1] = self._number(level[1], 1, "a quantity")
                used += 1
            self.fields[column] = len(side)

    def _number(self, text: Any, which: int, name: str) -> int:
        """A decimal in units of 10^-decimals; notes where it does not fit."""
        match = _DECIMAL.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            what = "a number that is no plain decimal"
            if isinstance(text, str) and text.startswith("-"):
                what = "a negative number"
            raise _Bad(what, f"{name} as text of digits", _shown(text))
        whole, fraction = match[1], (match[2] or "")
        decimals = self._scales[which]
        places = len(fraction.rstrip("0"))
        if places > decimals:
            if places > MAX_DECIMALS:
                raise _Bad("a number too fine", f"at most {MAX_DECIMALS} decimals", _shown(text))
            column = bj.QUANTITY_NEEDS if which else bj.PRICE_NEEDS
            self.fields[column] = max(self.fields[column], places)
        value = int(whole + fraction[:decimals].ljust(decimals, "0"))
        if value >= _MAX_VALUE:
            raise _Bad("a number too large", f"less than 10^18 units of 10^-{decimals}", text)
        return value


def find_off_grid(
    line: bytes, tick: Decimal | None, lot: Decimal | None
) -> tuple[str, str, int] | None:
    """The first number of a line off the grid: ("price" or "quantity", its text, its offset).

    A grid of None holds every number.
    """
    message = msgspec.json.decode(line.strip().partition(b" ")[2])
    message = message.get("data", message)
    pairs: list[tuple[str, str]] = []
    for key in ("b", "a", "bids", "asks"):
        value = message.get(key)
        if isinstance(value, str):
            pairs.append(("price", value))
        elif isinstance(value, list):
            for level in value:
                pairs += [("price", level[0]), ("quantity", level[1])]
    pairs += [("price", message[key]) for key in ("p",) if key in message]
    pairs += [("quantity", message[key]) for key in ("q", "B", "A") if key in message]
    for name, text in pairs:
        step = tick if name == "price" else lot
        if step is not None and Decimal(text) % step != 0:
            return name, text, max(line.find(f'"{text}"'.encode()), 0)
    return None


def _unsigned(name: str, value: int) -> int:
    if not 0 <= value < 2**63:
        raise _Bad("damaged line", f"'{name}' between 0 and 2^63 - 1", str(value))
    return value


def _need(**values: Any) -> None:
    missing = [name for name, value in values.items() if value is None]
    if missing:
        raise _Bad("damaged line", f"'{missing[0]}' in the message", "none")


def _shown(value: Any) -> str:
    text = value.decode("ascii", "replace") if isinstance(value, bytes) else repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
