"""What the automatic search decides, and who walks that space.

A choice is written three ways: as `Choice`, whose names a person reads; as one index for each
`Decision`, which is what a `Searcher` thinks in; and as `models.quantisation.Options`, which
``octick model quantize`` takes. `SearchSpace` turns each into the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, cast

import msgspec
import numpy as np

from feeds.errors import InputError
from models.metrics import softmax
from models.observers import OBSERVERS
from models.operations import Spec
from models.quantisation import Options
from models.scheme import RULES, Kept, Rule
from models.shapes import describe

Precision = Literal["int8", "fp32", "fp16"]
Indices = tuple[int, ...]
Point = tuple[float, float]  # both objectives, to be made small
LAYER_PRECISIONS: Final[tuple[Precision, ...]] = ("int8", "fp32", "fp16")
SENSITIVE_PRECISIONS: Final[tuple[Precision, ...]] = ("int8", "fp32")
PRECISION: Final = "precision."  # before the name of a layer or operation
OBSERVER: Final = "observer"
SCALES: Final = "scales"
WEIGHT_SCALES: Final = "weight-scales"
ZERO_POINTS: Final = "zero-points"
WEIGHT_SCALE_OPTIONS: Final = ("per-channel", "per-tensor")
ZERO_POINT_OPTIONS: Final = ("symmetric", "asymmetric")
MAX_DRAWS: Final = 1_000  # before the space is gone through one by one
POLICY_RATE: Final = 1.0
BASELINE_RATE: Final = 0.1
ENTROPY_BONUS: Final = 0.02
AUGMENTATION: Final = 0.1


@dataclass(frozen=True)
class Decision:
    """One of several options, known by their place.

    Attributes
    ----------
    name : str
    options : tuple of str
    """

    name: str
    options: tuple[str, ...]


class Choice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One way to quantise a network after training.

    Attributes
    ----------
    precision : dict of str to Precision
        Of each layer and each sensitive operation, by name, in the order of computing.
    observer : str
        Name in `models.observers.OBSERVERS`.
    scales : Rule
        Free or powers of two.
    per_channel : bool
        A weight scale for each output channel.
    symmetric : bool
        Zero point 128 for signed activations.
    """

    precision: dict[str, Precision]
    observer: str
    scales: Rule
    per_channel: bool
    symmetric: bool


