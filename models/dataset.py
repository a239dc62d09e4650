"""Training rows out of tape records, by the very pipeline that will serve the model."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from engine import features
from engine.config import BookConfig, Config, InstrumentConfig, LimitsConfig, TriggerConfig
from engine.pipeline import Pipeline
from engine.signals import AT_BEST_ASK, AT_BEST_BID, AT_EXCHANGE_TIME, AT_LAST_SEQ
from feeds.errors import InputError
from feeds.tape import InstrumentMeta
from feeds.tape_reader import Chunk
from models.labels import smoothed_move

BLOCK_ROWS: Final = 8_192
MAX_ROWS: Final = 5_000_000
_INT64: Final = struct.Struct("<q")
_FACTS: Final = 4


@dataclass(frozen=True)
class Rows:
    """One row for each signal that was tradable before inference, in the engine's order.

    Attributes
    ----------
    vector : ndarray of float64, shape (ceil(n / stride), N_FEATURES)
        Raw features of rows 0, stride, 2 * stride, …
    slot : ndarray of int64, shape (n,)
        Instrument, in (venue, symbol) order.
    mid_half_ticks : ndarray of int64, shape (n,)
        Best bid plus best ask in ticks.
    time_ns : ndarray of int64, shape (n,)
        Exchange time of the last message in the row.
    last_seq : ndarray of int64, shape (n,)
        Its sequence number.
    stride : int
        Neighbouring rows say nearly the same: features of every so many are enough to train on,
        while labels need the mid of each.
    """

    vector: np.ndarray
    slot: np.ndarray
    mid_half_ticks: np.ndarray
    time_ns: np.ndarray
    last_seq: np.ndarray
    stride: int = 1

    def __len__(self) -> int:
        return len(self.slot)

    def moves(self, horizon: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows that have features and a label, and `smoothed_move` of each in its own instrument.

        Returns
        -------
        rows, moves : ndarray of int64, shape (m,)
            Row numbers in ascending order.
        """
        found_rows, found_moves = [], []
        for slot in np.unique(self.slot):
            own = np.flatnonzero(self.slot == slot)
            moves = smoothed_move(self.mid_half_ticks[own], horizon)
            found_rows.append(own[: len(moves)])
            found_moves.append(moves)
        rows = np.concatenate([np.empty(0, dtype=np.int64), *found_rows])
        moves = np.concatenate([np.empty(0, dtype=np.int64), *found_moves])
        order = np.argsort(rows, kind="stable")
        order = order[rows[order] % self.stride == 0]
        return rows[order], moves[order]

    def features_of(self, rows: np.ndarray) -> np.ndarray:
        """Raw features of rows that have them, float64 of shape (m, N_FEATURES)."""
        assert np.all(rows % self.stride == 0)
        return self.vector[rows // self.stride]


def collect(
    chunks: Iterable[Chunk],
    instruments: Iterable[InstrumentMeta],
    *,
    trigger: TriggerConfig | None = None,
    max_levels: int = BookConfig().max_levels,
    stride: int = 1,
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
    stride : int
        Keep the features of every so many rows.
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
        limits=LimitsConfig(max_pending_bytes=1 << 16),
    )
    pipeline = Pipeline(config, None, None)
    vectors, facts = _Table(features.N_FEATURES, np.float64), _Table(_FACTS, np.int64)
    read = 0
    for buf, start, stop, _ in chunks:
        at = start
        while True:
            at = pipeline.advance(buf, at, stop)
            if not pipeline.fired:
                break
            tradable, slot = pipeline.tradable_before_inference, pipeline.slot
            message = pipeline.answer()
            if not tradable:
                continue
            if facts.rows % stride == 0:
                vectors.append(pipeline.vector)
            (bid,) = _INT64.unpack_from(message, AT_BEST_BID)
            (ask,) = _INT64.unpack_from(message, AT_BEST_ASK)
            (time_ns,) = _INT64.unpack_from(message, AT_EXCHANGE_TIME)
            (last_seq,) = _INT64.unpack_from(message, AT_LAST_SEQ)
            facts.append((slot, bid + ask, time_ns, last_seq))
        read += stop - start
        if progress is not None:
            progress(read)
    columns = np.ascontiguousarray(facts.array().T)
    return Rows(vectors.array(), columns[0], columns[1], columns[2], columns[3], stride)


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
class Split:
    """Row numbers of the two parts, in time order."""

    train: np.ndarray
    test: np.ndarray


def time_split(rows: np.ndarray, time_ns: np.ndarray, train_share: float, embargo_ns: int) -> Split:
    """Train on what came first, test on what came later, with a pause between.

    Parameters
    ----------
    rows : ndarray of int64, shape (m,)
        Row numbers, in time order.
    time_ns : ndarray of int64, shape (n,)
        Of all rows.
    train_share : float
        Share of the rows that may be trained on.
    embargo_ns : int
        Rows that follow the last training row by less are dropped: labels that look ahead and
        features that remember would reach across.

    Notes
    -----
    López de Prado (2018), "Advances in Financial Machine Learning", section 7.4.
    """
    assert 0.0 < train_share < 1.0
    times = time_ns[rows]
    assert np.all(np.diff(times) >= 0), "rows in time order"
    cut = int(len(rows) * train_share)
    if cut == 0:
        return Split(rows[:0], rows)
    from_ns = times[cut - 1] + embargo_ns
    return Split(rows[:cut], rows[int(np.searchsorted(times, from_ns, side="right")) :])


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
