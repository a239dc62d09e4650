"""From a training run to a bundle: quantise, compare, prove, and write everything that goes in."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from engine.backends.exactness import prove_exact
from engine.bundle import load_bundle
from feeds.errors import InputError
from models.calibration import FeatureHistogram
from models.check_limits import Checked, add_checks
from models.comparison import Comparison, compare
from models.execute import scores_of
from models.export import (
    CALIBRATION_NAME,
    GOLDEN_NAME,
    RESEARCH_FP32_NAME,
    RESEARCH_INT8_NAME,
    npz_bytes,
    research_graph,
    write_bundle,
)
from models.labels import CLASSES
from models.numerics import SchemeNumerics
from models.quantisation import WARM_UP_ROWS, Options, Quantised, quantise
from models.report.bundle_report import write_report
from models.runs import Run
from models.sequences import TEST, TRAIN, Dataset
from models.source import SOURCE_NAME, Source
from models.step_session import StepSession
from models.train_run import PACKAGES
from models.verify import BOUND_MARGIN, VECTORS, greatest_difference, vectors_of, verify

GOLDEN_ROWS: Final = 256
BOUND_VECTORS: Final = 2 * VECTORS
LIVE_ROWS: Final = 2_000
HASH_KEY: Final = "octick.model"
Progress = Callable[[str, float], None]


class Made(msgspec.Struct, frozen=True):
    """What `make_bundle` did.

    Attributes
    ----------
    bundle : str
    model_hash, numerics : str
    bound : float
    options : Options
    comparison : Comparison
    calibration_rows : int
    coverage : float
        Share of the test part's values within the range that calibration saw.
    accumulator_headroom_bits : float or None
        The least of any node, where exactness was proved.
    sensitivities : dict of str to float
    failed : tuple of str
        Checks of the first two levels of verification that do not hold.
    unchecked : str
        Why the graphs have no value check; empty where they have one.
    """

    bundle: str
    model_hash: str
    numerics: str
    bound: float
    options: Options
    comparison: Comparison
    calibration_rows: int
    coverage: float
    accumulator_headroom_bits: float | None
    sensitivities: dict[str, float]
    failed: tuple[str, ...]
    unchecked: str = ""


def live_rows(data: Dataset, n: int = LIVE_ROWS) -> np.ndarray:
    """Consecutive rows of the test part's longest stretch, float32 of shape (<= n, features)."""
    stretches = list(data.stretches(TEST, WARM_UP_ROWS))
    longest = max(stretches, key=lambda stretch: stretch.stop - stretch.first)
    return np.asarray(data.x[longest.begin : longest.stop][:n], dtype=np.float32)


def measured_bound(twins: Quantised, rows: np.ndarray, clip: float) -> float:
    """Greatest difference of an INT8 score between levels, threads and PyTorch, with a margin.

    With free scales a value can fall to either side of a rounding tie, and in a model with state
    the difference stays: half is added to what was seen.
    """
    state = twins.state.int8
    x = vectors_of(rows, clip, BOUND_VECTORS)
    plain = StepSession(twins.int8, state, optimise=False).run(x)
    others = [StepSession(twins.int8, state, threads=n).run(x) for n in (1, 2)]
    if twins.scheme is not None:
        numerics = SchemeNumerics(twins.scheme)
        others.append(scores_of(twins.spec, twins.parameters, x, numerics=numerics))
    return BOUND_MARGIN * max(greatest_difference(scores, plain) for scores in others)


def make_bundle(
    run: Run,
    options: Options,
    folder: Path,
    *,
    name: str = "",
    with_report: bool = True,
    progress: Progress = lambda stage, share: None,
) -> Made:
    """Quantise a run's network and write the bundle.

    Parameters
    ----------
    folder : Path
        The bundle's; replaced when everything has gone well, else left as it was.
    name : str
        The architecture's by default.
    with_report : bool
        Write ``report.html`` too.

    Raises
    ------
    InputError
        If the options or the data cannot be used, or exactness cannot be proved: then the node is
        named.
    """
    twins = quantise(
        run.spec,
        run.parameters,
        run.data,
        options,
        metadata=metadata_of(run.data),
        progress=progress,
    )
    return finish_bundle(
        run,
        twins,
        options,
        folder,
        name=name or run.spec.arch,
        with_report=with_report,
        progress=progress,
    )


def metadata_of(data: Dataset) -> dict[str, str]:
    """What both graphs say of themselves."""
    return {
        "octick.classes": ",".join(CLASSES),
        "octick.horizon": str(data.facts.horizon),
        "octick.label": data.facts.label,
    }


