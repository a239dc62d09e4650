# Hot path: free @njit functions.
"""The wire: FIX Simple Binary Encoding of the messages in ``schema.xml``.

Offsets below are counted from the first byte of the SBE message header. ``tests/feeds/test_wire``
holds them against the schema, and decodes our bytes with an independent SBE package.

Source: FIX Simple Binary Encoding, version 1.0 (FIX Trading Community technical standard).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from numba import njit

from feeds.inner import inner
from feeds.rawbytes import load_i64, load_u16, load_u32, store_i64, store_u16, store_u32

SCHEMA_PATH: Final = Path(__file__).with_name("schema.xml")
SCHEMA_ID: Final = 7311
SCHEMA_VERSION: Final = 3

# Template ids.
INSTRUMENT: Final = 1
SNAPSHOT: Final = 2
DELTA: Final = 3
TRADE: Final = 4
HEARTBEAT: Final = 5
SNAPSHOT_REQUEST: Final = 6
REJECT: Final = 7
TIMER: Final = 16
CONTROL: Final = 17
SHADOW_ANSWER: Final = 18
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
REJECT_BLOCK: Final = 184
TIMER_BLOCK: Final = 8
CONTROL_BLOCK: Final = 376
SHADOW_ANSWER_BLOCK: Final = 72
SIGNAL_BLOCK: Final = 208
SIGNAL_CANONICAL_BLOCK: Final = 152
ENGINE_STATE_BLOCK: Final = 232
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

# Why a snapshot request is rejected.
REJECT_UNKNOWN: Final = 1  # no such instrument
REJECT_NOT_YET: Final = 2  # its book is not known yet: ask again
REJECT_MALFORMED: Final = 3  # no SnapshotRequest

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
REJECT_DTYPE: Final = np.dtype(
    [("venue", "S16"), ("symbol", "S32"), ("reason", "S128"), ("code", "u1"), ("padding", "V7")]
)
CONTROL_DTYPE: Final = np.dtype(
    [
        ("now_ns", "<i8"),
        ("value", "<i8"),
        ("model_hash", "<u8"),
        ("signal_seq", "<u8"),
        ("command", "u1"),
        ("padding", "V7"),
        ("venue", "S16"),
        ("symbol", "S32"),
        ("by", "S32"),
        ("text", "S256"),
    ]
)
SHADOW_ANSWER_DTYPE: Final = np.dtype(
    [
        ("ticket", "<u8"),
        ("signal_seq", "<u8"),
        ("venue", "S16"),
        ("symbol", "S32"),
        ("flags", "<u4"),
        ("padding", "V4"),
    ]
)
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
        ("mode", "u1"),
        ("shadow_state", "u1"),
        ("padding", "V6"),
        ("transitions", "<u8"),
        ("violations", "<u8"),
        ("shadow_answers", "<u8"),
        ("shadow_missed", "<u8"),
        ("disagreements", "<u8"),
        ("swaps", "<u8"),
        ("divergence_p50", "<f4"),
        ("divergence_p99", "<f4"),
        ("divergence_max", "<f4"),
        ("drift", "<f4"),
        ("lag_ns", "<i8"),
        ("conflations", "<u8"),
        ("conflating", "u1"),
        ("padding_2", "V7"),
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
assert REJECT_DTYPE.itemsize == REJECT_BLOCK
assert CONTROL_DTYPE.itemsize == CONTROL_BLOCK
assert SHADOW_ANSWER_DTYPE.itemsize == SHADOW_ANSWER_BLOCK
assert SIGNAL_DTYPE.itemsize == SIGNAL_BLOCK
assert SIGNAL_DTYPE.fields is not None
assert SIGNAL_DTYPE.fields["engine_epoch"][1] == SIGNAL_CANONICAL_BLOCK
assert ENGINE_STATE_DTYPE.itemsize == ENGINE_STATE_BLOCK
assert ALERT_DTYPE.itemsize == ALERT_BLOCK


@inner("int64(uint8[::1], int64, int64)")
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


@inner("int64(uint8[::1], int64, int64, int64)")
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


@inner("UniTuple(int64, 2)(uint8[::1], int64)")
def instrument_key(buf, start):  # type: ignore[no-untyped-def]
    """(source_id, instrument_id) of a checked market message."""
    return load_u32(buf, start + AT_SOURCE_ID), load_u32(buf, start + AT_INSTRUMENT_ID)
