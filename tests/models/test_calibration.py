"""What a calibration set must be, what is kept of it, and how live rows are held against it."""

from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.feature_specs import N_FEATURES, NAMES
from feeds.errors import InputError
from models.calibration import (
    BINS,
    SMALLEST_SHARE,
    FeatureHistogram,
    check_rows,
)

CLIP = 4.0


def normal_rows(seed: int, n: int, n_features: int = 5, shift: float = 0.0) -> np.ndarray:
    """Normalised rows as the engine makes them."""
    x = np.random.default_rng(seed).normal(shift, 1.0, size=(n, n_features))
    return np.clip(x, -CLIP, CLIP).astype(np.float32)


def histogram_of(*batches: np.ndarray) -> FeatureHistogram:
    histogram = FeatureHistogram(batches[0].shape[1], CLIP)
    for batch in batches:
        histogram.update(batch)
    return histogram


# What is refused


def test_rows_that_vary_in_one_feature_will_do() -> None:
    rows = np.zeros((3, N_FEATURES), dtype=np.float32)
    rows[2, 7] = 1.0
    check_rows(rows, "calibration set")


@pytest.mark.parametrize("shape", [(0, N_FEATURES), (0, 0), (4, 0)])
def test_an_empty_set_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=r"x\.npz: empty calibration set") as error:
        check_rows(np.empty(shape), "x.npz")
    assert "--rows" in error.value.fix


@pytest.mark.parametrize("n", [1, 500])
def test_a_set_in_which_every_feature_is_constant_is_refused(n: int) -> None:
    rows = np.tile(normal_rows(0, 1, N_FEATURES), (n, 1))
    with pytest.raises(InputError, match=r"x\.npz: constant calibration set"):
        check_rows(rows, "x.npz")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named_by_row_and_feature(bad: float) -> None:
    rows = normal_rows(0, 40, N_FEATURES)
    rows[12, 41] = rows[30, 0] = bad
    with pytest.raises(InputError) as error:
        check_rows(rows, "x.npz")
    assert f"{bad} in row 12, {NAMES[41]}, and 1 more" in error.value.found


def test_features_of_another_catalogue_are_named_by_number() -> None:
    with pytest.raises(InputError, match="row 1, feature 2"):
        check_rows(np.array([[0.0, 1.0, 2.0], [0.0, 1.0, np.nan]]), "x.npz")


# How the rows are distributed


def test_the_memory_of_a_histogram_does_not_grow_with_the_rows() -> None:
    def peak(n_batches: int) -> int:
        rng = np.random.default_rng(0)
        tracemalloc.start()
        histogram = FeatureHistogram(8, CLIP)
        for _ in range(n_batches):
            rows = np.clip(rng.normal(size=(1_000, 8)), -CLIP, CLIP)
            histogram.update(rows)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert histogram.rows == 1_000 * n_batches
        return found

    assert peak(120) < peak(4) + 16_000, "120,000 rows need what 4,000 need"


@given(st.integers(0, 99), st.lists(st.integers(0, 30), min_size=1, max_size=5))
def test_counts_are_numpys_however_the_rows_are_batched(seed: int, sizes: list[int]) -> None:
    rows = normal_rows(seed, sum(sizes), 3)
    histogram = histogram_of(*np.split(rows, np.cumsum(sizes)))
    assert histogram.rows == len(rows)
    for j in range(3):
        counts, _ = np.histogram(rows[:, j].astype(np.float64), histogram.edges)
        assert histogram.counts[j].tolist() == counts.tolist()
        if len(rows):
            assert histogram.lowest[j] == rows[:, j].min()
            assert histogram.greatest[j] == rows[:, j].max()


