"""Our bytes against the schema, an independent SBE package, and a naive reading of the bounds."""

from __future__ import annotations

import struct
from decimal import Decimal
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import sbe
from hypothesis import given, settings
from hypothesis import strategies as st

from feeds import codec, wire
from feeds.errors import InputError

SIZES = {"char": 1, "uint8": 1, "int8": 1, "uint16": 2, "uint32": 4, "float": 4}
SIZES |= {"uint64": 8, "int64": 8}
NUMPY = {"uint8": "u1", "int8": "i1", "uint16": "<u2", "uint32": "<u4", "float": "<f4"}
NUMPY |= {"uint64": "<u8", "int64": "<i8"}

# A block of each template as wire.py sees it.
BLOCKS = {
    wire.INSTRUMENT: wire.INSTRUMENT_DTYPE,
    wire.SNAPSHOT: wire.PREFIX_DTYPE,
    wire.DELTA: wire.PREFIX_DTYPE,
    wire.TRADE: wire.TRADE_DTYPE,
    wire.HEARTBEAT: wire.PREFIX_DTYPE,
    wire.SNAPSHOT_REQUEST: np.dtype([("venue", "S16"), ("symbol", "S32")]),
    wire.REJECT: wire.REJECT_DTYPE,
    wire.TIMER: np.dtype([("now_ns", "<i8")]),
    wire.CONTROL: wire.CONTROL_DTYPE,
    wire.SHADOW_ANSWER: wire.SHADOW_ANSWER_DTYPE,
    wire.SIGNAL: wire.SIGNAL_DTYPE,
    wire.ENGINE_STATE: wire.ENGINE_STATE_DTYPE,
    wire.ALERT: wire.ALERT_DTYPE,
}
ROOT = ElementTree.parse(wire.SCHEMA_PATH).getroot()
MESSAGES = {
    int(node.attrib["id"]): node
    for node in ROOT
    if node.tag.endswith("}message") or node.tag == "message"
}
TYPES = {
    node.attrib["name"]: (node.attrib["primitiveType"], int(node.attrib.get("length", "1")))
    for node in ROOT.find("types").findall("type")  # type: ignore[union-attr]
}
SCHEMA = sbe.Schema.parse(str(wire.SCHEMA_PATH))

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
i64 = st.integers(-(2**63), 2**63 - 1)
positive = st.integers(1, 2**63 - 1)
natural = st.integers(0, 2**63 - 1)
levels = st.lists(st.tuples(positive, natural), max_size=12)
names = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=16)
prefixes = st.tuples(u32, u32, u64, u64, i64, i64)
PREFIX_NAMES = ("source_id", "instrument_id", "epoch", "seq", "exchange_time_ns", "source_time_ns")


def array(message: bytes) -> np.ndarray:
    return np.frombuffer(bytearray(message), dtype=np.uint8)


def check(message: bytes) -> int:
    return int(wire.check(array(message), 0, len(message)))


def independent(message: bytes) -> tuple[str, dict[str, Any]]:
    """Decode with the foreign package; the header is held against the schema on the way."""
    decoded = SCHEMA.decode(message)
    template = decoded.header["templateId"]
    assert decoded.header["schemaId"] == wire.SCHEMA_ID
    assert decoded.header["version"] == wire.SCHEMA_VERSION
    assert decoded.header["blockLength"] == int(MESSAGES[template].attrib["blockLength"])
    return decoded.message_name, decoded.value


def as_levels(group: list[dict[str, int]]) -> list[tuple[int, int]]:
    return [(entry["price_ticks"], entry["quantity_lots"]) for entry in group]


def filled(dtype: np.dtype, seed: int) -> np.ndarray:
    """One record of ``dtype`` with another value in every field, padding left zero."""
    rng = np.random.default_rng(seed)
    record = np.zeros(1, dtype=dtype)
    for name in dtype.names or ():
        kind = dtype[name]
        if name.startswith("padding"):
            continue
        if kind.kind == "S":
            length = int(rng.integers(1, kind.itemsize + 1))
            record[name] = bytes(rng.integers(65, 91, length, dtype=np.uint8))
        else:
            raw = rng.integers(0, 256, kind.itemsize, dtype=np.uint8)
            record[name] = np.frombuffer(raw.tobytes(), dtype=kind)[0]
    return record


# The schema.


