"""Folding normalisation that stands behind an activation into the product that comes next.

Source: Jacob et al. (2018), "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", section 3.2, the other way round.
"""

from __future__ import annotations

import numpy as np
import onnx

from models.foreign.passes import Wiring, attribute, copy_of, without_unused


def with_folded_norms(model: onnx.ModelProto) -> onnx.ModelProto:
    """BatchNormalization in front of a product is folded into it.

    DeepLOB and others normalise behind the activation, where `preprocessed` finds no Conv to fold
    into. ``W (s x + t) + b`` is ``(W s) x + (W t + b)`` unless the Conv pads: the zeros around
    ``s x + t`` are no image of a constant around ``x``. A padded consumer keeps the node.
    """
    model = copy_of(model)
    wires = Wiring(model)
    for norm in [node for node in model.graph.node if node.op_type == "BatchNormalization"]:
        numbers = [wires.constants.get(name) for name in norm.input[1:]]
        if attribute(norm, "training_mode", 0) or any(values is None for values in numbers):
            continue
        gain, shift, mean, variance = (np.asarray(v, dtype=np.float64) for v in numbers)
        factor = gain / np.sqrt(variance + attribute(norm, "epsilon", 1e-5))
        offset = shift - mean * factor
        for node in wires.takers[norm.output[0]]:
            if _takes_fold(node, wires, norm.output[0]):
                _fold(node, wires, factor, offset)
                node.input[0] = norm.input[0]
    return without_unused(model)


def _takes_fold(node: onnx.NodeProto, wires: Wiring, name: str) -> bool:
    if list(node.input).count(name) != 1 or node.input[0] != name:
        return False
    if any(part not in wires.constants for part in node.input[1:] if part):
        return False
    if node.op_type == "Gemm":
        return not attribute(node, "transA", 0)
    if node.op_type != "Conv":
        return False
    size = wires.constants[node.input[1]].shape[2:]
    auto = attribute(node, "auto_pad", b"NOTSET")
    if auto in (b"SAME_UPPER", b"SAME_LOWER"):
        return all(side == 1 for side in (*size, *attribute(node, "strides", ())))
    return auto == b"VALID" or not any(attribute(node, "pads", ()))


def _fold(node: onnx.NodeProto, wires: Wiring, factor: np.ndarray, offset: np.ndarray) -> None:
    """Multiply ``factor`` into a product's weight and add ``offset``'s image to its bias."""
    weight = wires.constants[node.input[1]].astype(np.float64)
    if node.op_type == "Gemm":
        inner_last = bool(attribute(node, "transB", 0))
        scaled = weight * (factor if inner_last else factor[:, None])
        moved = weight @ offset if inner_last else offset @ weight
        moved *= attribute(node, "alpha", 1.0) / attribute(node, "beta", 1.0)
    else:
        groups, (out, inner) = attribute(node, "group", 1), weight.shape[:2]
        # Row o of a grouped convolution sees the channels of its group only.
        seen = (np.arange(out) // (out // groups))[:, None] * inner + np.arange(inner)
        wide = (..., *(None,) * (weight.ndim - 2))
        scaled = weight * factor[seen][wide]
        moved = (weight * offset[seen][wide]).reshape(out, -1).sum(axis=1)
    bias = node.input[2] if len(node.input) > 2 else ""
    name = wires.add_constant(f"{node.input[1]}.folded", scaled.astype(np.float32))
    total = moved + (wires.constants[bias].astype(np.float64) if bias else 0.0)
    shift = wires.add_constant(f"{bias or node.name + '.bias'}.folded", total.astype(np.float32))
    del node.input[1:]
    node.input.extend([name, shift])
