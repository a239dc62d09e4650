"""From a trained network to its quantised twin: every method behind one set of options.

``ptq`` calibrates and rounds; ``qat`` goes on from there and trains weights and scales under fake
quantisation, towards the float network's own answers (Hinton, Vinyals and Dean 2015); ``dynamic``
and ``int4`` are ONNX Runtime's own, on the float graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec
import numpy as np
import onnx
import torch

from engine.manifest import Numerics, StateSection
from feeds.errors import InputError
from models.architectures import architecture
from models.calibration import check_rows
from models.execute import run, scores_of, tensors
from models.metrics import softmax
from models.numerics import ObservingNumerics, SchemeNumerics
from models.observers import Observer, make_observer
from models.operations import Spec
from models.prune import pruned
from models.quantised_graph import quantised_graph
from models.scheme import Kept, Rule, Scheme, make_scheme
from models.sequences import TRAIN, VALIDATION, Dataset
from models.shapes import describe
from models.step_graph import float_graph
from models.training import Plan, one_thread, train, windows
from models.training_quantised import TrainedNumerics

Method = Literal["ptq", "qat", "dynamic", "int4"]
METHODS: Final[tuple[Method, ...]] = ("ptq", "qat", "dynamic", "int4")
CALIBRATION_STEPS: Final = 64
CHECKED_WINDOWS: Final = 256
CALIBRATION_BATCH: Final = 16  # windows at a time: what bounds the memory
QAT_LEARNING_RATE: Final = 3e-4
PRUNED_LEARNING_RATE: Final = 1e-3
SENSITIVITY_ROWS: Final = 4_096
WARM_UP_ROWS: Final = 256
Progress = Callable[[str, float], None]


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What ``octick model quantize`` is asked for.

    Attributes
    ----------
    method : Method
    scales : Rule
        ``power-of-two`` makes the bundle ``exact-int8``.
    observer : str
        Name in `models.observers.OBSERVERS`.
    per_channel : bool
        A weight scale for each output channel.
    symmetric : bool
        Zero point 128 for signed activations.
    keep : dict of str to Kept
        Layers and operations that stay in floating point.
    keep_worst : int
        So many more, found by `sensitivity`.
    prune : float
        Share of the units that are cut first, in each width that can shrink.
    rows : int
        Calibration rows.
    epochs : int
        Of training after pruning or under fake quantisation.
    seed : int
    """

    method: Method = "ptq"
    scales: Rule = "free"
    observer: str = "percentile-99.99"
    per_channel: bool = True
    symmetric: bool = True
    keep: dict[str, Kept] = {}
    keep_worst: int = 0
    prune: float = 0.0
    rows: int = 10_000
    epochs: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Quantised:
    """The twins.

    Attributes
    ----------
    spec : Spec
    parameters : dict of ndarray
        Float weights that the scheme rounds; after QAT not those of the float twin.
    scheme : Scheme or None
        None for methods of ONNX Runtime's own.
    int8, fp32 : ModelProto
    state : StateSection
    numerics : Numerics
    observed_rows : int
    sensitivities : dict of str to float
        Where they were looked for.
    """

    spec: Spec
    parameters: Mapping[str, np.ndarray]
    float_parameters: Mapping[str, np.ndarray]
    scheme: Scheme | None
    int8: onnx.ModelProto
    fp32: onnx.ModelProto
    state: StateSection
    numerics: Numerics
    observed_rows: int
    sensitivities: Mapping[str, float]


