"""A bundle of an untrained network, for tests that need one and no training."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np

from engine import features
from engine.bundle import Manifest
from models.export import float_model, int8_model, write_bundle
from models.labels import CLASSES
from models.quantize import IntegerNetwork, quantise

CLIP = 4.0
HIDDEN = (16, 8)


def make_bundle(
    folder: Path,
    *,
    seed: int = 0,
    classes: tuple[str, ...] = CLASSES,
    n_features: int = features.N_FEATURES,
    manifest_schema: str = features.SCHEMA_HEX,
    int8_schema: str | None = None,
    fp32_schema: str | None = None,
) -> tuple[IntegerNetwork, Manifest]:
    """Write a bundle whose every part can be made for other features than this engine's."""
    rng = np.random.default_rng(seed)
    sizes = (n_features, *HIDDEN, len(classes))
    weights = [
        (rng.normal(size=(b, a)) * 1.4 / np.sqrt(a)).astype(np.float32) for a, b in pairwise(sizes)
    ]
    biases = [(rng.normal(size=b) * 0.1).astype(np.float32) for b in sizes[1:]]
    batch = np.clip(rng.normal(size=(1_000, n_features)), -CLIP, CLIP).astype(np.float32)
    network = quantise(weights, biases, [batch], CLIP)
    manifest = write_bundle(
        folder,
        "small",
        int8_model(network, int8_schema or manifest_schema),
        float_model(weights, biases, fp32_schema or manifest_schema),
        numerics="exact-int8",
        mean=rng.normal(size=n_features),
        inv_scale=rng.uniform(0.5, 2.0, n_features),
        clip=CLIP,
        classes=classes,
        schema_hex=manifest_schema,
    )
    return network, manifest
