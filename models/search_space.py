"""What the automatic search decides: one `Choice` of a precision for each layer, and of the scales.

A choice is written three ways: as `Choice`, whose names a person reads; as one index for each
`Decision`, which is what searchers think in; and as `models.quantisation.Options`, which
``octick model quantize`` takes. `SearchSpace` turns each into the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, cast

import msgspec

from feeds.errors import InputError
from models.observers import OBSERVERS
from models.operations import Spec
from models.quantisation import Options
from models.scheme import RULES, Kept, Rule
from models.shapes import describe

Precision = Literal["int8", "fp32", "fp16"]
Indices = tuple[int, ...]
LAYER_PRECISIONS: Final[tuple[Precision, ...]] = ("int8", "fp32", "fp16")
SENSITIVE_PRECISIONS: Final[tuple[Precision, ...]] = ("int8", "fp32")
PRECISION: Final = "precision."  # before the name of a layer or operation
OBSERVER: Final = "observer"
SCALES: Final = "scales"
WEIGHT_SCALES: Final = "weight-scales"
ZERO_POINTS: Final = "zero-points"
WEIGHT_SCALE_OPTIONS: Final = ("per-channel", "per-tensor")
ZERO_POINT_OPTIONS: Final = ("symmetric", "asymmetric")


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
