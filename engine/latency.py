# Hot path: free @njit functions.
"""A latency histogram of fixed size: recording is a shift, a mask and an increment.

Buckets grow with the value so that every bucket is at most 1/128 of the values in it, as in
HdrHistogram; values up to 256 ns have a bucket of their own each. The largest bucket
takes everything from 2**40 ns (18 minutes) on; the true minimum, maximum, sum and count are kept
beside the buckets, so no value is ever lost to the range.

Source: G. Tene, HdrHistogram (hdrhistogram.org), the log-linear bucket index.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit

from feeds.inner import inner

SUB_BITS: Final = 7
SUB_BUCKETS: Final = 1 << SUB_BITS  # buckets a power of two
MAX_EXPONENT: Final = 40
OVERFLOW_NS: Final = 1 << MAX_EXPONENT
BUCKETS: Final = (MAX_EXPONENT - SUB_BITS + 1) * SUB_BUCKETS + 1
RELATIVE_ERROR: Final = 1.0 / SUB_BUCKETS  # of any quantile, against a bucket's lowest value

# After the buckets in the same array.
AT_COUNT: Final = BUCKETS
AT_SUM: Final = BUCKETS + 1
AT_MIN: Final = BUCKETS + 2
AT_MAX: Final = BUCKETS + 3
AT_NEGATIVE: Final = BUCKETS + 4  # clock ran backwards between the two stamps; counted as 0
LENGTH: Final = BUCKETS + 5


def new_counts() -> np.ndarray:
    """An empty histogram, int64 of shape (`LENGTH`,)."""
    counts = np.zeros(LENGTH, dtype=np.int64)
    clear(counts)
    return counts


@inner("int64(int64)")
def bucket_of(value_ns):  # type: ignore[no-untyped-def]
    """Index of the bucket a value of 0 or more falls into."""
    if value_ns < 2 * SUB_BUCKETS:
        return value_ns
    if value_ns >= OVERFLOW_NS:
        return BUCKETS - 1
    shift = 0
    for step in (32, 16, 8, 4, 2, 1):
        if value_ns >> (shift + step) >= SUB_BUCKETS:
            shift += step
    return shift * SUB_BUCKETS + (value_ns >> shift)


@inner("int64(int64)")
def bucket_low(index):  # type: ignore[no-untyped-def]
    """Lowest value in nanoseconds of a bucket; the inverse of `bucket_of`."""
    if index < 2 * SUB_BUCKETS:
        return index
    shift = index // SUB_BUCKETS - 1
    return (index - shift * SUB_BUCKETS) << shift


@njit("void(int64[::1], int64)", cache=True)
def record(counts, value_ns):  # type: ignore[no-untyped-def]
    """Add one value in nanoseconds; a negative one is counted as 0 and under `AT_NEGATIVE`."""
    if value_ns < 0:
        counts[AT_NEGATIVE] += 1
        value_ns = 0
    counts[bucket_of(value_ns)] += 1
    counts[AT_COUNT] += 1
    counts[AT_SUM] += value_ns
    if value_ns < counts[AT_MIN]:
        counts[AT_MIN] = value_ns
    if value_ns > counts[AT_MAX]:
        counts[AT_MAX] = value_ns


@njit("int64(int64[::1], float64)", cache=True)
def quantile(counts, q):  # type: ignore[no-untyped-def]
    """The value in nanoseconds that a share ``q`` of all values does not exceed.

    Nearest rank: the middle of the bucket that holds the ``ceil(q * count)``-th smallest value,
    never outside the recorded minimum and maximum; 0 for an empty histogram. Within
    `RELATIVE_ERROR` of that value.
    """
    total = counts[AT_COUNT]
    if total == 0:
        return 0
    exact = q * total
    rank = np.int64(exact)
    if rank < exact:
        rank += 1
    if rank <= 1:
        return counts[AT_MIN]
    if rank >= total:
        return counts[AT_MAX]
    seen = 0
    for index in range(BUCKETS - 1):
        seen += counts[index]
        if seen >= rank:
            low = bucket_low(index)
            middle = low + (bucket_low(index + 1) - low) // 2
            return min(max(middle, counts[AT_MIN]), counts[AT_MAX])
    return counts[AT_MAX]


@njit("void(int64[::1], int64[::1])", cache=True)
def merge(counts, other):  # type: ignore[no-untyped-def]
    """Add another histogram's values to this one."""
    for index in range(BUCKETS):
        counts[index] += other[index]
    counts[AT_COUNT] += other[AT_COUNT]
    counts[AT_SUM] += other[AT_SUM]
    counts[AT_NEGATIVE] += other[AT_NEGATIVE]
    counts[AT_MIN] = min(counts[AT_MIN], other[AT_MIN])
    counts[AT_MAX] = max(counts[AT_MAX], other[AT_MAX])


@njit("void(int64[::1])", cache=True)
def clear(counts):  # type: ignore[no-untyped-def]
    """Forget everything recorded."""
    counts[:] = 0
    counts[AT_MIN] = np.iinfo(np.int64).max


def summary(counts: np.ndarray) -> dict[str, int]:
    """Count, p50, p99, p99.9, maximum and mean in nanoseconds; all 0 when nothing is recorded."""
    total = int(counts[AT_COUNT])
    return {
        "count": total,
        "p50_ns": int(quantile(counts, 0.5)),
        "p99_ns": int(quantile(counts, 0.99)),
        "p999_ns": int(quantile(counts, 0.999)),
        "max_ns": int(counts[AT_MAX]),
        "mean_ns": int(counts[AT_SUM]) // total if total else 0,
    }
