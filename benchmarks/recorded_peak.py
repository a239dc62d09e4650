"""The busiest moments of the recording: what "the recorded peak" means in a benchmark."""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from benchmarks.provenance import RECORDING, VENUE, recorded
from feeds import tape
from feeds.tape_reader import TapeReader
from feeds.venues.convert import convert

SECOND_NS: Final = 1_000_000_000
TEN_MS_NS: Final = 10_000_000
# What `recorded_peak` found in RECORDING, for where the recording is not.
KNOWN_LINES_PER_S: Final = 2_527


class Peak(msgspec.Struct, frozen=True):
    """The busiest second and the busiest 10 ms by receive time, wherever they begin.

    Attributes
    ----------
    source : str
        The recording's file name; says so where only `KNOWN_LINES_PER_S` is known.
    lines_per_s, lines_per_10ms : int
        Websocket messages of the venue, tickers included: "the recorded peak".
    messages_per_s, messages_per_10ms : int
        What an engine gets of it: deltas and trades; 0 where the recording is not here.
    """

    source: str
    lines_per_s: int
    lines_per_10ms: int = 0
    messages_per_s: int = 0
    messages_per_10ms: int = 0


def busiest(times_ns: np.ndarray, window_ns: int) -> int:
    """Most events in any half-open interval of ``window_ns``; ``times_ns`` in any order."""
    if not len(times_ns):
        return 0
    times_ns = np.sort(times_ns)
    after = np.searchsorted(times_ns, times_ns + window_ns, side="left")
    return int((after - np.arange(len(times_ns))).max())


def recorded_peak() -> Peak:
    """The peak of the USD-M recording in ``OCTICK_DATA``, or the one known of it."""
    path = recorded(RECORDING)
    if path is None:
        return Peak(f"known of {RECORDING.name}, which is not here", KNOWN_LINES_PER_S)
    with gzip.open(path) as lines:
        line_ns = np.array([int(line.split(b" ", 1)[0]) for line in lines], dtype=np.int64)
    with tempfile.TemporaryDirectory(prefix="octick-bench-") as folder:
        out = Path(folder) / "peak.tape"
        convert(path, VENUE, out=out)
        message_ns = np.array(
            [record.recv_ns for record in TapeReader(out).records() if record.kind == tape.MARKET],
            dtype=np.int64,
        )
    return Peak(
        source=path.name,
        lines_per_s=busiest(line_ns, SECOND_NS),
        lines_per_10ms=busiest(line_ns, TEN_MS_NS),
        messages_per_s=busiest(message_ns, SECOND_NS),
        messages_per_10ms=busiest(message_ns, TEN_MS_NS),
    )
