# Hot path: free @njit functions; the driver at the end is for the cold path.
"""The engine's book, fed with a raw Binance recording, against the recording's bookTicker.

A bookTicker with update id ``u`` states the best bid and ask, price and quantity, as of ``u``, and
is sent whenever they change ("Individual Symbol Book Ticker Streams", developers.binance.com). A
diff brings the book to its own ``u``. Both count the same ids, so after a diff with id d the best
bid and ask are what the ticker with the largest ``u <= d`` states. Which ticker that is, is known
only once one with a greater id has been seen: the two streams run apart in the recording, either
may be ahead. Every diff that has such a pair of tickers is compared, whether or not the ticker is
new; the others are counted by reason.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Final

import numpy as np
from numba import njit

from engine.book import (
    ASK,
    BID,
    FLOW_FIELDS,
    apply_levels,
    apply_snapshot,
    best_price,
    best_quantity,
    crossed,
    new_books,
)
from feeds.inner import inner
from feeds.tape import RECORD_HEADER_BYTES
from feeds.venues import binance as fb
from feeds.venues import binance_fields as bj
from feeds.venues import binance_sync as bs
from feeds.venues.binance_decode import VENUES
from feeds.venues.binance_fields import (
    ASK_PRICE,
    ASK_QUANTITY,
    ASKS,
    BID_PRICE,
    BID_QUANTITY,
    BIDS,
    DIFF,
    FIRST_ID,
    LAST_ID,
    MAX_LEVELS_A_LINE,
    NEXT,
    PREVIOUS_ID,
    PRICE_NEEDS,
    QUANTITY_NEEDS,
    SNAPSHOT,
    TICKER,
    UNRECOGNISED,
)
from feeds.venues.binance_json import scan_line
from feeds.venues.binance_lines import DONE, FINER, SLOW, Scale, encode_symbol, walk
from feeds.venues.binance_records import O_FIELDS, put_book, room_for
from feeds.venues.binance_survey import Survey, with_grid
from feeds.venues.binance_sync import (
    D_ASKS,
    D_BIDS,
    D_FIRST,
    D_LAST,
    D_LEVELS,
    D_LINE,
    D_PREVIOUS,
    D_SIZE,
    GAP,
    LINES,
    SHELF_USED,
    SHELVE,
    SPOT_RULE,
    TAKE,
    judge_diff,
    judge_snapshot,
    keep_from,
    shelve,
)
from feeds.venues.recording import Recording
from feeds.wire import DELTA
from feeds.wire import SNAPSHOT as SNAPSHOT_MESSAGE
from replay.verdict import Difference, Verdict

MAX_LEVELS: Final = 1 << 16
SCRATCH_BYTES: Final = room_for(16 * MAX_LEVELS_A_LINE, 0)
MAX_TICKERS_AHEAD: Final = 1 << 17
MAX_DIFFS_AHEAD: Final = 1 << 17

# Columns of `tally`, int64.
COMPARED: Final = 0
EQUAL: Final = 1
CROSSED: Final = 2
FRESH: Final = 3  # compared with a ticker that no diff before it was compared with
BEFORE_TICKERS: Final = 4  # no ticker at or before the diff
AFTER_GAP: Final = 5  # the ticker may have been lost with the diffs
NOT_FOLLOWED: Final = 6  # no later ticker: it may not be the last one at or before the diff
BACKWARD_TICKERS: Final = 7
FORGOTTEN_TICKERS: Final = 8
DROPPED_LEVELS: Final = 9
TRUSTED_FROM: Final = 10  # tickers up to this id stand before a gap
T_HEAD: Final = 11
T_COUNT: Final = 12
P_HEAD: Final = 13
P_COUNT: Final = 14
COMPARED_ID: Final = 15  # u of the ticker last compared with
UNEQUAL_RUN: Final = 16
LONGEST_UNEQUAL_RUN: Final = 17
FIRST_LINE: Final = 18  # of the first difference; then four stated and four found numbers
TALLY_FIELDS: Final = 27

_TOP: Final = 4  # bid price, bid quantity, ask price, ask quantity
_T_FIELDS: Final = 1 + _TOP  # u, top
_P_FIELDS: Final = 2 + _TOP  # u, line, top


@njit("void(int64[::1], int64[::1], int64[::1])", cache=True)
def compare(tally, ticker, pending):  # type: ignore[no-untyped-def]
    """Hold one diff's top of book against the ticker that speaks of the same moment."""
    if ticker[0] <= tally[TRUSTED_FROM]:
        tally[AFTER_GAP] += 1
        return
    tally[COMPARED] += 1
    if ticker[0] != tally[COMPARED_ID]:
        tally[FRESH] += 1
        tally[COMPARED_ID] = ticker[0]
    same = True
    for i in range(_TOP):
        if ticker[1 + i] != pending[2 + i]:
            same = False
    if same:
        tally[EQUAL] += 1
        tally[UNEQUAL_RUN] = 0
        return
    tally[UNEQUAL_RUN] += 1
    tally[LONGEST_UNEQUAL_RUN] = max(tally[LONGEST_UNEQUAL_RUN], tally[UNEQUAL_RUN])
    if tally[FIRST_LINE] == 0:
        tally[FIRST_LINE] = pending[1]
        for i in range(_TOP):
            tally[FIRST_LINE + 1 + i] = ticker[1 + i]
            tally[FIRST_LINE + 1 + _TOP + i] = pending[2 + i]


