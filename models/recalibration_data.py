"""What a recalibration works on: blocks to calibrate from, and later rows that are held out."""

from __future__ import annotations

from dataclasses import fields
from typing import Final

import msgspec
import numpy as np

from models.calibration_set import BLOCK_ROWS, CalibrationSet
from models.dataset import Normalisation, Rows
from models.labels import (
    FLAT,
    classify,
    fixed_horizon_move,
    smoothed_move,
    triple_barrier,
)
from models.recent_rows import RecentRows
from models.sequences import NO_LABEL, TEST, TRAIN, Dataset, Facts

MAX_HELD_OUT_ROWS: Final = 20_000


def held_out(recent: RecentRows, from_ns: int, most: int = MAX_HELD_OUT_ROWS) -> Rows:
    """The last rows from a time on, instrument after instrument; streams start where rows miss."""
    chosen = np.flatnonzero(recent.rows.time_ns >= from_ns)[-most:]
    chosen = chosen[np.argsort(recent.rows.slot[chosen], kind="stable")]
    columns = {field.name: getattr(recent.rows, field.name)[chosen] for field in fields(Rows)}
    broken = np.ones(len(chosen), dtype=bool)
    broken[1:] = np.diff(recent.ordinal[chosen]) != 1
    broken[1:] |= np.diff(columns["slot"]) != 0
    return Rows(**columns | {"starts": broken})


def labels_of(rows: Rows, facts: Facts) -> tuple[np.ndarray, np.ndarray]:
    """Moves and labels by the rule that a network was trained with.

    Returns
    -------
    move, label : ndarray of int64, shape (n,)
        0 and `NO_LABEL` for the last rows of a stream, whose horizon ends behind it.
    """
    n = len(rows)
    move: np.ndarray = np.zeros(n, dtype=np.int64)
    label: np.ndarray = np.full(n, NO_LABEL, dtype=np.int64)
    smoothed = facts.label == "smoothed"
    ahead = smoothed_move if smoothed else fixed_horizon_move
    cut = round(facts.threshold * (facts.horizon if smoothed else 1))
    first = np.flatnonzero(rows.starts)
    for begin, after in zip(first.tolist(), [*first[1:].tolist(), n], strict=True):
        mids = rows.mid_half_ticks[begin:after]
        moves = ahead(mids, facts.horizon)
        if facts.label == "triple-barrier":
            labels = triple_barrier(mids, facts.horizon, max(1, cut))
        else:
            labels = classify(moves, cut)
        move[begin : begin + len(moves)] = moves
        label[begin : begin + len(labels)] = labels
    return move, label


def calibration_dataset(
    blocks: CalibrationSet,
    held: Rows,
    names: list[tuple[str, str]],
    facts: Facts,
    source: str,
) -> Dataset:
    """Blocks as the training part, held-out rows as the test part; there is no validation part.

    Rows of blocks count as labelled, with a label that nothing reads: where a recalibration trains
    at all, under fake quantisation, it is towards the float network's own answers.

    Parameters
    ----------
    names : list of (venue, symbol)
        Of the slots of ``held``.
    facts : Facts
        The parent's: its weights know only its normalisation.
    """
    normalisation = Normalisation(np.array(facts.mean), np.array(facts.inv_scale), facts.clip)
    n = len(blocks) * BLOCK_ROWS
    slots = {".".join(name): slot for slot, name in enumerate(names)}
    for instrument in sorted(set(blocks.instrument.tolist())):
        slots.setdefault(instrument, len(slots))
    move, label = labels_of(held, facts)
    none: np.ndarray = np.zeros(n, dtype=np.int64)

    def by_row(values: np.ndarray) -> np.ndarray:
        return np.repeat(values, BLOCK_ROWS)

    slot = by_row(np.array([slots[name] for name in blocks.instrument.tolist()], dtype=np.int64))
    raw = blocks.vector.reshape(n, blocks.vector.shape[2])
    return Dataset(
        x=np.concatenate([normalisation.apply(raw), normalisation.apply(held.vector)]),
        label=np.concatenate([none + FLAT, label]),
        move=np.concatenate([none, move]),
        mid_half_ticks=np.concatenate([none, held.mid_half_ticks]),
        spread_ticks=np.concatenate([none, held.spread_ticks]),
        time_ns=np.concatenate([by_row(blocks.last_ns), held.time_ns]),
        last_seq=np.concatenate([by_row(blocks.first_seq), held.last_seq]),
        slot=np.concatenate([slot, held.slot]),
        starts=np.concatenate([np.arange(n) % BLOCK_ROWS == 0, held.starts]),
        part=np.repeat(np.array([TRAIN, TEST], dtype=np.int8), [n, len(held)]),
        facts=msgspec.structs.replace(facts, source=source),
    )
