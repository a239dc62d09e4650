"""Binance recordings become canonical messages by the venue's rule, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from feeds import codec, wire
from feeds.errors import InputError
from feeds.tape import MARKET
from feeds.tape_reader import TapeReader
from feeds.venues import recording as recording_module
from feeds.venues.convert import Converted, convert
from tests.feeds.venues.mock_binance import MockBinance, edit, is_diff, is_snapshot, message, write

VENUES = ("binance-usdm", "binance-coinm", "binance-spot")


def run(tmp_path: Path, lines: list[bytes], venue: str, name: str = "raw", **options: Any):
    """Convert lines; (messages on the tape, summary)."""
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    done = convert(write(folder / name, lines), venue, out=folder / "x.tape", **options)
    return read(folder / "x.tape"), done


def read(path: Path) -> list[dict[str, Any]]:
    """A tape's messages, decoded by the cold path."""
    messages = []
    for record in TapeReader(path).records():
        assert record.kind == MARKET
        template = codec.template_id(record.payload)
        prefix = codec.decode_block(record.payload, wire.PREFIX_DTYPE)
        found = {name: int(prefix[name]) for name in prefix.dtype.names}
        found |= {"template": template, "recv_ns": record.recv_ns}
        if template in (wire.SNAPSHOT, wire.DELTA):
            bids, asks = codec.decode_levels(record.payload)
            found |= {"bids": bids.tolist(), "asks": asks.tolist()}
        elif template == wire.TRADE:
            block = codec.decode_block(record.payload, wire.TRADE_DTYPE)
            for name in ("price_ticks", "quantity_lots", "trade_id", "aggressor"):
                found[name] = int(block[name])
        messages.append(found)
    return messages


def ticks(text: str, decimals: int) -> int:
    whole, _, fraction = text.partition(".")
    return int(whole + fraction.ljust(decimals, "0")[:decimals])


def levels(pairs: list[list[str]]) -> list[tuple[int, int]]:
    return [(ticks(p, 2), ticks(q, 3)) for p, q in pairs]


def reference(lines: list[bytes], venue: str) -> list[tuple[Any, ...]]:
    """What the venue's rule makes of a recording without holes, written the slow and plain way."""
    spot = venue == "binance-spot"
    made: list[tuple[Any, ...]] = []
    waiting: list[dict[str, Any]] = []
    snapshot_id: int | None = None
    for line in lines:
        data = message(line)
        if "lastUpdateId" in data:
            if snapshot_id is not None:
                continue
            snapshot_id = data["lastUpdateId"]
            made.append((wire.SNAPSHOT, levels(data["bids"]), levels(data["asks"])))
            for diff in waiting:
                if diff["u"] > snapshot_id or (not spot and diff["u"] == snapshot_id):
                    made.append((wire.DELTA, levels(diff["b"]), levels(diff["a"])))
        elif data.get("e") == "depthUpdate":
            if snapshot_id is None:
                waiting.append(data)
            elif data["u"] > snapshot_id or (not spot and data["u"] == snapshot_id):
                made.append((wire.DELTA, levels(data["b"]), levels(data["a"])))
        elif data.get("e") == "trade":
            side = wire.AGGRESSOR_SELL if data["m"] else wire.AGGRESSOR_BUY
            made.append((wire.TRADE, ticks(data["p"], 2), ticks(data["q"], 3), data["t"], side))
    return made


