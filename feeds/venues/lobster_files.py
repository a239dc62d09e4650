# Hot path: free @njit functions; reading the files, at the end, is for the cold path.
"""LOBSTER's two files, read row by row: events, the book after each, and what it changed.

Format: "Output Structure", lobsterdata.com (LOBSTER | academic data). A message file
``TICKER_YYYY-MM-DD_start_end_message_LEVEL.csv`` has one event a line: seconds after midnight,
type, order id, size, price in 1/10000 dollar, direction of the resting order. The orderbook file
beside it has the book after each event: ask price, ask size, bid price, bid size, level by level;
levels that do not exist have price ±9999999999 and size 0.

The files know LEVEL levels a side. A level pushed out at the bottom is gone, and one that moves up
into view is taken from the orderbook row, for no message tells it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import numpy as np
from numba import njit

from feeds.errors import InputError
from feeds.inner import inner
from feeds.venues.lobster_names import Files
from feeds.venues.recording import Block, Recording

NO_PRICE: Final = 9_999_999_999
_DAY_S: Final = 86_400

NEW: Final = 1
CANCEL: Final = 2
DELETE: Final = 3
EXECUTION: Final = 4
HIDDEN_EXECUTION: Final = 5
CROSS: Final = 6
HALT: Final = 7

# Columns of an event, int64.
E_TIME_NS: Final = 0  # since midnight
E_TYPE: Final = 1
E_ORDER: Final = 2
E_SIZE: Final = 3
E_PRICE: Final = 4
E_DIRECTION: Final = 5
E_FIELDS: Final = 6

BID: Final = 0
ASK: Final = 1


class Step(NamedTuple):
    """One event: the line it stands on, its fields, its orderbook row, and what it changed.

    ``changes[:n]`` are (side, price in LOBSTER units, new total in shares), the last of them
    marked in ``revealed`` where it only moved into view.
    """

    line: int
    event: np.ndarray
    row: np.ndarray
    changes: np.ndarray
    n: int
    revealed: bool
    place: Callable[[], str]


@inner("UniTuple(int64, 2)(uint8[::1], int64)")
def scan_signed(buf, at):  # type: ignore[no-untyped-def]
    """Integer at ``at``, perhaps negative; (value, offset after it), offset -1 where none is."""
    sign = 1
    if buf[at] == 45:
        sign = -1
        at += 1
    first = at
    value = 0
    c = buf[at]
    while 48 <= c <= 57:
        value = value * 10 + (c - 48)
        at += 1
        c = buf[at]
    if at == first or at - first > 18:
        return 0, -1
    return sign * value, at


@njit("int64(uint8[::1], int64, int64[::1])", cache=True)
def scan_event(buf, at, event):  # type: ignore[no-untyped-def]
    """A line of a message file into ``event``; returns the offset after it, or -1.

    Later LOBSTER files have a seventh column (the market participant), which is passed over.
    """
    seconds, at = scan_signed(buf, at)
    if at < 0 or seconds < 0 or seconds >= 2 * _DAY_S:
        return -1
    fraction = 0
    places = 0
    if buf[at] == 46:
        at += 1
        while 48 <= buf[at] <= 57:
            if places >= 9:
                if buf[at] != 48:
                    return -1
            else:
                fraction = fraction * 10 + (buf[at] - 48)
                places += 1
            at += 1
    while places < 9:
        fraction *= 10
        places += 1
    event[E_TIME_NS] = seconds * 1_000_000_000 + fraction
    for i in range(E_TYPE, E_FIELDS):
        if buf[at] != 44:
            return -1
        value, at = scan_signed(buf, at + 1)
        if at < 0:
            return -1
        event[i] = value
    if buf[at] == 44:
        while buf[at] != 10:
            at += 1
    if buf[at] == 13:
        at += 1
    return at + 1 if buf[at] == 10 else -1


@njit("int64(uint8[::1], int64, int64[::1])", cache=True)
def scan_row(buf, at, row):  # type: ignore[no-untyped-def]
    """A line of an orderbook file into ``row``; returns the offset after it, or -1."""
    for i in range(len(row)):
        if i > 0:
            if buf[at] != 44:
                return -1
            at += 1
        value, at = scan_signed(buf, at)
        if at < 0:
            return -1
        row[i] = value
    if buf[at] == 13:
        at += 1
    return at + 1 if buf[at] == 10 else -1


@njit("void(int64[::1], int64[:,:,::1], int64[::1])", cache=True)
def read_row(row, book, depth):  # type: ignore[no-untyped-def]
    """An orderbook row into a book, int64 of shape (2 sides, 2 fields, levels), best first."""
    depth[:] = 0
    for i in range(0, len(row), 4):
        for side in range(2):
            price, size = row[i + 2 - 2 * side], row[i + 3 - 2 * side]
            if price != NO_PRICE and price != -NO_PRICE and size > 0:
                book[side, 0, depth[side]] = price
                book[side, 1, depth[side]] = size
                depth[side] += 1


@njit(
    "UniTuple(int64, 2)(int64[::1], int64[::1], int64[:,:,::1], int64[::1], int64[:,::1])",
    cache=True,
)
def apply_event(event, row, book, depth, changes):  # type: ignore[no-untyped-def]
    """Apply one event to the visible book.

    Parameters
    ----------
    event : ndarray of int64, shape (E_FIELDS,)
    row : ndarray of int64, shape (4 * levels,)
        The orderbook row after the event; only its bottom level is looked at, and only where the
        event removed a level from a full side.
    book, depth : ndarray of int64
        As `read_row` fills them, updated.
    changes : ndarray of int64, shape (3, 3)
        Overwritten with (side, price, new total).

    Returns
    -------
    (n, revealed) : int
        Changes made; 1 where the last one is a level that moved into view.
    """
    kind = event[E_TYPE]
    if kind < NEW or kind > EXECUTION:
        return 0, 0
    side = BID if event[E_DIRECTION] > 0 else ASK
    sign = 1 if side == BID else -1
    price = event[E_PRICE]
    capacity = len(row) // 4
    n = depth[side]
    at = 0
    while at < n and sign * book[side, 0, at] > sign * price:
        at += 1
    found = at < n and book[side, 0, at] == price
    changes[0, 0] = side
    changes[0, 1] = price
    if kind == NEW:
        if found:
            book[side, 1, at] += event[E_SIZE]
            changes[0, 2] = book[side, 1, at]
            return 1, 0
        if at == capacity:
            return 0, 0  # below the visible book
        changes[0, 2] = event[E_SIZE]
        count = 1
        last = n
        if n == capacity:
            changes[1, 0] = side
            changes[1, 1] = book[side, 0, n - 1]
            changes[1, 2] = 0
            count = 2
            last = n - 1
        else:
            depth[side] = n + 1
        for i in range(last, at, -1):
            book[side, 0, i] = book[side, 0, i - 1]
            book[side, 1, i] = book[side, 1, i - 1]
        book[side, 0, at] = price
        book[side, 1, at] = event[E_SIZE]
        return count, 0
    if not found:
        return 0, 0
    left = book[side, 1, at] - event[E_SIZE]
    if left > 0:
        book[side, 1, at] = left
        changes[0, 2] = left
        return 1, 0
    changes[0, 2] = 0
    for i in range(at, n - 1):
        book[side, 0, i] = book[side, 0, i + 1]
        book[side, 1, i] = book[side, 1, i + 1]
    depth[side] = n - 1
    if n < capacity:
        return 1, 0
    bottom = 4 * (capacity - 1) + (2 if side == BID else 0)
    price, size = row[bottom], row[bottom + 1]
    if price == NO_PRICE or price == -NO_PRICE or size <= 0:
        return 1, 0
    # A row that puts a known level at the bottom disagrees with the messages; it tells nothing new.
    if n > 1 and sign * price >= sign * book[side, 0, n - 2]:
        return 1, 0
    book[side, 0, n - 1] = price
    book[side, 1, n - 1] = size
    depth[side] = n
    changes[1, 0] = side
    changes[1, 1] = price
    changes[1, 2] = size
    return 2, 1


class _Lines:
    """One line at a time of a recording, scanned into an array."""

    def __init__(
        self, recording: Recording, scan: Callable[..., int], array: np.ndarray, expected: str
    ) -> None:
        self.recording, self.array = recording, array
        self.line = 0
        self._scan, self._expected = scan, expected
        self._blocks = recording.blocks()
        self._block: Block | None = None
        self._position = 0
        self._start = 0

    def next(self) -> bool:
        """Scan the next line; False at the end."""
        while self._block is None or self._position >= self._block.stop:
            self._block = next(self._blocks, None)
            self._position = 0
            if self._block is None:
                return False
        self._start = self._position
        after = self._scan(self._block.buf, self._position, self.array)
        if after < 0:
            start = self._block.buf[self._position : self._position + 80].tobytes()
            raise InputError(
                "damaged line",
                where=self.place(),
                expected=self._expected,
                found=repr(start.split(b"\n", 1)[0].decode("ascii", "replace")),
            )
        self._position = after
        self.line += 1
        return True

    def place(self) -> str:
        """File, line and offset of the line just scanned."""
        if self._block is None:
            return f"{self.recording.path} after line {self.line}"
        return self.recording.where(self._block, self._start)


def steps(files: Files, message: Recording, orderbook: Recording) -> Iterator[Step]:
    """Walk both files row by row; the first step is the starting book, without changes.

    The arrays of a step are valid until the next one.

    Raises
    ------
    InputError
        At a damaged line, at an event that cannot be, or where one file is longer.
    """
    event = np.zeros(E_FIELDS, dtype=np.int64)
    row = np.zeros(4 * files.levels, dtype=np.int64)
    changes = np.zeros((3, 3), dtype=np.int64)
    book = np.zeros((2, 2, files.levels), dtype=np.int64)
    depth = np.zeros(2, dtype=np.int64)
    events = _Lines(message, scan_event, event, "time,type,order id,size,price,direction")
    rows = _Lines(orderbook, scan_row, row, f"{4 * files.levels} integers")
    while events.next():
        if not rows.next():
            raise InputError(
                "orderbook file shorter than its message file",
                where=f"{files.orderbook} after line {rows.line}",
                expected="one row an event",
            )
        _check_event(event, events)
        n, revealed = 0, 0
        if events.line == 1:
            read_row(row, book, depth)
        else:
            n, revealed = apply_event(event, row, book, depth, changes)
        yield Step(events.line, event, row, changes, n, revealed == 1, events.place)
    if rows.next():
        raise InputError(
            "message file shorter than its orderbook file",
            where=f"{files.message} after line {events.line}",
            expected="one event a row",
        )


def _check_event(event: np.ndarray, events: _Lines) -> None:
    kind = event[E_TYPE]
    if not NEW <= kind <= HALT:
        raise InputError(
            "unknown event type", where=events.place(), expected="1 to 7", found=str(kind)
        )
    if kind == HALT:
        return
    if event[E_PRICE] <= 0:
        raise InputError(
            "a price that is not positive", where=events.place(), found=str(event[E_PRICE])
        )
    if event[E_SIZE] < 0:
        raise InputError("a negative size", where=events.place(), found=str(event[E_SIZE]))
    if kind <= HIDDEN_EXECUTION and event[E_DIRECTION] not in (-1, 1):
        raise InputError(
            "unknown direction",
            where=events.place(),
            expected="1 or -1",
            found=str(event[E_DIRECTION]),
        )
