"""Quantising the weights of an ONNX graph alone: no calibration data are needed.

Sources: ONNX Runtime documentation, "Quantize ONNX models": dynamic quantisation, and block-wise
4-bit quantisation of MatMul; Dettmers and Zettlemoyer (2023), "The case for 4-bit precision"
(blocks of weights with a scale each).
"""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto

from feeds.errors import InputError
from models.foreign.folding import with_folded_norms
from models.foreign.passes import (
    Wiring,
    at_opset,
    copy_of,
    preprocessed,
    quiet,
    replace_nodes,
    tidied,
    with_matmuls,
    with_metadata_of,
    with_own_weights,
    without_unused,
)

INT4_OPSET: Final = 21
BLOCK_SIZES: Final = (16, 32, 64, 128, 256)  # those of MatMulNBits
FLOAT16_MAX: Final = 65_504.0


def check_node_names(model: onnx.ModelProto, names: Sequence[str], *also: onnx.ModelProto) -> None:
    """Each of these names is a node of the model, or of one that was made of it.

    Raises
    ------
    InputError
        With the nearest name.
    """
    own = [node.name for node in tidied(model).graph.node]
    known = {node.name for other in also for node in other.graph.node}.union(own)
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, sorted(known), n=1)
            raise InputError(
                "no such node",
                where=model.graph.name or "model",
                expected="one of " + ", ".join(own[:20]) + (" …" if len(own) > 20 else ""),
                found=name,
                fix=f"did you mean {nearest[0]}?" if nearest else "",
            )


def quantise_dynamic(model: onnx.ModelProto) -> onnx.ModelProto:
    """int8 weights; activations are quantised anew at each call, by their own range.

    Gemm becomes MatMul and Add. MatMul has a weight scale for each output channel; Conv has one for
    the whole weight, which is uint8: ONNX Runtime's ConvInteger of int8 weights is slower, and
    older versions have none. A dynamic Conv costs more than a float one at batch 1; it is there
    for its size.

    Parameters
    ----------
    model : ModelProto
        A float step or window model.

    Returns
    -------
    ModelProto
        The same inputs, outputs and metadata.

    Raises
    ------
    InputError
        If there is no product with a constant weight.
    """
    start = _float_start(model, ("Conv", "MatMul"))
    for kinds, signed in ((("MatMul",), True), (("Conv",), False)):
        start = dynamic(start, kinds, signed=signed)
    start = with_metadata_of(tidied(start), model)
    onnx.checker.check_model(start, full_check=True)
    return start


def _float_start(model: onnx.ModelProto, kinds: Sequence[str]) -> onnx.ModelProto:
    """The graph in MatMul and Add, with something of these kinds to quantise."""
    start = with_folded_norms(preprocessed(at_opset(tidied(model))))
    start = with_own_weights(with_matmuls(tidied(start)))
    constants = {tensor.name for tensor in start.graph.initializer}
    if not any(n.op_type in kinds and n.input[1] in constants for n in start.graph.node):
        raise InputError(
            "nothing to quantise in this graph",
            where=model.graph.name or "model",
            expected=f"a node of {', '.join(('Gemm', *kinds))} with a constant weight",
            found=", ".join(sorted({node.op_type for node in start.graph.node})),
            fix="serve it in fp32",
        )
    return start


def dynamic(
    model: onnx.ModelProto, kinds: Sequence[str], *, signed: bool, exclude: Sequence[str] = ()
) -> onnx.ModelProto:
    """ONNX Runtime's dynamic quantiser on nodes of these kinds (MatMul, Conv, LSTM)."""
    with quiet(), tempfile.TemporaryDirectory() as folder:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        path = Path(folder) / "dynamic.onnx"
        quantize_dynamic(
            copy_of(model),
            path,
            op_types_to_quantize=list(kinds),
            per_channel=True,
            weight_type=QuantType.QInt8 if signed else QuantType.QUInt8,
            nodes_to_exclude=list(exclude),
        )
        return onnx.load(path)


def quantise_int4(
    model: onnx.ModelProto, *, block_size: int = 32, symmetric: bool = True
) -> onnx.ModelProto:
    """4-bit weights, a scale for each block of inputs of an output channel (MatMulNBits).

    Gemm becomes MatMul and Add; Conv stays in floating point. Activations are float32.

    Parameters
    ----------
    model : ModelProto
        A float step or window model.
    block_size : int
        One of `BLOCK_SIZES`.
    symmetric : bool
        No zero points: codes -8 to 7 about 0.

    Returns
    -------
    ModelProto
        Opset `INT4_OPSET`; the same inputs, outputs and metadata.

    Raises
    ------
    InputError
        For another block size, or no dense product with a constant weight.
    """
    if block_size not in BLOCK_SIZES:
        raise InputError(
            "bad block size",
            where="block_size",
            expected="one of " + ", ".join(map(str, BLOCK_SIZES)),
            found=str(block_size),
        )
    start = at_opset(_float_start(model, ("MatMul",)), INT4_OPSET, INT4_OPSET)
    with quiet():
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantiser = MatMulNBitsQuantizer(start, block_size=block_size, is_symmetric=symmetric)
        quantiser.process()
    quantised = with_metadata_of(tidied(quantiser.model.model), model)
    onnx.checker.check_model(quantised, full_check=True)
    return quantised


def weights_to_fp16(model: onnx.ModelProto, layers: Sequence[str]) -> onnx.ModelProto:
    """Store the float32 constants of some nodes as float16, with a Cast behind each.

    This halves their bytes in the file. ONNX Runtime on x86 has no float16 arithmetic: it runs the
    Cast once, when the session opens, and computes in float32 from then on.

    Parameters
    ----------
    model : ModelProto
    layers : sequence of str
        Names of nodes with constant weights.

    Raises
    ------
    InputError
        For an unknown node, one without such constants, and values past float16.
    """
    check_node_names(model, layers)
    narrowed = tidied(model)
    wires = Wiring(narrowed)
    casts: list[onnx.NodeProto] = []
    made: dict[str, str] = {}
    for node in narrowed.graph.node:
        if node.name not in layers:
            continue
        weights = [
            (place, name)
            for place, name in enumerate(node.input)
            if name in wires.constants and wires.constants[name].dtype == np.float32
        ]
        if not weights:
            raise InputError(
                "a node without float32 weights",
                where=f"{model.graph.name or 'model'}: node {node.name} ({node.op_type})",
                fix="leave it out",
            )
        for place, name in weights:
            greatest = float(np.abs(wires.constants[name]).max(initial=0.0))
            if not greatest <= FLOAT16_MAX:
                raise InputError(
                    "a weight that float16 cannot hold",
                    where=f"{model.graph.name or 'model'}: node {node.name}, {name}",
                    expected=f"magnitudes up to {FLOAT16_MAX:g}",
                    found=f"{greatest:g}",
                    fix="leave this layer in float32",
                )
            if name not in made:
                half = wires.add_constant(f"{name}.fp16", wires.constants[name].astype(np.float16))
                made[name] = wires.unique(f"{name}.fp32")
                cast = onnx.helper.make_node(
                    "Cast", [half], [made[name]], name=f"{name}.cast", to=TensorProto.FLOAT
                )
                casts.append(cast)
            node.input[place] = made[name]
    replace_nodes(narrowed, [*casts, *narrowed.graph.node])
    narrowed = with_metadata_of(without_unused(narrowed), model)
    onnx.checker.check_model(narrowed, full_check=True)
    return narrowed
