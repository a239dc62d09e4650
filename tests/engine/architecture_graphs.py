"""Quantised graphs of the architectures of `models`, with neither training nor calibration."""

from __future__ import annotations

import numpy as np

from engine.manifest import StateTensor
from models.quantised_graph import quantised_graph
from models.scheme import make_scheme
from models.shapes import describe, fold_norms
from tests.models.small_networks import random_parameters, small_spec


def quantised(
    arch: str, *, symmetric: bool = True, per_channel: bool = True
) -> tuple[bytes, list[StateTensor]]:
    """An architecture with weights and ranges drawn at random, and its state."""
    spec = small_spec(arch)
    parameters = fold_norms(spec, random_parameters(spec, 0))
    rng = np.random.default_rng(1)
    ranges = {name: rng.uniform(1.0, 5.0, 2) for name in describe(spec).points}
    scheme = make_scheme(
        spec,
        parameters,
        lambda name: (-ranges[name][0], ranges[name][1]),
        rule="power-of-two",
        symmetric=symmetric,
        per_channel=per_channel,
    )
    model, state = quantised_graph(spec, parameters, scheme, {})
    return model.SerializeToString(), list(state)
