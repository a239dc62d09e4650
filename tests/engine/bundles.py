"""Bundles of the graphs in `tests.engine.integer_graphs`, with a float twin: no training needed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx

from engine import features
from engine.backends.integer_reference import IntegerReference
from engine.backends.small_graphs import convolution, gru_graph, lstm_graph, two_cells
from engine.manifest import (
    FORMAT_VERSION,
    FP32_NAME,
    INT8_NAME,
    MANIFEST_NAME,
    METADATA_KEY,
    VIOLATIONS,
    CheckSection,
    InputSection,
    Manifest,
    OutputSection,
    StateSection,
    model_hash,
)
from tests.engine.integer_graphs import CLIP, GraphBuilder, delays_and_cells, dense

CLASSES = ("down", "flat", "up")
GRAPHS: dict[str, Callable[[np.random.Generator, int, int], GraphBuilder]] = {
    "dense": dense,
    "convolution": convolution,
    "lstm": lstm_graph,
    "gru": gru_graph,
    "two cells": two_cells,
    "delays and cells": delays_and_cells,  # has no integer graph
}


def float_twin(
    rng: np.random.Generator, n_features: int, n_classes: int, stateful: bool
) -> GraphBuilder:
    """One product, and where asked a leaky sum of it that stays from step to step."""
    g = GraphBuilder(n_features, n_classes)
    weight = g.constant(rng.normal(size=(n_classes, n_features)) / 8.0)
    bias = g.constant(rng.normal(size=n_classes))
    out = "" if stateful else "logits"
    sums = g.node("Gemm", ["x", weight, bias], "float.head", out, transB=1)
    if stateful:
        last = g.remember("level", "float32", (1, n_classes), 0.5)
        kept = g.node("Mul", [last, g.constant(0.75)])
        level = g.node("Add", [kept, sums], out="level.next")
        g.node("Mul", [level, g.constant(0.3)], out="logits")
    return g


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest with its own hash."""
    manifest = msgspec.structs.replace(manifest, model_hash=f"{model_hash(manifest):016x}")
    (folder / MANIFEST_NAME).write_bytes(msgspec.json.encode(manifest))
    return manifest


def checked(data: bytes, precision: str, limit: int = 0) -> tuple[bytes, tuple[str, ...]]:
    """A graph with its value check, to which more saturated codes are too many; its layers."""
    from models.value_checks import LimitedLayer, quantised_layers, with_checks

    model = onnx.load_model_from_string(data)
    inferred = onnx.shape_inference.infer_shapes(model).graph
    shapes = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*inferred.value_info, *inferred.output)
    }
    layers = []
    if precision == "int8":
        for layer in quantised_layers(model):
            layers.append(LimitedLayer(layer, shapes[layer.codes], limit))
    found = with_checks(model, CLIP, layers, quantised=precision == "int8")
    return found.SerializeToString(), tuple(item.layer.name for item in layers)


def write_models(
    folder: Path,
    int8: GraphBuilder,
    fp32: GraphBuilder,
    *,
    checks: bool = False,
    int8_schema: str = features.SCHEMA_HEX,
    fp32_schema: str = features.SCHEMA_HEX,
) -> Manifest:
    """Write a bundle of two graphs."""
    folder.mkdir(parents=True, exist_ok=True)
    digests, layers = [], {}
    for name, graph, schema in ((INT8_NAME, int8, int8_schema), (FP32_NAME, fp32, fp32_schema)):
        data = graph.model({METADATA_KEY: schema})
        if checks:
            data, layers[name] = checked(data, "int8" if name == INT8_NAME else "fp32")
        (folder / name).write_bytes(data)
        digests.append(hashlib.sha256(data).hexdigest())
    rng = np.random.default_rng(len(int8.nodes))
    n = features.N_FEATURES
    return write_manifest(
        folder,
        Manifest(
            format=FORMAT_VERSION,
            name="small",
            numerics="exact-int8",
            feature_schema=features.SCHEMA_HEX,
            input=InputSection(
                name="x",
                mean=tuple(rng.normal(size=n).tolist()),
                inv_scale=tuple(rng.uniform(0.5, 2.0, n).tolist()),
                clip=CLIP,
            ),
            output=OutputSection(name="logits", classes=CLASSES[: int8.n_classes]),
            state=StateSection(int8=tuple(int8.state), fp32=tuple(fp32.state)),
            checks=CheckSection(
                output=VIOLATIONS,
                int8=layers[INT8_NAME],
                input_bound=tuple(np.linspace(10.0, 100.0, n).tolist()),
                max_constant=tuple(range(n)),
            )
            if checks
            else None,
            int8_sha256=digests[0],
            fp32_sha256=digests[1],
            model_hash="",
        ),
    )


def make_bundle(
    folder: Path,
    *,
    graph: str = "",
    stateful: bool = False,
    seed: int = 0,
    n_classes: int = len(CLASSES),
    n_features: int = features.N_FEATURES,
    checks: bool = False,
    **schemas: str,
) -> tuple[IntegerReference, Manifest]:
    """Write a bundle; returns the reference of its INT8 model, and its manifest.

    ``graph`` is one of `GRAPHS`; without it, ``stateful`` chooses between two of them.
    """
    rng = np.random.default_rng(seed)
    name = graph or ("delays and cells" if stateful else "dense")
    int8 = GRAPHS[name](rng, n_features, n_classes)
    fp32 = float_twin(rng, n_features, n_classes, bool(int8.state))
    manifest = write_models(folder, int8, fp32, checks=checks, **schemas)
    return IntegerReference(folder / INT8_NAME, manifest.state.int8), manifest