def test_the_schema_is_little_endian_and_has_the_ids_of_the_code() -> None:
    assert ROOT.attrib["byteOrder"] == "littleEndian"
    assert int(ROOT.attrib["id"]) == wire.SCHEMA_ID
    assert int(ROOT.attrib["version"]) == wire.SCHEMA_VERSION
    assert set(MESSAGES) == set(BLOCKS)


def test_the_header_composites_are_those_of_the_code() -> None:
    composites = {
        node.attrib["name"]: [(t.attrib["name"], t.attrib["primitiveType"]) for t in node]
        for node in ROOT.find("types").findall("composite")  # type: ignore[union-attr]
    }
    assert [t for _, t in composites["messageHeader"]] == ["uint16"] * 4
    assert [n for n, _ in composites["messageHeader"]] == [
        "blockLength",
        "templateId",
        "schemaId",
        "version",
    ]
    assert composites["groupSizeEncoding"] == [("blockLength", "uint16"), ("numInGroup", "uint16")]
    assert wire.HEADER_DTYPE.itemsize == wire.HEADER_BYTES == 8
    assert wire.GROUP_HEADER_BYTES == 4


@pytest.mark.parametrize("template", sorted(MESSAGES))
def test_offsets_types_and_block_lengths_are_those_of_the_code(template: int) -> None:
    node, dtype = MESSAGES[template], BLOCKS[template]
    assert int(node.attrib["blockLength"]) == dtype.itemsize
    assert dtype.itemsize % 8 == 0
    ids = [child.attrib["id"] for child in node.iter() if child is not node]
    assert len(ids) == len(set(ids))
    end, seen = 0, set()
    for field in node.findall("field"):
        name, offset = field.attrib["name"], int(field.attrib["offset"])
        primitive, length = TYPES[field.attrib["type"]]
        assert offset == end, f"{name}: a hole that tools which ignore offsets would not see"
        end = offset + SIZES[primitive] * length
        assert end <= dtype.itemsize
        in_code, at = (dtype.fields or {})[name][:2]
        assert at == offset
        assert in_code.itemsize == SIZES[primitive] * length
        if not name.startswith("padding"):
            assert in_code == np.dtype(f"S{length}" if primitive == "char" else NUMPY[primitive])
        seen.add(name)
    assert set(dtype.names or ()) - seen <= {"padding"}
    assert dtype.itemsize - end < 8


@pytest.mark.parametrize("template", [wire.SNAPSHOT, wire.DELTA])
def test_groups_of_levels_are_those_of_the_code(template: int) -> None:
    groups = MESSAGES[template].findall("group")
    assert [group.attrib["name"] for group in groups] == ["bids", "asks"]
    for group in groups:
        assert int(group.attrib["blockLength"]) == wire.LEVEL_BYTES == wire.LEVEL_DTYPE.itemsize
        got = [(f.attrib["name"], int(f.attrib["offset"])) for f in group.findall("field")]
        assert got == [(n, (wire.LEVEL_DTYPE.fields or {})[n][1]) for n in wire.LEVEL_DTYPE.names]


def test_the_offsets_of_the_hot_path_are_those_of_the_dtypes() -> None:
    for name, at in [
        ("source_id", wire.AT_SOURCE_ID),
        ("instrument_id", wire.AT_INSTRUMENT_ID),
        ("epoch", wire.AT_EPOCH),
        ("seq", wire.AT_SEQ),
        ("exchange_time_ns", wire.AT_EXCHANGE_TIME),
        ("source_time_ns", wire.AT_SOURCE_TIME),
        ("flags", wire.AT_FLAGS),
    ]:
        for dtype in (wire.PREFIX_DTYPE, wire.TRADE_DTYPE, wire.INSTRUMENT_DTYPE):
            assert (dtype.fields or {})[name][1] + wire.HEADER_BYTES == at
    for name, at in [
        ("price_ticks", wire.AT_PRICE),
        ("quantity_lots", wire.AT_QUANTITY),
        ("trade_id", wire.AT_TRADE_ID),
        ("aggressor", wire.AT_AGGRESSOR),
    ]:
        assert (wire.TRADE_DTYPE.fields or {})[name][1] + wire.HEADER_BYTES == at
    assert (wire.INSTRUMENT_DTYPE.fields or {})["venue"][1] + wire.HEADER_BYTES == wire.AT_VENUE
    assert (wire.INSTRUMENT_DTYPE.fields or {})["symbol"][1] + wire.HEADER_BYTES == wire.AT_SYMBOL
    assert wire.HEADER_BYTES + wire.PREFIX_BYTES == wire.AT_LEVELS


