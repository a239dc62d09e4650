"""The calibration set on disk: bounded, weighted by age, and the same however its blocks come."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import features
from feeds.errors import InputError
from models.calibration_set import (
    BLOCK_ROWS,
    CalibrationSet,
    load_calibration_set,
    mixed,
    no_blocks,
    save_calibration_set,
)
from models.export import npz_bytes

HOUR_NS = 3_600_000_000_000


def blocks_at(hours: list[int], instrument: str = "X.A") -> CalibrationSet:
    """A block that ends at each hour; its rows hold the hour."""
    last = np.array(hours, dtype=np.int64) * HOUR_NS
    rows = np.array(hours, dtype=np.float64)[:, None, None]
    return CalibrationSet(
        vector=np.broadcast_to(rows, (len(hours), BLOCK_ROWS, features.N_FEATURES)).copy(),
        instrument=np.array([instrument] * len(hours)),
        first_seq=np.array(hours, dtype=np.int64),
        first_ns=last - 1,
        last_ns=last,
    )


def hours_of(blocks: CalibrationSet) -> list[int]:
    return (blocks.last_ns // HOUR_NS).tolist()


@given(
    st.lists(st.integers(1, 40), unique=True, max_size=25), st.integers(1, 12), st.integers(0, 9)
)
def test_the_set_is_bounded_in_order_of_time_and_repeats_change_nothing(
    hours: list[int], capacity: int, seed: int
) -> None:
    newer = blocks_at(hours)
    kept = mixed(no_blocks(), newer, capacity=capacity, seed=seed)
    assert len(kept) == min(capacity, len(hours))
    assert hours_of(kept) == sorted(set(hours_of(kept)))
    assert set(hours_of(kept)) <= set(hours)
    assert kept.vector[:, 0, 0].tolist() == hours_of(kept)
    again = mixed(kept, newer, capacity=capacity, seed=seed)
    assert hours_of(again) == hours_of(kept)
    # Block by block, as a growing tape brings them: the same set.
    grown = no_blocks()
    for hour in hours:
        grown = mixed(grown, blocks_at([hour]), capacity=capacity, seed=seed)
    assert hours_of(grown) == hours_of(kept)


def test_instruments_of_one_time_are_different_blocks() -> None:
    both = mixed(blocks_at([1, 2], "X.A"), blocks_at([1, 2], "X.LONGER"))
    assert both.instrument.tolist() == ["X.A", "X.LONGER"] * 2


def test_a_block_one_half_life_older_is_half_as_likely_to_be_kept() -> None:
    newer, older = blocks_at([24]), blocks_at([0])
    draws = 4_000
    kept = sum(
        hours_of(mixed(older, newer, capacity=1, half_life_ns=24 * HOUR_NS, seed=seed)) == [24]
        for seed in range(draws)
    )
    expected = draws * 2.0 / 3.0
    assert abs(kept - expected) < 5.0 * np.sqrt(expected / 3.0)


def test_what_is_written_is_read_and_the_same_set_is_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "sets" / "set.npz"
    assert len(load_calibration_set(path)) == 0
    for name in (path, tmp_path / "again.npz"):
        save_calibration_set(name, blocks_at([1, 2, 3]))
    found = load_calibration_set(path)
    assert hours_of(found) == [1, 2, 3]
    assert found.vector.tobytes() == blocks_at([1, 2, 3]).vector.tobytes()
    assert path.read_bytes() == (tmp_path / "again.npz").read_bytes()
    assert hours_of(found.before(3 * HOUR_NS)) == [1, 2]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_set(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "set.npz"
    save_calibration_set(path, blocks_at([1]))
    before = path.read_bytes()

    def crash(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, crash)
    with pytest.raises(InputError, match="No space left"):
        save_calibration_set(path, blocks_at([1, 2]))
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["set.npz"]


def arrays_of(blocks: CalibrationSet) -> dict[str, np.ndarray]:
    return vars(blocks) | {
        "format": np.array(1),
        "feature_schema": np.array(features.SCHEMA_HEX),
    }


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": np.array(2)}, "format 2"),
        ({"feature_schema": np.array("00" * 8)}, "other features"),
        ({"vector": np.zeros((2, 3, 4))}, "vector"),
        ({"last_ns": np.zeros(3)}, "damaged"),
        ({"vector": np.full((2, BLOCK_ROWS, features.N_FEATURES), np.nan)}, "not finite"),
        ({"first_seq": None}, "first_seq"),
    ],
)
def test_a_file_that_is_no_set_is_refused_by_name(
    change: dict[str, np.ndarray | None], told: str, tmp_path: Path
) -> None:
    arrays = {k: v for k, v in (arrays_of(blocks_at([1, 2])) | change).items() if v is not None}
    path = tmp_path / "set.npz"
    path.write_bytes(npz_bytes(arrays))
    with pytest.raises(InputError, match=told) as error:
        load_calibration_set(path)
    assert str(path) in error.value.where


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 cut short", b"not a zip"])
def test_a_damaged_file_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    path.write_bytes(data)
    with pytest.raises(InputError, match="no calibration set"):
        load_calibration_set(path)
