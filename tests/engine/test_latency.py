"""The latency histogram against numpy's quantiles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import latency

QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.9, 0.99, 0.999, 1.0)


def recorded(values: np.ndarray) -> np.ndarray:
    counts = latency.new_counts()
    for value in values:
        latency.record(counts, value)
    return counts


@given(st.integers(0, latency.OVERFLOW_NS - 1))
def test_every_value_lies_in_its_bucket(value: int) -> None:
    index = latency.bucket_of(value)
    low, after = latency.bucket_low(index), latency.bucket_low(index + 1)
    assert low <= value < after
    assert after - low <= max(1, low * latency.RELATIVE_ERROR)


def test_buckets_are_contiguous_and_in_order() -> None:
    lows = np.array([latency.bucket_low(index) for index in range(latency.BUCKETS)])
    assert (np.diff(lows) > 0).all()
    assert [latency.bucket_of(low) for low in lows] == list(range(latency.BUCKETS))
    assert lows[0] == 0
    assert lows[-1] == latency.OVERFLOW_NS


@given(st.lists(st.integers(0, 1 << 45), min_size=1, max_size=200))
def test_quantiles_are_numpys_within_the_resolution(values: list[int]) -> None:
    counts = recorded(np.array(values, dtype=np.int64))
    for q in QUANTILES:
        exact = int(np.quantile(values, q, method="inverted_cdf"))
        got = latency.quantile(counts, q)
        if exact < latency.OVERFLOW_NS:
            assert abs(got - exact) <= exact * latency.RELATIVE_ERROR
        else:
            assert got == max(values) or got >= latency.OVERFLOW_NS


def test_quantiles_of_a_long_tailed_sample() -> None:
    values = np.random.default_rng(7).lognormal(10.0, 2.0, 50_000).astype(np.int64)
    counts = recorded(values)
    for q in QUANTILES:
        exact = int(np.quantile(values, q, method="inverted_cdf"))
        assert latency.quantile(counts, q) == pytest.approx(exact, rel=latency.RELATIVE_ERROR)
    assert counts[latency.AT_SUM] == values.sum()
    assert counts[latency.AT_MAX] == values.max()
    assert latency.summary(counts)["mean_ns"] == values.sum() // len(values)


def test_an_empty_histogram_has_zeros() -> None:
    assert set(latency.summary(latency.new_counts()).values()) == {0}


def test_a_clock_that_ran_backwards_is_counted() -> None:
    counts = recorded(np.array([-5, 10], dtype=np.int64))
    assert counts[latency.AT_NEGATIVE] == 1
    assert counts[latency.AT_MIN] == 0
    assert counts[latency.AT_SUM] == 10


def test_merging_is_recording_both() -> None:
    first, second = np.arange(0, 5_000, 3), np.arange(1_000, 900_000, 77)
    merged = recorded(first)
    latency.merge(merged, recorded(second))
    assert (merged == recorded(np.concatenate([first, second]))).all()
    latency.clear(merged)
    assert (merged == latency.new_counts()).all()