@dataclass(frozen=True)
class SearchSpace:
    """Every choice there is for one network.

    Attributes
    ----------
    layers, sensitive : tuple of str
        What has a precision of its own.
    decisions : tuple of Decision
        In a fixed order: layers, sensitive operations, observer, rule of the scales, weight
        scales, zero points. The last is left out where no point is signed, as in a network of
        ReLUs alone: both options would give the same graph.
    """

    layers: tuple[str, ...]
    sensitive: tuple[str, ...]
    decisions: tuple[Decision, ...]

    @classmethod
    def of(cls, spec: Spec) -> SearchSpace:
        """The space of a network.

        Raises
        ------
        InputError
            For an unknown architecture, or one that needs more features.
        """
        anatomy = describe(spec)
        decisions = [Decision(PRECISION + name, LAYER_PRECISIONS) for name in anatomy.layers]
        decisions += [
            Decision(PRECISION + name, SENSITIVE_PRECISIONS) for name in anatomy.sensitive
        ]
        decisions.append(Decision(OBSERVER, tuple(OBSERVERS)))
        decisions.append(Decision(SCALES, RULES))
        decisions.append(Decision(WEIGHT_SCALES, WEIGHT_SCALE_OPTIONS))
        if "signed" in anatomy.points.values():
            decisions.append(Decision(ZERO_POINTS, ZERO_POINT_OPTIONS))
        return cls(tuple(anatomy.layers), tuple(anatomy.sensitive), tuple(decisions))

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of options of each decision."""
        return tuple(len(decision.options) for decision in self.decisions)

    @property
    def size(self) -> int:
        """Number of choices."""
        return math.prod(self.widths)

    @property
    def default(self) -> Indices:
        """What ``octick model quantize`` does when it is told nothing."""
        return self.indices(self.choice_of(Options()))

    def draw(self, rng: np.random.Generator) -> Indices:
        """Any choice, all of them as likely as the others."""
        return tuple(int(rng.integers(width)) for width in self.widths)

    def unknown(self, known: Container[Indices], rng: np.random.Generator) -> Indices:
        """Any choice that is not among the known; there must be one."""
        for _ in range(MAX_DRAWS):
            drawn = self.draw(rng)
            if drawn not in known:
                return drawn
        return next(i for i in itertools.product(*map(range, self.widths)) if i not in known)

    def named(self, indices: Sequence[int]) -> dict[str, str]:
        """Option by name of the decision."""
        assert len(indices) == len(self.decisions)
        pairs = zip(self.decisions, indices, strict=True)
        return {decision.name: decision.options[index] for decision, index in pairs}

    def choice(self, indices: Sequence[int]) -> Choice:
        """The choice that indices, one a decision, stand for."""
        named = self.named(indices)
        return Choice(
            precision={
                name: cast(Precision, named[PRECISION + name])
                for name in (*self.layers, *self.sensitive)
            },
            observer=named[OBSERVER],
            scales=cast(Rule, named[SCALES]),
            per_channel=named[WEIGHT_SCALES] == "per-channel",
            symmetric=named.get(ZERO_POINTS, "symmetric") == "symmetric",
        )

    def indices(self, choice: Choice) -> Indices:
        """One index a decision.

        Raises
        ------
        InputError
            If the choice is another network's, or names what does not exist.
        """
        named: Mapping[str, str] = {
            **{PRECISION + name: value for name, value in choice.precision.items()},
            OBSERVER: choice.observer,
            SCALES: choice.scales,
            WEIGHT_SCALES: WEIGHT_SCALE_OPTIONS[not choice.per_channel],
            ZERO_POINTS: ZERO_POINT_OPTIONS[not choice.symmetric],
        }
        known = {decision.name for decision in self.decisions} | {ZERO_POINTS}
        for name in named:
            if name not in known:
                raise InputError(
                    "no such layer or operation in this network",
                    where=name,
                    expected="one of " + ", ".join((*self.layers, *self.sensitive)),
                )
        found = []
        for decision in self.decisions:
            option = named.get(decision.name, "nothing")
            if option not in decision.options:
                raise InputError(
                    "not among the options",
                    where=decision.name,
                    expected="one of " + ", ".join(decision.options),
                    found=option,
                )
            found.append(decision.options.index(option))
        return tuple(found)

    def options(self, choice: Choice, *, rows: int = 10_000, seed: int = 0) -> Options:
        """What to ask `models.quantisation.quantise` for to get this choice.

        Parameters
        ----------
        rows : int
            Calibration rows.
        """
        return Options(
            method="ptq",
            scales=choice.scales,
            observer=choice.observer,
            per_channel=choice.per_channel,
            symmetric=choice.symmetric,
            keep=kept_of(choice),
            rows=rows,
            seed=seed,
        )

    def choice_of(self, options: Options) -> Choice:
        """The choice that options stand for.

        Raises
        ------
        InputError
            If they ask for what is not searched (training, pruning), or keep what is not there.
        """
        if options.method != "ptq" or options.keep_worst or options.prune:
            raise InputError(
                "only plain post-training quantisation is searched",
                where="octick model tune",
                expected="method ptq, nothing pruned, nothing kept by rank",
                found=f"method {options.method}, prune {options.prune},"
                f" keep_worst {options.keep_worst}",
            )
        names = (*self.layers, *self.sensitive)
        choice = Choice(
            precision={**dict.fromkeys(names, "int8"), **options.keep},
            observer=options.observer,
            scales=options.scales,
            per_channel=options.per_channel,
            symmetric=options.symmetric,
        )
        self.indices(choice)
        return choice


def kept_of(choice: Choice) -> dict[str, Kept]:
    """Layers and operations that stay in floating point."""
    return {name: value for name, value in choice.precision.items() if value != "int8"}


class Searcher(Protocol):
    """Something that proposes choices and learns what they were worth."""

    def propose(self, forced: Indices | None) -> Indices:
        """The next choice; ``forced`` where that is not the searcher's to decide."""
        ...

    def learn(self, objectives: Point) -> None:
        """What the last proposal gave, both to be made small."""
        ...


class RandomSearcher:
    """Every option of every decision is as likely as the others."""

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self._space = space
        self._rng = np.random.default_rng((seed, 0))

    def propose(self, forced: Indices | None) -> Indices:
        drawn = self._space.draw(self._rng)
        return drawn if forced is None else forced

    def learn(self, objectives: Point) -> None:
        pass


