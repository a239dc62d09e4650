"""LOBSTER's two files become a book that is the orderbook file's after every event."""

from __future__ import annotations

import gzip
import zoneinfo
from datetime import datetime
from pathlib import Path

import pytest

from feeds import wire
from feeds.errors import InputError
from feeds.venues.convert import convert
from tests.feeds.venues.mock_lobster import MockLobster
from tests.feeds.venues.test_binance import book_of, read


def converted(tmp_path: Path, mock: MockLobster, **options):
    done = convert(mock.save(tmp_path), "lobster", out=tmp_path / "x.tape", **options)
    return read(tmp_path / "x.tape"), done


@pytest.mark.parametrize("levels", [1, 3, 10])
@pytest.mark.parametrize("seed", range(3))
def test_the_book_is_the_orderbook_files_after_every_event(tmp_path, levels, seed):
    mock = MockLobster(levels, seed).session()
    messages, done = converted(tmp_path, mock)
    by_time: dict[int, list[int]] = {}
    for i, m in enumerate(messages[1:], 1):
        by_time.setdefault(m["recv_ns"], []).append(i)
    rows_at: dict[int, str] = {}
    for line, row in zip(mock.messages, mock.rows, strict=True):
        rows_at[utc_ns(line)] = row
    for ns, places in by_time.items():
        bids, asks = book_of(messages[: places[-1] + 1])
        cells = [int(x) for x in rows_at[ns].split(",")]
        assert sorted(asks.items()) == real(cells[0::4], cells[1::4])
        assert sorted(bids.items(), reverse=True) == real(cells[2::4], cells[3::4])
    assert done.lines == len(mock.messages)
    assert (done.tick, done.lot, done.symbol) == ("0.0001", "1", "TEST")
    assert [m["seq"] for m in messages[1:]] == list(range(1, done.messages + 1))


def real(prices: list[int], sizes: list[int]) -> list[tuple[int, int]]:
    return [(p, s) for p, s in zip(prices, sizes, strict=True) if s > 0]


def utc_ns(line: str, date: str = "2012-06-21") -> int:
    """UTC time of a message, by another way than the converter's."""
    text = line.split(",")[0]
    whole, _, fraction = text.partition(".")
    zone = zoneinfo.ZoneInfo("America/New_York")
    hours, rest = divmod(int(whole), 3600)
    moment = datetime.fromisoformat(date).replace(
        hour=hours, minute=rest // 60, second=rest % 60, tzinfo=zone
    )
    return int(moment.timestamp()) * 10**9 + int(fraction.ljust(9, "0"))


@pytest.mark.parametrize(
    ("date", "offset_h"), [("2012-06-21", 4), ("2012-12-21", 5), ("2024-03-11", 4)]
)
def test_times_are_new_yorks_wall_clock_to_the_nanosecond(tmp_path, date, offset_h):
    mock = MockLobster(date=date)
    mock.now_ns = 34_200_004_241_176
    mock.random.randint = lambda low, high: low  # type: ignore[method-assign]
    mock.write_line(1, 5, 999_000, 1)
    mock.rows[-1] = mock.row()
    messages, _ = converted(tmp_path, mock)
    midnight = datetime.fromisoformat(date + "T00:00:00+00:00").timestamp()
    expected = (int(midnight) + offset_h * 3600) * 10**9 + 34_200_004_241_176
    assert {m["exchange_time_ns"] for m in messages[1:]} == {expected}
    assert {m["recv_ns"] for m in messages} == {expected}


def one_event(kind: int, size: int, price: int, direction: int, levels: int = 3) -> MockLobster:
    mock = MockLobster(levels)
    mock.write_line(1, 1, 999_900, 1)
    mock.write_line(kind, size, price, direction)
    return mock


@pytest.mark.parametrize(
    ("direction", "aggressor"), [(-1, wire.AGGRESSOR_BUY), (1, wire.AGGRESSOR_SELL)]
)
def test_the_aggressor_is_the_other_side_of_the_resting_order(tmp_path, direction, aggressor):
    price = 999_900 if direction == 1 else 1_000_100
    mock = MockLobster()
    mock.write_line(1, 1, 999_900, 1)
    mock.books[0 if direction == 1 else 1][price] -= 40
    mock.write_line(4, 40, price, direction)
    messages, _ = converted(tmp_path, mock)
    trade, delta = messages[2:]
    assert (trade["template"], delta["template"]) == (wire.TRADE, wire.DELTA)
    assert (trade["price_ticks"], trade["quantity_lots"]) == (price, 40)
    assert (trade["aggressor"], trade["trade_id"]) == (aggressor, 2)
    assert delta["bids" if direction == 1 else "asks"] == [(price, 60)]


def test_hidden_executions_and_crosses_are_trades_alone(tmp_path):
    mock = one_event(5, 7, 1_000_050, -1)
    mock.write_line(6, 9, 1_000_000, -1)
    messages, done = converted(tmp_path, mock)
    assert [m["template"] for m in messages[2:]] == [wire.TRADE, wire.TRADE]
    assert messages[2]["price_ticks"] == 1_000_050
    assert [m["aggressor"] for m in messages[2:]] == [wire.AGGRESSOR_BUY, wire.AGGRESSOR_UNKNOWN]
    assert done.trades == 2


