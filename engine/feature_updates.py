# Hot path: free @njit functions.
"""What a snapshot, a delta and a trade do to the state of the features.

Work is done where something changed: a level that kept its price and size costs two comparisons,
its logarithm is taken only when its size changes. `engine.features` turns the state into values;
the formulas and their sources stand in `engine.feature_catalogue`.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit

from engine import feature_state as at
from engine.elementary import LEAN, ln
from engine.feature_state import (
    ASK_DEPTH_10,
    BID_COUNT,
    BID_DEPTH_5,
    BID_DEPTH_10,
    BID_PRICE_SUM,
    EVENT,
    LAST_NS,
    LEVELS,
    LOG_SIZES,
    MAX_PRICE_TICKS,
    MAX_QUANTITY_LOTS,
    MID2,
    NO_ASK_TICKS,
    NO_SIZE,
    PRICES,
    SIZES,
    SPREAD,
    TINY,
    clock_decays,
)
from feeds.inner import inner

BUY: Final = 1
SELL: Final = 2

# 1 / number of levels, so that a mean costs no division.
_RECIPROCALS: Final = np.array([0.0] + [1.0 / n for n in range(1, 2 * LEVELS + 1)])


@inner("float64(float64)", **LEAN)
def _flushed(x):  # type: ignore[no-untyped-def]
    return x if abs(x) >= TINY else 0.0


@inner("int64(int64[::1], float64[::1], int64)", **LEAN)
def _advance(fi, ff, t_ns):  # type: ignore[no-untyped-def]
    """Let the clock sums decay up to an event; returns its time, never before the last one's."""
    now = min(max(t_ns, 0), at.MAX_TIME_NS)
    last = fi[LAST_NS]
    if last < 0:
        fi[LAST_NS] = now
        fi[at.LAST_TRADE_NS] = now
        fi[at.LAST_MOVE_NS] = now
        return now
    if now <= last:
        return last
    fi[LAST_NS] = now
    fast, middle, slow = clock_decays(now - last)
    for j in range(at.CLOCK_1, at.CLOCK_4):
        ff[j] = _flushed(ff[j] * fast)
    for j in range(at.CLOCK_4, at.CLOCK_16):
        ff[j] = _flushed(ff[j] * middle)
    for j in range(at.CLOCK_16, at.CLOCK_END):
        ff[j] = _flushed(ff[j] * slow)
    return now


@njit(
    "UniTuple(int64, 3)(int64[::1], float64[::1], int64[:,:,::1], int64, int64)",
    **LEAN,
)
def _follow_side(fi, ff, levels, n, side):  # type: ignore[no-untyped-def]
    """Take over the best levels of one side; returns its order flow over 1, 5 and 10 levels.

    The flow of a level is the term of Cont, Kukanov and Stoikov (2014), taken at each rank as Xu,
    Gould and Howison (2018) do: the new size where the price is as good or better, less the old
    one where it is as good or worse.
    """
    sign = 1 - 2 * side
    prices = PRICES + side * LEVELS
    sizes = SIZES + side * LEVELS
    logs = LOG_SIZES + side * LEVELS
    flow_1 = 0
    flow_5 = 0
    flow_10 = 0
    depth_5 = 0
    depth_10 = 0
    price_sum = 0
    for k in range(LEVELS):
        if k < n:
            price = min(max(levels[side, 0, n - 1 - k], 1), MAX_PRICE_TICKS)
            size = min(max(levels[side, 1, n - 1 - k], 1), MAX_QUANTITY_LOTS)
            price_sum += price
        else:
            price = -sign * NO_ASK_TICKS
            size = 0
        old_price = fi[prices + k]
        old_size = fi[sizes + k]
        if price != old_price or size != old_size:
            better = sign * (price - old_price)
            flow = (size if better >= 0 else 0) - (old_size if better <= 0 else 0)
            flow_10 += flow
            if k < 5:
                flow_5 += flow
            if k < 1:
                flow_1 += flow
            fi[prices + k] = price
            if size != old_size:
                fi[sizes + k] = size
                ff[logs + k] = ln(1.0 + np.float64(size)) if size > 0 else NO_SIZE
        depth_10 += size
        if k < 5:
            depth_5 += size
    fi[BID_DEPTH_5 + side] = depth_5
    fi[BID_DEPTH_10 + side] = depth_10
    fi[BID_PRICE_SUM + side] = price_sum
    fi[BID_COUNT + side] = min(n, LEVELS)
    return flow_1, flow_5, flow_10


