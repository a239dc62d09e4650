# Hot path: the free @njit function `interleave`.
"""Several tapes as one stream of events, the same whatever order they are named in.

Events come in order of receive time; at equal times, tapes in order of the names of their
instruments, and records of one tape always in their own order. Tapes that do not overlap in time
are thereby simply chained.

Converters number sources from the same start, so two tapes may use one id for two instruments,
and a second day of an instrument may start again at the first epoch. In a merged stream each tape
therefore gets source ids of its own, and a tape whose sequence would run backwards gets later
epochs. A single tape is never touched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numba import njit

from feeds import tape, tape_info, wire
from feeds.errors import InputError
from feeds.inner import inner
from feeds.rawbytes import load_i64, load_u16, load_u32, store_i64, store_u32
from feeds.tape import TapeMeta
from feeds.tape_reader import Chunk, TapeReader

MAX_OPEN_TAPES: Final = 64
MAX_SOURCES_A_TAPE: Final = 64
PEEK_BYTES: Final = 1 << 12
CHUNK_BYTES: Final = 1 << 20
NEVER: Final = np.iinfo(np.int64).max

# Columns of `lanes`.
AT: Final = 0
STOP: Final = 1
FLOOR: Final = 2
SHIFT: Final = 3
RANK: Final = 4
SOURCES: Final = 5
LANE_FIELDS: Final = 6

# What `interleave` stops for.
_REFILL: Final = 0
_FULL: Final = 1
_OPEN_NEXT: Final = 2
_TOO_MANY_SOURCES: Final = 3


@inner("int64(uint8[::1], int64, int64)")
def next_event(buf, at, stop):  # type: ignore[no-untyped-def]
    """Position of the first record of whole records that is no recorded signal, or ``stop``."""
    while at < stop and load_u16(buf, at + 16) == tape.SIGNAL:
        at += tape.RECORD_HEADER_BYTES + tape.padded(load_u32(buf, at + 4))
    return at


@njit(
    "UniTuple(int64, 3)(uint8[:,::1], int64[:,::1], int64[:,::1], int64, uint8[::1], int64)",
    cache=True,
)
def interleave(arena, lanes, sources, limit_ns, out, out_at):  # type: ignore[no-untyped-def]
    """Copy records of several tapes to ``out`` in their common order.

    Parameters
    ----------
    arena : ndarray of uint8, shape (k, size)
        Whole records of each tape.
    lanes : ndarray of int64, shape (k, LANE_FIELDS)
        AT and STOP, the next record and the end of each row; FLOOR, its latest receive time so
        far (a clock that stepped back does not reorder); SHIFT, added to its epochs; RANK, which
        decides at equal times; SOURCES, how many source ids it had. A free row has STOP -1.
    sources : ndarray of int64, shape (k, MAX_SOURCES_A_TAPE)
        Source ids met on each row; rank and position make the id in ``out``.
    limit_ns : int
        Stop before the first record of this time or later: another tape begins there.
    out : ndarray of uint8
    out_at : int
        Where to write.

    Returns
    -------
    out_at : int
    status : int
        Why it stopped.
    row : int
        The row in question.
    """
    while True:
        best = -1
        best_ns = 0
        for row in range(len(lanes)):
            if lanes[row, STOP] < 0:
                continue
            lanes[row, AT] = next_event(arena[row], lanes[row, AT], lanes[row, STOP])
            if lanes[row, AT] >= lanes[row, STOP]:
                return out_at, _REFILL, row
            recv_ns = max(load_i64(arena[row], lanes[row, AT] + 8), lanes[row, FLOOR])
            if (
                best < 0
                or recv_ns < best_ns
                or (recv_ns == best_ns and lanes[row, RANK] < lanes[best, RANK])
            ):
                best = row
                best_ns = recv_ns
        if best < 0 or best_ns >= limit_ns:
            return out_at, _OPEN_NEXT, -1
        buf = arena[best]
        start = lanes[best, AT]
        length = load_u32(buf, start + 4)
        size = tape.RECORD_HEADER_BYTES + tape.padded(length)
        kind = load_u16(buf, start + 16)
        if out_at + size > len(out):
            return out_at, _FULL, best
        body = start + tape.RECORD_HEADER_BYTES
        patched = kind == tape.MARKET and length >= wire.HEADER_BYTES + wire.PREFIX_BYTES
        if patched:
            template = load_u16(buf, body + 2)
            patched = (
                load_u16(buf, body + 4) == wire.SCHEMA_ID
                and template >= wire.INSTRUMENT
                and template <= wire.HEARTBEAT
            )
        place = 0
        if patched:
            source_id = load_u32(buf, body + wire.AT_SOURCE_ID)
            while place < lanes[best, SOURCES] and sources[best, place] != source_id:
                place += 1
            if place == lanes[best, SOURCES]:
                if place == sources.shape[1]:
                    return out_at, _TOO_MANY_SOURCES, best
                sources[best, place] = source_id
                lanes[best, SOURCES] += 1
        for i in range(0, size, 8):
            store_i64(out, out_at + i, load_i64(buf, start + i))
        if patched:
            target = out_at + tape.RECORD_HEADER_BYTES
            store_u32(out, target + wire.AT_SOURCE_ID, lanes[best, RANK] * sources.shape[1] + place)
            epoch = load_i64(buf, body + wire.AT_EPOCH)
            store_i64(out, target + wire.AT_EPOCH, epoch + lanes[best, SHIFT])
        lanes[best, FLOOR] = best_ns
        lanes[best, AT] = start + size
        out_at += size


class _Tape:
    """One tape of a merge."""

    def __init__(self, path: Path, allow_truncated: bool) -> None:
        self.path = path
        self.allow_truncated = allow_truncated
        reader = TapeReader(path, chunk_bytes=PEEK_BYTES)
        self.meta: TapeMeta = reader.meta
        self.file_bytes = reader.file_bytes
        first = next(reader.chunks(allow_truncated=True), None)
        self.empty = first is None
        self.first_ns = 0 if first is None else int(load_time(first.buf, first.start))
        self.names = sorted((item.venue, item.symbol) for item in self.meta.instruments)
        self.chunks: Iterator[Chunk] = iter(())
        self.reader = reader
        self.survey = tape_info.Survey(self.meta.instruments)

    @property
    def order(self) -> tuple[list[tuple[str, str]], int, str, int]:
        """What decides between tapes at equal times; nothing of it is the file's name."""
        return self.names, self.meta.created_ns, self.meta.source, self.first_ns

    def open(self) -> None:
        self.reader = TapeReader(self.path, chunk_bytes=CHUNK_BYTES)
        self.chunks = self.reader.chunks(allow_truncated=self.allow_truncated)

    def rows(self) -> dict[tuple[str, str], np.ndarray]:
        """What the survey says so far about each instrument that had a message."""
        instruments, table = self.survey.instruments, self.survey.table
        return {
            instruments.name(row): table[row]
            for row in range(len(instruments))
            if table[row, tape_info.MESSAGES] > 0
        }


