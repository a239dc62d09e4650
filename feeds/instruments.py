# Hot path: free @njit functions over the arrays of an `InstrumentTable`.
"""Which instruments a tape holds: those its header names, and those its messages define.

A live recording's header is written before the feed has defined its instruments, so the ids that
market messages carry are learned from Instrument messages on the way.
"""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import Any, Final

import numpy as np

from feeds import codec, wire
from feeds.describe import field_offset
from feeds.inner import inner
from feeds.rawbytes import load_i8, load_i64, load_u16
from feeds.tape import InstrumentMeta

MAX_INSTRUMENTS: Final = 4_096
NAME_BYTES: Final = 48
NO_KEY: Final = -1

# Columns of `steps`: real price = price_ticks * tick_mantissa * 10^tick_exponent.
TICK_MANTISSA: Final = 0
TICK_EXPONENT: Final = 1
LOT_MANTISSA: Final = 2
LOT_EXPONENT: Final = 3
STEP_FIELDS: Final = 4

# Columns of `state`.
COUNT: Final = 0
LAST_ROW: Final = 1
STATE_FIELDS: Final = 2

_AT_TICK: Final = field_offset(wire.INSTRUMENT_DTYPE, "tick_mantissa")
_AT_LOT: Final = field_offset(wire.INSTRUMENT_DTYPE, "lot_mantissa")
_AT_TICK_EXP: Final = field_offset(wire.INSTRUMENT_DTYPE, "tick_exponent")
_AT_LOT_EXP: Final = field_offset(wire.INSTRUMENT_DTYPE, "lot_exponent")


@inner("int64(uint8[::1], int64, uint8[::1], int64[::1])")
def find_name(buf, at, names, state):  # type: ignore[no-untyped-def]
    """Row of the venue and symbol that stand at ``buf[at:at + 48]``, -1 where unknown."""
    n = state[COUNT]
    for k in range(n):
        row = (state[LAST_ROW] + k) % n
        same = True
        for word in range(0, NAME_BYTES, 8):
            if load_i64(names, row * NAME_BYTES + word) != load_i64(buf, at + word):
                same = False
                break
        if same:
            state[LAST_ROW] = row
            return row
    return -1


@inner("int64(uint8[::1], int64, int64[::1], uint8[::1], int64[:,::1], int64[::1])")
def find_instrument(buf, start, keys, names, steps, state):  # type: ignore[no-untyped-def]
    """Row of the instrument that the checked market message at ``start`` is about.

    An Instrument message of a new name adds a row, one of a known name renews its ids.

    Returns
    -------
    int
        The row; ``len(keys)`` where nothing defined it, or the table is full.
    """
    source_id, instrument_id = wire.instrument_key(buf, start)
    key = (source_id << 32) | instrument_id
    n = state[COUNT]
    if load_u16(buf, start + 2) == wire.INSTRUMENT:
        row = find_name(buf, start + wire.AT_VENUE, names, state)
        if row < 0:
            if n == len(keys):
                return len(keys)
            row = n
            state[COUNT] = n + 1
            for i in range(NAME_BYTES):
                names[row * NAME_BYTES + i] = buf[start + wire.AT_VENUE + i]
        keys[row] = key
        steps[row, TICK_MANTISSA] = load_i64(buf, start + _AT_TICK)
        steps[row, LOT_MANTISSA] = load_i64(buf, start + _AT_LOT)
        steps[row, TICK_EXPONENT] = load_i8(buf, start + _AT_TICK_EXP)
        steps[row, LOT_EXPONENT] = load_i8(buf, start + _AT_LOT_EXP)
        state[LAST_ROW] = row
        return row
    for k in range(n):
        row = (state[LAST_ROW] + k) % n
        if keys[row] == key:
            state[LAST_ROW] = row
            return row
    return len(keys)


class InstrumentTable:
    """Rows of instruments, starting with those of a tape's header.

    Attributes
    ----------
    keys : ndarray of int64, shape (capacity,)
        ``source_id << 32 | instrument_id``, as the bits of an int64.
    names : ndarray of uint8, shape (48 * capacity,)
        Venue and symbol as they stand on the wire.
    steps : ndarray of int64, shape (capacity, STEP_FIELDS)
    state : ndarray of int64, shape (STATE_FIELDS,)
    """

    def __init__(
        self,
        instruments: list[InstrumentMeta] | tuple[InstrumentMeta, ...] = (),
        capacity: int = MAX_INSTRUMENTS,
    ) -> None:
        capacity = max(capacity, len(instruments))
        self.keys = np.full(capacity, NO_KEY, dtype=np.int64)
        self.names = np.zeros(capacity * NAME_BYTES, dtype=np.uint8)
        self.steps = np.zeros((capacity, STEP_FIELDS), dtype=np.int64)
        self.state = np.zeros(STATE_FIELDS, dtype=np.int64)
        for row, item in enumerate(instruments):
            name = codec.ascii_field(item.venue, 16, "tape header: venue")
            name += codec.ascii_field(item.symbol, 32, "tape header: symbol")
            self.names[row * NAME_BYTES : (row + 1) * NAME_BYTES] = np.frombuffer(name, np.uint8)
            key = np.uint64(item.source_id << 32 | item.instrument_id)
            self.keys[row] = key.view(np.int64)
            self.steps[row, :2] = _parts(item.tick)
            self.steps[row, 2:] = _parts(item.lot)
        self.state[COUNT] = len(instruments)

    def __len__(self) -> int:
        return int(self.state[COUNT])

    def name(self, row: int) -> tuple[str, str]:
        """(venue, symbol) of a row."""
        data = self.names[row * NAME_BYTES : (row + 1) * NAME_BYTES].tobytes()
        return (
            data[:16].rstrip(b"\0").decode("ascii", "replace"),
            data[16:].rstrip(b"\0").decode("ascii", "replace"),
        )

    def describe(self, row: int) -> dict[str, Any]:
        """A row in the terms of a tape's header."""
        venue, symbol = self.name(row)
        key = int(self.keys[row : row + 1].view(np.uint64)[0])
        tick, lot = self.steps[row, :2].tolist(), self.steps[row, 2:].tolist()
        return {
            "venue": venue,
            "symbol": symbol,
            "source_id": key >> 32,
            "instrument_id": key & 0xFFFFFFFF,
            "tick": f"{Decimal(tick[0]).scaleb(tick[1]):f}",
            "lot": f"{Decimal(lot[0]).scaleb(lot[1]):f}",
        }


def _parts(text: str) -> tuple[int, int]:
    try:
        return codec.decimal_parts(Decimal(text))
    except (InvalidOperation, AssertionError):
        return 0, 0  # the header did not know it yet
