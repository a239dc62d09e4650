# Hot path: free @njit functions.
"""What a line of a Binance recording comes down to: a kind, and integers in an array.

Filled by the scanner (`binance_json`) and by the full decoder (`binance_decode`)
alike, read by everything that follows.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit

from feeds.wire import MAX_LEVELS_A_GROUP

# Venues.
USDM: Final = 0
COINM: Final = 1
SPOT: Final = 2

# Kinds of lines.
UNRECOGNISED: Final = 0
DIFF: Final = 1
SNAPSHOT: Final = 2
TRADE: Final = 3
AGG_TRADE: Final = 4
TICKER: Final = 5
OTHER: Final = 6  # another stream
OTHER_SYMBOL: Final = 7
BLANK: Final = 8

# Columns of `fields`, int64.
KIND: Final = 0
RECEIVED_NS: Final = 1
EVENT_NS: Final = 2  # E
ENGINE_NS: Final = 3  # T
FIRST_ID: Final = 4  # U
LAST_ID: Final = 5  # u, lastUpdateId
PREVIOUS_ID: Final = 6  # pu
BIDS: Final = 7  # number of levels; they stand in `levels`, bids first
ASKS: Final = 8
PRICE: Final = 9
QUANTITY: Final = 10
TRADE_ID: Final = 11
AGGRESSOR: Final = 12
ON_BOOK: Final = 13  # 0: a trade of the insurance fund or the like, which no order book saw
BID_PRICE: Final = 14
BID_QUANTITY: Final = 15
ASK_PRICE: Final = 16
ASK_QUANTITY: Final = 17
PRICE_NEEDS: Final = 18  # decimal places that the finest price asks for, 0 where it fits
QUANTITY_NEEDS: Final = 19
SEEN: Final = 20  # which keys came
NEXT: Final = 21  # offset after the line
HAS_SYMBOL: Final = 22
FIELDS: Final = 24

# Bits of SEEN.
S_E: Final = 1
S_EVENT: Final = 2
S_ENGINE: Final = 4
S_SYMBOL: Final = 8
S_PAIR: Final = 16
S_FIRST: Final = 32
S_LAST: Final = 64
S_PREVIOUS: Final = 128
S_BID_LEVELS: Final = 256
S_ASK_LEVELS: Final = 512
S_BID_PRICE: Final = 1024
S_ASK_PRICE: Final = 2048
S_BID_QUANTITY: Final = 4096
S_ASK_QUANTITY: Final = 8192
S_TRADE: Final = 16384
S_PRICE: Final = 32768
S_QUANTITY: Final = 65536
S_MAKER: Final = 131072
S_SNAPSHOT: Final = 262144
S_DATA: Final = 524288
S_STREAM: Final = 1048576
S_X: Final = 2097152
S_AGG_ID: Final = 4194304

MAX_LEVELS_A_LINE: Final = 2 * MAX_LEVELS_A_GROUP
_MICROSECONDS_FROM: Final = 100_000_000_000_000  # 14 digits: milliseconds until the year 5138


def new_fields() -> np.ndarray:
    """Room for one line's fields, int64 of shape (FIELDS,)."""
    return np.zeros(FIELDS, dtype=np.int64)


def new_levels() -> np.ndarray:
    """Room for one line's levels, int64: price, quantity, price, quantity, …"""
    return np.zeros(2 * MAX_LEVELS_A_LINE, dtype=np.int64)


@njit("int64(int64)", cache=True)
def time_ns(value):  # type: ignore[no-untyped-def]
    """Exchange time in ns; the exchange sends ms, or µs where a stream was asked for them."""
    return value * 1_000_000 if value < _MICROSECONDS_FROM else value * 1000
