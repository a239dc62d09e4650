# Hot path: free @njit functions.
"""One line of a raw Binance recording, ``<receive ns> <JSON>``, scanned byte by byte.

The scanner is strict: it knows the exact JSON that the exchange writes (no white space, no
escapes, plain decimals) and answers `UNRECOGNISED` to everything else, which
`binance_decode` then judges with a full JSON decoder. Keys may come in any order, and
keys that it does not know are skipped where their values are plain.

Sources: Binance "Diff. Book Depth Streams", "Trade Streams", "Aggregate Trade Streams",
"Individual Symbol Book Ticker Streams" and REST "Order Book" of the spot, USD-M and COIN-M API
documentation (developers.binance.com).
"""

from __future__ import annotations

from typing import Final

from numba import njit

from feeds.inner import inner
from feeds.venues.binance_fields import (
    AGG_TRADE,
    AGGRESSOR,
    ASK_PRICE,
    ASK_QUANTITY,
    ASKS,
    BID_PRICE,
    BID_QUANTITY,
    BIDS,
    BLANK,
    COINM,
    DIFF,
    ENGINE_NS,
    EVENT_NS,
    FIRST_ID,
    HAS_SYMBOL,
    KIND,
    LAST_ID,
    NEXT,
    ON_BOOK,
    OTHER_SYMBOL,
    PREVIOUS_ID,
    PRICE,
    PRICE_NEEDS,
    QUANTITY,
    QUANTITY_NEEDS,
    RECEIVED_NS,
    S_AGG_ID,
    S_ASK_LEVELS,
    S_ASK_PRICE,
    S_ASK_QUANTITY,
    S_BID_LEVELS,
    S_BID_PRICE,
    S_BID_QUANTITY,
    S_DATA,
    S_E,
    S_ENGINE,
    S_EVENT,
    S_FIRST,
    S_LAST,
    S_MAKER,
    S_PAIR,
    S_PREVIOUS,
    S_PRICE,
    S_QUANTITY,
    S_SNAPSHOT,
    S_STREAM,
    S_SYMBOL,
    S_TRADE,
    S_X,
    SEEN,
    SNAPSHOT,
    SPOT,
    TICKER,
    TRADE,
    TRADE_ID,
    UNRECOGNISED,
    time_ns,
)
from feeds.venues.binance_keys import (
    K_ASKS,
    K_BIDS,
    K_DATA,
    K_E,
    K_ENGINE,
    K_EVENT,
    K_FIRST,
    K_LA,
    K_LAST,
    K_LAST_UPDATE,
    K_LB,
    K_MAKER,
    K_PAIR,
    K_PREVIOUS,
    K_PRICE,
    K_PS,
    K_QUANTITY,
    K_S,
    K_STREAM,
    K_SYMBOL,
    K_TRADE,
    K_UA,
    K_UB,
    K_X,
    LEN_DEPTH,
    LEN_LAST_UPDATE,
    LEN_TICKER,
    V_AGG,
    V_DEPTH,
    V_MARKET,
    V_TICKER,
    V_TRADE,
    is_known,
)
from feeds.venues.json_scan import same_text, scan_decimal, scan_integer, scan_text
from feeds.wire import AGGRESSOR_BUY, AGGRESSOR_SELL, MAX_LEVELS_A_GROUP

# The same key with values of several types, of which a message has one.
_GROUP_A: Final = S_ASK_LEVELS | S_ASK_PRICE | S_AGG_ID
_GROUP_B: Final = S_BID_LEVELS | S_BID_PRICE
_GROUP_U: Final = S_LAST | S_SNAPSHOT

