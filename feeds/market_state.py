# Hot path: free @njit functions.
"""State of the simulated market, its random draws and the messages it writes.

Random numbers are xorshift64* (Vigna, "An experimental exploration of Marsaglia's xorshift
generators, scrambled", ACM TOMS 42, 2016), one stream an instrument. Event times are a Hawkes
process with an exponential kernel (Bacry, Mastromatteo and Muzy, "Hawkes processes in finance",
2015), drawn by thinning (Ogata, IEEE Trans. Inf. Theory 27, 1981). Logarithm and exponential are
our own, of + - * / alone, so that every machine draws the same.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit

from feeds.inner import inner
from feeds.rawbytes import store_i64, store_u8, store_u16
from feeds.tape import MARKET, RECORD_HEADER_BYTES, put_record
from feeds.wire import (
    AGGRESSOR_BUY,
    AGGRESSOR_SELL,
    AT_AGGRESSOR,
    AT_TRADE_ID,
    DELTA,
    GROUP_HEADER_BYTES,
    LEVEL_BYTES,
    PREFIX_BYTES,
    SNAPSHOT,
    TRADE,
    TRADE_BLOCK,
    put_prefix,
)

# Quantities by price: int64[instrument, side, price & RING_MASK].
RING: Final = 1024
RING_MASK: Final = RING - 1
MAX_LEVELS: Final = 240
PROTECTED_LEVELS: Final = 12  # nearer than this to the best price no level is ever empty
SPREAD_LIMIT_TICKS: Final = 3
EVENT_BYTES: Final = 512  # no event takes more room on a tape
SOURCE_DELAY_NS: Final = 25_000  # from the matching engine to the feed handler
MAX_THINNING: Final = 1_000

# Integer state of one instrument.
BEST_BID: Final = 0
BEST_ASK: Final = 1
SEQ: Final = 2
NEXT_NS: Final = 3
HIDDEN: Final = 4
TRADE_ID: Final = 5
EPOCH: Final = 6
EVENTS: Final = 7
INTEGERS: Final = 8

# Float state of one instrument.
EXCITATION: Final = 0
TRADE_EXCITATION: Final = 1
POSTERIOR: Final = 2  # and 3, 4: P(s = -1, 0, +1 | all messages so far)
FLOATS: Final = 5

# Parameters of the market.
BASE_RATE: Final = 0  # events a second without excitation
JUMP: Final = 1  # added to the intensity by each event
DECAY: Final = 2  # of the excitation, a second
SWITCH: Final = 3  # probability an event that s changes
TILT: Final = 4
DRIFT: Final = 5
PARAMETERS: Final = 6

_ONE_BELOW: Final = 1.0 / 9_007_199_254_740_992.0
_LN2: Final = 0.693147180559945309417
_MULTIPLIER: Final = np.uint64(0x2545F4914F6CDD1D)
_S12: Final = np.uint64(12)
_S25: Final = np.uint64(25)
_S27: Final = np.uint64(27)
_S11: Final = np.uint64(11)


@njit("float64(uint64[::1], int64)", cache=True)
def uniform(rng, i):  # type: ignore[no-untyped-def]
    """The next number of stream ``i`` in [0, 1): the upper 53 bits of xorshift64*."""
    x = rng[i]
    x ^= x >> _S12
    x ^= x << _S25
    x ^= x >> _S27
    rng[i] = x
    return np.float64(np.int64((x * _MULTIPLIER) >> _S11)) * _ONE_BELOW


@inner("float64(float64)")
def negative_log(u):  # type: ignore[no-untyped-def]
    """-ln(u) for u in (0, 1], within 1e-12: halving, then the series of artanh."""
    exponent = 0.0
    while u < 0.75:
        u *= 2.0
        exponent += 1.0
    z = (u - 1.0) / (u + 1.0)
    z2 = z * z
    series = 1.0 / 19.0
    for k in range(17, 0, -2):
        series = series * z2 + 1.0 / k
    return exponent * _LN2 - 2.0 * z * series


@inner("float64(float64)")
def negative_exp(x):  # type: ignore[no-untyped-def]
    """exp(-x) for x >= 0, within 1e-12: Taylor on [0, ln 2), then halving."""
    if x > 40.0:
        return 0.0
    halvings = int(x / _LN2)
    r = x - halvings * _LN2
    total = 1.0
    for k in range(13, 0, -1):
        total = 1.0 - total * r / k
    for _ in range(halvings):
        total *= 0.5
    return total


@njit("void(int64, int64[:, ::1], float64[:, ::1], uint64[::1], float64[::1])", cache=True)
def draw_next_time(i, ints, floats, rng, parameters):  # type: ignore[no-untyped-def]
    """Move instrument ``i`` to its next event time: Ogata's thinning of a Hawkes process."""
    base = parameters[BASE_RATE]
    decay = parameters[DECAY]
    excitation = floats[i, EXCITATION]
    elapsed = 0.0
    for _ in range(MAX_THINNING):
        bound = base + excitation
        wait = negative_log(1.0 - uniform(rng, i)) / bound
        elapsed += wait
        excitation *= negative_exp(decay * wait)
        if uniform(rng, i) * bound <= base + excitation:
            break
    floats[i, EXCITATION] = excitation + parameters[JUMP]
    ints[i, NEXT_NS] += 1 + np.int64(elapsed * 1e9)


