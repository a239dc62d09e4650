"""Training: seeded, resumable, and it learns what is there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from feeds.errors import InputError
from models.execute import scores_of
from models.numerics import SchemeNumerics
from models.observers import make_observer
from models.operations import Spec
from models.scheme import Rule, Scheme, is_power_of_two, make_scheme
from models.sequences import TEST, TRAIN, VALIDATION, Dataset, make_dataset
from models.shapes import describe, fold_norms, initial_parameters
from models.training import Plan, train, windows
from models.training_quantised import TrainedNumerics
from tests.models.test_sequences import random_rows

HORIZON = 20
PLAN = Plan(epochs=2, seed=3, rows_a_batch=256)


def readable_data() -> Dataset:
    """Labels that can be read off the features."""
    data = make_dataset(random_rows(8_000), horizon=HORIZON)
    known = data.label >= 0
    data.x[known, :3] += 3.0 * np.eye(3, dtype=np.float32)[data.label[known]]
    return data


@pytest.fixture(scope="module")
def data() -> Dataset:
    """A small data set."""
    return readable_data()


def accuracy(spec: Spec, parameters: dict[str, np.ndarray], data: Dataset) -> float:
    rows = data.rows_of(TEST)
    right = 0
    for stretch in data.stretches(TEST, 64):
        scores = scores_of(spec, parameters, data.x[stretch.begin : stretch.stop])
        own = rows[(rows >= stretch.first) & (rows < stretch.stop)]
        right += int((scores[own - stretch.begin].argmax(axis=1) == data.label[own]).sum())
    return right / len(rows)


@pytest.mark.parametrize("arch", ["linear", "mlp", "tcn", "gru", "attention"])
def test_it_learns_what_is_there(arch: str, data: Dataset) -> None:
    spec = Spec(arch, data.x.shape[1], 3)
    losses: list[float] = []
    trained = train(
        spec,
        data,
        initial_parameters(spec, 1),
        Plan(epochs=6, seed=1, rows_a_batch=128),
        progress=lambda done, total, loss: losses.append(loss),
    )
    assert losses[-1] < 0.9 * losses[0]
    found = accuracy(spec, fold_norms(spec, trained), data)
    assert found > np.bincount(data.label[data.rows_of(TEST)]).max() / len(data.rows_of(TEST)) + 0.1


@pytest.mark.parametrize("arch", ["mlp", "tcn"])
def test_an_interrupted_run_goes_on_to_the_same_result(
    arch: str, data: Dataset, tmp_path: Path
) -> None:
    spec = Spec(arch, data.x.shape[1], 3)
    start = initial_parameters(spec, 1)
    whole = train(spec, data, start, PLAN)

    class Stopped(Exception):  # noqa: N818
        pass

    def stop_in_the_second_epoch(done: int, total: int, loss: float) -> None:
        if done > total // 2 + 1:
            raise Stopped

    checkpoint = tmp_path / "checkpoint.npz"
    with pytest.raises(Stopped):
        train(spec, data, start, PLAN, checkpoint=checkpoint, progress=stop_in_the_second_epoch)
    updates: list[int] = []
    resumed = train(
        spec,
        data,
        start,
        PLAN,
        checkpoint=checkpoint,
        progress=lambda done, total, loss: updates.append(done / total),
    )
    assert updates[0] > 0.5
    for name, array in whole.items():
        assert resumed[name].tobytes() == array.tobytes(), name
    with pytest.raises(InputError, match="another run"):
        train(spec, data, start, PLAN._replace(seed=9), checkpoint=checkpoint)


def test_windows_lie_in_one_stream_and_touch_their_part(data: Dataset) -> None:
    for offset in (0, 5):
        begin = windows(data, TRAIN, 30, 16, offset)
        assert len(begin) > 10
        for first in begin:
            assert len(np.unique(data.slot[first - 30 : first + 16])) == 1
            assert (data.part[first : first + 16] == TRAIN).any()


def calibrated(spec: Spec, parameters: dict[str, np.ndarray], data: Dataset, rule: Rule) -> Scheme:
    from models.numerics import ObservingNumerics

    observers = {name: make_observer("percentile-99.99", name) for name in describe(spec).points}
    stretch = next(data.stretches(VALIDATION, 64))
    rows = data.x[stretch.begin : stretch.stop]
    scores_of(spec, parameters, rows, numerics=ObservingNumerics(observers))
    return make_scheme(spec, parameters, lambda name: observers[name].range(), rule=rule)


@pytest.mark.parametrize("rule", ["free", "power-of-two"])
@pytest.mark.parametrize("arch", ["mlp", "lstm"])
def test_training_quantised_moves_towards_the_teacher(arch: str, rule: Rule, data: Dataset) -> None:
    spec = Spec(arch, data.x.shape[1], 3)
    teacher = fold_norms(spec, train(spec, data, initial_parameters(spec, 1), PLAN))
    # Scales sixteen times too coarse: there is something to learn.
    scheme = calibrated(spec, teacher, data, rule)
    kinds = describe(spec).points
    for name, point in scheme.points.items():
        if kinds[name] in ("signed", "positive"):
            scheme.points[name] = type(point)(point.scale * 16.0, point.zero_point)  # type: ignore[index]
    numerics = TrainedNumerics(spec, scheme)
    rate = 1e-3 if rule == "free" else 5e-3  # whole powers of two are further apart
    plan = Plan(epochs=6, seed=2, learning_rate=rate, rows_a_batch=128)
    trained = train(spec, data, dict(teacher), plan, numerics=numerics, teacher=teacher)
    learnt = numerics.finished(trained)
    stretch = next(data.stretches(TEST, 64))
    rows = data.x[stretch.begin : stretch.stop]
    real = scores_of(spec, teacher, rows)
    before = scores_of(spec, teacher, rows, numerics=SchemeNumerics(scheme))
    after = scores_of(spec, trained, rows, numerics=SchemeNumerics(learnt))
    assert np.abs(after - real).mean() < np.abs(before - real).mean()
    if rule == "power-of-two":
        assert all(is_power_of_two(point.scale) for point in learnt.points.values())


def test_streams_too_short_to_train_on_are_refused(data: Dataset) -> None:
    starts = data.starts.copy()
    starts[::50] = True
    from dataclasses import replace

    spec = Spec("tcn", data.x.shape[1], 3)
    with pytest.raises(InputError, match="no stream"):
        train(spec, replace(data, starts=starts), initial_parameters(spec, 1), PLAN)