@pytest.mark.parametrize("price", [-1, 0, 1])
def test_halts_are_counted(tmp_path, price):
    messages, done = converted(tmp_path, one_event(7, 0, price, -1))
    assert done.counts["halts"] == 1
    assert len(messages) == 2


def test_a_level_pushed_out_of_view_is_removed(tmp_path):
    mock = MockLobster(levels=3)
    mock.write_line(1, 100, 999_900, 1)
    mock.books[0][999_950] = 11
    mock.write_line(1, 11, 999_950, 1)
    messages, _ = converted(tmp_path, mock)
    assert messages[-1]["bids"] == [(999_950, 11), (999_700, 0)]


def test_a_level_that_moves_into_view_is_taken_from_the_orderbook_row(tmp_path):
    mock = MockLobster(levels=3)
    mock.write_line(1, 100, 999_900, 1)
    del mock.books[1][1_000_200]
    mock.write_line(3, 200, 1_000_200, -1)
    messages, _ = converted(tmp_path, mock)
    assert messages[-1]["asks"] == [(1_000_200, 0), (1_000_400, 400)]


def test_compressed_files_and_a_seventh_column_are_read(tmp_path):
    mock = MockLobster().session(50)
    mock.messages = [line + ",NSDQ" for line in mock.messages]
    path = mock.save(tmp_path)
    for kind in ("message", "orderbook"):
        plain = path.with_name(path.name.replace("message", kind))
        plain.with_name(plain.name + ".gz").write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    done = convert(path.with_name(path.name + ".gz"), "lobster")
    assert done.lines == 50
    assert done.tape.endswith("_message_3.tape")


def test_a_coarser_tick_is_kept_or_refused(tmp_path):
    mock = MockLobster()
    mock.write_line(1, 100, 999_900, 1)
    messages, done = converted(tmp_path, mock, tick="0.01")
    assert done.tick == "0.01"
    assert messages[1]["bids"][0] == (9_999, 100)
    mock.write_line(5, 1, 1_000_050, 1)
    with pytest.raises(InputError, match=r"line 2 \(byte \d+\): a price off the grid"):
        converted(tmp_path, mock, tick="0.01", overwrite=True)
    with pytest.raises(InputError, match="finer than LOBSTER"):
        converted(tmp_path, mock, tick="0.00001", overwrite=True)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("34200.5,1,5,10,999900", "damaged line"),
        ("34200.5,1,5,10,999900,x", "damaged line"),
        ("34200.5,1,5,nan,999900,1", "damaged line"),
        ("-1,1,5,10,999900,1", "damaged line"),
        ("34200.5,9,5,10,999900,1", "unknown event type"),
        ("34200.5,1,5,10,-999900,1", "not positive"),
        ("34200.5,1,5,-10,999900,1", "negative size"),
        ("34200.5,1,5,10,999900,0", "unknown direction"),
    ],
)
def test_a_bad_message_names_its_line_and_keeps_what_was_written(tmp_path, line, what):
    mock = MockLobster().session(20)
    mock.messages[10] = line
    with pytest.raises(InputError, match=what) as caught:
        converted(tmp_path, mock)
    offset = sum(len(x) + 1 for x in mock.messages[:10])
    assert f"line 11 (byte {offset})" in str(caught.value)
    assert len(read(tmp_path / "x.tape")) > 5


def test_a_bad_orderbook_row_names_the_orderbook_file(tmp_path):
    mock = MockLobster().session(20)
    mock.rows[7] = mock.rows[7] + ",1"
    with pytest.raises(InputError, match=r"orderbook_3\.csv line 8"):
        converted(tmp_path, mock)


@pytest.mark.parametrize("cut", ["messages", "rows"])
def test_files_of_different_lengths_are_refused(tmp_path, cut):
    mock = MockLobster().session(20)
    getattr(mock, cut).pop()
    with pytest.raises(InputError, match="shorter than its"):
        converted(tmp_path, mock)


def test_without_an_orderbook_file_there_is_no_start(tmp_path):
    path = MockLobster().session(5).save(tmp_path)
    path.with_name(path.name.replace("message", "orderbook")).unlink()
    with pytest.raises(InputError, match="no orderbook file"):
        convert(path, "lobster")
    assert not list(tmp_path.glob("*.tape"))


def test_another_name_or_symbol_is_refused(tmp_path):
    path = MockLobster().session(5).save(tmp_path)
    with pytest.raises(InputError, match="unknown symbol; expected MSFT; found TEST"):
        convert(path, "lobster", symbol="MSFT")
    other = path.rename(tmp_path / "messages.csv")
    with pytest.raises(InputError, match="not the name of a LOBSTER"):
        convert(other, "lobster")


def test_the_real_sample_converts_whole(tmp_path, data_dir):
    path = next((data_dir / "lobster").glob("*_message_10.csv"))
    done = convert(path, "lobster", out=tmp_path / "x.tape")
    assert (done.lines, done.snapshots, done.deltas, done.trades) == (999, 1, 937, 159)
    row = path.with_name(path.name.replace("message", "orderbook")).read_text().splitlines()[-1]
    cells = [int(x) for x in row.split(",")]
    bids, asks = book_of(read(tmp_path / "x.tape"))
    assert sorted(asks.items()) == real(cells[0::4], cells[1::4])
    assert sorted(bids.items(), reverse=True) == real(cells[2::4], cells[3::4])
