# Hot path: free @njit functions.
"""Where the features of one instrument keep what they remember.

Two rows, ``fi`` of int64 and ``ff`` of float64, of fixed length: O(depth of the block) memory,
whatever the length of the session. Everything that can be an integer is one, so that its sums
are exact; every float sum is a recurrence with one fixed order of operations.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit

from engine.elementary import LEAN, half_power
from feeds.inner import inner

# Events counted for the warm-up, and when it ends.
BOOK: Final = "book updates"
TRADES: Final = "trades"
WARM_BOOK_UPDATES: Final = 256
WARM_TRADES: Final = 32

LEVELS: Final = 10
"""Levels a side that the features look at."""

# Limits of what is let in. Sums of 20 quantities stay below 2**53, so float64 holds them exactly.
MAX_PRICE_TICKS: Final = 1 << 40
MAX_QUANTITY_LOTS: Final = 1 << 44
MAX_FLOW_LOTS: Final = 1 << 48
MAX_TIME_NS: Final = 1 << 62
NO_ASK_TICKS: Final = 1 << 42
"""Price of an ask level that is not there; a missing bid has the negative of it."""
NO_SIZE: Final = -1000.0
"""Log size of a level that is not there, before the block is clipped."""
TINY: Final = 1e-100
"""A decayed sum smaller than this is 0: subnormal numbers are slow and mean nothing here."""

BUCKET_TRADES: Final = 16.0
"""Size of a volume bucket, in mean trades."""
LARGE_TRADE: Final = 4.0
"""A trade of more mean trades than this is a large one."""

# Decays a book update or a trade: 2 ** (-1 / half-life), correctly rounded.
DECAY_4: Final = 0.8408964152537145
DECAY_8: Final = 0.9170040432046712
DECAY_16: Final = 0.9576032806985737
DECAY_32: Final = 0.9785720620877001
DECAY_64: Final = 0.9892280131939755
GAIN_256: Final = 0.0027039439145298736  # 1 - 2 ** (-1 / 256)
GAIN_32: Final = 0.021427937912299865  # 1 - 2 ** (-1 / 32)

SLOW_HALF_LIFE_NS: Final = 16_000_000_000
"""Clock decays have half-lives of 16 s, 4 s and 1 s, each four times the next."""
_PER_SLOW_HALF_LIFE: Final = 1.0 / SLOW_HALF_LIFE_NS

# fi: scalars.
BOOK_UPDATES: Final = 0
TRADE_COUNT: Final = 1
LAST_NS: Final = 2  # -1: no event yet
LAST_TRADE_NS: Final = 3
LAST_MOVE_NS: Final = 4
MID2: Final = 5  # twice the mid in ticks; 0: not known yet
SPREAD: Final = 6  # ticks, of the last two-sided book
MOVE: Final = 7  # change of MID2 at the last book update
LAST_MOVE: Final = 8  # magnitude of the last change of MID2 that was not 0
TWO_SIDED: Final = 9  # 1 while both sides have a level
BID_COUNT: Final = 10
ASK_COUNT: Final = 11
BID_DEPTH_5: Final = 12
ASK_DEPTH_5: Final = 13
BID_DEPTH_10: Final = 14
ASK_DEPTH_10: Final = 15
BID_PRICE_SUM: Final = 16
ASK_PRICE_SUM: Final = 17
TRADE_MID2: Final = 18  # MID2 at the last trade
TRADE_SIGNED: Final = 19  # signed lots of the last trade
TRADE_LOTS: Final = 20
TRADE_SIGN: Final = 21
# Buckets of VPIN: the one being filled, then the ring of full ones and its sums.
BUCKET_SIZE: Final = 22  # lots; 0: no trade yet
BUCKET_FILLED: Final = 23
BUCKET_SIGNED: Final = 24
BUCKET_AT: Final = 25
BUCKET_SUM_IMBALANCE: Final = 26
BUCKET_SUM_LOTS: Final = 27
PENDING_AT: Final = 28
# fi: arrays.
PRICES: Final = 32  # bid 10, ask 10; best first
SIZES: Final = PRICES + 2 * LEVELS
IMBALANCE_BINS: Final = 8
VISITS: Final = SIZES + 2 * LEVELS  # book updates seen in each imbalance bin since the last move
SIGNED_VISITS: Final = VISITS + IMBALANCE_BINS
BUCKETS: Final = 32
BUCKET_IMBALANCES: Final = SIGNED_VISITS + IMBALANCE_BINS
BUCKET_LOTS: Final = BUCKET_IMBALANCES + BUCKETS
REALISED_TRADES: Final = 8
PENDING_PRICES: Final = BUCKET_LOTS + BUCKETS
PENDING_SIGNS: Final = PENDING_PRICES + REALISED_TRADES
PENDING_SPREADS: Final = PENDING_SIGNS + REALISED_TRADES
STATE_I: Final = PENDING_SPREADS + REALISED_TRADES

# ff: scales, each seeded by its first value.
LEVEL_LOTS: Final = 0  # size of a level; 0: not known
WIDTH: Final = 1  # distance of a level from the mid, ticks
MEAN_SPREAD: Final = 2  # ticks
MEAN_TRADE: Final = 3  # lots
IMBALANCE: Final = 4  # queue imbalance of the best levels
MEAN_MOVE: Final = 5  # magnitude of a change of MID2 that is not 0; 0: none yet
LOG_SIZES: Final = 8  # bid 10, ask 10
# ff: decayed once a book update, in the order of EVENT_DECAYS.
EVENT: Final = LOG_SIZES + 2 * LEVELS
EVENT_OFI_8: Final = EVENT  # 1, 5, 10 levels
EVENT_OFI_64: Final = EVENT + 3
EVENT_MOVES: Final = EVENT + 6  # half-lives 4, 16, 64
EVENT_SQUARES: Final = EVENT + 9
EVENT_COUNT: Final = 12
EVENT_DECAYS: Final = np.array(
    [DECAY_8] * 3 + [DECAY_64] * 3 + [DECAY_4, DECAY_16, DECAY_64] * 2, dtype=np.float64
)
# ff: decayed by the clock. Three runs, half-lives 1 s, 4 s, 16 s.
CLOCK_1: Final = EVENT + EVENT_COUNT
OFI_1S: Final = CLOCK_1  # 1, 5, 10 levels
QUOTES_1S: Final = CLOCK_1 + 3
TRADES_1S: Final = CLOCK_1 + 4
MOVES_1S: Final = CLOCK_1 + 5
SQUARES_1S: Final = CLOCK_1 + 6
SIGNED_1S: Final = CLOCK_1 + 7
VOLUME_1S: Final = CLOCK_1 + 8
CLOCK_4: Final = CLOCK_1 + 9
MOVES_4S: Final = CLOCK_4
SQUARES_4S: Final = CLOCK_4 + 1
CLOCK_16: Final = CLOCK_4 + 2
QUOTES_16S: Final = CLOCK_16
TRADES_16S: Final = CLOCK_16 + 1
MOVES_16S: Final = CLOCK_16 + 2
SQUARES_16S: Final = CLOCK_16 + 3
BIPOWER_16S: Final = CLOCK_16 + 4
SIGNED_16S: Final = CLOCK_16 + 5
VOLUME_16S: Final = CLOCK_16 + 6
ADDED_BID: Final = CLOCK_16 + 7
REMOVED_BID: Final = CLOCK_16 + 8
ADDED_ASK: Final = CLOCK_16 + 9
REMOVED_ASK: Final = CLOCK_16 + 10
HIT_BID: Final = CLOCK_16 + 11  # lots traded by sellers, at the bid
HIT_ASK: Final = CLOCK_16 + 12
CLOCK_END: Final = CLOCK_16 + 13
# ff: the micro-price table, decayed once a mid move.
MICRO_SUMS: Final = CLOCK_END
MICRO_COUNTS: Final = MICRO_SUMS + IMBALANCE_BINS
# ff: decayed once a trade.
TRADE_16: Final = MICRO_COUNTS + IMBALANCE_BINS
SIGNED_16T: Final = TRADE_16
VOLUME_16T: Final = TRADE_16 + 1
TRADE_32: Final = TRADE_16 + 2
KYLE_XY: Final = TRADE_32
KYLE_XX: Final = TRADE_32 + 1
KYLE_YY: Final = TRADE_32 + 2
AMIHUD_SUM: Final = TRADE_32 + 3
AMIHUD_COUNT: Final = TRADE_32 + 4
AUTO_VOLUME: Final = TRADE_32 + 5
AUTO_SQUARES: Final = TRADE_32 + 6
AUTO_SIGN: Final = TRADE_32 + 7
AUTO_COUNT: Final = TRADE_32 + 8
LARGE_LOTS: Final = TRADE_32 + 9
TOTAL_LOTS: Final = TRADE_32 + 10
EFFECTIVE: Final = TRADE_32 + 11
EFFECTIVE_QUOTED: Final = TRADE_32 + 12
REALISED: Final = TRADE_32 + 13
REALISED_QUOTED: Final = TRADE_32 + 14
TRADE_END: Final = TRADE_32 + 15
STATE_F: Final = TRADE_END


@njit("void(int64[::1], float64[::1])", **LEAN)
def reset(fi, ff):  # type: ignore[no-untyped-def]
    """Forget everything: an instrument of which nothing is known.

    Parameters
    ----------
    fi : ndarray of int64, shape (STATE_I,)
    ff : ndarray of float64, shape (STATE_F,)
        The instrument's state rows; every element is written.
    """
    fi[:] = 0
    ff[:] = 0.0
    fi[LAST_NS] = -1
    for k in range(LEVELS):
        fi[PRICES + k] = -NO_ASK_TICKS
        fi[PRICES + LEVELS + k] = NO_ASK_TICKS
        ff[LOG_SIZES + k] = NO_SIZE
        ff[LOG_SIZES + LEVELS + k] = NO_SIZE


@inner("int64(int64[::1])", **LEAN)
def is_warm(fi):  # type: ignore[no-untyped-def]
    """1 once `WARM_BOOK_UPDATES` deltas and `WARM_TRADES` trades came since `reset`, else 0."""
    warm = fi[BOOK_UPDATES] >= WARM_BOOK_UPDATES and fi[TRADE_COUNT] >= WARM_TRADES
    return np.int64(1) if warm else np.int64(0)


@inner("UniTuple(float64, 3)(int64)", **LEAN)
def clock_decays(elapsed_ns):  # type: ignore[no-untyped-def]
    """What the clock leaves of sums with half-lives of 1 s, 4 s and 16 s.

    Each is the fourth power of the next, so one power of two does for all.

    Parameters
    ----------
    elapsed_ns : int
        At least 0; for 0 all three are exactly 1.
    """
    slow = half_power(np.float64(elapsed_ns) * _PER_SLOW_HALF_LIFE) if elapsed_ns > 0 else 1.0
    middle = slow * slow
    middle = middle * middle
    fast = middle * middle
    fast = fast * fast
    return fast, middle, slow


@inner("int64(float64)", **LEAN)
def imbalance_bin(imbalance):  # type: ignore[no-untyped-def]
    """Bin of the micro-price table for a queue imbalance in [-1, 1]: eighths of its magnitude."""
    b = np.int64(abs(imbalance) * IMBALANCE_BINS)
    return b if b < IMBALANCE_BINS else IMBALANCE_BINS - 1
