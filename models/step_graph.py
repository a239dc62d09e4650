"""The ONNX graphs of one step, float and quantised, built node by node.

`float_graph` and `models.quantised_graph` interpret an architecture over ONNX nodes: ``x`` float32
(1, features) and the state tensors in, ``logits`` float32 (1, classes) and the next state out. The
same weights give the same bytes under every version of the training framework, and node and
tensor names are those of the architecture.

The quantised graph is QDQ: uint8 tensors between operations, and around each product
DequantizeLinear of activations, weights and bias, Gemm, QuantizeLinear, which ONNX Runtime fuses
into one QGemm. A ReLU is the saturation at zero point 0. Data is moved (delays, slices, transposes)
as uint8; sigmoid, tanh and LeakyReLU are tables of 256 entries (Cast, Gather). Softmax and
LayerNorm count in integers and end in one correctly rounded division, unless they are kept in
floating point. Each node has initialisers of its own: ONNX Runtime's optimiser replaces them in
place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engine.manifest import StateTensor
from models.architectures import architecture
from models.execute import LAYER_NORM_EPSILON
from models.operations import LEAK, Operations, Spec
from models.scheme import UINT8_MAX, Point

OPSET: Final = 19
IR_VERSION: Final = 10
PRODUCER: Final = "octick"
INPUT_NAME: Final = "x"
OUTPUT_NAME: Final = "logits"

_CODES: Final = np.arange(UINT8_MAX + 1)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), float64."""
    return 1.0 / (1.0 + np.exp(-x))


def table(function: Any, before: Point, after: Point) -> np.ndarray:
    """uint8 of shape (256,): what each input code becomes, rounded half to even."""
    real = function((_CODES - before.zero_point) * np.float64(before.scale))
    return np.clip(np.rint(real / after.scale) + after.zero_point, 0, UINT8_MAX).astype(np.uint8)


@dataclass(frozen=True)
class Tensor:
    """A value of the graph: name, shape, and the point it is quantised at ("" for float32)."""

    name: str
    rows: int
    channels: int
    point: str = ""


