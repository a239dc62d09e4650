"""The drift monitor finds what changed, tells it once, and keeps still otherwise."""

from __future__ import annotations

import copy
import math

import msgspec
import numpy as np
import pytest

from engine.calibration_distance import CalibrationDistance
from engine.change_chart import ChangeChart, student_limit
from engine.divergence import BATCH_ROWS, JUDGED_BATCHES, LEARN_BATCHES, DivergenceWatch
from engine.drift import DISTANCE_WINDOWS, DIVERGENCE, DriftAlert, DriftConfig, DriftMonitor
from feeds.errors import InputError
from models.calibration import FeatureHistogram

NAMES = ("slow", "fast", "steps", "constant")
LAYERS = ("hidden", "output")
CLIP = 4.0
WINDOW = 64
CONFIG = DriftConfig(every_rows=1, window_rows=WINDOW, rungs=4, learn_windows=8)
USUAL = 0.03  # divergence
CALM_ROWS = 12_800
SHIFTED_ROWS = 6_400


def market_rows(n: int, seed: int = 0) -> np.ndarray:
    """Normalised inputs: one strongly autocorrelated, one not, one discrete, one constant."""
    rng = np.random.default_rng(seed)
    rows = np.zeros((n, len(NAMES)))
    keep = 0.98
    noise = rng.standard_normal(n) * math.sqrt(1.0 - keep * keep)
    value = rng.standard_normal()
    for i in range(n):
        value = keep * value + noise[i]
        rows[i, 0] = value
    rows[:, 1] = rng.standard_normal(n)
    rows[:, 2] = rng.choice([-1.0, 0.0, 1.5], n, p=[0.3, 0.5, 0.2])
    return np.clip(rows, -CLIP, CLIP).astype(np.float32)


def divergences(n: int, seed: int = 0) -> np.ndarray:
    return USUAL * np.random.default_rng(seed).uniform(0.5, 1.5, n)


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    histogram = FeatureHistogram(len(NAMES), CLIP)
    histogram.update(market_rows(100_000, seed=9))
    return histogram.save()


def run(
    monitor: DriftMonitor, rows: np.ndarray, divergence: np.ndarray | None = None
) -> list[DriftAlert]:
    errors = divergences(len(rows)) if divergence is None else divergence
    found = []
    for row, error in zip(rows, errors.tolist(), strict=True):
        found += monitor.observe(row, error, None)
    return found


def learnt(reference: dict[str, np.ndarray]) -> DriftMonitor:
    """A monitor that has seen enough to judge and has nothing to tell."""
    monitor = DriftMonitor(CONFIG, NAMES, reference, LAYERS)
    assert run(monitor, market_rows(CALM_ROWS, seed=1)) == []
    return monitor


@pytest.fixture(scope="module")
def calm(reference: dict[str, np.ndarray]) -> DriftMonitor:
    return learnt(reference)


def shifted(rows: np.ndarray, shift: float, feature: int | None = None) -> np.ndarray:
    moved = rows.copy()
    columns = slice(None) if feature is None else feature
    moved[:, columns] = np.clip(moved[:, columns] + np.float32(shift), -CLIP, CLIP)
    return moved


def test_rows_like_the_calibration_set_alarm_nobody(reference: dict[str, np.ndarray]) -> None:
    for seed in (2, 3):
        monitor = DriftMonitor(CONFIG, NAMES, reference)
        assert run(monitor, market_rows(40_000, seed)) == []
        assert monitor.state()["alerts"] == 0


@pytest.mark.parametrize("shift", [0.5, 1.0, -1.0])
def test_a_shift_of_every_input_is_told_once_for_each(calm: DriftMonitor, shift: float) -> None:
    monitor = copy.deepcopy(calm)
    alerts = run(monitor, shifted(market_rows(SHIFTED_ROWS, seed=4), shift))
    subjects = [alert.subject for alert in alerts]
    assert len(subjects) == len(set(subjects))
    assert {"fast", "steps", "constant"} <= set(subjects)
    assert all(alert.kind == "input" and alert.value > alert.threshold for alert in alerts)
    assert all(CALM_ROWS < alert.rows <= CALM_ROWS + SHIFTED_ROWS for alert in alerts)


def test_a_greater_shift_is_found_no_later(calm: DriftMonitor) -> None:
    delays = []
    for shift in (0.4, 0.8, 1.6):
        alerts = run(copy.deepcopy(calm), shifted(market_rows(SHIFTED_ROWS, seed=4), shift, 1))
        assert [alert.subject for alert in alerts] == ["fast"]
        delays.append(alerts[0].rows - CALM_ROWS)
    assert delays == sorted(delays, reverse=True)


