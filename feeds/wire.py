# Hot path: free @njit functions; the bytes-building functions at the end are for the cold path.
"""The wire: FIX Simple Binary Encoding of the messages in ``schema.xml``.

Offsets below are counted from the first byte of the SBE message header. ``tests/feeds/test_wire``
holds them against the schema, and decodes our bytes with an independent SBE package.

Source: FIX Simple Binary Encoding, version 1.0 (FIX Trading Community technical standard).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Final

import numpy as np
from numba import njit

from feeds.errors import InputError
from feeds.rawbytes import load_i64, load_u16, load_u32, store_i64, store_u16, store_u32

SCHEMA_PATH: Final = Path(__file__).with_name("schema.xml")
SCHEMA_ID: Final = 7311
SCHEMA_VERSION: Final = 1

# Template ids.
INSTRUMENT: Final = 1
SNAPSHOT: Final = 2
DELTA: Final = 3
TRADE: Final = 4
HEARTBEAT: Final = 5
SNAPSHOT_REQUEST: Final = 6
REJECT: Final = 7
TIMER: Final = 16
SIGNAL: Final = 32
ENGINE_STATE: Final = 33
ALERT: Final = 34

# Sizes in bytes.
HEADER_BYTES: Final = 8
PREFIX_BYTES: Final = 48
GROUP_HEADER_BYTES: Final = 4
LEVEL_BYTES: Final = 16
INSTRUMENT_BLOCK: Final = 120
TRADE_BLOCK: Final = 80
TIMER_BLOCK: Final = 8
SIGNAL_BLOCK: Final = 208
SIGNAL_CANONICAL_BLOCK: Final = 152
ENGINE_STATE_BLOCK: Final = 136
ALERT_BLOCK: Final = 208
OUTPUT_BYTES: Final = 4
MAX_LEVELS_A_GROUP: Final = 65_534  # SBE keeps 65535 of a uint16 for null

# Where the common fields of market messages stand, from the message's first byte.
AT_SOURCE_ID: Final = 8
AT_INSTRUMENT_ID: Final = 12
AT_EPOCH: Final = 16
AT_SEQ: Final = 24
AT_EXCHANGE_TIME: Final = 32
AT_SOURCE_TIME: Final = 40
AT_FLAGS: Final = 48
AT_LEVELS: Final = 56  # Snapshot and Delta: first group header
AT_PRICE: Final = 56  # Trade
AT_QUANTITY: Final = 64
AT_TRADE_ID: Final = 72
AT_AGGRESSOR: Final = 80
AT_VENUE: Final = 56  # Instrument
AT_SYMBOL: Final = 72

FLAG_SOURCE_GAP: Final = 1  # the source itself lost venue data before this message
FLAG_ANSWER: Final = 2  # an answer of the snapshot service: seq is the last one sent, not its own

AGGRESSOR_UNKNOWN: Final = 0
AGGRESSOR_BUY: Final = 1
AGGRESSOR_SELL: Final = 2

# What `check` can find. 0 is good.
ERRORS: Final = (
    "well formed",
    "shorter than its SBE header",
    "another schema id",
    "unknown template id",
    "block shorter than the schema's",
    "cut short: a block or group passes the end",
    "a group of levels whose entries are shorter than 16 bytes",
    "a price that is not positive",
    "a negative quantity",
    "a trade of no quantity",
)

HEADER_DTYPE: Final = np.dtype(
    [("block_length", "<u2"), ("template_id", "<u2"), ("schema_id", "<u2"), ("version", "<u2")]
)
PREFIX_DTYPE: Final = np.dtype(
    [
        ("source_id", "<u4"),
        ("instrument_id", "<u4"),
        ("epoch", "<u8"),
        ("seq", "<u8"),
        ("exchange_time_ns", "<i8"),
        ("source_time_ns", "<i8"),
        ("flags", "<u8"),
    ]
)
INSTRUMENT_DTYPE: Final = np.dtype(
    [
        *((name, PREFIX_DTYPE[name]) for name in PREFIX_DTYPE.names or ()),
        ("venue", "S16"),
        ("symbol", "S32"),
        ("tick_mantissa", "<i8"),
        ("lot_mantissa", "<i8"),
        ("tick_exponent", "i1"),
        ("lot_exponent", "i1"),
        ("padding", "V6"),
    ]
)
TRADE_DTYPE: Final = np.dtype(
    [
        *((name, PREFIX_DTYPE[name]) for name in PREFIX_DTYPE.names or ()),
        ("price_ticks", "<i8"),
        ("quantity_lots", "<i8"),
        ("trade_id", "<u8"),
        ("aggressor", "u1"),
        ("padding", "V7"),
    ]
)
REJECT_DTYPE: Final = np.dtype([("venue", "S16"), ("symbol", "S32"), ("reason", "S128")])
LEVEL_DTYPE: Final = np.dtype([("price_ticks", "<i8"), ("quantity_lots", "<i8")])
SIGNAL_DTYPE: Final = np.dtype(
    [
        ("venue", "S16"),
        ("symbol", "S32"),
        ("signal_seq", "<u8"),
        ("source_epoch", "<u8"),
        ("first_seq", "<u8"),
        ("last_seq", "<u8"),
        ("exchange_time_ns", "<i8"),
        ("book_state", "u1"),
        ("warm", "u1"),
        ("precision", "u1"),
        ("numerics", "u1"),
        ("shadow_state", "u1"),
        ("predicted_class", "u1"),
        ("reasons", "<u2"),
        ("value_check", "<u4"),
        ("padding_1", "V4"),
        ("best_bid_ticks", "<i8"),
        ("best_ask_ticks", "<i8"),
        ("model_hash", "<u8"),
        ("config_hash", "<u8"),
        ("feature_hash", "<u8"),
        ("input_crc", "<u4"),
        ("padding_2", "V4"),
        # From here on: outside the digest.
        ("engine_epoch", "<u8"),
        ("code_hash", "<u8"),
        ("received_ns", "<i8"),
        ("emitted_ns", "<i8"),
        ("source_time_ns", "<i8"),
        ("backend", "S16"),
    ]
)
ENGINE_STATE_DTYPE: Final = np.dtype(
    [
        ("engine_epoch", "<u8"),
        ("seq", "<u8"),
        ("now_ns", "<i8"),
        ("messages", "<u8"),
        ("signals", "<u8"),
        ("tradable", "<u8"),
        ("lost", "<u8"),
        ("duplicates", "<u8"),
        ("gaps", "<u8"),
        ("rejected", "<u8"),
        ("instruments", "<u4"),
        ("synced", "<u4"),
        ("latency_p50_ns", "<i8"),
        ("latency_p99_ns", "<i8"),
        ("code_hash", "<u8"),
        ("model_hash", "<u8"),
        ("config_hash", "<u8"),
        ("feature_hash", "<u8"),
    ]
)
ALERT_DTYPE: Final = np.dtype(
    [
        ("engine_epoch", "<u8"),
        ("seq", "<u8"),
        ("now_ns", "<i8"),
        ("venue", "S16"),
        ("symbol", "S32"),
        ("severity", "u1"),
        ("padding", "V7"),
        ("text", "S128"),
    ]
)
assert INSTRUMENT_DTYPE.itemsize == INSTRUMENT_BLOCK
assert TRADE_DTYPE.itemsize == TRADE_BLOCK
assert SIGNAL_DTYPE.itemsize == SIGNAL_BLOCK
assert SIGNAL_DTYPE.fields is not None
assert SIGNAL_DTYPE.fields["engine_epoch"][1] == SIGNAL_CANONICAL_BLOCK
assert ENGINE_STATE_DTYPE.itemsize == ENGINE_STATE_BLOCK
assert ALERT_DTYPE.itemsize == ALERT_BLOCK


@njit("int64(uint8[::1], int64, int64)", cache=True)
def check(buf, start, stop):  # type: ignore[no-untyped-def]
    """Is ``buf[start:stop]`` a well-formed market or timer message?

    Everything the hot path reads lies inside the range once this returns 0, prices are positive
    and quantities are not negative. Newer minor versions (longer blocks) pass.

    Returns
    -------
    int
        0, or an index into `ERRORS`.
    """
    length = stop - start
    if length < HEADER_BYTES:
        return 1
    block = load_u16(buf, start)
    template = load_u16(buf, start + 2)
    if load_u16(buf, start + 4) != SCHEMA_ID:
        return 2
    if template == SNAPSHOT or template == DELTA:
        if block < PREFIX_BYTES:
            return 4
        at = start + HEADER_BYTES + block
        for _ in range(2):
            if at + GROUP_HEADER_BYTES > stop:
                return 5
            entry = load_u16(buf, at)
            count = load_u16(buf, at + 2)
            if entry < LEVEL_BYTES:
                return 6
            at += GROUP_HEADER_BYTES
            if at + entry * count > stop:
                return 5
            for _ in range(count):
                if load_i64(buf, at) <= 0:
                    return 7
                if load_i64(buf, at + 8) < 0:
                    return 8
                at += entry
        return 0
    if template == TRADE:
        if block < TRADE_BLOCK:
            return 4
        if HEADER_BYTES + block > length:
            return 5
        if load_i64(buf, start + AT_PRICE) <= 0:
            return 7
        if load_i64(buf, start + AT_QUANTITY) <= 0:
            return 9
        return 0
    if template == HEARTBEAT:
        needed = PREFIX_BYTES
    elif template == INSTRUMENT:
        needed = INSTRUMENT_BLOCK
    elif template == TIMER:
        needed = TIMER_BLOCK
    else:
        return 3
    if block < needed:
        return 4
    if HEADER_BYTES + block > length:
        return 5
    return 0


@njit("int64(uint8[::1], int64, int64, int64)", cache=True)
def put_header(buf, at, template, block):  # type: ignore[no-untyped-def]
    """Write an SBE message header; returns the offset of the block."""
    store_u16(buf, at, block)
    store_u16(buf, at + 2, template)
    store_u16(buf, at + 4, SCHEMA_ID)
    store_u16(buf, at + 6, SCHEMA_VERSION)
    return at + HEADER_BYTES


@njit(
    "int64(uint8[::1], int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)",
    cache=True,
)
def put_prefix(  # type: ignore[no-untyped-def]
    buf, at, template, block, source_id, instrument_id, epoch, seq, exchange_ns, source_ns, flags
):
    """Write header and common fields of a market message; returns the offset after them."""
    put_header(buf, at, template, block)
    store_u32(buf, at + AT_SOURCE_ID, source_id)
    store_u32(buf, at + AT_INSTRUMENT_ID, instrument_id)
    store_i64(buf, at + AT_EPOCH, epoch)
    store_i64(buf, at + AT_SEQ, seq)
    store_i64(buf, at + AT_EXCHANGE_TIME, exchange_ns)
    store_i64(buf, at + AT_SOURCE_TIME, source_ns)
    store_i64(buf, at + AT_FLAGS, flags)
    return at + HEADER_BYTES + PREFIX_BYTES


@njit("int64(uint8[::1], int64, int64)", cache=True)
def message_bytes(buf, start, stop):  # type: ignore[no-untyped-def]
    """Length of the checked message at ``start``, without bytes that follow it."""
    template = load_u16(buf, start + 2)
    at = start + HEADER_BYTES + load_u16(buf, start)
    if template == SNAPSHOT or template == DELTA:
        for _ in range(2):
            at += GROUP_HEADER_BYTES + load_u16(buf, at) * load_u16(buf, at + 2)
    return min(at, stop) - start


@njit("UniTuple(int64, 2)(uint8[::1], int64)", cache=True)
def instrument_key(buf, start):  # type: ignore[no-untyped-def]
    """(source_id, instrument_id) of a checked market message."""
    return load_u32(buf, start + AT_SOURCE_ID), load_u32(buf, start + AT_INSTRUMENT_ID)


# Cold path: build bytes, read them back.

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
        0,
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


def encode_reject(venue: bytes, symbol: bytes, reason: str) -> bytes:
    """A Reject of a snapshot request; the reason is cut at 128 characters."""
    text = reason.encode("ascii", "replace")[:128].ljust(128, b"\0")
    return header(REJECT, 176) + venue.ljust(16, b"\0") + symbol.ljust(32, b"\0") + text


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


def decode_outputs(message: bytes | memoryview) -> np.ndarray:
    """Model outputs of a Signal, float32 of shape (n,), as a view."""
    at = HEADER_BYTES + int.from_bytes(bytes(message[0:2]), "little")
    _, count = _GROUP.unpack_from(message, at)
    return np.frombuffer(message, dtype="<f4", count=count, offset=at + GROUP_HEADER_BYTES)
