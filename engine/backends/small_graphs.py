"""Small `exact-int8` graphs, built node by node and drawn at random.

They hold what the integer graph has (products, delays, tables, recurrent cells) on few units, so
that whoever computes them is soon held against whoever else does. Tables are drawn, not computed:
whatever is done with one code is then done with any.

Each has the input ``x`` float32 (1, features), in [-`CLIP`, `CLIP`], and the output ``logits``
float32 (1, classes).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engine.manifest import StateTensor

FEATURES: Final = 24
CLASSES: Final = 3
CLIP: Final = 4.0
X_AT: Final = (-5, 128)  # exponent and zero point
H_AT: Final = (-7, 128)
GATES_AT: Final = (-8, 0)
SUMS_AT: Final = (-4, 130)
CELL_EXPONENT: Final = -11
GRU_EXPONENT: Final = -14
SMALL: Final = 31  # weights of so few steps that sums over all features stay below 2**24
OPSET: Final = 19
IR_VERSION: Final = 10
TYPES: Final = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT}


class GraphBuilder:
    """Nodes and constants in the order in which they are asked for."""

    def __init__(self, n_features: int = FEATURES, n_classes: int = CLASSES) -> None:
        self.n_classes = n_classes
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, n_features])]
        self.outputs: list[onnx.ValueInfoProto] = []
        self.state: list[StateTensor] = []

    def constant(self, values: Any, dtype: Any = np.float32) -> str:
        """An initialiser of its own."""
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values, dtype=dtype), name))
        return name

    def node(self, op: str, inputs: list[str], name: str = "", out: str = "", **kw: Any) -> str:
        """A node of one output, which it returns; where one name is given, both have it."""
        out = out or name or f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [out], name=name or out, **kw))
        return out

    def split(self, x: str, sizes: list[int], axis: int = 1) -> list[str]:
        """Parts of a tensor."""
        names = [f"part{len(self.nodes)}.{i}" for i in range(len(sizes))]
        node = helper.make_node(
            "Split", [x, self.constant(sizes, np.int64)], names, name=f"{names[0]}.split", axis=axis
        )
        self.nodes.append(node)
        return names

    def remember(self, name: str, dtype: str, shape: tuple[int, ...], initial: float) -> str:
        """A state input; the output of the same name with ``.next`` must be made."""
        ends = (f"{name}.last", f"{name}.next")
        for end, where in zip(ends, (self.inputs, self.outputs), strict=True):
            where.append(helper.make_tensor_value_info(end, TYPES[dtype], shape))
        self.state.append(StateTensor(*ends, dtype, shape, initial))  # type: ignore[arg-type]
        return ends[0]

    def quantise(self, x: str, exponent: int, zero: int, name: str = "", out: str = "") -> str:
        """QuantizeLinear."""
        scale = self.constant(np.ldexp(1.0, exponent))
        return self.node("QuantizeLinear", [x, scale, self.constant(zero, np.uint8)], name, out)

    def dequantise(self, q: str, exponent: int, zero: int, name: str = "") -> str:
        """DequantizeLinear."""
        scale = self.constant(np.ldexp(1.0, exponent))
        return self.node("DequantizeLinear", [q, scale, self.constant(zero, np.uint8)], name)

    def look_up(self, q: str, entries: np.ndarray, name: str = "", out: str = "") -> str:
        """Cast and Gather: a table of 256 entries."""
        index = self.node("Cast", [q], to=TensorProto.INT32)
        return self.node("Gather", [self.constant(entries, np.uint8), index], name, out, axis=0)

    def past(self, name: str, q: str, shape: tuple[int, ...], initial: int) -> str:
        """(steps + 1, ...): codes as they were, oldest first, and as they are; kept as state."""
        last = self.remember(name, "uint8", shape, initial)
        now = self.node("Reshape", [q, self.constant([1, *shape[1:]], np.int64)], f"{name}.now")
        whole = self.node("Concat", [last, now], f"{name}.whole", axis=0)
        bounds = [self.constant([v], np.int64) for v in (1, shape[0] + 1, 0)]
        self.node("Slice", [whole, *bounds], out=f"{name}.next")
        return whole

    def lagged(self, whole: str, chosen: list[int], name: str = "") -> str:
        """Some of the steps that `past` gives, counted from the oldest."""
        return self.node("Gather", [whole, self.constant(chosen, np.int64)], name, axis=0)

    def reshape(self, x: str, *shape: int) -> str:
        """Reshape."""
        return self.node("Reshape", [x, self.constant(shape, np.int64)])

    def weights(self, values: np.ndarray, exponent: np.ndarray, dtype: Any, name: str) -> str:
        """DequantizeLinear of constants, one scale a channel."""
        inputs = [
            self.constant(values, dtype),
            self.constant(np.ldexp(1.0, exponent)),
            self.constant(np.zeros(len(exponent)), dtype),
        ]
        return self.node("DequantizeLinear", inputs, name, axis=0)

    def dense(
        self,
        rng: np.random.Generator,
        q: str,
        at: tuple[int, int],
        sizes: tuple[int, int],
        *,
        name: str = "dense",
        out: str = "",
        bias: bool = True,
        unit: int | None = None,
        greatest: int = 127,
    ) -> str:
        """Gemm of uint8 activations at (exponent, zero point); (in, out) sizes; float32 sums."""
        k, m = sizes
        exponent = rng.integers(-9, -5, m) if unit is None else np.full(m, unit)
        weight = rng.integers(-greatest, greatest + 1, (m, k))
        inputs = [
            self.dequantise(q, *at, name=f"{name}.in"),
            self.weights(weight, exponent, np.int8, f"{name}.weight"),
        ]
        if bias:
            values = rng.integers(-(1 << 12), 1 << 12, m)
            inputs.append(self.weights(values, exponent + at[0], np.int32, f"{name}.bias"))
        return self.node("Gemm", inputs, name, out, transB=1)

    def model(self, metadata: dict[str, str] | None = None) -> bytes:
        """The checked model's bytes, with its scores and its state as outputs."""
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, self.n_classes])
        graph = helper.make_graph(
            self.nodes, "small", self.inputs, [logits, *self.outputs], self.constants
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
        )
        helper.set_model_props(model, metadata or {})
        onnx.checker.check_model(model, full_check=True)
        return bytes(model.SerializeToString(deterministic=True))