# An independent SBE package reads what we write.


@given(prefixes, levels, levels, u64, st.sampled_from([wire.SNAPSHOT, wire.DELTA]))
@settings(max_examples=60)
def test_books_decode_elsewhere(prefix, bids, asks, flags, template) -> None:
    message = codec.encode_book(template, *prefix, bids, asks, flags)
    name, value = independent(message)
    assert name == {wire.SNAPSHOT: "Snapshot", wire.DELTA: "Delta"}[template]
    assert tuple(value[field] for field in PREFIX_NAMES) == prefix
    assert value["flags"] == flags
    assert as_levels(value["bids"]) == bids
    assert as_levels(value["asks"]) == asks
    assert check(message) == 0
    ours = codec.decode_levels(message)
    assert [tuple(map(int, level)) for level in ours[0]] == bids
    assert [tuple(map(int, level)) for level in ours[1]] == asks


@given(prefixes, positive, positive, u64, st.integers(0, 2), u64)
@settings(max_examples=60)
def test_trades_decode_elsewhere(prefix, price, quantity, trade_id, aggressor, flags) -> None:
    message = codec.encode_trade(*prefix, price, quantity, trade_id, aggressor, flags)
    name, value = independent(message)
    assert name == "Trade"
    assert tuple(value[field] for field in PREFIX_NAMES) == prefix
    assert (value["price_ticks"], value["quantity_lots"]) == (price, quantity)
    assert (value["trade_id"], value["aggressor"], value["flags"]) == (trade_id, aggressor, flags)
    assert check(message) == 0
    ours = codec.decode_block(message, wire.TRADE_DTYPE)
    assert {n: value[n] for n in value} == {n: ours[n].item() for n in value}


@given(prefixes, u64)
@settings(max_examples=30)
def test_heartbeats_decode_elsewhere(prefix, flags) -> None:
    message = codec.encode_heartbeat(*prefix, flags)
    name, value = independent(message)
    assert name == "Heartbeat"
    assert tuple(value[field] for field in PREFIX_NAMES) == prefix
    assert value["flags"] == flags
    assert check(message) == 0


@given(
    prefixes,
    names,
    names,
    st.decimals("1e-12", "1e6", allow_nan=False, places=12).filter(lambda d: d > 0),
    st.decimals("1e-12", "1e6", allow_nan=False, places=12).filter(lambda d: d > 0),
)
@settings(max_examples=60)
def test_instruments_decode_elsewhere(prefix, venue, symbol, tick, lot) -> None:
    source, instrument, epoch, seq, exchange_ns, source_ns = prefix
    message = codec.encode_instrument(
        source, instrument, epoch, seq, venue, symbol, tick, lot, exchange_ns, source_ns
    )
    name, value = independent(message)
    assert name == "Instrument"
    assert tuple(value[field] for field in PREFIX_NAMES) == prefix
    assert (value["venue"], value["symbol"], value["flags"]) == (venue, symbol, 0)
    assert Decimal(value["tick_mantissa"]).scaleb(value["tick_exponent"]) == tick
    assert Decimal(value["lot_mantissa"]).scaleb(value["lot_exponent"]) == lot
    assert check(message) == 0


@given(i64, names, names)
@settings(max_examples=30)
def test_timers_requests_and_rejects_decode_elsewhere(now_ns, venue, symbol) -> None:
    timer = codec.encode_timer(now_ns)
    assert independent(timer) == ("Timer", {"now_ns": now_ns})
    assert check(timer) == 0
    request = codec.encode_snapshot_request(venue, symbol)
    assert independent(request) == ("SnapshotRequest", {"venue": venue, "symbol": symbol})
    reject = codec.encode_reject(
        venue.encode(), symbol.encode(), wire.REJECT_UNKNOWN, "no such instrument"
    )
    name, fields = independent(reject)
    assert name == "Reject"
    assert fields.pop("padding") == ""
    reason = "no such instrument"
    assert fields == {"venue": venue, "symbol": symbol, "reason": reason, "code": 1}