class GraphBuilder:
    """Collects nodes, initialisers and state; names are unique."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.state: list[StateTensor] = []
        self._names: set[str] = set()

    def constant(self, name: str, values: Any, dtype: Any) -> str:
        """An initialiser."""
        name = self._unique(name)
        self.initializers.append(numpy_helper.from_array(np.asarray(values, dtype=dtype), name))
        return name

    def node(
        self, op: str, inputs: Sequence[str], output: str, name: str = "", **attributes: Any
    ) -> str:
        """A node with one output; returns its name."""
        output = self._unique(output)
        name = self._unique(f"node {name or output}").removeprefix("node ")
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=name, **attributes))
        return output

    def split(self, x: str, outputs: Sequence[str], sizes: Sequence[int], axis: int) -> list[str]:
        """A Split node."""
        names = [self._unique(name) for name in outputs]
        widths = self.constant(f"{names[0]}.sizes", sizes, np.int64)
        self.nodes.append(
            helper.make_node("Split", [x, widths], names, name=f"{names[0]}.split", axis=axis)
        )
        return names

    def reshape(self, x: str, output: str, shape: Sequence[int]) -> str:
        """A Reshape node."""
        return self.node("Reshape", [x, self.constant(f"{output}.shape", shape, "i8")], output)

    def remember(
        self, name: str, shape: tuple[int, ...], dtype: Any, initial: float
    ) -> tuple[str, str]:
        """A state tensor: the names of its input and of its output."""
        before, after = f"{name}.past", f"{name}.next"
        self.state.append(StateTensor(before, after, dtype, shape, float(initial)))
        return before, after

    def _unique(self, name: str) -> str:
        unique, count = name, 1
        while unique in self._names:
            count += 1
            unique = f"{name}.{count}"
        self._names.add(unique)
        return unique

    def model(
        self, name: str, n_inputs: int, n_outputs: int, metadata: Mapping[str, str]
    ) -> onnx.ModelProto:
        """The checked model."""
        types = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT}
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            name,
            [
                value(INPUT_NAME, TensorProto.FLOAT, [1, n_inputs]),
                *(value(s.input, types[s.dtype], s.shape) for s in self.state),
            ],
            [
                value(OUTPUT_NAME, TensorProto.FLOAT, [1, n_outputs]),
                *(value(s.output, types[s.dtype], s.shape) for s in self.state),
            ],
            self.initializers,
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name=PRODUCER,
        )
        helper.set_model_props(model, dict(metadata))
        onnx.checker.check_model(model, full_check=True)
        return model


class StepWriter(Operations[Tensor]):
    """What float and quantised graphs share: moving data."""

    def __init__(self, spec: Spec, parameters: Mapping[str, np.ndarray]) -> None:
        self.spec = spec
        self.parameters = parameters
        self.graph = GraphBuilder()

    def width(self, name: str, width: int) -> int:
        """A width, as pruning left it."""
        return self.spec.widths.get(name, width)

    def dtype_of(self, x: Tensor) -> tuple[Any, float]:
        """Dtype of a value as it is kept, and the code of 0."""
        return "float32", 0.0

    def columns(self, x: Tensor, start: int, stop: int) -> Tensor:
        graph, name = self.graph, f"{x.name}.columns"
        bounds = [
            graph.constant(f"{name}.{part}", [at], "i8")
            for part, at in (("start", start), ("stop", stop), ("axis", 1))
        ]
        return Tensor(graph.node("Slice", [x.name, *bounds], name), x.rows, stop - start, x.point)

    def spread(self, x: Tensor, rows: int) -> Tensor:
        if rows == x.rows:
            return x
        channels = x.rows * x.channels // rows
        name = self.graph.reshape(x.name, f"{x.name}.rows", (rows, channels))
        return Tensor(name, rows, channels, x.point)

    def _past(self, name: str, x: Tensor, steps: int) -> str:
        """(steps + 1, rows, channels): the steps before x, oldest first, then x."""
        graph = self.graph
        dtype, initial = self.dtype_of(x)
        before, after = graph.remember(name, (steps, x.rows, x.channels), dtype, initial)
        now = graph.reshape(x.name, f"{name}.now", (1, x.rows, x.channels))
        whole = graph.node("Concat", [before, now], f"{name}.whole", axis=0)
        bounds = [
            graph.constant(f"{name}.{part}", [at], "i8")
            for part, at in (("start", 1), ("stop", steps + 1), ("axis", 0))
        ]
        graph.node("Slice", [whole, *bounds], after)
        return whole

    def _lagged(self, name: str, x: Tensor, lags: tuple[int, ...]) -> str:
        steps = max(lags)
        whole = self._past(name, x, steps)
        chosen = self.graph.constant(f"{name}.lags", [steps - lag for lag in lags], "i8")
        return self.graph.node("Gather", [whole, chosen], f"{name}.lagged", axis=0)

    def delay(self, name: str, x: Tensor, lags: tuple[int, ...]) -> Tensor:
        lagged = self._lagged(name, x, lags)
        if x.rows > 1:
            lagged = self.graph.node("Transpose", [lagged], f"{name}.by_row", perm=[1, 0, 2])
        channels = len(lags) * x.channels
        return Tensor(
            self.graph.reshape(lagged, name, (x.rows, channels)), x.rows, channels, x.point
        )

    def history(self, name: str, x: Tensor, steps: int) -> Tensor:
        whole = self._past(name, x, steps - 1)
        rows = self.graph.reshape(whole, name, (steps, x.channels))
        return Tensor(rows, steps, x.channels, x.point)

    def maximum(self, name: str, x: Tensor, lags: tuple[int, ...]) -> Tensor:
        lagged = self._lagged(name, x, lags)
        axes = self.graph.constant(f"{name}.axes", [0], "i8")
        greatest = self.graph.node("ReduceMax", [lagged, axes], name, keepdims=0)
        return Tensor(greatest, x.rows, x.channels, x.point)

    def heads(self, name: str, x: Tensor, heads: int, order: tuple[int, ...]) -> str:
        """(rows, channels) as (rows, heads, width), transposed."""
        shape = (x.rows, heads, x.channels // heads)
        split = self.graph.reshape(x.name, f"{name}.split", shape)
        return self.graph.node("Transpose", [split], f"{name}.heads", perm=list(order))

    def gemm(self, name: str, x: str, weight: str, bias: str | None, output: str) -> str:
        """``x w' + b``."""
        inputs = [x, weight] if bias is None else [x, weight, bias]
        return self.graph.node("Gemm", inputs, output, name, transB=1)


