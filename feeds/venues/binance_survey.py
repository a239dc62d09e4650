# Hot path: free @njit functions; the driver at the end is for the cold path.
"""What tick, lot and symbol a Binance recording has: found from its numbers' decimal places.

The exchange writes prices and quantities as decimals with at most the places of the instrument's
filters ("Exchange Information", developers.binance.com), so the data tells its own grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple, TypeVar

import numpy as np
from numba import njit

from feeds.errors import InputError
from feeds.venues import binance_fields as bj
from feeds.venues.binance_decode import LineDecoder
from feeds.venues.binance_fields import (
    BLANK,
    DIFF,
    HAS_SYMBOL,
    KIND,
    NEXT,
    OTHER,
    OTHER_SYMBOL,
    PRICE_NEEDS,
    QUANTITY_NEEDS,
    RECEIVED_NS,
    SNAPSHOT,
    UNRECOGNISED,
)
from feeds.venues.binance_json import scan_line
from feeds.venues.binance_lines import (
    DONE,
    SLOW,
    STRANGER,
    Scale,
    TooFine,
    encode_symbol,
    symbols_of,
    walk_block,
)
from feeds.venues.conversion import grid
from feeds.venues.recording import Recording

MAX_RESTARTS: Final = 2

Result = TypeVar("Result")


class Survey(NamedTuple):
    """What a recording asks for: its symbol, and the decimal places of its numbers."""

    symbol: str
    price_decimals: int
    quantity_decimals: int
    first_received_ns: int


# Columns of the survey's findings, int64.
_F_PRICE: Final = 0
_F_QUANTITY: Final = 1
_F_FIRST: Final = 2
_F_BOOKS: Final = 3
_F_OTHERS: Final = 4
_F_NAMED: Final = 5
_F_FIELDS: Final = 6


@njit("int64(int64[::1], int64[::1], int64)", cache=True)
def survey_event(fields, findings, many):  # type: ignore[no-untyped-def]
    """Take note of one line's decimal places."""
    kind = fields[KIND]
    if kind == BLANK or kind == OTHER:
        return DONE
    if kind == OTHER_SYMBOL:
        findings[_F_OTHERS] += 1
        return DONE if many else STRANGER
    findings[_F_PRICE] = max(findings[_F_PRICE], fields[PRICE_NEEDS])
    findings[_F_QUANTITY] = max(findings[_F_QUANTITY], fields[QUANTITY_NEEDS])
    if findings[_F_FIRST] == 0:
        findings[_F_FIRST] = fields[RECEIVED_NS]
    if fields[HAS_SYMBOL]:
        findings[_F_NAMED] += 1
        findings[_F_BOOKS] += kind == DIFF or kind == SNAPSHOT
    return DONE


@njit(
    "UniTuple(int64, 2)(uint8[::1], int64, int64, int64, uint8[::1], int64[::1], int64[::1],"
    " int64[::1], int64)",
    cache=True,
)
def survey_lines(  # type: ignore[no-untyped-def]
    buf, position, stop, venue, symbol, fields, levels, findings, many
):
    """Take note of the lines' decimal places; scanned at 0 places, every other place is needed."""
    while position < stop:
        if scan_line(buf, position, venue, 0, 0, symbol, fields, levels) == UNRECOGNISED:
            return position, SLOW
        status = survey_event(fields, findings, many)
        if status != DONE:
            return position, status
        position = fields[NEXT]
    return position, DONE


class _SurveySink:
    def __init__(self, venue: int, symbol: str, many: bool, decoder_symbol: LineDecoder) -> None:
        self.fields, self.levels = decoder_symbol.fields, decoder_symbol.levels
        self.symbol = symbol
        self.findings = np.zeros(_F_FIELDS, dtype=np.int64)
        self._venue, self._many, self._decoder = venue, many, decoder_symbol

    def lines(self, buf: np.ndarray, position: int, stop: int) -> tuple[int, int]:
        return survey_lines(
            buf,
            position,
            stop,
            self._venue,
            encode_symbol(self.symbol),
            self.fields,
            self.levels,
            self.findings,
            int(self._many),
        )

    def event(self) -> int:
        if not self.symbol and self.fields[HAS_SYMBOL]:
            self.symbol = self._decoder.symbol
        elif self.symbol and self._decoder.symbol not in ("", self.symbol):
            self.fields[KIND] = OTHER_SYMBOL
        return survey_event(self.fields, self.findings, int(self._many))


def with_grid(
    recording: Recording,
    venue: int,
    symbol: str | None,
    tick: str | None,
    lot: str | None,
    work: Callable[[Survey, Scale], Result],
) -> Result:
    """Do ``work`` on the least grid that holds every number of a recording, or on the given one.

    The survey looks at the first block only. Where a later number does not fit, the work starts
    over on a finer grid; after `MAX_RESTARTS` the whole recording is surveyed first. The same grid
    comes out whatever the block size.
    """
    found = survey(recording, venue, symbol)
    for restarts in range(MAX_RESTARTS + 2):
        price = grid(tick, "--tick") if tick is not None else (found.price_decimals, 1)
        quantity = grid(lot, "--lot") if lot is not None else (found.quantity_decimals, 1)
        try:
            return work(found, Scale(*price, *quantity))
        except TooFine as finer:
            if restarts >= MAX_RESTARTS:
                found = survey(recording, venue, symbol, whole=True)
            else:
                found = found._replace(
                    price_decimals=max(found.price_decimals, finer.price_decimals),
                    quantity_decimals=max(found.quantity_decimals, finer.quantity_decimals),
                )
    raise AssertionError("a whole survey holds every number")


def survey(recording: Recording, venue: int, symbol: str | None, *, whole: bool = False) -> Survey:
    """Find symbol, decimal places and first receive time.

    Reads the first block that holds book data, or the whole recording. A bad line after book data
    ends the survey without an error: whoever reads the recording meets it again.

    Raises
    ------
    InputError
        If there is no book data of the symbol, or a bad line before it.
    """
    decoder = LineDecoder(venue, bj.new_fields(), bj.new_levels())
    sink = _SurveySink(venue, symbol or "", symbol is not None, decoder)
    findings = sink.findings
    scale = Scale(0, 1, 0, 1)
    first_lines: list[bytes] = []
    try:
        for block in recording.blocks():
            if not first_lines:
                first_lines = block.buf[: block.stop].tobytes().split(b"\n", 1000)[:1000]
            walk_block(recording, block, sink, decoder, sink.symbol, scale, (False, False))
            if findings[_F_BOOKS] and sink.symbol and not whole:
                break
    except InputError as error:
        several = error.what.startswith("several")
        if several or not findings[_F_BOOKS] or not sink.symbol:
            raise
    if symbol is not None and not findings[_F_NAMED] and findings[_F_OTHERS]:
        raise InputError(
            "unknown symbol",
            where=str(recording.path),
            expected=symbol,
            found=", ".join(symbols_of(first_lines, recording)),
            fix="pass one of those to --symbol",
        )
    if not findings[_F_BOOKS] or not sink.symbol:
        raise InputError(
            "no order book data",
            where=f"{recording.path} ({recording.lines} lines)",
            expected="lines '<receive ns> <JSON>' with depthUpdate messages",
            fix="check --venue, and that this is a raw recording",
        )
    return Survey(
        sink.symbol,
        int(findings[_F_PRICE]),
        int(findings[_F_QUANTITY]),
        int(findings[_F_FIRST]),
    )
