"""Small `exact-int8` graphs, built node by node, for tests of whoever interprets them.

Each has the input ``x`` float32 (1, `FEATURES`), in [-4, 4], and the output ``logits`` float32
(1, 3), and draws its integers from a generator, so that a test can look at many of a kind.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from engine.backends import small_graphs
from engine.backends.onnx_providers import session_options
from engine.backends.small_graphs import CLASSES, CLIP, FEATURES
from engine.manifest import StateTensor

X_EXPONENT, X_ZERO = small_graphs.X_AT


class GraphBuilder(small_graphs.GraphBuilder):
    """One whose graph may also end in anything."""

    def with_output(self, name: str) -> bytes:
        """The checked model's bytes, with this one output of whatever type and shape it has."""
        info = helper.make_empty_tensor_value_info(name)
        graph = helper.make_graph(self.nodes, "small", self.inputs, [info], self.constants)
        opset = helper.make_opsetid("", small_graphs.OPSET)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=small_graphs.IR_VERSION)
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        onnx.checker.check_model(model)
        return bytes(model.SerializeToString())


def dense(
    rng: np.random.Generator, n_features: int = FEATURES, n_classes: int = CLASSES
) -> GraphBuilder:
    """Two hidden layers, one without a bias, at zero points 0, even and odd."""
    g = GraphBuilder(n_features, n_classes)
    zeros = [int(zero) for zero in (0, *rng.integers(0, 256, 2))]
    q = g.quantise("x", X_EXPONENT, X_ZERO)
    q = g.quantise(g.dense(rng, q, (X_EXPONENT, X_ZERO), (n_features, 32)), -2, zeros[0])
    sums = g.dense(rng, q, (-2, zeros[0]), (32, 16), name="second", bias=False)
    q = g.quantise(sums, 1, zeros[1])
    g.dense(rng, q, (1, zeros[1]), (16, n_classes), name="head", out="logits")
    return g


def two_products(rng: np.random.Generator) -> GraphBuilder:
    """The sum of two products of different units, rounded once; and a residual sum."""
    g = GraphBuilder()
    q = g.quantise("x", X_EXPONENT, X_ZERO)
    left, right = g.split(q, [10, FEATURES - 10])
    at = (X_EXPONENT, X_ZERO)
    a = g.dense(rng, left, at, (10, 12), name="left", unit=-7)
    b = g.dense(rng, right, at, (FEATURES - 10, 12), name="right", unit=-9)
    q = g.quantise(g.node("Add", [a, b], "sum"), -2, 7)
    other = g.quantise(g.dense(rng, left, at, (10, 12), name="other"), -3, 100)
    total = g.node("Add", [g.dequantise(q, -2, 7), g.dequantise(other, -3, 100)], "residual")
    q = g.quantise(total, -2, 128)
    g.dense(rng, q, (-2, 128), (12, CLASSES), name="head", out="logits")
    return g


def table(rng: np.random.Generator) -> GraphBuilder:
    """A table of 256 entries, rows selected from it, and every way to move data."""
    g = GraphBuilder()
    q = g.quantise("x", X_EXPONENT, X_ZERO)
    index = g.node("Cast", [q], to=TensorProto.INT32)
    entries = g.constant(rng.integers(0, 256, 256), np.uint8)
    q = g.node("Gather", [entries, index], axis=0)
    q = g.node("Reshape", [q, g.constant([2, -1, 3], np.int64)])
    q = g.node("Transpose", [q], perm=[1, 0, 2])
    q = g.node("Gather", [q, g.constant(rng.integers(0, 4, 6), np.int64)], axis=0)
    starts, ends, axes, steps = (g.constant([v], np.int64) for v in (5, -7, 0, -1))
    q = g.node("Slice", [q, starts, ends, axes, steps])
    q = g.node("Squeeze", [g.node("Unsqueeze", [q, g.constant([0], np.int64)])])
    q = g.node("Flatten", [g.node("Concat", [q, q], axis=2)], axis=0)
    real = g.node("Concat", [g.dequantise(q, -4, 3), g.dequantise(q, -6, 90)], axis=1)
    q = g.quantise(real, -3, 51)
    g.dense(rng, q, (-3, 51), (144, CLASSES), name="head", out="logits")
    return g


def softmax(rng: np.random.Generator) -> GraphBuilder:
    """Attention of two heads over four rows, its softmax from a table and one division."""
    g = GraphBuilder()
    q = g.quantise("x", X_EXPONENT, X_ZERO)
    parts = []
    for name in ("query", "key", "value"):
        part = g.quantise(g.dense(rng, q, (X_EXPONENT, X_ZERO), (FEATURES, 32), name=name), 0, 120)
        part = g.node("Reshape", [part, g.constant([4, 2, 4], np.int64)])
        perm = [1, 2, 0] if name == "key" else [1, 0, 2]
        parts.append(g.dequantise(g.node("Transpose", [part], perm=perm), 0, 120))
    scores = g.quantise(g.node("MatMul", parts[:2], "scores"), 9, 128, "scores.quantise")
    steps = g.node("Cast", [scores], to=TensorProto.INT32)
    top = g.node("ReduceMax", [steps, g.constant([2], np.int64)], keepdims=1)
    below = g.node("Sub", [top, steps], "below")
    powers = np.rint(255.0 * np.exp2(-np.arange(256) / 16.0))
    codes = g.node("Gather", [g.constant(powers, np.uint8), below], "powers", axis=0)
    powered = g.node("Cast", [codes], to=TensorProto.FLOAT)
    total = g.node("ReduceSum", [powered, g.constant([-1], np.int64)], "total", keepdims=1)
    shares = g.quantise(g.node("Div", [powered, total], "shares"), -8, 0)
    context = g.node("MatMul", [g.dequantise(shares, -8, 0), parts[2]], "context")
    q = g.node("Reshape", [g.quantise(context, 0, 128), g.constant([1, -1], np.int64)])
    g.dense(rng, q, (0, 128), (32, CLASSES), name="head", out="logits")
    return g


