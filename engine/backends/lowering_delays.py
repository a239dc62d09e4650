"""Delays of a QDQ graph: a state of codes that a Concat puts before the present ones.

``Concat(past, now)`` on the first axis holds the last steps, oldest first; a Slice without the
oldest returns as the next past. What reads them reads all steps as they stand, or a Gather of
some, which a Transpose may put in the order of rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from engine.backends import reference_operations as reference
from engine.backends.integer_graph import Delay
from engine.backends.qdq_graph import Node
from engine.manifest import StateTensor

if TYPE_CHECKING:
    from engine.backends.lowering import Lowering


def past_of(graph: Lowering, node: Node) -> StateTensor | None:
    """The state that a Concat puts before something else; None where it does nothing of it."""
    past = next((t for t in graph.state if t.input == node.inputs[0]), None)
    if past is None or len(node.inputs) != 2:
        return None
    return past if node.attributes["axis"] % len(past.shape) == 0 else None


def begin_delay(graph: Lowering, node: Node, past: StateTensor) -> None:
    """Read the Concat: a delay that becomes a layer where it is first used."""
    now = graph.shapes[node.inputs[1]]
    if past.dtype != "uint8" or now[0] != 1:
        graph.refuse(node, "a delay of several values a step, or of no codes", "codes, one a step")
    returned = graph.makers.get(past.output)
    if returned is None or returned.op != "Slice" or returned.inputs[0] != node.outputs[0]:
        graph.refuse_tensor(
            past.output, "a delay whose past does not return", f"a Slice of {node.outputs[0]!r}"
        )
    rows = int(np.prod(past.shape[1:-1], dtype=np.int64))
    lags = tuple(range(past.shape[0], -1, -1))
    name = past.input.removesuffix(".past")
    source = graph.value(node.inputs[1])
    graph.delays[node.outputs[0]] = Delay(name, source, rows, lags, rows == 1, past)
    graph.take(node)


def keep_delay(graph: Lowering, node: Node, axis: int, begin: int, end: int) -> None:
    """Read the Slice that is the next past."""
    shape = graph.shapes[node.inputs[0]]
    if axis % len(shape) or slice(begin, end).indices(shape[0])[:2] != (1, shape[0]):
        graph.refuse(node, "another Slice of a delay", "all but the oldest step")
    graph.take(node)


def read_lags(graph: Lowering, node: Node) -> None:
    """Read a Gather of some steps, and the Transpose behind it."""
    whole = graph.delays[node.inputs[0]]
    chosen = reference.whole(node, graph.constants.get(node.inputs[1]))
    if node.attributes.get("axis", 0) % len(whole.state.shape) != 0:
        graph.refuse(node, "a delay by another axis", "axis 0")
    lags = tuple(whole.steps - at % (whole.steps + 1) for at in chosen.reshape(-1).tolist())
    out, by_row = node.outputs[0], whole.rows == 1
    users = graph.users.get(out, [])
    if len(users) == 1 and users[0].op == "Transpose":
        plain = chosen.ndim == 1 and len(whole.state.shape) == 3
        if not plain or tuple(users[0].attributes.get("perm", ())) != (1, 0, 2):
            graph.refuse(users[0], "another order of a delay's rows", "perm 1, 0, 2 of 3 axes")
        by_row, out = True, users[0].outputs[0]
        graph.take(users[0])
    graph.take(node)
    graph.emit(replace(whole, lags=lags, by_row=by_row), out)