@inner("void(int64[::1], int64[:,::1], int64[:,::1], int64[::1])")
def take_ticker(tally, tickers, waiting, fields):  # type: ignore[no-untyped-def]
    """Take in a ticker; diffs that waited for it are compared."""
    last = fields[LAST_ID]
    size = len(tickers)
    if tally[T_COUNT] == 0:
        # The first ticker of all: nothing speaks of what was before it.
        while tally[P_COUNT] > 0 and waiting[tally[P_HEAD], 0] < last:
            tally[BEFORE_TICKERS] += 1
            tally[P_HEAD] = (tally[P_HEAD] + 1) % len(waiting)
            tally[P_COUNT] -= 1
    else:
        newest = tickers[(tally[T_HEAD] + tally[T_COUNT] - 1) % size]
        if last <= newest[0]:
            tally[BACKWARD_TICKERS] += 1
            return
        # Diffs wait only while the newest ticker is at or before all of them.
        while tally[P_COUNT] > 0 and waiting[tally[P_HEAD], 0] < last:
            compare(tally, newest, waiting[tally[P_HEAD]])
            tally[P_HEAD] = (tally[P_HEAD] + 1) % len(waiting)
            tally[P_COUNT] -= 1
        if tally[P_COUNT] > 0:
            tally[T_HEAD] = (tally[T_HEAD] + tally[T_COUNT]) % size
            tally[T_COUNT] = 0
        elif tally[T_COUNT] == size:
            tally[T_HEAD] = (tally[T_HEAD] + 1) % size
            tally[T_COUNT] -= 1
            tally[FORGOTTEN_TICKERS] += 1
    row = tickers[(tally[T_HEAD] + tally[T_COUNT]) % size]
    row[0] = last
    # An empty side is stated as price 0 or quantity 0.
    row[1] = fields[BID_PRICE] if fields[BID_QUANTITY] > 0 else 0
    row[2] = fields[BID_QUANTITY] if fields[BID_PRICE] > 0 else 0
    row[3] = fields[ASK_PRICE] if fields[ASK_QUANTITY] > 0 else 0
    row[4] = fields[ASK_QUANTITY] if fields[ASK_PRICE] > 0 else 0
    tally[T_COUNT] += 1


@inner("void(int64[::1], int64[:,::1], int64[:,::1], int64[:,:,::1], int64[::1], int64, int64)")
def take_top(tally, tickers, waiting, top, depth, last, line):  # type: ignore[no-untyped-def]
    """Take in the top of the book after a diff: compare it, or let it wait for a later ticker."""
    if crossed(top, depth):
        tally[CROSSED] += 1
    size = len(tickers)
    while tally[T_COUNT] > 1 and tickers[(tally[T_HEAD] + 1) % size, 0] <= last:
        tally[T_HEAD] = (tally[T_HEAD] + 1) % size
        tally[T_COUNT] -= 1
    if tally[T_COUNT] > 0 and tickers[tally[T_HEAD], 0] > last:
        tally[BEFORE_TICKERS] += 1
        return
    if tally[P_COUNT] == len(waiting):
        tally[P_HEAD] = (tally[P_HEAD] + 1) % len(waiting)
        tally[P_COUNT] -= 1
        tally[NOT_FOLLOWED] += 1
    row = waiting[(tally[P_HEAD] + tally[P_COUNT]) % len(waiting)]
    row[0] = last
    row[1] = line
    row[2] = best_price(top, depth, BID)
    row[3] = best_quantity(top, depth, BID)
    row[4] = best_price(top, depth, ASK)
    row[5] = best_quantity(top, depth, ASK)
    if tally[T_COUNT] > 1:
        compare(tally, tickers[tally[T_HEAD]], row)
    else:
        tally[P_COUNT] += 1


