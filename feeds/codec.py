"""Build and read whole messages: the cold path of the wire.

The hot path reads fields in place with the offsets of `feeds.wire`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from decimal import Decimal
from typing import Final

import numpy as np

from feeds.errors import InputError
from feeds.wire import (
    DELTA,
    GROUP_HEADER_BYTES,
    HEADER_BYTES,
    HEARTBEAT,
    INSTRUMENT,
    INSTRUMENT_BLOCK,
    LEVEL_BYTES,
    LEVEL_DTYPE,
    MAX_LEVELS_A_GROUP,
    OUTPUT_BYTES,
    PREFIX_BYTES,
    REJECT,
    REJECT_BLOCK,
    SCHEMA_ID,
    SCHEMA_VERSION,
    SNAPSHOT,
    SNAPSHOT_REQUEST,
    TIMER,
    TIMER_BLOCK,
    TRADE,
    TRADE_BLOCK,
)

_HEADER: Final = struct.Struct("<HHHH")
_PREFIX: Final = struct.Struct("<IIQQqqQ")
_GROUP: Final = struct.Struct("<HH")

Levels = Iterable[tuple[int, int]]


def header(template: int, block: int) -> bytes:
    """The 8-byte SBE message header."""
    return _HEADER.pack(block, template, SCHEMA_ID, SCHEMA_VERSION)


def _prefix(
    template: int,
    block: int,
    source_id: int,
    instrument_id: int,
    epoch: int,
    seq: int,
    exchange_time_ns: int,
    source_time_ns: int,
    flags: int,
) -> bytes:
    return header(template, block) + _PREFIX.pack(
        source_id, instrument_id, epoch, seq, exchange_time_ns, source_time_ns, flags
    )


def _levels(levels: Levels) -> bytes:
    array = np.array(list(levels), dtype="<i8").reshape(-1, 2)
    if len(array) > MAX_LEVELS_A_GROUP:
        raise InputError(
            "too many levels in one message",
            where="wire",
            expected=f"at most {MAX_LEVELS_A_GROUP} a side",
            found=str(len(array)),
        )
    return _GROUP.pack(LEVEL_BYTES, len(array)) + array.tobytes()


def encode_book(
    template: int,
    source_id: int,
    instrument_id: int,
    epoch: int,
    seq: int,
    exchange_time_ns: int,
    source_time_ns: int,
    bids: Levels,
    asks: Levels,
    flags: int = 0,
) -> bytes:
    """A Snapshot or Delta; ``bids`` and ``asks`` are (price_ticks, quantity_lots), best first."""
    assert template in (SNAPSHOT, DELTA)
    return (
        _prefix(
            template,
            PREFIX_BYTES,
            source_id,
            instrument_id,
            epoch,
            seq,
            exchange_time_ns,
            source_time_ns,
            flags,
        )
        + _levels(bids)
        + _levels(asks)
    )


def encode_trade(
    source_id: int,
    instrument_id: int,
    epoch: int,
    seq: int,
    exchange_time_ns: int,
    source_time_ns: int,
    price_ticks: int,
    quantity_lots: int,
    trade_id: int,
    aggressor: int,
    flags: int = 0,
) -> bytes:
    """A Trade."""
    return _prefix(
        TRADE,
        TRADE_BLOCK,
        source_id,
        instrument_id,
        epoch,
        seq,
        exchange_time_ns,
        source_time_ns,
        flags,
    ) + struct.pack("<qqQB7x", price_ticks, quantity_lots, trade_id, aggressor)


def encode_heartbeat(
    source_id: int,
    instrument_id: int,
    epoch: int,
    seq: int,
    exchange_time_ns: int,
    source_time_ns: int,
    flags: int = 0,
) -> bytes:
    """A Heartbeat; ``seq`` is that of the last message sent."""
    return _prefix(
        HEARTBEAT,
        PREFIX_BYTES,
        source_id,
        instrument_id,
        epoch,
        seq,
        exchange_time_ns,
        source_time_ns,
        flags,
    )


def decimal_parts(value: Decimal) -> tuple[int, int]:
    """Mantissa and exponent of an exact decimal: ``Decimal("0.010")`` is (1, -2)."""
    sign, digits, exponent = value.normalize().as_tuple()
    assert isinstance(exponent, int), f"{value} is no finite number"
    mantissa = int("".join(map(str, digits)))
    return (-mantissa if sign else mantissa), exponent


def decimal_text(mantissa: int, exponent: int) -> str:
    """The exact decimal of a mantissa and exponent as text: (1, -2) is "0.01"."""
    return f"{Decimal(int(mantissa)).scaleb(int(exponent)):f}"


def ascii_field(text: str, length: int, where: str) -> bytes:
    """``text`` as a fixed char field, padded with NUL; refuses what does not fit."""
    if not text or len(text) > length or not text.isascii() or not text.isprintable():
        raise InputError(
            "a name that does not fit the wire",
            where=where,
            expected=f"1 to {length} printable ASCII characters",
            found=repr(text),
        )
    return text.encode().ljust(length, b"\0")


def encode_instrument(
    source_id: int,
    instrument_id: int,
    epoch: int,
    seq: int,
    venue: str,
    symbol: str,
    tick: Decimal,
    lot: Decimal,
    exchange_time_ns: int = 0,
    source_time_ns: int = 0,
    flags: int = 0,
) -> bytes:
    """An Instrument; ``seq`` is that of the last message sent, it takes no number of its own."""
    (tick_mantissa, tick_exponent), (lot_mantissa, lot_exponent) = (
        decimal_parts(tick),
        decimal_parts(lot),
    )
    return _prefix(
        INSTRUMENT,
        INSTRUMENT_BLOCK,
        source_id,
        instrument_id,
        epoch,
        seq,
        exchange_time_ns,
        source_time_ns,
        flags,
    ) + struct.pack(
        "<16s32sqqbb6x",
        ascii_field(venue, 16, "venue"),
        ascii_field(symbol, 32, "symbol"),
        tick_mantissa,
        lot_mantissa,
        tick_exponent,
        lot_exponent,
    )


def encode_timer(now_ns: int) -> bytes:
    """A Timer event."""
    return header(TIMER, TIMER_BLOCK) + struct.pack("<q", now_ns)


def encode_snapshot_request(venue: str, symbol: str) -> bytes:
    """A SnapshotRequest."""
    return (
        header(SNAPSHOT_REQUEST, 48)
        + ascii_field(venue, 16, "venue")
        + ascii_field(symbol, 32, "symbol")
    )


def encode_reject(venue: bytes, symbol: bytes, code: int, reason: str) -> bytes:
    """A Reject of a snapshot request; the reason is cut at 128 characters."""
    text = reason.encode("ascii", "replace")[:128]
    block = struct.pack("<16s32s128sB7x", venue, symbol, text, code)
    return header(REJECT, REJECT_BLOCK) + block


def topic(kind: str, venue: str, symbol: str) -> bytes:
    """``l2.<venue>.<symbol>`` and its like; ``kind`` is l2, signal, alert or state."""
    return f"{kind}.{venue}.{symbol}".encode()


def template_id(message: bytes | memoryview | np.ndarray) -> int:
    """Template id of a message, 0 where it is too short to have one."""
    return int.from_bytes(bytes(message[2:4]), "little") if len(message) >= HEADER_BYTES else 0


def decode_block(message: bytes | memoryview | np.ndarray, dtype: np.dtype) -> np.void:
    """The root block of a message as one numpy record, a view where it can be.

    Raises
    ------
    InputError
        If the message is shorter than its header and block.
    """
    if len(message) < HEADER_BYTES + dtype.itemsize:
        raise InputError(
            "message cut short",
            where="wire",
            expected=f"at least {HEADER_BYTES + dtype.itemsize} bytes",
            found=str(len(message)),
        )
    return np.frombuffer(message, dtype=dtype, count=1, offset=HEADER_BYTES)[0]


def decode_levels(message: bytes | memoryview) -> tuple[np.ndarray, np.ndarray]:
    """Bids and asks of a Snapshot or Delta, each of `LEVEL_DTYPE`, as views."""
    at = HEADER_BYTES + int.from_bytes(bytes(message[0:2]), "little")
    sides = []
    for _ in range(2):
        entry, count = _GROUP.unpack_from(message, at)
        assert entry == LEVEL_BYTES, "a newer schema's levels need the hot path's decoder"
        at += GROUP_HEADER_BYTES
        sides.append(np.frombuffer(message, dtype=LEVEL_DTYPE, count=count, offset=at))
        at += entry * count
    return sides[0], sides[1]


def decode_floats(message: bytes | memoryview, groups: int) -> list[np.ndarray]:
    """The float32 groups that follow a block, as views: a Signal has one, a ShadowAnswer two."""
    at = HEADER_BYTES + int.from_bytes(bytes(message[0:2]), "little")
    found = []
    for _ in range(groups):
        entry, count = _GROUP.unpack_from(message, at)
        at += GROUP_HEADER_BYTES
        found.append(np.frombuffer(message, dtype="<f4", count=count, offset=at))
        at += entry * count
    return found


def encode_floats(values: np.ndarray) -> bytes:
    """One group of float32."""
    array = np.ascontiguousarray(values, dtype="<f4")
    return _GROUP.pack(OUTPUT_BYTES, len(array)) + array.tobytes()
