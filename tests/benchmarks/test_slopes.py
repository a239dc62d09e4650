"""Slopes and their intervals on series whose slope is known."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.slopes import block_medians, drift, student_t, theil_sen

N = 60
HOURS = np.linspace(0.0, 1.0, N)
SERIES = 400


def heavy(rng: np.random.Generator, n: int = N) -> np.ndarray:
    """A tail like that of p99.9 on a busy host: Student's t with 1.5 degrees of freedom."""
    return rng.standard_t(1.5, n)


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(5, 2.571), (7, 2.365), (10, 2.228), (30, 2.042), (120, 1.980)]
)
def test_quantiles_of_students_t_are_those_of_the_tables(degrees: int, quantile: float) -> None:
    assert student_t(0.975, degrees) == pytest.approx(quantile, rel=1e-3)
    assert student_t(0.025, degrees) == pytest.approx(-quantile, rel=1e-3)


@pytest.mark.parametrize("estimate", [drift, theil_sen])
def test_an_exact_line_gives_its_slope(estimate) -> None:  # type: ignore[no-untyped-def]
    found = estimate(2 * HOURS, 5.0 + 3.0 * HOURS)
    assert found.value == pytest.approx(1.5)
    assert found.low == pytest.approx(1.5)
    assert found.high == pytest.approx(1.5)
    assert not found.zero
    level = estimate(HOURS, np.full(N, 5.0))
    assert level.value == level.low == level.high == 0.0
    assert level.zero


def test_intervals_hold_the_true_drift_of_random_walks_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(SERIES):
        found = drift(HOURS, np.cumsum(rng.normal(0.5 / (N - 1), 0.1, N)))
        held += found.low <= 0.5 <= found.high
    assert held / SERIES == pytest.approx(0.95, abs=0.035)


def test_intervals_hold_the_true_slope_under_heavy_tails_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(SERIES):
        found = theil_sen(HOURS, 40.0 * HOURS + heavy(rng))
        held += found.low <= 40.0 <= found.high
    assert held / SERIES == pytest.approx(0.95, abs=0.035)


def test_a_step_of_an_allocator_is_no_trend_and_a_leak_is() -> None:
    step = np.where(HOURS > 0.4, 131.5, 130.0)
    assert drift(HOURS, step).zero
    page = np.full(N, 4096 / 1e6)
    page[::3] = 0.0  # a page in two windows of three
    found = drift(HOURS, 130.0 + np.cumsum(page))
    assert not found.zero
    assert found.value == pytest.approx(N * 4096 / 1e6 * 2 / 3, rel=0.05)
    assert drift(HOURS, 130.0 + 0.3 * (np.arange(N) % 4)).zero  # a saw


def test_wild_windows_neither_make_a_slope_nor_hide_one() -> None:
    rng = np.random.default_rng(3)
    tail = 50.0 + rng.normal(0.0, 1.0, N)
    wild = tail.copy()
    wild[4::9] *= 200.0
    assert theil_sen(HOURS, wild).zero
    creeping = theil_sen(HOURS, wild + 20.0 * HOURS)
    assert not creeping.zero
    assert creeping.low > 0.0


def test_medians_of_blocks_see_through_a_busy_spell() -> None:
    """Neighbouring windows that resemble each other are no evidence each."""
    rng = np.random.default_rng(4)
    alone, blocked = 0, 0
    for _ in range(SERIES):
        noise = np.zeros(N)
        for k in range(1, N):
            noise[k] = 0.6 * noise[k - 1] + rng.normal()
        alone += not theil_sen(HOURS, noise).zero
        blocked += not theil_sen(*block_medians(HOURS, noise, 12)).zero
    assert blocked < 0.6 * alone
    assert blocked / SERIES < 0.12
    times, values = block_medians(HOURS, 8.0 * HOURS, 12)
    assert len(times) == len(values) == 12
    assert theil_sen(times, values).value == pytest.approx(8.0)
