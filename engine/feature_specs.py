"""The schema of the feature vector: its specs in order, its names, its hash.

The order of `SPECS` is the order that `engine.features.compute` writes; what the entries say stands
in `engine.feature_catalogue` and `engine.feature_measures`.
"""

from __future__ import annotations

import hashlib
import json
from typing import Final

from engine.feature_catalogue import FeatureSpec, block, flows, prices, shape
from engine.feature_measures import magnitudes, ratios

SCHEMA_VERSION: Final = 1
"""To be raised whenever a kernel gives other values than before under an unchanged catalogue."""

SPECS: Final[tuple[FeatureSpec, ...]] = tuple(
    block() + prices() + flows() + shape() + magnitudes() + ratios()
)
NAMES: Final[tuple[str, ...]] = tuple(spec.name for spec in SPECS)
N_FEATURES: Final = 96

assert len(SPECS) == N_FEATURES
assert len(set(NAMES)) == N_FEATURES


def schema_hex(specs: tuple[FeatureSpec, ...], version: int) -> str:
    """SHA-256, in hex, of the catalogue: canonical JSON of all but the sources, and a version.

    Parameters
    ----------
    specs : tuple of FeatureSpec
        In the order of the vector.
    version : int
        `SCHEMA_VERSION`.
    """
    catalogue = {
        "version": version,
        "features": [
            [spec.name, spec.formula, spec.unit, list(spec.warmup), spec.symmetry] for spec in specs
        ],
    }
    text = json.dumps(catalogue, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


SCHEMA_HEX: Final = schema_hex(SPECS, SCHEMA_VERSION)
SCHEMA_HASH: Final = int.from_bytes(bytes.fromhex(SCHEMA_HEX)[:8], "little")
