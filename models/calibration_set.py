"""The calibration set on disk: stretches of recent rows mixed with older ones, in bounded size.

What is kept are blocks of `BLOCK_ROWS` consecutive rows of one instrument, because a model with
state cannot be calibrated on single rows; and raw features, so that the set outlives a model whose
normalisation is another. Which blocks stay is decided by weighted random sampling: a block one
half-life older than another is half as likely to be kept.

Each block draws its chance from a hash of the seed and of what the block is, not from a generator
that runs on. So the same blocks give the same set in whatever order and however often they come,
and a recalibration that is repeated changes nothing.

Sources: Efraimidis and Spirakis (2006), "Weighted random sampling with a reservoir"; Cormode,
Shkapenyuk, Srivastava and Xu (2009), "Forward decay: a practical time decay model for streaming
systems", whose weights never need to be brought up to date.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from engine import features
from feeds.errors import InputError
from models.export import npz_bytes

BLOCK_ROWS: Final = 256  # enough for what any architecture remembers, and 64 rows that count
CAPACITY_BLOCKS: Final = 128
HALF_LIFE_NS: Final = 86_400_000_000_000  # a day of event time
FORMAT_VERSION: Final = 1
MAX_SET_BYTES: Final = 1 << 30
_COLUMNS: Final = ("vector", "instrument", "first_seq", "first_ns", "last_ns")


@dataclass(frozen=True)
class CalibrationSet:
    """Blocks in order of their time.

    Attributes
    ----------
    vector : ndarray of float64, shape (n, BLOCK_ROWS, N_FEATURES)
        Raw features.
    instrument : ndarray of str, shape (n,)
        "VENUE.SYMBOL".
    first_seq : ndarray of int64, shape (n,)
        Sequence number of the first row.
    first_ns, last_ns : ndarray of int64, shape (n,)
        Exchange time of the earliest and the latest row.
    """

    vector: np.ndarray
    instrument: np.ndarray
    first_seq: np.ndarray
    first_ns: np.ndarray
    last_ns: np.ndarray

    def __len__(self) -> int:
        return len(self.last_ns)

    def take(self, blocks: np.ndarray) -> CalibrationSet:
        """Some of the blocks, by number or mask."""
        return CalibrationSet(*(getattr(self, name)[blocks] for name in _COLUMNS))

    def before(self, time_ns: int) -> CalibrationSet:
        """The blocks that ended before a time."""
        return self.take(self.last_ns < time_ns)


def no_blocks() -> CalibrationSet:
    """A set without any block."""
    none = np.empty(0, dtype=np.int64)
    vector = np.empty((0, BLOCK_ROWS, features.N_FEATURES))
    return CalibrationSet(vector, np.empty(0, dtype=np.str_), none, none, none)


def mixed(
    older: CalibrationSet,
    newer: CalibrationSet,
    *,
    capacity: int = CAPACITY_BLOCKS,
    half_life_ns: int = HALF_LIFE_NS,
    seed: int = 0,
) -> CalibrationSet:
    """At most ``capacity`` blocks of both sets, recent ones with better chances.

    A block that stands in both counts once. Of blocks i of age a_i those with the least
    ``E_i * 2**(a_i / half_life)`` stay, where E_i is exponentially distributed: a sample without
    replacement with weights ``2**(-a_i / half_life)``.

    Parameters
    ----------
    capacity : int
        Blocks.
    half_life_ns : int
        Of event time.
    seed : int
    """
    assert capacity >= 1
    assert half_life_ns >= 1
    names = [(str(part.instrument[i]), int(part.first_ns[i]), int(part.first_seq[i]))
             for part in (older, newer) for i in range(len(part))]  # fmt: skip
    first = {name: i for i, name in reversed(list(enumerate(names)))}
    at = np.array(sorted(first.values()), dtype=np.int64)
    if not len(at):
        return older
    last_ns = np.concatenate([older.last_ns, newer.last_ns])[at]
    age = (last_ns.max() - last_ns) / half_life_ns
    draws = np.array([math.log(_exponential(seed, *names[i])) for i in at])
    kept = at[np.argsort(draws + math.log(2.0) * age, kind="stable")[:capacity]]
    kept = np.array(sorted(kept.tolist(), key=lambda i: (_time(older, newer, i), names[i])))
    return CalibrationSet(*(_picked(older, newer, name, kept) for name in _COLUMNS))


def _time(older: CalibrationSet, newer: CalibrationSet, i: int) -> int:
    return int(older.last_ns[i] if i < len(older) else newer.last_ns[i - len(older)])


def _picked(
    older: CalibrationSet, newer: CalibrationSet, name: str, kept: np.ndarray
) -> np.ndarray:
    """One column of the kept blocks; no copy of both sets as a whole."""
    a, b = getattr(older, name), getattr(newer, name)
    out = np.empty((len(kept), *a.shape[1:]), dtype=np.result_type(a.dtype, b.dtype))
    old = kept < len(a)
    out[old] = a[kept[old]]
    out[~old] = b[kept[~old] - len(a)]
    return out


def _exponential(seed: int, instrument: str, first_ns: int, first_seq: int) -> float:
    """A draw of the unit exponential distribution that is the block's own."""
    text = f"{seed} {instrument} {first_ns} {first_seq}"
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    return -math.log((number + 0.5) / 2.0**64)