@njit("int64(uint8[::1], int64)", cache=True)
def load_time(buf, at):  # type: ignore[no-untyped-def]
    """Receive time of the record at ``at``."""
    return load_i64(buf, at + 8)


class TapeStream:
    """Tapes as one stream of chunks, for `engine.pipeline.Pipeline.advance`.

    Parameters
    ----------
    paths : sequence of path-like
    allow_truncated : bool
        Take tapes without an END record up to their last whole record.
    tick : callable
        Told how many bytes of all files are read.

    Attributes
    ----------
    metas : list of TapeMeta
        Headers, in an order that does not depend on that of ``paths``.
    file_bytes : int
        Size of all files.
    truncated : bool
        After reading: whether a tape was cut short.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        allow_truncated: bool = False,
        tick: Callable[[int], None] | None = None,
    ) -> None:
        tapes = [_Tape(Path(path), allow_truncated) for path in paths]
        tapes.sort(key=lambda item: item.order)
        self._tapes = tapes
        self.metas = [item.meta for item in tapes]
        self.file_bytes = sum(item.file_bytes for item in tapes)
        self.truncated = False
        self.tick = tick

    def _told(self, closed_bytes: int, *tapes: _Tape) -> None:
        if self.tick is not None:
            self.tick(closed_bytes + sum(item.reader.file_bytes_read for item in tapes))

    def chunks(self) -> Iterator[tuple[np.ndarray, int, int]]:
        """Yield (buf, start, stop) of whole records; an array is valid until the next one.

        Raises
        ------
        InputError
            At damage, at a missing END unless allowed, or where two tapes hold the same
            instrument at the same time. What was yielded before is good.
        """
        if len(self._tapes) == 1:
            only = self._tapes[0]
            only.reader = TapeReader(only.path)
            for chunk in only.reader.chunks(allow_truncated=only.allow_truncated):
                yield chunk.buf, chunk.start, chunk.stop
                self._told(0, only)
            self.truncated = only.reader.truncated_at is not None
            return
        yield from self._merged()

    def _merged(self) -> Iterator[tuple[np.ndarray, int, int]]:
        tapes = self._tapes
        waiting = sorted(
            (i for i in range(len(tapes)) if not tapes[i].empty),
            key=lambda i: (tapes[i].first_ns, i),
        )
        rows = _Rows(min(len(waiting), MAX_OPEN_TAPES))
        last: dict[tuple[str, str], tuple[int, int]] = {}
        out, out_at = np.zeros(CHUNK_BYTES, dtype=np.uint8), 0
        closed_bytes = sum(item.file_bytes for item in tapes if item.empty)
        while True:
            limit_ns = tapes[waiting[0]].first_ns if waiting else NEVER
            out_at, status, row = interleave(
                rows.arena, rows.lanes, rows.sources, limit_ns, out, out_at
            )
            if status == _OPEN_NEXT:
                if not waiting:
                    break
                rank = waiting.pop(0)
                for other in rows.open.values():
                    _refuse_overlap(tapes[rank], other)
                rows.start(rank, tapes[rank], last)
            elif status == _REFILL:
                item = rows.open[row]
                if not rows.refill(row):
                    _note_ends(item, int(rows.lanes[row, SHIFT]), last)
                    closed_bytes += item.file_bytes
                    self.truncated |= item.reader.truncated_at is not None
                self._told(closed_bytes, *rows.open.values())
            elif status == _TOO_MANY_SOURCES:
                raise InputError(
                    "too many sources on one tape",
                    where=str(rows.open[row].path),
                    expected=f"at most {MAX_SOURCES_A_TAPE} when tapes are merged",
                    fix="replay this tape alone",
                )
            elif out_at > 0:
                yield out, 0, out_at
                out_at = 0
            else:
                out = np.zeros(len(out) * 2, dtype=np.uint8)
        if out_at > 0:
            yield out, 0, out_at


class _Rows:
    """The arrays of `interleave`, and the tape that is open in each row."""

    def __init__(self, rows: int) -> None:
        self.arena = np.zeros((rows, CHUNK_BYTES), dtype=np.uint8)
        self.lanes = np.zeros((rows, LANE_FIELDS), dtype=np.int64)
        self.lanes[:, STOP] = -1
        self.sources = np.zeros((rows, MAX_SOURCES_A_TAPE), dtype=np.int64)
        self.open: dict[int, _Tape] = {}

    def start(self, rank: int, item: _Tape, last: dict[tuple[str, str], tuple[int, int]]) -> None:
        """Open a tape in a free row."""
        row = next((row for row in range(len(self.lanes)) if row not in self.open), -1)
        if row < 0:
            raise InputError(
                "too many tapes at the same time",
                where=str(item.path),
                expected=f"at most {MAX_OPEN_TAPES}",
            )
        item.open()
        self.open[row] = item
        self.lanes[row] = 0
        self.lanes[row, RANK] = rank
        self.refill(row)
        self.lanes[row, SHIFT] = _epoch_shift(item, last)

    def refill(self, row: int) -> bool:
        """Bring a tape's next chunk into its row; False, and the row free, where it ended."""
        item = self.open[row]
        chunk = next(item.chunks, None)
        if chunk is None:
            del self.open[row]
            self.lanes[row, STOP] = -1
            return False
        item.survey.add(chunk)
        size = chunk.stop - chunk.start
        if size > self.arena.shape[1]:
            larger = np.zeros((len(self.arena), size), dtype=np.uint8)
            larger[:, : self.arena.shape[1]] = self.arena
            self.arena = larger
        self.arena[row, :size] = chunk.buf[chunk.start : chunk.stop]
        self.lanes[row, AT], self.lanes[row, STOP] = 0, size
        return True


def _refuse_overlap(a: _Tape, b: _Tape) -> None:
    """Two tapes of one instrument at one time would be two truths about its book."""
    shared = set(a.names) & set(b.names)
    if shared:
        first, second = sorted((str(a.path), str(b.path)))
        raise InputError(
            f"two tapes hold {'.'.join(min(shared))} at the same time",
            where=f"{first} and {second}",
            fix="replay them one by one",
        )


def _epoch_shift(item: _Tape, last: dict[tuple[str, str], tuple[int, int]]) -> int:
    """How far a tape's epochs must move so that no sequence runs backwards behind earlier tapes."""
    shift = 0
    for name, row in item.rows().items():
        epoch, seq = last.get(name, (0, 0))
        first = int(row[tape_info.FIRST_EPOCH])
        if (first, int(row[tape_info.FIRST_SEQ])) < (epoch, seq):
            shift = max(shift, epoch + 1 - first)
    return shift


def _note_ends(item: _Tape, shift: int, last: dict[tuple[str, str], tuple[int, int]]) -> None:
    """Remember where a tape left each of its instruments."""
    for name, row in item.rows().items():
        last[name] = int(row[tape_info.EPOCH]) + shift, int(row[tape_info.LAST_SEQ])