def calibrate(
    spec: Spec,
    parameters: Mapping[str, np.ndarray],
    data: Dataset,
    *,
    observer: str,
    rows: int,
    power_of_two: bool = False,
    symmetric: bool = True,
    progress: Callable[[float], None] = lambda _: None,
) -> tuple[dict[str, Observer], int]:
    """Show the training part to an observer at every point; memory does not grow with the rows.

    Parameters
    ----------
    rows : int
        At most so many count, from windows spread evenly over the training part.

    Returns
    -------
    observers : dict of Observer
        By point.
    seen : int
        Rows that counted.

    Raises
    ------
    InputError
        If there is nothing to calibrate with, or it is constant or not finite.
    """
    context = architecture(spec).context
    steps = CALIBRATION_STEPS if context else 1
    begin = windows(data, TRAIN, context, steps, 0)
    wanted = min(len(begin), max(1, rows // steps))
    chosen = begin[np.linspace(0, len(begin) - 1, wanted).astype(np.int64)] if wanted else begin
    for some in np.array_split(chosen, max(1, len(chosen) // CHECKED_WINDOWS)):
        spanned = (some[:, None] + np.arange(steps)).ravel()
        check_rows(np.asarray(data.x[spanned]), "calibration set")
    observers = {
        name: make_observer(observer, name, power_of_two=power_of_two, symmetric=symmetric)
        for name, kind in describe(spec).points.items()
        if kind in ("signed", "positive")
    }
    numerics = ObservingNumerics(observers, skip=context)
    weights = tensors(parameters)
    batch = CALIBRATION_BATCH if context else CALIBRATION_BATCH * CALIBRATION_STEPS
    with one_thread(), torch.no_grad():
        for start in range(0, len(chosen), batch):
            some = chosen[start : start + batch]
            span = some[:, None] + np.arange(-context, steps)
            numerics.begin()
            run(spec, weights, torch.from_numpy(np.asarray(data.x[span])), numerics=numerics)
            progress(min(1.0, (start + batch) / len(chosen)))
    return observers, len(chosen) * steps


def validation_scores(
    spec: Spec, parameters: Mapping[str, np.ndarray], data: Dataset, **options: Any
) -> np.ndarray:
    """Scores of a few thousand validation rows, float32 of shape (n, classes)."""
    parts = []
    for stretch in data.stretches(VALIDATION, WARM_UP_ROWS, SENSITIVITY_ROWS):
        rows = np.asarray(data.x[stretch.begin : stretch.stop])
        parts.append(scores_of(spec, parameters, rows, **options)[stretch.first - stretch.begin :])
    return np.concatenate(parts)


def divergence(reference: np.ndarray, scores: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of class probabilities from the reference's, in nats."""
    p, q = softmax(reference), softmax(scores)
    return float((p * (np.log(p + 1e-12) - np.log(q + 1e-12))).sum(axis=1).mean())


def sensitivity(
    spec: Spec,
    parameters: Mapping[str, np.ndarray],
    data: Dataset,
    scheme_keeping: Callable[[Mapping[str, Kept]], Scheme],
    progress: Callable[[float], None] = lambda _: None,
) -> dict[str, float]:
    """What quantising each layer costs: how much divergence goes when it alone is kept.

    Returns
    -------
    dict of str to float
        Divergence in nats that keeping the layer in FP32 takes away, greatest first.
    """
    anatomy = describe(spec)
    names = [*anatomy.layers, *anatomy.sensitive]
    with one_thread():
        reference = validation_scores(spec, parameters, data)

        def cost(kept: Mapping[str, Kept]) -> float:
            numerics = SchemeNumerics(scheme_keeping(kept))
            return divergence(
                reference, validation_scores(spec, parameters, data, numerics=numerics)
            )

        everything = cost({})
        found = {}
        for i, name in enumerate(names):
            found[name] = everything - cost({name: "fp32"})
            progress((i + 1) / len(names))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def quantise(
    spec: Spec,
    parameters: Mapping[str, np.ndarray],
    data: Dataset,
    options: Options,
    *,
    metadata: Mapping[str, str] | None = None,
    progress: Progress = lambda stage, share: None,
) -> Quantised:
    """Quantise a network.

    Parameters
    ----------
    parameters : mapping of str to ndarray
        BatchNorm folded.
    data : Dataset
        Its training part calibrates and trains; its validation part ranks layers.
    options : Options
    progress : callable
        Told the stage and its share done.

    Raises
    ------
    InputError
        If the options contradict each other, or the data cannot calibrate.
    """
    _check(options)
    named = dict(metadata or {})
    if options.prune:
        spec, parameters = pruned(spec, parameters, options.prune)
        parameters = train(
            spec,
            data,
            dict(parameters),
            Plan(options.epochs, options.seed, PRUNED_LEARNING_RATE),
            progress=_told(progress, "training after pruning"),
        )
    fp32, fp32_state = float_graph(spec, parameters, named)
    if options.method in ("dynamic", "int4"):
        from models.foreign.weights import quantise_dynamic, quantise_int4

        make = quantise_dynamic if options.method == "dynamic" else quantise_int4
        progress(f"{options.method} quantisation", 0.0)
        return Quantised(
            spec,
            parameters,
            parameters,
            None,
            make(fp32),
            fp32,
            StateSection(int8=fp32_state, fp32=fp32_state),
            "tolerance",
            0,
            {},
        )
    observers, seen = calibrate(
        spec,
        parameters,
        data,
        observer=options.observer,
        rows=options.rows,
        power_of_two=options.scales == "power-of-two",
        symmetric=options.symmetric,
        progress=lambda share: progress("calibrating", share),
    )

    def scheme_keeping(kept: Mapping[str, Kept]) -> Scheme:
        return make_scheme(
            spec,
            parameters,
            lambda name: observers[name].range(),
            rule=options.scales,
            symmetric=options.symmetric,
            per_channel=options.per_channel,
            kept=kept,
        )

    kept: dict[str, Kept] = dict(options.keep)
    ranking: dict[str, float] = {}
    if options.keep_worst:
        ranking = sensitivity(
            spec,
            parameters,
            data,
            scheme_keeping,
            lambda share: progress("finding sensitive layers", share),
        )
        worst = [name for name in ranking if name not in kept][: options.keep_worst]
        kept |= dict.fromkeys(worst, "fp32")
    scheme, trained = scheme_keeping(kept), parameters
    if options.method == "qat":
        numerics = TrainedNumerics(spec, scheme, per_channel=options.per_channel)
        trained = train(
            spec,
            data,
            dict(parameters),
            Plan(options.epochs, options.seed, QAT_LEARNING_RATE),
            numerics=numerics,
            teacher=parameters,
            progress=_told(progress, "training quantised"),
        )
        scheme = numerics.finished(trained)
    int8, int8_state = quantised_graph(spec, trained, scheme, named)
    exact = options.scales == "power-of-two" and not kept
    return Quantised(
        spec,
        trained,
        parameters,
        scheme,
        int8,
        fp32,
        StateSection(int8=int8_state, fp32=fp32_state),
        "exact-int8" if exact else "tolerance",
        seen,
        ranking,
    )


def _told(progress: Progress, stage: str) -> Callable[[int, int, float], None]:
    return lambda done, total, loss: progress(f"{stage}, loss {loss:.5f}", done / total)


def _check(options: Options) -> None:
    if options.method in ("dynamic", "int4"):
        for flag, used in (
            ("--scales power-of-two", options.scales == "power-of-two"),
            ("--keep", bool(options.keep or options.keep_worst)),
        ):
            if used:
                raise InputError(
                    f"{flag} does not go with --method {options.method}",
                    where="octick model quantize",
                    expected="--method ptq or qat",
                    found="a method whose scales ONNX Runtime chooses for each row"
                    if options.method == "dynamic"
                    else "4-bit blocks with floating-point activations",
                )
    if not 0.0 <= options.prune < 1.0:
        raise InputError(
            "nothing would be left",
            where="--prune",
            expected="0 or more, below 1",
            found=str(options.prune),
        )