_DIFF_KEYS: Final = S_E | S_EVENT | S_SYMBOL | S_FIRST | S_LAST | S_BID_LEVELS | S_ASK_LEVELS
_TICKER_KEYS: Final = (
    S_LAST | S_SYMBOL | S_BID_PRICE | S_BID_QUANTITY | S_ASK_PRICE | S_ASK_QUANTITY
)
_TRADE_KEYS: Final = S_E | S_SYMBOL | S_ENGINE | S_PRICE | S_QUANTITY | S_MAKER
_SNAPSHOT_KEYS: Final = S_SNAPSHOT | S_BID_LEVELS | S_ASK_LEVELS


@njit(
    "UniTuple(int64, 2)(uint8[::1], int64, int64, int64, int64[::1], int64[::1], int64)", cache=True
)
def scan_levels(buf, at, price_decimals, quantity_decimals, fields, levels, used):  # type: ignore[no-untyped-def]
    """``[["price","quantity"],…]`` into ``levels`` from level ``used``.

    Returns
    -------
    used : int
        Levels now in ``levels``, or -1.
    next : int
        Offset after the closing bracket.
    """
    if buf[at] != 91:
        return -1, at
    at += 1
    if buf[at] == 93:
        return used, at + 1
    first = used
    while True:
        if buf[at] != 91 or used - first >= MAX_LEVELS_A_GROUP:
            return -1, at
        price, at, price_needs = scan_decimal(buf, at + 1, price_decimals)
        if price < 0 or buf[at] != 44 or (price == 0 and price_needs == 0):
            return -1, at
        quantity, at, quantity_needs = scan_decimal(buf, at + 1, quantity_decimals)
        if quantity < 0 or buf[at] != 93:
            return -1, at
        fields[PRICE_NEEDS] = max(fields[PRICE_NEEDS], price_needs)
        fields[QUANTITY_NEEDS] = max(fields[QUANTITY_NEEDS], quantity_needs)
        levels[2 * used] = price
        levels[2 * used + 1] = quantity
        used += 1
        at += 1
        c = buf[at]
        at += 1
        if c == 93:
            return used, at
        if c != 44:
            return -1, at


@inner("int64(int64[::1], int64, int64, int64)")
def judge_kind(fields, event, event_length, venue):  # type: ignore[no-untyped-def]
    """Which kind of line has these keys on this venue; UNRECOGNISED where some are missing."""
    seen = fields[SEEN]
    pair = seen & S_PAIR != 0
    if seen & S_SNAPSHOT:
        if seen & _SNAPSHOT_KEYS != _SNAPSHOT_KEYS or pair != (venue == COINM):
            return UNRECOGNISED
        return SNAPSHOT
    if seen & S_E == 0:
        if venue == SPOT and seen & _TICKER_KEYS == _TICKER_KEYS and not pair:
            return TICKER
        return UNRECOGNISED
    if event == V_DEPTH and event_length == LEN_DEPTH:
        if seen & _DIFF_KEYS != _DIFF_KEYS or pair != (venue == COINM):
            return UNRECOGNISED
        previous = seen & S_PREVIOUS != 0
        if previous != (venue != SPOT) or fields[FIRST_ID] > fields[LAST_ID]:
            return UNRECOGNISED
        return DIFF
    if event == V_TICKER and event_length == LEN_TICKER:
        if seen & _TICKER_KEYS != _TICKER_KEYS or venue == SPOT or pair != (venue == COINM):
            return UNRECOGNISED
        return TICKER
    if event == V_TRADE and event_length == 5:
        if seen & _TRADE_KEYS != _TRADE_KEYS or seen & S_TRADE == 0:
            return UNRECOGNISED
        return TRADE
    if event == V_AGG and event_length == 8:
        if seen & _TRADE_KEYS != _TRADE_KEYS or seen & S_AGG_ID == 0:
            return UNRECOGNISED
        return AGG_TRADE
    return UNRECOGNISED