def test_a_feature_is_judged_by_itself(calm: DriftMonitor) -> None:
    rows = market_rows(SHIFTED_ROWS, seed=5)
    together = run(copy.deepcopy(calm), shifted(rows, 0.75))
    for i, name in enumerate(NAMES):
        alone = run(copy.deepcopy(calm), shifted(rows, 0.75, i))
        assert alone == [alert for alert in together if alert.subject == name]


def test_an_autocorrelated_input_may_move_more(calm: DriftMonitor) -> None:
    limits = calm._inputs.rungs[0].limit
    assert limits[0] > 2.0 * limits[1]


def test_a_constant_input_alarms_as_soon_as_it_moves(calm: DriftMonitor) -> None:
    monitor = copy.deepcopy(calm)
    alerts = run(monitor, shifted(market_rows(WINDOW, seed=6), 0.25, 3))
    assert [(alert.subject, alert.statistic) for alert in alerts] == [("constant", "MEAN")]


def test_a_change_too_small_to_matter_is_none(calm: DriftMonitor) -> None:
    assert run(copy.deepcopy(calm), shifted(market_rows(SHIFTED_ROWS, seed=6), 0.05, 3)) == []


def test_an_alarm_is_told_again_only_after_it_had_ended(calm: DriftMonitor) -> None:
    monitor = copy.deepcopy(calm)
    rows = market_rows(3 * SHIFTED_ROWS, seed=7)
    moved = shifted(rows, 1.0, 1)
    first = run(monitor, moved[:SHIFTED_ROWS])
    assert [alert.subject for alert in first] == ["fast"]
    assert run(monitor, moved[SHIFTED_ROWS : 2 * SHIFTED_ROWS]) == []
    assert monitor.state()["alarms"] == 1
    assert run(monitor, rows[2 * SHIFTED_ROWS :]) == []
    assert monitor.state()["alarms"] == 0
    assert [alert.subject for alert in run(monitor, moved[:SHIFTED_ROWS])] == ["fast"]


def test_what_lies_elsewhere_from_the_first_row_on_is_told_too(
    reference: dict[str, np.ndarray],
) -> None:
    monitor = DriftMonitor(CONFIG, NAMES, reference)
    alerts = run(monitor, shifted(market_rows(DISTANCE_WINDOWS * WINDOW, seed=8), 2.0))
    assert {alert.subject for alert in alerts} == set(NAMES)
    assert {alert.statistic for alert in alerts} == {"KS"}


def test_the_same_rows_give_the_same_alerts(reference: dict[str, np.ndarray]) -> None:
    rows = np.concatenate(
        [market_rows(CALM_ROWS, 1), shifted(market_rows(SHIFTED_ROWS, seed=4), 0.5)]
    )
    runs = []
    for _ in range(2):
        monitor = DriftMonitor(CONFIG, NAMES, reference)
        runs.append((run(monitor, rows), monitor.state()))
    assert runs[0] == runs[1]
    assert runs[0][0]


def test_it_is_known_how_many_rows_raise_no_alert(reference: dict[str, np.ndarray]) -> None:
    monitor = DriftMonitor(CONFIG, NAMES, reference)
    rows = market_rows(CALM_ROWS + SHIFTED_ROWS, seed=1)
    rows[CALM_ROWS:] = shifted(rows[CALM_ROWS:], 2.0)
    errors = divergences(len(rows))
    errors[::7] = np.nan
    errors[CALM_ROWS:] *= 3.0
    told = []
    for row, error in zip(rows, errors.tolist(), strict=True):
        last = monitor.rows_to_verdict == 1
        assert monitor.rows_to_verdict >= 1
        alerts = monitor.observe(row, error, None)
        assert last or not alerts
        told += alerts
    assert {alert.kind for alert in told} == {"input", "divergence"}


def test_a_reset_forgets_everything(calm: DriftMonitor, reference: dict[str, np.ndarray]) -> None:
    monitor = copy.deepcopy(calm)
    run(monitor, shifted(market_rows(SHIFTED_ROWS, seed=4), 1.0), np.full(SHIFTED_ROWS, 1.0))
    monitor.reset(reference)
    fresh = DriftMonitor(CONFIG, NAMES, reference, LAYERS)
    assert monitor.state() == fresh.state()
    rows = np.concatenate([market_rows(CALM_ROWS, 1), shifted(market_rows(2_000, 4), 1.0)])
    assert run(monitor, rows) == run(fresh, rows)