@inner("int64(int64[::1], float64[::1])", **LEAN)
def _measure(fi, ff):  # type: ignore[no-untyped-def]
    """Mid, spread and the slow scales of a book just taken over; returns the move of 2 * mid."""
    bids = fi[BID_COUNT]
    asks = fi[at.ASK_COUNT]
    count = bids + asks
    if count > 0:
        mean = np.float64(fi[BID_DEPTH_10] + fi[ASK_DEPTH_10]) * _RECIPROCALS[count]
        scale = ff[at.LEVEL_LOTS]
        ff[at.LEVEL_LOTS] = scale + at.GAIN_256 * (mean - scale) if scale > 0.0 else mean
    best_bid = np.float64(fi[SIZES])
    best_ask = np.float64(fi[SIZES + LEVELS])
    both = best_bid + best_ask
    ff[at.IMBALANCE] = (best_bid - best_ask) / both if both > 0.0 else 0.0
    if bids == 0 or asks == 0:
        fi[at.TWO_SIDED] = 0
        return 0
    fi[at.TWO_SIDED] = 1
    mid2 = fi[PRICES] + fi[PRICES + LEVELS]
    spread = fi[PRICES + LEVELS] - fi[PRICES]
    reach = 2 * (fi[BID_PRICE_SUM + 1] - fi[BID_PRICE_SUM]) + (bids - asks) * mid2
    width = np.float64(max(reach, count)) * (0.5 * _RECIPROCALS[count])
    quoted = np.float64(max(spread, 1))
    scale = ff[at.WIDTH]
    move = 0
    if scale > 0.0:
        ff[at.WIDTH] = scale + at.GAIN_256 * (width - scale)
        mean = ff[at.MEAN_SPREAD]
        ff[at.MEAN_SPREAD] = mean + at.GAIN_256 * (quoted - mean)
        move = mid2 - fi[MID2]
    else:
        ff[at.WIDTH] = width
        ff[at.MEAN_SPREAD] = quoted
    fi[MID2] = mid2
    fi[SPREAD] = spread
    return move


@inner("void(int64[::1], float64[::1], int64[:,:,::1], int64[::1], int64)", **LEAN)
def on_snapshot(fi, ff, levels, depth, t_ns):  # type: ignore[no-untyped-def]
    """Start again from a whole book: it is the new previous book and brings no flow and no move.

    Parameters
    ----------
    fi : ndarray of int64, shape (STATE_I,)
    ff : ndarray of float64, shape (STATE_F,)
        State rows of the instrument.
    levels : ndarray of int64, shape (2, 2, capacity)
        The book after the snapshot: side, (price in ticks, size in lots), best level last.
    depth : ndarray of int64, shape (2,)
        Levels on each side.
    t_ns : int
        Exchange time. Before the last event's, it is taken as that.
    """
    if fi[LAST_NS] < 0:
        _advance(fi, ff, t_ns)
    _follow_side(fi, ff, levels, depth[0], 0)
    _follow_side(fi, ff, levels, depth[1], 1)
    _measure(fi, ff)
    fi[at.MOVE] = 0
    for b in range(at.IMBALANCE_BINS):
        fi[at.VISITS + b] = 0
        fi[at.SIGNED_VISITS + b] = 0


@inner("void(int64[::1], float64[::1], int64)", **LEAN)
def _learn_microprice(fi, ff, move):  # type: ignore[no-untyped-def]
    """Credit a move of the mid to every imbalance seen since the move before it."""
    r = np.float64(move)
    for b in range(at.IMBALANCE_BINS):
        signed = np.float64(fi[at.SIGNED_VISITS + b])
        visits = np.float64(fi[at.VISITS + b])
        ff[at.MICRO_SUMS + b] = _flushed(ff[at.MICRO_SUMS + b] * at.DECAY_64) + signed * r
        ff[at.MICRO_COUNTS + b] = _flushed(ff[at.MICRO_COUNTS + b] * at.DECAY_64) + visits
        fi[at.SIGNED_VISITS + b] = 0
        fi[at.VISITS + b] = 0