def load_calibration_set(path: Path) -> CalibrationSet:
    """Read what `save_calibration_set` wrote; a file that is not there yet holds no blocks.

    Raises
    ------
    InputError
        If the file is damaged, or its rows are of other features than this engine's.
    """
    if not path.exists():
        return no_blocks()
    try:
        if path.stat().st_size > MAX_SET_BYTES:
            raise ValueError(f"more than {MAX_SET_BYTES} bytes")
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            found = int(file["format"])
            if found != FORMAT_VERSION:
                raise ValueError(f"format {found} in place of {FORMAT_VERSION}")
            schema = str(file["feature_schema"])
            columns = [file[name] for name in _COLUMNS]
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(
            "no calibration set",
            where=str(path),
            expected="a file that 'octick model recalibrate' wrote",
            found=str(error),
            fix="remove it to start a new one, or name another --calibration-set",
        ) from None
    if schema != features.SCHEMA_HEX:
        raise InputError(
            "the calibration set has other features",
            where=str(path),
            expected=features.SCHEMA_HEX,
            found=schema,
            fix="name another --calibration-set: a new one is started",
        )
    _check_columns(columns, path)
    return CalibrationSet(*columns)


def _check_columns(columns: Sequence[np.ndarray], path: Path) -> None:
    n = len(columns[-1]) if columns[-1].ndim else 0
    shapes = [(n, BLOCK_ROWS, features.N_FEATURES), *[(n,)] * (len(_COLUMNS) - 1)]
    kinds = ["f", "U", "i", "i", "i"]
    for name, array, shape, kind in zip(_COLUMNS, columns, shapes, kinds, strict=True):
        wide = kind == "U" or array.dtype.itemsize == 8
        if array.shape != shape or array.dtype.kind != kind or not wide:
            raise InputError(
                "the calibration set is damaged",
                where=f"{path}: {name}",
                expected=f"shape {shape}",
                found=f"{array.dtype} of shape {array.shape}",
                fix="remove it to start a new one",
            )
    if not np.isfinite(columns[0]).all():
        raise InputError(
            "a row of the calibration set is not finite",
            where=f"{path}: vector",
            fix="remove it to start a new one",
        )


def save_calibration_set(path: Path, blocks: CalibrationSet) -> None:
    """Write the set: whole, or not at all.

    Raises
    ------
    InputError
        If the folder cannot be written to.
    """
    data = npz_bytes(
        {name: getattr(blocks, name) for name in _COLUMNS}
        | {
            "format": np.array(FORMAT_VERSION),
            "feature_schema": np.array(features.SCHEMA_HEX),
        }
    )
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise InputError(
            "the calibration set cannot be written",
            where=str(path),
            found=error.strerror or str(error),
            fix="name another --calibration-set; the old one is as it was",
        ) from None