def codes_table(rng: np.random.Generator) -> np.ndarray:
    """256 codes, each as likely as any other."""
    return rng.integers(0, 256, 256)


def lstm(
    g: GraphBuilder,
    rng: np.random.Generator,
    q: str,
    at: tuple[int, int],
    sizes: tuple[int, int],
    *,
    name: str = "lstm",
    order: str = "ifo",
    joint: bool = True,
    flipped: bool = False,
    limits: tuple[float, float] = (-32767.0, 32767.0),
) -> str:
    """An LSTM cell; returns its codes, at `H_AT`.

    Parameters
    ----------
    sizes : (int, int)
        Inputs and units.
    order : str
        Of the gates in the products.
    joint : bool
        Whether one product makes gates and candidate, or two.
    flipped : bool
        Every factor and every term in the other order, and the candidate before the gates.
    limits : (float, float)
        Of the cell.
    """
    k, units = sizes
    h = g.remember(f"{name}.h", "uint8", (1, units), H_AT[1])
    c = g.remember(f"{name}.c", "float32", (1, units), 0.0)

    def pair(a: str, b: str) -> list[str]:
        return [b, a] if flipped else [a, b]

    def sums(part: str, outputs: int) -> str:
        from_x = g.dense(rng, q, at, (k, outputs), name=f"{name}.x{part}", greatest=SMALL)
        from_h = g.dense(
            rng, h, H_AT, (units, outputs), name=f"{name}.h{part}", bias=False, greatest=SMALL
        )
        return g.node("Add", pair(from_x, from_h), f"{name}.sums{part}")

    if joint:
        widths = [units, 3 * units] if flipped else [3 * units, units]
        gates, new = pair(*g.split(sums("", 4 * units), widths))
    else:
        gates, new = sums(".gates", 3 * units), sums(".new", units)
    opened = g.look_up(g.quantise(gates, *SUMS_AT, name=f"{name}.gates_in"), codes_table(rng))
    parts = g.split(opened, [units] * 3)
    i, f, o = (g.dequantise(parts[order.index(gate)], *GATES_AT) for gate in "ifo")
    fresh = g.look_up(g.quantise(new, -5, 127, f"{name}.new_in"), codes_table(rng))
    candidate = g.dequantise(fresh, H_AT[0] - CELL_EXPONENT, H_AT[1])
    kept = g.node("Mul", pair(f, c), f"{name}.kept")
    added = g.node("Mul", pair(i, candidate), f"{name}.added")
    total = g.node("Add", pair(kept, added), f"{name}.total")
    ends = [g.constant(limit) for limit in limits]
    cell = g.node("Clip", [g.node("Round", [total]), *ends], f"{name}.clip", f"{name}.c.next")
    shown = g.look_up(g.quantise(cell, 7, 128, f"{name}.cell_in"), codes_table(rng))
    out = g.node("Mul", pair(o, g.dequantise(shown, *H_AT)), f"{name}.product")
    return g.quantise(out, *H_AT, name=f"{name}.out", out=f"{name}.h.next")