def finish_bundle(
    run: Run,
    twins: Quantised,
    options: Options,
    folder: Path,
    *,
    name: str,
    with_report: bool = True,
    progress: Progress = lambda stage, share: None,
) -> Made:
    """Check, prove, compare, write and verify twins quantised already; see `make_bundle`."""
    data = run.data
    progress("adding the value check", 0.0)
    checked = _checked(twins, data)
    twins = checked.twins
    exact = twins.numerics == "exact-int8"
    headroom = None
    if exact:
        progress("proving that every accumulator is exact", 0.0)
        bounds = prove_exact(twins.int8, twins.state.int8)
        headroom = round(min(item.headroom_bits for item in bounds), 3)
    rows = live_rows(data)
    bound = 0.0 if exact else measured_bound(twins, rows, data.facts.clip)
    progress("comparing INT8 and FP32 on the test part", 0.0)
    comparison = compare(twins, data, TEST)
    histogram, coverage = _calibration(run, data)
    files = _files(twins, data, rows, histogram)
    training = {
        "architecture": twins.spec.arch,
        "spec": msgspec.to_builtins(twins.spec),
        "label": {
            "kind": data.facts.label,
            "horizon": data.facts.horizon,
            "threshold": data.facts.threshold,
        },
        "options": msgspec.to_builtins(options),
        "data": run.record.data,
        "epochs": run.record.epochs,
        "seed": run.record.seed,
        "optimum_accuracy": run.record.optimum_accuracy,
        "calibration": {
            "rows": twins.observed_rows,
            "observer": options.observer,
            "coverage": coverage,
        },
        "value_check": checked.reason or checked.limits,
        "test": _summary(comparison),
        "versions": {package: version(package) for package in PACKAGES},
    }
    manifest = write_bundle(
        folder,
        name,
        twins.int8,
        twins.fp32,
        numerics=twins.numerics,
        normalisation=data.normalisation,
        classes=CLASSES,
        state=twins.state,
        checks=checked.section,
        bound=bound,
        training=training,
        files=files,
    )
    bundle = load_bundle(folder)
    verification = verify(
        bundle, rows, levels=("operator", "subgraph"), on_stage=lambda stage: progress(stage, 0.0)
    )
    if with_report:
        progress("writing the report", 0.0)
        facts = msgspec.to_builtins(comparison)
        write_report(bundle, run, twins, facts, verification)
    return Made(
        bundle=str(folder),
        model_hash=manifest.model_hash,
        numerics=twins.numerics,
        bound=bound,
        options=options,
        comparison=comparison,
        calibration_rows=twins.observed_rows,
        coverage=coverage,
        accumulator_headroom_bits=headroom,
        sensitivities={key: round(value, 9) for key, value in twins.sensitivities.items()},
        failed=tuple(check.name for check in verification.checks if not check.ok),
        unchecked=checked.reason,
    )


def _checked(twins: Quantised, data: Dataset) -> Checked:
    """Twins with their value check; another's graph that cannot take one goes without."""
    try:
        return add_checks(twins, data)
    except InputError as error:
        if twins.parameters:
            raise
        return Checked(twins, None, {}, str(error))


def _summary(comparison: Comparison) -> dict[str, Any]:
    """What of a comparison goes into the manifest: no latencies, so that it is reproducible."""
    return {
        "rows": comparison.rows,
        "int8_accuracy": comparison.int8.accuracy,
        "fp32_accuracy": comparison.fp32.accuracy,
        "agreement": comparison.agreement,
        "size_ratio": comparison.size_ratio,
    }


def _calibration(run: Run, data: Dataset) -> tuple[FeatureHistogram, float]:
    """Histogram of the training part's features, and how much of the test part it covers."""
    histogram = FeatureHistogram(run.spec.n_features, data.facts.clip)
    for part in np.array_split(np.flatnonzero(data.part == TRAIN), 64):
        histogram.update(np.asarray(data.x[part]))
    live = np.asarray(data.x[np.flatnonzero(data.part == TEST)])
    return histogram, round(float(histogram.coverage(live).values), 6)


def _files(
    twins: Quantised, data: Dataset, rows: np.ndarray, histogram: FeatureHistogram
) -> dict[str, bytes]:
    golden = {"x": rows[:GOLDEN_ROWS]}
    for precision, model in (("int8", twins.int8), ("fp32", twins.fp32)):
        session = StepSession(model, getattr(twins.state, precision))
        golden[precision] = session.run(golden["x"])
    own = {}
    if twins.parameters:
        source = Source(twins.spec, twins.float_parameters, twins.parameters, twins.scheme)
        own[SOURCE_NAME] = source.to_bytes()
    normalisation = data.normalisation
    research = {
        RESEARCH_INT8_NAME: research_graph(twins.int8, twins.state.int8, normalisation),
        RESEARCH_FP32_NAME: research_graph(twins.fp32, twins.state.fp32, normalisation),
    }
    return {
        GOLDEN_NAME: npz_bytes(golden),
        CALIBRATION_NAME: npz_bytes(histogram.save()),
        **own,
        **{name: graph.SerializeToString(deterministic=True) for name, graph in research.items()},
    }
