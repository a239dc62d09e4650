# Hot path: free @njit functions.
"""The feature vector of one instrument: the public surface and the step from state to values.

`on_snapshot`, `on_book` and `on_trade` fold events into an instrument's two state rows; `compute`
reads them and writes the `N_FEATURES` values. What each value is, in which unit and after whom, is
said in `SPECS` (`engine.feature_catalogue`, and as a table in FEATURES.md). `SCHEMA_HASH` stands in
every model bundle, so a model never sees features of another making.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numba import njit

from engine import feature_state as at
from engine.elementary import LEAN, LN2, ln
from engine.feature_catalogue import BLOCK_LIMIT
from engine.feature_specs import N_FEATURES, NAMES, SCHEMA_HASH, SCHEMA_HEX, SPECS, FeatureSpec
from engine.feature_state import LEVELS, STATE_F, STATE_I, clock_decays, is_warm, reset
from engine.feature_updates import on_book, on_snapshot, on_trade
from feeds.inner import inner

__all__ = [
    "NAMES",
    "N_FEATURES",
    "SCHEMA_HASH",
    "SCHEMA_HEX",
    "SPECS",
    "STATE_F",
    "STATE_I",
    "FeatureSpec",
    "compute",
    "is_warm",
    "on_book",
    "on_snapshot",
    "on_trade",
    "reset",
]

_AT: Final = {name: i for i, name in enumerate(NAMES)}

# Where the groups of the vector begin.
_QUOTIENTS: Final = _AT["queue_imbalance_1"]
_PRICES: Final = _AT["spread_bp"]
_FLOW: Final = _AT["ofi_1_8_updates"]
_MOMENTUM: Final = _AT["momentum_4_updates"]
_TRADE_FLOW: Final = _AT["trade_imbalance_16_trades"]
_SHAPE: Final = _AT["bid_slope"]
_LOGS: Final = _AT["spread_ticks"]
_RATIOS: Final = _AT["jump_share_16s"]
_LOG_COUNT: Final = _RATIOS - _LOGS
assert 4 * LEVELS == _QUOTIENTS

_HALF_PI: Final = 1.5707963267948966
_PER_SECOND_1: Final = LN2
_PER_SECOND_16: Final = LN2 * 0.0625
_PER_MS: Final = 1e-6
_SHRINKAGE: Final = 16.0
# Levels times the factor of the window, for the nine order flows.
_FLOW_SCALES: Final = np.array([n * c for c in (1.0, 4.0, 4.0) for n in (1.0, 5.0, 10.0)])


@inner("float64(float64, float64)", **LEAN)
def _clipped(x, limit):  # type: ignore[no-untyped-def]
    x = x if x > -limit else -limit
    return x if x < limit else limit


@njit("void(float64[::1], int64, float64, float64)", **LEAN)
def _put_quotient(out, i, part, whole):  # type: ignore[no-untyped-def]
    """A quotient; 0 where the divisor is not positive."""
    out[i] = part / whole if whole > 0.0 else 0.0


@inner("void(int64[::1], float64[::1], float64, float64[::1])", **LEAN)
def _put_block(fi, ff, typical, out):  # type: ignore[no-untyped-def]
    """The 40 values of the top ten levels, in the order of FI-2010 and DeepLOB."""
    mid2 = fi[at.MID2]
    width = ff[at.WIDTH]
    per_tick = 0.5 / width if width > 0.0 else 0.0
    for k in range(LEVELS):
        ask = np.float64(2 * fi[at.PRICES + LEVELS + k] - mid2) * per_tick
        bid = np.float64(mid2 - 2 * fi[at.PRICES + k]) * per_tick
        out[4 * k] = _clipped(ask, BLOCK_LIMIT)
        out[4 * k + 1] = _clipped(ff[at.LOG_SIZES + LEVELS + k] - typical, BLOCK_LIMIT)
        out[4 * k + 2] = _clipped(bid, BLOCK_LIMIT)
        out[4 * k + 3] = _clipped(ff[at.LOG_SIZES + k] - typical, BLOCK_LIMIT)


@inner("void(int64[::1], float64[::1], int64, float64, float64, float64, float64[::1])", **LEAN)
def _stage_logs(fi, ff, now, fast, slow, bipower, out):  # type: ignore[no-untyped-def]
    """Put what spans orders of magnitude, and the mean level size, where `_put_logs` finds it.

    The block, written last, lends its place. Staged well before they are read, the numbers have
    left the store buffer when the vectorised loop loads four of them at a time.
    """
    mid2 = np.float64(fi[at.MID2])
    per_mid = 10_000.0 / mid2 if fi[at.MID2] > 0 else 0.0  # half-ticks to basis points
    out[0] = np.float64(max(fi[at.SPREAD], 0))
    out[1] = 2.0 * ff[at.WIDTH] * per_mid
    out[2] = math.sqrt(ff[at.SQUARES_1S] * fast * _PER_SECOND_1) * per_mid
    out[3] = math.sqrt(ff[at.SQUARES_16S] * slow * _PER_SECOND_16) * per_mid
    out[4] = math.sqrt(bipower * _PER_SECOND_16) * per_mid
    out[5] = ff[at.TRADES_1S] * fast * _PER_SECOND_1
    out[6] = ff[at.TRADES_16S] * slow * _PER_SECOND_16
    out[7] = ff[at.QUOTES_1S] * fast * _PER_SECOND_1
    out[8] = ff[at.QUOTES_16S] * slow * _PER_SECOND_16
    started = fi[at.LAST_NS] >= 0
    out[9] = np.float64(now - fi[at.LAST_TRADE_NS] if started else 0) * _PER_MS
    out[10] = np.float64(now - fi[at.LAST_MOVE_NS] if started else 0) * _PER_MS
    out[_LOG_COUNT] = ff[at.LEVEL_LOTS]


@inner("float64(float64[::1])", **LEAN)
def _put_logs(out):  # type: ignore[no-untyped-def]
    """What was staged, as ln(1 + x); returns that of the mean level size."""
    # A count that the compiler cannot know keeps it from unrolling the loop before vectorising it.
    for j in range(min(_LOG_COUNT + 1, len(out))):
        out[_LOGS + j] = ln(1.0 + out[j])
    typical = out[_LOGS + _LOG_COUNT]
    for j in range(_LOGS, _RATIOS):
        out[j] = _clipped(out[j], 20.0)
    return typical


@inner("void(int64[::1], float64[::1], float64, float64, float64[::1])", **LEAN)
def _put_ratios(fi, ff, slow, bipower, out):  # type: ignore[no-untyped-def]
    """The last group: jumps, toxicity, price impact, autocorrelation, cancellations, spreads."""
    squares = ff[at.SQUARES_16S] * slow
    _put_quotient(out, _RATIOS, squares - bipower, squares)
    _put_quotient(
        out,
        _RATIOS + 1,
        np.float64(fi[at.BUCKET_SUM_IMBALANCE] + abs(fi[at.BUCKET_SIGNED])),
        np.float64(fi[at.BUCKET_SUM_LOTS] + fi[at.BUCKET_FILLED]),
    )
    move = ff[at.MEAN_MOVE]
    trade = ff[at.MEAN_TRADE] if move > 0.0 else 0.0
    xy = ff[at.KYLE_XY]
    xx = ff[at.KYLE_XX]
    impact = xy * trade
    _put_quotient(out, _RATIOS + 2, impact, xx * move + abs(impact))
    _put_quotient(out, _RATIOS + 3, xy, math.sqrt(xx * ff[at.KYLE_YY]))
    illiquidity = ff[at.AMIHUD_SUM] * trade
    _put_quotient(out, _RATIOS + 4, illiquidity, ff[at.AMIHUD_COUNT] * move + illiquidity)
    _put_quotient(out, _RATIOS + 5, ff[at.AUTO_VOLUME], ff[at.AUTO_SQUARES])
    _put_quotient(out, _RATIOS + 6, ff[at.AUTO_SIGN], ff[at.AUTO_COUNT])
    _put_quotient(out, _RATIOS + 7, ff[at.LARGE_LOTS], ff[at.TOTAL_LOTS])
    bid_flow = ff[at.ADDED_BID] + ff[at.REMOVED_BID]
    ask_flow = ff[at.ADDED_ASK] + ff[at.REMOVED_ASK]
    bid_cancelled = ff[at.REMOVED_BID] - ff[at.HIT_BID]
    ask_cancelled = ff[at.REMOVED_ASK] - ff[at.HIT_ASK]
    bid_net = ff[at.ADDED_BID] - ff[at.REMOVED_BID]
    ask_net = ff[at.ADDED_ASK] - ff[at.REMOVED_ASK]
    _put_quotient(out, _RATIOS + 8, bid_cancelled if bid_cancelled > 0.0 else 0.0, bid_flow)
    _put_quotient(out, _RATIOS + 9, ask_cancelled if ask_cancelled > 0.0 else 0.0, ask_flow)
    _put_quotient(out, _RATIOS + 10, bid_net - ask_net, bid_flow + ask_flow)
    effective = ff[at.EFFECTIVE]
    realised = ff[at.REALISED]
    _put_quotient(out, _RATIOS + 11, effective, ff[at.EFFECTIVE_QUOTED] + abs(effective))
    _put_quotient(out, _RATIOS + 12, realised, ff[at.REALISED_QUOTED] + abs(realised))
    out[_RATIOS] = _clipped(out[_RATIOS], 1.0)
    out[_RATIOS + 3] = _clipped(out[_RATIOS + 3], 1.0)
    out[_RATIOS + 5] = _clipped(out[_RATIOS + 5], 1.0)
    out[_RATIOS + 10] = _clipped(out[_RATIOS + 10], 1.0)


@inner("void(float64[::1], int64, float64, float64)", **LEAN)
def _put_momentum(out, i, moves, squares):  # type: ignore[no-untyped-def]
    _put_quotient(out, i, moves, math.sqrt(moves * moves + squares))


@inner("void(float64[::1], int64, float64, float64)", **LEAN)
def _put_flow(out, j, flow, size):  # type: ignore[no-untyped-def]
    _put_quotient(out, _FLOW + j, flow, size * _FLOW_SCALES[j] + abs(flow))


@njit("void(int64[::1], int64, int64, float64[::1], int64)", **LEAN)
def _put_slope(fi, side, sign, out, i):  # type: ignore[no-untyped-def]
    """Slope through the origin of cumulated size on distance, in units of the last level."""
    n = fi[at.BID_COUNT + side]
    mid2 = fi[at.MID2]
    prices = at.PRICES + side * LEVELS
    sizes = at.SIZES + side * LEVELS
    cumulated = 0
    xy = 0.0
    xx = 0.0
    last = 0.0
    for k in range(LEVELS):
        cumulated += fi[sizes + k]
        x = np.float64(sign * (mid2 - 2 * fi[prices + k])) if k < n else 0.0
        xy += np.float64(cumulated) * x
        xx += x * x
        last = x if k < n else last
    if mid2 == 0:
        last = 0.0
    _put_quotient(out, i, xy * last, xx * np.float64(cumulated) if last > 0.0 else 0.0)


@inner("void(int64[::1], float64[::1], float64, float64, float64, float64[::1])", **LEAN)
def _put_quotients(fi, ff, fast, middle, slow, out):  # type: ignore[no-untyped-def]
    """The first group: queues, prices, order flow, momentum, trade flow, shape of the book."""
    bid_1 = np.float64(fi[at.SIZES])
    ask_1 = np.float64(fi[at.SIZES + LEVELS])
    bid_5 = np.float64(fi[at.BID_DEPTH_5])
    ask_5 = np.float64(fi[at.ASK_DEPTH_5])
    bid_10 = np.float64(fi[at.BID_DEPTH_10])
    ask_10 = np.float64(fi[at.ASK_DEPTH_10])
    imbalance = ff[at.IMBALANCE]
    spread = np.float64(fi[at.SPREAD])
    quoted = spread if spread > 0.0 else 0.0
    usual = ff[at.MEAN_SPREAD]
    move = np.float64(fi[at.MOVE])
    usual_move = ff[at.MEAN_MOVE]
    weighted = 0.0
    step = 0.0
    seen = 0.0
    if fi[at.TWO_SIDED] == 1:
        weighted = 0.5 * imbalance * spread
        b = at.imbalance_bin(imbalance)
        step = ff[at.MICRO_SUMS + b]
        step = step if imbalance > 0.0 else (-step if imbalance < 0.0 else 0.0)
        seen = ff[at.MICRO_COUNTS + b] + _SHRINKAGE
    _put_quotient(out, _QUOTIENTS, imbalance, 1.0)
    _put_quotient(out, _QUOTIENTS + 1, bid_5 - ask_5, bid_5 + ask_5)
    _put_quotient(out, _QUOTIENTS + 2, bid_10 - ask_10, bid_10 + ask_10)
    _put_quotient(out, _PRICES, 20_000.0 * spread, np.float64(fi[at.MID2]))
    _put_quotient(out, _PRICES + 1, quoted, quoted + usual)
    _put_quotient(out, _PRICES + 2, move, usual_move + abs(move))
    _put_quotient(out, _PRICES + 3, weighted, usual)
    _put_quotient(out, _PRICES + 4, step, seen * usual_move)

    size = ff[at.LEVEL_LOTS]
    for j in range(6):
        _put_flow(out, j, ff[at.EVENT_OFI_8 + j], size)
    for j in range(3):
        _put_flow(out, 6 + j, ff[at.OFI_1S + j] * fast, size)
    for j in range(3):
        _put_momentum(out, _MOMENTUM + j, ff[at.EVENT_MOVES + j], ff[at.EVENT_SQUARES + j])
    _put_momentum(out, _MOMENTUM + 3, ff[at.MOVES_1S] * fast, ff[at.SQUARES_1S] * fast)
    _put_momentum(out, _MOMENTUM + 4, ff[at.MOVES_4S] * middle, ff[at.SQUARES_4S] * middle)
    _put_momentum(out, _MOMENTUM + 5, ff[at.MOVES_16S] * slow, ff[at.SQUARES_16S] * slow)

    trade = ff[at.MEAN_TRADE]
    _put_quotient(out, _TRADE_FLOW, ff[at.SIGNED_16T], ff[at.VOLUME_16T])
    _put_quotient(out, _TRADE_FLOW + 1, ff[at.SIGNED_1S] * fast, ff[at.VOLUME_1S] * fast + trade)
    _put_quotient(out, _TRADE_FLOW + 2, ff[at.SIGNED_16S] * slow, ff[at.VOLUME_16S] * slow + trade)

    _put_slope(fi, 0, 1, out, _SHAPE)
    _put_slope(fi, 1, -1, out, _SHAPE + 1)
    _put_quotient(out, _SHAPE + 2, bid_1, bid_10)
    _put_quotient(out, _SHAPE + 3, ask_1, ask_10)
    _put_quotient(out, _SHAPE + 4, bid_5, bid_10)
    _put_quotient(out, _SHAPE + 5, ask_5, ask_10)

    out[_PRICES] = _clipped(out[_PRICES], 1000.0)
    out[_PRICES + 3] = _clipped(out[_PRICES + 3], 8.0)
    out[_PRICES + 4] = _clipped(out[_PRICES + 4], 8.0)
    out[_SHAPE] = _clipped(out[_SHAPE], 10.0)
    out[_SHAPE + 1] = _clipped(out[_SHAPE + 1], 10.0)


@inner("void(int64[::1], float64[::1], int64[:,:,::1], int64[::1], int64, float64[::1])", **LEAN)
def compute(fi, ff, levels, depth, t_ns, out):  # type: ignore[no-untyped-def]
    """Write the feature vector as of a moment. Pure: nothing but ``out`` is written.

    Parameters
    ----------
    fi : ndarray of int64, shape (STATE_I,)
    ff : ndarray of float64, shape (STATE_F,)
        State rows of the instrument.
    levels, depth : ndarray of int64
        The book that `on_book` or `on_snapshot` saw last. Its top levels are in the state rows
        already, so nothing is read from here.
    t_ns : int
        Exchange time of the moment. Before the last event's, it is taken as that.
    out : ndarray of float64, shape (N_FEATURES,)
        Receives the values in the order of `NAMES`, all finite.
    """
    last = fi[at.LAST_NS]
    now = max(min(max(t_ns, 0), at.MAX_TIME_NS), last)
    fast, middle, slow = clock_decays(now - last if last >= 0 else 0)
    bipower = _HALF_PI * (ff[at.BIPOWER_16S] * slow)
    _stage_logs(fi, ff, now, fast, slow, bipower, out)
    _put_quotients(fi, ff, fast, middle, slow, out)
    typical = _put_logs(out)
    _put_ratios(fi, ff, slow, bipower, out)
    _put_block(fi, ff, typical, out)