def gru(
    g: GraphBuilder,
    rng: np.random.Generator,
    q: str,
    at: tuple[int, int],
    sizes: tuple[int, int],
    *,
    name: str = "gru",
    order: str = "rz",
    joint: bool = True,
    flipped: bool = False,
    limits: tuple[float, float] = (-16384.0, 16384.0),
) -> str:
    """A GRU cell; returns its codes, at `H_AT`. See `lstm` for the parameters."""
    k, units = sizes
    wide = g.remember(f"{name}.h", "float32", (1, units), 0.0)
    h = g.quantise(wide, H_AT[0] - GRU_EXPONENT, H_AT[1], f"{name}.past")

    def pair(a: str, b: str) -> list[str]:
        return [b, a] if flipped else [a, b]

    def product(side: str, part: str, outputs: int) -> str:
        source = (q, at, k) if side == "x" else (h, H_AT, units)
        return g.dense(
            rng,
            *source[:2],
            (source[2], outputs),
            name=f"{name}.{side}{part}",
            greatest=SMALL,
        )

    def parts(side: str) -> list[str]:
        if not joint:
            return [product(side, ".gates", 2 * units), product(side, ".new", units)]
        widths = [units, 2 * units] if flipped else [2 * units, units]
        return pair(*g.split(product(side, "", 3 * units), widths))

    (gates_x, new_x), (gates_h, new_h) = parts("x"), parts("h")
    sums = g.node("Add", pair(gates_x, gates_h), f"{name}.sums")
    opened = g.look_up(g.quantise(sums, *SUMS_AT, name=f"{name}.gates_in"), codes_table(rng))
    halves = g.split(opened, [units] * 2)
    r, z = (g.dequantise(halves[order.index(gate)], *GATES_AT) for gate in "rz")
    own = g.dequantise(g.quantise(new_h, -5, 125, f"{name}.own"), -5, 125)
    given = g.dequantise(g.quantise(new_x, -4, 131, f"{name}.given"), -4, 131)
    inner = g.node("Add", pair(given, g.node("Mul", pair(r, own), f"{name}.reset")))
    fresh = g.look_up(g.quantise(inner, -4, 126, f"{name}.new_in"), codes_table(rng))
    candidate = g.dequantise(fresh, H_AT[0] - GRU_EXPONENT, H_AT[1])
    rest = g.node("Sub", [g.constant(1.0), z], f"{name}.rest")
    added = g.node("Mul", pair(rest, candidate), f"{name}.added")
    kept = g.node("Mul", pair(z, wide), f"{name}.kept")
    rounded = g.node("Round", [g.node("Add", pair(added, kept), f"{name}.total")])
    ends = [g.constant(limit) for limit in limits]
    state = g.node("Clip", [rounded, *ends], f"{name}.clip", f"{name}.h.next")
    return g.quantise(state, H_AT[0] - GRU_EXPONENT, H_AT[1], f"{name}.out")


