"""The same stream through hftbacktest: its Rust book behind a Numba loop of ``wait_next_feed``.

It gets what went into our books, in the same order, as its array of events in memory: depth
updates, snapshots and trades, each message at one time, so that one call of ``wait_next_feed``
takes one message. Prices are in ticks and quantities in lots, tick and lot size are 1, so that
no rounding stands between its book and ours. Two ways:

*both sides*
    Events for the exchange and for the local side, as its own converters make them: two books,
    that of its order matching and that of the strategy.
*local side*
    The strategy's book alone, which is the work that our book does.

In both, what favours it: a depth over a range of interest (levels beyond `ROI_MARGIN` are passed
over, we keep them), no checksum or sequence to verify, no best levels copied, and the first call,
in which it looks through its data, is not counted.

Source: hftbacktest documentation, "Data" (event format and flags) and "Market Depth"; checked
against its sources in ``hftbacktest/src/backtest`` and ``hftbacktest/src/depth``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final

import numpy as np
from numba import njit

from benchmarks.book_replay import (
    KIND_ASK,
    KIND_BID,
    KIND_CLEAR,
    KIND_TRADE,
    ROW_EXCHANGE_TIME,
    ROW_KIND,
    ROW_MESSAGE,
    ROW_PRICE,
    ROW_QUANTITY,
    ROW_RECEIVED,
    ROW_SLOT,
)
from engine.book import ASK, BID
from feeds.errors import InputError
from feeds.wire import AGGRESSOR_BUY, AGGRESSOR_SELL, AGGRESSOR_UNKNOWN

ROI_MARGIN: Final = 0.1  # of the lowest and highest trade price
MAX_ROI_TICKS: Final = 1 << 23
FOREVER_NS: Final = 1 << 60

# What ``wait_next_feed`` gives back.
_TIMED_OUT: Final = 0
_END_OF_DATA: Final = 1
_FEED: Final = 2


@dataclass(frozen=True)
class SideLevels:
    """One side of its book at the end, within its range of interest.

    Attributes
    ----------
    best : int
        Best price in ticks, as it tells it.
    prices, quantities : ndarray of int64
        Of its levels, ascending.
    """

    best: int
    prices: np.ndarray
    quantities: np.ndarray


class HftBacktest:
    """hftbacktest over the applied rows of `benchmarks.book_replay`.

    Parameters
    ----------
    rows : ndarray of int64, shape (n, ROW_FIELDS)
    exchange : bool
        Both sides, or else the local side alone.

    Attributes
    ----------
    library : str
        With its version.
    roi : dict
        Slot → (lowest, highest) price of the range of interest, in ticks.
    books : dict
        Slot → bids and asks after the last run.

    Raises
    ------
    InputError
        If it is not installed, the stream has no levels, or its prices span too many ticks.
    """

    def __init__(self, rows: np.ndarray, *, exchange: bool) -> None:
        self._library = _hftbacktest()
        self.library: Final = f"hftbacktest {version('hftbacktest')}"
        self.roi: Final[dict[int, tuple[int, int]]] = {}
        self.books: dict[int, tuple[SideLevels, SideLevels]] = {}
        self._events: Final[dict[int, np.ndarray]] = {}
        exchange_ns = np.maximum.accumulate(rows[:, ROW_EXCHANGE_TIME])
        local_ns = np.maximum.accumulate(rows[:, ROW_RECEIVED])
        # It takes no feed from before it was sent: the local clock goes forward where needed.
        local_ns = local_ns + max(0, int((exchange_ns - local_ns).max(initial=0)))
        for slot in np.unique(rows[:, ROW_SLOT]).tolist():
            own = rows[:, ROW_SLOT] == slot
            mine = rows[own]
            self.roi[slot] = _range_of_interest(mine)
            self._events[slot] = events_of(
                self._library,
                mine,
                exchange_ns[own],
                _apart(local_ns[own], mine),
                exchange=exchange,
            )
        if not self._events:
            raise InputError("no level to replay", where="the rivals of bench replay")

    def run(self) -> float:
        """Replay all events; returns the seconds it took."""
        assets = [
            self._library.BacktestAsset()
            .data(events)
            .linear_asset(1.0)
            .constant_order_latency(0, 0)
            .risk_adverse_queue_model()
            .no_partial_fill_exchange()
            .trading_value_fee_model(0.0, 0.0)
            .tick_size(1.0)
            .lot_size(1.0)
            .roi_lb(float(self.roi[slot][0]))
            .roi_ub(float(self.roi[slot][1]))
            for slot, events in self._events.items()
        ]
        backtest = self._library.ROIVectorMarketDepthBacktest(assets)
        try:
            assert backtest.wait_next_feed(False, FOREVER_NS) == _FEED
            started = time.perf_counter()
            status = wait_all(backtest)
            seconds = time.perf_counter() - started
            assert status == _END_OF_DATA, f"hftbacktest stopped with {status}"
            self.books = {
                slot: (
                    _side(depth.best_bid_tick, depth.bid_depth, self.roi[slot][0]),
                    _side(depth.best_ask_tick, depth.ask_depth, self.roi[slot][0]),
                )
                for slot, depth in ((s, backtest.depth(i)) for i, s in enumerate(self._events))
            }
        finally:
            backtest.close()
        return seconds

    def check(self, slot: int, bids: np.ndarray, asks: np.ndarray) -> None:
        """Assert that its book is this one, level by level within its range of interest.

        Where the book ends crossed, its best prices are not compared: it takes a crossing update
        for the end of the levels that it crosses.
        """
        if slot not in self.roi:
            assert len(bids) == len(asks) == 0, "hftbacktest was not given this instrument"
            return
        low, high = self.roi[slot]
        crossed = len(bids) > 0 and len(asks) > 0 and bids[0, 0] >= asks[0, 0]
        for side, levels in ((BID, bids), (ASK, asks)):
            found = self.books[slot][side]
            inside = levels[(levels[:, 0] >= low) & (levels[:, 0] <= high)]
            inside = inside[np.argsort(inside[:, 0])]
            assert np.array_equal(found.prices, inside[:, 0]), "hftbacktest has other levels"
            assert np.array_equal(found.quantities, inside[:, 1]), "other quantities"
            if len(inside) and not crossed:
                assert found.best == levels[0, 0], "hftbacktest has another best price"


@njit
def wait_all(backtest):  # type: ignore[no-untyped-def]
    """Take feed after feed to the end of the data; returns the last status."""
    status = _FEED
    while status == _FEED or status == _TIMED_OUT:
        status = backtest.wait_next_feed(False, FOREVER_NS)
    return status


def events_of(
    library: Any,
    rows: np.ndarray,
    exchange_ns: np.ndarray,
    local_ns: np.ndarray,
    *,
    exchange: bool,
) -> np.ndarray:
    """Applied rows of one instrument as hftbacktest's events, behind one that only opens.

    Parameters
    ----------
    library : module
        hftbacktest.
    rows : ndarray of int64, shape (n, ROW_FIELDS)
    exchange_ns, local_ns : ndarray of int64, shape (n,)
        Ascending; ns since the UNIX epoch.
    exchange : bool
        Both sides, or else the local side alone.

    Returns
    -------
    ndarray of ``hftbacktest.types.event_dtype``, shape (n + 1,)
    """
    kinds, messages = rows[:, ROW_KIND], rows[:, ROW_MESSAGE]
    replaced = np.isin(messages, messages[kinds == KIND_CLEAR])
    events = np.zeros(len(rows) + 1, dtype=library.types.event_dtype)
    opening, rest = events[:1], events[1:]
    for kind, of_delta, of_snapshot in (
        (KIND_BID, library.DEPTH_EVENT, library.DEPTH_SNAPSHOT_EVENT),
        (KIND_ASK, library.DEPTH_EVENT, library.DEPTH_SNAPSHOT_EVENT),
    ):
        side = library.BUY_EVENT if kind == KIND_BID else library.SELL_EVENT
        rest["ev"][kinds == kind] = of_delta | side
        rest["ev"][(kinds == kind) & replaced] = of_snapshot | side
    rest["ev"][kinds == KIND_CLEAR] = library.DEPTH_CLEAR_EVENT
    for aggressor, side in (
        (AGGRESSOR_UNKNOWN, 0),
        (AGGRESSOR_BUY, library.BUY_EVENT),
        (AGGRESSOR_SELL, library.SELL_EVENT),
    ):
        rest["ev"][kinds == KIND_TRADE + aggressor] = library.TRADE_EVENT | side
    rest["ev"] |= np.uint64(library.LOCAL_EVENT | (library.EXCH_EVENT if exchange else 0))
    rest["exch_ts"], rest["local_ts"] = exchange_ns, local_ns
    rest["px"], rest["qty"] = rows[:, ROW_PRICE], rows[:, ROW_QUANTITY]
    opening["ev"] = library.TRADE_EVENT | library.EXCH_EVENT | library.LOCAL_EVENT
    opening["exch_ts"], opening["local_ts"] = exchange_ns[0] - 1, local_ns[0] - 1
    opening["px"], opening["qty"] = 1.0, 1.0
    return events


def _hftbacktest() -> Any:
    try:
        import hftbacktest
    except ImportError as error:
        raise InputError(
            "hftbacktest is not installed",
            where="the rivals of bench replay",
            expected="the package hftbacktest",
            found=str(error),
            fix="pip install --no-deps hftbacktest; its pin of numpy < 2.3 is not needed here",
        ) from None
    return hftbacktest


def _apart(local_ns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Local times at which no two messages meet: one wait takes all events of one time."""
    first = np.flatnonzero(np.diff(rows[:, ROW_MESSAGE], prepend=-1))
    times = local_ns[first]
    steps = np.arange(len(times), dtype=np.int64)
    apart = np.maximum.accumulate(times - steps) + steps
    spread: np.ndarray = np.repeat(apart, np.diff(first, append=len(rows)))
    return spread


def _range_of_interest(rows: np.ndarray) -> tuple[int, int]:
    """Lowest and highest price in ticks around the trades, or of all levels without any."""
    kinds = rows[:, ROW_KIND]
    traded = rows[kinds >= KIND_TRADE, ROW_PRICE]
    if len(traded):
        low = int(traded.min() * (1 - ROI_MARGIN))
        high = int(traded.max() * (1 + ROI_MARGIN)) + 1
    else:
        prices = rows[kinds < KIND_CLEAR, ROW_PRICE]
        low, high = (int(prices.min()), int(prices.max())) if len(prices) else (0, 1)
    if high - low > MAX_ROI_TICKS:
        raise InputError(
            "prices span too many ticks for hftbacktest's vector",
            where="the rivals of bench replay",
            expected=f"at most {MAX_ROI_TICKS:,} ticks",
            found=f"{high - low:,}",
        )
    return low, high


def _side(best: int, depth: np.ndarray, low: int) -> SideLevels:
    # A copy: the vector is the library's own memory and goes with it.
    cells = np.flatnonzero(depth)
    return SideLevels(int(best), cells + low, depth[cells].astype(np.int64))
