"""The last rows of tapes that may still be growing, in memory that does not grow with them.

The tape of a running daemon has no END record yet. What stands on it is measured once, and every
pass over it ends there, so that two passes see the same records while the daemon writes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numba import njit

from engine import features
from engine.config import Config
from engine.pipeline import Pipeline
from feeds import tape
from feeds.errors import InputError
from feeds.rawbytes import load_i64, load_u32
from feeds.tape import InstrumentMeta
from feeds.tape_reader import Chunk, TapeReader
from models.calibration_set import BLOCK_ROWS, CalibrationSet, no_blocks
from models.dataset import Rows, taken_rows
from replay.merge import NEVER, TapeStream
from replay.session import choose_config, due_until

SURVEYS: Final = 3
SURVEY_BYTES: Final = 1 << 24


@njit("int64(uint8[::1], int64, int64)", cache=True)
def latest_receive_time(buf, at, stop):  # type: ignore[no-untyped-def]
    """Greatest receive time of whole records."""
    latest = np.int64(-1)
    while at < stop:
        latest = max(latest, load_i64(buf, at + 8))
        at += tape.RECORD_HEADER_BYTES + tape.padded(load_u32(buf, at + 4))
    return latest


class FrozenTapes:
    """Tapes as they stand now, that can be read from their start again and again.

    A single tape is read to its last whole record. Where several are merged and some still grow,
    all are read to the instant that ends the first of those: what comes later on the others would
    be merged with records that are not there yet.

    Parameters
    ----------
    paths : sequence of path-like

    Attributes
    ----------
    instruments : list of InstrumentMeta
    config : Config
        What was recorded; see `replay.session.choose_config`.
    file_bytes : int
    growing : bool
        Whether some tape has no END record.

    Raises
    ------
    InputError
        If a tape cannot be read or is damaged.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        assert paths, "no tape"
        self._paths = [Path(path) for path in paths]
        stream = TapeStream(self._paths, allow_truncated=True)
        self.config: Config = choose_config(stream.metas, None)
        self.file_bytes = stream.file_bytes
        named = {(i.venue, i.symbol): i for meta in stream.metas for i in meta.instruments}
        self.instruments: list[InstrumentMeta] = [named[name] for name in sorted(named)]
        self.growing = False
        self._most_bytes = self._before_ns = int(NEVER)
        for path in self._paths:
            ended, size, latest_ns = _survey(path)
            self.growing |= not ended
            if not ended and len(self._paths) == 1:
                self._most_bytes = size
            elif not ended:
                self._before_ns = min(self._before_ns, latest_ns)

    def chunks(self, tick: Callable[[int], None] | None = None) -> Iterator[Chunk]:
        """Whole records from the first on; the same in every pass.

        Parameters
        ----------
        tick : callable, optional
            Told the bytes read so far, of `file_bytes`.
        """
        left = self._most_bytes
        stream = TapeStream(self._paths, allow_truncated=True, tick=tick)
        for buf, start, stop in stream.chunks():
            end = min(stop, start + left)
            end = int(due_until(buf, start, end, self._before_ns - 1))
            if end > start:
                yield Chunk(buf, start, end, 0)
            left -= stop - start
            if end < stop or left <= 0:
                return