def test_without_a_calibration_set_the_error_is_still_watched() -> None:
    monitor = DriftMonitor(CONFIG, NAMES, {})
    rows = market_rows(4_000, 1)
    calm_rows = (LEARN_BATCHES + JUDGED_BATCHES) * BATCH_ROWS
    for error in divergences(calm_rows).tolist():
        assert monitor.observe(rows[0], error, None) == []
    alerts = run(monitor, shifted(rows, 3.0), 3.0 * divergences(4_000))
    assert len(rows) > JUDGED_BATCHES * BATCH_ROWS
    assert [(alert.kind, alert.subject) for alert in alerts] == [("divergence", DIVERGENCE)]
    assert monitor.state()["drift_feature"] == -1


def test_divergence_is_told_when_it_rises_and_again_after_it_had_fallen() -> None:
    watch = DivergenceWatch(0.002, 1.25, 0.5, 1)
    stages = []
    for factor in (1.0, 2.0, 1.0, 2.0):
        for value in (factor * divergences(400 * BATCH_ROWS)).tolist():
            watch.update(value)
        stages.append(watch.out)
    assert stages == [False, True, False, True]


def test_a_fall_of_the_divergence_is_no_alarm() -> None:
    monitor = DriftMonitor(CONFIG, NAMES, {})
    n = (LEARN_BATCHES + 200) * BATCH_ROWS
    rows = np.zeros((n, len(NAMES)), dtype=np.float32)
    assert run(monitor, rows, divergences(n)) == []
    assert run(monitor, rows, 0.2 * divergences(n)) == []


def test_twins_that_never_differed_alarm_when_they_do() -> None:
    watch = DivergenceWatch(0.002, 1.25, 0.5, 1)
    for value in [0.0] * (LEARN_BATCHES + 50) * BATCH_ROWS:
        watch.update(value)
    assert not watch.out
    for value in [1e-6] * 2 * JUDGED_BATCHES * BATCH_ROWS:
        watch.update(value)
    assert watch.out


def test_quantiles_of_the_divergence_lie_within_the_sketchs_promise() -> None:
    monitor = DriftMonitor(CONFIG, NAMES, {})
    values = np.random.default_rng(3).lognormal(-3.0, 1.0, 5_000)
    for value in values.tolist():
        monitor.observe(np.zeros(len(NAMES), dtype=np.float32), value, None)
    state = monitor.state()
    for name, share in (("divergence_p50", 0.5), ("divergence_p99", 0.99)):
        exact = float(np.quantile(values, share, method="lower"))
        assert state[name] == pytest.approx(exact, rel=0.0101)
    assert state["divergence_max"] == values.max()
    assert state["rows"] == 5_000


def test_a_rise_of_saturation_is_told_and_a_fall_is_not() -> None:
    monitor = DriftMonitor(CONFIG, NAMES, {}, LAYERS)
    x = np.zeros(len(NAMES), dtype=np.float32)
    rng = np.random.default_rng(5)
    found: list[DriftAlert] = []
    for i in range(CALM_ROWS + SHIFTED_ROWS):
        rates = rng.uniform(0.0, 0.04, 2)
        if i >= CALM_ROWS:
            rates = rates * np.array([1.0, 0.0]) + np.array([0.1, 0.0])
        found += monitor.observe(x, USUAL, rates if i % 4 == 0 else None)
    assert [(alert.kind, alert.subject) for alert in found] == [("saturation", "hidden")]
    assert found[0].rows > CALM_ROWS


def test_what_is_no_number_is_counted_and_changes_nothing(calm: DriftMonitor) -> None:
    clean, dirty = copy.deepcopy(calm), copy.deepcopy(calm)
    rows = market_rows(4 * WINDOW, seed=6)
    errors = divergences(len(rows))
    broken = rows.copy()
    for i, value in ((3, math.nan), (70, math.inf), (130, -math.inf)):
        broken[i, 1] = value
    errors_too = errors.copy()
    errors_too[[5, 6]] = math.nan, math.inf
    bad = np.array([math.nan, 0.0])
    assert run(clean, rows, errors) == []
    for i, (row, error) in enumerate(zip(broken, errors_too.tolist(), strict=True)):
        assert dirty.observe(row, error, bad if i == 9 else None) == []
    assert dirty.state()["not_finite"] == 6
    assert all(math.isfinite(value) for value in dirty.state().values())
    assert run(dirty, market_rows(CALM_ROWS, seed=1)) == []


def test_windows_of_nothing_but_nan_alarm_nobody(calm: DriftMonitor) -> None:
    monitor = copy.deepcopy(calm)
    rows = np.full((2 * DISTANCE_WINDOWS * WINDOW, len(NAMES)), math.nan, dtype=np.float32)
    assert run(monitor, rows, np.full(len(rows), math.nan)) == []
    assert run(monitor, market_rows(CALM_ROWS, seed=1)) == []