@inner("void(int64[::1], int64, int64, int64)")
def open_gap(tally, spot, first, previous):  # type: ignore[no-untyped-def]
    """Tickers may be lost with the diffs: trust none from before the hole's end."""
    tally[TRUSTED_FROM] = first - 1 if spot else previous
    tally[NOT_FOLLOWED] += tally[P_COUNT]
    tally[P_COUNT] = 0


@njit(
    "int64(int64[:,::1], int64[:,:,::1], int64[:,:,::1], int64[::1], uint8[::1], int64,"
    " int64[::1], int64, int64, int64)",
    cache=True,
)
def set_levels(window, far, top, depth, scratch, template, words, start, bids, asks):  # type: ignore[no-untyped-def]
    """Bring levels into the book by the message that the converter makes of them.

    ``words[start:]`` holds them as price, quantity, …; returns the levels dropped.
    """
    out = np.zeros(O_FIELDS, dtype=np.int64)
    flow = np.zeros(FLOW_FIELDS, dtype=np.int64)
    put_book(scratch, 0, out, template, 0, 0, 0, 0, words, start, bids, asks)
    if template == DELTA:
        return apply_levels(window, far, top, depth, flow, scratch, RECORD_HEADER_BYTES)
    return apply_snapshot(window, far, top, depth, scratch, RECORD_HEADER_BYTES)


@njit(
    "int64(int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[:,::1],"
    " int64[:,::1], int64[:,::1], int64[:,:,::1], int64[:,:,::1], int64[::1], uint8[::1])",
    cache=True,
)
def check_event(  # type: ignore[no-untyped-def]
    state, shelf, fields, levels, tally, tickers, waiting, window, far, top, depth, scratch
):
    """Take in one line; its status."""
    kind = fb.sift(state, fields, levels)
    if kind <= 0:
        return -kind
    if fields[PRICE_NEEDS] > 0 or fields[QUANTITY_NEEDS] > 0:
        return FINER
    spot = state[SPOT_RULE]
    bids, asks = fields[BIDS], fields[ASKS]
    if kind == TICKER:
        take_ticker(tally, tickers, waiting, fields)
    elif kind == DIFF:
        first, last, previous = fields[FIRST_ID], fields[LAST_ID], fields[PREVIOUS_ID]
        action = judge_diff(state, first, last, previous)
        if action == TAKE:
            tally[DROPPED_LEVELS] += set_levels(
                window, far, top, depth, scratch, DELTA, levels, 0, bids, asks
            )
            take_top(tally, tickers, waiting, top, depth, last, state[LINES])
        elif action == GAP:
            open_gap(tally, spot, first, previous)
        if action == GAP or action == SHELVE:
            shelve(state, shelf, fields, levels)
    elif kind == SNAPSHOT and judge_snapshot(state, shelf, fields[LAST_ID]) == TAKE:
        tally[DROPPED_LEVELS] += set_levels(
            window, far, top, depth, scratch, SNAPSHOT_MESSAGE, levels, 0, bids, asks
        )
        d = 0
        while d < state[SHELF_USED]:
            first, last, previous = shelf[d + D_FIRST], shelf[d + D_LAST], shelf[d + D_PREVIOUS]
            action = judge_diff(state, first, last, previous)
            if action == GAP:
                open_gap(tally, spot, first, previous)
                break
            if action == TAKE:
                bids, asks = shelf[d + D_BIDS], shelf[d + D_ASKS]
                tally[DROPPED_LEVELS] += set_levels(
                    window, far, top, depth, scratch, DELTA, shelf, d + D_LEVELS, bids, asks
                )
                take_top(tally, tickers, waiting, top, depth, last, shelf[d + D_LINE])
            d += shelf[d + D_SIZE]
        keep_from(state, shelf, d)
    return DONE


@njit(
    "UniTuple(int64, 2)(uint8[::1], int64, int64, int64[::1], uint8[::1], int64[::1], int64[::1],"
    " int64[::1], int64[::1], int64[::1], int64[:,::1], int64[:,::1], int64[:,::1],"
    " int64[:,:,::1], int64[:,:,::1], int64[::1], uint8[::1])",
    cache=True,
)
def check_lines(  # type: ignore[no-untyped-def]
    buf, position, stop, scale, symbol, state, shelf, fields, levels, tally, tickers, waiting,
    window, far, top, depth, scratch,
):  # fmt: skip
    """Take in the lines of ``buf[position:stop]``; (position, status)."""
    while position < stop:
        if (
            scan_line(buf, position, scale[0], scale[1], scale[3], symbol, fields, levels)
            == UNRECOGNISED
        ):
            return position, SLOW
        status = check_event(
            state, shelf, fields, levels, tally, tickers, waiting, window, far, top, depth, scratch
        )
        if status != DONE:
            return position, status
        position = fields[NEXT]
    return position, DONE