@njit(
    "int64(uint8[::1], int64, int64, int64, int64, uint8[::1], int64[::1], int64[::1])",
    cache=True,
)
def scan_line(  # type: ignore[no-untyped-def]
    buf, start, venue, price_decimals, quantity_decimals, symbol, fields, levels
):
    """Scan the line at ``start``.

    Parameters
    ----------
    buf : ndarray of uint8
        Whole lines, each closed by a newline.
    venue : int
        USDM, COINM or SPOT.
    price_decimals, quantity_decimals : int
        Prices come out in units of 10^-price_decimals, quantities likewise.
    symbol : ndarray of uint8
        The instrument wanted; with none (length 0) every line with a symbol is UNRECOGNISED.
    fields : ndarray of int64, shape (FIELDS,)
        Overwritten; NEXT is set where the line is recognised.
    levels : ndarray of int64, shape (2 * MAX_LEVELS_A_LINE,)
        Overwritten.

    Returns
    -------
    int
        The kind of line, also in ``fields[KIND]``.
    """
    fields[:] = 0
    fields[PREVIOUS_ID] = -1
    fields[ON_BOOK] = 1
    at = start
    if buf[at] == 10:
        fields[NEXT] = at + 1
        fields[KIND] = BLANK
        return BLANK
    received, at = scan_integer(buf, at)
    if received <= 0 or buf[at] != 32 or buf[at + 1] != 123:
        return UNRECOGNISED
    fields[RECEIVED_NS] = received
    at += 2
    inside = 0
    seen = 0
    event = 0
    event_length = 0
    used = 0
    aggregate_id = 0
    other_symbol = False
    while True:
        key, length, at = scan_text(buf, at)
        if length <= 0 or buf[at] != 58:
            return UNRECOGNISED
        at += 1
        c = buf[at]
        bit = 0
        if key == K_DATA and c == 123:
            if inside == 1 or seen & S_DATA:
                return UNRECOGNISED
            seen |= S_DATA
            inside = 1
            at += 1
            continue
        if key == K_STREAM and c == 34:
            bit = S_STREAM
            _, length, at = scan_text(buf, at)
            if length < 0:
                return UNRECOGNISED
        elif (key == K_LB or key == K_BIDS) and c == 91:
            # Bids stand first in `levels`, so asks may not come before them.
            if seen & S_ASK_LEVELS:
                return UNRECOGNISED
            bit = S_BID_LEVELS
            used, at = scan_levels(buf, at, price_decimals, quantity_decimals, fields, levels, 0)
            if used < 0:
                return UNRECOGNISED
            fields[BIDS] = used
        elif (key == K_LA or key == K_ASKS) and c == 91:
            if seen & S_BID_LEVELS == 0:
                return UNRECOGNISED
            bit = S_ASK_LEVELS
            bids = used
            used, at = scan_levels(buf, at, price_decimals, quantity_decimals, fields, levels, bids)
            if used < 0:
                return UNRECOGNISED
            fields[ASKS] = used - bids
        elif c == 34 and (key == K_LB or key == K_LA or key == K_PRICE):
            value, at, needs = scan_decimal(buf, at, price_decimals)
            if value < 0:
                return UNRECOGNISED
            fields[PRICE_NEEDS] = max(fields[PRICE_NEEDS], needs)
            if key == K_LB:
                bit = S_BID_PRICE
                fields[BID_PRICE] = value
            elif key == K_LA:
                bit = S_ASK_PRICE
                fields[ASK_PRICE] = value
            else:
                bit = S_PRICE
                fields[PRICE] = value
        elif c == 34 and (key == K_UB or key == K_UA or key == K_QUANTITY):
            value, at, needs = scan_decimal(buf, at, quantity_decimals)
            if value < 0:
                return UNRECOGNISED
            fields[QUANTITY_NEEDS] = max(fields[QUANTITY_NEEDS], needs)
            if key == K_UB:
                bit = S_BID_QUANTITY
                fields[BID_QUANTITY] = value
            elif key == K_UA:
                bit = S_ASK_QUANTITY
                fields[ASK_QUANTITY] = value
            else:
                bit = S_QUANTITY
                fields[QUANTITY] = value
        elif c == 34:
            value_at = at + 1
            text, length, at = scan_text(buf, at)
            if length < 0:
                return UNRECOGNISED
            if key == K_E:
                bit = S_E
                event = text
                event_length = length
            elif key == K_S or key == K_SYMBOL:
                bit = S_SYMBOL
                if len(symbol) == 0:
                    return UNRECOGNISED
                other_symbol = same_text(buf, value_at, length, symbol) == 0
            elif key == K_PS or key == K_PAIR:
                bit = S_PAIR
            elif key == K_X:
                bit = S_X
                if text != V_MARKET or length != 6:
                    fields[ON_BOOK] = 0
        elif 48 <= c <= 57:
            value, at = scan_integer(buf, at)
            if value < 0:
                return UNRECOGNISED
            if key == K_EVENT:
                bit = S_EVENT
                fields[EVENT_NS] = time_ns(value)
            elif key == K_ENGINE:
                bit = S_ENGINE
                fields[ENGINE_NS] = time_ns(value)
            elif key == K_FIRST:
                bit = S_FIRST
                fields[FIRST_ID] = value
            elif key == K_LAST:
                bit = S_LAST
                fields[LAST_ID] = value
            elif key == K_PREVIOUS:
                bit = S_PREVIOUS
                fields[PREVIOUS_ID] = value
            elif key == K_LAST_UPDATE and length == LEN_LAST_UPDATE:
                bit = S_SNAPSHOT
                fields[LAST_ID] = value
            elif key == K_TRADE:
                bit = S_TRADE
                fields[TRADE_ID] = value
            elif key == K_LA:
                bit = S_AGG_ID
                aggregate_id = value
        elif c == 116 and buf[at + 1] == 114 and buf[at + 2] == 117 and buf[at + 3] == 101:
            at += 4
            if key == K_MAKER:
                bit = S_MAKER
                fields[AGGRESSOR] = AGGRESSOR_SELL
        elif (
            c == 102
            and buf[at + 1] == 97
            and buf[at + 2] == 108
            and buf[at + 3] == 115
            and buf[at + 4] == 101
        ):
            at += 5
            if key == K_MAKER:
                bit = S_MAKER
                fields[AGGRESSOR] = AGGRESSOR_BUY
        else:
            return UNRECOGNISED
        if bit == 0 and is_known(key):
            return UNRECOGNISED
        if bit & seen or (
            seen != 0
            and (
                (bit & _GROUP_A and seen & _GROUP_A)
                or (bit & _GROUP_B and seen & _GROUP_B)
                or (bit & _GROUP_U and seen & _GROUP_U)
            )
        ):
            return UNRECOGNISED
        seen |= bit
        if buf[at] == 44:
            at += 1
            continue
        if buf[at] == 125 and inside == 1:
            inside = 0
            at += 1
            if buf[at] == 44:
                at += 1
                continue
        if buf[at] != 125 or inside == 1 or buf[at + 1] != 10:
            return UNRECOGNISED
        break
    fields[NEXT] = at + 2
    fields[SEEN] = seen
    fields[HAS_SYMBOL] = seen & S_SYMBOL != 0
    kind = judge_kind(fields, event, event_length, venue)
    if kind == UNRECOGNISED:
        return UNRECOGNISED
    if kind == AGG_TRADE:
        fields[TRADE_ID] = aggregate_id
    if other_symbol:
        kind = OTHER_SYMBOL
    elif kind == TRADE or kind == AGG_TRADE:
        if fields[QUANTITY] == 0 and fields[QUANTITY_NEEDS] == 0:
            fields[ON_BOOK] = 0
        elif fields[PRICE] == 0 and fields[PRICE_NEEDS] == 0 and fields[ON_BOOK] == 1:
            return UNRECOGNISED
    fields[KIND] = kind
    return kind
