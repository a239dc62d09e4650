"""Inputs on which two implementations of one quantised model come apart, if they ever do.

Ordinary rows seldom show a kernel that saturates a narrow intermediate sum, rounds a tie another
way, or adds the zero point before it rounds: float32 then lacks the bits to tell a value just below
a tie from the tie. So rows here saturate, lie half way between two codes of the graph's own input
quantisation, or next to that by one float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    import onnx

KINDS: Final = 4
ORDINARY_SD: Final = 0.3  # of the clip
CODES: Final = 256
_MOVES: Final = frozenset(
    ("Concat", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze")
) | {"Transpose", "Unsqueeze"}


def input_steps(model: onnx.ModelProto, name: str, clip: float) -> tuple[float, ...]:
    """Scales at which a graph quantises its input, moved about or not.

    Parameters
    ----------
    model : ModelProto
    name : str
        The graph input.
    clip : float
        Inputs lie in [-clip, clip]; where the graph quantises none, `usual_steps` of it are given.
    """
    import onnx

    constants = {item.name: item for item in model.graph.initializer}
    reached, found = {name}, list[float]()
    for node in model.graph.node:  # ONNX keeps them in an order of computing
        if not reached.intersection(node.input[:1] if node.op_type != "Concat" else node.input):
            continue
        if node.op_type in _MOVES:
            reached.update(node.output)
        elif node.op_type == "QuantizeLinear" and node.input[1] in constants:
            found.extend(onnx.numpy_helper.to_array(constants[node.input[1]]).ravel().tolist())
    return tuple(sorted({step for step in found if step > 0.0})) or usual_steps(clip)


def usual_steps(clip: float) -> tuple[float, ...]:
    """What our own exporter quantises an input with, where the clip is a power of two."""
    return (clip / (CODES / 2),)


def hard_inputs(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    clip: float,
    steps: tuple[float, ...],
    *,
    ties: bool = True,
) -> Iterator[np.ndarray]:
    """Rows without end: ordinary, saturating, half way between codes, beside that, in turn.

    Parameters
    ----------
    rng : Generator
    shape : tuple of int
        Of one input.
    clip : float
    steps : tuple of float
        From `input_steps`.
    ties : bool
        False leaves out what lies half way between codes or beside that.

    Yields
    ------
    ndarray of float32
        In [-clip, clip].
    """
    for number in range(1 << 62):
        kind = number % (KINDS if ties else 2)
        if kind < 2:
            drawn = rng.standard_normal(shape) * (ORDINARY_SD * clip if kind == 0 else 1e6)
            x = np.clip(drawn, -clip, clip).astype(np.float32)
        else:
            step = np.asarray(steps)[rng.integers(len(steps), size=shape)]
            codes = np.floor(np.minimum(clip / step, CODES)).astype(np.int64)
            x = ((rng.integers(-codes, codes + 1) + 0.5) * step).astype(np.float32)
            if kind == 3:
                towards = np.where(rng.random(shape) < 0.5, -np.inf, np.inf)
                x = np.nextafter(x, towards.astype(np.float32))
            x = np.clip(x, np.float32(-clip), np.float32(clip))
        yield x