def plain(messages: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    made: list[tuple[Any, ...]] = []
    for m in messages[1:]:
        if m["template"] == wire.TRADE:
            made.append(
                (wire.TRADE, m["price_ticks"], m["quantity_lots"], m["trade_id"], m["aggressor"])
            )
        else:
            made.append((m["template"], m["bids"], m["asks"]))
    return made


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("venue", VENUES)
def test_a_recording_becomes_what_the_venues_rule_says(tmp_path, venue, seed):
    lines = MockBinance(venue, seed=seed).session(40, before=5 + seed, late=seed)
    messages, done = run(tmp_path, lines, venue)
    assert plain(messages) == reference(lines, venue)
    assert (done.tick, done.lot, done.symbol) == ("0.01", "0.001", "TESTUSDT")
    assert done.lines == len(lines)
    assert done.gaps == 0
    assert done.counts["slow_lines"] == 0


@pytest.mark.parametrize("venue", VENUES)
def test_the_tape_starts_with_its_instrument_and_counts_without_a_hole(tmp_path, venue):
    messages, done = run(tmp_path, MockBinance(venue).session(), venue)
    assert messages[0]["template"] == wire.INSTRUMENT
    assert messages[0]["seq"] == 0
    assert [m["seq"] for m in messages[1:]] == list(range(1, done.messages + 1))
    assert {m["epoch"] for m in messages} == {1}
    assert len({(m["source_id"], m["instrument_id"]) for m in messages}) == 1
    assert done.messages == done.snapshots + done.deltas + done.trades


def test_times_are_the_matching_engines_and_the_recorders(tmp_path):
    lines = MockBinance("binance-usdm").session(20, before=3, late=1)
    messages, _ = run(tmp_path, lines, "binance-usdm")
    received = {int(line.split(b" ")[0]) for line in lines}
    recv = [m["recv_ns"] for m in messages]
    assert recv == sorted(recv), "a tape's clock never runs backwards"
    assert {m["source_time_ns"] for m in messages[1:]} <= received
    engine = {message(line)["T"] * 1_000_000 for line in lines}
    assert {m["exchange_time_ns"] for m in messages[1:]} <= engine
    at = next(i for i, m in enumerate(messages) if m["template"] == wire.SNAPSHOT)
    waited = [m for m in messages[at + 1 :] if m["source_time_ns"] < messages[at]["source_time_ns"]]
    assert waited, "diffs from before the snapshot stand after it"
    assert {m["recv_ns"] for m in waited} == {messages[at]["recv_ns"]}


def test_a_spot_snapshot_takes_the_latest_exchange_time(tmp_path):
    lines = MockBinance("binance-spot").session(10)
    messages, _ = run(tmp_path, lines, "binance-spot")
    at = next(i for i, m in enumerate(messages) if m["template"] == wire.SNAPSHOT)
    cut = next(i for i, line in enumerate(lines) if is_snapshot(line))
    stamps = [message(x).get("T") or message(x).get("E") or 0 for x in lines[:cut]]
    assert messages[at]["exchange_time_ns"] == max(stamps) * 1_000_000


def drop_diff(lines: list[bytes], which: int) -> list[bytes]:
    places = [i for i, line in enumerate(lines) if is_diff(line)]
    return lines[: places[which]] + lines[places[which] + 1 :]


@pytest.mark.parametrize("venue", VENUES)
def test_a_hole_is_marked_once_and_a_later_snapshot_heals_it(tmp_path, venue):
    market = MockBinance(venue, seed=2)
    lines = market.session(30, before=3)
    lines = drop_diff(lines, 15)
    snapshot = market.snapshot()
    more: list[bytes] = []
    for i in range(6):
        more += market.activity()
        more.append(market.diff())
        if i == 2:
            more.append(snapshot)
    messages, done = run(tmp_path, lines + more, venue)
    assert done.gaps == 1
    assert done.snapshots == 2
    marked = [m for m in messages if m["flags"] & wire.FLAG_SOURCE_GAP]
    assert len(marked) == 1
    assert (marked[0]["template"], marked[0]["bids"], marked[0]["asks"]) == (wire.DELTA, [], [])
    kinds = [m["template"] for m in messages[messages.index(marked[0]) + 1 :]]
    healed = kinds.index(wire.SNAPSHOT)
    assert wire.DELTA not in kinds[:healed], "no diff of an unknown book reaches the tape"
    assert book_of(messages) == (market.bids, market.asks)


def book_of(messages: list[dict[str, Any]]) -> tuple[dict[int, int], dict[int, int]]:
    bids: dict[int, int] = {}
    asks: dict[int, int] = {}
    for m in messages:
        if m["template"] == wire.SNAPSHOT:
            bids, asks = dict(m["bids"]), dict(m["asks"])
        elif m["template"] == wire.DELTA:
            for book, side in ((bids, "bids"), (asks, "asks")):
                for price, quantity in m[side]:
                    if quantity:
                        book[price] = quantity
                    else:
                        book.pop(price, None)
    return bids, asks


@pytest.mark.parametrize("venue", VENUES)
def test_the_final_book_is_the_exchanges(tmp_path, venue):
    market = MockBinance(venue, seed=9)
    lines = market.session(80)
    lines.append(market.diff())
    messages, _ = run(tmp_path, lines, venue)
    assert book_of(messages) == (market.bids, market.asks)


def test_a_hole_among_waiting_diffs_is_found_when_they_are_applied(tmp_path):
    lines = MockBinance("binance-usdm", seed=4).session(30, before=8, late=6)
    messages, done = run(tmp_path, drop_diff(lines, 5), "binance-usdm")
    assert done.gaps == 1
    assert sum(m["flags"] & wire.FLAG_SOURCE_GAP for m in messages) == 1


def test_a_futures_diff_may_build_on_an_id_just_before_the_snapshots(tmp_path):
    market = MockBinance("binance-usdm", seed=6)
    market.activity()
    first = market.diff()
    snapshot = edit(market.snapshot(), lastUpdateId=market.update_id + 1)
    market.update_id += 1
    market.activity()
    lines = [first, snapshot, market.diff()]
    assert message(lines[2])["U"] > message(snapshot)["lastUpdateId"] > message(first)["u"]
    _, done = run(tmp_path, lines, "binance-usdm")
    assert (done.gaps, done.deltas) == (0, 1)


@pytest.mark.parametrize("venue", VENUES)
def test_a_snapshot_older_than_the_diffs_is_not_used(tmp_path, venue):
    market = MockBinance(venue)
    old = market.snapshot()
    market.activity()
    market.diff()
    lines = []
    for _ in range(3):
        market.activity()
        lines.append(market.diff())
    with pytest.raises(InputError, match="no REST snapshot that joins"):
        run(tmp_path, [*lines, old], venue)
    _, done = run(tmp_path, [*lines, old, market.snapshot()], venue)
    assert done.snapshots == 1
    assert done.counts["unused_snapshots"] == 1


def test_a_snapshot_that_a_whole_book_does_not_need_is_left_out(tmp_path):
    market = MockBinance("binance-usdm")
    lines = market.session(20)
    lines += [market.snapshot(5), *market.activity(), market.diff()]
    messages, done = run(tmp_path, lines, "binance-usdm")
    assert done.snapshots == 1
    assert done.counts["unused_snapshots"] == 1
    assert book_of(messages) == (market.bids, market.asks)


def test_a_diff_that_comes_twice_is_taken_once(tmp_path):
    lines = MockBinance("binance-usdm").session(20)
    last = [line for line in lines if is_diff(line)][-1]
    messages, done = run(tmp_path, [*lines, last], "binance-usdm")
    assert done.gaps == 0
    assert done.counts["old_diffs"] >= 1
    assert plain(messages) == reference(lines, "binance-usdm")


def test_trades_before_the_snapshot_are_kept(tmp_path):
    market = MockBinance("binance-spot")
    lines = [market.trade(), *market.session(10)]
    messages, _ = run(tmp_path, lines, "binance-spot")
    assert messages[1]["template"] == wire.TRADE


def test_trades_off_the_book_are_counted_and_left_out(tmp_path):
    market = MockBinance("binance-usdm")
    lines = market.session(10)
    off = [market.trade(X="INSURANCE_FUND"), market.trade(X="NA", p="0", q="0")]
    messages, done = run(tmp_path, lines + off, "binance-usdm")
    assert done.counts["off_book_trades"] == 2
    assert plain(messages) == reference(lines, "binance-usdm")


def test_trades_are_not_counted_twice_where_both_streams_are_recorded(tmp_path):
    market = MockBinance("binance-usdm")
    lines = [line for line in market.session(10) if message(line).get("e") != "trade"]
    single = market.trade()
    both = [single, edit(single, e="aggTrade", t=None, a=9)]
    _, done = run(tmp_path, lines + both, "binance-usdm")
    assert (done.trades, done.counts["other_lines"]) == (1, 1)
    messages, done = run(tmp_path, [*lines, both[1]], "binance-usdm")
    assert done.trades == 1
    assert messages[-1]["trade_id"] == 9


def test_other_lines_are_counted(tmp_path):
    lines = MockBinance("binance-usdm").session(10)
    other = b'1700000000000000000 {"stream":"x","data":{"e":"markPriceUpdate","s":"TESTUSDT"}}'
    _, done = run(tmp_path, [other, *lines, b"", other], "binance-usdm")
    assert done.counts["other_lines"] == 2
    assert done.lines == len(lines) + 3


def test_a_receive_clock_that_runs_backwards_is_counted(tmp_path):
    lines = MockBinance("binance-usdm").session(20)
    stamp, _, rest = lines[-2].partition(b" ")
    lines[-2] = str(int(stamp) - 10**12).encode() + b" " + rest
    messages, done = run(tmp_path, lines, "binance-usdm")
    _, clean = run(tmp_path, MockBinance("binance-usdm").session(20), "binance-usdm")
    assert done.counts["clock_backwards"] == clean.counts["clock_backwards"] + 1
    recv = [m["recv_ns"] for m in messages]
    assert recv == sorted(recv)


@pytest.mark.parametrize("venue", VENUES)
def test_the_decoder_makes_the_same_tape_as_the_scanner(tmp_path, venue):
    lines = MockBinance(venue, seed=8).session(40)
    spaced = [
        line.partition(b" ")[0] + b" " + json.dumps(json.loads(line.partition(b" ")[2])).encode()
        for line in lines
    ]
    _, fast = run(tmp_path, lines, venue)
    _, slow = run(tmp_path, spaced, venue)
    assert fast.counts["slow_lines"] == 0
    assert slow.counts["slow_lines"] == len(lines)
    assert Path(fast.tape).read_bytes() == Path(slow.tape).read_bytes()


def test_both_paths_make_one_tape_of_real_data(tmp_path, data_dir):
    import gzip

    text = gzip.decompress((data_dir / "binance" / "spot_ethusdt_20240808.gz").read_bytes())
    lines = text.split(b"\n")[:12_000]
    spaced = [line.replace(b'":', b'": ', 1) if line else line for line in lines]
    _, fast = run(tmp_path, lines, "binance-spot")
    _, slow = run(tmp_path, spaced, "binance-spot")
    assert (fast.counts["slow_lines"], slow.counts["slow_lines"]) == (0, 12_000)
    assert Path(fast.tape).read_bytes() == Path(slow.tape).read_bytes()


def test_the_tape_is_the_same_whatever_the_block_size(tmp_path, monkeypatch):
    lines = MockBinance("binance-coinm").session(40)
    _, once = run(tmp_path, lines, "binance-coinm")
    monkeypatch.setattr(recording_module.Recording.__init__, "__kwdefaults__", {
        "block_bytes": 700, "progress": None})  # fmt: skip
    _, again = run(tmp_path, lines, "binance-coinm")
    assert Path(once.tape).read_bytes() == Path(again.tape).read_bytes()


def test_the_grid_is_the_least_that_holds_every_number(tmp_path, monkeypatch):
    market = MockBinance("binance-usdm", price_decimals=3, quantity_decimals=4)
    market.bids = {p * 100: q * 100 for p, q in market.bids.items()}
    market.asks = {p * 100: q * 100 for p, q in market.asks.items()}
    coarse = [market.snapshot()]
    for i in range(50):
        coarse += market.change(0, 900_000 + 100 * i, 300)
        coarse.append(market.diff())
    fine = [*coarse, *market.change(0, 900_001, 100), market.diff()]
    finer = [*fine, *market.change(0, 900_100, 1), market.diff()]
    monkeypatch.setattr(recording_module.Recording.__init__, "__kwdefaults__", {
        "block_bytes": 2000, "progress": None})  # fmt: skip
    for lines, tick, lot in ((coarse, "0.1", "0.01"), (fine, "0.001", "0.01"),
                             (finer, "0.001", "0.0001")):  # fmt: skip
        messages, done = run(tmp_path, lines, "binance-usdm")
        assert (done.tick, done.lot) == (tick, lot)
        assert done.deltas == sum(map(is_diff, lines))
    assert messages[-1]["bids"] == [(900_100, 1)]


def test_a_coarser_grid_of_the_users_is_kept_or_refused(tmp_path):
    market = MockBinance("binance-usdm")
    market.bids = {p * 50: 2000 for p in range(100, 200)}
    market.asks = {p * 50: 2000 for p in range(200, 300)}
    lines = [market.snapshot(), *market.change(0, 9_900, 4000), market.diff()]
    messages, done = run(tmp_path, lines, "binance-usdm", tick="0.5", lot="2")
    assert (done.tick, done.lot) == ("0.5", "2")
    assert messages[-1]["bids"] == [(198, 2)]
    with pytest.raises(InputError, match="off the grid") as caught:
        run(tmp_path, [*lines, *market.change(0, 9_901, 2000), market.diff()], "binance-usdm",
            tick="0.5")  # fmt: skip
    text = str(caught.value)
    assert "line 4 (byte " in text
    assert "multiple of 0.5" in text
    assert "99.01" in text


@pytest.mark.parametrize("size", ["0", "-1", "NaN", "x", "Infinity", "1e-30"])
def test_a_size_that_is_none_is_refused(tmp_path, size):
    lines = MockBinance("binance-usdm").session(5, before=2, late=1)
    with pytest.raises(InputError, match="--tick"):
        run(tmp_path, lines, "binance-usdm", tick=size)


def two_symbols(venue: str = "binance-coinm") -> list[bytes]:
    a = MockBinance(venue, "AUSDT", seed=1).session(20)
    b = MockBinance(venue, "BUSDT", seed=2).session(20)
    return [line for pair in zip(a, b, strict=False) for line in pair]


def test_one_of_several_symbols_is_taken_by_name(tmp_path):
    messages, done = run(tmp_path, two_symbols(), "binance-coinm", symbol="BUSDT")
    assert done.symbol == "BUSDT"
    alone = MockBinance("binance-coinm", "BUSDT", seed=2).session(20)
    cut = [line for line in two_symbols() if line in set(alone)]
    assert plain(messages) == reference(cut, "binance-coinm")
    assert done.counts["other_symbols"] > 0


def test_several_symbols_without_a_name_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"several symbols.*BUSDT.*pass --symbol"):
        run(tmp_path, two_symbols(), "binance-coinm")