def test_the_outermost_bins_take_the_clip_and_what_lies_beyond() -> None:
    histogram = histogram_of(np.array([[-9.0], [-CLIP], [0.0], [CLIP], [9.0]]))
    assert histogram.counts[0, [0, BINS // 2, BINS - 1]].tolist() == [2, 1, 2]


def test_a_histogram_refuses_what_is_not_finite() -> None:
    with pytest.raises(InputError, match="row 1, feature 0"):
        histogram_of(np.array([[0.0], [np.nan]]))


def test_merged_histograms_are_one_that_saw_everything() -> None:
    some, others = normal_rows(1, 300), normal_rows(2, 200)
    whole, merged = histogram_of(some, others), histogram_of(others)
    merged.merge(histogram_of(some))
    assert {k: v.tobytes() for k, v in merged.save().items()} == {
        k: v.tobytes() for k, v in whole.save().items()
    }


def test_a_histogram_survives_an_npz_file() -> None:
    histogram = histogram_of(normal_rows(3, 500))
    file = io.BytesIO()
    np.savez(file, rows=np.zeros(3), **histogram.save())  # type: ignore[arg-type]
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        loaded = FeatureHistogram.load(arrays, "calibration.npz")
    assert loaded.clip == CLIP
    assert loaded.counts.tolist() == histogram.counts.tolist()
    assert loaded.psi(histogram).tolist() == [0.0] * 5
    loaded.update(normal_rows(4, 10))
    assert loaded.rows == histogram.rows + 10


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("counts", None),
        ("clip", None),
        ("counts", np.zeros((5, BINS + 1), dtype=np.int64)),
        ("counts", np.zeros((5, BINS))),
        ("counts", np.full((5, BINS), -1)),
        ("lowest", np.zeros(4)),
        ("clip", np.zeros(2)),
    ],
)
def test_a_damaged_histogram_is_refused(key: str, value: np.ndarray | None) -> None:
    arrays = histogram_of(normal_rows(3, 500)).save()
    if value is None:
        del arrays[key]
    else:
        arrays[key] = value
    with pytest.raises(InputError, match=r"calibration\.npz: no feature histogram"):
        FeatureHistogram.load(arrays, "calibration.npz")


# Live rows against it


def test_the_stability_index_is_its_formula() -> None:
    one, other = histogram_of(normal_rows(5, 900)), histogram_of(normal_rows(6, 700, shift=0.3))
    plain = []
    for j in range(5):
        total = 0.0
        for k in range(BINS):
            p = max(int(one.counts[j, k]) / 900, SMALLEST_SHARE)
            q = max(int(other.counts[j, k]) / 700, SMALLEST_SHARE)
            total += (q - p) * float(np.log(q / p))
        plain.append(total)
    np.testing.assert_allclose(one.psi(other), plain)
    np.testing.assert_allclose(other.psi(one), plain)


def test_the_stability_index_tells_a_shift_from_chance() -> None:
    reference = histogram_of(normal_rows(7, 20_000))
    again = normal_rows(8, 20_000)
    assert reference.psi(histogram_of(again)).max() < 0.02
    again[:, 2] = np.clip(again[:, 2] + 1.0, -CLIP, CLIP)
    shifted = reference.psi(histogram_of(again))
    assert shifted[2] > 0.5
    assert np.delete(shifted, 2).max() < 0.02


def test_a_constant_feature_far_away_costs_something_finite() -> None:
    here, there = np.zeros((100, 1)), np.full((100, 1), 3.0)
    index = histogram_of(here).psi(histogram_of(there))
    assert np.isfinite(index).all()
    assert index[0] > 10.0


def test_nothing_cannot_be_compared() -> None:
    empty, full = FeatureHistogram(5, CLIP), histogram_of(normal_rows(1, 10))
    for one, other in ((empty, full), (full, empty)):
        with pytest.raises(InputError, match="nothing to compare"):
            one.psi(other)
    with pytest.raises(InputError, match="nothing to compare"):
        full.coverage(np.empty((0, 5)))


def test_coverage_is_the_share_within_what_calibration_saw() -> None:
    histogram = histogram_of(np.array([[-1.0, 0.0], [1.0, 0.5]]))
    live = np.array([[0.0, 0.2], [1.0, 0.0], [1.1, 0.5], [-2.0, 0.6], [np.nan, 0.1]])
    coverage = histogram.coverage(live)
    assert coverage.of_feature.tolist() == [0.4, 0.8]
    assert coverage.values == pytest.approx(0.6)
    assert coverage.rows == 0.4


@given(st.integers(0, 99), st.integers(1, 50))
def test_calibration_rows_cover_themselves_and_nothing_covers_without_any(
    seed: int, n: int
) -> None:
    rows = normal_rows(seed, n)
    coverage = histogram_of(rows).coverage(rows)
    assert (coverage.values, coverage.rows) == (1.0, 1.0)
    assert FeatureHistogram(5, CLIP).coverage(rows).values == 0.0