class OptunaSearcher:
    """Optuna's TPE sampler over both objectives, in memory.

    Sources: Bergstra et al. (2011), "Algorithms for Hyper-Parameter Optimization"; Ozaki et al.
    (2022), "Multiobjective Tree-Structured Parzen Estimator".
    """

    def __init__(self, space: SearchSpace, seed: int) -> None:
        try:
            import optuna
        except ImportError as error:
            raise InputError(
                'the extra "models" is not installed',
                where="octick model tune",
                expected="optuna",
                found=str(error),
                fix="pip install 'octick[models]', or search with another searcher",
            ) from None
        self._space = space
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._study = optuna.create_study(
            directions=["minimize", "minimize"], sampler=optuna.samplers.TPESampler(seed=seed)
        )
        self._trial: Any = None

    def propose(self, forced: Indices | None) -> Indices:
        if forced is not None:
            self._study.enqueue_trial(self._space.named(forced))
        self._trial = self._study.ask()
        return tuple(
            decision.options.index(self._trial.suggest_categorical(decision.name, decision.options))
            for decision in self._space.decisions
        )

    def learn(self, objectives: Point) -> None:
        self._study.tell(self._trial, objectives)


class ReinforceSearcher:
    """An agent that learns a distribution over choices by policy gradient.

    The policy is one softmax for each decision, independent of each other given a leaning: a
    number from -1 (agreement alone counts) to 1 (latency alone counts) that is drawn anew for each
    episode, so that one policy spans the front. Logits and baseline are linear in it. An episode
    is one choice; its reward is the negative augmented Chebyshev norm (Knowles 2006, "ParEGO") of
    the choice's ranks among all seen so far, weighted by the leaning: ranks know no scale, so
    neither objective has to be put into the units of the other. The baseline follows the reward,
    and a bonus on the entropy keeps the policy from settling early.

    Source: Williams (1992), "Simple Statistical Gradient-Following Algorithms for Connectionist
    Reinforcement Learning", REINFORCE.
    """

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self._rng = np.random.default_rng((seed, 2))
        self._logits = [np.zeros((width, 2)) for width in space.widths]
        self._baseline = np.zeros(2)
        self._seen: dict[Indices, Point] = {}
        self._features = np.zeros(2)
        self._picked: Indices = ()
        self._own = False

    def policy(self, leaning: float) -> list[np.ndarray]:
        """Probability of each option of each decision under a leaning."""
        features = np.array([1.0, leaning])
        return [softmax((logits @ features)[None])[0] for logits in self._logits]

    def propose(self, forced: Indices | None) -> Indices:
        leaning = self._rng.uniform(-1.0, 1.0)
        self._features = np.array([1.0, leaning])
        drawn = tuple(int(self._rng.choice(len(p), p=p)) for p in self.policy(leaning))
        self._own = forced is None
        self._picked = drawn if forced is None else forced
        return self._picked

    def learn(self, objectives: Point) -> None:
        self._seen[self._picked] = objectives
        if not self._own:  # the policy did not choose it
            return
        leaning = float(self._features[1])
        advantage = self._reward(objectives, leaning) - self._baseline @ self._features
        self._baseline += BASELINE_RATE * advantage * self._features
        policy = self.policy(leaning)
        for logits, p, index in zip(self._logits, policy, self._picked, strict=True):
            surprise = np.log(p + 1e-12)
            towards = -p
            towards[index] += 1.0  # gradient of log p[index]
            wider = -p * (surprise - p @ surprise)  # gradient of the entropy
            step = POLICY_RATE * (advantage * towards + ENTROPY_BONUS * wider)
            logits += step[:, None] * self._features

    def _reward(self, objectives: Point, leaning: float) -> float:
        seen = np.array(list(self._seen.values()))
        mine = np.array(objectives)
        rank = (seen < mine).mean(axis=0) + 0.5 * (seen == mine).mean(axis=0)
        weighted = np.array([1.0 - leaning, 1.0 + leaning]) / 2.0 * rank
        return -float(weighted.max() + AUGMENTATION * weighted.sum())


SEARCHERS: Final[Mapping[str, Callable[[SearchSpace, int], Searcher]]] = {
    "random": RandomSearcher,
    "optuna": OptunaSearcher,
    "reinforce": ReinforceSearcher,
}
