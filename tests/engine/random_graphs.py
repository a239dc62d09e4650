"""Graphs drawn at random: any layer on any value, in whatever order it comes.

What they compute means nothing. They are exact by their construction (sums stay small), and hold
what no architecture of `models` has: rows cut otherwise than they were made, values read directly
and through delays, lags twice, zero points at both ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from engine.backends.small_graphs import H_AT, SMALL, codes_table, gru, lstm
from tests.engine.integer_graphs import CLASSES, FEATURES, X_EXPONENT, X_ZERO, GraphBuilder

MAX_CODES = 64


@dataclass(frozen=True)
class Value:
    """Codes of a graph on its way."""

    name: str
    at: tuple[int, int]
    rows: int
    channels: int


class RandomGraph:
    """Draws layers one after another.

    Parameters
    ----------
    rng : Generator
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.g = rng, GraphBuilder()
        q = self.g.quantise("x", X_EXPONENT, X_ZERO)
        self.values = [Value(q, (X_EXPONENT, X_ZERO), 1, FEATURES)]

    def any_value(self) -> Value:
        """One of those there are, the youngest most often, cut in rows anew."""
        weight = np.arange(1.0, len(self.values) + 1)
        value = self.values[self.rng.choice(len(self.values), p=weight / weight.sum())]
        size = value.rows * value.channels
        rows = int(self.rng.choice([n for n in (1, 2, 3, 4) if size % n == 0]))
        if rows == value.rows:
            return value
        name = self.g.reshape(value.name, rows, size // rows)
        return Value(name, value.at, rows, size // rows)

    def zero_point(self) -> int:
        """An even one: behind a sum ONNX Runtime takes no other."""
        return int(self.rng.choice([0, 254, 2 * self.rng.integers(1, 127)]))

    def dense(self) -> Value:
        """One product, or the sum of two."""
        rng, g, value = self.rng, self.g, self.any_value()
        outputs, name = int(rng.integers(1, 9)), f"dense{len(g.nodes)}"
        unit = int(rng.integers(-12, -9))
        values = [value]
        other = self.any_value()
        if other.rows == value.rows and rng.random() < 0.5:
            values.append(other)
        sums = [
            g.dense(
                rng,
                item.name,
                item.at,
                (item.channels, outputs),
                name=f"{name}.{i}",
                unit=unit - item.at[0] + i,
                bias=bool(rng.random() < 0.7),
                greatest=SMALL,
            )
            for i, item in enumerate(values)
        ]
        total = sums[0] if len(sums) == 1 else g.node("Add", sums, f"{name}.sum")
        at = (unit + int(rng.integers(3, 9)), self.zero_point())
        return Value(g.quantise(total, *at, name=name), at, value.rows, outputs)

    def delay(self) -> Value:
        """Some steps of a value, by row or by step, or all of them as they stand."""
        rng, g, value = self.rng, self.g, self.any_value()
        steps, name = int(rng.integers(1, 5)), f"delay{len(g.nodes)}"
        shape = (steps, value.rows, value.channels)
        if value.rows == 1 and rng.random() < 0.3:
            shape = (steps, value.channels)  # type: ignore[assignment]
        whole = g.past(name, value.name, shape, int(rng.integers(0, 256)))
        if rng.random() < 0.3:
            size = (steps + 1) * value.channels
            return Value(g.reshape(whole, value.rows, size), value.at, value.rows, size)
        chosen = rng.integers(-steps - 1, steps + 1, rng.integers(1, 4)).tolist()
        out = g.lagged(whole, chosen)
        if len(shape) == 3 and rng.random() < 0.6:
            out = g.node("Transpose", [out], perm=[1, 0, 2])
        size = len(chosen) * value.channels
        return Value(g.reshape(out, value.rows, size), value.at, value.rows, size)

    def add(self) -> Value:
        """The sum of two values of one shape."""
        rng, g, a = self.rng, self.g, self.any_value()
        b = next(
            (v for v in self.values if (v.rows, v.channels) == (a.rows, a.channels)),
            a,
        )
        name = f"add{len(g.nodes)}"
        total = g.node("Add", [g.dequantise(v.name, *v.at) for v in (a, b)], f"{name}.sum")
        at = (max(a.at[0], b.at[0]) + int(rng.integers(0, 3)), self.zero_point())
        return Value(g.quantise(total, *at, name=name), at, a.rows, a.channels)

    def table(self) -> Value:
        """Each code looked up; what it then stands for is free."""
        value = self.any_value()
        at = (int(self.rng.integers(-6, 1)), int(self.rng.integers(0, 256)))
        name = self.g.look_up(value.name, codes_table(self.rng))
        return Value(name, at, value.rows, value.channels)

    def columns(self) -> Value:
        """Some columns, by a Slice or a Split."""
        value = self.any_value()
        if value.channels < 2:
            return value
        cut = int(self.rng.integers(1, value.channels))
        if self.rng.random() < 0.5:
            name = self.g.split(value.name, [cut, value.channels - cut], axis=-1)[0]
        else:
            ends = [self.g.constant([v], np.int64) for v in (0, cut - value.channels, -1)]
            name = self.g.node("Slice", [value.name, *ends])
        return Value(name, value.at, value.rows, cut)

    def maximum(self) -> Value:
        """Greatest over rows."""
        value = self.any_value()
        axes = self.g.constant([0], np.int64)
        name = self.g.node("ReduceMax", [value.name, axes], keepdims=1)
        return Value(name, value.at, 1, value.channels)

    def concat(self) -> Value:
        """Values of as many rows side by side: their codes, or in one new scale."""
        rng, g, value = self.rng, self.g, self.any_value()
        parts = [value, *(v for v in self.values[-3:] if v.rows == value.rows)]
        channels = sum(part.channels for part in parts)
        if rng.random() < 0.5:
            name = g.node("Concat", [part.name for part in parts], axis=1)
            return Value(name, value.at, value.rows, channels)
        name = f"concat{len(g.nodes)}"
        real = g.node("Concat", [g.dequantise(p.name, *p.at) for p in parts], axis=-1)
        at = (int(rng.integers(-5, 1)), int(rng.integers(0, 256)))
        return Value(g.quantise(real, *at, name=name), at, value.rows, channels)

    def cell(self) -> Value:
        """An LSTM or a GRU cell in any form."""
        rng, value = self.rng, self.any_value()
        value = Value(value.name, (X_EXPONENT, value.at[1]), value.rows, value.channels)
        if value.rows > 1:
            size = value.rows * value.channels
            value = Value(self.g.reshape(value.name, 1, size), value.at, 1, size)
        make, gates = (lstm, "ifo") if rng.random() < 0.5 else (gru, "rz")
        low, high = -int(rng.integers(0, 16384)), int(rng.integers(1, 16384))
        name = make(
            self.g,
            rng,
            value.name,
            value.at,
            (value.channels, int(rng.integers(1, 8))),
            name=f"cell{len(self.g.nodes)}",
            order="".join(rng.permutation(list(gates))),
            joint=bool(rng.random() < 0.5),
            flipped=bool(rng.random() < 0.5),
            limits=(low, high),
        )
        units = self.g.state[-1].shape[-1]
        return Value(name, H_AT, 1, units)

    def draw(self, n_layers: int) -> GraphBuilder:
        """Layers, then a head that sees the last of them."""
        kinds = ("dense", "delay", "add", "table", "columns", "maximum", "concat", "cell")
        for _ in range(n_layers):
            value = getattr(self, str(self.rng.choice(kinds)))()
            if value.rows * value.channels > MAX_CODES:
                size = value.rows * value.channels
                flat = self.g.reshape(value.name, 1, size)
                value = Value(self.g.split(flat, [MAX_CODES, size - MAX_CODES])[0], value.at, 1, 64)
            self.values.append(value)
        parts = [self.g.reshape(v.name, 1, v.rows * v.channels) for v in self.values[-4:]]
        size = sum(v.rows * v.channels for v in self.values[-4:])
        joined = self.g.node("Concat", parts, axis=1)
        self.g.dense(self.rng, joined, (-4, 9), (size, CLASSES), name="head", out="logits")
        return self.g


def permuted(model: bytes, rng: np.random.Generator) -> bytes:
    """The same graph: nodes in another order of computing, factors and terms swapped."""
    proto = onnx.load_model_from_string(model)
    waiting = list(proto.graph.node)
    known = {value.name for value in (*proto.graph.input, *proto.graph.initializer)}
    ordered = []
    while waiting:
        ready = [node for node in waiting if known.issuperset(filter(None, node.input))]
        node = ready[rng.integers(len(ready))]
        waiting.remove(node)
        known.update(node.output)
        if node.op_type in ("Add", "Mul") and rng.random() < 0.5:
            first, second = node.input
            node.input[:] = [second, first]
        ordered.append(type(node).FromString(node.SerializeToString()))
    del proto.graph.node[:]
    proto.graph.node.extend(ordered)
    return bytes(proto.SerializeToString())