@pytest.mark.parametrize("template", [wire.SIGNAL, wire.ENGINE_STATE, wire.ALERT])
@pytest.mark.parametrize("seed", range(5))
def test_outgoing_messages_decode_elsewhere(template: int, seed: int) -> None:
    record = filled(BLOCKS[template], seed)
    outputs = np.random.default_rng(seed).standard_normal(seed).astype("<f4")
    message = codec.header(template, record.itemsize) + record.tobytes()
    if template == wire.SIGNAL:
        message += struct.pack("<HH", wire.OUTPUT_BYTES, seed) + outputs.tobytes()
    _, value = independent(message)
    ours = codec.decode_block(message, BLOCKS[template])
    for name in BLOCKS[template].names or ():
        if name.startswith("padding"):
            continue
        expected = ours[name].item()
        expected = expected.decode() if isinstance(expected, bytes) else expected
        assert value[name] == expected or expected != expected
    if template == wire.SIGNAL:
        assert [entry["value"] for entry in value["outputs"]] == outputs.tolist()
        assert codec.decode_floats(message, 1)[0].tolist() == outputs.tolist()


# `check`.


def naive(message: bytes) -> bool:
    """Would everything that the hot path reads lie inside ``message``, with sane numbers?"""
    if len(message) < 8:
        return False
    block, template, schema, _ = struct.unpack_from("<HHHH", message)
    needed = {
        wire.INSTRUMENT: 120,
        wire.SNAPSHOT: 48,
        wire.DELTA: 48,
        wire.TRADE: 80,
        wire.HEARTBEAT: 48,
        wire.TIMER: 8,
    }.get(template)
    if schema != wire.SCHEMA_ID or needed is None or block < needed or len(message) < 8 + block:
        return False
    if template == wire.TRADE:
        price, quantity = struct.unpack_from("<qq", message, wire.AT_PRICE)
        return price > 0 and quantity > 0
    if template in (wire.SNAPSHOT, wire.DELTA):
        rest = message[8 + block :]
        for _ in range(2):
            if len(rest) < 4:
                return False
            entry, count = struct.unpack_from("<HH", rest)
            rest = rest[4:]
            if entry < 16 or len(rest) < entry * count:
                return False
            for i in range(count):
                price, quantity = struct.unpack_from("<qq", rest, i * entry)
                if price <= 0 or quantity < 0:
                    return False
            rest = rest[entry * count :]
    return True


PREFIX = (7, 9, 1, 3, 4, 5)
GOOD = [
    codec.encode_book(wire.DELTA, *PREFIX, [(100, 5), (99, 0)], [(101, 2)]),
    codec.encode_book(wire.SNAPSHOT, *PREFIX, [(100, 5)], []),
    codec.encode_trade(*PREFIX, 100, 5, 1, wire.AGGRESSOR_BUY),
    codec.encode_heartbeat(*PREFIX),
    codec.encode_instrument(7, 9, 1, 0, "sim", "AAA", Decimal("0.01"), Decimal(1)),
    codec.encode_timer(12),
]


def patched(message: bytes, at: int, layout: str, value: int) -> bytes:
    out = bytearray(message)
    struct.pack_into(layout, out, at, value)
    return bytes(out)


MALFORMED = [
    (GOOD[0][:7], "shorter than its SBE header"),
    (b"", "shorter than its SBE header"),
    (patched(GOOD[0], 4, "<H", 1), "another schema id"),
    (patched(GOOD[0], 2, "<H", 99), "unknown template id"),
    (patched(GOOD[0], 2, "<H", wire.SIGNAL), "unknown template id"),
    (patched(GOOD[0], 0, "<H", 40), "block shorter than the schema's"),
    (patched(GOOD[2], 0, "<H", 72), "block shorter than the schema's"),
    (patched(GOOD[3], 0, "<H", 0), "block shorter than the schema's"),
    (patched(GOOD[0], 0, "<H", 65535), "cut short: a block or group passes the end"),
    (GOOD[0][:-1], "cut short: a block or group passes the end"),
    (GOOD[1][:-1], "cut short: a block or group passes the end"),
    (GOOD[2][:-1], "cut short: a block or group passes the end"),
    (GOOD[5][:-1], "cut short: a block or group passes the end"),
    (patched(GOOD[0], 58, "<H", 65535), "cut short: a block or group passes the end"),
    (
        patched(GOOD[0], 56, "<H", 15),
        "a group of levels whose entries are shorter than 16 bytes",
    ),
    (patched(GOOD[0], 60, "<q", 0), "a price that is not positive"),
    (patched(GOOD[0], 60, "<q", -5), "a price that is not positive"),
    (patched(GOOD[2], wire.AT_PRICE, "<q", -1), "a price that is not positive"),
    (patched(GOOD[0], 68, "<q", -1), "a negative quantity"),
    (patched(GOOD[2], wire.AT_QUANTITY, "<q", 0), "a trade of no quantity"),
]


