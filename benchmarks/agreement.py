"""Whether a backend gives the scores and the masks of the reference, over streams with resets.

Scores of an exact model come from the integer interpreter, which shares no line with any backend;
those of others, and all masks, from the graph as it is written in ONNX Runtime, nothing fused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Final

import msgspec
import numpy as np
import onnx

from benchmarks.contest import Lane
from engine.backends.exact_proof import plain_session
from engine.backends.hard_inputs import hard_inputs, input_steps
from engine.backends.integer_reference import IntegerReference
from engine.bundle import Bundle

STREAMS: Final = 3
RESET_SHARE: Final = 0.01
MAX_REFERENCE_NS: Final = 30_000_000_000  # a large model is held against fewer vectors


@dataclass(frozen=True)
class Script:
    """What is asked, in order, and the answers.

    Attributes
    ----------
    rows : ndarray of float32, shape (n, features)
        Ordinary, saturating, half way between two codes of the model's input, and beside that.
    stream : ndarray of int64, shape (n,)
    reset : ndarray of bool, shape (n,)
        Whether the stream is started afresh before the row.
    scores : ndarray of float32, shape (n, classes)
    masks : ndarray of int64, shape (n,)
        Of the value check; 0 where the model has none.
    bound : float
        Greatest difference of a score that is no disagreement: 0 where the model is exact.
    """

    rows: np.ndarray
    stream: np.ndarray
    reset: np.ndarray
    scores: np.ndarray
    masks: np.ndarray
    bound: float


class Agreement(msgspec.Struct, frozen=True):
    """How many of ``vectors`` answers were not the reference's: scores, and masks."""

    vectors: int
    disagreements: int
    mask_disagreements: int


def write_script(
    bundle: Bundle, n: int, seed: int = 0, *, progress: Callable[[float], object] = lambda _: None
) -> Script:
    """Draw what is asked of a bundle's INT8 model, and answer it.

    Fewer than ``n`` rows where the reference would take longer than `MAX_REFERENCE_NS`.
    """
    data, state = bundle.model_bytes("int8"), bundle.state("int8")
    exact = bundle.numerics == "exact-int8"
    steps = input_steps(onnx.load_model_from_string(data), bundle.input_name, bundle.clip)
    rng = np.random.default_rng(seed)
    drawn = hard_inputs(rng, (1, bundle.n_features), bundle.clip, steps, ties=exact)
    rows = np.concatenate(list(islice(drawn, n)))
    stream = rng.integers(STREAMS, size=n)
    reset = rng.random(n) < RESET_SHARE
    reference = IntegerReference(data, state) if exact else None
    plain = plain_session(data)
    names = [bundle.output_name, *(tensor.output for tensor in state)]
    names += [] if bundle.checks is None else [bundle.checks.output]
    scores = np.zeros((n, bundle.n_outputs), dtype=np.float32)
    masks = np.zeros(n, dtype=np.int64)
    fresh = {tensor.input: tensor.fresh() for tensor in state}
    now: dict[int, Mapping[str, np.ndarray]] = {}
    begin, done = time.monotonic_ns(), 0
    for i in range(n):
        before = fresh if reset[i] else now.get(int(stream[i]), fresh)
        found = plain.run(names, {bundle.input_name: rows[i : i + 1], **before})
        if bundle.checks is not None:
            masks[i] = found[-1].view(np.uint32)[0]
        after = dict(zip(fresh, found[1:], strict=False))
        scores[i] = found[0][0]
        if reference is not None:
            outputs, after = reference.step(rows[i : i + 1], before)
            scores[i] = outputs[bundle.output_name][0]
        now[int(stream[i])] = after
        done = i + 1
        progress(done / n)
        if time.monotonic_ns() - begin > MAX_REFERENCE_NS:
            break
    bound = 0.0 if exact else bundle.manifest.bound
    return Script(rows[:done], stream[:done], reset[:done], scores[:done], masks[:done], bound)


def hold_against(script: Script, lane_of: Callable[[int], Lane], *, exact: bool) -> Agreement:
    """Ask a contestant everything, and count what differs.

    Parameters
    ----------
    script : Script
    lane_of : callable
        The lane of a stream, from 0.
    exact : bool
        Whether one bit is a difference; else the script's bound is.
    """
    lanes = [lane_of(stream) for stream in range(STREAMS)]
    for lane in lanes:
        lane.reset()
    wrong = wrong_masks = 0
    for i, row in enumerate(script.rows):
        lane = lanes[script.stream[i]]
        if script.reset[i]:
            lane.reset()
        mask = lane.step(row)
        found, expected = lane.out.reshape(-1), script.scores[i]
        if exact:
            wrong += found.tobytes() != expected.tobytes()
        else:
            wrong += not float(np.abs(found - expected).max()) <= script.bound  # nor is a NaN
        wrong_masks += lane.gives_mask and mask != int(script.masks[i])
    for lane in lanes:
        lane.reset()
    return Agreement(len(script.rows), wrong, wrong_masks)
