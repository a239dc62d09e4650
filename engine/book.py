# Hot path: free @njit functions.
"""The order book: price levels of one instrument, both sides, in integer ticks and lots.

Layout of an instrument's ``levels``, int64 of shape (2 sides, 2 fields, capacity): each side is
sorted so that its best level is the last one (bids ascend, asks descend) and ``depth[side]``
counts its levels. Nearly all changes of a Level II stream fall near the top, so an insertion or
removal moves a handful of entries, the top ten lie side by side for the features, and any depth
works. A full side drops its worst level and counts it: a level that far out is better forgotten
than the whole message.

Kept apart from its callers' state: all functions are free and work on preallocated arrays.
"""

from __future__ import annotations

from typing import Final

from numba import njit

from feeds.rawbytes import load_i64, load_u16
from feeds.wire import GROUP_HEADER_BYTES, HEADER_BYTES

BID: Final = 0
ASK: Final = 1
PRICE: Final = 0
QUANTITY: Final = 1

# What one delta did, `flow` of `apply_levels`, in lots.
ADDED_BID: Final = 0
REMOVED_BID: Final = 1
ADDED_ASK: Final = 2
REMOVED_ASK: Final = 3
FLOW_FIELDS: Final = 4

_NEAR: Final = 8  # levels looked at one by one from the top before bisecting


@njit("int64(int64[::1], int64, int64, int64)", cache=True)
def _insertion_point(prices, n, price, sign):  # type: ignore[no-untyped-def]
    """Index of the first level at least as good as ``price``; n where none is."""
    key = sign * price
    i = n
    floor = max(n - _NEAR, 0)
    while i > floor:
        if sign * prices[i - 1] < key:
            return i
        i -= 1
    low, high = 0, i
    while low < high:
        middle = (low + high) >> 1
        if sign * prices[middle] < key:
            low = middle + 1
        else:
            high = middle
    return low


@njit("int64(int64[:,:,::1], int64[::1], int64, int64, int64)", cache=True)
def set_level(levels, depth, side, price, quantity):  # type: ignore[no-untyped-def]
    """Set the total quantity at a price; 0 removes the level.

    Parameters
    ----------
    levels : ndarray of int64, shape (2, 2, capacity)
    depth : ndarray of int64, shape (2,)
    side : int
        BID or ASK.
    price, quantity : int
        In ticks and lots.

    Returns
    -------
    int
        The quantity that stood there before, in lots; or -1 where the book was full and the
        worst level (or this one, if it is the worst) was dropped.
    """
    prices = levels[side, PRICE]
    quantities = levels[side, QUANTITY]
    n = depth[side]
    sign = 1 if side == BID else -1
    at = _insertion_point(prices, n, price, sign)
    if at < n and prices[at] == price:
        before = quantities[at]
        if quantity != 0:
            quantities[at] = quantity
        else:
            for i in range(at, n - 1):
                prices[i] = prices[i + 1]
                quantities[i] = quantities[i + 1]
            depth[side] = n - 1
        return before
    if quantity == 0:
        return 0
    before = 0
    if n == len(prices):
        if at == 0:
            return -1
        for i in range(at - 1):
            prices[i] = prices[i + 1]
            quantities[i] = quantities[i + 1]
        at -= 1
        before = -1
    else:
        for i in range(n, at, -1):
            prices[i] = prices[i - 1]
            quantities[i] = quantities[i - 1]
        depth[side] = n + 1
    prices[at] = price
    quantities[at] = quantity
    return before


@njit("int64(int64[:,:,::1], int64[::1], int64[::1], uint8[::1], int64)", cache=True)
def apply_levels(levels, depth, flow, buf, start):  # type: ignore[no-untyped-def]
    """Apply both groups of levels of the checked Delta at ``buf[start]``.

    Parameters
    ----------
    flow : ndarray of int64, shape (FLOW_FIELDS,)
        Overwritten with the lots added and removed on each side.

    Returns
    -------
    int
        Levels dropped because a side was full.
    """
    flow[:] = 0
    dropped = 0
    at = start + HEADER_BYTES + load_u16(buf, start)
    for side in range(2):
        entry = load_u16(buf, at)
        count = load_u16(buf, at + 2)
        at += GROUP_HEADER_BYTES
        for _ in range(count):
            quantity = load_i64(buf, at + 8)
            before = set_level(levels, depth, side, load_i64(buf, at), quantity)
            if before < 0:
                dropped += 1
                before = 0
            change = quantity - before
            if change > 0:
                flow[2 * side] += change
            else:
                flow[2 * side + 1] -= change
            at += entry
    return dropped


@njit("int64(int64[:,:,::1], int64[::1], uint8[::1], int64)", cache=True)
def apply_snapshot(levels, depth, buf, start):  # type: ignore[no-untyped-def]
    """Replace the book by the checked Snapshot at ``buf[start]``; returns dropped levels.

    The wire has the best level first; walking from the last one makes each insertion an append.
    """
    depth[:] = 0
    dropped = 0
    at = start + HEADER_BYTES + load_u16(buf, start)
    for side in range(2):
        entry = load_u16(buf, at)
        count = load_u16(buf, at + 2)
        at += GROUP_HEADER_BYTES
        for i in range(count - 1, -1, -1):
            price = load_i64(buf, at + i * entry)
            quantity = load_i64(buf, at + i * entry + 8)
            if set_level(levels, depth, side, price, quantity) < 0:
                dropped += 1
        at += entry * count
    return dropped


@njit("int64(int64[:,:,::1], int64[::1], int64)", cache=True)
def best_price(levels, depth, side):  # type: ignore[no-untyped-def]
    """Best price of a side in ticks; 0 where the side is empty (prices are positive)."""
    n = depth[side]
    return levels[side, PRICE, n - 1] if n > 0 else 0


@njit("int64(int64[:,:,::1], int64[::1], int64)", cache=True)
def best_quantity(levels, depth, side):  # type: ignore[no-untyped-def]
    """Quantity at the best price of a side in lots; 0 where the side is empty."""
    n = depth[side]
    return levels[side, QUANTITY, n - 1] if n > 0 else 0


@njit("boolean(int64[:,:,::1], int64[::1])", cache=True)
def crossed(levels, depth):  # type: ignore[no-untyped-def]
    """Is the best bid at or above the best ask (crossed or locked)?"""
    if depth[BID] == 0 or depth[ASK] == 0:
        return False
    return levels[BID, PRICE, depth[BID] - 1] >= levels[ASK, PRICE, depth[ASK] - 1]