def test_a_nameless_snapshot_among_several_symbols_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not say its symbol"):
        run(tmp_path, two_symbols("binance-usdm"), "binance-usdm", symbol="BUSDT")


def test_an_unknown_symbol_is_refused_and_the_known_ones_named(tmp_path):
    with pytest.raises(InputError, match="unknown symbol; expected CUSDT; found AUSDT, BUSDT"):
        run(tmp_path, two_symbols(), "binance-coinm", symbol="CUSDT")


def test_a_recording_without_a_snapshot_is_refused(tmp_path):
    lines = [line for line in MockBinance("binance-usdm").session(10) if not is_snapshot(line)]
    with pytest.raises(InputError, match="no REST snapshot in the recording"):
        run(tmp_path, lines, "binance-usdm")
    assert not list(tmp_path.rglob("*.tape")), "a tape without a book is of no use"


def test_a_snapshot_out_of_order_is_refused(tmp_path):
    market = MockBinance("binance-usdm")
    snapshot = market.snapshot()
    asks = message(snapshot)["asks"]
    with pytest.raises(InputError, match="snapshot out of order"):
        run(tmp_path, [edit(snapshot, asks=asks[::-1]), *market.activity(), market.diff()],
            "binance-usdm")  # fmt: skip


def test_a_crossed_book_is_data(tmp_path):
    market = MockBinance("binance-usdm")
    lines = market.session(10)
    crossing = edit(market.diff(), b=[["150.00", "1.000"]], u=market.update_id + 1)
    messages, done = run(tmp_path, [*lines, crossing], "binance-usdm")
    assert done.gaps == 0
    assert messages[-1]["bids"] == [(15_000, 1_000)]


