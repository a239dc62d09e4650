# Hot path: free @njit functions.
"""The few shapes of JSON that exchanges write, read from a byte array.

Each function starts at an offset and gives the offset behind what it read. None looks at a length:
the caller's array must hold a byte that no value contains, such as a newline, before its end.
Anything but the plainest form (no escapes, no exponent, no sign) is refused, not guessed.
"""

from __future__ import annotations

from typing import Final

from numba import njit

from feeds.inner import inner

MAX_DECIMALS: Final = 12
_MAX_DIGITS: Final = 18
_HASH_FACTOR: Final = 1_099_511_628_211


def text_hash(text: str) -> int:
    """A key as one integer, as `scan_text` makes it: a polynomial modulo 2^64."""
    value = 0
    for byte in text.encode():
        value = (value * _HASH_FACTOR + byte) % 2**64
    return value - 2**64 if value >= 2**63 else value


@inner("UniTuple(int64, 2)(uint8[::1], int64)")
def scan_integer(buf, at):  # type: ignore[no-untyped-def]
    """Unsigned JSON integer at ``at``; (value or -1, offset after it)."""
    first = at
    value = 0
    c = buf[at]
    while 48 <= c <= 57:
        value = value * 10 + (c - 48)
        at += 1
        c = buf[at]
    length = at - first
    if length == 0 or length > 19 or value < 0 or (length > 1 and buf[first] == 48):
        return -1, at
    return value, at


@inner("UniTuple(int64, 3)(uint8[::1], int64, int64)")
def scan_decimal(buf, at, decimals):  # type: ignore[no-untyped-def]
    """Quoted plain decimal at ``at``, in units of 10^-decimals.

    Returns
    -------
    value : int
        -1 where this is no plain decimal or has too many digits.
    next : int
        Offset after the closing quote.
    needs : int
        0, or the decimal places it would take to hold the number.
    """
    if buf[at] != 34:
        return -1, at, 0
    at += 1
    first = at
    value = 0
    c = buf[at]
    while 48 <= c <= 57:
        value = value * 10 + (c - 48)
        at += 1
        c = buf[at]
    whole = at - first
    if whole == 0 or whole + decimals > _MAX_DIGITS:
        return -1, at, 0
    places = 0
    needs = 0
    if c == 46:
        at += 1
        c = buf[at]
        while 48 <= c <= 57:
            places += 1
            if places <= decimals:
                value = value * 10 + (c - 48)
            elif c != 48:
                needs = places
            at += 1
            c = buf[at]
        if places == 0 or needs > MAX_DECIMALS:
            return -1, at, 0
    while places < decimals:
        value *= 10
        places += 1
    if c != 34:
        return -1, at, 0
    return value, at + 1, needs


@inner("UniTuple(int64, 3)(uint8[::1], int64)")
def scan_text(buf, at):  # type: ignore[no-untyped-def]
    """Quoted ASCII text without escapes; (hash, length or -1, offset after it)."""
    if buf[at] != 34:
        return 0, -1, at
    at += 1
    first = at
    packed = 0
    c = buf[at]
    while c != 34:
        if c < 32 or c > 126 or c == 92:
            return 0, -1, at
        packed = packed * _HASH_FACTOR + c
        at += 1
        c = buf[at]
    return packed, at - first, at + 1


@inner("int64(uint8[::1], int64, int64, uint8[::1])")
def same_text(buf, at, length, text):  # type: ignore[no-untyped-def]
    """1 if ``buf[at:at + length]`` is ``text``."""
    if length != len(text):
        return 0
    for i in range(length):
        if buf[at + i] != text[i]:
            return 0
    return 1


@njit("int64(uint8[::1], int64)", cache=True)
def line_end(buf, at):  # type: ignore[no-untyped-def]
    """Offset of the newline at or behind ``at``."""
    while buf[at] != 10:
        at += 1
    return at
