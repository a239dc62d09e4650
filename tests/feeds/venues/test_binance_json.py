"""The byte scanner and the full decoder read every line alike; what is wrong is refused."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from feeds.errors import InputError
from feeds.venues import binance_fields as bj
from feeds.venues.binance_decode import VENUES, LineDecoder, find_off_grid
from feeds.venues.binance_json import scan_line
from feeds.venues.binance_lines import encode_symbol
from tests.feeds.venues.mock_binance import MockBinance, edit

VENUE_NAMES = ("binance-usdm", "binance-coinm", "binance-spot")
SCALES = (2, 3)
IGNORED = [bj.SEEN, bj.NEXT]


def scan(line: bytes, venue: str, symbol: str = "TESTUSDT", scales=SCALES):
    fields, levels = bj.new_fields(), bj.new_levels()
    buf = np.frombuffer(bytearray(line + b"\n\n"), dtype=np.uint8)
    kind = scan_line(buf, 0, VENUES[venue], *scales, encode_symbol(symbol), fields, levels)
    return kind, fields, levels


def decode(line: bytes, venue: str, symbol: str = "TESTUSDT", scales=SCALES):
    decoder = LineDecoder(VENUES[venue], bj.new_fields(), bj.new_levels())
    kind = decoder.decode(line, symbol, scales, lambda: "here")
    return kind, decoder.fields, decoder.levels


def assert_same(scanned, decoded) -> None:
    assert scanned[0] == decoded[0]
    if scanned[0] in (bj.OTHER_SYMBOL, bj.BLANK):
        return
    a, b = scanned[1].copy(), decoded[1].copy()
    a[IGNORED] = b[IGNORED] = 0
    assert a.tolist() == b.tolist()
    used = 2 * int(a[bj.BIDS] + a[bj.ASKS])
    assert scanned[2][:used].tolist() == decoded[2][:used].tolist()


def agg_trade(market: MockBinance) -> bytes:
    return edit(market.trade(), e="aggTrade", t=None, a=77, f=1, l=2)


def all_lines(venue: str) -> list[bytes]:
    market = MockBinance(venue, seed=3)
    return [*market.session(20), agg_trade(market), market.trade(maker=False), b""]


@pytest.mark.parametrize("venue", VENUE_NAMES)
def test_scanner_reads_every_line_of_the_exchange_as_the_decoder_does(venue):
    kinds = set()
    for line in all_lines(venue):
        scanned = scan(line, venue)
        assert_same(scanned, decode(line, venue))
        kinds.add(scanned[0])
    assert kinds == {bj.DIFF, bj.SNAPSHOT, bj.TRADE, bj.AGG_TRADE, bj.TICKER, bj.BLANK}


@pytest.mark.parametrize("scales", [(0, 0), (1, 3), (5, 6)])
def test_both_note_the_same_decimal_places(scales):
    for line in all_lines("binance-usdm"):
        assert_same(scan(line, "binance-usdm", scales=scales), decode(
            line, "binance-usdm", scales=scales))  # fmt: skip


@pytest.mark.parametrize("venue", VENUE_NAMES)
def test_a_line_with_a_random_fault_is_never_read_differently(venue):
    draw = random.Random(5)
    lines = [line for line in all_lines(venue) if 0 < len(line) < 1000]
    alphabet = b'0123456789.,:{}[]"- abXTuUse\\\x00\xff\n'
    recognised = refused = 0
    for _ in range(4000):
        line = bytearray(draw.choice(lines))
        for _ in range(draw.randint(1, 2)):
            at = draw.randrange(len(line))
            what = draw.randrange(3)
            if what == 0:
                line[at] = draw.choice(alphabet)
            elif what == 1:
                del line[at]
            else:
                line.insert(at, draw.choice(alphabet))
        line = bytes(line).split(b"\n")[0]
        scanned = scan(line, venue)
        if scanned[0] == bj.UNRECOGNISED:
            refused += 1
            continue
        recognised += 1
        assert_same(scanned, decode(line, venue))
    assert recognised > 500
    assert refused > 500


@pytest.mark.parametrize("venue", VENUE_NAMES)
def test_other_formatting_takes_the_decoder_and_says_the_same(venue):
    for line in all_lines(venue)[:-1]:
        stamp, _, text = line.partition(b" ")
        spaced = stamp + b" " + json.dumps(json.loads(text)).encode()
        assert scan(spaced, venue)[0] == bj.UNRECOGNISED
        assert_same(scan(line, venue), decode(spaced, venue))


def test_unknown_keys_and_another_order_of_keys_are_read():
    market = MockBinance("binance-usdm")
    market.activity()
    line = edit(market.diff(), zz="new", nq=5)
    assert_same(scan(line, "binance-usdm"), decode(line, "binance-usdm"))
    assert scan(line, "binance-usdm")[0] == bj.DIFF
    asks_first = edit(line, b=None, B2="x")
    asks_first = edit(asks_first, b=[["1.00", "2.000"]])
    assert scan(asks_first, "binance-usdm")[0] == bj.UNRECOGNISED
    assert decode(asks_first, "binance-usdm")[0] == bj.DIFF


def test_another_symbol_is_told_apart():
    line = MockBinance("binance-usdm", "OTHERUSDT").ticker()
    assert scan(line, "binance-usdm")[0] == bj.OTHER_SYMBOL
    assert decode(line, "binance-usdm")[0] == bj.OTHER_SYMBOL


@pytest.mark.parametrize(
    "text",
    [
        b'1 {"stream":"x@kline","data":{"e":"kline","s":"X","k":{"t":1}}}',
        b'1 {"result":null,"id":1}',
        b"1 [1,2]",
        b'1 {"stream":"x@markPrice","data":{"e":"markPriceUpdate","p":"1.0"}}',
    ],
)
def test_other_streams_are_passed_over(text):
    assert scan(text, "binance-usdm")[0] == bj.UNRECOGNISED
    assert decode(text, "binance-usdm")[0] == bj.OTHER


@pytest.mark.parametrize(
    ("text", "units", "needs"),
    [
        ("0.00", -1, 0),
        ("12", 1200, 0),
        ("12.3", 1230, 0),
        ("12.340000", 1234, 0),
        ("12.3456", 1234, 4),
        ("12.34560", 1234, 4),
        ("1234567890123456", 123456789012345600, 0),
        ("12345678901234567", -1, 0),
        ("1.", -1, 0),
        (".5", -1, 0),
        ("1e5", -1, 0),
        ("-1.0", -1, 0),
        ("NaN", -1, 0),
        ("", -1, 0),
    ],
)
def test_prices_become_integers_without_a_float(text, units, needs):
    line = edit(MockBinance("binance-usdm").snapshot(), bids=[[text, "1.000"]], asks=[])
    kind, fields, levels = scan(line, "binance-usdm")
    if units < 0:
        assert kind == bj.UNRECOGNISED
        with pytest.raises(InputError):
            decode(line, "binance-usdm")
        return
    assert kind == bj.SNAPSHOT
    assert levels[0] == units
    assert fields[bj.PRICE_NEEDS] == needs
    assert_same((kind, fields, levels), decode(line, "binance-usdm"))


BAD_FIELDS = [
    ({"b": [["-5.00", "1.000"]]}, "negative number"),
    ({"b": [["NaN", "1.000"]]}, "no plain decimal"),
    ({"b": [["Infinity", "1.000"]]}, "no plain decimal"),
    ({"b": [["0.00", "1.000"]]}, "not positive"),
    ({"a": [["5.00", "-1.000"]]}, "negative number"),
    ({"b": [[5.0, "1.000"]]}, "no plain decimal"),
    ({"b": [["5.00"]]}, "damaged line"),
    ({"b": "5.00"}, "damaged line"),
    ({"b": [["5." + "0" * 12 + "1", "1"]]}, "too fine"),
    ({"b": [["9" * 20, "1"]]}, "too large"),
    ({"u": None}, "damaged line"),
    ({"s": None}, "damaged line"),
    ({"U": "12"}, "damaged line"),
    ({"u": -4}, "damaged line"),
    ({"U": 9_999_999_999}, "damaged line"),
]


@pytest.mark.parametrize(("changes", "what"), BAD_FIELDS)
def test_a_bad_field_is_refused_by_both(changes, what):
    market = MockBinance("binance-usdm")
    market.activity()
    line = edit(market.diff(), **changes)
    assert scan(line, "binance-usdm")[0] == bj.UNRECOGNISED
    with pytest.raises(InputError, match=what):
        decode(line, "binance-usdm")


@pytest.mark.parametrize(
    "line", [b"nonsense", b"12 {", b"{}", b"x {}", b'5 {"e":NaN}', b"0 {}", b"-5 {}", b"5 \xff"]
)
def test_a_damaged_line_is_refused(line):
    assert scan(line, "binance-spot")[0] == bj.UNRECOGNISED
    with pytest.raises(InputError, match="damaged line"):
        decode(line, "binance-spot")


@pytest.mark.parametrize("recorded", VENUE_NAMES)
@pytest.mark.parametrize("claimed", VENUE_NAMES)
def test_a_recording_of_another_venue_is_refused_and_named(recorded, claimed):
    if recorded == claimed:
        return
    market = MockBinance(recorded)
    market.activity()
    for line in (market.diff(), market.ticker()):
        assert scan(line, claimed)[0] == bj.UNRECOGNISED
        with pytest.raises(InputError, match=f"pass --venue {recorded}"):
            decode(line, claimed)


@pytest.mark.parametrize(
    "changes", [{"X": "INSURANCE_FUND"}, {"X": "NA", "p": "0", "q": "0"}, {"X": "ADL"}]
)
def test_trades_off_the_book_are_marked(changes):
    line = edit(MockBinance("binance-usdm").trade(), **changes)
    scanned = scan(line, "binance-usdm")
    assert scanned[1][bj.ON_BOOK] == 0
    assert_same(scanned, decode(line, "binance-usdm"))


def test_microsecond_times_are_told_from_milliseconds():
    assert bj.time_ns(1_700_000_000_123) == 1_700_000_000_123_000_000
    assert bj.time_ns(1_700_000_000_123_456) == 1_700_000_000_123_456_000


def test_the_first_number_off_the_grid_is_found():
    from decimal import Decimal

    market = MockBinance("binance-usdm")
    line = edit(market.snapshot(), bids=[["5.00", "1"], ["4.75", "1"]], asks=[])
    found = find_off_grid(line, Decimal("0.5"), Decimal("1"))
    assert found is not None
    assert found[:2] == ("price", "4.75")
    assert line[found[2] :].startswith(b'"4.75"')
    assert find_off_grid(line, Decimal("0.25"), None) is None