def test_a_shelf_that_is_full_forgets_the_oldest(tmp_path, monkeypatch):
    import numpy as np

    from feeds.venues import binance_sync

    monkeypatch.setattr(binance_sync, "new_shelf", lambda: np.empty(300, dtype=np.int64))
    market = MockBinance("binance-usdm")
    lines = market.session(200, before=150, late=1)
    messages, done = run(tmp_path, lines, "binance-usdm")
    assert done.counts["forgotten"] > 50
    assert done.gaps == 0
    assert plain(messages) == reference(lines, "binance-usdm")


@pytest.mark.parametrize(
    ("file", "venue", "messages", "deltas", "tick", "lot"),
    [
        ("usdm_btcusdt_20240808.gz", "binance-usdm", 27_861, 6_547, "0.1", "0.001"),
        ("cm_btcusd_perp_20240808.gz", "binance-coinm", 29_111, 26_824, "0.1", "1"),
        ("spot_ethusdt_20240808.gz", "binance-spot", 9_539, 3_432, "0.01", "0.00001"),
    ],
)
def test_real_recordings_convert_whole(
    tmp_path, data_dir, file, venue, messages, deltas, tick, lot
):
    done = convert(data_dir / "binance" / file, venue, out=tmp_path / "x.tape")
    assert isinstance(done, Converted)
    assert (done.messages, done.deltas, done.gaps) == (messages, deltas, 0)
    assert (done.tick, done.lot) == (tick, lot)
    assert done.counts["slow_lines"] == 0
    assert sum(1 for _ in TapeReader(done.tape).records()) == messages + 1
