"""A compiled graph held against the reference, step by step; needs no model and no framework."""

from __future__ import annotations

import numpy as np

from engine.backends.compiled.backend import CompiledGraph
from engine.backends.graph_reference import GraphReference
from engine.backends.integer_graph import IntegerGraph


def differences(graph: IntegerGraph, device: str, x: np.ndarray, stream: int = 0) -> int:
    """Steps of one stream whose scores or mask are not those of the reference."""
    compiled, reference = CompiledGraph(graph, device, from_codes=False), GraphReference(graph)
    out, row, wrong = np.zeros(graph.n_outputs, np.float32), np.zeros(graph.n_features, "f4"), 0
    state = compiled.begin(stream)
    for values in x:
        row[:] = values
        mask = compiled.run(row.ctypes.data, out.ctypes.data, compiled.arena, state)
        scores, expected = reference.step(values)
        wrong += scores.tobytes() != out.tobytes() or mask != expected
    return wrong
