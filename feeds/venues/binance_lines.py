"""Walks a raw Binance recording: blocks of lines through the scanner, the rest through the decoder.

What is done with the lines is up to a `Sink`: the converter writes a tape, the checker rebuilds
the book, the survey finds symbol, tick and lot.
"""

from __future__ import annotations

from decimal import Decimal
from functools import partial
from typing import Final, NamedTuple, Protocol

import numpy as np

from feeds.errors import InputError
from feeds.venues.binance_decode import LineDecoder, find_off_grid
from feeds.venues.binance_fields import (
    PRICE_NEEDS,
    QUANTITY_NEEDS,
)
from feeds.venues.json_scan import line_end
from feeds.venues.recording import Block, Recording

# What stops a native walk over lines.
DONE: Final = 0
SLOW: Final = 1  # a line for the full decoder
FINER: Final = 2  # a number off the grid of tick and lot
STRANGER: Final = 3  # another symbol, where one was expected
UNSORTED: Final = 4  # a snapshot out of order
NAMELESS: Final = 5  # a snapshot without a symbol among several symbols

MAX_SYMBOLS_SHOWN: Final = 8


class Scale(NamedTuple):
    """Tick and lot: ``tick = tick_units * 10^-price_decimals``, the lot likewise."""

    price_decimals: int
    tick_units: int
    quantity_decimals: int
    lot_units: int

    @property
    def tick(self) -> Decimal:
        """Tick as an exact decimal."""
        return Decimal(self.tick_units).scaleb(-self.price_decimals)

    @property
    def lot(self) -> Decimal:
        """Lot as an exact decimal."""
        return Decimal(self.lot_units).scaleb(-self.quantity_decimals)


class TooFine(Exception):  # noqa: N818 - a request to start over, not an error
    """A later number needs more decimal places than the survey found.

    Parameters
    ----------
    price_decimals, quantity_decimals : int
        What the number needs; 0 where it fits.
    """

    def __init__(self, price_decimals: int, quantity_decimals: int) -> None:
        super().__init__(price_decimals, quantity_decimals)
        self.price_decimals, self.quantity_decimals = price_decimals, quantity_decimals


class Sink(Protocol):
    """What takes the lines in; ``fields`` and ``levels`` are those of `binance_json.scan_line`."""

    fields: np.ndarray
    levels: np.ndarray

    def lines(self, buf: np.ndarray, position: int, stop: int) -> tuple[int, int]:
        """Take lines until ``stop`` or until one asks for more; (position, status)."""

    def event(self) -> int:
        """Take the one line that the decoder put into ``fields`` and ``levels``; its status."""


def encode_symbol(symbol: str) -> np.ndarray:
    """A symbol as the scanner compares it, uint8 of shape (n,)."""
    return np.frombuffer(bytearray(symbol.encode()), dtype=np.uint8)


def walk(
    recording: Recording,
    sink: Sink,
    venue: int,
    symbol: str,
    scale: Scale,
    *,
    given: tuple[bool, bool] = (False, False),
) -> None:
    """Feed every line of a recording to a sink.

    Parameters
    ----------
    symbol : str
        The instrument.
    scale : Scale
        Its grid.
    given : (bool, bool)
        Which of tick and lot the user gave: a number off that grid is an error.

    Raises
    ------
    TooFine
        If a number is off a grid that was only surveyed.
    InputError
        At the first line that cannot be used.
    """
    decoder = LineDecoder(venue, sink.fields, sink.levels)
    for block in recording.blocks():
        walk_block(recording, block, sink, decoder, symbol, scale, given)


def walk_block(
    recording: Recording,
    block: Block,
    sink: Sink,
    decoder: LineDecoder,
    symbol: str,
    scale: Scale,
    given: tuple[bool, bool],
) -> None:
    """`walk` for one block."""
    position = 0
    while position < block.stop:
        position, status = sink.lines(block.buf, position, block.stop)
        if status == DONE:
            continue
        line = block.buf[position : line_end(block.buf, position)].tobytes()
        after = position + len(line) + 1
        if status == SLOW:
            where = partial(recording.where, block, position)
            decoder.decode(line, symbol, (scale.price_decimals, scale.quantity_decimals), where)
            status = sink.event()
            if status == DONE:
                position = after
                continue
        if status == FINER:
            raise _off_grid(recording, block, position, line, scale, given) or TooFine(
                int(sink.fields[PRICE_NEEDS]), int(sink.fields[QUANTITY_NEEDS])
            )
        raise _stopped(recording, recording.where(block, position), line, status, symbol)


def _off_grid(
    recording: Recording,
    block: Block,
    position: int,
    line: bytes,
    scale: Scale,
    given: tuple[bool, bool],
) -> InputError | None:
    """The error for a number off a grid that the user gave, if it is off one."""
    culprit = find_off_grid(line, scale.tick if given[0] else None, scale.lot if given[1] else None)
    if culprit is None:
        return None
    name, text, offset = culprit
    step, option = (scale.tick, "--tick") if name == "price" else (scale.lot, "--lot")
    return InputError(
        f"a {name} off the grid",
        where=recording.where(block, position + offset),
        expected=f"a multiple of {step:f}",
        found=text,
        fix=f"leave out {option} to have it found",
    )


def _stopped(recording: Recording, where: str, line: bytes, status: int, symbol: str) -> InputError:
    if status == STRANGER:
        found = ", ".join(symbols_of([line], recording))
        return InputError(
            "several symbols in one recording",
            where=where,
            expected=symbol,
            found=found,
            fix="pass --symbol to take one of them",
        )
    if status == NAMELESS:
        return InputError(
            "a REST snapshot that does not say its symbol, among several symbols",
            where=where,
            fix="split the recording by symbol",
        )
    assert status == UNSORTED
    return InputError(
        "a snapshot out of order", where=where, expected="bids that fall and asks that rise"
    )


def symbols_of(lines: list[bytes], recording: Recording) -> list[str]:
    """Symbols that lines name, in order of appearance; at most `MAX_SYMBOLS_SHOWN`."""
    found: dict[str, None] = {}
    for line in lines:
        for key in (b'"s":', b'"symbol":'):
            _, hit, rest = line.partition(key)
            text = rest.lstrip().strip(b'"').split(b'"', 1)[0]
            if hit and text and len(found) < MAX_SYMBOLS_SHOWN:
                found[text.decode("ascii", "replace")[:32]] = None
    return list(found)
