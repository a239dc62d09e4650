"""Operations that only move data: reshape, transpose, slice, split, concatenate, select.

Each is a function of plain arrays, so that mantissas, units and bounds can all be moved the same
way.

Source: ONNX operators of the default set, versions 19 to 21.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from engine.backends.qdq_graph import Node
from feeds.errors import InputError

Arrays = Sequence[np.ndarray]
Parameters = Sequence[np.ndarray | None]
"""The constant inputs behind the data: shapes, axes, starts, indices; None where left out."""


def _axes(node: Node, parameters: Parameters) -> tuple[int, ...] | None:
    given = parameters[0] if parameters else None
    return None if given is None else tuple(int(axis) for axis in given)


def _identity(node: Node, data: Arrays, parameters: Parameters) -> list[np.ndarray]:
    return [data[0]]


def _reshape(node: Node, data: Arrays, parameters: Parameters) -> list[np.ndarray]:
    (shape,) = parameters
    assert shape is not None
    sizes = [int(size) for size in shape]
    if not node.attributes.get("allowzero", 0):
        sizes = [data[0].shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return [data[0].reshape(sizes)]


def _flatten(node: Node, data: Arrays, parameters: Parameters) -> list[np.ndarray]:
    (x,) = data
    axis = node.attributes.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return [x.reshape(int(np.prod(x.shape[:axis], dtype=np.int64)), -1)]


def _transpose(node: Node, data: Arrays, parameters: Parameters) -> list[np.ndarray]:
    return [np.transpose(data[0], node.attributes.get("perm"))]


def _squeeze(node: Node, data: Arrays, parameters: Parameters) -> list[np.ndarray]:
    return [np.squeeze(data[0], _axes(node, parameters))]


def _unsqueeze(node: Node, data: Arrays, parameters: Parameters) -> list[np.ndarray]:
    axes = _axes(node, parameters)
    assert axes is not None
    return [np.expand_dims(data[0], axes)]


def _slice(node: Node, data: Arrays, parameters: Parameters) -> list[np.ndarray]:
    starts, ends, axes, steps = (*parameters, None, None)[:4]
    assert starts is not None
    assert ends is not None
    index = [slice(None)] * data[0].ndim
    for i in range(len(starts)):
        axis = i if axes is None else int(axes[i])
        step = 1 if steps is None else int(steps[i])
        index[axis] = slice(int(starts[i]), int(ends[i]), step)
    return [data[0][tuple(index)]]


def _split(node: Node, data: Arrays, parameters: Parameters) -> list[np.ndarray]:
    axis = node.attributes.get("axis", 0)
    sizes = parameters[0] if parameters else None
    if sizes is None:
        parts = node.attributes.get("num_outputs", len(node.outputs))
        each = -(-data[0].shape[axis] // parts)
        return np.split(data[0], [each * i for i in range(1, parts)], axis=axis)
    return np.split(data[0], np.cumsum(sizes)[:-1], axis=axis)


def _concat(node: Node, data: Arrays, parameters: Parameters) -> list[np.ndarray]:
    return [np.concatenate(list(data), axis=node.attributes["axis"])]


def _select(node: Node, data: Arrays, parameters: Parameters) -> list[np.ndarray]:
    (indices,) = parameters
    assert indices is not None
    axis = node.attributes.get("axis", 0)
    size = data[0].shape[axis]
    if indices.size and not (-size <= indices.min() and indices.max() < size):
        node.refuse(
            "an index outside the table",
            expected=f"{-size} to {size - 1}",
            found=f"{indices.min()} to {indices.max()}",
            fix="make the table longer, or clip the index",
        )
    return [np.take(data[0], indices, axis=axis)]


MOVES: Final[dict[str, Callable[[Node, Arrays, Parameters], list[np.ndarray]]]] = {
    "Concat": _concat,
    "Flatten": _flatten,
    "Gather": _select,
    "Identity": _identity,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}


def move(node: Node, data: Arrays, parameters: Parameters) -> list[np.ndarray]:
    """Move arrays as a node says.

    Parameters
    ----------
    node : Node
        Its operator is in `MOVES`.
    data : sequence of ndarray
        The tensors that are moved: all inputs of a Concat, the first of all others.
    parameters : sequence of ndarray of int, or None

    Raises
    ------
    InputError
        If the shapes do not fit, or an index lies outside.
    """
    try:
        return [np.asarray(array) for array in MOVES[node.op](node, data, parameters)]
    except InputError:
        raise
    except (ValueError, IndexError, AssertionError, KeyError) as error:
        node.refuse("a move that these shapes do not allow", found=error)
