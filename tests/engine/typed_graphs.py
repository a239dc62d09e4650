"""Random integer graphs of odd sizes, with every kind of layer, for tests of what runs them.

No ONNX file stands behind them: `engine.backends.graph_reference` says what they compute.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from engine.backends.graph_reference import GraphReference
from engine.backends.integer_graph import (
    INPUT,
    MAX_SHIFT,
    MIN_SHIFT,
    Add,
    CheckGroup,
    Columns,
    Concat,
    Delay,
    Dense,
    GruCell,
    IntegerGraph,
    Layer,
    LstmCell,
    Maximum,
    Point,
    Product,
    Table,
)
from engine.manifest import StateTensor

CLIP = 4.0


class TypedGraph:
    """Draws layers one after the other, so that accumulators stay below 2**24."""

    def __init__(self, seed: int, n_features: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.layers: list[Layer] = []
        self.sizes = {INPUT: n_features}
        self.state: list[StateTensor] = []
        self.checks: list[CheckGroup] = []
        self.n_features = n_features

    def point(self, name: str) -> Point:
        """A point with a zero point at an end or inside; most are counted."""
        zero = int(self.rng.choice([0, 1, 100, 128, 254, 255]))
        group = -1
        if self.rng.random() < 0.8:
            group = len(self.checks)
            self.checks.append(CheckGroup(1 << min(8 + group, 31), 0))
        return Point(name, 0, zero, group, zero > 0, zero < 255)

    def shifts(self, n: int, bits: int) -> np.ndarray:
        """About what makes codes of accumulators of so many bits, and each extreme now and then."""
        usual = self.rng.integers(max(bits - 10, 0), bits - 5, n)
        rare = self.rng.choice([MIN_SHIFT, -3, -1, 0, 1, 20, MAX_SHIFT], n)
        return np.where(self.rng.random(n) < 0.1, rare, usual).astype(np.int32)

    def product(self, source: str, outputs: int, rows: int, *, up: bool = False) -> Product:
        """Weights at full scale, and a bias."""
        inputs = self.sizes[source] // rows
        weight = self.rng.integers(-128, 128, (outputs, inputs)).astype(np.int8)
        weight[0] = self.rng.choice([-128, 127])  # a sum that narrow intermediates cannot hold
        bias = self.rng.integers(-(1 << 16), 1 << 16, outputs).astype(np.int32)
        shift = self.rng.integers(0, 3, outputs) if up else np.zeros(outputs)
        return Product(source, weight, bias, shift.astype(np.int32))

    def dense(
        self,
        source: str,
        outputs: int,
        *,
        rows: int = 1,
        others: tuple[str, ...] = (),
        point: bool = True,
        name: str = "",
    ) -> str:
        """A sum of products; of the scores where it has no point."""
        name = name or f"dense{len(self.layers)}"
        self.layers.append(self.sums(name, (source, *others), outputs, rows, point))
        self.sizes[name] = rows * outputs
        return name

    def sums(
        self, name: str, sources: tuple[str, ...], outputs: int, rows: int, point: bool
    ) -> Dense:
        """A Dense that is part of a layer, or is one."""
        products = tuple(self.product(s, outputs, rows, up=len(sources) > 1) for s in sources)
        exponent = self.rng.integers(-14, -6, outputs).astype(np.int32)
        made = self.point(name) if point else None
        return Dense(name, rows, products, exponent, made, self.shifts(outputs, 18))

    def remember(
        self, name: str, dtype: str, shape: tuple[int, ...], initial: float
    ) -> StateTensor:
        """A state tensor."""
        ends = (f"{name}.past", f"{name}.next")
        tensor = StateTensor(*ends, dtype, shape, initial)  # type: ignore[arg-type]
        self.state.append(tensor)
        return tensor

    def delay(
        self, source: str, lags: tuple[int, ...], *, rows: int = 1, by_row: bool = True
    ) -> str:
        """A ring, one step longer than its longest lag now and then."""
        name = f"delay{len(self.layers)}"
        steps = max(*lags, 1) + int(self.rng.integers(0, 2))
        shape = (steps, rows, self.sizes[source] // rows)
        tensor = self.remember(name, "uint8", shape, float(self.rng.integers(0, 256)))
        self.layers.append(Delay(name, source, rows, lags, by_row, tensor))
        self.sizes[name] = self.sizes[source] * len(lags)
        return name

    def add(self, a: str, b: str) -> str:
        """Two values of one size."""
        name = f"add{len(self.layers)}"
        zeros, ups = self.rng.integers(0, 256, 2).tolist(), self.rng.integers(0, 6, 2).tolist()
        shift = int(self.rng.integers(-1, 5))
        self.layers.append(Add(name, a, b, *zeros, *ups, shift, self.point(name)))
        self.sizes[name] = self.sizes[a]
        return name

    def entries(self) -> np.ndarray:
        """A table."""
        return self.rng.integers(0, 256, 256).astype(np.uint8)

    def table(self, source: str) -> str:
        """Codes looked up."""
        name = f"table{len(self.layers)}"
        self.layers.append(Table(name, source, self.entries(), self.point(name)))
        self.sizes[name] = self.sizes[source]
        return name

    def maximum(self, source: str, rows: int) -> str:
        """Greatest of rows."""
        name = f"maximum{len(self.layers)}"
        self.layers.append(Maximum(name, source, rows))
        self.sizes[name] = self.sizes[source] // rows
        return name

    def columns(self, source: str, rows: int, start: int, stop: int) -> str:
        """Some columns."""
        name = f"columns{len(self.layers)}"
        self.layers.append(Columns(name, source, rows, start, stop))
        self.sizes[name] = rows * (stop - start)
        return name

    def concat(self, sources: tuple[str, ...], rows: int = 1) -> str:
        """Values side by side."""
        name = f"concat{len(self.layers)}"
        self.layers.append(Concat(name, sources, rows))
        self.sizes[name] = sum(self.sizes[source] for source in sources)
        return name

    def lstm(self, source: str, units: int) -> str:
        """A cell as our exporter scales them, with tables of its own."""
        name = f"lstm{len(self.layers)}"
        out = self.point(f"{name}.out")
        hidden = self.remember(f"{name}.h", "uint8", (1, units), float(out.zero_point))
        cell = self.remember(f"{name}.c", "float32", (1, units), 0.0)
        self.sizes[hidden.input] = units
        self.layers.append(
            LstmCell(
                name=name,
                sums=self.sums(f"{name}.sums", (source, hidden.input), 4 * units, 1, False),
                hidden=hidden,
                cell=cell,
                gates_in=self.point(f"{name}.gates"),
                candidate_in=self.point(f"{name}.candidate"),
                shown_in=self.point(f"{name}.shown"),
                out=out,
                sigmoid=self.entries(),
                tanh=self.entries(),
                cell_tanh=self.entries(),
                gates_zero=0,
                candidate_zero=128,
                shown_zero=127,
                up_kept=0,
                up_added=4,
                cell_shift=8,
                shown_shift=8,
                out_shift=8,
                low=-32767,
                high=32767,
            )
        )
        self.sizes[name] = units
        return name

    def gru(self, source: str, units: int) -> str:
        """A cell as our exporter scales them, with tables of its own."""
        name = f"gru{len(self.layers)}"
        hidden = self.remember(f"{name}.h", "float32", (1, units), 0.0)
        self.sizes[hidden.input] = units
        self.layers.append(
            GruCell(
                name=name,
                gates=self.sums(f"{name}.gates", (source, hidden.input), 2 * units, 1, True),
                new_x=self.sums(f"{name}.new_x", (source,), units, 1, True),
                new_h=self.sums(f"{name}.new_h", (hidden.input,), units, 1, True),
                hidden=hidden,
                candidate_in=self.point(f"{name}.candidate"),
                out=self.point(f"{name}.out"),
                sigmoid=self.entries(),
                tanh=self.entries(),
                gates_zero=0,
                candidate_zero=128,
                one=256,
                up_given=7,
                up_reset=0,
                candidate_shift=8,
                up_added=7,
                up_kept=0,
                state_shift=8,
                out_shift=7,
                low=-16384,
                high=16384,
            )
        )
        self.sizes[name] = units
        return name

    def graph(self, last: str, n_outputs: int = 3) -> IntegerGraph:
        """The graph, with scores of its last value; about every other step violates a limit."""
        self.dense(last, n_outputs, point=False, name="head")
        graph = IntegerGraph(
            where="random graph",
            n_features=self.n_features,
            point=Point("x", -5, 128),
            layers=tuple(self.layers),
            sizes={name: size for name, size in self.sizes.items() if name != "head"},
            state=tuple(self.state),
            checks=tuple(self.checks),
            input_limit=CLIP,
        )
        reference, counts = GraphReference(graph), []
        for row in rows(graph, 64, 0):
            reference.step(row)
            counts.append(reference.counts.copy())
        limits = np.median(counts, axis=0).astype(int).tolist()
        checks = [replace(c, limit=n) for c, n in zip(graph.checks, limits, strict=True)]
        return replace(graph, checks=tuple(checks))


def mixed(seed: int) -> IntegerGraph:
    """Every kind of layer that has no cell, in sizes that no vector divides."""
    g = TypedGraph(seed, 37)
    x = g.columns(INPUT, 1, 1, 37)
    y = g.dense(x, 23, rows=4)
    y = g.delay(y, (0, 1, 3), rows=4)
    y = g.dense(y, 5, rows=4)
    z = g.table(g.delay(y, (2, 0, 0), rows=4, by_row=False))
    y = g.maximum(z, 3)
    y = g.add(y, g.columns(g.delay(y, (1, 4)), 2, 0, 10))
    both = g.concat((y, g.table(y)), 4)
    y = g.dense(both, 130, others=(INPUT,))
    return g.graph(g.dense(y, 17), 7)


def lstms(seed: int) -> IntegerGraph:
    """Two LSTM cells, one behind the other, of 21 and 8 units."""
    g = TypedGraph(seed, 19)
    return g.graph(g.lstm(g.lstm(INPUT, 21), 8))


def grus(seed: int) -> IntegerGraph:
    """Two GRU cells, one behind the other, of 21 and 8 units."""
    g = TypedGraph(seed, 19)
    return g.graph(g.gru(g.gru(INPUT, 21), 8))


def deep_dense(seed: int) -> IntegerGraph:
    """Dense layers alone, wide enough for several chunks of outputs and long loops."""
    g = TypedGraph(seed, 263)
    return g.graph(g.dense(g.dense(INPUT, 150), 33), 20)


def small(seed: int) -> IntegerGraph:
    """A convolution, a table and a sum, small enough for an emulated processor."""
    g = TypedGraph(seed, 19)
    y = g.dense(g.delay(INPUT, (0, 1, 2)), 21)
    return g.graph(g.add(y, g.table(y)))


GRAPHS = {"mixed": mixed, "lstms": lstms, "grus": grus, "deep dense": deep_dense}


def rows(graph: IntegerGraph, n: int, seed: int) -> np.ndarray:
    """float32 (n, features): ordinary, saturating, half way between codes, NaN and infinite."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, graph.n_features))
    x[1::4] = np.where(rng.random(x[1::4].shape) < 0.5, -CLIP, CLIP)
    x[2::4] = (np.rint(x[2::4] * 32) + 0.5) / 32
    x = np.clip(x, -CLIP, CLIP)
    for i, value in enumerate((np.nan, np.inf, -np.inf, 1e30, CLIP * (1 + 2**-20))):
        x[7 + 11 * i, i] = value
    return x.astype(np.float32)
