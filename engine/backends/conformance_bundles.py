"""Small bundles for the conformance suite, written anew each time: no training, no download.

They have what the reference bundle has not: delays read by step, by row and twice, an LSTM cell, a
GRU cell. They have no value check.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from engine import features
from engine.backends.small_graphs import CLIP, GraphBuilder, convolution, gru_graph, lstm_graph
from engine.manifest import (
    FORMAT_VERSION,
    FP32_NAME,
    INT8_NAME,
    MANIFEST_NAME,
    METADATA_KEY,
    InputSection,
    Manifest,
    OutputSection,
    StateSection,
    model_hash,
)
from feeds.errors import InputError

CLASSES: Final = ("down", "flat", "up")
GRAPHS: Final[dict[str, Callable[[np.random.Generator, int, int], GraphBuilder]]] = {
    "convolution": convolution,
    "lstm": lstm_graph,
    "gru": gru_graph,
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


def write_small_bundle(folder: Path, name: str, seed: int = 0) -> Path:
    """Write one of `GRAPHS`.

    Parameters
    ----------
    folder : Path
        The bundle's; made where it is missing.
    name : str
    seed : int
        Of weights and tables: the same seed gives the same bundle.

    Returns
    -------
    Path
        ``folder``.

    Raises
    ------
    InputError
        If there is none of that name.
    """
    if name not in GRAPHS:
        raise InputError(
            "no such small bundle",
            where="--bundle",
            expected="one of " + ", ".join(GRAPHS),
            found=repr(name),
        )
    n, classes = features.N_FEATURES, len(CLASSES)
    rng = np.random.default_rng(seed)
    int8 = GRAPHS[name](rng, n, classes)
    fp32 = float_twin(rng, n, classes, stateful=True)
    folder.mkdir(parents=True, exist_ok=True)
    digests = []
    for file, graph in ((INT8_NAME, int8), (FP32_NAME, fp32)):
        data = graph.model({METADATA_KEY: features.SCHEMA_HEX})
        (folder / file).write_bytes(data)
        digests.append(hashlib.sha256(data).hexdigest())
    manifest = Manifest(
        format=FORMAT_VERSION,
        name=name,
        numerics="exact-int8",
        feature_schema=features.SCHEMA_HEX,
        input=InputSection(name="x", mean=(0.0,) * n, inv_scale=(1.0,) * n, clip=CLIP),
        output=OutputSection(name="logits", classes=CLASSES),
        state=StateSection(int8=tuple(int8.state), fp32=tuple(fp32.state)),
        int8_sha256=digests[0],
        fp32_sha256=digests[1],
        model_hash="",
    )
    manifest = msgspec.structs.replace(manifest, model_hash=f"{model_hash(manifest):016x}")
    (folder / MANIFEST_NAME).write_bytes(msgspec.json.encode(manifest))
    return folder
