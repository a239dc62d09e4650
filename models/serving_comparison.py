"""A candidate beside the bundle that serves, on rows that neither was calibrated from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
import onnx

from engine.backends.registry import open_backend
from engine.bundle import Bundle
from engine.candidate import (
    FP32_BOUND,
    MAX_AGREEMENT_LOSS,
    MAX_VIOLATION_GAIN,
    Answers,
    answers,
)
from engine.manifest import StateTensor
from engine.model_input import normalised
from models.comparison import interleaved_latency
from models.sequences import NO_LABEL, TEST, Dataset
from models.step_session import StepSession

SATURATION_ROWS: Final = 2_000
LATENCY_ROWS: Final = 1_000
QUANTILES: Final = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
LEAST_DIVERGENCE: Final = 0.01  # of a score: below that more or less says nothing


class Limits(msgspec.Struct, frozen=True):
    """How much worse than the serving bundle a candidate may be.

    Attributes
    ----------
    max_agreement_loss : float
        Share of rows that INT8's agreement with FP32 may fall by.
    max_divergence_ratio : float
        Of the 99th percentile of a row's greatest difference of a score between INT8 and FP32.
    max_saturation_gain : float
        Share of the codes at the end of their range, over all layers.
    max_violation_gain : float
        Share of rows on which its value checks may find something and the serving bundle's do not.
    max_latency_ratio : float
        Of the median time of an inference; 0 lets the time be no reason.
    """

    max_agreement_loss: float = MAX_AGREEMENT_LOSS
    max_divergence_ratio: float = 1.5
    max_saturation_gain: float = 0.01
    max_violation_gain: float = MAX_VIOLATION_GAIN
    max_latency_ratio: float = 0.0


class Standing(msgspec.Struct, frozen=True):
    """One bundle on the held-out rows.

    Attributes
    ----------
    agreement : float
        Share of rows on which INT8 names the class that its own FP32 twin names.
    divergence : dict of str to float
        Quantiles over the rows of the greatest difference of a score between INT8 and FP32.
    saturation : float
        Share of the codes of quantised layers that stand at the end of their range.
    saturated : dict of str to float
        The same of each layer where there are any.
    violations : int
        Rows on which the graph's value checks found something.
    int8_accuracy, fp32_accuracy : float
        On the rows with a label.
    p50_us, p99_us : float
        Of an INT8 inference, both bundles in turn; no two runs measure the same.
    """

    agreement: float
    divergence: dict[str, float]
    saturation: float
    saturated: dict[str, float]
    violations: int
    int8_accuracy: float
    fp32_accuracy: float
    p50_us: float
    p99_us: float


class ServingComparison(msgspec.Struct, frozen=True):
    """Both bundles on the same rows.

    Attributes
    ----------
    rows, labelled_rows : int
    event_time_from_ns, event_time_to_ns : int
    fp32_difference : float
        Greatest difference of a score between both FP32 twins, relative where scores pass 1: they
        have the same weights.
    serving, candidate : Standing
    """

    rows: int
    labelled_rows: int
    event_time_from_ns: int
    event_time_to_ns: int
    fp32_difference: float
    serving: Standing
    candidate: Standing


def compare_with_serving(
    serving: Bundle, candidate: Bundle, data: Dataset, vectors: np.ndarray
) -> ServingComparison:
    """Run both precisions of both bundles over the test part.

    Parameters
    ----------
    data : Dataset
    vectors : ndarray of float64, shape (n, features)
        Raw features of the rows of the test part: the bundles may normalise differently.
    """
    rows = np.flatnonzero(data.part == TEST)
    assert len(rows) == len(vectors) > 0
    streams = np.cumsum(data.starts[rows]).astype(np.int64)
    streams -= streams[0]
    label = data.label[rows]
    bundles = serving, candidate
    timed = interleaved_latency(
        [StepSession(bundle.model_bytes("int8"), bundle.state("int8")) for bundle in bundles],
        np.asarray(data.x[rows[:LATENCY_ROWS]]),
    )
    found = [_answers(bundle, vectors, streams) for bundle in bundles]
    before, after = (answer["fp32"].scores.astype(np.float64) for answer in found)
    apart = float(np.abs(after - before).max()) / max(1.0, float(np.abs(before).max()))
    standings = [
        _standing(bundle, vectors, label, answer, latency)
        for bundle, answer, latency in zip(bundles, found, timed, strict=True)
    ]
    times = data.time_ns[rows]
    return ServingComparison(
        rows=len(rows),
        labelled_rows=int((label != NO_LABEL).sum()),
        event_time_from_ns=int(times.min()),
        event_time_to_ns=int(times.max()),
        fp32_difference=round(apart, 12),
        serving=standings[0],
        candidate=standings[1],
    )


def _answers(bundle: Bundle, vectors: np.ndarray, streams: np.ndarray) -> dict[str, Answers]:
    x, found = normalised(vectors, bundle), {}
    for precision in ("int8", "fp32"):
        backend = open_backend("onnx", bundle, precision=precision)
        found[precision] = answers(backend, x, streams)
        backend.close()
    return found


def _standing(
    bundle: Bundle,
    vectors: np.ndarray,
    label: np.ndarray,
    found: dict[str, Answers],
    latency: tuple[float, float],
) -> Standing:
    int8, fp32 = found["int8"], found["fp32"]
    apart = np.abs(int8.scores.astype(np.float64) - fp32.scores).max(axis=1)
    known = label != NO_LABEL
    saturated = saturation(
        bundle.model_bytes("int8"),
        bundle.state("int8"),
        normalised(vectors[:SATURATION_ROWS], bundle),
    )
    ends, codes = (sum(pair[k] for pair in saturated.values()) for k in (0, 1))
    return Standing(
        agreement=round(float((int8.classes == fp32.classes).mean()), 6),
        divergence={
            name: round(float(np.quantile(apart, share)), 9) for name, share in QUANTILES.items()
        },
        saturation=round(ends / max(1, codes), 9),
        saturated={
            name: round(at_end / of, 9) for name, (at_end, of) in saturated.items() if at_end
        },
        violations=int(np.count_nonzero(int8.violations)),
        int8_accuracy=_accuracy(int8, label, known),
        fp32_accuracy=_accuracy(fp32, label, known),
        p50_us=latency[0],
        p99_us=latency[1],
    )


def _accuracy(found: Answers, label: np.ndarray, known: np.ndarray) -> float:
    return round(float((found.classes[known] == label[known]).mean()), 6) if known.any() else 0.0


def saturation(
    int8: bytes, state: Sequence[StateTensor], x: np.ndarray
) -> dict[str, tuple[int, int]]:
    """Codes at the end of their range, and codes in all, of each layer that quantises.

    The greatest code counts, and the least where the zero point lies above it: at zero point 0 the
    least code is what a ReLU cuts off, and means nothing.
    """
    model = onnx.load_from_string(int8)
    arrays = {item.name: item for item in model.graph.initializer}
    zeros = {}
    for node in model.graph.node:
        if node.op_type != "QuantizeLinear" or len(node.input) < 3 or node.input[2] not in arrays:
            continue
        zero = onnx.numpy_helper.to_array(arrays[node.input[2]])
        if zero.size == 1 and zero.dtype == np.uint8:
            zeros[node.output[0]] = int(zero.reshape(()))
    remembered = {item.output for item in state}
    names = [name for name in zeros if name not in remembered]
    if not names:
        return {}
    codes = StepSession(int8, state, optimise=False, watch=names).watched(x)
    found = {}
    for name, values in codes.items():
        ends = int((values == 255).sum())
        if zeros[name]:
            ends += int((values == 0).sum())
        found[name.removesuffix(".q")] = ends, int(values.size)
    return found


def worse(found: ServingComparison, limits: Limits) -> list[str]:
    """Why a candidate is worse than what serves, a line each; empty where it is not."""
    serving, candidate = found.serving, found.candidate
    reasons = []
    if candidate.agreement < serving.agreement - limits.max_agreement_loss:
        reasons.append(f"agreement {candidate.agreement:.2%} against {serving.agreement:.2%}")
    before, after = serving.divergence["p99"], candidate.divergence["p99"]
    if after > limits.max_divergence_ratio * max(before, LEAST_DIVERGENCE):
        reasons.append(f"99th percentile of the divergence {after:.4g} against {before:.4g}")
    if candidate.saturation > serving.saturation + limits.max_saturation_gain:
        reasons.append(f"saturation {candidate.saturation:.2%} against {serving.saturation:.2%}")
    chance = limits.max_violation_gain * found.rows
    if candidate.violations > serving.violations + chance:
        reasons.append(
            f"value checks find something in {candidate.violations} rows"
            f" against {serving.violations} of {found.rows}"
        )
    slower = candidate.p50_us > limits.max_latency_ratio * serving.p50_us
    if limits.max_latency_ratio and slower:
        reasons.append(f"{candidate.p50_us:.1f} us an inference against {serving.p50_us:.1f}")
    reasons = [f"worse than the serving model: {reason}" for reason in reasons]
    if not found.fp32_difference <= FP32_BOUND:
        reasons.insert(
            0,
            "its FP32 twin is not the serving bundle's: the source does not belong to the model"
            f" that serves, scores are {found.fp32_difference:.3g} apart",
        )
    return reasons
