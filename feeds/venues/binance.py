# Hot path: free @njit functions; the driver at the end is for the cold path.
"""Binance recordings (spot, USD-M and COIN-M futures) to canonical messages on a tape.

Depth diffs become Deltas, REST snapshots that the book needs become Snapshots, trades Trades;
bookTicker and other streams are counted. ``seq`` counts what was written from 1 in epoch 1.
``source_time_ns`` is the recorder's receive time as it stands in the file; a record's own receive
time is when the message could have been processed: never before the record ahead of it, and for a
diff that had to wait for its snapshot, the snapshot's. A hole in the venue's ids becomes an empty
Delta with FLAG_SOURCE_GAP; the diffs after it wait for the next snapshot.

Trades off the book (``X`` other than MARKET: insurance fund, auto-deleveraging) are left out and
counted. Where trade and aggTrade are both recorded, the stream that came first is taken.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from feeds.errors import InputError
from feeds.inner import inner
from feeds.tape_writer import TapeWriter
from feeds.venues import binance_fields as bj
from feeds.venues import binance_sync as bs
from feeds.venues.binance_decode import VENUES
from feeds.venues.binance_fields import (
    AGG_TRADE,
    ASKS,
    BIDS,
    BLANK,
    DIFF,
    FIRST_ID,
    HAS_SYMBOL,
    KIND,
    LAST_ID,
    NEXT,
    ON_BOOK,
    OTHER,
    OTHER_SYMBOL,
    PREVIOUS_ID,
    PRICE,
    PRICE_NEEDS,
    QUANTITY,
    QUANTITY_NEEDS,
    RECEIVED_NS,
    SNAPSHOT,
    TICKER,
    TRADE,
    UNRECOGNISED,
)
from feeds.venues.binance_json import scan_line
from feeds.venues.binance_lines import (
    DONE,
    FINER,
    NAMELESS,
    SLOW,
    STRANGER,
    UNSORTED,
    Scale,
    encode_symbol,
    walk,
)
from feeds.venues.binance_records import (
    O_DELTAS,
    O_FIELDS,
    O_INSTRUMENT,
    O_SEQ,
    O_SOURCE,
    put_book,
    put_gap,
    put_trade,
    room_for,
)
from feeds.venues.binance_survey import Survey, with_grid
from feeds.venues.binance_sync import (
    CLOCK,
    D_ASKS,
    D_BIDS,
    D_EXCHANGE,
    D_FIRST,
    D_LAST,
    D_LEVELS,
    D_PREVIOUS,
    D_RECEIVED,
    D_SIZE,
    DIFFS,
    EXCHANGE_CLOCK,
    GAP,
    LINES,
    MANY_SYMBOLS,
    OFF_BOOK,
    OTHER_SYMBOLS,
    OTHERS,
    SHELF_USED,
    SHELVE,
    SNAPSHOTS,
    TAKE,
    TICKERS,
    TRADE_STREAM,
    TRADES,
    exchange_ns,
    judge_diff,
    judge_snapshot,
    keep_from,
    shelve,
    snapshot_order,
    tick_clock,
)
from feeds.venues.conversion import Conversion, Target
from feeds.venues.recording import Recording
from feeds.wire import DELTA
from feeds.wire import SNAPSHOT as SNAPSHOT_MESSAGE


@inner("int64(int64[::1], int64[::1], int64, int64)")
def to_grid(fields, levels, tick_units, lot_units):  # type: ignore[no-untyped-def]
    """Bring a line's numbers onto the grid of tick and lot; 1 where one lies off it."""
    if fields[PRICE_NEEDS] > 0 or fields[QUANTITY_NEEDS] > 0:
        return 1
    if tick_units == 1 and lot_units == 1:
        return 0
    kind = fields[KIND]
    if kind == TRADE or kind == AGG_TRADE:
        if fields[PRICE] % tick_units or fields[QUANTITY] % lot_units:
            return 1
        fields[PRICE] //= tick_units
        fields[QUANTITY] //= lot_units
        return 0
    if kind != DIFF and kind != SNAPSHOT:
        return 0
    for i in range(0, 2 * (fields[BIDS] + fields[ASKS]), 2):
        if levels[i] % tick_units or levels[i + 1] % lot_units:
            return 1
        levels[i] //= tick_units
        levels[i + 1] //= lot_units
    return 0