@inner("void(int64[::1], float64[::1], int64[:,:,::1], int64[::1], int64[::1], int64)", **LEAN)
def on_book(fi, ff, levels, depth, flow, t_ns):  # type: ignore[no-untyped-def]
    """Take in the book after one delta.

    Parameters
    ----------
    fi, ff, levels, depth, t_ns
        As in `on_snapshot`.
    flow : ndarray of int64, shape (4,)
        Lots that this delta added to and removed from the bid side, added to and removed from the
        ask side; all of the book, not only the top. Not negative.
    """
    now = _advance(fi, ff, t_ns)
    bid_1, bid_5, bid_10 = _follow_side(fi, ff, levels, depth[0], 0)
    ask_1, ask_5, ask_10 = _follow_side(fi, ff, levels, depth[1], 1)
    move = _measure(fi, ff)
    ofi_1 = np.float64(bid_1 - ask_1)
    ofi_5 = np.float64(bid_5 - ask_5)
    ofi_10 = np.float64(bid_10 - ask_10)

    for j in range(at.EVENT_COUNT):
        ff[EVENT + j] = _flushed(ff[EVENT + j] * at.EVENT_DECAYS[j])
    ff[at.EVENT_OFI_8] += ofi_1
    ff[at.EVENT_OFI_8 + 1] += ofi_5
    ff[at.EVENT_OFI_8 + 2] += ofi_10
    ff[at.EVENT_OFI_64] += ofi_1
    ff[at.EVENT_OFI_64 + 1] += ofi_5
    ff[at.EVENT_OFI_64 + 2] += ofi_10
    ff[at.OFI_1S] += ofi_1
    ff[at.OFI_1S + 1] += ofi_5
    ff[at.OFI_1S + 2] += ofi_10
    ff[at.QUOTES_1S] += 1.0
    ff[at.QUOTES_16S] += 1.0
    for j in range(4):
        ff[at.ADDED_BID + j] += np.float64(min(max(flow[j], 0), at.MAX_FLOW_LOTS))

    fi[at.MOVE] = move
    if move != 0:
        r = np.float64(move)
        square = r * r
        for j in range(3):
            ff[at.EVENT_MOVES + j] += r
            ff[at.EVENT_SQUARES + j] += square
        ff[at.MOVES_1S] += r
        ff[at.MOVES_4S] += r
        ff[at.MOVES_16S] += r
        ff[at.SQUARES_1S] += square
        ff[at.SQUARES_4S] += square
        ff[at.SQUARES_16S] += square
        ff[at.BIPOWER_16S] += abs(r) * np.float64(fi[at.LAST_MOVE])
        mean = ff[at.MEAN_MOVE]
        ff[at.MEAN_MOVE] = mean + at.GAIN_32 * (abs(r) - mean) if mean > 0.0 else abs(r)
        fi[at.LAST_MOVE] = abs(move)
        fi[at.LAST_MOVE_NS] = now
        _learn_microprice(fi, ff, move)
    if fi[at.TWO_SIDED] == 1:
        imbalance = ff[at.IMBALANCE]
        b = at.imbalance_bin(imbalance)
        fi[at.VISITS + b] += 1
        if imbalance > 0.0:
            fi[at.SIGNED_VISITS + b] += 1
        elif imbalance < 0.0:
            fi[at.SIGNED_VISITS + b] -= 1
    fi[at.BOOK_UPDATES] += 1


@inner("void(int64[::1], int64, int64)", **LEAN)
def _close_bucket(fi, imbalance, lots):  # type: ignore[no-untyped-def]
    slot = fi[at.BUCKET_AT]
    fi[at.BUCKET_SUM_IMBALANCE] += imbalance - fi[at.BUCKET_IMBALANCES + slot]
    fi[at.BUCKET_SUM_LOTS] += lots - fi[at.BUCKET_LOTS + slot]
    fi[at.BUCKET_IMBALANCES + slot] = imbalance
    fi[at.BUCKET_LOTS + slot] = lots
    fi[at.BUCKET_AT] = (slot + 1) % at.BUCKETS


@inner("void(int64[::1], float64[::1], int64, int64)", **LEAN)
def _fill_buckets(fi, ff, sign, lots):  # type: ignore[no-untyped-def]
    """Pour a trade into the volume buckets of VPIN, spilling over into as many as it fills."""
    if fi[at.BUCKET_SIZE] == 0:
        fi[at.BUCKET_SIZE] = np.int64(at.BUCKET_TRADES * ff[at.MEAN_TRADE])
    room = fi[at.BUCKET_SIZE] - fi[at.BUCKET_FILLED]
    if lots >= room:
        _close_bucket(fi, abs(fi[at.BUCKET_SIGNED] + sign * room), fi[at.BUCKET_SIZE])
        lots -= room
        size = max(np.int64(at.BUCKET_TRADES * ff[at.MEAN_TRADE]), 1)
        full = lots // size
        for _ in range(min(full, at.BUCKETS)):
            _close_bucket(fi, abs(sign) * size, size)
        lots -= full * size
        fi[at.BUCKET_SIZE] = size
        fi[at.BUCKET_FILLED] = 0
        fi[at.BUCKET_SIGNED] = 0
    fi[at.BUCKET_FILLED] += lots
    fi[at.BUCKET_SIGNED] += sign * lots


