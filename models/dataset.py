"""Training rows out of tape records, by the very pipeline that will serve the model."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Final

import numpy as np

from engine import features
from engine.config import BookConfig, Config, InstrumentConfig, LimitsConfig, TriggerConfig
from engine.pipeline import Pipeline
from engine.signals import AT_BEST_ASK, AT_BEST_BID, AT_EXCHANGE_TIME, AT_LAST_SEQ
from feeds.errors import InputError
from feeds.tape import InstrumentMeta
from feeds.tape_reader import Chunk

BLOCK_ROWS: Final = 8_192
MAX_ROWS: Final = 5_000_000
_INT64: Final = struct.Struct("<q")
_FACTS: Final = 6
MAX_PENDING_BYTES: Final = 1 << 22


@dataclass(frozen=True)
class Rows:
    """One row for each signal that was tradable before inference, in the engine's order.

    Attributes
    ----------
    vector : ndarray of float64, shape (n, N_FEATURES)
        Raw features.
    slot : ndarray of int64, shape (n,)
        Instrument, in (venue, symbol) order.
    mid_half_ticks : ndarray of int64, shape (n,)
        Best bid plus best ask in ticks.
    spread_ticks : ndarray of int64, shape (n,)
        Best ask less best bid: in half ticks, the cost of crossing half of it.
    time_ns : ndarray of int64, shape (n,)
        Exchange time of the last message in the row.
    last_seq : ndarray of int64, shape (n,)
        Its sequence number.
    starts : ndarray of bool, shape (n,)
        Where the engine would reset the model's state: the first row of an instrument, and the
        first after its stream was lost.
    """

    vector: np.ndarray
    slot: np.ndarray
    mid_half_ticks: np.ndarray
    spread_ticks: np.ndarray
    time_ns: np.ndarray
    last_seq: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.slot)

    def by_instrument(self) -> Rows:
        """The same rows, instrument after instrument, each in the engine's order."""
        order = np.argsort(self.slot, kind="stable")
        return Rows(**{field.name: getattr(self, field.name)[order] for field in fields(Rows)})


def joined(parts: Sequence[Rows]) -> Rows:
    """Rows of several sessions, one after another; slots must mean the same in each."""
    names = [field.name for field in fields(Rows)]
    return Rows(**{n: np.concatenate([getattr(part, n) for part in parts]) for n in names})


def collect(
    chunks: Iterable[Chunk],
    instruments: Iterable[InstrumentMeta],
    *,
    trigger: TriggerConfig | None = None,
    max_levels: int = BookConfig().max_levels,
    progress: Callable[[int], None] | None = None,
) -> Rows:
    """Run the pipeline without a model over tape records and keep what it would have inferred on.

    Parameters
    ----------
    chunks : iterable of Chunk
        From `TapeReader.chunks` or `Simulator.chunks`.
    instruments : iterable of InstrumentMeta
        Those to keep.
    trigger : TriggerConfig, optional
        When a row is taken; every change of the top of the book by default.
    max_levels : int
        Book depth to keep.
    progress : callable, optional
        Called after each chunk with the bytes read so far.

    Raises
    ------
    InputError
        If more than `MAX_ROWS` rows come out.
    """
    config = Config(
        instruments=tuple(InstrumentConfig(item.venue, item.symbol) for item in instruments),
        trigger=trigger or TriggerConfig(),
        book=BookConfig(max_levels=max_levels),
        limits=LimitsConfig(max_pending_bytes=MAX_PENDING_BYTES),
    )
    pipeline = Pipeline(config, None, None, follow_trust_events=False)
    vectors, facts = _Table(features.N_FEATURES, np.float64), _Table(_FACTS, np.int64)
    read = 0
    for buf, start, stop, _ in chunks:
        for row in taken_rows(pipeline, buf, start, stop):
            vectors.append(pipeline.vector)
            facts.append(row)
        read += stop - start
        if progress is not None:
            progress(read)
    columns = np.ascontiguousarray(facts.array().T)
    slot, mid, spread, time_ns, last_seq, starts = columns
    _, first = np.unique(slot, return_index=True)
    starts = starts.astype(bool)
    starts[first] = True
    return Rows(vectors.array(), slot, mid, spread, time_ns, last_seq, starts)


def taken_rows(
    pipeline: Pipeline, buf: np.ndarray, at: int, stop: int
) -> Iterator[tuple[int, int, int, int, int, bool]]:
    """Run a pipeline without a model over whole tape records and stop at each row.

    Yields
    ------
    slot, mid_half_ticks, spread_ticks, time_ns, last_seq : int
    starts : bool
        As in `Rows`; the features stand in ``pipeline.vector`` until the next row.
    """
    while True:
        at = pipeline.advance(buf, at, stop)
        if not pipeline.fired:
            return
        tradable, slot = pipeline.tradable_before_inference, pipeline.slot
        message = pipeline.answer()
        if not tradable:
            continue
        (bid,) = _INT64.unpack_from(message, AT_BEST_BID)
        (ask,) = _INT64.unpack_from(message, AT_BEST_ASK)
        (time_ns,) = _INT64.unpack_from(message, AT_EXCHANGE_TIME)
        (last_seq,) = _INT64.unpack_from(message, AT_LAST_SEQ)
        starts = pipeline.take_stream_reset(slot)
        yield slot, bid + ask, ask - bid, time_ns, last_seq, starts


class _Table:
    """Rows appended one by one, kept in blocks so that nothing is copied as it grows."""

    def __init__(self, width: int, dtype: type) -> None:
        self.rows = 0
        self._width, self._dtype = width, dtype
        self._blocks: list[np.ndarray] = []

    def append(self, row: np.ndarray | tuple[int, ...]) -> None:
        at = self.rows % BLOCK_ROWS
        if at == 0:
            if self.rows >= MAX_ROWS:
                raise InputError(
                    "too many training rows",
                    where="data set",
                    expected=f"at most {MAX_ROWS}",
                    fix="use fewer messages",
                )
            self._blocks.append(np.empty((BLOCK_ROWS, self._width), dtype=self._dtype))
        self._blocks[-1][at] = row
        self.rows += 1

    def array(self) -> np.ndarray:
        empty: np.ndarray = np.empty((0, self._width), dtype=self._dtype)
        return np.concatenate([empty, *self._blocks])[: self.rows]


@dataclass(frozen=True)
class Normalisation:
    """What the engine's host code does before inference: clip((f - mean) * inv_scale)."""

    mean: np.ndarray
    inv_scale: np.ndarray
    clip: float

    @classmethod
    def fit(cls, vector: np.ndarray, clip: float) -> Normalisation:
        """Mean and standard deviation of training rows; a constant feature keeps scale 1."""
        mean = vector.mean(axis=0)
        spread = vector.std(axis=0)
        constant = spread <= 1e-9 * np.maximum(np.abs(mean), 1.0)
        return cls(mean, np.where(constant, 1.0, 1.0 / np.where(constant, 1.0, spread)), clip)

    def apply(self, vector: np.ndarray) -> np.ndarray:
        """Model inputs, float32 of the same shape: the same operations as `engine.advance`."""
        x = (vector - self.mean) * self.inv_scale
        return np.clip(x, -self.clip, self.clip).astype(np.float32)
