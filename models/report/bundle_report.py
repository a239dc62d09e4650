"""What stands in a bundle's report: gathered from the run, the twins and their verification."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import torch
from torch import Tensor

from engine.bundle import Bundle, load_bundle
from engine.feature_specs import NAMES
from engine.manifest import MANIFEST_NAME
from feeds.errors import InputError
from models.calibration import FeatureHistogram
from models.comparison import LATENCY_RUNS, interleaved_latency
from models.execute import run, tensors
from models.export import GOLDEN_NAME, REPORT_NAME
from models.foreign.runtime import int8_nodes
from models.numerics import FloatNumerics
from models.operations import Spec
from models.quantisation import Quantised
from models.report.html import RangeFacts, ReportFacts, html_report
from models.runs import SEARCH_FOLDER, SEARCH_NAME, Run
from models.sequences import TEST, TRAIN, Dataset
from models.shapes import describe
from models.step_session import StepSession
from models.verify import Verification

SAMPLED_ROWS: Final = 1_024
SAMPLED_VALUES: Final = 100_000
RANGE_BINS: Final = 64
LATENCY_SAMPLES: Final = 1_000


class _Sampling(FloatNumerics):
    """Float, and some of every point's values are kept."""

    def __init__(self) -> None:
        self.values: dict[str, list[np.ndarray]] = {}

    def point(self, name: str, values: Tensor) -> Tensor:
        self.values.setdefault(name, []).append(values.detach().numpy().ravel())
        return values

    def sample(self, name: str) -> np.ndarray:
        """At most `SAMPLED_VALUES` values of a point, evenly chosen."""
        whole = np.concatenate(self.values[name])
        return whole[:: max(1, len(whole) // SAMPLED_VALUES)]


def _sampled(
    spec: Spec, parameters: Mapping[str, np.ndarray], data: Dataset, part: int
) -> _Sampling:
    numerics = _Sampling()
    stretch = next(iter(data.stretches(part, 0, SAMPLED_ROWS)))
    rows = np.array(data.x[stretch.begin : stretch.stop][:SAMPLED_ROWS])
    with torch.no_grad():
        run(spec, tensors(parameters), torch.from_numpy(rows[None]), numerics=numerics)
    return numerics


def range_facts(twins: Quantised, data: Dataset) -> list[RangeFacts]:
    """Calibrated range of each observed point against what the test part brings there."""
    if twins.scheme is None:
        return []
    spec, parameters = twins.spec, twins.parameters
    seen, live = (_sampled(spec, parameters, data, part) for part in (TRAIN, TEST))
    found = []
    for name, kind in describe(spec).points.items():
        if kind not in ("signed", "positive"):
            continue
        at = twins.scheme.points[name]
        low, high = -at.zero_point * at.scale, (255 - at.zero_point) * at.scale
        both = [numerics.sample(name) for numerics in (seen, live)]
        ends = min(low, *(float(v.min()) for v in both)), max(high, *(float(v.max()) for v in both))
        edges = np.linspace(*ends, RANGE_BINS + 1)
        counts = [np.histogram(values, edges)[0].tolist() for values in both]
        outside = float(((both[1] < low - at.scale / 2) | (both[1] > high + at.scale / 2)).mean())
        found.append(RangeFacts(name, low, high, edges.tolist(), counts[0], counts[1], outside))
    return found


def coverage_facts(spec: Spec, data: Dataset) -> dict[str, Any]:
    """How much of the live features lies where calibration has been, and how far they moved."""
    seen, live = (FeatureHistogram(spec.n_features, data.facts.clip) for _ in range(2))
    for histogram, part in ((seen, TRAIN), (live, TEST)):
        for rows in np.array_split(np.flatnonzero(data.part == part), 64):
            histogram.update(np.asarray(data.x[rows]))
    found = seen.coverage(np.asarray(data.x[np.flatnonzero(data.part == TEST)]))
    names = NAMES if spec.n_features == len(NAMES) else [str(i) for i in range(spec.n_features)]
    return {
        "features": dict(zip(names, found.of_feature.tolist(), strict=True)),
        "overall": float(found.values),
        "rows": float(found.rows),
        "psi": dict(zip(names, seen.psi(live).tolist(), strict=True)),
    }


def write_report(
    bundle: Bundle,
    run: Run,
    twins: Quantised,
    comparison: Mapping[str, Any],
    verification: Verification,
) -> None:
    """Write ``report.html`` into a bundle; it is no part of what the manifest vouches for."""
    data = run.data
    rows = np.asarray(data.x[data.rows_of(TEST)[:LATENCY_SAMPLES]])
    baselines: dict[str, Any] = dict(run.record.baselines)
    baselines["most frequent class"] = run.record.metrics["majority"]
    if run.record.optimum_accuracy is not None:
        baselines["optimum of the simulated market"] = run.record.optimum_accuracy
    manifest = msgspec.to_builtins(bundle.manifest)
    for number in ("mean", "inv_scale"):
        manifest["input"].pop(number)  # 96 numbers each, of no use to a reader
    html = html_report(
        ReportFacts(
            name=bundle.name,
            manifest=manifest,
            comparison=comparison,
            baselines=baselines,
            verification=msgspec.to_builtins(verification),
            ranges=range_facts(twins, data),
            coverage=coverage_facts(twins.spec, data),
            latency_us={
                precision: StepSession(bundle.model_bytes(precision), bundle.state(precision))
                .latencies(rows, LATENCY_SAMPLES)
                .tolist()
                for precision in ("int8", "fp32")
            },
            reliability={name: comparison[name]["reliability"] for name in ("int8", "fp32")},
            curve={
                name: comparison[name]["following"]["equity_half_ticks"]
                for name in ("int8", "fp32")
                if comparison[name]["following"]
            },
            front=searched_points(run),
        )
    )
    (bundle.path / REPORT_NAME).write_bytes(html)


def searched_points(run: Run) -> list[dict[str, Any]] | None:
    """What ``octick model tune`` measured for a run; None where it was not called."""
    path = run.folder / SEARCH_FOLDER / SEARCH_NAME
    if not path.exists():
        return None
    points: list[dict[str, Any]] = msgspec.json.decode(path.read_bytes())["points"]
    return points


def found_bundles(paths: Sequence[Path]) -> list[Bundle]:
    """Bundles among the paths, or one level below them.

    Raises
    ------
    InputError
        If a path leads to none.
    """
    found = []
    for path in paths:
        inside = sorted(item.parent for item in path.glob(f"*/{MANIFEST_NAME}"))
        if (path / MANIFEST_NAME).exists():
            inside = [path]
        if not inside:
            raise InputError(
                "no bundle here",
                where=str(path),
                expected=f"a folder with {MANIFEST_NAME}, or with such folders in it",
                fix="make one with 'octick model quantize RUN'",
            )
        found += [load_bundle(folder) for folder in inside]
    return found


def report_rows(
    bundles: Sequence[Bundle], progress: Callable[[str, float], None]
) -> list[dict[str, Any]]:
    """A row a bundle for `models.report.table`: what its manifest says, and latencies now."""
    rows = []
    for i, bundle in enumerate(bundles):
        progress(f"timing {bundle.path}", i / len(bundles))
        training = bundle.manifest.training
        test, options = training.get("test", {}), training.get("options", {})
        sessions = [
            StepSession(bundle.model_bytes(name), bundle.state(name)) for name in ("int8", "fp32")
        ]
        (p50, p99), (p50_float, p99_float) = interleaved_latency(sessions, _timed_rows(bundle))
        accuracies = [test.get(f"{name}_accuracy") for name in ("fp32", "int8")]
        loss = None if None in accuracies else 100.0 * (accuracies[0] - accuracies[1])
        rows.append(
            {
                "bundle": str(bundle.path),
                "architecture": training.get("architecture", bundle.name),
                "method": options.get("method", ""),
                "scales": options.get("scales", ""),
                "accuracy_fp32": accuracies[0],
                "accuracy_int8": accuracies[1],
                "accuracy_loss_points": loss,
                "agreement": test.get("agreement"),
                "size_ratio": bundle.int8_path.stat().st_size / bundle.fp32_path.stat().st_size,
                "p50_us_int8": p50,
                "p99_us_int8": p99,
                "p50_us_fp32": p50_float,
                "p99_us_fp32": p99_float,
                "int8_nodes": int8_nodes_of(bundle),
                "numerics": bundle.numerics,
            }
        )
    return rows


def int8_nodes_of(bundle: Bundle) -> int:
    """Nodes that compute in integers once ONNX Runtime has fused the graph."""
    import onnx

    return int8_nodes(onnx.load_from_string(bundle.model_bytes("int8")))


def _timed_rows(bundle: Bundle) -> np.ndarray:
    if GOLDEN_NAME in bundle.manifest.files:
        with np.load(bundle.path / GOLDEN_NAME, allow_pickle=False) as file:
            return file["x"]
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((LATENCY_RUNS, bundle.n_features))
    return np.clip(drawn, -bundle.clip, bundle.clip).astype(np.float32)
