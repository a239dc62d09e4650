"""What a choice is worth: how often it disagrees with FP32, and how long a step takes.

`Evaluator` is the one judge of every searcher. Of its two objectives, both to be made small, the
first is deterministic: the share of validation rows to which the quantised graph gives another
class than the FP32 graph. The second is measured: the p99 of one step in ONNX Runtime over that of
the FP32 graph, timed in turn with it: the median over many short rounds, in steps of a hundredth. A
busy host slows both graphs down and spoils single rounds, so this ratio keeps still where
microseconds do not; even so two evaluators may differ in it, by about its `Measured.ratio_error`.

`TrialLog` keeps what was evaluated, one line of JSON a trial.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import msgspec
import numpy as np
import onnx

from engine.manifest import StateTensor
from feeds.errors import InputError
from models.comparison import part_scores
from models.observers import HistogramObserver, Observer, make_observer
from models.operations import Spec
from models.quantisation import calibrate, divergence
from models.quantised_graph import quantised_graph
from models.scheme import Rule, make_scheme
from models.search.space import Choice, Indices, SearchSpace, kept_of
from models.sequences import VALIDATION, Dataset
from models.step_graph import float_graph
from models.step_session import StepSession

CALIBRATION_ROWS: Final = 10_000
VALIDATION_ROWS: Final = 4_096
LATENCY_RUNS: Final = 5_000  # of each graph, in all rounds together
LATENCY_ROUNDS: Final = 25  # short ones: what interrupts one has no say in the median
TIMED_ROWS: Final = 512
MORE_ROUNDS: Final = 4  # times as many, until the ratio is known to `RATIO_ERROR`
RATIO_ERROR: Final = 0.02
RATIO_DECIMALS: Final = 2
REFUSED: Final = (1.0, 10.0)  # objectives of what cannot be quantised

Range = tuple[float, float]


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was found out about a choice.

    Attributes
    ----------
    disagreement : float
        Share of validation rows with another class than FP32's, 0 … 1. First objective.
    divergence : float
        Mean Kullback-Leibler divergence from FP32's probabilities, in nats; decides between equals.
    latency_ratio : float
        p99 of a step over that of FP32 in the same round, median over the rounds. Second
        objective.
    ratio_error : float
        Its standard error, from the rounds: how far it can be trusted.
    p50_us, p99_us, p50_us_fp32, p99_us_fp32 : float
        Of one step, medians over the rounds.
    bytes : int
        Of the ONNX file.
    seconds : float
        What the evaluation took, calibration that it needed included.
    refused : str
        Why the choice cannot be quantised; then both objectives are `REFUSED` and the rest is 0.
    """

    disagreement: float
    divergence: float
    latency_ratio: float
    ratio_error: float = 0.0
    p50_us: float = 0.0
    p99_us: float = 0.0
    p50_us_fp32: float = 0.0
    p99_us_fp32: float = 0.0
    bytes: int = 0
    seconds: float = 0.0
    refused: str = ""

    @property
    def objectives(self) -> tuple[float, float]:
        """(disagreement, latency ratio), both to be made small."""
        return self.disagreement, self.latency_ratio


class Judge(Protocol):
    """What a search needs of an evaluator.

    Attributes
    ----------
    space : SearchSpace
    fingerprint : str
        Equal for evaluators whose measurements may stand in one log.
    """

    @property
    def space(self) -> SearchSpace: ...

    @property
    def fingerprint(self) -> str: ...

    def evaluate(self, choice: Choice) -> Measured:
        """Objectives of a choice; equal choices are measured once."""
        ...

    def remember(self, choice: Choice, measured: Measured) -> None:
        """Take a measurement from a log, unless the choice has one."""
        ...


