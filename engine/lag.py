# Hot path: free @njit functions.
"""How far behind the market the engine is.

Two bounds from above are known of how long a message waited, and the smaller one is taken:

- it came after the last time that no message waited, so it waited no longer than since then;
- its age by its source's clock, less the least age that any message had lately. The least age is
  what clocks that differ and the way here cost a message that waits for nothing. This holds only
  while that clock runs no faster than ours: a tape published at ten times its speed grows younger
  all the time.

The second is the closer one where the engine is busy for long but not behind.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from feeds import wire
from feeds.inner import inner
from feeds.rawbytes import load_i64

# Columns of a lag, int64, ns.
EMPTY: Final = 0  # monotonic time at which no message waited
LEAST_AGE: Final = 1
LEAST_AT: Final = 2  # monotonic time at which it was taken over
AGE: Final = 3  # of the last message
LAG: Final = 4  # of the last message
LONGEST: Final = 5  # since somebody looked
SINCE: Final = 6  # monotonic time from which on the source's clock is watched
SINCE_SOURCE: Final = 7  # what that clock said then
STEADY: Final = 8  # 1 = it runs no faster than ours
LAG_FIELDS: Final = 9

RENEW_NS: Final = 1_000_000_000  # clocks drift: the least age is taken anew so often
FASTER_SHIFT: Final = 2  # a clock that gains more than a quarter is no clock to go by
_UNKNOWN: Final = np.iinfo(np.int64).max


def new_lag(now_ns: int) -> np.ndarray:
    """Nothing received yet: int64 of shape (LAG_FIELDS,)."""
    lag = np.zeros(LAG_FIELDS, dtype=np.int64)
    lag[EMPTY] = now_ns
    lag[LEAST_AGE] = _UNKNOWN
    return lag


@inner("void(int64[::1], int64)")
def emptied(lag, now_ns):  # type: ignore[no-untyped-def]
    """No message waits at monotonic time ``now_ns``."""
    lag[EMPTY] = now_ns
    lag[LAG] = 0
    if now_ns - lag[LEAST_AT] > RENEW_NS and lag[LEAST_AGE] != _UNKNOWN:
        lag[LEAST_AGE] = lag[AGE]
        lag[LEAST_AT] = now_ns


@inner("void(int64[::1], uint8[::1], int64, int64, int64, int64)")
def received(lag, buf, start, length, now_ns, offset_ns):  # type: ignore[no-untyped-def]
    """A message at ``buf[start]`` was received at monotonic time ``now_ns``."""
    waited = now_ns - lag[EMPTY]
    if length >= wire.HEADER_BYTES + wire.PREFIX_BYTES:
        source_ns = load_i64(buf, start + wire.AT_SOURCE_TIME)
        watched = now_ns - lag[SINCE]
        if watched > RENEW_NS:
            gained = source_ns - lag[SINCE_SOURCE] - watched
            lag[STEADY] = 1 if gained <= watched >> FASTER_SHIFT else 0
            lag[SINCE] = now_ns
            lag[SINCE_SOURCE] = source_ns
        age = now_ns + offset_ns - source_ns
        lag[AGE] = age
        if age < lag[LEAST_AGE]:
            lag[LEAST_AGE] = age
            lag[LEAST_AT] = now_ns
        if lag[STEADY] == 1:
            waited = min(waited, age - lag[LEAST_AGE])
    lag[LAG] = waited
    lag[LONGEST] = max(lag[LONGEST], waited)