class _BookSink:
    def __init__(self, venue: int, symbol: str, scale: Scale, many: bool) -> None:
        self.fields, self.levels = bj.new_fields(), bj.new_levels()
        self.state = bs.new_state(venue == bj.SPOT, many)
        self.tally = np.zeros(TALLY_FIELDS, dtype=np.int64)
        self.tally[TRUSTED_FROM] = -1
        self.tally[COMPARED_ID] = -1
        self._arrays = (
            self.tally,
            np.zeros((MAX_TICKERS_AHEAD, _T_FIELDS), dtype=np.int64),
            np.zeros((MAX_DIFFS_AHEAD, _P_FIELDS), dtype=np.int64),
            *(array[0] for array in new_books(1, MAX_LEVELS)),
            np.zeros(SCRATCH_BYTES, dtype=np.uint8),
        )
        self._shelf = bs.new_shelf()
        self._symbol = encode_symbol(symbol)
        self._scale = np.array([venue, *scale], dtype=np.int64)

    def lines(self, buf: np.ndarray, position: int, stop: int) -> tuple[int, int]:
        return check_lines(
            buf, position, stop, self._scale, self._symbol, self.state, self._shelf,
            self.fields, self.levels, *self._arrays,
        )  # fmt: skip

    def event(self) -> int:
        self.state[bs.SLOW_LINES] += 1
        return check_event(self.state, self._shelf, self.fields, self.levels, *self._arrays)


def check(recording: Recording, venue: str, symbol: str | None) -> Verdict:
    """`replay.check.check` for a Binance recording."""
    code = VENUES[venue]

    def work(found: Survey, scale: Scale) -> Verdict:
        sink = _BookSink(code, found.symbol, scale, symbol is not None)
        walk(recording, sink, code, found.symbol, scale)
        fb.require_snapshot(recording, sink.state)
        return _verdict(recording, venue, found.symbol, scale, sink.state, sink.tally)

    return with_grid(recording, code, symbol, None, None, work)


def _verdict(
    recording: Recording,
    venue: str,
    symbol: str,
    scale: Scale,
    state: np.ndarray,
    tally: np.ndarray,
) -> Verdict:
    not_compared = {
        "before_the_first_ticker": int(tally[BEFORE_TICKERS]),
        "no_later_ticker": int(tally[NOT_FOLLOWED] + tally[P_COUNT]),
        "ticker_lost_in_a_gap": int(tally[AFTER_GAP]),
    }
    updates, compared = int(state[bs.APPLIED]), int(tally[COMPARED])
    assert compared + sum(not_compared.values()) == updates, (
        "an update neither compared nor counted"
    )
    first = None
    if tally[FIRST_LINE]:
        numbers = tally[FIRST_LINE + 1 :].tolist()
        first = Difference(
            int(tally[FIRST_LINE]), _top(numbers[:_TOP], scale), _top(numbers[_TOP:], scale)
        )
    return Verdict(
        file=str(recording.path),
        venue=venue,
        symbol=symbol,
        lines=int(state[LINES]),
        updates=updates,
        compared=compared,
        equal=int(tally[EQUAL]),
        crossed=int(tally[CROSSED]),
        gaps=int(state[bs.GAPS]),
        not_compared=not_compared,
        counts={
            "snapshots": int(state[bs.SNAPSHOTS]),
            "diffs": int(state[bs.DIFFS]),
            "trades": int(state[bs.TRADES]),
            "fresh_tickers": int(tally[FRESH]),
            "longest_unequal_run": int(tally[LONGEST_UNEQUAL_RUN]),
            "backward_tickers": int(tally[BACKWARD_TICKERS]),
            "forgotten_tickers": int(tally[FORGOTTEN_TICKERS]),
            "dropped_levels": int(tally[DROPPED_LEVELS]),
            **fb.counts(state),
        },
        first_difference=first,
    )


def _top(numbers: list[int], scale: Scale) -> dict[str, str]:
    names = ("bid", "bid_quantity", "ask", "ask_quantity")
    steps: tuple[Decimal, ...] = (scale.tick, scale.lot, scale.tick, scale.lot)
    return {name: f"{n * step:f}" for name, n, step in zip(names, numbers, steps, strict=True)}
