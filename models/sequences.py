"""The data set of one training run: normalised rows, labels and parts, instrument by instrument.

Rows of an instrument stand in the engine's order, so that models with state can run over them.
The parts are cut in time: train, then validation, then test. What could reach across a cut is taken
out: rows within the embargo after it, and before it the labels that end behind it (purging).

Source: López de Prado (2018), "Advances in Financial Machine Learning", section 7.4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec
import numpy as np

from engine.feature_specs import NAMES
from feeds.errors import InputError
from models.dataset import Normalisation, Rows
from models.labels import (
    CLASSES,
    balancing_threshold,
    classify,
    fixed_horizon_move,
    smoothed_move,
    triple_barrier,
)

TRAIN: Final = 0
EMBARGO: Final = 1
VALIDATION: Final = 2
TEST: Final = 3
PARTS: Final = ("train", "embargo", "validation", "test")
NO_LABEL: Final = -1
MIN_ROWS: Final = 256
SUSPICIOUS_CORRELATION: Final = 0.9
LabelKind = Literal["smoothed", "fixed", "triple-barrier"]
LABELS: Final[tuple[LabelKind, ...]] = ("smoothed", "fixed", "triple-barrier")
ROWS_NAME: Final = "rows.npy"
COLUMNS_NAME: Final = "columns.npz"
FACTS_NAME: Final = "dataset.json"
_COLUMNS: Final = (
    "label",
    "move",
    "mid_half_ticks",
    "spread_ticks",
    "time_ns",
    "last_seq",
    "slot",
    "starts",
    "part",
)


class Facts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a data set was made with.

    ``threshold`` is in half ticks, of the mean move for ``smoothed``, of the barrier for
    ``triple-barrier``. ``greatest`` is each feature's greatest absolute value in the training part,
    normalised but not clipped; ``max_constant`` how many rows in a row may show one value of it.
    Both are empty where they are not known, or are to be found from the rows.
    """

    label: LabelKind
    horizon: int
    threshold: float
    embargo_ns: int
    validation_share: float
    test_share: float
    clip: float
    mean: tuple[float, ...]
    inv_scale: tuple[float, ...]
    source: str
    greatest: tuple[float, ...] = ()
    max_constant: tuple[int, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """Rows in (instrument, time) order.

    Attributes
    ----------
    x : ndarray of float32, shape (n, features)
        Normalised and clipped.
    label : ndarray of int64, shape (n,)
        0, 1, 2 for down, flat, up; -1 where none may be used.
    move : ndarray of int64, shape (n,)
        What the label was cut from, in half ticks (``smoothed``: times the horizon); 0 without.
    mid_half_ticks, spread_ticks, time_ns, last_seq, slot : ndarray of int64, shape (n,)
    starts : ndarray of bool, shape (n,)
        First row of a stream.
    part : ndarray of int8, shape (n,)
        `TRAIN`, `EMBARGO`, `VALIDATION` or `TEST`.
    facts : Facts
    """

    x: np.ndarray
    label: np.ndarray
    move: np.ndarray
    mid_half_ticks: np.ndarray
    spread_ticks: np.ndarray
    time_ns: np.ndarray
    last_seq: np.ndarray
    slot: np.ndarray
    starts: np.ndarray
    part: np.ndarray
    facts: Facts

    def __len__(self) -> int:
        return len(self.label)

    @property
    def normalisation(self) -> Normalisation:
        """What made ``x`` of raw features."""
        facts = self.facts
        return Normalisation(np.array(facts.mean), np.array(facts.inv_scale), facts.clip)

    def rows_of(self, part: int) -> np.ndarray:
        """Numbers of the rows of a part that have a label."""
        return np.flatnonzero((self.part == part) & (self.label != NO_LABEL))

    def streams(self) -> list[tuple[int, int]]:
        """(first, after the last) row of each unbroken stream."""
        first = np.flatnonzero(self.starts)
        return list(zip(first.tolist(), [*first[1:].tolist(), len(self)], strict=True))

    def stretches(self, part: int, warm_up: int, most: int | None = None) -> Iterator[Stretch]:
        """Stretches of rows to run a model over for the answers in a part.

        Parameters
        ----------
        part : int
        warm_up : int
            Rows before, of the same stream, that only fill the state.
        most : int, optional
            At most so many rows of the part, shared evenly among the streams.
        """
        streams = [
            (first, inside)
            for first, after in self.streams()
            if len(inside := first + np.flatnonzero(self.part[first:after] == part))
        ]
        for first, inside in streams:
            if most is not None:
                inside = inside[: max(1, most // len(streams))]
            begin = max(first, int(inside[0]) - warm_up)
            yield Stretch(begin, int(inside[0]), int(inside[-1]) + 1)

    def save(self, folder: Path) -> None:
        """Write the data set; no pickle."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / ROWS_NAME, self.x, allow_pickle=False)
        np.savez(folder / COLUMNS_NAME, **{name: getattr(self, name) for name in _COLUMNS})
        (folder / FACTS_NAME).write_bytes(msgspec.json.encode(self.facts))


@dataclass(frozen=True)
class Stretch:
    """Rows begin … stop of one stream; answers count from ``first``."""

    begin: int
    first: int
    stop: int


def load_dataset(folder: Path) -> Dataset:
    """Read what `Dataset.save` wrote; ``x`` stays on disk and is mapped.

    Raises
    ------
    InputError
        If a file is missing or damaged.
    """
    try:
        facts = msgspec.json.decode((folder / FACTS_NAME).read_bytes(), type=Facts)
        x = np.load(folder / ROWS_NAME, mmap_mode="r", allow_pickle=False)
        with np.load(folder / COLUMNS_NAME, allow_pickle=False) as file:
            columns = {name: file[name] for name in _COLUMNS}
    except (OSError, ValueError, KeyError, msgspec.MsgspecError) as error:
        raise InputError(
            "no data set of a training run",
            where=str(folder),
            expected=f"{FACTS_NAME}, {ROWS_NAME} and {COLUMNS_NAME}",
            found=str(error),
            fix="name the folder that 'octick model train --out' wrote",
        ) from None
    return Dataset(x=x, facts=facts, **columns)


def split_in_time(
    time_ns: np.ndarray, validation_share: float, test_share: float, embargo_ns: int
) -> np.ndarray:
    """Part of each row, by its time: train, validation, test, with an embargo before the last two.

    Parameters
    ----------
    time_ns : ndarray of int64, shape (n,)
        In any order.

    Returns
    -------
    ndarray of int8, shape (n,)
    """
    assert 0.0 < validation_share + test_share < 1.0
    part = np.full(len(time_ns), TRAIN, dtype=np.int8)
    if not len(time_ns):
        return part
    ordered = np.sort(time_ns)
    for share, code in ((validation_share + test_share, VALIDATION), (test_share, TEST)):
        cut = ordered[min(int(len(ordered) * (1.0 - share)), len(ordered) - 1)]
        part[time_ns >= cut] = EMBARGO
        part[time_ns >= cut + embargo_ns] = code
    return part


def make_dataset(
    rows: Rows,
    *,
    horizon: int,
    label: LabelKind = "smoothed",
    threshold: float | None = None,
    validation_share: float = 0.1,
    test_share: float = 0.2,
    embargo_ns: int | None = None,
    clip: float = 4.0,
    source: str = "",
) -> Dataset:
    """Label, split and normalise rows.

    Parameters
    ----------
    rows : Rows
    horizon : int
        Signals looked ahead.
    threshold : float, optional
        Half ticks up to which a move is flat (``triple-barrier``: the barrier). By default the
        one that makes the classes of the training part most even.
    embargo_ns : int, optional
        By default a minute, or a twentieth of the session if that is shorter.

    Raises
    ------
    InputError
        If the rows are too few: a horizon longer than the tape, or a part without labels.
    """
    rows = rows.by_instrument()
    n = len(rows)
    duration = int(rows.time_ns.max() - rows.time_ns.min()) if n else 0
    embargo = min(60_000_000_000, duration // 20) if embargo_ns is None else embargo_ns
    part = split_in_time(rows.time_ns, validation_share, test_share, embargo)
    first = np.flatnonzero(rows.starts)
    streams = list(zip(first.tolist(), [*first[1:].tolist(), n], strict=True))
    ahead = smoothed_move if label == "smoothed" else fixed_horizon_move
    move = np.zeros(n, dtype=np.int64)
    ends = np.full(n, -1, dtype=np.int64)  # time at which the label is known
    for begin, after in streams:
        mids = rows.mid_half_ticks[begin:after]
        known = ahead(mids, horizon)
        move[begin : begin + len(known)] = known
        ends[begin : begin + len(known)] = rows.time_ns[begin + horizon : after]
    usable = ends >= 0
    # Purging: the last labels before a cut end behind it.
    for code, later in ((TRAIN, (EMBARGO, VALIDATION, TEST)), (VALIDATION, (TEST,))):
        behind = np.isin(part, later) & (rows.time_ns > _last_time(rows.time_ns, part, code))
        if behind.any():
            usable &= (part != code) | (ends < rows.time_ns[behind].min())
    train = usable & (part == TRAIN)
    counts = {
        PARTS[code]: int((usable & (part == code)).sum()) for code in (TRAIN, VALIDATION, TEST)
    }
    if min(counts.values()) < MIN_ROWS:
        raise InputError(
            f"too few rows to train, validate and test on with a horizon of {horizon} signals",
            where="--horizon and the tapes",
            expected=f"at least {MIN_ROWS} labelled rows in each part",
            found=", ".join(f"{name} {count}" for name, count in counts.items()) + f", of {n} rows",
            fix="take longer tapes or a shorter horizon",
        )
    steps = horizon if label == "smoothed" else 1
    cut = balancing_threshold(move[train]) if threshold is None else round(threshold * steps)
    labels = classify(move, cut)
    if label == "triple-barrier":
        barrier = max(1, cut)
        for begin, after in streams:
            mids = rows.mid_half_ticks[begin:after]
            touched = triple_barrier(mids, horizon, barrier)
            labels[begin : begin + len(touched)] = touched
        cut = barrier
    labels[~usable] = NO_LABEL
    normalisation = Normalisation.fit(rows.vector[part == TRAIN], clip)
    facts = Facts(
        label=label,
        horizon=horizon,
        threshold=cut / steps,
        embargo_ns=embargo,
        validation_share=validation_share,
        test_share=test_share,
        clip=clip,
        mean=tuple(normalisation.mean.tolist()),
        inv_scale=tuple(normalisation.inv_scale.tolist()),
        source=source,
        greatest=_greatest(rows.vector, part == TRAIN, normalisation),
    )
    return Dataset(
        x=normalisation.apply(rows.vector),
        label=labels,
        move=np.where(usable, move, 0),
        mid_half_ticks=rows.mid_half_ticks,
        spread_ticks=rows.spread_ticks,
        time_ns=rows.time_ns,
        last_seq=rows.last_seq,
        slot=rows.slot,
        starts=rows.starts,
        part=part,
        facts=facts,
    )


def _greatest(
    vector: np.ndarray, chosen: np.ndarray, normalisation: Normalisation
) -> tuple[float, ...]:
    """Greatest normalised magnitude of each feature in the chosen rows, before the clip."""
    picked = np.flatnonzero(chosen)
    low, high = vector[picked].min(axis=0), vector[picked].max(axis=0)
    furthest = np.maximum(high - normalisation.mean, normalisation.mean - low)
    return tuple((furthest * normalisation.inv_scale).tolist())


def _last_time(time_ns: np.ndarray, part: np.ndarray, code: int) -> int:
    inside = time_ns[part == code]
    return int(inside.max()) if len(inside) else -1


def find_leaks(data: Dataset) -> list[str]:
    """What would let a model know the answers; an empty list where nothing was found.

    Looked for: a label of one part that ends within a later one; test rows within the embargo;
    and a feature that moves with the label as no forecast can (correlation above 0.9 in the
    training part).
    """
    found = []
    horizon = data.facts.horizon
    for code, name in ((TRAIN, "training"), (VALIDATION, "validation")):
        later = data.part > max(code, EMBARGO)
        if not later.any():
            continue
        begins = data.time_ns[later].min()
        for first, after in data.streams():
            rows = np.arange(first, after)
            mine = rows[(data.part[rows] == code) & (data.label[rows] != NO_LABEL)]
            mine = mine[mine + horizon < after]
            late = int((data.time_ns[mine + horizon] >= begins).sum())
            if late:
                found.append(f"{late} {name} labels end in a later part, slot {data.slot[first]}")
    for code, name in ((VALIDATION, "validation"), (TEST, "test")):
        before = data.part < code
        before &= data.part != EMBARGO
        mine = data.part == code
        if before.any() and mine.any():
            gap = int(data.time_ns[mine].min() - data.time_ns[before].max())
            if gap < data.facts.embargo_ns:
                found.append(f"{name} rows follow {gap} ns after earlier ones, within the embargo")
    train = data.rows_of(TRAIN)
    x, y = np.asarray(data.x[train], dtype=np.float64), data.label[train] - 1.0
    deviation = x.std(axis=0) * y.std()
    covariance = ((x - x.mean(axis=0)) * (y - y.mean())[:, None]).mean(axis=0)
    correlation = np.divide(covariance, deviation, out=np.zeros(x.shape[1]), where=deviation > 0)
    found.extend(
        f"feature {NAMES[j]} correlates {correlation[j]:.2f} with the label"
        for j in np.flatnonzero(np.abs(correlation) > SUSPICIOUS_CORRELATION)
    )
    return found


def class_shares(data: Dataset, part: int) -> dict[str, float]:
    """Share of each class among the labels of a part."""
    labels = data.label[data.rows_of(part)]
    counts = np.bincount(labels, minlength=len(CLASSES)) / max(1, len(labels))
    return {name: round(float(share), 4) for name, share in zip(CLASSES, counts, strict=True)}