def lstm_graph(
    rng: np.random.Generator,
    n_features: int = FEATURES,
    n_classes: int = CLASSES,
    units: int = 8,
    **form: object,
) -> GraphBuilder:
    """One LSTM cell and a head."""
    g = GraphBuilder(n_features, n_classes)
    q = g.quantise("x", *X_AT)
    h = lstm(g, rng, q, X_AT, (n_features, units), **form)  # type: ignore[arg-type]
    g.dense(rng, h, H_AT, (units, n_classes), name="head", out="logits")
    return g


def gru_graph(
    rng: np.random.Generator,
    n_features: int = FEATURES,
    n_classes: int = CLASSES,
    units: int = 8,
    **form: object,
) -> GraphBuilder:
    """One GRU cell and a head."""
    g = GraphBuilder(n_features, n_classes)
    q = g.quantise("x", *X_AT)
    h = gru(g, rng, q, X_AT, (n_features, units), **form)  # type: ignore[arg-type]
    g.dense(rng, h, H_AT, (units, n_classes), name="head", out="logits")
    return g


def two_cells(
    rng: np.random.Generator, n_features: int = FEATURES, n_classes: int = CLASSES
) -> GraphBuilder:
    """A GRU cell on an LSTM cell, of different widths."""
    g = GraphBuilder(n_features, n_classes)
    q = g.quantise("x", *X_AT)
    h = lstm(g, rng, q, X_AT, (n_features, 5), joint=False, order="ofi")
    h = gru(g, rng, h, H_AT, (5, 9), flipped=True, order="zr")
    g.dense(rng, h, H_AT, (9, n_classes), name="head", out="logits")
    return g


def convolution(
    rng: np.random.Generator, n_features: int = FEATURES, n_classes: int = CLASSES
) -> GraphBuilder:
    """What a temporal convolution is made of: delays by step and by row, sums, tables, pooling.

    One delay is read twice, by different lags, some of them twice; values are read directly and
    through a delay, in rows of other sizes than those they were made in.
    """
    g = GraphBuilder(n_features, n_classes)
    q = g.quantise("x", *X_AT)
    stem = g.dense(rng, q, X_AT, (n_features, 8), name="stem", greatest=SMALL)
    x = g.quantise(stem, -2, 0, "stem.quantise")
    whole = g.past("taps", x, (4, 1, 8), 0)
    taps = g.reshape(g.lagged(whole, [4, 2, 0, 2]), 1, 32)
    y = g.quantise(g.dense(rng, taps, (-2, 0), (32, 8), name="conv", greatest=SMALL), -1, 100)
    total = g.node("Add", [g.dequantise(x, -2, 0), g.dequantise(y, -1, 100)], "residual")
    y = g.quantise(total, -1, 64, "residual.quantise")
    pooled = g.node(
        "ReduceMax", [g.lagged(whole, [4, 3]), g.constant([0], np.int64)], "pool", keepdims=0
    )
    leaky = g.look_up(pooled, codes_table(rng), "leaky")
    # Four rows of two channels, as they were three steps and one step ago, and as they are.
    rows = g.past("rows", y, (3, 4, 2), 77)
    by_row = g.node("Transpose", [g.lagged(rows, [0, 2, 3])], perm=[1, 0, 2])
    by_row = g.reshape(by_row, 4, 6)
    z = g.quantise(g.dense(rng, by_row, (-1, 64), (6, 4), name="wide"), 0, 255, "wide.quantise")
    z = g.reshape(z, 1, 16)
    bounds = [g.constant([v], np.int64) for v in (3, -5, 1)]
    z = g.node("Slice", [z, *bounds], "cut")
    real = [g.dequantise(z, 0, 255), g.dequantise(leaky, -3, 9), g.dequantise(x, -2, 0)]
    both = g.quantise(g.node("Concat", real, "join", axis=1), -1, 51, "join.quantise")
    g.dense(rng, both, (-1, 51), (24, n_classes), name="head", out="logits", greatest=SMALL)
    return g