@njit("int64(float64, int64)", cache=True)
def share_of(u, room):  # type: ignore[no-untyped-def]
    """A whole number from 1 to 1 + 0.8 room, uniform in ``u``."""
    return 1 + np.int64(u * (max(room, 0) * 0.8))


@njit("int64(uint8[::1], int64, int64, int64[:, ::1], int64)", cache=True)
def put_trade(buf, at, i, ints, buy):  # type: ignore[no-untyped-def]
    """Write prefix, id and aggressor of a Trade record; returns where its payload starts."""
    body = at + RECORD_HEADER_BYTES
    ints[i, SEQ] += 1
    ints[i, TRADE_ID] += 1
    now_ns = ints[i, NEXT_NS]
    put_prefix(
        buf,
        body,
        TRADE,
        TRADE_BLOCK,
        1,
        i,
        ints[i, EPOCH],
        ints[i, SEQ],
        now_ns,
        now_ns + SOURCE_DELAY_NS,
        0,
    )
    store_i64(buf, body + AT_TRADE_ID, ints[i, TRADE_ID])
    store_i64(buf, body + AT_AGGRESSOR, 0)
    store_u8(buf, body + AT_AGGRESSOR, AGGRESSOR_BUY if buy else AGGRESSOR_SELL)
    return body


@njit("int64(uint8[::1], int64, int64, int64[:, ::1], int64, int64, int64[::1])", cache=True)
def put_delta(buf, at, i, ints, side, count, changes):  # type: ignore[no-untyped-def]
    """Write a Delta record of ``count`` (price, quantity) pairs on one side; returns its end."""
    body = at + RECORD_HEADER_BYTES
    ints[i, SEQ] += 1
    now_ns = ints[i, NEXT_NS]
    to = put_prefix(
        buf,
        body,
        DELTA,
        PREFIX_BYTES,
        1,
        i,
        ints[i, EPOCH],
        ints[i, SEQ],
        now_ns,
        now_ns + SOURCE_DELAY_NS,
        0,
    )
    for group in range(2):
        entries = count if group == side else 0
        store_u16(buf, to, LEVEL_BYTES)
        store_u16(buf, to + 2, entries)
        to += GROUP_HEADER_BYTES
        for k in range(entries):
            store_i64(buf, to, changes[2 * k])
            store_i64(buf, to + 8, changes[2 * k + 1])
            to += LEVEL_BYTES
    return put_record(buf, at, MARKET, now_ns + SOURCE_DELAY_NS, to - body)


@njit(
    "int64(uint8[::1], int64, int64, int64, int64[:, ::1], int64[:, :, ::1], int64, int64)",
    cache=True,
)
def put_snapshot(buf, at, i, seq, ints, book, levels, now_ns):  # type: ignore[no-untyped-def]
    """Write a Snapshot message (no record header) of instrument ``i``; returns its end."""
    to = put_prefix(
        buf,
        at,
        SNAPSHOT,
        PREFIX_BYTES,
        1,
        i,
        ints[i, EPOCH],
        seq,
        now_ns,
        now_ns + SOURCE_DELAY_NS,
        0,
    )
    for side in range(2):
        outward = 2 * side - 1
        best = ints[i, BEST_BID + side]
        group = to
        to += GROUP_HEADER_BYTES
        count = 0
        for k in range(levels):
            price = best + outward * k
            quantity = book[i, side, price & RING_MASK]
            if quantity > 0:
                store_i64(buf, to, price)
                store_i64(buf, to + 8, quantity)
                to += LEVEL_BYTES
                count += 1
        store_u16(buf, group, LEVEL_BYTES)
        store_u16(buf, group + 2, count)
    return to