@inner("int64(int64[::1], int64[::1], int64[::1])")
def sift(state, fields, levels):  # type: ignore[no-untyped-def]
    """Count a line; returns its kind where it concerns the book or the trades, -status else.

    DONE stands for a line that is only counted.
    """
    kind = fields[KIND]
    state[LINES] += 1
    if kind == BLANK:
        return -DONE
    if kind == OTHER:
        state[OTHERS] += 1
        return -DONE
    if kind == OTHER_SYMBOL:
        state[OTHER_SYMBOLS] += 1
        if state[MANY_SYMBOLS] == 0:
            return -STRANGER
        return -NAMELESS if state[bs.NAMELESS] > 0 else -DONE
    tick_clock(state, fields)
    state[EXCHANGE_CLOCK] = max(state[EXCHANGE_CLOCK], exchange_ns(fields))
    if kind == TICKER:
        state[TICKERS] += 1
    elif kind == DIFF:
        state[DIFFS] += 1
    elif kind == SNAPSHOT:
        if fields[HAS_SYMBOL] == 0:
            state[bs.NAMELESS] += 1
            if state[OTHER_SYMBOLS] > 0:
                return -NAMELESS
        if snapshot_order(fields, levels) >= 0:
            return -UNSORTED
    else:
        if state[TRADE_STREAM] == 0:
            state[TRADE_STREAM] = kind
        if kind != state[TRADE_STREAM]:
            state[OTHERS] += 1
            return -DONE
        if fields[ON_BOOK] == 0:
            state[OFF_BOOK] += 1
            return -DONE
        state[TRADES] += 1
    return kind


@inner("int64(int64[::1], int64[::1], int64[::1], uint8[::1], int64)")
def convert_shelf(state, shelf, out, arena, at):  # type: ignore[no-untyped-def]
    """Write the diffs that waited for the snapshot just taken."""
    clock = state[CLOCK]
    d = 0
    while d < state[SHELF_USED]:
        action = judge_diff(state, shelf[d + D_FIRST], shelf[d + D_LAST], shelf[d + D_PREVIOUS])
        exchange, received = shelf[d + D_EXCHANGE], shelf[d + D_RECEIVED]
        if action == GAP:
            at = put_gap(arena, at, out, clock, exchange, received)
            break
        if action == TAKE:
            at = put_book(
                arena, at, out, DELTA, clock, exchange, received, 0,
                shelf, d + D_LEVELS, shelf[d + D_BIDS], shelf[d + D_ASKS],
            )  # fmt: skip
        d += shelf[d + D_SIZE]
    keep_from(state, shelf, d)
    return at


@njit(
    "UniTuple(int64, 2)(int64[::1], int64[::1], int64[::1], int64[::1], int64, int64,"
    " int64[::1], uint8[::1], int64)",
    cache=True,
)
def convert_event(  # type: ignore[no-untyped-def]
    state, shelf, fields, levels, tick_units, lot_units, out, arena, at
):
    """Write what one line stands for; (where the next record starts, status)."""
    kind = sift(state, fields, levels)
    if kind <= 0:
        return at, -kind
    if kind == TICKER:
        return at, DONE
    if to_grid(fields, levels, tick_units, lot_units) != 0:
        return at, FINER
    clock = state[CLOCK]
    if kind == TRADE or kind == AGG_TRADE:
        return put_trade(arena, at, out, fields, clock), DONE
    received = fields[RECEIVED_NS]
    exchange = exchange_ns(fields)
    if kind == DIFF:
        action = judge_diff(state, fields[FIRST_ID], fields[LAST_ID], fields[PREVIOUS_ID])
        if action == TAKE:
            at = put_book(
                arena, at, out, DELTA, clock, exchange, received, 0,
                levels, 0, fields[BIDS], fields[ASKS],
            )  # fmt: skip
        elif action == GAP:
            at = put_gap(arena, at, out, clock, exchange, received)
        if action == GAP or action == SHELVE:
            shelve(state, shelf, fields, levels)
        return at, DONE
    if judge_snapshot(state, shelf, fields[LAST_ID]) != TAKE:
        return at, DONE
    if exchange == 0:
        exchange = state[EXCHANGE_CLOCK] if state[EXCHANGE_CLOCK] > 0 else received
    at = put_book(
        arena, at, out, SNAPSHOT_MESSAGE, clock, exchange, received, 0,
        levels, 0, fields[BIDS], fields[ASKS],
    )  # fmt: skip
    return convert_shelf(state, shelf, out, arena, at), DONE


@njit(
    "UniTuple(int64, 3)(uint8[::1], int64, int64, int64[::1], uint8[::1], int64[::1], int64[::1],"
    " int64[::1], int64[::1], int64[::1], uint8[::1], int64)",
    cache=True,
)
def convert_lines(  # type: ignore[no-untyped-def]
    buf, position, stop, scale, symbol, state, shelf, fields, levels, out, arena, at
):
    """Write what the lines in ``buf[position:stop]`` stand for.

    Parameters
    ----------
    scale : ndarray of int64, shape (5,)
        Venue, price decimals, tick units, quantity decimals, lot units.
    arena : ndarray of uint8
        Room for records from ``at``; see `room_for`.

    Returns
    -------
    (position, at, status) : int
        The line that asks for more, or ``stop``; where the next record starts; DONE, SLOW, ….
    """
    while position < stop:
        if (
            scan_line(buf, position, scale[0], scale[1], scale[3], symbol, fields, levels)
            == UNRECOGNISED
        ):
            return position, at, SLOW
        at, status = convert_event(state, shelf, fields, levels, scale[2], scale[4], out, arena, at)
        if status != DONE:
            return position, at, status
        position = fields[NEXT]
    return position, at, DONE


