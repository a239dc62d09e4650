"""Value-check nodes inside a step graph: one bitmask beside the scores, 0 where nothing is wrong.

INT8 turns NaN and infinity into ordinary numbers, so the graph itself says what it was given and
how its layers stand. The checks only look: their nodes and tensors are named ``check/...``, nothing
of the model depends on them, and `engine.backends.qdq_graph.without_checks` takes them out again.
The bits are those of `engine.manifest.CheckSection`.

A node costs ONNX Runtime as much as a small layer does, so a quantised graph gets five:

1. QuantizeLinear puts the input on a scale of its own, on which everything within the clip keeps
   clear of both ends and all else lands on them. NaN lands on the lower end on x86; ONNX leaves
   open where, so that `engine.backends.onnx` tries it when it opens a model.
2. All codes, of the input and of each layer, side by side as flags: above 0 where a code is at an
   end of its range. Written as DequantizeLinear, Concat, QuantizeLinear, which run as one
   QLinearConcat. A layer is tapped on its uint8 output: a tap on the float tensor would undo the
   layer's own fusion.
3. MatMulInteger counts the flags of each group, on from where its part of a table begins.
4. Gather takes from the table what that count means: 0, or the bit of the group.
5. ReduceSum puts the bits together.

Scores of an integer product are finite whatever goes in. Where they come from floats they are held
against the greatest float32 (Abs, LessOrEqual, Cast): a comparison with NaN is false, while a
maximum could miss it. So are both ends of the float twin, which also clips its input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engine.manifest import CHECK_PREFIX, VIOLATIONS
from engine.trust import CHECK_INPUT, CHECK_LAYERS, CHECK_OUTPUT
from feeds.errors import InputError
from models.foreign.passes import Wiring, copy_of, shape_of
from models.scheme import UINT8_MAX
from models.step_graph import INPUT_NAME, OUTPUT_NAME

LAST_BIT: Final = 31
MIN_OPSET: Final = 14
INPUT_ZERO_POINT: Final = 127
INPUT_STEPS: Final = 126.5  # from 0 to the clip; half to even makes it 126
FLOAT32_MAX: Final = float(np.finfo(np.float32).max)
WEIGHT_MAX: Final = 127
UNIT: Final = 255  # greatest worth of a flag that always stands
CLIPPED: Final = "x.clipped"
# What only moves data: behind it a quantised input is still the input.
_MOVES: Final = frozenset(
    ("Concat", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze")
) | {"Transpose", "Unsqueeze"}


@dataclass(frozen=True)
class Layer:
    """A tensor that is quantised inside a graph.

    Attributes
    ----------
    name : str
    codes : str
        The uint8 tensor.
    zero_point : int
        At 0 the lowest code, and at 255 the highest, is a plain zero and no saturation.
    scores : bool
        Whether the scores are these codes, dequantised.
    """

    name: str
    codes: str
    zero_point: int
    scores: bool = False

    def saturated(self, codes: np.ndarray) -> int:
        """How many of its codes are at an end of their range."""
        low = int((codes == 0).sum()) if self.zero_point > 0 else 0
        high = int((codes == UINT8_MAX).sum()) if self.zero_point < UINT8_MAX else 0
        return low + high


@dataclass(frozen=True)
class LimitedLayer:
    """A layer that is checked.

    Attributes
    ----------
    layer : Layer
    shape : tuple of int
        Of its codes.
    limit : int
        More saturated codes than that are a violation.
    """

    layer: Layer
    shape: tuple[int, ...]
    limit: int

    @property
    def size(self) -> int:
        """Number of its codes."""
        return int(np.prod(self.shape, dtype=np.int64))


def quantised_layers(model: onnx.ModelProto) -> list[Layer]:
    """What a graph quantises to uint8, in its order; the input, moved or not, is not among it."""
    wires = Wiring(model)
    maker = wires.maker.get(OUTPUT_NAME)
    scored = maker.input[0] if maker is not None and maker.op_type == "DequantizeLinear" else ""
    found: list[Layer] = []
    for node in model.graph.node:
        zero = wires.constants.get(node.input[2]) if len(node.input) > 2 else None
        if node.op_type != "QuantizeLinear" or zero is None:
            continue
        if zero.dtype != np.uint8 or zero.size != 1 or _is_given(wires, node.input[0]):
            continue
        codes = node.output[0]
        name = node.name.replace(".quantise", "").removesuffix("_QuantizeLinear") or codes
        found.append(Layer(name, codes, int(zero.reshape(())), codes == scored))
    return found


def _is_given(wires: Wiring, name: str) -> bool:
    """Whether a tensor is nothing but inputs of the graph, and constants."""
    waiting, given = [name], {value.name for value in wires.graph.input} | wires.constants.keys()
    while waiting:
        name = waiting.pop()
        node = wires.maker.get(name)
        if name in given:
            continue
        if node is None or node.op_type not in _MOVES:
            return False
        waiting.extend(item for item in node.input if item)
    return True


def with_checks(
    model: onnx.ModelProto, clip: float, layers: Sequence[LimitedLayer] = (), *, quantised: bool
) -> onnx.ModelProto:
    """The graph with its value check.

    Parameters
    ----------
    model : ModelProto
        A step graph; it is not changed.
    clip : float
        Inputs lie in [-clip, clip].
    layers : sequence of LimitedLayer
        Of a quantised graph, in the order of their bits. Those from the 24th on share one: their
        codes are counted together, against all their limits together.
    quantised : bool
        False for the float twin, which compares and clips.

    Returns
    -------
    ModelProto
        With `VIOLATIONS` as its last output, int32 of shape (1,).

    Raises
    ------
    InputError
        If a name is taken or the operator set is too old.
    """
    _check_model(model)
    checked = copy_of(model)
    graph = _CheckWriter(checked.graph)
    if quantised:
        _check_codes(graph, clip, layers)
    else:
        _check_floats(graph, clip)
    onnx.checker.check_model(checked)
    return checked


def _check_model(model: onnx.ModelProto) -> None:
    where = model.graph.name or "model"
    names = {name for node in model.graph.node for name in (node.name, *node.output)}
    taken = sorted(name for name in names if name == VIOLATIONS or name.startswith(CHECK_PREFIX))
    if taken:
        raise InputError(
            "a name that the value check needs is taken",
            where=f"{where}: {taken[0]}",
            expected=f"no {VIOLATIONS}, and nothing that begins with {CHECK_PREFIX}",
            fix="rename it, and export the model again",
        )
    version = next((item.version for item in model.opset_import if not item.domain), 0)
    if version < MIN_OPSET:
        raise InputError(
            "an operator set that is too old for the value check",
            where=where,
            expected=f"{MIN_OPSET} or more",
            found=str(version),
            fix="export the model again",
        )


@dataclass(frozen=True)
class _Part:
    """A row of codes, and what makes flags of them: ``(code - zero_point) * scale``, from 0 on."""

    codes: str
    size: int
    zero_point: int = 0
    scale: float = 1.0


class _CheckWriter:
    """Writes nodes that only check, into a graph."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        (x,) = (value for value in graph.input if value.name == INPUT_NAME)
        (scores,) = (value for value in graph.output if value.name == OUTPUT_NAME)
        self.n_features, self.n_scores = shape_of(x)[1], shape_of(scores)[1]
        self.groups: list[tuple[range, list[int]]] = []

    def constant(self, name: str, values: Any, dtype: Any) -> str:
        """An initialiser."""
        name = f"{CHECK_PREFIX}{name}"
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """A node with one output; returns its name."""
        name = f"{CHECK_PREFIX}{output}"
        made = VIOLATIONS if output == VIOLATIONS else name
        self.graph.node.append(helper.make_node(op, list(inputs), [made], name=name, **attributes))
        return made

    def finite(self, x: str, bounds: np.ndarray, name: str) -> str:
        """uint8: 1 where a float lies within its bound, 0 where it does not or is no number."""
        bound = self.constant(f"{name}.bound", bounds, np.float32)
        within = self.node("LessOrEqual", [self.node("Abs", [x], f"{name}.abs"), bound], name)
        return self.node("Cast", [within], f"{name}.flags", to=TensorProto.UINT8)

    def count(self, flags: range, table: list[int]) -> None:
        """Flags that are counted together, and what each count means."""
        self.groups.append((flags, table))

    @property
    def length(self) -> int:
        """Of all tables so far."""
        return sum(len(table) for _, table in self.groups)

    def mask(self, flags: str, size: int, units: Mapping[int, int]) -> None:
        """The nodes from flags to mask.

        Parameters
        ----------
        flags : str
            uint8 of shape (1, size).
        units : mapping of int to int
            Flags that always stand and what each is worth, greatest first: weighted, they move a
            count to where the table of its group begins.
        """
        weights = np.zeros((size, len(self.groups)), dtype=np.int8)
        begin, bits = 0, list[int]()
        for number, (members, table) in enumerate(self.groups):
            weights[members.start : members.stop, number] = 1
            rest = begin
            for flag, worth in units.items():
                weights[flag, number] = min(rest // worth, WEIGHT_MAX)
                rest -= worth * int(weights[flag, number])
            assert rest == 0, "too few units for tables of this length"
            begin, bits = begin + len(table), bits + table
        groups = self.constant("weights", weights, np.int8)
        counts = self.node("MatMulInteger", [flags, groups], "counts")
        # Bit 31 is the sign of an int32.
        meanings = self.constant("table", np.array(bits, np.uint32).view(np.int32), np.int32)
        meant = self.node("Gather", [meanings, counts], "bits", axis=0)
        axes = self.constant("axes", [1], np.int64)
        self.node("ReduceSum", [meant, axes], VIOLATIONS, keepdims=0)
        self.graph.output.append(helper.make_tensor_value_info(VIOLATIONS, TensorProto.INT32, [1]))


def _all_or(bit: int, size: int) -> list[int]:
    """What a count of flags that must all stand means."""
    return [bit] * size + [0]


def _at_most(limit: int, size: int, bit: int) -> list[int]:
    """What a count of flags means of which only so many may stand."""
    return [0] * (limit + 1) + [bit] * (size - limit)


def _check_floats(graph: _CheckWriter, clip: float) -> None:
    """Input and scores in one comparison; the model then sees its input clipped."""
    n, classes = graph.n_features, graph.n_scores
    graph.count(range(n), _all_or(CHECK_INPUT, n))
    graph.count(range(n, n + classes), _all_or(CHECK_OUTPUT, classes))
    units = -(-graph.length // WEIGHT_MAX)  # zeros, which are within any bound
    size = n + classes + units
    zeros = graph.constant("zeros", np.zeros((1, units)), np.float32)
    values = graph.node("Concat", [INPUT_NAME, OUTPUT_NAME, zeros], "values", axis=1)
    bounds = np.full((1, size), FLOAT32_MAX)
    bounds[0, :n] = clip
    flags = graph.finite(values, bounds, "within")
    graph.mask(flags, size, dict.fromkeys(range(n + classes, size), 1))
    _clip_input(graph.graph, clip)


def _clip_input(graph: onnx.GraphProto, clip: float) -> None:
    """Let the model see its input clipped, by a node of its own."""
    for node in graph.node:
        if not node.name.startswith(CHECK_PREFIX):
            for place, name in enumerate(node.input):
                if name == INPUT_NAME:
                    node.input[place] = CLIPPED
    ends = {f"{CLIPPED}.low": -clip, f"{CLIPPED}.high": clip}
    for name, end in ends.items():
        graph.initializer.append(numpy_helper.from_array(np.array(end, np.float32), name))
    graph.node.insert(0, helper.make_node("Clip", [INPUT_NAME, *ends], [CLIPPED], name=CLIPPED))


def input_step(clip: float) -> float:
    """The float32 scale on which `clip` is at most `INPUT_STEPS`, and hardly less."""
    step = np.float32(clip / INPUT_STEPS)
    while np.float32(clip) / step > np.float32(INPUT_STEPS):
        step = np.nextafter(step, np.float32(np.inf))
    return float(step)


def _check_codes(graph: _CheckWriter, clip: float, layers: Sequence[LimitedLayer]) -> None:
    """Flags of codes: of the input on a scale of its own, and of every layer."""
    n, classes = graph.n_features, graph.n_scores
    step = graph.constant("x.scale", input_step(clip), np.float32)
    zero = graph.constant("x.zero_point", INPUT_ZERO_POINT, np.uint8)
    codes = graph.node("QuantizeLinear", [INPUT_NAME, step, zero], "x.codes")
    # Within the clip are the codes 1 to 253: their flags are 0, those of 254, 255 and 0 are not.
    parts = [_Part(codes, n, UINT8_MAX - 2), _Part(codes, n, 1, -1.0)]
    graph.count(range(2 * n), _at_most(0, 2 * n, CHECK_INPUT))
    if not _scores_are_finite(graph.graph):
        finite = graph.finite(OUTPUT_NAME, np.full((1, classes), FLOAT32_MAX), "scores")
        graph.count(range(2 * n, 2 * n + classes), _all_or(CHECK_OUTPUT, classes))
        parts.append(_Part(finite, classes))
    bits = iter(range(CHECK_LAYERS, CHECK_LAYERS + len(layers)))
    counted: dict[int, list[tuple[range, LimitedLayer]]] = {}
    for item in sorted(layers, key=lambda item: not item.layer.scores):
        bit = CHECK_OUTPUT if item.layer.scores else 1 << min(next(bits), LAST_BIT)
        begin = sum(part.size for part in parts)
        parts += _layer_parts(graph, item)
        flags = range(begin, sum(part.size for part in parts))
        counted.setdefault(bit, []).append((flags, item))
    for bit, together in counted.items():
        limit, size = (sum(getattr(item, key) for _, item in together) for key in ("limit", "size"))
        flags = range(together[0][0].start, together[-1][0].stop)
        graph.count(flags, _at_most(limit, size, bit))
    _join(graph, parts)


def _scores_are_finite(graph: onnx.GraphProto) -> bool:
    """Whether the scores are an integer product or codes, times scales: finite whatever goes in."""
    makers = {name: node for node in graph.node for name in node.output}
    node = makers.get(OUTPUT_NAME)
    if node is None or node.op_type == "DequantizeLinear":
        return node is not None
    inputs = [makers.get(name) for name in node.input if name]
    codes = all(maker is not None and maker.op_type == "DequantizeLinear" for maker in inputs)
    return node.op_type in ("Gemm", "MatMul") and codes


def _layer_parts(graph: _CheckWriter, item: LimitedLayer) -> list[_Part]:
    """A layer's codes in one row, once for each end at which they can saturate."""
    codes, size = item.layer.codes, item.size
    if item.shape != (1, size):
        shape = graph.constant(f"{codes}.shape", [1, size], np.int64)
        codes = graph.node("Reshape", [codes, shape], f"{codes}.row")
    parts = []
    if item.layer.zero_point < UINT8_MAX:
        parts.append(_Part(codes, size, UINT8_MAX - 1))
    if item.layer.zero_point > 0:
        parts.append(_Part(codes, size, 1, -1.0))
    return parts


def _join(graph: _CheckWriter, parts: Sequence[_Part]) -> None:
    """All flags side by side, as ONNX Runtime fuses it; then the mask."""
    many = -(-graph.length // (UNIT * WEIGHT_MAX))
    worth = [UNIT] * many + [1, 1]
    units = graph.constant("units", [worth], np.uint8)
    real = []
    for i, part in enumerate([*parts, _Part(units, len(worth))]):
        zero = graph.constant(f"flags.{i}.zero_point", part.zero_point, np.uint8)
        scale = graph.constant(f"flags.{i}.scale", part.scale, np.float32)
        real.append(graph.node("DequantizeLinear", [part.codes, scale, zero], f"flags.{i}"))
    whole = graph.node("Concat", real, "flags.real", axis=1)
    one = graph.constant("flags.scale", 1.0, np.float32)
    none = graph.constant("flags.zero_point", 0, np.uint8)
    flags = graph.node("QuantizeLinear", [whole, one, none], "flags")
    size = sum(part.size for part in parts)
    graph.mask(
        flags, size + len(worth), dict(zip(range(size, size + len(worth)), worth, strict=True))
    )
