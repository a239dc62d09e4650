"""The automatic search: its space, its judge, its searchers, its log."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feeds.errors import InputError
from feeds.simulator import Simulator
from models.dataset import collect
from models.observers import OBSERVERS
from models.operations import Spec
from models.quantisation import Options, quantise
from models.scheme import RULES
from models.search.compare import (
    REFERENCE,
    SearchResult,
    compare_searches,
    plot_front,
    search,
)
from models.search.evaluator import Evaluator, Measured
from models.search.front import hypervolume, pareto_front
from models.search.space import SEARCHERS, Choice, Decision, Point, SearchSpace
from models.search.trial_log import Header, Trial, TrialLog
from models.sequences import Dataset, make_dataset
from models.shapes import fold_norms, initial_parameters
from models.training import Plan, train

ALL = tuple(SEARCHERS)
points = st.lists(st.tuples(st.floats(0.0, 0.2), st.floats(0.0, 5.0)), max_size=12)


class KnownFront:
    """A judge without a network: keeping a layer costs time and takes disagreement away.

    Nothing else costs time, so the front is what the best of everything else gives for each set of
    kept layers.
    """

    def __init__(self) -> None:
        self.space = SearchSpace.of(Spec("mlp", 8, 3))
        self.fingerprint = "known front"
        self.asked: list[Choice] = []
        self.fails_after: int | None = None

    def objectives(self, choice: Choice) -> Point:
        kept = [name for name, precision in choice.precision.items() if precision != "int8"]
        cost = {"hidden0": 0.30, "hidden1": 0.20, "head": 0.05}
        gain = {"hidden0": 0.02, "hidden1": 0.01, "head": 0.03}
        halves = sum(precision == "fp16" for precision in choice.precision.values())
        disagreement = 0.062 + 0.001 * halves - sum(gain[name] for name in kept)
        disagreement += 0.004 * list(OBSERVERS).index(choice.observer)
        disagreement += 0.01 * (choice.scales != "free") + 0.005 * (not choice.per_channel)
        return round(disagreement, 6), round(1.0 + sum(cost[name] for name in kept), 2)

    def evaluate(self, choice: Choice) -> Measured:
        if self.fails_after is not None and len(self.asked) >= self.fails_after:
            raise KeyboardInterrupt
        self.asked.append(choice)
        disagreement, ratio = self.objectives(choice)
        return Measured(disagreement, 0.0, ratio, seconds=0.5)

    def remember(self, choice: Choice, measured: Measured) -> None:
        pass

    def front(self) -> list[Point]:
        everything = itertools.product(*map(range, self.space.widths))
        found = [self.objectives(self.space.choice(indices)) for indices in everything]
        return sorted({a for a in found if not any(dominates(b, a) for b in found)})


def dominates(a: Point, b: Point) -> bool:
    return a != b and a[0] <= b[0] and a[1] <= b[1]


def trials_of(values: list[Point]) -> list[Trial]:
    space = SearchSpace.of(Spec("mlp", 8, 3))
    return [
        Trial(number, space.choice(space.default), Measured(first, 0.0, second))
        for number, (first, second) in enumerate(values)
    ]


def choices(result: SearchResult) -> list[Choice]:
    return [trial.choice for trial in result.trials]


# The space


def test_the_space_of_an_mlp_is_written_out_in_a_fixed_order() -> None:
    assert [(d.name, d.options) for d in SearchSpace.of(Spec("mlp", 8, 3)).decisions] == [
        ("precision.hidden0", ("int8", "fp32", "fp16")),
        ("precision.hidden1", ("int8", "fp32", "fp16")),
        ("precision.head", ("int8", "fp32", "fp16")),
        ("observer", tuple(OBSERVERS)),
        ("scales", ("free", "power-of-two")),
        ("weight-scales", ("per-channel", "per-tensor")),
    ]


def test_sensitive_operations_and_signed_points_have_decisions_of_their_own() -> None:
    decisions = {d.name: d.options for d in SearchSpace.of(Spec("attention", 8, 3)).decisions}
    assert decisions["precision.attention.softmax"] == ("int8", "fp32")
    assert decisions["precision.norm"] == ("int8", "fp32")
    assert decisions["zero-points"] == ("symmetric", "asymmetric")


@given(st.sampled_from(["mlp", "lstm", "attention"]), st.integers(0, 2**32))
def test_indices_choice_and_options_say_the_same(arch: str, seed: int) -> None:
    space = SearchSpace.of(Spec(arch, 8, 3))
    indices = space.draw(np.random.default_rng(seed))
    choice = space.choice(indices)
    assert space.indices(choice) == indices
    assert space.choice_of(space.options(choice)) == choice
    assert msgspec.json.decode(msgspec.json.encode(choice), type=Choice) == choice


def test_the_default_is_what_quantize_does_by_default() -> None:
    space = SearchSpace.of(Spec("attention", 8, 3))
    options = space.options(space.choice(space.default), rows=Options().rows, seed=Options().seed)
    assert options == Options()


@pytest.mark.parametrize(
    ("options", "where"),
    [
        (Options(keep={"hidden7": "fp32"}), "hidden7"),
        (Options(observer="guess"), "observer"),
        (Options(method="qat"), "tune"),
        (Options(prune=0.5), "tune"),
    ],
)
def test_options_outside_the_space_are_refused_by_name(options: Options, where: str) -> None:
    with pytest.raises(InputError) as refused:
        SearchSpace.of(Spec("mlp", 8, 3)).choice_of(options)
    assert where in refused.value.where


# Front and hypervolume


@given(points)
def test_nothing_beats_the_front_and_the_front_beats_all_else(values: list[Point]) -> None:
    front = [trial.measured.objectives for trial in pareto_front(trials_of(values))]
    assert not any(dominates(a, b) for a in values for b in front)
    assert all(any(a == b or dominates(a, b) for a in front) for b in values)
    assert front == sorted(set(front))


def test_of_equals_the_one_with_less_divergence_stands_in_the_front() -> None:
    first, second = trials_of([(0.01, 1.0), (0.01, 1.0)])
    second = msgspec.structs.replace(second, measured=Measured(0.01, -1.0, 1.0))
    assert pareto_front([first, second]) == (second,)


def test_a_refused_choice_is_in_no_front() -> None:
    (trial,) = trials_of([(0.0, 0.0)])
    refused = msgspec.structs.replace(trial.measured, refused="a bias is out of proportion")
    assert pareto_front([msgspec.structs.replace(trial, measured=refused)]) == ()


@pytest.mark.parametrize(
    ("values", "area"),
    [
        ([], 0.0),
        ([(1.0, 1.0)], 1.0),
        ([(0.0, 1.5), (1.0, 0.5), (1.5, 1.9)], 1.0 + 1.0),
        ([(0.5, 0.5), (0.6, 0.6)], 2.25),
        ([(3.0, 0.0), (0.0, 2.0)], 0.0),
    ],
)
def test_hypervolume_is_the_area_up_to_the_reference(values: list[Point], area: float) -> None:
    assert hypervolume(values, (2.0, 2.0)) == pytest.approx(area)


@given(points)
def test_hypervolume_is_that_of_the_front_and_never_falls(values: list[Point]) -> None:
    front = [trial.measured.objectives for trial in pareto_front(trials_of(values))]
    assert hypervolume(front, REFERENCE) == pytest.approx(hypervolume(values, REFERENCE))
    curve = [hypervolume(values[:n], REFERENCE) for n in range(len(values) + 1)]
    # But for the last bit of a sum, as a point splits an area in two.
    assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(curve))


# Searchers


@pytest.mark.parametrize("name", ALL)
def test_a_search_begins_with_the_default_and_asks_for_nothing_twice(name: str) -> None:
    judge = KnownFront()
    result = search(name, judge, 40, seed=3)
    assert choices(result) == judge.asked
    assert choices(result)[0] == judge.space.choice(judge.space.default)
    assert len({judge.space.indices(choice) for choice in judge.asked}) == 40
    assert result.front == pareto_front(result.trials)
    assert result.curve() == sorted(result.curve())
    assert result.curve()[-1] == result.hypervolume > 0.0


@pytest.mark.parametrize("name", ALL)
def test_a_seed_decides_everything_and_a_larger_budget_only_goes_on(name: str) -> None:
    short, again, long = (search(name, KnownFront(), n, seed=5) for n in (20, 20, 30))
    assert short.trials == again.trials == long.trials[:20]
    assert search(name, KnownFront(), 20, seed=6).trials != short.trials


@pytest.mark.parametrize("name", ALL)
def test_a_budget_that_covers_the_space_finds_the_whole_front(name: str) -> None:
    judge = KnownFront()
    given = {"observer": ("percentile-99.99",), "scales": ("free",)}
    few = tuple(Decision(d.name, given.get(d.name, d.options)) for d in judge.space.decisions)
    judge.space = SearchSpace(judge.space.layers, judge.space.sensitive, few)
    result = search(name, judge, 1_000, seed=0)
    assert len(result.trials) == judge.space.size == 54
    assert [trial.measured.objectives for trial in result.front] == judge.front()


def test_the_agent_leans_where_it_is_told_to() -> None:
    judge = KnownFront()
    agent = SEARCHERS["reinforce"](judge.space, 0)
    for _ in range(3_000):
        indices = agent.propose(None)
        agent.learn(judge.objectives(judge.space.choice(indices)))
    faithful, fast = agent.policy(-0.9), agent.policy(0.9)  # type: ignore[attr-defined]
    for layer in range(len(judge.space.layers)):
        assert fast[layer][0] > 0.5 > faithful[layer][0]


def test_an_unknown_searcher_is_refused() -> None:
    with pytest.raises(InputError, match="reinforce"):
        search("genetic", KnownFront(), 1, 0)


# Comparing


def test_a_comparison_gives_everybody_the_same_budget_and_first_trial(tmp_path: Path) -> None:
    comparison = compare_searches(KnownFront(), 25, (0, 1), folder=tmp_path)
    assert comparison.searchers == ["random", "optuna", "reinforce"]
    assert {len(result.trials) for result in comparison.results} == {25}
    assert len({msgspec.json.encode(result.trials[0]) for result in comparison.results}) == 1
    table = comparison.to_table(every=10)
    assert [row["evaluations"] for row in table] == [10, 20, 25]
    for name in comparison.searchers:
        assert [row[name] for row in table] == sorted(row[name] for row in table)
    summary = {row["searcher"]: row for row in comparison.summary()}
    assert sum(row["best_on"] for row in summary.values()) >= 2
    assert all(row["evaluations"] == 25 for row in summary.values())
    assert all(row["seconds"] >= 25 * 0.5 for row in summary.values())
    again = compare_searches(KnownFront(), 25, (0, 1), folder=tmp_path, resume=True)
    assert [r.trials for r in again.results] == [r.trials for r in comparison.results]


def test_the_plot_is_a_png_and_the_same_each_time() -> None:
    results = [search(name, KnownFront(), 10, 0) for name in ("random", "reinforce")]
    png = plot_front(*results)
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png == plot_front(*results)


def test_a_table_row_says_what_a_choice_keeps() -> None:
    result = search("random", KnownFront(), 30, 0)
    rows = result.to_table()
    assert [row["trial"] for row in rows] == [trial.number for trial in result.front]
    for row, trial in zip(rows, result.front, strict=True):
        kept = dict(item.split("=") for item in row["kept"].split())
        assert {name: kept.get(name, "int8") for name in trial.choice.precision} == (
            trial.choice.precision
        )


# The log


@pytest.mark.parametrize("name", ALL)
def test_a_search_that_is_broken_off_goes_on_to_the_same_trials(name: str, tmp_path: Path) -> None:
    whole = search(name, KnownFront(), 30, seed=2)
    path = tmp_path / "trials.jsonl"
    judge = KnownFront()
    judge.fails_after = 17
    with pytest.raises(KeyboardInterrupt):
        search(name, judge, 30, seed=2, log=path)
    assert len(path.read_bytes().splitlines()) == 1 + 17
    with path.open("ab") as file:
        file.write(b'{"number":17,"cho')  # cut off while it was written
    judge = KnownFront()
    resumed = search(name, judge, 30, seed=2, resume=path)
    assert resumed.trials == whole.trials
    assert judge.asked == choices(whole)[17:]
    lines = path.read_bytes().splitlines()[1:]
    assert [msgspec.json.decode(line, type=Trial) for line in lines] == list(whole.trials)


def test_a_log_is_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    search("random", KnownFront(), 3, 0, log=path)
    with pytest.raises(InputError, match="resume it"):
        search("random", KnownFront(), 3, 0, log=path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"searcher": "optuna"}, "searcher"),
        ({"seed": 1}, "seed"),
        ({"evaluator": "another"}, "evaluator"),
        ({"decisions": {}}, "decisions"),
    ],
)
def test_the_log_of_another_search_is_refused(
    change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    header = Header("random", 0, "known front", {"scales": ("free",)})
    TrialLog.create(tmp_path / "log", header).close()
    with pytest.raises(InputError, match=f"another {named}"):
        TrialLog.resume(tmp_path / "log", msgspec.structs.replace(header, **change))


def test_a_damaged_missing_or_altered_log_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    with pytest.raises(InputError, match="no log of a search"):
        search("random", KnownFront(), 3, 0, resume=path)
    search("random", KnownFront(), 3, 0, log=path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[2] + lines[1])
    with pytest.raises(InputError, match=r"jsonl:2: the log does not follow"):
        search("random", KnownFront(), 3, 0, resume=path)
    path.write_bytes(lines[0] + b"{}\n" + lines[1])
    with pytest.raises(InputError, match=r"jsonl:2: damaged"):
        search("random", KnownFront(), 3, 0, resume=path)


# A real network


@pytest.fixture(scope="module")
def data() -> Dataset:
    """A short session."""
    market = Simulator(seed=11, n_instruments=1)
    rows = collect(market.chunks(16_000), market.instruments, max_levels=512)
    return make_dataset(rows, horizon=10)


@pytest.fixture(scope="module")
def spec(data: Dataset) -> Spec:
    return Spec("mlp", data.x.shape[1], 3)


@pytest.fixture(scope="module")
def parameters(spec: Spec, data: Dataset) -> dict[str, np.ndarray]:
    """A network that has seen the market once."""
    return fold_norms(spec, train(spec, data, initial_parameters(spec, 0), Plan(1, 0)))


def evaluator_of(
    spec: Spec, parameters: dict[str, np.ndarray], data: Dataset, rows: int = 1_000
) -> Evaluator:
    return Evaluator(
        spec,
        parameters,
        data,
        0,
        rows=rows,
        validation_rows=300,
        latency_runs=60,
        rounds=3,
    )


@pytest.fixture(scope="module")
def evaluator(spec: Spec, parameters: dict[str, np.ndarray], data: Dataset) -> Evaluator:
    return evaluator_of(spec, parameters, data)


@pytest.mark.parametrize("arch", ["mlp", "lstm"])
def test_a_choice_comes_to_the_graph_that_quantize_makes_of_it(arch: str, data: Dataset) -> None:
    spec = Spec(arch, data.x.shape[1], 3)
    parameters = fold_norms(spec, initial_parameters(spec, 0))
    evaluator = evaluator_of(spec, parameters, data)
    space, rng = evaluator.space, np.random.default_rng(0)
    for observer, scales in itertools.product(OBSERVERS, RULES):
        choice = space.choice(space.draw(rng))
        signed = any(d.name == "zero-points" for d in space.decisions)
        for symmetric in (True, False)[: 1 + signed]:
            choice = msgspec.structs.replace(
                choice, observer=observer, scales=scales, symmetric=symmetric
            )
            made = quantise(spec, parameters, data, space.options(choice, rows=1_000))
            mine, _ = evaluator.graph(choice)
            assert mine.SerializeToString() == made.int8.SerializeToString(), choice


def test_equal_choices_and_equal_graphs_are_measured_once(
    spec: Spec, parameters: dict[str, np.ndarray], data: Dataset
) -> None:
    evaluator = evaluator_of(spec, parameters, data)
    space = evaluator.space
    choice = space.choice(space.default)
    first = evaluator.evaluate(choice)
    assert evaluator.evaluate(choice) is first
    assert (evaluator.evaluations, evaluator.cached) == (1, 1)
    # Without a quantised weight it does not matter how weights are scaled.
    kept = dict.fromkeys(choice.precision, "fp32")
    floats = msgspec.structs.replace(choice, precision=kept)
    per_tensor = msgspec.structs.replace(floats, per_channel=False)
    assert evaluator.evaluate(per_tensor) is evaluator.evaluate(floats)
    assert (evaluator.evaluations, evaluator.cached) == (2, 2)
    evaluator.remember(choice, Measured(1.0, 1.0, 1.0))
    assert evaluator.evaluate(choice) is first


def test_each_observer_is_calibrated_once(
    spec: Spec,
    parameters: dict[str, np.ndarray],
    data: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import models.search.evaluator as module

    calibrated = []
    real = module.calibrate

    def counting(*args: Any, **options: Any) -> Any:
        calibrated.append(options["observer"])
        return real(*args, **options)

    monkeypatch.setattr(module, "calibrate", counting)
    evaluator = evaluator_of(spec, parameters, data)
    choice = evaluator.space.choice(evaluator.space.default)
    for observer, scales in itertools.product(("entropy", "mse"), ("free", "power-of-two")):
        evaluator.graph(msgspec.structs.replace(choice, observer=observer, scales=scales))
    assert calibrated == ["entropy", "mse"]


def test_a_choice_that_cannot_be_quantised_is_the_worst_and_not_an_error(
    spec: Spec, parameters: dict[str, np.ndarray], data: Dataset
) -> None:
    faint = dict(parameters)
    faint["head.weight"] = parameters["head.weight"] * np.float32(1e-9)
    faint["head.bias"] = parameters["head.bias"] + np.float32(1.0)
    evaluator = evaluator_of(spec, faint, data)
    choice = evaluator.space.choice(evaluator.space.default)
    measured = evaluator.evaluate(choice)
    assert "head" in measured.refused
    assert measured.disagreement == 1.0
    kept = msgspec.structs.replace(choice, precision={**choice.precision, "head": "fp32"})
    assert not evaluator.evaluate(kept).refused


def test_measurements_are_repeated_by_another_evaluator_but_for_time(
    evaluator: Evaluator, spec: Spec, parameters: dict[str, np.ndarray], data: Dataset
) -> None:
    other = evaluator_of(spec, parameters, data)
    assert other.fingerprint == evaluator.fingerprint
    assert evaluator_of(spec, parameters, data, rows=999).fingerprint != evaluator.fingerprint
    choice = evaluator.space.choice(evaluator.space.default)
    mine, its = evaluator.evaluate(choice), other.evaluate(choice)
    assert (mine.disagreement, mine.divergence) == (its.disagreement, its.divergence)
    assert 0.0 <= mine.disagreement < 0.5
    assert mine.divergence >= 0.0
    assert mine.p99_us >= mine.p50_us > 0.0
    assert mine.latency_ratio > 0.0


def test_a_real_comparison_spends_its_budget_and_resumes_from_its_logs(
    spec: Spec, parameters: dict[str, np.ndarray], data: Dataset, tmp_path: Path
) -> None:
    evaluator = evaluator_of(spec, parameters, data)
    comparison = compare_searches(evaluator, 6, (0,), folder=tmp_path)
    assert [len(result.trials) for result in comparison.results] == [6, 6, 6]
    assert evaluator.evaluations <= 1 + 3 * 5
    for result in comparison.results:
        front = [trial.measured.objectives for trial in result.front]
        everything = [trial.measured.objectives for trial in result.trials]
        assert not any(dominates(a, b) for a in everything for b in front)
        assert result.curve() == sorted(result.curve())
    # Another process measures other latencies; what is in the logs stands.
    fresh = evaluator_of(spec, parameters, data)
    again = compare_searches(fresh, 6, (0,), folder=tmp_path, resume=True)
    assert [r.trials for r in again.results] == [r.trials for r in comparison.results]
    assert fresh.evaluations == 0
