"""QuantizeLinear and DequantizeLinear around the products of a graph, and where none should stand.

ONNX Runtime's QDQ quantiser puts a pair on each tensor that a chosen product takes or makes. What
its optimiser then fuses depends on what stands beside it; the passes here see to that.

Source: ONNX Runtime documentation, "Quantize ONNX models", and its QDQ transformations.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

import numpy as np
import onnx
from onnx import helper

from models.foreign.passes import MACS, Wiring, copy_of, quiet, replace_nodes, without_unused

# What only moves data, so that ONNX Runtime can do it on integers.
_CARRIERS: Final = (
    "Flatten",
    "MaxPool",
    "Reshape",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)


def carried_to(wires: Wiring, name: str) -> tuple[str, list[onnx.NodeProto]]:
    """Where a tensor arrives through nodes that only move it, and who takes it there."""
    while len(wires.takers[name]) == 1 and name not in wires.results:
        taker = wires.takers[name][0]
        if taker.op_type not in _CARRIERS or taker.input[0] != name:
            break
        name = taker.output[0]
    return name, wires.takers[name]


def write_qdq(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    ranges: Mapping[str, tuple[float, float]],
    per_channel: bool,
) -> onnx.ModelProto:
    """ONNX Runtime's QDQ quantiser on these nodes and ranges."""
    with quiet():
        from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType
        from onnxruntime.quantization.calibrate import TensorsData

        spans = {
            name: (np.array(low, dtype=np.float32), np.array(high, dtype=np.float32))
            for name, (low, high) in ranges.items()
        }
        quantizer = QDQQuantizer(
            onnx.shape_inference.infer_shapes(copy_of(model)),
            per_channel,
            False,  # weights keep all 8 bits: the sessions ask for sums that cannot saturate
            QuantType.QInt8,
            QuantType.QUInt8,
            TensorsData(CalibrationMethod.MinMax, spans),
            [node.name for node in nodes],
            [],
            sorted({node.op_type for node in nodes}),
            {"WeightSymmetric": True, "ActivationSymmetric": False},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        return quantizer.model.model


def without_needless_pairs(
    model: onnx.ModelProto, chosen: set[str], relus: Collection[str]
) -> onnx.ModelProto:
    """Take out the pairs behind Gemm and MatMul that no product takes: they may leave in float32.

    A Conv is fused only with a quantised output, and where a Relu was, the pair is the Relu.
    """
    model = copy_of(model)
    wires = Wiring(model)
    renamed: dict[str, str] = {}
    needless: set[str] = set()
    for node in model.graph.node:
        made = node.output[0]
        takers = wires.takers[made]
        if node.name not in chosen or node.op_type == "Conv" or made in relus:
            continue
        if [taker.op_type for taker in takers] != ["QuantizeLinear"]:
            continue
        (back,) = wires.takers[takers[0].output[0]]
        real = back.output[0]
        _, after = carried_to(wires, real)
        if any(taker.name in chosen or taker.op_type == "QuantizeLinear" for taker in after):
            continue
        needless |= {takers[0].name, back.name}
        if real in wires.results:
            node.output[0] = real
        else:
            renamed[real] = made
    kept = [node for node in model.graph.node if node.name not in needless]
    for node in kept:
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)
    replace_nodes(model, kept)
    return without_unused(model)


def with_float_kept(model: onnx.ModelProto, chosen: set[str]) -> onnx.ModelProto:
    """See to it that a product which was not chosen runs in float32.

    ONNX Runtime quantises by itself, a scale a tensor, the weight of a Gemm or Conv between a
    DequantizeLinear and a QuantizeLinear. Such a product takes the tensor as it was before its
    pair, or a Clip without bounds comes between where the pair belongs to a product before it.
    """
    model = copy_of(model)
    wires = Wiring(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        back = _source(wires, node.input[0]) if node.op_type in MACS else None
        if node.name not in chosen and back is not None and back.op_type == "DequantizeLinear":
            made = wires.maker[back.input[0]].input[0]
            before = wires.maker.get(made)
            if back.output[0] == node.input[0] and (before is None or before.name not in chosen):
                node.input[0] = made
            else:
                free = wires.unique(f"{node.input[0]}.float")
                name = f"{node.name}.in_float"
                nodes.append(helper.make_node("Clip", [node.input[0]], [free], name=name))
                node.input[0] = free
        nodes.append(node)
    replace_nodes(model, nodes)
    return without_unused(model)


def _source(wires: Wiring, name: str) -> onnx.NodeProto | None:
    """The node that made a tensor before it was only moved."""
    node = wires.maker.get(name)
    while node is not None and node.op_type in _CARRIERS:
        node = wires.maker.get(node.input[0])
    return node
