"""Searching for the best ways to quantise a network: three searchers, one judge, one budget.

``random`` draws choices evenly; ``optuna`` asks a multi-objective tree-structured Parzen estimator
(Bergstra et al. 2011; Ozaki et al. 2022); ``reinforce`` is a small agent of our own that learns by
policy gradient (Williams 1992). All of them ask the same evaluator
(`models.search.evaluator`), start from the default choice, and spend the same budget: choices they
have not asked for before. `compare_searches` holds them against each other, budget for budget.

A search is a function of its seed and of what the evaluator answered, and its first n trials do not
depend on the budget. So it is resumed by running it again, with the answers read from its log.
"""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from feeds.errors import InputError
from models.search.evaluator import Judge, Measured
from models.search.front import hypervolume, pareto_front, points_of
from models.search.space import SEARCHERS, Choice, Indices, Point
from models.search.trial_log import Header, Trial, TrialLog

REFERENCE: Final = (0.1, 4.0)  # disagreement and latency ratio that are worth nothing
MAX_REPEATS: Final = 5  # known proposals in a row, before an unknown choice is drawn instead
Progress = Callable[[str, float], None]


class SearchResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a search found.

    Attributes
    ----------
    searcher : str
    seed : int
    trials : tuple of Trial
        One for each evaluation of the budget, in order.
    front : tuple of Trial
        See `pareto_front`.
    hypervolume : float
        Of the front, up to ``reference``.
    reference : tuple of float
    proposals : int
        Choices asked for, known ones included: those cost nothing.
    seconds : float
        All evaluations as if each had been measured for this search, and its own thinking.
    """

    searcher: str
    seed: int
    trials: tuple[Trial, ...]
    front: tuple[Trial, ...]
    hypervolume: float
    reference: Point
    proposals: int
    seconds: float

    def curve(self) -> list[float]:
        """Hypervolume after each evaluation; it never falls."""
        front: tuple[Trial, ...] = ()
        volumes = []
        for trial in self.trials:
            front = pareto_front((*front, trial))
            volumes.append(hypervolume(points_of(front), self.reference))
        return volumes

    def to_table(self) -> list[dict[str, Any]]:
        """One row for each choice of the front, the most faithful first."""
        return [
            {
                "trial": trial.number,
                "disagreement": trial.measured.disagreement,
                "divergence": trial.measured.divergence,
                "latency_ratio": trial.measured.latency_ratio,
                "ratio_error": trial.measured.ratio_error,
                "p99_us": trial.measured.p99_us,
                "p99_us_fp32": trial.measured.p99_us_fp32,
                "bytes": trial.measured.bytes,
                "observer": trial.choice.observer,
                "scales": trial.choice.scales,
                "per_channel": trial.choice.per_channel,
                "symmetric": trial.choice.symmetric,
                "kept": " ".join(
                    f"{name}={kept}"
                    for name, kept in trial.choice.precision.items()
                    if kept != "int8"
                ),
            }
            for trial in self.front
        ]


def search(
    name: str,
    evaluator: Judge,
    trials: int,
    seed: int,
    *,
    log: Path | None = None,
    resume: Path | None = None,
    reference: Point = REFERENCE,
    progress: Progress = lambda stage, share: None,
) -> SearchResult:
    """Search with one searcher.

    Parameters
    ----------
    name : str
        One of `SEARCHERS`.
    evaluator : Judge
        See `models.search.evaluator.Evaluator`.
    trials : int
        Choices to evaluate; all of them where there are fewer.
    seed : int
    log : Path, optional
        A new file for the trials, see `models.search.evaluator.TrialLog`.
    resume : Path, optional
        Log of a search that was broken off: its trials are taken as they stand, then it goes on,
        in the same file.
    reference : tuple of float
        Objectives from which on a choice is worth nothing.
    progress : callable
        Told where the search stands, and the share of the budget that is spent.

    Raises
    ------
    InputError
        If there is no such searcher, Optuna is missing, or the log cannot be used.
    """
    assert trials >= 1
    assert log is None or resume is None, "a log is either new or resumed"
    if name not in SEARCHERS:
        raise InputError(
            "no such searcher",
            where="--searcher",
            expected="one of " + ", ".join(SEARCHERS),
            found=repr(name),
        )
    space = evaluator.space
    searcher = SEARCHERS[name](space, seed)
    decisions = {decision.name: decision.options for decision in space.decisions}
    header = Header(name, seed, evaluator.fingerprint, decisions)
    journal = None
    if resume is not None:
        journal = TrialLog.resume(resume, header)
    elif log is not None:
        journal = TrialLog.create(log, header)
    try:
        run = _Run(evaluator, journal)
        begin, proposals, repeats = time.perf_counter(), 0, 0
        rng = np.random.default_rng((seed, 1))
        front: tuple[Trial, ...] = ()
        while len(run.trials) < trials and len(run.known) < space.size:
            forced = None
            if not run.trials:
                forced = space.default
            elif repeats >= MAX_REPEATS:
                forced = space.unknown(run.known, rng)
            indices = searcher.propose(forced)
            proposals += 1
            repeats = repeats + 1 if indices in run.known else 0
            searcher.learn(run.measured(indices).objectives)
            if not repeats:
                front = pareto_front((*front, run.trials[-1]))
                area = hypervolume(points_of(front), reference)
                progress(f"{name}, seed {seed}: hypervolume {area:.5f}", len(run.trials) / trials)
        thinking = time.perf_counter() - begin - run.waited
    finally:
        if journal is not None:
            journal.close()
    done = tuple(run.trials)
    return SearchResult(
        searcher=name,
        seed=seed,
        trials=done,
        front=front,
        hypervolume=hypervolume(points_of(front), reference),
        reference=reference,
        proposals=proposals,
        seconds=round(thinking + sum(trial.measured.seconds for trial in done), 3),
    )


class _Run:
    """Answers of one search: those it has had, those of its log, then the evaluator's."""

    def __init__(self, judge: Judge, journal: TrialLog | None) -> None:
        self.known: dict[Indices, Measured] = {}
        self.trials: list[Trial] = []
        self.waited = 0.0
        self._judge, self._journal = judge, journal

    def measured(self, indices: Indices) -> Measured:
        if indices not in self.known:
            begin = time.perf_counter()
            trial = self._next(self._judge.space.choice(indices))
            self.waited += time.perf_counter() - begin
            self.trials.append(trial)
            self.known[indices] = trial.measured
        return self.known[indices]

    def _next(self, choice: Choice) -> Trial:
        number, journal = len(self.trials), self._journal
        if journal is None or number >= len(journal.finished):
            trial = Trial(number, choice, self._judge.evaluate(choice))
            if journal is not None:
                journal.append(trial)
            return trial
        trial = journal.finished[number]
        if (trial.number, trial.choice) != (number, choice):
            raise InputError(
                "the log does not follow from its seed",
                where=f"{journal.path}:{number + 2}",
                expected=str(choice),
                found=str(trial.choice),
                fix="resume with the version of Optuna that began it, or start anew",
            )
        self._judge.remember(choice, trial.measured)
        return trial