@inner(
    "void(int64[::1], float64[::1], int64[:,:,::1], int64[::1], int64, int64, int64, int64)",
    **LEAN,
)
def on_trade(  # type: ignore[no-untyped-def]
    fi, ff, levels, depth, price_ticks, quantity_lots, aggressor, t_ns
):
    """Take in one trade, before the delta that removes what it took.

    Parameters
    ----------
    fi, ff, levels, depth, t_ns
        As in `on_snapshot`. The mid is that of the book last taken in by `on_book` or
        `on_snapshot`.
    price_ticks, quantity_lots : int
        Price and size of the trade.
    aggressor : int
        1 = a buyer took, 2 = a seller took; anything else is decided by the quote test of Lee and
        Ready (1991): above the mid a buyer, below it a seller, at it nobody.
    """
    now = _advance(fi, ff, t_ns)
    price = min(max(price_ticks, 1), MAX_PRICE_TICKS)
    lots = min(max(quantity_lots, 1), MAX_QUANTITY_LOTS)
    mid2 = fi[MID2]
    beyond = 2 * price - mid2
    sign = 0
    if aggressor == BUY:
        sign = 1
    elif aggressor == SELL:
        sign = -1
    elif mid2 > 0 and beyond != 0:
        sign = 1 if beyond > 0 else -1
    size = np.float64(lots)
    signed = np.float64(sign * lots)

    ff[at.TRADES_1S] += 1.0
    ff[at.TRADES_16S] += 1.0
    ff[at.SIGNED_1S] += signed
    ff[at.SIGNED_16S] += signed
    ff[at.VOLUME_1S] += size
    ff[at.VOLUME_16S] += size
    if sign < 0:
        ff[at.HIT_BID] += size
    elif sign > 0:
        ff[at.HIT_ASK] += size

    for j in range(at.TRADE_16, at.TRADE_32):
        ff[j] = _flushed(ff[j] * at.DECAY_16)
    for j in range(at.TRADE_32, at.TRADE_END):
        ff[j] = _flushed(ff[j] * at.DECAY_32)
    ff[at.SIGNED_16T] += signed
    ff[at.VOLUME_16T] += size
    ff[at.AUTO_SQUARES] += signed * signed
    ff[at.TOTAL_LOTS] += size
    if fi[at.TRADE_COUNT] > 0:
        before = np.float64(fi[at.TRADE_SIGNED])
        ff[at.AUTO_VOLUME] += signed * before
        ff[at.AUTO_SIGN] += np.float64(sign * fi[at.TRADE_SIGN])
        ff[at.AUTO_COUNT] += 1.0
        if fi[at.TRADE_MID2] > 0:
            impact = np.float64(mid2 - fi[at.TRADE_MID2])
            ff[at.KYLE_XY] += impact * before
            ff[at.KYLE_XX] += before * before
            ff[at.KYLE_YY] += impact * impact
            ff[at.AMIHUD_SUM] += abs(impact) / np.float64(fi[at.TRADE_LOTS])
            ff[at.AMIHUD_COUNT] += 1.0
    mean = ff[at.MEAN_TRADE]
    if mean > 0.0:
        if size > at.LARGE_TRADE * mean:
            ff[at.LARGE_LOTS] += size
        ff[at.MEAN_TRADE] = mean + at.GAIN_32 * (size - mean)
    else:
        ff[at.MEAN_TRADE] = size

    slot = fi[at.PENDING_AT]
    if mid2 > 0:
        quoted = max(fi[SPREAD], 1)
        if sign != 0:
            ff[at.EFFECTIVE] += np.float64(sign * beyond)
            ff[at.EFFECTIVE_QUOTED] += np.float64(quoted)
        then = fi[at.PENDING_SIGNS + slot]
        if then != 0:
            ff[at.REALISED] += np.float64(then * (2 * fi[at.PENDING_PRICES + slot] - mid2))
            ff[at.REALISED_QUOTED] += np.float64(fi[at.PENDING_SPREADS + slot])
        fi[at.PENDING_SPREADS + slot] = quoted
    fi[at.PENDING_PRICES + slot] = price
    fi[at.PENDING_SIGNS + slot] = sign if mid2 > 0 else 0
    fi[at.PENDING_AT] = (slot + 1) % at.REALISED_TRADES

    _fill_buckets(fi, ff, sign, lots)
    fi[at.TRADE_MID2] = mid2
    fi[at.TRADE_SIGNED] = sign * lots
    fi[at.TRADE_LOTS] = lots
    fi[at.TRADE_SIGN] = sign
    fi[at.TRADE_COUNT] += 1
    fi[at.LAST_TRADE_NS] = now
