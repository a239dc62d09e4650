"""When the messages of a benchmark should leave: evenly, in ticks, or as they once came."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from feeds import tape
from feeds.errors import InputError
from feeds.monotonic import SECOND_NS
from feeds.tape_reader import TapeReader

TICK_NS: Final = 1_000_000


def evenly(rate: float, seconds: float) -> np.ndarray:
    """``rate`` messages a second, ns from now."""
    return (np.arange(round(rate * seconds)) * (SECOND_NS / rate)).astype(np.int64)


def in_ticks(rate: float, seconds: float) -> np.ndarray:
    """``rate`` messages a second, ns from now: those of each `TICK_NS` together."""
    return evenly(rate, seconds) // TICK_NS * TICK_NS


def as_recorded(arrivals: np.ndarray, seconds: float) -> np.ndarray:
    """The busiest stretch of ``arrivals``, ns from its first."""
    ends = np.searchsorted(arrivals, arrivals + round(seconds * SECOND_NS))
    first = int(np.argmax(ends - np.arange(len(arrivals))))
    busiest: np.ndarray = arrivals[first : ends[first]] - arrivals[first]
    return busiest


def arrivals_of(source: Path) -> np.ndarray:
    """Receive times of a tape's market messages, ns from the first.

    Raises
    ------
    InputError
        If it is a tape of several instruments.
    """
    reader = TapeReader(source)
    if len(reader.meta.instruments) != 1:
        raise InputError(
            "a tape of several instruments",
            where=str(source),
            expected="one of one instrument, so that every message answers for itself",
            found=str(len(reader.meta.instruments)),
        )
    times = [record.recv_ns for record in reader.records() if record.kind == tape.MARKET]
    found = np.array(times, dtype=np.int64)
    return found - found[0]