def test_rows_between_the_kept_ones_do_not_count(reference: dict[str, np.ndarray]) -> None:
    config = msgspec.structs.replace(CONFIG, every_rows=2)
    rows = np.concatenate(
        [market_rows(CALM_ROWS, 1), shifted(market_rows(SHIFTED_ROWS, seed=4), 0.5)]
    )
    twice = np.repeat(rows, 2, axis=0)
    twice[1::2] = 3.9
    all_kept = run(DriftMonitor(CONFIG, NAMES, reference), rows)
    thinned = run(DriftMonitor(config, NAMES, reference), twice)
    assert [alert[:-1] for alert in thinned] == [alert[:-1] for alert in all_kept]
    assert [alert.rows for alert in thinned] == [2 * alert.rows for alert in all_kept]


def test_psi_is_the_calibration_sets_own(reference: dict[str, np.ndarray]) -> None:
    rows = shifted(market_rows(5_000, seed=3), 0.4)
    live = FeatureHistogram(len(NAMES), CLIP)
    live.update(rows)
    distance = CalibrationDistance(reference, len(NAMES))
    distance.add(rows[:1_000])
    distance.add(rows[1_000:])
    distance.close_window()
    expected = FeatureHistogram.load(reference, "test").psi(live)
    np.testing.assert_allclose(distance.psi, expected, rtol=1e-12)
    assert distance.ks[3] == 1.0
    assert 0.1 < distance.ks[1] < 0.2


def test_state_names_the_worst_feature(calm: DriftMonitor) -> None:
    monitor = copy.deepcopy(calm)
    run(monitor, shifted(market_rows(2 * DISTANCE_WINDOWS * WINDOW, seed=3), 2.0, 1))
    state = monitor.state()
    assert NAMES[int(state["drift_feature"])] == NAMES[int(state["ks_feature"])] == "fast"
    assert state["drift"] > 1.0
    assert state["ks"] > 0.55


@pytest.mark.parametrize(
    "broken",
    [
        {"counts": np.ones((3, 64), dtype=np.int64), "clip": np.array(4.0)},
        {"counts": np.zeros((4, 64), dtype=np.int64), "clip": np.array(4.0)},
        {"counts": -np.ones((4, 64), dtype=np.int64), "clip": np.array(4.0)},
        {"counts": np.ones((4, 64)), "clip": np.array(4.0)},
        {"counts": np.ones((4, 64), dtype=np.int64), "clip": np.array(0.0)},
        {"counts": np.ones((4, 64), dtype=np.int64)},
        {"clip": np.array(4.0)},
    ],
)
def test_a_reference_that_is_none_is_refused(broken: dict[str, np.ndarray]) -> None:
    with pytest.raises(InputError, match=r"calibration\.npz"):
        DriftMonitor(CONFIG, NAMES, broken)


@pytest.mark.parametrize(
    "bad",
    [
        {"every_rows": 0},
        {"window_rows": 1},
        {"window_rows": 64.5},
        {"rungs": 0},
        {"rungs": 99},
        {"learn_windows": 0},
        {"shift_sigmas": 0.0},
        {"shift_sigmas": math.nan},
        {"smallest_shift_sd": 0.0},
        {"ks_distance": 1.5},
        {"ks_distance": math.nan},
        {"adwin_delta": 1.0},
        {"divergence_ratio": 1.0},
        {"smallest_saturation_rise": -0.1},
        {"recovered_share": 1.0},
        {"window_row": 64},
    ],
)
def test_bad_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(bad, DriftConfig, strict=True)


def test_defaults_pass_their_own_limits() -> None:
    assert msgspec.convert(msgspec.to_builtins(DriftConfig()), DriftConfig) == DriftConfig()


@pytest.mark.parametrize(
    ("degrees", "exact"), [(7, 17.1026), (12, 9.5720), (32, 6.2210), (92, 5.3760)]
)
def test_limits_are_students(degrees: int, exact: float) -> None:
    # Quantiles of Student's t with the tail of five deviations, 2.867e-7, by SciPy.
    assert exact <= student_limit(5.0, degrees) <= 1.04 * exact


def test_longer_rungs_find_what_short_ones_do_not() -> None:
    rng = np.random.default_rng(11)
    chart = ChangeChart(1, 5.0, 0.001, 8, 0.5, rungs=6)
    for _ in range(2_000):
        chart.update(rng.standard_normal(1))
    assert not chart.out.any()
    for _ in range(128):
        chart.update(rng.standard_normal(1) + 2.0)
    assert not chart.rungs[0].out.any()
    assert chart.out.all()
    distance, limit = chart.evidence(0)
    assert distance > limit