class Evaluator:
    """Post-training quantisation of one network, measured against its FP32 graph.

    Each kind of observer is calibrated at most once, when a choice first asks for it. Equal choices
    are measured once, and so are choices that come to the same graph.

    Parameters
    ----------
    spec : Spec
    parameters : mapping of str to ndarray
        BatchNorm folded.
    data : Dataset
        Its training part calibrates, its validation part judges; the test part is not looked at.
    seed : int
        Which rows are timed.
    rows : int
        Calibration rows.
    validation_rows : int
        Rows that are compared with FP32, at most.
    latency_runs, rounds : int
        Timed runs of each graph in all rounds together, and rounds. On a busy host there are more
        rounds, up to `MORE_ROUNDS` times as many.

    Attributes
    ----------
    space : SearchSpace
    evaluations : int
        Choices that were really measured (or refused).
    cached : int
        Choices that were asked for again, or that came to a graph already measured.

    Raises
    ------
    InputError
        If the data cannot calibrate.
    """

    def __init__(
        self,
        spec: Spec,
        parameters: Mapping[str, np.ndarray],
        data: Dataset,
        seed: int,
        *,
        rows: int = CALIBRATION_ROWS,
        validation_rows: int = VALIDATION_ROWS,
        latency_runs: int = LATENCY_RUNS,
        rounds: int = LATENCY_ROUNDS,
    ) -> None:
        assert rounds >= 1
        assert latency_runs >= rounds
        self.space = SearchSpace.of(spec)
        self.evaluations = self.cached = 0
        self._spec, self._parameters, self._data = spec, dict(parameters), data
        self._rows, self._validation_rows = rows, validation_rows
        self._runs, self._rounds = latency_runs // rounds, rounds
        self._float = StepSession(*float_graph(spec, parameters, {}))
        numbers, self._reference = part_scores(
            self._float.stream, data, VALIDATION, validation_rows
        )
        chosen = np.random.default_rng(seed).choice(numbers, min(TIMED_ROWS, len(numbers)), False)
        self._timed = np.asarray(data.x[np.sort(chosen)])
        self._observers: dict[str, dict[str, Observer]] = {}
        self._ranges: dict[tuple[str, Rule, bool], dict[str, Range]] = {}
        self._known: dict[Indices, Measured] = {}
        self._graphs: dict[bytes, Measured] = {}
        self.fingerprint = _fingerprint(
            spec, parameters, data, (seed, rows, validation_rows, latency_runs, rounds)
        )

    def evaluate(self, choice: Choice) -> Measured:
        """Quantise, compare and time a choice.

        Raises
        ------
        InputError
            If the choice is another network's, or the data cannot calibrate. A choice that cannot
            be quantised is no error: it is `Measured.refused`.
        """
        key = self.space.indices(choice)
        known = self._known.get(key)
        if known is not None:
            self.cached += 1
            return known
        begin = time.perf_counter()
        self._calibrated(choice)
        try:
            model, state = self.graph(choice)
        except InputError as error:
            self.evaluations += 1
            measured = Measured(REFUSED[0], 0.0, REFUSED[1], refused=str(error))
        else:
            data = model.SerializeToString(deterministic=True)
            digest = hashlib.sha256(data).digest()
            if digest in self._graphs:
                self.cached += 1
                measured = self._graphs[digest]
            else:
                self.evaluations += 1
                measured = self._measure(StepSession(data, state), len(data), begin)
                self._graphs[digest] = measured
        self._known[key] = measured
        return measured

    def remember(self, choice: Choice, measured: Measured) -> None:
        """Take a measurement from a log, unless the choice has one; nothing is counted."""
        self._known.setdefault(self.space.indices(choice), measured)

    def graph(self, choice: Choice) -> tuple[onnx.ModelProto, tuple[StateTensor, ...]]:
        """The quantised step graph of a choice, and its state.

        Raises
        ------
        InputError
            If the choice cannot be quantised: a bias out of proportion to its weights.
        """
        ranges = self._calibrated(choice)
        scheme = make_scheme(
            self._spec,
            self._parameters,
            ranges.__getitem__,
            rule=choice.scales,
            symmetric=choice.symmetric,
            per_channel=choice.per_channel,
            kept=kept_of(choice),
        )
        return quantised_graph(self._spec, self._parameters, scheme, {})

    def _calibrated(self, choice: Choice) -> dict[str, Range]:
        """Range of each point under the choice's observer, rule and zero points."""
        kind, rule, symmetric = key = choice.observer, choice.scales, choice.symmetric
        if key not in self._ranges:
            if kind not in self._observers:
                self._observers[kind], _ = calibrate(
                    self._spec, self._parameters, self._data, observer=kind, rows=self._rows
                )
            self._ranges[key] = {
                name: with_rules(observer, rule, symmetric=symmetric).range()
                for name, observer in self._observers[kind].items()
            }
        return self._ranges[key]

    def _measure(self, session: StepSession, size: int, begin: float) -> Measured:
        _, scores = part_scores(session.stream, self._data, VALIDATION, self._validation_rows)
        other = scores.argmax(axis=1) != self._reference.argmax(axis=1)
        timed, ratio, error = self._time(session)
        middle = np.round(np.median(timed, axis=0), 3)
        return Measured(
            disagreement=float(other.mean()),
            divergence=divergence(self._reference, scores),
            latency_ratio=round(ratio, RATIO_DECIMALS),
            ratio_error=round(error, 4),
            p50_us=float(middle[0, 0]),
            p99_us=float(middle[0, 1]),
            p50_us_fp32=float(middle[1, 0]),
            p99_us_fp32=float(middle[1, 1]),
            bytes=size,
            seconds=round(time.perf_counter() - begin, 4),
        )

    def _time(self, session: StepSession) -> tuple[np.ndarray, float, float]:
        """Microseconds of round, graph and FP32, p50 and p99; their ratio and its error."""
        sessions = (session, self._float)
        rounds: list[list[tuple[float, float]]] = []
        ratio, error = 0.0, float("inf")
        while len(rounds) < self._rounds or (
            error > RATIO_ERROR and len(rounds) < MORE_ROUNDS * self._rounds
        ):
            pair = [(0.0, 0.0), (0.0, 0.0)]
            for which in (0, 1) if len(rounds) % 2 else (1, 0):
                pair[which] = sessions[which].latency(self._timed, self._runs)
            rounds.append(pair)
            ratio, error = median_and_error([mine[1] / its[1] for mine, its in rounds])
        return np.array(rounds), ratio, error


def median_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Median and its standard error, as for normal values with this interquartile range.

    The error of the median is ``sqrt(pi / 2) s / sqrt(n)``, and ``s`` is the range over 1.349.
    """
    low, middle, high = np.percentile(values, (25, 50, 75))
    deviation = (high - low) / 1.349
    return float(middle), float(deviation * (np.pi / 2 / len(values)) ** 0.5)


def with_rules(observer: Observer, rule: Rule, *, symmetric: bool) -> Observer:
    """An observer that has seen the same and chooses its range by other rules."""
    if not isinstance(observer, HistogramObserver):
        return observer  # its range is what it saw, whatever the rules
    other = make_observer(
        observer.kind, observer.name, power_of_two=rule == "power-of-two", symmetric=symmetric
    )
    assert isinstance(other, HistogramObserver)
    other.histogram, other.observed = observer.histogram, observer.observed
    return other


def _fingerprint(
    spec: Spec, parameters: Mapping[str, np.ndarray], data: Dataset, numbers: tuple[int, ...]
) -> str:
    digest = hashlib.sha256(msgspec.json.encode([spec, data.facts, len(data), numbers]))
    for name in sorted(parameters):
        digest.update(name.encode() + np.ascontiguousarray(parameters[name]).tobytes())
    return digest.hexdigest()[:16]
