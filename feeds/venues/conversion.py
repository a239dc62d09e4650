"""What every converter shares: the tape being made, and what came of it.

``source_id`` numbers the venue, ``instrument_id`` is the CRC32C of the symbol, so that tapes of
several instruments can be replayed together.
"""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from feeds import codec, tape
from feeds.crc32c import crc32c
from feeds.errors import InputError
from feeds.tape import InstrumentMeta, TapeMeta
from feeds.tape_writer import TapeWriter
from feeds.venues.json_scan import MAX_DECIMALS
from feeds.venues.recording import Recording

SOURCE_IDS: Final = {
    "binance-usdm": 1,
    "binance-coinm": 2,
    "binance-spot": 3,
    "lobster": 4,
}
VENUES: Final = tuple(SOURCE_IDS)


class Conversion(NamedTuple):
    """A finished conversion; ``counts`` holds what was met on the way and is on no tape."""

    symbol: str
    tick: str
    lot: str
    lines: int
    messages: int
    snapshots: int
    deltas: int
    trades: int
    gaps: int
    counts: dict[str, int]


def instrument_id(symbol: str) -> int:
    """CRC32C of a symbol: the same on every machine, and apart from its neighbours'."""
    return int(crc32c(np.frombuffer(bytearray(symbol.encode()), np.uint8), 0, len(symbol)))


def grid(text: str, option: str) -> tuple[int, int]:
    """Decimal places and units of a tick or lot given by the user.

    Raises
    ------
    InputError
        If it is no positive decimal.
    """
    try:
        value = Decimal(text)
    except InvalidOperation:
        value = Decimal(0)
    if not value.is_finite() or value <= 0:
        raise InputError(
            "not a size", where=option, expected="a positive decimal such as 0.01", found=text
        )
    exponent = value.normalize().as_tuple().exponent
    decimals = max(0, -int(exponent))
    units = int(value.scaleb(decimals))
    if decimals > MAX_DECIMALS or units >= 10**12:
        raise InputError(
            "a size out of range", where=option, expected="10^-12 to 10^12", found=text
        )
    return decimals, units


class Target:
    """The tape being made: opened when the instrument is known, kept valid whatever happens.

    Parameters
    ----------
    recording : Recording
    venue : str
    path : Path
    overwrite : bool
    """

    def __init__(self, recording: Recording, venue: str, path: Path, overwrite: bool) -> None:
        self.recording, self.venue, self.path = recording, venue, path
        self._overwrite = overwrite
        self._writer: TapeWriter | None = None

    def open(self, symbol: str, tick: str, lot: str, created_ns: int) -> TapeWriter:
        """Start the tape, or start it over, with its Instrument message."""
        codec.ascii_field(symbol, 32, f"{self.recording.path}: symbol")
        if self._writer is not None:
            self._writer.close()
            self._overwrite = True
        source, number = SOURCE_IDS[self.venue], instrument_id(symbol)
        meta = TapeMeta(
            created_ns=created_ns,
            source=f"converted from {self.recording.path.name}",
            instruments=[InstrumentMeta(self.venue, symbol, source, number, tick, lot)],
        )
        self._writer = TapeWriter(self.path, meta, overwrite=self._overwrite)
        self._writer.append(
            tape.MARKET,
            created_ns,
            codec.encode_instrument(
                source,
                number,
                1,
                0,
                self.venue,
                symbol,
                Decimal(tick),
                Decimal(lot),
                source_time_ns=created_ns,
            ),
        )
        return self._writer

    def close(self) -> int:
        """Finish the tape; returns its records."""
        assert self._writer is not None, "nothing was opened"
        self._writer.close()
        return self._writer.records

    def abandon(self, error: InputError, worth_keeping: bool) -> InputError:
        """Close what there is after an error: a valid tape, named in the error, or no file."""
        if self._writer is None:
            return error
        self._writer.close()
        if not worth_keeping:
            self.path.unlink(missing_ok=True)
            return error
        kept = f"the {self._writer.records} messages before it are in {self.path}"
        return InputError(
            error.what,
            where=error.where,
            expected=error.expected,
            found=error.found,
            fix=f"{error.fix}; {kept}" if error.fix else kept,
        )
