"""Writing a bundle: both ONNX graphs, built node by node, and the manifest.

The graphs are built directly rather than traced: a dense network needs a handful of nodes, and the
same weights then give the same bytes under every version of the training framework.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engine import features
from engine.bundle import (
    FORMAT_VERSION,
    FP32_NAME,
    INT8_NAME,
    MANIFEST_NAME,
    METADATA_KEY,
    InputSection,
    Manifest,
    Numerics,
    OutputSection,
    model_hash,
)
from models.quantize import IntegerNetwork

OPSET: Final = 19
IR_VERSION: Final = 10
INPUT_NAME: Final = "x"
OUTPUT_NAME: Final = "logits"
PRODUCER: Final = "octick"


def _tensor(name: str, values: Any, dtype: Any) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(values, dtype=dtype), name)


def _model(
    name: str,
    nodes: list[onnx.NodeProto],
    initializers: list[onnx.TensorProto],
    n_inputs: int,
    n_outputs: int,
    schema_hex: str,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info(INPUT_NAME, TensorProto.FLOAT, [1, n_inputs])],
        [helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, [1, n_outputs])],
        initializers,
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name=PRODUCER,
    )
    helper.set_model_props(model, {METADATA_KEY: schema_hex})
    onnx.checker.check_model(model, full_check=True)
    return model


def float_model(
    weights: list[np.ndarray], biases: list[np.ndarray], schema_hex: str = features.SCHEMA_HEX
) -> onnx.ModelProto:
    """The float network: Gemm and Relu, a last Gemm without.

    Parameters
    ----------
    weights, biases : list of ndarray of float32
        Of each layer, shapes (out, in) and (out,).
    schema_hex : str
        Feature schema that goes into the metadata.
    """
    nodes, initializers, current = [], [], INPUT_NAME
    last = len(weights) - 1
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        initializers += [
            _tensor(f"dense{i}.weight", weight, np.float32),
            _tensor(f"dense{i}.bias", bias, np.float32),
        ]
        output = OUTPUT_NAME if i == last else f"dense{i}.out"
        nodes.append(
            helper.make_node(
                "Gemm",
                [current, f"dense{i}.weight", f"dense{i}.bias"],
                [output],
                name=f"dense{i}",
                transB=1,
            )
        )
        if i < last:
            nodes.append(helper.make_node("Relu", [output], [f"relu{i}.out"], name=f"relu{i}"))
            current = f"relu{i}.out"
    return _model(
        "float", nodes, initializers, weights[0].shape[1], weights[-1].shape[0], schema_hex
    )


def int8_model(network: IntegerNetwork, schema_hex: str = features.SCHEMA_HEX) -> onnx.ModelProto:
    """The quantised network in QDQ form.

    Each layer is DequantizeLinear of uint8 activations, int8 weights and int32 bias, Gemm,
    QuantizeLinear: the pattern that ONNX Runtime fuses into one QGemm. A hidden zero point of 0
    makes saturation the ReLU. The last accumulators leave as float32, exact multiples of a power
    of two.
    """
    nodes: list[onnx.NodeProto] = []
    initializers: list[onnx.TensorProto] = []
    first = network.layers[0]
    initializers += [
        _tensor("input.scale", np.ldexp(1.0, first.in_exponent), np.float32),
        _tensor("input.zero_point", first.in_zero_point, np.uint8),
    ]
    nodes.append(
        helper.make_node(
            "QuantizeLinear",
            [INPUT_NAME, "input.scale", "input.zero_point"],
            ["input.q"],
            name="input.quantize",
        )
    )
    current = "input"
    for i, layer in enumerate(network.layers):
        name = f"dense{i}"
        scale = np.ldexp(1.0, layer.weight_exponent)
        channels = len(layer.bias)
        initializers += [
            _tensor(f"{name}.weight.q", layer.weight, np.int8),
            _tensor(f"{name}.weight.scale", scale, np.float32),
            _tensor(f"{name}.weight.zero_point", np.zeros(channels), np.int8),
            _tensor(f"{name}.bias.q", layer.bias, np.int32),
            _tensor(f"{name}.bias.scale", np.ldexp(scale, layer.in_exponent), np.float32),
            _tensor(f"{name}.bias.zero_point", np.zeros(channels), np.int32),
        ]
        nodes.append(
            helper.make_node(
                "DequantizeLinear",
                [f"{current}.q", f"{current}.scale", f"{current}.zero_point"],
                [f"{current}.dq"],
                name=f"{current}.dequantize",
            )
        )
        nodes.extend(
            helper.make_node(
                "DequantizeLinear",
                [f"{name}.{what}.q", f"{name}.{what}.scale", f"{name}.{what}.zero_point"],
                [f"{name}.{what}.dq"],
                name=f"{name}.{what}.dequantize",
                axis=0,
            )
            for what in ("weight", "bias")
        )
        output = OUTPUT_NAME if layer.out_exponent is None else f"{name}.out"
        nodes.append(
            helper.make_node(
                "Gemm",
                [f"{current}.dq", f"{name}.weight.dq", f"{name}.bias.dq"],
                [output],
                name=name,
                transB=1,
            )
        )
        if layer.out_exponent is not None:
            current = f"{name}.out"
            initializers += [
                _tensor(f"{current}.scale", np.ldexp(1.0, layer.out_exponent), np.float32),
                _tensor(f"{current}.zero_point", 0, np.uint8),
            ]
            nodes.append(
                helper.make_node(
                    "QuantizeLinear",
                    [output, f"{current}.scale", f"{current}.zero_point"],
                    [f"{current}.q"],
                    name=f"{current}.quantize",
                )
            )
    return _model(
        "int8",
        nodes,
        initializers,
        first.weight.shape[1],
        len(network.layers[-1].bias),
        schema_hex,
    )


def write_bundle(
    folder: Path,
    name: str,
    int8: onnx.ModelProto,
    fp32: onnx.ModelProto,
    *,
    numerics: Numerics,
    mean: np.ndarray,
    inv_scale: np.ndarray,
    clip: float,
    classes: tuple[str, ...],
    training: dict[str, Any] | None = None,
    schema_hex: str = features.SCHEMA_HEX,
) -> Manifest:
    """Write the three files of a bundle; the same models and numbers give the same bytes.

    Parameters
    ----------
    folder : Path
        Made where it does not exist; the three files in it are replaced.
    mean, inv_scale : ndarray of float64, shape (features,)
    training : dict, optional
        How the model was made and measured; takes no part in the model hash.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digests = []
    for file_name, model in ((INT8_NAME, int8), (FP32_NAME, fp32)):
        data = model.SerializeToString(deterministic=True)
        (folder / file_name).write_bytes(data)
        digests.append(hashlib.sha256(data).hexdigest())
    return write_manifest(
        folder,
        Manifest(
            format=FORMAT_VERSION,
            name=name,
            numerics=numerics,
            feature_schema=schema_hex,
            input=InputSection(
                name=INPUT_NAME,
                mean=tuple(float(value) for value in mean),
                inv_scale=tuple(float(value) for value in inv_scale),
                clip=clip,
            ),
            output=OutputSection(name=OUTPUT_NAME, classes=classes),
            int8_sha256=digests[0],
            fp32_sha256=digests[1],
            model_hash="",
            training=training or {},
        ),
    )


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write ``manifest.json`` with its hash filled in; returns the manifest as written."""
    manifest = msgspec.structs.replace(manifest, model_hash=f"{model_hash(manifest):016x}")
    data = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    (folder / MANIFEST_NAME).write_bytes(data + b"\n")
    return manifest
