"""Every observer against what plain arithmetic over all the values at once says."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feeds.errors import InputError
from models.histogram import SIDE_BINS, Histogram
from models.observers import (
    AVERAGING,
    LEVELS,
    OBSERVERS,
    SHRINKS,
    TAILS,
    HistogramObserver,
    Observer,
    divergence,
    make_observer,
    squared_error_integral,
)
from models.scheme import Point, point_for

KINDS = tuple(OBSERVERS)
ORDERLESS = tuple(kind for kind in KINDS if kind != "moving-average")
HISTOGRAMS = tuple(kind for kind in ORDERLESS if kind != "minmax")
CHOOSING = ("entropy", "mse")

value = st.floats(-1e6, 1e6, width=32)
values = st.lists(value, min_size=1, max_size=60).map(np.array)
batches = st.lists(st.lists(value, max_size=20).map(np.array), min_size=1, max_size=8)


def observer_of(kind: str, *seen: np.ndarray, **rules: bool) -> Observer:
    """An observer that has seen some batches."""
    observer = make_observer(kind, "point", **rules)
    for batch in seen:
        observer.update(batch)
    return observer


def histogram_of(*seen: np.ndarray) -> Histogram:
    histogram = Histogram()
    for batch in seen:
        histogram.update(np.asarray(batch, dtype=np.float64))
    return histogram


def samples(seed: int, n: int = 40_000) -> dict[str, np.ndarray]:
    """Activations of the shapes that networks have."""
    rng = np.random.default_rng(seed)
    return {
        "relu": np.maximum(rng.normal(size=n), 0.0),
        "exponential": rng.exponential(size=n),
        "uniform": rng.random(n),
        "normal": rng.normal(size=n),
        "heavy": rng.standard_t(3, size=n),
        "leaky": np.maximum(rng.normal(size=n), 0.1 * rng.normal(size=n)),
        "skew": rng.exponential(size=n) - 0.3,
        "negative": -rng.exponential(size=n),
    }


SAMPLES = tuple(samples(0, 1))


# The histogram


@given(batches)
@settings(deadline=None)
def test_counts_are_those_of_numpy_over_all_values_at_once(seen: list[np.ndarray]) -> None:
    histogram, everything = histogram_of(*seen), np.concatenate(seen)
    assert histogram.counts.sum() == len(everything)
    assert histogram.zeros == np.count_nonzero(everything == 0.0)
    assert histogram.lowest == min(0.0, everything.min(initial=0.0))
    assert histogram.greatest == max(0.0, everything.max(initial=0.0))
    if histogram.exponent is None:
        assert not everything.any()
        return
    top = 2.0**histogram.exponent
    assert top / 2.0 <= np.abs(everything).max() < top
    edges = np.linspace(-top, top, 2 * SIDE_BINS + 1)
    assert histogram.counts.tolist() == np.histogram(everything, edges)[0].tolist()


@given(batches, batches)
@settings(deadline=None)
def test_merged_histograms_are_one_that_saw_everything(
    some: list[np.ndarray], others: list[np.ndarray]
) -> None:
    whole = histogram_of(*some, *others)
    for first, second in ((some, others), (others, some)):
        merged = histogram_of(*first)
        merged.merge(histogram_of(*second))
        assert merged.counts.tolist() == whole.counts.tolist()
        assert (merged.exponent, merged.zeros) == (whole.exponent, whole.zeros)
        assert (merged.lowest, merged.greatest) == (whole.lowest, whole.greatest)


def test_a_value_far_beyond_the_range_loses_nothing() -> None:
    histogram = histogram_of(np.array([-1e-30, 1e-30, 0.0]), np.array([1e30]))
    assert histogram.counts.sum() == 4
    assert histogram.counts[SIDE_BINS - 1] == 1
    assert histogram.counts[SIDE_BINS] == 2


@given(values, st.floats(-1e6, 0.0), st.floats(0.0, 1e6))
@settings(deadline=None)
def test_the_share_outside_is_right_to_the_values_of_two_bins(
    seen: np.ndarray, low: float, high: float
) -> None:
    histogram = histogram_of(seen)
    exact = ((seen < low) | (seen > high)).mean()
    near = np.zeros(len(seen), dtype=bool)
    for end in (low, high):
        near |= np.abs(seen - end) <= histogram.width
    assert abs(histogram.outside(low, high) - exact) <= near.mean() + 1e-9


# What all kinds share


@pytest.mark.parametrize("kind", KINDS)
@given(seen=batches)
@settings(max_examples=25, deadline=None)
def test_a_range_holds_zero_and_lies_within_the_extremes(kind: str, seen: list[np.ndarray]) -> None:
    observer, everything = observer_of(kind, *seen), np.concatenate(seen)
    low, high = observer.range()
    assert type(low) is type(high) is float
    assert min(0.0, everything.min(initial=0.0)) <= low <= 0.0
    assert 0.0 <= high <= max(0.0, everything.max(initial=0.0))
    assert observer.observed == len(everything)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seen", [[], [np.zeros((0, 3))], [np.zeros((2, 3))], [np.array([-0.0])]])
def test_nothing_and_nothing_but_zeros_have_no_range(kind: str, seen: list[np.ndarray]) -> None:
    for power_of_two in (False, True):
        assert observer_of(kind, *seen, power_of_two=power_of_two).range() == (0.0, 0.0)


@pytest.mark.parametrize("kind", ORDERLESS)
@given(seen=batches, others=batches)
@settings(max_examples=15, deadline=None)
def test_neither_batching_nor_merging_nor_their_order_changes_a_range(
    kind: str, seen: list[np.ndarray], others: list[np.ndarray]
) -> None:
    whole = observer_of(kind, np.concatenate([*seen, *others]))
    for first, second in ((seen, others), (others, seen)):
        merged = observer_of(kind, *first)
        merged.range()  # what was worked out before must not be kept
        merged.merge(observer_of(kind, *second))
        assert merged.range() == whole.range()
        assert merged.observed == whole.observed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_and_changes_nothing(kind: str, bad: float) -> None:
    observer = make_observer(kind, "lstm.hidden")
    observer.update(np.array([[1.0, 2.0]]))
    batch = np.zeros((4, 3), dtype=np.float32)
    batch[2, 1] = bad
    with pytest.raises(InputError, match=r"lstm\.hidden: .*\(2, 1\)"):
        observer.update(batch)
    assert observer.observed == 2
    assert observer.range()[1] <= 2.0


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"--observer maximum: .*minmax, moving-average"):
        make_observer("maximum", "point")


def test_two_kinds_do_not_merge() -> None:
    with pytest.raises(AssertionError, match="two kinds"):
        make_observer("entropy", "point").merge(make_observer("mse", "point"))


@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_the_rows(kind: str) -> None:
    def peak(n_batches: int) -> int:
        rng = np.random.default_rng(1)
        observer = make_observer(kind, "point")
        tracemalloc.start()
        for _ in range(n_batches):
            observer.update(rng.normal(size=(1_000, 16)).astype(np.float32))
        observer.range()
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert observer.observed == n_batches * 16_000
        return found

    peak(1)  # what is allocated once and kept
    few, many = peak(4), peak(120)
    assert many < few + 64_000, "120,000 rows need what 4,000 need"
    assert many < 4_000_000


# Extremes and averages


@given(batches)
@settings(deadline=None)
def test_minmax_is_the_extremes(seen: list[np.ndarray]) -> None:
    everything = np.concatenate([np.zeros(1), *seen])
    assert observer_of("minmax", *seen).range() == (everything.min(), everything.max())


@given(batches)
@settings(deadline=None)
def test_a_moving_average_weighs_recent_batches_more(seen: list[np.ndarray]) -> None:
    extremes = [(min(0.0, b.min()), max(0.0, b.max())) for b in seen if len(b)]
    weights = np.array([(1.0 - AVERAGING) ** (len(extremes) - 1 - i) for i in range(len(extremes))])
    plain = weights @ np.array(extremes) / weights.sum() if extremes else (0.0, 0.0)
    found = observer_of("moving-average", *seen).range()
    np.testing.assert_allclose(found, plain, rtol=1e-9, atol=1e-9)


def test_merging_moving_averages_takes_both_in_either_order() -> None:
    some, others = np.array([-1.0, 4.0]), np.array([-3.0, 2.0])
    for first, second in ((some, others), (others, some)):
        observer = observer_of("moving-average", first)
        observer.merge(observer_of("moving-average", second))
        np.testing.assert_allclose(observer.range(), (-2.0, 3.0))


# Percentiles


@pytest.mark.parametrize("kind", TAILS)
@given(seen=values)
@settings(deadline=None)
def test_a_percentile_is_the_exact_order_statistic_within_a_bin(
    kind: str, seen: np.ndarray
) -> None:
    observer = observer_of(kind, seen)
    assert isinstance(observer, HistogramObserver)
    two_sided = seen.min() < 0.0 < seen.max()
    cut = len(seen) * TAILS[kind] // (20_000 if two_sided else 10_000)
    ordered = np.sort(seen)
    exact = min(0.0, ordered[cut]), max(0.0, ordered[len(seen) - 1 - cut])
    found = observer.range()
    assert np.abs(np.subtract(found, exact)).max() <= observer.histogram.width
    assert found[0] <= exact[0]
    assert exact[1] <= found[1]
    assert observer.saturated(*found) <= TAILS[kind] / 10_000


@pytest.mark.parametrize("kind", TAILS)
@pytest.mark.parametrize("shape", SAMPLES)
def test_a_percentile_agrees_with_numpys(kind: str, shape: str) -> None:
    seen = samples(5, 100_000)[shape]
    tail = TAILS[kind] / 100.0
    sides = 2.0 if seen.min() < 0.0 < seen.max() else 1.0
    exact = np.percentile(seen, [tail / sides, 100.0 - tail / sides])
    observer = observer_of(kind, *np.array_split(seen, 7))
    assert isinstance(observer, HistogramObserver)
    low, high = observer.range()
    width = observer.histogram.width
    assert abs(low - min(0.0, exact[0])) <= 2.0 * width if seen.min() < 0.0 else low == 0.0
    assert abs(high - max(0.0, exact[1])) <= 2.0 * width if seen.max() > 0.0 else high == 0.0


# Entropy


def plain_divergence(inside: list[float], below: float, above: float) -> float:
    """Migacz's slides, line by line."""
    n = len(inside)
    reference = list(inside)
    reference[0] += below
    reference[-1] += above
    candidate = [0.0] * n
    for level in range(LEVELS):
        own = [j for j in range(n) if j * LEVELS // n == level]
        live = [j for j in own if reference[j] > 0.0]
        for j in live:
            candidate[j] = sum(inside[k] for k in own) / len(live)
    p_sum, q_sum = sum(reference), sum(candidate)
    return sum(
        p / p_sum * math.log(p / p_sum / max(q / q_sum, 1e-9))
        for p, q in zip(reference, candidate, strict=True)
        if p > 0.0
    )


@given(
    st.lists(st.integers(0, 5), min_size=LEVELS, max_size=LEVELS + 200).filter(any),
    st.integers(0, 20),
    st.integers(0, 20),
)
@settings(deadline=None, max_examples=40)
def test_divergence_is_that_of_the_source(counts: list[int], below: int, above: int) -> None:
    inside = [float(count) for count in counts]
    found = divergence(np.array(inside), below, above)
    assert found == pytest.approx(plain_divergence(inside, below, above), abs=1e-9)
    assert found >= -1e-12


def test_entropy_keeps_all_of_a_uniform_range_and_clips_a_lone_outlier() -> None:
    uniform = samples(2)["uniform"]
    low, high = observer_of("entropy", uniform).range()
    assert (low, high) == (0.0, uniform.max())
    assert observer_of("entropy", np.append(uniform, 6.0)).range()[1] < 1.1
    both = np.concatenate([uniform, -uniform, [-6.0, 6.0]])
    low, high = observer_of("entropy", both).range()
    assert -1.1 < low < -0.99
    assert 0.99 < high < 1.1


def test_zeros_do_not_sway_entropy_or_mse() -> None:
    seen = samples(3)["exponential"]
    for kind in CHOOSING:
        with_zeros = observer_of(kind, seen, np.zeros(10 * len(seen)))
        assert with_zeros.range() == observer_of(kind, seen).range()


# Squared error


def plain_error(seen: np.ndarray, point: Point) -> float:
    """Mean squared error of quantising the values themselves."""
    codes = np.clip(np.rint(seen / point.scale) + point.zero_point, 0, 255)
    return float(np.square((codes - point.zero_point) * point.scale - seen).mean())


def point_of(low: float, high: float, *, symmetric: bool, rule: str = "free") -> Point:
    kind = "signed" if low < 0.0 else "positive"
    return point_for(kind, low, high, rule, symmetric=symmetric, clip=1.0)  # type: ignore[arg-type]


@given(st.floats(-40.0, 40.0), st.floats(0.05, 3.0), st.integers(0, 255), st.floats(0.01, 30.0))
@settings(deadline=None)
def test_the_integral_of_the_squared_error_is_that_of_its_sum(
    start: float, scale: float, zero_point: int, length: float
) -> None:
    ends = np.array([start, start + length])
    exact = float(np.diff(squared_error_integral(ends, scale, zero_point))[0])
    grid = start + length * (np.arange(40_000) + 0.5) / 40_000
    plain = plain_error(grid, Point(scale, zero_point)) * length
    assert exact == pytest.approx(plain, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", SAMPLES)
def test_no_shrunk_range_has_a_smaller_error_than_mse_finds(shape: str, symmetric: bool) -> None:
    seen = samples(7)[shape]
    found = observer_of("mse", *np.array_split(seen, 3), symmetric=symmetric).range()
    error = plain_error(seen, point_of(*found, symmetric=symmetric))
    low, high = min(0.0, seen.min()), max(0.0, seen.max())
    for a in SHRINKS[:48:6]:
        for b in SHRINKS[:48:6]:
            other = plain_error(seen, point_of(low * a, high * b, symmetric=symmetric))
            assert error <= 1.02 * other, (a, b)


def test_mse_gives_up_a_heavy_tail() -> None:
    seen = samples(8)["heavy"]
    errors = {
        kind: plain_error(seen, point_of(*observer_of(kind, seen).range(), symmetric=False))
        for kind in ("minmax", "mse")
    }
    assert errors["mse"] < 0.95 * errors["minmax"]


# Power-of-two scales


@pytest.mark.parametrize("kind", CHOOSING)
@pytest.mark.parametrize("shape", SAMPLES)
@pytest.mark.parametrize("factor", [1e-3, 1.0, 300.0])
def test_a_power_of_two_range_is_exactly_what_such_a_scale_holds(
    kind: str, shape: str, factor: float
) -> None:
    seen = samples(9)[shape] * factor
    low, high = observer_of(kind, seen, power_of_two=True).range()
    scale = high / (127 if seen.min() < 0.0 else 255)
    assert math.frexp(scale)[0] == 0.5
    assert low == (-128 * scale if seen.min() < 0.0 else 0.0)
    assert point_of(low, high, symmetric=True, rule="power-of-two").scale == scale


@pytest.mark.parametrize("shape", SAMPLES)
def test_of_the_power_of_two_scales_mse_finds_the_best(shape: str) -> None:
    seen = samples(10)[shape]
    _, high = observer_of("mse", seen, power_of_two=True).range()
    zero_point = 128 if seen.min() < 0.0 else 0
    scale = high / (255 - zero_point)
    errors = {k: plain_error(seen, Point(scale * 2.0**k, zero_point)) for k in range(-4, 5)}
    assert errors[0] <= 1.01 * min(errors.values())
