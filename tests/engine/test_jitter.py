"""The host-jitter control, on a clock that we script."""

from __future__ import annotations

import itertools

import pytest

from engine.jitter import measure_jitter


def test_gaps_are_those_of_the_clock() -> None:
    gaps = [100] * 990 + [20_000] * 9 + [5_000_000]
    readings = itertools.accumulate(itertools.chain([0], itertools.cycle(gaps)))
    seconds = sum(gaps) * 10 / 1e9
    jitter = measure_jitter(seconds, clock=lambda: next(readings))
    assert jitter.readings == 10_000
    assert jitter.p50_ns == 100
    assert jitter.p99_ns == 100
    assert jitter.p999_ns == pytest.approx(20_000, rel=1 / 128)
    assert jitter.max_ns == 5_000_000


def test_on_the_real_clock_the_quantiles_are_in_order() -> None:
    jitter = measure_jitter(0.02)
    assert 0 < jitter.p50_ns <= jitter.p99_ns <= jitter.p999_ns <= jitter.max_ns
    assert jitter.readings > 0
    assert jitter.preempted >= 0
