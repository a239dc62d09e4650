"""Books beside the pipeline's: the engine's own alone, a book of dicts, and hftbacktest's."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from benchmarks.book_replay import (
    DROPPED_LEVELS,
    KIND_CLEAR,
    LEVELS,
    MESSAGES,
    ROW_KIND,
    BookReplay,
    Records,
)
from benchmarks.dict_book import BookMessage, DictBook, DictBooks
from benchmarks.hftbacktest_rival import HftBacktest
from engine.book import ASK, BID
from engine.config import Config, default_config
from engine.pipeline import Pipeline
from feeds import wire
from feeds.errors import InputError
from feeds.faults import Fault, FaultInjector
from feeds.simulator import Simulator
from tests.engine import records as made


def faulty() -> tuple[Config, Records]:
    """Two simulated instruments with lost, late and doubled messages, restarts and snapshots."""
    simulator = Simulator(seed=3, n_instruments=2)
    faults = [Fault("drop", 0.01), Fault("reorder", 0.02), Fault("duplicate", 0.02)]
    faults.append(Fault("reset", 0.001))
    stream = [payload for _, payload in FaultInjector(faults, 1).apply(simulator.stream(3_000))]
    names = [(item.venue, item.symbol) for item in simulator.instruments]
    data = np.frombuffer(made.records(stream), dtype=np.uint8).copy()
    return default_config(names), [(data, 0, len(data))]


def healed() -> tuple[Config, Records]:
    """One instrument whose book is lost and opened again by a snapshot, with a late message."""
    stream = [*made.opening(0), *made.flow(0, 2, 300, seed=1)]
    hole = made.flow(0, 302, 40, seed=2)
    late = [*hole[:10], *hole[11:20], hole[10], *hole[20:]]
    bids, asks = made.ladder(1_010)
    lost = made.flow(0, 345, 30, seed=3, middle=1_010)  # 342 to 344 never come
    again = made.book(wire.SNAPSHOT, 0, 375, bids, asks)
    after = made.flow(0, 376, 200, seed=4, middle=1_010)
    data = np.frombuffer(made.records([*stream, *late, *lost, again, *after]), dtype=np.uint8)
    return made.config(("A",)), [(data.copy(), 0, len(data))]


STREAMS = {"faulty": faulty, "healed": healed}


@pytest.fixture(params=STREAMS)
def stream(request: pytest.FixtureRequest) -> tuple[Config, Records]:
    made_stream: tuple[Config, Records] = STREAMS[request.param]()
    return made_stream


def replayed(config: Config, records: Records, *, written: bool = False) -> BookReplay:
    room = sum(stop - start for _, start, stop in records) // wire.LEVEL_BYTES
    replay = BookReplay(config, room if written else 0)
    assert replay.run(records) > 0
    return replay


def pipeline_of(config: Config, records: Records) -> Pipeline:
    pipeline = Pipeline(config, None, None, compute_always=True)
    for buf, start, stop in records:
        at = start
        while at < stop:
            at = pipeline.advance(buf, at, stop)
    return pipeline


def test_the_books_alone_are_the_pipelines(stream: tuple[Config, Records]) -> None:
    pipeline = pipeline_of(*stream)
    counters = pipeline.counters
    assert counters["gaps"] > 0
    assert counters["late"] > 0
    for written in (False, True):
        replay = replayed(*stream, written=written)
        for slot in range(len(pipeline.names)):
            for side in (BID, ASK):
                levels = pipeline.book(slot, side)
                assert len(levels) > 10
                np.testing.assert_array_equal(replay.book(slot, side), levels)
        assert replay.counts[MESSAGES] == counters["messages"]
        assert replay.counts[LEVELS] == counters["book_levels"]
        assert replay.counts[DROPPED_LEVELS] == counters["dropped_levels"] == 0


def test_the_written_rows_are_what_was_applied(stream: tuple[Config, Records]) -> None:
    pipeline = pipeline_of(*stream)
    rows = replayed(*stream, written=True).rows()
    assert np.count_nonzero(rows[:, ROW_KIND] < KIND_CLEAR) == pipeline.counters["book_levels"]
    assert np.count_nonzero(rows[:, ROW_KIND] > KIND_CLEAR) == pipeline.counters["trades"]
    assert np.count_nonzero(rows[:, ROW_KIND] == KIND_CLEAR) == pipeline.counters["snapshots"]
    assert len(replayed(*stream).rows()) == 0


def test_the_dict_books_are_the_pipelines(stream: tuple[Config, Records]) -> None:
    pipeline = pipeline_of(*stream)
    books = DictBooks(replayed(*stream, written=True).rows())
    books.run()
    for slot in range(len(pipeline.names)):
        sides = [pipeline.book(slot, side) for side in (BID, ASK)]
        books.check(slot, *sides)
        sides[BID][0, 1] += 1
        with pytest.raises(AssertionError):
            books.check(slot, *sides)


def test_a_dict_book_sets_removes_and_replaces() -> None:
    book = DictBook()
    book.apply(BookMessage(0, True, [(99, 5), (98, 7)], [(101, 4)]))
    book.apply(BookMessage(0, False, [(99, 0), (97, 0), (96, 1)], [(100, 2), (101, 9)]))
    assert book.levels(BID).tolist() == [[98, 7], [96, 1]]
    assert book.levels(ASK).tolist() == [[100, 2], [101, 9]]
    book.apply(BookMessage(0, True, [], [(50, 1)]))
    assert book.levels(BID).shape == (0, 2)
    assert book.levels(ASK).tolist() == [[50, 1]]


@pytest.mark.parametrize("exchange", [True, False], ids=["both sides", "local side"])
def test_hftbacktest_ends_with_the_pipelines_best_prices(
    exchange: bool, stream: tuple[Config, Records]
) -> None:
    pytest.importorskip("hftbacktest", reason="hftbacktest is not installed")
    pipeline = pipeline_of(*stream)
    rival = HftBacktest(replayed(*stream, written=True).rows(), exchange=exchange)
    for _ in range(2):  # a second run starts afresh
        assert rival.run() > 0
        for slot in range(len(pipeline.names)):
            sides = [pipeline.book(slot, side) for side in (BID, ASK)]
            assert [side.best for side in rival.books[slot]] == [s[0, 0] for s in sides]
            rival.check(slot, *sides)
            sides[ASK][0, 1] += 1
            with pytest.raises(AssertionError):
                rival.check(slot, *sides)


def test_a_missing_hftbacktest_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hftbacktest", None)
    rows = replayed(*healed(), written=True).rows()
    with pytest.raises(InputError, match="pip install --no-deps hftbacktest"):
        HftBacktest(rows, exchange=True)


def test_a_stream_without_levels_has_no_rival() -> None:
    pytest.importorskip("hftbacktest", reason="hftbacktest is not installed")
    with pytest.raises(InputError, match="no level"):
        HftBacktest(np.empty((0, 7), dtype=np.int64), exchange=True)
