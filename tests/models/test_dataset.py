"""Normalising rows, and rows as the pipeline makes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine import features
from feeds.simulator import Simulator
from models.dataset import Normalisation, Rows, collect, joined


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


def test_every_instruments_stream_starts_once_and_rows_can_be_sorted(market_rows: Rows) -> None:
    assert market_rows.starts.sum() == 2
    ordered = market_rows.by_instrument()
    assert np.flatnonzero(ordered.starts).tolist() == [0, int((ordered.slot == 0).sum())]
    for slot in (0, 1):
        own = ordered.slot == slot
        assert np.all(np.diff(ordered.last_seq[own]) > 0)
        assert (
            ordered.vector[own].tobytes() == market_rows.vector[market_rows.slot == slot].tobytes()
        )


def test_the_spread_is_what_the_touch_says(market_rows: Rows) -> None:
    assert market_rows.spread_ticks.min() >= 1
    assert np.all((market_rows.mid_half_ticks + market_rows.spread_ticks) % 2 == 0)


def test_sessions_follow_one_another(market_rows: Rows) -> None:
    both = joined([market_rows, market_rows])
    assert len(both) == 2 * len(market_rows)
    assert both.starts.sum() == 4