class SearchComparison(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Searchers with one budget, over the same seeds.

    Attributes
    ----------
    trials : int
        Evaluations that each search had.
    seeds : tuple of int
    reference : tuple of float
    results : tuple of SearchResult
        Seed by seed, searcher by searcher.
    """

    trials: int
    seeds: tuple[int, ...]
    reference: Point
    results: tuple[SearchResult, ...]

    def of(self, searcher: str) -> list[SearchResult]:
        """Results of one searcher, in order of the seeds."""
        return [result for result in self.results if result.searcher == searcher]

    @property
    def searchers(self) -> list[str]:
        """Who was compared."""
        return list(dict.fromkeys(result.searcher for result in self.results))

    def to_table(self, every: int = 10) -> list[dict[str, Any]]:
        """Hypervolume after every so many evaluations and at the end, median over the seeds."""
        curves = {name: [result.curve() for result in self.of(name)] for name in self.searchers}
        length = min(len(curve) for of_one in curves.values() for curve in of_one)
        rows = []
        for n in sorted({*range(every, length + 1, every), length}):
            row: dict[str, Any] = {"evaluations": n}
            for name, of_one in curves.items():
                row[name] = float(np.median([curve[n - 1] for curve in of_one]))
            rows.append(row)
        return rows

    def summary(self) -> list[dict[str, Any]]:
        """One row for each searcher: its final hypervolume over the seeds, and what it cost.

        ``best_on`` counts the seeds on which no other searcher had more; ``faster_than_fp32`` is
        how many choices of a front are, at most; ``seconds`` and ``proposals`` are means.
        """
        best = {
            seed: max(result.hypervolume for result in self.results if result.seed == seed)
            for seed in self.seeds
        }
        rows = []
        for name in self.searchers:
            of_one = self.of(name)
            volumes = [result.hypervolume for result in of_one]
            rows.append(
                {
                    "searcher": name,
                    "evaluations": min(len(result.trials) for result in of_one),
                    "hypervolume": float(np.median(volumes)),
                    "lowest": min(volumes),
                    "greatest": max(volumes),
                    "best_on": sum(result.hypervolume >= best[result.seed] for result in of_one),
                    "front": float(np.median([len(result.front) for result in of_one])),
                    "faster_than_fp32": max(
                        sum(trial.measured.latency_ratio < 1.0 for trial in result.front)
                        for result in of_one
                    ),
                    "proposals": float(np.mean([result.proposals for result in of_one])),
                    "seconds": round(float(np.mean([result.seconds for result in of_one])), 2),
                }
            )
        return rows


def compare_searches(
    evaluator: Judge,
    trials: int,
    seeds: Sequence[int],
    *,
    searchers: Sequence[str] = ("random", "optuna", "reinforce"),
    folder: Path | None = None,
    resume: bool = False,
    reference: Point = REFERENCE,
    progress: Progress = lambda stage, share: None,
) -> SearchComparison:
    """Give each searcher the same budget with the same seeds.

    The evaluator is shared: a choice has one measurement, whoever asks for it and however often,
    so that luck in timing favours nobody. It counts against the budget of each that asks.

    Parameters
    ----------
    trials, reference, progress
        As for `search`.
    folder : Path, optional
        Where to keep a log of each search: ``<searcher>-<seed>.jsonl``.
    resume : bool
        Go on with the logs that are in the folder.

    Raises
    ------
    InputError
        As `search` does.
    """
    results: list[SearchResult] = []
    pairs = list(itertools.product(seeds, searchers))

    def overall(stage: str, share: float) -> None:
        progress(stage, (len(results) + share) / len(pairs))

    for seed, name in pairs:
        path = None if folder is None else folder / f"{name}-{seed}.jsonl"
        there = resume and path is not None and path.exists()
        results.append(
            search(
                name,
                evaluator,
                trials,
                seed,
                log=None if there else path,
                resume=path if there else None,
                reference=reference,
                progress=overall,
            )
        )
    return SearchComparison(trials, tuple(seeds), reference, tuple(results))


def plot_front(*results: SearchResult) -> bytes:
    """Every trial as a dot, and the front of each searcher as a line: a PNG file.

    Results of one searcher are drawn as one: the front of all its seeds. The cross is FP32 itself.

    Raises
    ------
    InputError
        If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            'the extra "models" is not installed',
            where="octick model tune",
            expected="matplotlib",
            found=str(error),
            fix="pip install 'octick[models]'",
        ) from None
    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([1.0], [0.0], "x", color="black", markersize=9, label="FP32")
    for i, name in enumerate(dict.fromkeys(result.searcher for result in results)):
        trials = [t for result in results if result.searcher == name for t in result.trials]
        colour = f"C{i}"
        for some, style in ((points_of(trials), "."), (points_of(pareto_front(trials)), "o-")):
            axes.plot(
                [ratio for _, ratio in some],
                [100.0 * share for share, _ in some],
                style,
                color=colour,
                alpha=0.35 if style == "." else 1.0,
                drawstyle="steps-pre",
                label=None if style == "." else name,
            )
    axes.set_yscale("symlog", linthresh=1.0, linscale=2.0)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=-0.1)
    axes.set_xlabel("p99 of a step, times that of FP32")
    axes.set_ylabel("rows with another class than FP32, %")
    axes.grid(alpha=0.3)
    axes.legend()
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out, metadata={"Software": None})
    return out.getvalue()