class _TapeSink:
    def __init__(
        self, writer: TapeWriter, venue: int, symbol: str, scale: Scale, many: bool
    ) -> None:
        self.fields, self.levels = bj.new_fields(), bj.new_levels()
        self.state = bs.new_state(venue == bj.SPOT, many)
        self.shelf = bs.new_shelf()
        self.out = np.zeros(O_FIELDS, dtype=np.int64)
        source = writer.meta.instruments[0]
        self.out[O_SOURCE], self.out[O_INSTRUMENT] = source.source_id, source.instrument_id
        self._writer = writer
        self._symbol = encode_symbol(symbol)
        self._scale = np.array([venue, *scale], dtype=np.int64)

    def lines(self, buf: np.ndarray, position: int, stop: int) -> tuple[int, int]:
        need = room_for(stop - position, int(self.state[SHELF_USED]))
        arena, at = self._writer.room(need)
        seq = int(self.out[O_SEQ])
        position, to, status = convert_lines(
            buf, position, stop, self._scale, self._symbol, self.state, self.shelf,
            self.fields, self.levels, self.out, arena, at,
        )  # fmt: skip
        assert to <= at + need, "more records than the text can hold"
        self._writer.advance(to, int(self.out[O_SEQ]) - seq)
        return position, status

    def event(self) -> int:
        self.state[bs.SLOW_LINES] += 1
        levels = int(self.fields[BIDS] + self.fields[ASKS])
        arena, at = self._writer.room(room_for(16 * levels, int(self.state[SHELF_USED])))
        seq = int(self.out[O_SEQ])
        to, status = convert_event(
            self.state, self.shelf, self.fields, self.levels, self._scale[2], self._scale[4],
            self.out, arena, at,
        )  # fmt: skip
        self._writer.advance(to, int(self.out[O_SEQ]) - seq)
        return status


def convert(
    recording: Recording, target: Target, symbol: str | None, tick: str | None, lot: str | None
) -> Conversion:
    """Write a recording's messages onto the target; arguments as in ``convert.convert``.

    Raises
    ------
    InputError
        At the first line that cannot be used, or where no snapshot could be used.
    """
    venue = VENUES[target.venue]

    def work(found: Survey, scale: Scale) -> Conversion:
        tick_text, lot_text = f"{scale.tick:f}", f"{scale.lot:f}"
        writer = target.open(found.symbol, tick_text, lot_text, found.first_received_ns)
        sink = _TapeSink(writer, venue, found.symbol, scale, symbol is not None)
        state = sink.state
        try:
            given = (tick is not None, lot is not None)
            walk(recording, sink, venue, found.symbol, scale, given=given)
            require_snapshot(recording, state)
        except InputError as error:
            raise target.abandon(error, worth_keeping=state[SNAPSHOTS] > 0) from None
        return Conversion(
            symbol=found.symbol,
            tick=tick_text,
            lot=lot_text,
            lines=int(state[LINES]),
            messages=int(sink.out[O_SEQ]),
            snapshots=int(state[SNAPSHOTS]),
            deltas=int(sink.out[O_DELTAS]),
            trades=int(state[TRADES]),
            gaps=int(state[bs.GAPS]),
            counts=counts(state),
        )

    return with_grid(recording, venue, symbol, tick, lot, work)


def require_snapshot(recording: Recording, state: np.ndarray) -> None:
    """Refuse a recording in which the book never had a start."""
    if state[SNAPSHOTS] > 0:
        return
    unused = int(state[bs.SNAPSHOTS_UNUSED])
    raise InputError(
        "no REST snapshot that joins the diffs" if unused else "no REST snapshot in the recording",
        where=f"{recording.path} ({recording.lines} lines)",
        expected="a line with lastUpdateId, bids and asks",
        found=f"{unused} older than the diffs" if unused else "none",
        fix="record the snapshot too: diffs alone do not give a book",
    )


def counts(state: np.ndarray) -> dict[str, int]:
    """What was met on the way and is on no tape."""
    return {
        "buffered": int(state[bs.BUFFERED]),
        "old_diffs": int(state[bs.OLD]),
        "forgotten": int(state[bs.FORGOTTEN]),
        "tickers": int(state[TICKERS]),
        "off_book_trades": int(state[OFF_BOOK]),
        "unused_snapshots": int(state[bs.SNAPSHOTS_UNUSED]),
        "other_symbols": int(state[OTHER_SYMBOLS]),
        "other_lines": int(state[OTHERS]),
        "clock_backwards": int(state[bs.BACKWARDS]),
        "slow_lines": int(state[bs.SLOW_LINES]),
    }
