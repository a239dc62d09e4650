"""INT8 beside FP32: what quantisation cost, and what it bought."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import numpy as np

from models.foreign.runtime import int8_nodes
from models.metrics import Metrics, evaluate
from models.quantisation import WARM_UP_ROWS, Quantised
from models.sequences import NO_LABEL, Dataset
from models.step_session import StepSession

EVALUATED_ROWS: Final = 20_000
LATENCY_RUNS: Final = 3_000


class Comparison(msgspec.Struct, frozen=True):
    """Twins on the same rows of the test part.

    Attributes
    ----------
    rows : int
    fp32, int8 : Metrics
    agreement : float
        Share of rows on which both name the same class.
    accuracy_loss_points : float
        Percentage points of accuracy that INT8 lost; below 0 it gained.
    bytes_fp32, bytes_int8 : int
        Of the ONNX files.
    size_ratio : float
        ``bytes_int8 / bytes_fp32``.
    p50_us_fp32, p99_us_fp32, p50_us_int8, p99_us_int8 : float
        Of one step in ONNX Runtime, batch 1, buffers bound.
    int8_nodes : int
        Nodes that compute in integers after ONNX Runtime's fusion.
    """

    rows: int
    fp32: Metrics
    int8: Metrics
    agreement: float
    accuracy_loss_points: float
    bytes_fp32: int
    bytes_int8: int
    size_ratio: float
    p50_us_fp32: float
    p99_us_fp32: float
    p50_us_int8: float
    p99_us_int8: float
    int8_nodes: int


def part_scores(
    score: Callable[[np.ndarray], np.ndarray],
    data: Dataset,
    part: int,
    most: int | None = EVALUATED_ROWS,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of a part as the engine would compute them, and the numbers of the rows.

    Parameters
    ----------
    score : callable
        Scores of consecutive rows of one stream, from a fresh state: `StepSession.stream`, or a
        network in PyTorch.

    Returns
    -------
    rows : ndarray of int64, shape (n,)
        Rows with a label.
    scores : ndarray of float32, shape (n, classes)
    """
    rows, scores = [], []
    for stretch in data.stretches(part, WARM_UP_ROWS, most):
        answers = score(np.asarray(data.x[stretch.begin : stretch.stop]))
        numbers = np.arange(stretch.begin, stretch.stop)
        good = (data.part[numbers] == part) & (data.label[numbers] != NO_LABEL)
        good &= numbers >= stretch.first
        rows.append(numbers[good])
        scores.append(answers[good])
    return np.concatenate(rows), np.concatenate(scores)


def measures(data: Dataset, rows: np.ndarray, scores: np.ndarray) -> Metrics:
    """Everything `models.metrics` can say about scores of these rows."""
    return evaluate(
        scores,
        data.label[rows],
        moves=data.move[rows],
        mid_half_ticks=data.mid_half_ticks[rows],
        cost_half_ticks=data.spread_ticks[rows],
        slot=data.slot[rows],
        time_ns=data.time_ns[rows],
    )


def compare(
    twins: Quantised, data: Dataset, part: int, *, most: int = EVALUATED_ROWS
) -> Comparison:
    """Run both twins over a part."""
    sessions = {
        "fp32": StepSession(twins.fp32, twins.state.fp32),
        "int8": StepSession(twins.int8, twins.state.int8),
    }
    scores, rows = {}, np.empty(0, dtype=np.int64)
    for name, session in sessions.items():
        rows, scores[name] = part_scores(session.stream, data, part, most)
    found = {name: measures(data, rows, values) for name, values in scores.items()}
    sample = np.asarray(data.x[rows[:1_000]])
    timed = interleaved_latency(list(sessions.values()), sample)
    sizes = [len(model.SerializeToString()) for model in (twins.fp32, twins.int8)]
    same = scores["int8"].argmax(axis=1) == scores["fp32"].argmax(axis=1)
    loss = found["fp32"].accuracy - found["int8"].accuracy
    return Comparison(
        rows=len(rows),
        fp32=found["fp32"],
        int8=found["int8"],
        agreement=round(float(same.mean()), 6),
        accuracy_loss_points=round(100.0 * loss, 4),
        bytes_fp32=sizes[0],
        bytes_int8=sizes[1],
        size_ratio=round(sizes[1] / sizes[0], 4),
        p50_us_fp32=timed[0][0],
        p99_us_fp32=timed[0][1],
        p50_us_int8=timed[1][0],
        p99_us_int8=timed[1][1],
        int8_nodes=int8_nodes(twins.int8),
    )


def interleaved_latency(
    sessions: Sequence[StepSession], rows: np.ndarray, rounds: int = 3
) -> list[tuple[float, float]]:
    """p50 and p99 of each session in microseconds: medians over rounds taken in turn."""
    found = np.array(
        [
            [session.latency(rows, LATENCY_RUNS // rounds) for session in sessions]
            for _ in range(rounds)
        ]
    )
    middle = np.median(found, axis=0)
    return [(round(float(p50), 2), round(float(p99), 2)) for p50, p99 in middle]