def _survey(path: Path) -> tuple[bool, int, int]:
    """Whether a tape has its END, the bytes of its records, and the latest receive time."""
    for attempt in range(SURVEYS):
        reader = TapeReader(path, chunk_bytes=SURVEY_BYTES)
        size, latest_ns = 0, -1
        try:
            for chunk in reader.chunks(allow_truncated=True):
                size += chunk.stop - chunk.start
                latest_ns = max(latest_ns, latest_receive_time(chunk.buf, chunk.start, chunk.stop))
        except InputError:
            # A record that was being written as it was read looks damaged; damage stays.
            if attempt == SURVEYS - 1:
                raise
            continue
        return reader.truncated_at is None, size, latest_ns
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class RecentRows:
    """The last tradable rows of tapes, in the engine's order.

    Attributes
    ----------
    rows : Rows
    ordinal : ndarray of int64, shape (n,)
        Number of each row in its unbroken stream, from 0.
    names : list of (venue, symbol)
        By slot.
    seen : int
        Tradable rows on the whole tapes.
    """

    rows: Rows
    ordinal: np.ndarray
    names: list[tuple[str, str]]
    seen: int

    def __len__(self) -> int:
        return len(self.ordinal)

    @property
    def time_range_ns(self) -> tuple[int, int]:
        """Exchange time of the earliest and the latest row; (0, 0) without rows."""
        times = self.rows.time_ns
        return (int(times.min()), int(times.max())) if len(times) else (0, 0)

    def time_of_last(self, share: float) -> int:
        """Exchange time at which the last ``share`` of the rows begins."""
        ordered = np.sort(self.rows.time_ns)
        return int(ordered[min(int(len(ordered) * (1.0 - share)), len(ordered) - 1)])

    def blocks(self, before_ns: int) -> CalibrationSet:
        """Every whole block of consecutive rows that ends before a time.

        Blocks begin at each `BLOCK_ROWS`-th row of a stream. Counted from the stream's start they
        are the same when the tape has grown, or more of it is taken.
        """
        found = [
            (slot, at)
            for slot in range(len(self.names))
            for at in self._begins(np.flatnonzero(self.rows.slot == slot), before_ns)
        ]
        if not found:
            return no_blocks()
        at = np.array([rows for _, rows in found])
        times = self.rows.time_ns[at]
        return CalibrationSet(
            vector=self.rows.vector[at],
            instrument=np.array([".".join(self.names[slot]) for slot, _ in found]),
            first_seq=self.rows.last_seq[at[:, 0]],
            first_ns=times.min(axis=1),
            last_ns=times.max(axis=1),
        )

    def _begins(self, own: np.ndarray, before_ns: int) -> Iterator[np.ndarray]:
        ordinal = self.ordinal[own]
        for k in np.flatnonzero(ordinal % BLOCK_ROWS == 0).tolist():
            rows = own[k : k + BLOCK_ROWS]
            whole = len(rows) == BLOCK_ROWS
            if whole and self.ordinal[rows[-1]] == ordinal[k] + BLOCK_ROWS - 1:
                if self.rows.time_ns[rows].max() < before_ns:
                    yield rows


def recent_rows(
    tapes: FrozenTapes, most: int, progress: Callable[[float], None] = lambda share: None
) -> RecentRows:
    """Run the engine's pipeline over tapes, as their config says, and keep the last rows.

    Parameters
    ----------
    most : int
        Rows kept.
    progress : callable
        Told the share of the tapes read.
    """
    assert most >= 1
    # Commands on the tape belong to the run that recorded it: a halted engine sees the market too.
    pipeline = Pipeline(tapes.config, None, None, follow_trust_events=False)
    vectors = np.empty((most, features.N_FEATURES))
    facts = np.empty((most, 7), dtype=np.int64)
    next_ordinal = [0] * len(pipeline.names)
    seen, size = 0, max(1, tapes.file_bytes)
    for buf, start, stop, _ in tapes.chunks(lambda done: progress(min(1.0, done / size))):
        for row in taken_rows(pipeline, buf, start, stop):
            slot, starts = row[0], row[5] or next_ordinal[row[0]] == 0
            ordinal = 0 if starts else next_ordinal[slot]
            next_ordinal[slot] = ordinal + 1
            at = seen % most
            vectors[at] = pipeline.vector
            facts[at] = (*row[:5], starts, ordinal)
            seen += 1
    kept = min(seen, most)
    order = np.arange(seen - kept, seen) % most
    slot_, mid, spread, time_ns, last_seq, starts_, ordinals = facts[order].T.copy()
    rows = Rows(vectors[order], slot_, mid, spread, time_ns, last_seq, starts_.astype(bool))
    return RecentRows(rows, ordinals, list(pipeline.names), seen)
