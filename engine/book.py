# Hot path: free @njit functions.
"""The order book: price levels of one instrument, both sides, in integer ticks and lots.

A side is seen in one coordinate, *goodness*: the price for bids, minus the price for asks, so the
best level is the greatest on either side. Its levels stand in two places:

- ``window[side]``: quantities of `WINDOW` consecutive ticks up to a little beyond the best, one
  cell a tick, with a two-level bitmap of the cells that are not empty. Setting a level is a store;
  the next best level is a bit scan.
- ``far[side]``: the levels worse than the window, a sorted array, best last. Few messages ever
  touch it. The window moves when the best level leaves its upper part, and takes levels from
  ``far`` or hands them over.

``top`` holds a copy of the `TOP_LEVELS` best levels of each side, its best one last, which is what
features and signals read; ``depth[side]`` counts them. A full book drops its worst level and
counts it: a level that far out is better forgotten than the whole message.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit

from engine.bits import highest_bit, lowest_bit
from feeds.inner import inner
from feeds.rawbytes import load_i64, load_u16
from feeds.wire import GROUP_HEADER_BYTES, HEADER_BYTES

BID: Final = 0
ASK: Final = 1
PRICE: Final = 0
QUANTITY: Final = 1
TOP_LEVELS: Final = 10

# What one delta did, `flow` of `apply_levels`, in lots.
ADDED_BID: Final = 0
REMOVED_BID: Final = 1
ADDED_ASK: Final = 2
REMOVED_ASK: Final = 3
FLOW_FIELDS: Final = 4

WINDOW: Final = 1 << 16
HEADROOM: Final = WINDOW >> 3  # cells above the best level after the window has moved

# A row of `window`: the cells, a bit for each cell, a bit for each word of bits, and counts.
_AT_WORDS: Final = WINDOW
_WORDS: Final = WINDOW >> 6
_AT_SUPER: Final = _AT_WORDS + _WORDS
_SUPER: Final = _WORDS >> 6
_BASE: Final = _AT_SUPER + _SUPER  # goodness of cell 0
_BEST: Final = _BASE + 1  # cell of the best level, -1 where the window is empty
_NEAR: Final = _BASE + 2  # levels in the window
_FAR: Final = _BASE + 3  # levels in `far`
ROW_CELLS: Final = _BASE + 8
_WORST: Final = np.iinfo(np.int64).min  # below every goodness


@inner("void(int64[::1], int64)")
def _mark(row, cell):  # type: ignore[no-untyped-def]
    word = cell >> 6
    row[_AT_WORDS + word] |= np.int64(1) << (cell & 63)
    row[_AT_SUPER + (word >> 6)] |= np.int64(1) << (word & 63)


@inner("void(int64[::1], int64)")
def _unmark(row, cell):  # type: ignore[no-untyped-def]
    word = cell >> 6
    row[_AT_WORDS + word] &= ~(np.int64(1) << (cell & 63))
    if row[_AT_WORDS + word] == 0:
        row[_AT_SUPER + (word >> 6)] &= ~(np.int64(1) << (word & 63))


@inner("void(int64[::1], int64, int64)")
def _put_mark(row, cell, stands):  # type: ignore[no-untyped-def]
    """`_mark` where ``stands`` is 1, `_unmark` where it is 0, without a branch."""
    word = cell >> 6
    at = cell & 63
    bits = (row[_AT_WORDS + word] & ~(np.int64(1) << at)) | (stands << at)
    row[_AT_WORDS + word] = bits
    above = word >> 6
    at = word & 63
    words = row[_AT_SUPER + above] & ~(np.int64(1) << at)
    row[_AT_SUPER + above] = words | (np.int64(bits != 0) << at)


@njit("int64(int64[::1], int64)", cache=True)
def _below(row, cell):  # type: ignore[no-untyped-def]
    """The highest cell below ``cell`` that is not empty, or -1."""
    if cell <= 0:
        return -1
    last = cell - 1
    word = last >> 6
    # 2 << 63 is 0, so the mask of a whole word is -1.
    bits = row[_AT_WORDS + word] & ((np.int64(2) << (last & 63)) - 1)
    if bits != 0:
        return (word << 6) + highest_bit(bits)
    above = word >> 6
    words = row[_AT_SUPER + above] & ((np.int64(1) << (word & 63)) - 1)
    while words == 0:
        above -= 1
        if above < 0:
            return -1
        words = row[_AT_SUPER + above]
    word = (above << 6) + highest_bit(words)
    return (word << 6) + highest_bit(row[_AT_WORDS + word])


@inner("int64(int64[:,::1], int64, int64, int64)")
def _far_point(far, n, goodness, sign):  # type: ignore[no-untyped-def]
    """Index of the first far level at least this good; n where none is."""
    low, high = 0, n
    while low < high:
        middle = (low + high) >> 1
        if sign * far[PRICE, middle] < goodness:
            low = middle + 1
        else:
            high = middle
    return low


@inner("int64(int64[::1], int64[:,::1], int64, int64, int64)")
def _set_far(row, far, sign, goodness, quantity):  # type: ignore[no-untyped-def]
    n = row[_FAR]
    at = _far_point(far, n, goodness, sign)
    if at < n and sign * far[PRICE, at] == goodness:
        before = far[QUANTITY, at]
        if quantity != 0:
            far[QUANTITY, at] = quantity
        else:
            for i in range(at, n - 1):
                far[PRICE, i] = far[PRICE, i + 1]
                far[QUANTITY, i] = far[QUANTITY, i + 1]
            row[_FAR] = n - 1
        return before
    if quantity != 0:
        for i in range(n, at, -1):
            far[PRICE, i] = far[PRICE, i - 1]
            far[QUANTITY, i] = far[QUANTITY, i - 1]
        far[PRICE, at] = sign * goodness
        far[QUANTITY, at] = quantity
        row[_FAR] = n + 1
    return 0


@inner("void(int64[::1], int64[:,::1], int64, int64)")
def _move_window(row, far, sign, best):  # type: ignore[no-untyped-def]
    """Move the window so that goodness ``best`` stands `HEADROOM` cells below its end."""
    base = best - (WINDOW - 1 - HEADROOM)
    shift = base - row[_BASE]
    n = row[_FAR]
    if shift > 0:
        for word in range(_WORDS):
            bits = row[_AT_WORDS + word]
            while bits != 0:
                cell = (word << 6) + lowest_bit(bits)
                bits &= bits - 1
                quantity = row[cell]
                row[cell] = 0
                _unmark(row, cell)
                if cell < shift:
                    far[PRICE, n] = sign * (row[_BASE] + cell)
                    far[QUANTITY, n] = quantity
                    n += 1
                    row[_NEAR] -= 1
                else:
                    row[cell - shift] = quantity
                    _mark(row, cell - shift)
    else:
        for word in range(_WORDS - 1, -1, -1):
            bits = row[_AT_WORDS + word]
            while bits != 0:
                bit = highest_bit(bits)
                cell = (word << 6) + bit
                bits &= ~(np.int64(1) << bit)
                quantity = row[cell]
                row[cell] = 0
                _unmark(row, cell)
                row[cell - shift] = quantity
                _mark(row, cell - shift)
        while n > 0 and sign * far[PRICE, n - 1] >= base:
            n -= 1
            cell = sign * far[PRICE, n] - base
            row[cell] = far[QUANTITY, n]
            _mark(row, cell)
            row[_NEAR] += 1
    row[_FAR] = n
    row[_BASE] = base
    row[_BEST] = _below(row, WINDOW)


@inner("void(int64[::1], int64[:,::1])")
def _drop_worst(row, far):  # type: ignore[no-untyped-def]
    n = row[_FAR]
    if n > 0:
        for i in range(n - 1):
            far[PRICE, i] = far[PRICE, i + 1]
            far[QUANTITY, i] = far[QUANTITY, i + 1]
        row[_FAR] = n - 1
        return
    above = 0
    while row[_AT_SUPER + above] == 0:
        above += 1
    word = (above << 6) + lowest_bit(row[_AT_SUPER + above])
    cell = (word << 6) + lowest_bit(row[_AT_WORDS + word])
    row[cell] = 0
    _unmark(row, cell)
    row[_NEAR] -= 1
    if cell == row[_BEST]:
        row[_BEST] = -1


@inner("int64(int64[:,::1], int64[:,:,::1], int64, int64, int64)")
def set_level(window, far, side, price, quantity):  # type: ignore[no-untyped-def]
    """Set the total quantity at a price; 0 removes the level. Leaves ``top`` as it was.

    Parameters
    ----------
    window : ndarray of int64, shape (2, ROW_CELLS)
    far : ndarray of int64, shape (2, 2, max_levels + 1)
        Sides and fields; see `new_book`.
    side : int
        BID or ASK.
    price, quantity : int
        In ticks and lots.

    Returns
    -------
    int
        The quantity that stood there before, in lots; or -1 where the book was full and the
        worst level (this one, if it is the worst) was dropped.
    """
    sign = 1 if side == BID else -1
    goodness = sign * price
    row = window[side]
    if row[_NEAR] + row[_FAR] == 0:
        if quantity == 0:
            return 0
        row[_BASE] = goodness - (WINDOW - 1 - HEADROOM)
    cell = goodness - row[_BASE]
    if cell >= WINDOW:
        if quantity == 0:
            return 0
        _move_window(row, far[side], sign, goodness)
        cell = goodness - row[_BASE]
    if cell < 0:
        before = _set_far(row, far[side], sign, goodness, quantity)
        added = before == 0 and quantity != 0
    else:
        before = row[cell]
        row[cell] = quantity
        added = before == 0 and quantity != 0
        if added:
            _mark(row, cell)
            row[_NEAR] += 1
            row[_BEST] = max(row[_BEST], cell)
        elif quantity == 0 and before != 0:
            _unmark(row, cell)
            row[_NEAR] -= 1
            if cell == row[_BEST]:
                best = _below(row, cell)
                row[_BEST] = best
                if best < HEADROOM and row[_FAR] > 0:
                    if best >= 0:
                        goodness = row[_BASE] + best
                    else:
                        goodness = sign * far[side, PRICE, row[_FAR] - 1]
                    _move_window(row, far[side], sign, goodness)
    if added and row[_NEAR] + row[_FAR] >= far.shape[2]:
        _drop_worst(row, far[side])
        return -1
    return before


@inner("void(int64[:,::1], int64[:,:,::1], int64[:,:,::1], int64[::1], int64)")
def refresh_top(window, far, top, depth, side):  # type: ignore[no-untyped-def]
    """Copy the best levels of a side into ``top`` and count them in ``depth``."""
    row = window[side]
    n = min(row[_NEAR] + row[_FAR], TOP_LEVELS)
    depth[side] = n
    sign = 1 if side == BID else -1
    base = row[_BASE]
    cell = row[_BEST]
    i = n - 1
    while i >= 0 and cell >= 0:
        top[side, PRICE, i] = sign * (base + cell)
        top[side, QUANTITY, i] = row[cell]
        i -= 1
        cell = _below(row, cell)
    worst = row[_FAR] - 1
    while i >= 0:
        top[side, PRICE, i] = far[side, PRICE, worst]
        top[side, QUANTITY, i] = far[side, QUANTITY, worst]
        i -= 1
        worst -= 1


@njit(
    "int64(int64[:,::1], int64[:,:,::1], int64[:,:,::1], int64[::1], int64[::1], uint8[::1],"
    " int64)",
    cache=True,
)
def apply_levels(window, far, top, depth, flow, buf, start):  # type: ignore[no-untyped-def]
    """Apply both groups of levels of the checked Delta at ``buf[start]``.

    Parameters
    ----------
    window, far, top, depth : ndarray of int64
        The book, as made by `new_book`.
    flow : ndarray of int64, shape (FLOW_FIELDS,)
        Overwritten with the lots added and removed on each side.
    buf : ndarray of uint8
    start : int
        Where the message starts.

    Returns
    -------
    int
        Levels dropped because the book was full.
    """
    dropped = 0
    at = start + HEADER_BYTES + load_u16(buf, start)
    for side in range(2):
        entry = load_u16(buf, at)
        count = load_u16(buf, at + 2)
        at += GROUP_HEADER_BYTES
        sign = 1 if side == BID else -1
        row = window[side]
        worst = sign * top[side, PRICE, 0] if depth[side] == TOP_LEVELS else _WORST
        reached = _WORST
        added = 0
        removed = 0
        # Kept out of memory while the levels are plain ones: most are, and nothing tells which
        # kind the next one is, so they are set without a branch.
        base, best, near = row[_BASE], row[_BEST], row[_NEAR]
        room = far.shape[2] - 1 - row[_FAR]
        for _ in range(count):
            price = load_i64(buf, at)
            quantity = load_i64(buf, at + 8)
            goodness = sign * price
            cell = goodness - base
            if (
                cell < 0
                or cell >= WINDOW
                or best < 0
                or near >= room
                or (quantity == 0 and cell == best)
            ):
                row[_BEST], row[_NEAR] = best, near
                before = set_level(window, far, side, price, quantity)
                base, best, near = row[_BASE], row[_BEST], row[_NEAR]
                room = far.shape[2] - 1 - row[_FAR]
                if before < 0:
                    dropped += 1
                    before = 0
            else:
                before = row[cell]
                row[cell] = quantity
                stands = np.int64(quantity != 0)
                _put_mark(row, cell, stands)
                near += stands - np.int64(before != 0)
                best = max(best, (cell + 1) * stands - 1)
            change = quantity - before
            gain = max(change, 0)
            added += gain
            removed += gain - change
            reached = max(reached, goodness)
            at += entry
        row[_BEST], row[_NEAR] = best, near
        flow[2 * side] = added
        flow[2 * side + 1] = removed
        if count > 0 and reached >= worst:
            refresh_top(window, far, top, depth, side)
    return dropped


@inner("void(int64[::1])")
def _clear(row):  # type: ignore[no-untyped-def]
    for word in range(_WORDS):
        bits = row[_AT_WORDS + word]
        while bits != 0:
            row[(word << 6) + lowest_bit(bits)] = 0
            bits &= bits - 1
        row[_AT_WORDS + word] = 0
    row[_AT_SUPER : _AT_SUPER + _SUPER] = 0
    row[_BEST] = -1
    row[_NEAR] = 0
    row[_FAR] = 0


@njit(
    "int64(int64[:,::1], int64[:,:,::1], int64[:,:,::1], int64[::1], uint8[::1], int64)",
    cache=True,
)
def apply_snapshot(window, far, top, depth, buf, start):  # type: ignore[no-untyped-def]
    """Replace the book by the checked Snapshot at ``buf[start]``; returns dropped levels.

    The wire has the best level first. It goes in first, so that the window stands where it will
    stay; the others follow worst first, each one better than all before it.
    """
    dropped = 0
    at = start + HEADER_BYTES + load_u16(buf, start)
    for side in range(2):
        entry = load_u16(buf, at)
        count = load_u16(buf, at + 2)
        at += GROUP_HEADER_BYTES
        _clear(window[side])
        if count > 0:
            set_level(window, far, side, load_i64(buf, at), load_i64(buf, at + 8))
        for i in range(count - 1, 0, -1):
            price = load_i64(buf, at + i * entry)
            quantity = load_i64(buf, at + i * entry + 8)
            if set_level(window, far, side, price, quantity) < 0:
                dropped += 1
        at += entry * count
        refresh_top(window, far, top, depth, side)
    return dropped


@njit("int64(int64[:,:,::1], int64[::1], int64)", cache=True)
def best_price(top, depth, side):  # type: ignore[no-untyped-def]
    """Best price of a side in ticks; 0 where the side is empty (prices are positive)."""
    n = depth[side]
    return top[side, PRICE, n - 1] if n > 0 else 0


@njit("int64(int64[:,:,::1], int64[::1], int64)", cache=True)
def best_quantity(top, depth, side):  # type: ignore[no-untyped-def]
    """Quantity at the best price of a side in lots; 0 where the side is empty."""
    n = depth[side]
    return top[side, QUANTITY, n - 1] if n > 0 else 0


@njit("boolean(int64[:,:,::1], int64[::1])", cache=True)
def crossed(top, depth):  # type: ignore[no-untyped-def]
    """Is the best bid at or above the best ask (crossed or locked)?"""
    if depth[BID] == 0 or depth[ASK] == 0:
        return False
    return top[BID, PRICE, depth[BID] - 1] >= top[ASK, PRICE, depth[ASK] - 1]


@inner("int64(int64[:,::1], int64)")
def level_count(window, side):  # type: ignore[no-untyped-def]
    """How many levels a side has, near and far."""
    return window[side, _NEAR] + window[side, _FAR]


@njit("int64[:,::1](int64[:,::1], int64[:,:,::1], int64)", cache=True)
def side_levels(window, far, side):  # type: ignore[no-untyped-def]
    """All levels of a side, best first: int64 of shape (levels, 2), price and quantity."""
    row = window[side]
    sign = 1 if side == BID else -1
    out = np.empty((level_count(window, side), 2), dtype=np.int64)
    cell = row[_BEST]
    i = 0
    while cell >= 0:
        out[i, 0] = sign * (row[_BASE] + cell)
        out[i, 1] = row[cell]
        i += 1
        cell = _below(row, cell)
    for k in range(row[_FAR] - 1, -1, -1):
        out[i, 0] = far[side, PRICE, k]
        out[i, 1] = far[side, QUANTITY, k]
        i += 1
    return out


def new_books(count: int, max_levels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Empty books of ``count`` instruments.

    Parameters
    ----------
    count : int
    max_levels : int
        Levels a side can hold.

    Returns
    -------
    window, far, top, depth : ndarray of int64
        Shapes (count, 2, ROW_CELLS), (count, 2, 2, max_levels + 1), (count, 2, 2, TOP_LEVELS) and
        (count, 2). Memory is taken only where levels are.
    """
    window = np.zeros((count, 2, ROW_CELLS), dtype=np.int64)
    window[:, :, _BEST] = -1
    return (
        window,
        np.zeros((count, 2, 2, max_levels + 1), dtype=np.int64),
        np.zeros((count, 2, 2, TOP_LEVELS), dtype=np.int64),
        np.zeros((count, 2), dtype=np.int64),
    )