class FloatWriter(StepWriter):
    def _product(self, name: str, x: str, output: str) -> str:
        graph = self.graph
        weight = graph.constant(f"{name}.weight", self.parameters[f"{name}.weight"], np.float32)
        bias = self.parameters.get(f"{name}.bias")
        shift = None if bias is None else graph.constant(f"{name}.bias", bias, np.float32)
        return self.gemm(name, x, weight, shift, output)

    def _out(self, name: str) -> int:
        return len(self.parameters[f"{name}.weight"])

    def dense(
        self, name: str, x: Tensor, out: int, *, relu: bool = False, norm: bool = False
    ) -> Tensor:
        y = self._product(name, x.name, f"{name}.acc" if relu else f"{name}.out")
        if relu:
            y = self.graph.node("Relu", [y], f"{name}.out")
        return Tensor(y, x.rows, self._out(name))

    def add(self, name: str, a: Tensor, b: Tensor, *, relu: bool = False) -> Tensor:
        y = self.graph.node("Add", [a.name, b.name], f"{name}.acc" if relu else f"{name}.out")
        if relu:
            y = self.graph.node("Relu", [y], f"{name}.out")
        return Tensor(y, a.rows, a.channels)

    def concat(self, name: str, parts: list[Tensor]) -> Tensor:
        y = self.graph.node("Concat", [part.name for part in parts], f"{name}.out", axis=1)
        return Tensor(y, parts[0].rows, sum(part.channels for part in parts))

    def leaky(self, name: str, x: Tensor) -> Tensor:
        y = self.graph.node("LeakyRelu", [x.name], f"{name}.out", alpha=LEAK)
        return Tensor(y, x.rows, x.channels)

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        return Tensor(float_layer_norm(self.graph, name, x.name), 1, x.channels)

    def lstm(self, name: str, x: Tensor, units: int) -> Tensor:
        graph, units = self.graph, self.width(name, units)
        h, h_next = graph.remember(f"{name}.h", (1, units), "float32", 0.0)
        c, c_next = graph.remember(f"{name}.c", (1, units), "float32", 0.0)
        from_x = self._product(f"{name}.x", x.name, f"{name}.x.acc")
        from_h = self._product(f"{name}.h", h, f"{name}.h.acc")
        sums = graph.node("Add", [from_x, from_h], f"{name}.sums")
        names = [f"{name}.sigmoid_in.out", f"{name}.tanh_in.out"]
        gates, new = graph.split(sums, names, (3 * units, units), 1)
        opened = graph.node("Sigmoid", [gates], f"{name}.gates.out")
        i, f, o = graph.split(opened, [f"{name}.{gate}" for gate in "ifo"], (units,) * 3, 1)
        candidate = graph.node("Tanh", [new], f"{name}.candidate.out")
        kept = graph.node("Mul", [f, c], f"{name}.kept")
        added = graph.node("Mul", [i, candidate], f"{name}.added")
        cell = graph.node("Add", [kept, added], c_next)
        shown = graph.node("Tanh", [cell], f"{name}.cell_tanh.out")
        return Tensor(graph.node("Mul", [o, shown], h_next), 1, units)

    def gru(self, name: str, x: Tensor, units: int) -> Tensor:
        graph, units = self.graph, self.width(name, units)
        h, h_next = graph.remember(f"{name}.h", (1, units), "float32", 0.0)
        from_x = self._product(f"{name}.x", x.name, f"{name}.x.acc")
        from_h = self._product(f"{name}.h", h, f"{name}.h.acc")
        sizes = (2 * units, units)
        gates_x, new_x = graph.split(from_x, [f"{name}.x.gates", f"{name}.new_x.out"], sizes, 1)
        gates_h, new_h = graph.split(from_h, [f"{name}.h.gates", f"{name}.new_h.out"], sizes, 1)
        sums = graph.node("Add", [gates_x, gates_h], f"{name}.sigmoid_in.out")
        opened = graph.node("Sigmoid", [sums], f"{name}.gates.out")
        r, z = graph.split(opened, [f"{name}.r", f"{name}.z"], (units,) * 2, 1)
        reset = graph.node("Mul", [r, new_h], f"{name}.reset")
        inner = graph.node("Add", [new_x, reset], f"{name}.tanh_in.out")
        candidate = graph.node("Tanh", [inner], f"{name}.candidate.out")
        one = graph.constant(f"{name}.one", 1.0, np.float32)
        open_share = graph.node("Sub", [one, z], f"{name}.open")
        added = graph.node("Mul", [open_share, candidate], f"{name}.added")
        kept = graph.node("Mul", [z, h], f"{name}.kept")
        return Tensor(graph.node("Add", [added, kept], h_next), 1, units)

    def attend(self, name: str, query: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
        graph = self.graph
        q = self.heads(f"{name}.q", query, heads, (1, 0, 2))
        k = self.heads(f"{name}.k", keys, heads, (1, 2, 0))
        v = self.heads(f"{name}.v", values, heads, (1, 0, 2))
        factor = graph.constant(f"{name}.scale", (query.channels // heads) ** -0.5, np.float32)
        scaled = graph.node("Mul", [q, factor], f"{name}.q.scaled")
        scores = graph.node("MatMul", [scaled, k], f"{name}.scores.out")
        shares = graph.node("Softmax", [scores], f"{name}.softmax.out", axis=-1)
        context = graph.node("MatMul", [shares, v], f"{name}.context.heads")
        shape = (1, query.channels)
        return Tensor(graph.reshape(context, f"{name}.context.out", shape), *shape)

    def logits(self, name: str, x: Tensor, out: int) -> Tensor:
        return Tensor(self._product(name, x.name, OUTPUT_NAME), 1, out)


def float_layer_norm(graph: GraphBuilder, name: str, x: str) -> str:
    """LayerNorm without scale and shift, in primitive operations."""
    axes = graph.constant(f"{name}.axes", [1], "i8")
    mean = graph.node("ReduceMean", [x, axes], f"{name}.mean", keepdims=1)
    centred = graph.node("Sub", [x, mean], f"{name}.centred")
    squared = graph.node("Mul", [centred, centred], f"{name}.squared")
    axes = graph.constant(f"{name}.axes", [1], "i8")
    variance = graph.node("ReduceMean", [squared, axes], f"{name}.variance", keepdims=1)
    epsilon = graph.constant(f"{name}.epsilon", LAYER_NORM_EPSILON, np.float32)
    raised = graph.node("Add", [variance, epsilon], f"{name}.raised")
    deviation = graph.node("Sqrt", [raised], f"{name}.deviation")
    return graph.node("Div", [centred, deviation], f"{name}.out")


def float_graph(
    spec: Spec, parameters: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> tuple[onnx.ModelProto, tuple[StateTensor, ...]]:
    """The float step graph of folded weights, and its state.

    Raises
    ------
    InputError
        If the spec names no architecture.
    """
    writer = FloatWriter(spec, parameters)
    architecture(spec).step(writer, Tensor(INPUT_NAME, 1, spec.n_features), spec.n_classes)
    model = writer.graph.model("float", spec.n_features, spec.n_classes, metadata)
    return model, tuple(writer.graph.state)
