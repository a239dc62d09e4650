"""The quantised graph of one step; see `models/step_graph.py` for what it looks like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto

from engine.manifest import StateTensor
from models.architectures import architecture
from models.operations import (
    CELL_LIMIT,
    CELL_SCALE,
    GRU_LIMIT,
    GRU_SCALE,
    INPUT_POINT,
    LEAK,
    Spec,
)
from models.scheme import UINT8_MAX, Point, Scheme
from models.step_graph import (
    INPUT_NAME,
    OUTPUT_NAME,
    StepWriter,
    Tensor,
    float_layer_norm,
    sigmoid,
    table,
)

SOFTMAX_STEPS: Final = 256


class QuantisedWriter(StepWriter):
    def __init__(self, spec: Spec, parameters: Mapping[str, np.ndarray], scheme: Scheme) -> None:
        super().__init__(spec, parameters)
        self.scheme = scheme

    def point(self, name: str) -> Point:
        """Scale and zero point of a quantisation point."""
        return self.scheme.points[name]

    def dtype_of(self, x: Tensor) -> tuple[Any, float]:
        return "uint8", self.point(x.point).zero_point

    def quantise(self, x: str, point: str, output: str | None = None) -> str:
        """QuantizeLinear at a point."""
        at = self.point(point)
        scale = self.graph.constant(f"{point}.scale", at.scale, np.float32)
        zero = self.graph.constant(f"{point}.zero_point", at.zero_point, np.uint8)
        return self.graph.node(
            "QuantizeLinear", [x, scale, zero], output or f"{point}.q", f"{point}.quantise"
        )

    def real(self, x: str, point: str, *, factor: float = 1.0) -> str:
        """DequantizeLinear of a uint8 tensor, its scale times a factor."""
        at = self.point(point)
        scale = self.graph.constant(f"{point}.scale", at.scale * factor, np.float32)
        zero = self.graph.constant(f"{point}.zero_point", at.zero_point, np.uint8)
        return self.graph.node("DequantizeLinear", [x, scale, zero], f"{x}.real")

    def look_up(self, x: str, function: Any, before: str, after: str) -> str:
        """A table of 256 entries from one point to another."""
        entries = table(function, self.point(before), self.point(after))
        return self.look_up_in(x, entries, f"{after}.q")

    def look_up_in(self, x: str, entries: np.ndarray, output: str) -> str:
        """Cast and Gather."""
        index = self.graph.node("Cast", [x], f"{output}.index", to=TensorProto.INT32)
        values = self.graph.constant(f"{output}.table", entries, np.uint8)
        return self.graph.node("Gather", [values, index], output, axis=0)

    def product(self, name: str, x: str, point: str, output: str) -> str:
        """A layer's accumulators as float32, from a uint8 tensor."""
        graph, bias = self.graph, self.parameters.get(f"{name}.bias")
        weight = self.parameters[f"{name}.weight"]
        kept = self.scheme.kept.get(name)
        real = self.real(x, point)
        if kept is not None:
            shift = None if bias is None else graph.constant(f"{name}.bias", bias, np.float32)
            return self.gemm(name, real, self._kept_weight(name, weight, kept), shift, output)
        layer = self.scheme.integer_layer(name, weight, bias, self.point(point).scale)
        parts = [self._dequantised(f"{name}.weight", layer.weight, layer.weight_scale, np.int8)]
        if layer.bias is not None:
            parts.append(self._dequantised(f"{name}.bias", layer.bias, layer.bias_scale, np.int32))
        shift = parts[1] if len(parts) == 2 else None
        return self.gemm(name, real, parts[0], shift, output)

    def _kept_weight(self, name: str, weight: np.ndarray, kept: str) -> str:
        if kept == "fp32":
            return self.graph.constant(f"{name}.weight", weight, np.float32)
        half = self.graph.constant(f"{name}.weight.half", weight, np.float16)
        return self.graph.node("Cast", [half], f"{name}.weight", to=TensorProto.FLOAT)

    def _dequantised(self, name: str, codes: np.ndarray, scale: np.ndarray, dtype: Any) -> str:
        inputs = [
            self.graph.constant(f"{name}.q", codes, dtype),
            self.graph.constant(f"{name}.scale", scale, np.float32),
            self.graph.constant(f"{name}.zero_point", np.zeros(len(codes)), dtype),
        ]
        return self.graph.node("DequantizeLinear", inputs, f"{name}.real", axis=0)

    def _out(self, name: str) -> int:
        return len(self.parameters[f"{name}.weight"])

    def dense(
        self, name: str, x: Tensor, out: int, *, relu: bool = False, norm: bool = False
    ) -> Tensor:
        sums = self.product(name, x.name, x.point, f"{name}.acc")
        return Tensor(self.quantise(sums, name), x.rows, self._out(name), name)

    def add(self, name: str, a: Tensor, b: Tensor, *, relu: bool = False) -> Tensor:
        operands = [self.real(x.name, x.point) for x in (a, b)]
        sums = self.graph.node("Add", operands, f"{name}.acc", name)
        return Tensor(self.quantise(sums, name), a.rows, a.channels, name)

    def concat(self, name: str, parts: list[Tensor]) -> Tensor:
        operands = [self.real(part.name, part.point) for part in parts]
        whole = self.graph.node("Concat", operands, f"{name}.acc", name, axis=1)
        channels = sum(part.channels for part in parts)
        return Tensor(self.quantise(whole, name), parts[0].rows, channels, name)

    def leaky(self, name: str, x: Tensor) -> Tensor:
        codes = self.look_up(x.name, lambda v: np.where(v < 0.0, v * LEAK, v), x.point, name)
        return Tensor(codes, x.rows, x.channels, name)

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        graph, n = self.graph, x.channels
        if name in self.scheme.kept:
            y = float_layer_norm(graph, name, self.real(x.name, x.point))
            return Tensor(self.quantise(y, name), 1, n, name)
        # In steps of the input's scale, whatever it is: integers below 2**24 throughout.
        steps = self.real(x.name, x.point, factor=1.0 / self.point(x.point).scale)
        axes = [graph.constant(f"{name}.axes", [1], "i8") for _ in range(2)]
        total = graph.node("ReduceSum", [steps, axes[0]], f"{name}.total", keepdims=1)
        squares = graph.node("Mul", [steps, steps], f"{name}.squares")
        squared = graph.node("ReduceSum", [squares, axes[1]], f"{name}.squared", keepdims=1)
        count = graph.constant(f"{name}.count", n, np.float32)
        scaled = graph.node("Mul", [squared, count], f"{name}.squared.n")
        product = graph.node("Mul", [total, total], f"{name}.total.squared")
        spread = graph.node("Sub", [scaled, product], f"{name}.spread")
        one = graph.constant(f"{name}.one", 1.0, np.float32)
        raised = graph.node("Add", [spread, one], f"{name}.raised")
        deviation = graph.node("Sqrt", [raised], f"{name}.deviation")
        times = graph.node("Mul", [steps, count], f"{name}.steps.n")
        centred = graph.node("Sub", [times, total], f"{name}.centred")
        y = graph.node("Div", [centred, deviation], f"{name}.acc", name)
        return Tensor(self.quantise(y, name), 1, n, name)

    def lstm(self, name: str, x: Tensor, units: int) -> Tensor:
        graph, units = self.graph, self.width(name, units)
        zero = self.point(f"{name}.out").zero_point
        h, h_next = graph.remember(f"{name}.h", (1, units), "uint8", zero)
        # The cell is kept in integers of CELL_SCALE, as float32.
        c, c_next = graph.remember(f"{name}.c", (1, units), "float32", 0.0)
        from_x = self.product(f"{name}.x", x.name, x.point, f"{name}.x.acc")
        from_h = self.product(f"{name}.h", h, f"{name}.out", f"{name}.h.acc")
        sums = graph.node("Add", [from_x, from_h], f"{name}.sums")
        names = [f"{name}.sigmoid_in.acc", f"{name}.tanh_in.acc"]
        gates, new = graph.split(sums, names, (3 * units, units), 1)
        opened = self.quantise(gates, f"{name}.sigmoid_in")
        opened = self.look_up(opened, sigmoid, f"{name}.sigmoid_in", f"{name}.gates")
        i, f, o = graph.split(opened, [f"{name}.{gate}.q" for gate in "ifo"], (units,) * 3, 1)
        new = self.quantise(new, f"{name}.tanh_in")
        new = self.look_up(new, np.tanh, f"{name}.tanh_in", f"{name}.candidate")
        kept = graph.node("Mul", [self.real(f, f"{name}.gates"), c], f"{name}.kept")
        candidate = self.real(new, f"{name}.candidate", factor=1.0 / CELL_SCALE)
        added = graph.node("Mul", [self.real(i, f"{name}.gates"), candidate], f"{name}.added")
        cell = self._wide(f"{name}.cell", kept, added, CELL_LIMIT, c_next)
        cell = self._in_steps(cell, f"{name}.cell", CELL_SCALE)
        shown = self.look_up(cell, np.tanh, f"{name}.cell", f"{name}.cell_tanh")
        operands = [self.real(o, f"{name}.gates"), self.real(shown, f"{name}.cell_tanh")]
        output = graph.node("Mul", operands, f"{name}.out.acc")
        return Tensor(self.quantise(output, f"{name}.out", h_next), 1, units, f"{name}.out")

    def _wide(self, name: str, kept: str, added: str, limit: int, output: str) -> str:
        """Sum, rounded half to even and saturated, in integers as float32."""
        graph = self.graph
        total = graph.node("Add", [kept, added], f"{name}.sum")
        rounded = graph.node("Round", [total], f"{name}.rounded")
        low = graph.constant(f"{name}.low", -limit, np.float32)
        high = graph.constant(f"{name}.high", limit, np.float32)
        return graph.node("Clip", [rounded, low, high], output)

    def _in_steps(self, x: str, point: str, unit: float) -> str:
        """QuantizeLinear of a value that is counted in ``unit``."""
        at = self.point(point)
        scale = self.graph.constant(f"{point}.scale", at.scale / unit, np.float32)
        zero = self.graph.constant(f"{point}.zero_point", at.zero_point, np.uint8)
        return self.graph.node(
            "QuantizeLinear", [x, scale, zero], f"{point}.q", f"{point}.quantise"
        )

    def gru(self, name: str, x: Tensor, units: int) -> Tensor:
        graph, units = self.graph, self.width(name, units)
        # The state is kept in integers of GRU_SCALE, as float32; its products take 8 bits of it.
        wide, wide_next = graph.remember(f"{name}.h", (1, units), "float32", 0.0)
        h = self._in_steps(wide, f"{name}.out", GRU_SCALE)
        from_x = self.product(f"{name}.x", x.name, x.point, f"{name}.x.acc")
        from_h = self.product(f"{name}.h", h, f"{name}.out", f"{name}.h.acc")
        sizes = (2 * units, units)
        gates_x, new_x = graph.split(from_x, [f"{name}.x.gates", f"{name}.new_x.acc"], sizes, 1)
        gates_h, new_h = graph.split(from_h, [f"{name}.h.gates", f"{name}.new_h.acc"], sizes, 1)
        sums = graph.node("Add", [gates_x, gates_h], f"{name}.sigmoid_in.acc")
        opened = self.quantise(sums, f"{name}.sigmoid_in")
        opened = self.look_up(opened, sigmoid, f"{name}.sigmoid_in", f"{name}.gates")
        r, z = graph.split(opened, [f"{name}.r.q", f"{name}.z.q"], (units,) * 2, 1)
        own = self.real(self.quantise(new_h, f"{name}.new_h"), f"{name}.new_h")
        given = self.real(self.quantise(new_x, f"{name}.new_x"), f"{name}.new_x")
        reset = graph.node("Mul", [self.real(r, f"{name}.gates"), own], f"{name}.reset")
        inner = graph.node("Add", [given, reset], f"{name}.tanh_in.acc")
        new = self.quantise(inner, f"{name}.tanh_in")
        new = self.look_up(new, np.tanh, f"{name}.tanh_in", f"{name}.candidate")
        share = self.real(z, f"{name}.gates")
        one = graph.constant(f"{name}.one", 1.0, np.float32)
        rest = graph.node("Sub", [one, share], f"{name}.open")
        candidate = self.real(new, f"{name}.candidate", factor=1.0 / GRU_SCALE)
        added = graph.node("Mul", [rest, candidate], f"{name}.added")
        kept = graph.node("Mul", [share, wide], f"{name}.kept")
        state = self._wide(f"{name}.state", kept, added, GRU_LIMIT, wide_next)
        return Tensor(self._in_steps(state, f"{name}.out", GRU_SCALE), 1, units, f"{name}.out")

    def attend(self, name: str, query: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
        graph, kept = self.graph, self.scheme.kept
        factor = (query.channels // heads) ** -0.5
        q = self.real(self.heads(f"{name}.q", query, heads, (1, 0, 2)), query.point, factor=factor)
        k = self.real(self.heads(f"{name}.k", keys, heads, (1, 2, 0)), keys.point)
        v = self.real(self.heads(f"{name}.v", values, heads, (1, 0, 2)), values.point)
        scores = graph.node("MatMul", [q, k], f"{name}.scores.acc", f"{name}.scores")
        if {f"{name}.scores", f"{name}.softmax"} & kept.keys():
            shares = graph.node("Softmax", [scores], f"{name}.softmax.acc", axis=-1)
        else:
            codes = self.quantise(scores, f"{name}.scores")
            shares = self._softmax(name, codes, self.point(f"{name}.scores"))
        if f"{name}.context" not in kept:
            shares = self.real(self.quantise(shares, f"{name}.softmax"), f"{name}.softmax")
        context = graph.node("MatMul", [shares, v], f"{name}.context.acc", f"{name}.context")
        codes = self.quantise(context, f"{name}.context")
        shape = (1, query.channels)
        joined = graph.reshape(codes, f"{name}.context.joined", shape)
        return Tensor(joined, *shape, f"{name}.context")

    def _softmax(self, name: str, codes: str, at: Point) -> str:
        """exp from a table of 8 bits over the distance to the greatest score, then one division."""
        graph = self.graph
        steps = graph.node("Cast", [codes], f"{name}.scores.steps", to=TensorProto.FLOAT)
        axes = [graph.constant(f"{name}.softmax.axes", [2], "i8") for _ in range(2)]
        greatest = graph.node("ReduceMax", [steps, axes[0]], f"{name}.scores.top", keepdims=1)
        below = graph.node("Sub", [greatest, steps], f"{name}.scores.below")
        powers = np.rint(UINT8_MAX * np.exp(-np.arange(SOFTMAX_STEPS) * at.scale))
        looked_up = self.look_up_in(below, powers, f"{name}.softmax.powers.q")
        top = graph.node("Cast", [looked_up], f"{name}.softmax.powers", to=TensorProto.FLOAT)
        total = graph.node("ReduceSum", [top, axes[1]], f"{name}.softmax.total", keepdims=1)
        return graph.node("Div", [top, total], f"{name}.softmax.acc", f"{name}.softmax")

    def logits(self, name: str, x: Tensor, out: int) -> Tensor:
        return Tensor(self.product(name, x.name, x.point, OUTPUT_NAME), 1, out)


def quantised_graph(
    spec: Spec,
    parameters: Mapping[str, np.ndarray],
    scheme: Scheme,
    metadata: Mapping[str, str],
) -> tuple[onnx.ModelProto, tuple[StateTensor, ...]]:
    """The quantised step graph of folded weights under a scheme, and its state."""
    writer = QuantisedWriter(spec, parameters, scheme)
    codes = writer.quantise(INPUT_NAME, INPUT_POINT, "x.q")
    entry = Tensor(codes, 1, spec.n_features, INPUT_POINT)
    architecture(spec).step(writer, entry, spec.n_classes)
    model = writer.graph.model("quantised", spec.n_features, spec.n_classes, metadata)
    return model, tuple(writer.graph.state)