@pytest.mark.parametrize(("message", "expected"), MALFORMED)
def test_check_refuses_each_malformed_kind(message: bytes, expected: str) -> None:
    assert wire.ERRORS[check(message)] == expected


@pytest.mark.parametrize("message", GOOD)
def test_every_cut_of_a_good_message_is_refused(message: bytes) -> None:
    assert check(message) == 0
    for length in range(len(message)):
        assert check(message[:length]) != 0


@given(
    st.sampled_from(GOOD),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6),
    st.integers(0, 400),
    st.binary(max_size=24),
)
@settings(max_examples=400)
def test_check_agrees_with_a_naive_reading_of_the_bounds(message, edits, cut, tail) -> None:
    """No mutation is let through whose blocks, groups or levels pass the end."""
    mutated = bytearray(message[: max(0, len(message) - cut)] if cut < 120 else message)
    for at, value in edits:
        if mutated:
            mutated[at % len(mutated)] = value
    mutated += tail
    result = check(bytes(mutated))
    assert 0 <= result < len(wire.ERRORS)
    assert (result == 0) == naive(bytes(mutated))
    if result == 0:
        used = int(wire.message_bytes(array(bytes(mutated)), 0, len(mutated)))
        assert 8 <= used <= len(mutated)


@given(st.binary(max_size=200))
@settings(max_examples=200)
def test_check_never_reads_past_its_range(body: bytes) -> None:
    """What stands behind the range must not change the answer."""
    message = GOOD[0][:8] + body
    answers = set()
    for filler in (0, 255):
        buf = np.full(len(message) + 64, filler, dtype=np.uint8)
        buf[16 : 16 + len(message)] = np.frombuffer(message, dtype=np.uint8)
        answers.add(int(wire.check(buf, 16, 16 + len(message))))
    assert len(answers) == 1


def test_a_newer_minor_version_with_longer_blocks_passes() -> None:
    longer = bytearray(GOOD[0])
    longer[56:56] = bytes(8)
    longer = bytearray(patched(bytes(longer), 0, "<H", 56))
    assert check(bytes(longer)) == 0
    wide = codec.header(wire.DELTA, 48) + GOOD[0][8:56] + struct.pack("<HH", 24, 2)
    wide += (
        struct.pack("<qqq", 5, 1, -1) + struct.pack("<qqq", 4, 1, -1) + struct.pack("<HH", 16, 0)
    )
    assert check(wide) == 0
    assert wire.message_bytes(array(wide + b"tail"), 0, len(wide) + 4) == len(wide)


# Encoding.


@pytest.mark.parametrize(
    ("text", "mantissa", "exponent"),
    [("0.010", 1, -2), ("1", 1, 0), ("100", 1, 2), ("0.25", 25, -2), ("1e-8", 1, -8)],
)
def test_decimals_keep_their_exact_parts(text: str, mantissa: int, exponent: int) -> None:
    assert codec.decimal_parts(Decimal(text)) == (mantissa, exponent)


@pytest.mark.parametrize("name", ["", "x" * 17, "é", "a\n"])
def test_names_that_do_not_fit_are_refused(name: str) -> None:
    with pytest.raises(InputError):
        codec.encode_snapshot_request(name, "AAA")


def test_more_levels_than_a_group_holds_are_refused() -> None:
    side = [(1, 1)] * (wire.MAX_LEVELS_A_GROUP + 1)
    with pytest.raises(InputError):
        codec.encode_book(wire.SNAPSHOT, *PREFIX, side, [])


def test_the_header_the_hot_path_writes_is_the_cold_paths() -> None:
    buf = np.zeros(64, dtype=np.uint8)
    at = wire.put_prefix(buf, 0, wire.DELTA, 48, *PREFIX[:2], *PREFIX[2:], 1)
    assert at == wire.AT_LEVELS
    assert bytes(buf[:56]) == codec.encode_book(wire.DELTA, *PREFIX, [], [], 1)[:56]
    assert wire.instrument_key(buf, 0) == (7, 9)


def test_a_block_cut_short_is_refused() -> None:
    with pytest.raises(InputError):
        codec.decode_block(GOOD[2][:40], wire.TRADE_DTYPE)
    assert codec.template_id(GOOD[2]) == wire.TRADE
    assert codec.template_id(b"1234") == 0
