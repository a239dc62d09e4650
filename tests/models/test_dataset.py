"""Splitting, normalising and labelling rows; and rows as the pipeline makes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import features
from feeds.simulator import Simulator
from models.dataset import Normalisation, Rows, collect, time_split


def rows_of(slots: list[int], mids: list[int]) -> Rows:
    """Rows with nothing in their features."""
    n = len(slots)
    return Rows(
        np.zeros((n, 1)),
        np.array(slots),
        np.array(mids, dtype=np.int64),
        np.arange(n) * 10,
        np.arange(n),
    )


def test_a_label_looks_ahead_in_its_own_instrument_only() -> None:
    rows = rows_of([0, 1, 0, 1, 0, 1], [10, 500, 12, 400, 15, 300])
    numbers, moves = rows.moves(1)
    assert numbers.tolist() == [0, 1, 2, 3]
    assert moves.tolist() == [2, -100, 3, -100]


@given(
    st.lists(st.integers(0, 1_000), min_size=2, max_size=80).map(sorted),
    st.floats(0.05, 0.95),
    st.integers(0, 300),
)
def test_no_test_row_lies_within_the_embargo(
    times: list[int], share: float, embargo_ns: int
) -> None:
    time_ns = np.array(times, dtype=np.int64)
    split = time_split(np.arange(len(times)), time_ns, share, embargo_ns)
    assert len(split.train) == int(len(times) * share)
    if len(split.train) and len(split.test):
        assert time_ns[split.test].min() > time_ns[split.train].max() + embargo_ns
    kept = set(split.train) | set(split.test)
    if len(split.train):
        last = time_ns[split.train].max()
        assert all(i in kept or last <= time_ns[i] <= last + embargo_ns for i in range(len(times)))


def test_normalising_centres_scales_clips_and_leaves_constants_alone() -> None:
    rng = np.random.default_rng(0)
    vector = np.column_stack(
        [rng.normal(5.0, 3.0, 10_000), np.full(10_000, 7.0), rng.normal(0, 1e-7, 10_000)]
    )
    normalisation = Normalisation.fit(vector, 4.0)
    x = normalisation.apply(vector)
    assert x.dtype == np.float32
    assert abs(x[:, 0].mean()) < 0.01
    assert abs(x[:, 0].std() - 1.0) < 0.01
    assert np.all(x[:, 1] == 0.0)
    assert np.isfinite(normalisation.inv_scale).all()
    assert np.abs(normalisation.apply(vector * 1e9)).max() == 4.0


@pytest.fixture(scope="module")
def market_rows() -> Rows:
    """Rows of a short session."""
    market = Simulator(seed=11, n_instruments=2)
    return collect(market.chunks(12_000), market.instruments, max_levels=512)


def test_rows_are_finite_warm_and_in_time_order(market_rows: Rows) -> None:
    assert len(market_rows) > 1_000
    assert market_rows.vector.shape == (len(market_rows), features.N_FEATURES)
    assert np.isfinite(market_rows.vector).all()
    assert np.all(np.diff(market_rows.time_ns) >= 0)
    assert set(market_rows.slot) == {0, 1}


def test_chunk_size_changes_nothing(market_rows: Rows) -> None:
    market = Simulator(seed=11, n_instruments=2)
    chunks = market.chunks(12_000, chunk_bytes=40_000)
    again = collect(chunks, market.instruments, max_levels=512)
    assert again.vector.tobytes() == market_rows.vector.tobytes()
    assert again.last_seq.tobytes() == market_rows.last_seq.tobytes()


def test_mids_are_the_simulators_own(market_rows: Rows, tmp_path: Path) -> None:
    market = Simulator(seed=11, n_instruments=2)
    truth = market.write_tape(tmp_path / "truth.tape", 12_000, truth=True)
    mids = {
        (int(row["instrument_id"]), int(row["seq"])): int(row["mid_half_ticks"]) for row in truth
    }
    # ALPHA and BETA: slots are in order of name, as instrument ids are here.
    keys = zip(market_rows.slot.tolist(), market_rows.last_seq.tolist(), strict=True)
    assert [mids[key] for key in keys] == market_rows.mid_half_ticks.tolist()
