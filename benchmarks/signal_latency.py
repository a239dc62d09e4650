# Hot path: the free @njit function `collect`; the rest sorts what it found.
"""Latencies of the signals on a tape, in windows of wall time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numba import njit

from engine.signals import AT_EXCHANGE_TIME, AT_RECEIVED
from feeds.rawbytes import load_i64, load_u16, load_u32
from feeds.tape import RECORD_HEADER_BYTES, SIGNAL, padded
from feeds.tape_reader import TapeReader

QUANTILES: Final = (50.0, 99.9, 100.0)
COLUMNS: Final = 3


class Latencies(NamedTuple):
    """Of one window: how many signals, quantiles in microseconds, the last one's exchange time.

    The time, in ns since the UNIX epoch, is 0 where there is none.
    """

    signals: int
    p50_us: float
    p999_us: float
    max_us: float
    exchange_ns: int


@njit("int64(uint8[::1], int64, int64, int64[:,::1])", cache=True)
def collect(buf, at, stop, rows):  # type: ignore[no-untyped-def]
    """When each signal of ``buf[at:stop]`` was sent, how long after its message had come, and when
    that had left the exchange.

    Parameters
    ----------
    buf : ndarray of uint8
        Whole records, their checksums checked.
    rows : ndarray of int64, shape (n, 3)
        Filled with ns since the UNIX epoch, ns, and ns since the UNIX epoch.

    Returns
    -------
    int
        Rows filled.
    """
    count = 0
    while at < stop:
        body = at + RECORD_HEADER_BYTES
        if load_u16(buf, at + 16) == SIGNAL:
            sent_ns = load_i64(buf, at + 8)
            rows[count, 0] = sent_ns
            rows[count, 1] = sent_ns - load_i64(buf, body + AT_RECEIVED)
            rows[count, 2] = load_i64(buf, body + AT_EXCHANGE_TIME)
            count += 1
        at = body + padded(load_u32(buf, at + 4))
    return count


def signal_rows(tape: Path) -> np.ndarray:
    """What `collect` finds on a whole tape: int64 of shape (signals, COLUMNS)."""
    parts = [np.zeros((0, COLUMNS), dtype=np.int64)]
    for buf, start, stop, _ in TapeReader(tape).chunks():
        rows = np.zeros(((stop - start) // RECORD_HEADER_BYTES, COLUMNS), dtype=np.int64)
        parts.append(rows[: collect(buf, start, stop, rows)].copy())
    return np.concatenate(parts)


def latency_windows(
    tape: Path, edges_ns: Sequence[int], progress: Callable[[float], Any] = lambda share: None
) -> list[Latencies]:
    """Latencies between each two of ``edges_ns``.

    Parameters
    ----------
    tape : Path
        Of an engine; a signal's receive time on it is when it was sent.
    edges_ns : sequence of int
        Ascending, ns since the UNIX epoch.
    progress : callable
        Takes the share that is read.
    """
    parts: list[np.ndarray] = []  # of the window that is being filled
    found: list[Latencies] = []
    rows = np.zeros((0, COLUMNS), dtype=np.int64)
    size = max(tape.stat().st_size, 1)
    for buf, start, stop, offset in TapeReader(tape).chunks():
        progress(offset / size)
        most = (stop - start) // RECORD_HEADER_BYTES
        if len(rows) < most:
            rows = np.zeros((most, COLUMNS), dtype=np.int64)
        left = rows[: collect(buf, start, stop, rows)]
        if not found and not parts:
            left = left[np.searchsorted(left[:, 0], edges_ns[0]) :]
        while len(found) < len(edges_ns) - 1:
            inside = int(np.searchsorted(left[:, 0], edges_ns[len(found) + 1]))
            parts.append(left[:inside].copy())
            left = left[inside:]
            if not len(left):
                break
            found.append(_latencies(parts))
            parts = []
    while len(found) < len(edges_ns) - 1:
        found.append(_latencies(parts))
        parts = []
    return found


def _latencies(parts: list[np.ndarray]) -> Latencies:
    if not sum(len(part) for part in parts):
        return Latencies(0, 0.0, 0.0, 0.0, 0)
    whole = np.concatenate(parts)
    p50, p999, longest = np.percentile(whole[:, 1] / 1e3, QUANTILES).round(2).tolist()
    return Latencies(len(whole), p50, p999, longest, int(whole[-1, 2]))
