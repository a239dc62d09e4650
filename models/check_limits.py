"""What the value check allows, from the training part: saturated codes, inputs, constant inputs.

A limit stands well beyond anything that was seen: the check is for what cannot be true. How far the
live distribution has moved is the drift monitor's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper

from engine.manifest import VIOLATIONS, CheckSection, StateTensor
from feeds.errors import InputError
from models.foreign.passes import copy_of
from models.foreign.runtime import INT8_OPS, fused_nodes
from models.quantisation import WARM_UP_ROWS, Quantised
from models.sequences import TRAIN, Dataset
from models.step_session import StepSession
from models.value_checks import LimitedLayer, quantised_layers, with_checks

SEGMENTS: Final = 16
SEGMENT_ROWS: Final = 256
MIN_INPUT_BOUND: Final = 10_000.0
INPUT_BOUND_FACTOR: Final = 16.0
MIN_CONSTANT_ROWS: Final = 256
CONSTANT_FACTOR: Final = 4
FEW_VALUES: Final = 256  # a feature of fewer, such as the spread in ticks, is a counted one
MIN_CONSTANT_ROWS_COUNTED: Final = 10_000
LONGEST_SHARE: Final = 4  # a run of more than a quarter of its stream says that runs say nothing


@dataclass(frozen=True)
class Checked:
    """Twins with their value check.

    Attributes
    ----------
    twins : Quantised
        As they were, where the check cannot be added.
    section : CheckSection or None
    limits : dict of str to dict of str to int
        Of each checked layer: ``codes``, ``seen`` (most saturated at once), ``limit``.
    reason : str
        Why there is no check; empty where there is one.
    """

    twins: Quantised
    section: CheckSection | None
    limits: Mapping[str, Mapping[str, int]]
    reason: str = ""


def add_checks(twins: Quantised, data: Dataset) -> Checked:
    """Give both graphs their value check.

    Parameters
    ----------
    twins : Quantised
        Its graphs are not changed.
    data : Dataset
        The training part sets the limits.

    Raises
    ------
    InputError
        If a graph cannot take the nodes, or would lose a fused one by them: naming which.
    """
    clip = data.facts.clip
    found = saturation_limits(twins.int8, twins.state.int8, segments(data))
    layers = [item for item, _ in found]
    int8 = with_checks(twins.int8, clip, layers, quantised=True)
    check_fusion(twins.int8, int8)
    fp32 = with_checks(twins.fp32, clip, quantised=False)
    section = CheckSection(
        output=VIOLATIONS,
        int8=tuple(item.layer.name for item in layers if not item.layer.scores),
        input_bound=input_bounds(data),
        max_constant=constant_rows(data),
    )
    limits = {
        item.layer.name: {"codes": item.size, "seen": seen, "limit": item.limit}
        for item, seen in found
    }
    return Checked(replace(twins, int8=int8, fp32=fp32), section, limits)


def segments(data: Dataset) -> Iterator[np.ndarray]:
    """Stretches of consecutive training rows, spread evenly over the streams and each of them."""
    stretches = list(data.stretches(TRAIN, 0))
    each = max(1, SEGMENTS // max(1, len(stretches)))
    length = WARM_UP_ROWS + SEGMENT_ROWS
    for item in stretches:
        last = max(item.begin, item.stop - length)
        for begin in np.unique(np.linspace(item.begin, last, each).astype(np.int64)):
            yield np.asarray(data.x[begin : min(begin + length, item.stop)], dtype=np.float32)


def saturation_limits(
    model: onnx.ModelProto, state: Sequence[StateTensor], rows: Iterator[np.ndarray]
) -> list[tuple[LimitedLayer, int]]:
    """Every quantised layer with its limit, and the most codes that saturated at once.

    With n codes, s of them saturated at worst, the limit is ``min(n - 1, max(2 s + 1, n / 2))``,
    half rounded up: at least half of a layer, and never what calibration showed twice over. A
    layer all of whose codes saturated is left out, since that is how it works.

    Parameters
    ----------
    rows : iterator of ndarray of float32, shape (n, features)
        Consecutive ones, each stretch from a fresh state.
    """
    layers = quantised_layers(model)
    if not layers:
        return []
    shown = {value.name for value in model.graph.output}
    tapped = copy_of(model)
    tapped.graph.output.extend(
        helper.make_tensor_value_info(layer.codes, TensorProto.UINT8, None)
        for layer in layers
        if layer.codes not in shown
    )
    session = StepSession(tapped, state, watch=[layer.codes for layer in layers])
    worst = [0] * len(layers)
    shapes: list[tuple[int, ...]] = []
    for stretch in rows:
        session.reset()
        for row in stretch:
            codes = session.step(row)[1:]
            shapes = shapes or [array.shape for array in codes]
            for i, (layer, array) in enumerate(zip(layers, codes, strict=True)):
                worst[i] = max(worst[i], layer.saturated(array))
    found = []
    for layer, shape, seen in zip(layers, shapes, worst, strict=True):
        size = int(np.prod(shape, dtype=np.int64))
        if seen < size:
            limit = min(size - 1, max(2 * seen + 1, -(-size // 2)))
            found.append((LimitedLayer(layer, shape, limit), seen))
    return found


def check_fusion(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """Whether ONNX Runtime still fuses everything that it fused.

    Raises
    ------
    InputError
        Naming the operator.
    """
    plain, checked = fused_nodes(before), fused_nodes(after)
    for op in sorted(plain.keys() & INT8_OPS):
        had, has = plain[op], checked.get(op, 0)
        if has < had:
            raise InputError(
                "the value check would undo a fusion of the graph",
                where=before.graph.name or "model",
                expected=f"{had} nodes {op} in ONNX Runtime",
                found=str(has),
                fix="serve it without a value check",
            )


def input_bounds(data: Dataset) -> tuple[float, ...]:
    """Of each feature, the greatest ``|x|`` before the clip that can be true.

    16 times the greatest of the training part, and at least 10,000: standard deviations, of which
    a feature that hardly moved in training can show a thousand on another market, and a damaged
    price or 1e30 more still.
    """
    greatest = np.zeros(data.x.shape[1]) if not data.facts.greatest else data.facts.greatest
    bounds = np.maximum(MIN_INPUT_BOUND, INPUT_BOUND_FACTOR * np.asarray(greatest, dtype=float))
    return tuple(bounds.tolist())


def constant_rows(data: Dataset) -> tuple[int, ...]:
    """Of each feature, how many consecutive rows may show one value; 0 is not checked.

    Four times the longest run within a stream's training rows, and at least 256; of a feature that
    takes fewer than 256 values at least 10,000, as a spread may stay at one tick for minutes on a
    market that trades more. Where the longest run takes more than a quarter of its stream, runs of
    this feature say nothing: it may be constant for a whole session. Streams of fewer than 1,024
    rows are too short to show either.
    """
    if data.facts.max_constant:
        return data.facts.max_constant
    n_features = data.x.shape[1]
    longest = np.zeros(n_features, dtype=np.int64)
    usual = np.zeros(n_features, dtype=bool)
    counted = np.ones(n_features, dtype=bool)
    told = False
    for item in data.stretches(TRAIN, 0):
        x = np.asarray(data.x[item.begin : item.stop])
        runs = longest_runs(x)
        longest = np.maximum(longest, runs)
        for column in np.flatnonzero(counted):
            counted[column] = len(np.unique(x[:, column])) < FEW_VALUES
        if len(x) >= LONGEST_SHARE * MIN_CONSTANT_ROWS:
            told = True
            usual |= runs * LONGEST_SHARE > len(x)
    least = np.where(counted, MIN_CONSTANT_ROWS_COUNTED, MIN_CONSTANT_ROWS)
    limits = np.maximum(CONSTANT_FACTOR * longest, least)
    return tuple(int(value) for value in np.where(usual | (not told), 0, limits))


def longest_runs(x: np.ndarray) -> np.ndarray:
    """Length of the longest run of one value in each column, int64 of shape (columns,)."""
    found = np.zeros(x.shape[1], dtype=np.int64)
    for column in range(x.shape[1]):
        changes = np.flatnonzero(np.diff(x[:, column]) != 0.0)
        ends = np.concatenate(([-1], changes, [len(x) - 1]))
        found[column] = np.diff(ends).max(initial=0)
    return found
