"""Integer graphs of one row, as circuits are generated from, small enough to build in seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from engine.backends.integer_graph import (
    INPUT,
    MAX_SHIFT,
    MIN_SHIFT,
    CheckGroup,
    Concat,
    Dense,
    IntegerGraph,
    Layer,
    Point,
    Product,
)
from tests.engine.typed_graphs import TypedGraph


def flat(seed: int) -> IntegerGraph:
    """Every kind of layer that has no cell: delays read twice, two products, a value used twice."""
    g = TypedGraph(seed, 19)
    x = g.columns(INPUT, 1, 1, 18)
    y = g.delay(g.dense(x, 23), (0, 1, 3))
    y = g.dense(y, 12)
    z = g.table(g.delay(y, (2, 0, 0), by_row=False))
    y = g.add(g.dense(z, 12, others=(INPUT, y)), g.table(y))
    y = g.delay(g.concat((y, x)), (1, 4))
    return g.graph(g.dense(y, 17), 7)


def dense(seed: int) -> IntegerGraph:
    """Three layers, in sizes that no lanes divide."""
    g = TypedGraph(seed, 29)
    return g.graph(g.dense(g.dense(INPUT, 21), 10))


def cells(seed: int) -> IntegerGraph:
    """A GRU behind a delay, an LSTM behind it, and what came in added in the end."""
    g = TypedGraph(seed, 9)
    y = g.gru(g.dense(g.delay(INPUT, (0, 2)), 7), 6)
    return g.graph(g.dense(g.lstm(y, 4), 5, others=(INPUT,)))


GRAPHS: dict[str, Callable[[int], IntegerGraph]] = {"dense": dense, "flat": flat, "cells": cells}

SHIFTS = (MIN_SHIFT, -9, -3, -1, 0, 1, 2, 3, 7, 8, 12, 17, MAX_SHIFT)
ZERO_POINTS = (0, 1, 100, 128, 255)


def requantisers(shifts: tuple[int, ...]) -> IntegerGraph:
    """Codes of ``3 x0 + 127 x1 - 16000`` by every shift, at every one of `ZERO_POINTS`."""
    n = len(shifts)
    layers: list[Layer] = []
    for at, zero in enumerate(ZERO_POINTS):
        weight = np.array([[3, 127]] * n, dtype=np.int8)
        product = Product(INPUT, weight, np.full(n, -16_000, np.int32), np.zeros(n, np.int32))
        point = Point(f"zero{zero}", 0, zero, at, low=True, high=True)
        exponent, shift = np.zeros(n, np.int32), np.array(shifts, dtype=np.int32)
        layers.append(Dense(point.name, 1, (product,), exponent, point, shift))
    names = tuple(layer.name for layer in layers)
    layers.append(Concat("codes", names, 1))
    return IntegerGraph(
        where="requantisers",
        n_features=2,
        point=Point(INPUT, 0, 128),
        layers=tuple(layers),
        sizes={INPUT: 2, **dict.fromkeys(names, n), "codes": n * len(names)},
        state=(),
        checks=tuple(CheckGroup(1 << (8 + at), n // 2) for at in range(len(names))),
        input_limit=4.0,
    )


def codes_of(graph: IntegerGraph, n: int, seed: int) -> np.ndarray:
    """uint8 (n, features): around zero, at both ends, anything."""
    rng = np.random.default_rng(seed)
    x = np.rint(128 + 20 * rng.normal(size=(n, graph.n_features)))
    x[1::4] = 255 * rng.integers(0, 2, x[1::4].shape)
    x[2::4] = rng.integers(0, 256, x[2::4].shape)
    return np.clip(x, 0, 255).astype(np.uint8)


def without_scores(graph: IntegerGraph) -> IntegerGraph:
    """Its front part, which ends in codes."""
    return replace(graph, layers=graph.layers[:-1])