def layer_norm(rng: np.random.Generator) -> GraphBuilder:
    """``(n x - sum x) / sqrt(n sum x² - (sum x)² + 1)`` of whole numbers."""
    g = GraphBuilder()
    steps = g.dequantise(g.quantise("x", X_EXPONENT, X_ZERO), 0, X_ZERO)
    total = g.node("ReduceSum", [steps, g.constant([1], np.int64)], "total", keepdims=1)
    squares = g.node("Mul", [steps, steps], "squares")
    squared = g.node("ReduceSum", [squares, g.constant([1], np.int64)], "squared", keepdims=1)
    scaled = g.node("Mul", [squared, g.constant(FEATURES)], "scaled")
    spread = g.node("Sub", [scaled, g.node("Mul", [total, total], "product")], "spread")
    deviation = g.node("Sqrt", [g.node("Add", [spread, g.constant(1.0)], "raised")], "deviation")
    centred = g.node("Sub", [g.node("Mul", [steps, g.constant(FEATURES)]), total], "centred")
    q = g.quantise(g.node("Div", [centred, deviation], "normal"), -5, 128, "normal.quantise")
    g.dense(rng, q, (-5, 128), (FEATURES, CLASSES), name="head", out="logits")
    return g


def delays_and_cells(
    rng: np.random.Generator, n_features: int = FEATURES, n_classes: int = CLASSES
) -> GraphBuilder:
    """A uint8 delay of three steps, and a float32 cell of whole numbers, kept and clipped."""
    g = GraphBuilder(n_features, n_classes)
    width = 8
    q = g.quantise("x", X_EXPONENT, X_ZERO)
    old = g.remember("delay", "uint8", (3, n_features), X_ZERO)
    whole = g.node("Concat", [old, q], axis=0)
    bounds = [g.constant([v], np.int64) for v in (1, 4, 0)]
    g.node("Slice", [whole, *bounds], out="delay.next")
    q = g.node("Reshape", [whole, g.constant([1, 4 * n_features], np.int64)])
    taps = g.dense(rng, q, (X_EXPONENT, X_ZERO), (4 * n_features, 2 * width), name="taps")
    gate, new = g.split(g.quantise(taps, -4, 128), [width, width])
    cell = g.remember("cell", "float32", (1, width), 0.0)
    kept = g.node("Mul", [g.dequantise(gate, -8, 0), cell], "kept")
    # In halves of a step: a closed gate makes ties, an open one fills the cell to its limits.
    added = g.node("Mul", [g.dequantise(new, 4, 128), g.constant(17 / 32)], "added")
    rounded = g.node("Round", [g.node("Add", [kept, added], "cell.sum")], "cell.rounded")
    limits = [g.constant(v) for v in (-2047.0, 2047.0)]
    cell = g.node("Clip", [rounded, *limits], "cell.clip", "cell.next")
    q = g.quantise(cell, 4, 128)
    g.dense(rng, q, (4, 128), (width, n_classes), name="head", out="logits")
    return g


GRAPHS: dict[str, Callable[[np.random.Generator], GraphBuilder]] = {
    "dense": dense,
    "two products": two_products,
    "table": table,
    "softmax": softmax,
    "layer norm": layer_norm,
    "delays and cells": delays_and_cells,
}


def inputs(rng: np.random.Generator, n: int, n_features: int = FEATURES) -> np.ndarray:
    """Rows that are ordinary, saturating, all at one end, and half way between two codes."""
    x = rng.normal(size=(n, n_features))
    x[1::4] *= 100.0
    x[2::4] = np.where(rng.random((len(x[2::4]), 1)) < 0.5, -CLIP, CLIP)
    x[3::4] = (np.rint(x[3::4] * 32) + 0.5) / 32
    return np.clip(x, -CLIP, CLIP).astype(np.float32)


def session(model: bytes, *, fused: bool = True) -> ort.InferenceSession:
    """ONNX Runtime, as the backend opens it or with the graph as written."""
    options = session_options(1)
    if not fused:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_session(
    found: ort.InferenceSession, state: list[StateTensor], x: np.ndarray
) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
    """Outputs (steps, classes) of one stream, and the state after each step."""
    names = ["logits", *(tensor.output for tensor in state)]
    now = {tensor.input: tensor.fresh() for tensor in state}
    outputs, states = [], []
    for row in x:
        out, *after = found.run(names, {"x": row[None], **now})
        now = {tensor.input: array for tensor, array in zip(state, after, strict=True)}
        outputs.append(out)
        states.append(now)
    return np.concatenate(outputs), states
