"""Untrained networks of every architecture, quantised, for tests that need no training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from engine.manifest import StateTensor
from models.architectures import architecture
from models.execute import scores_of
from models.numerics import ObservingNumerics
from models.observers import make_observer
from models.operations import Spec
from models.quantised_graph import quantised_graph
from models.scheme import Kept, Rule, Scheme, make_scheme
from models.shapes import describe, fold_norms, initial_parameters
from models.step_graph import float_graph
from models.verify import hard_rows

ARCHS = ("linear", "mlp", "tcn", "lstm", "gru", "deeplob", "attention")
N_FEATURES = 96
N_CLASSES = 3
CLIP = 4.0


@dataclass(frozen=True)
class Twins:
    """A network and its graphs."""

    spec: Spec
    parameters: dict[str, np.ndarray]
    scheme: Scheme
    int8: onnx.ModelProto
    int8_state: tuple[StateTensor, ...]
    fp32: onnx.ModelProto
    fp32_state: tuple[StateTensor, ...]


def small_spec(arch: str) -> Spec:
    """The spec of an architecture as trained on the engine's features."""
    return Spec(arch, N_FEATURES, N_CLASSES, CLIP)


def random_parameters(spec: Spec, seed: int) -> dict[str, np.ndarray]:
    """Untrained weights whose BatchNorm has statistics of its own."""
    rng = np.random.default_rng(seed)
    parameters = initial_parameters(spec, seed)
    for name, array in parameters.items():
        if ".norm." in name:
            array[:] = rng.uniform(0.5, 1.5, array.shape)
        elif name.endswith(".bias"):
            array += rng.normal(scale=0.1, size=array.shape).astype(np.float32)
    return parameters


def twins(
    arch: str,
    *,
    seed: int = 0,
    rule: Rule = "power-of-two",
    kept: dict[str, Kept] | None = None,
    symmetric: bool = True,
    per_channel: bool = True,
) -> Twins:
    """Calibrated on normal rows, without training."""
    spec = small_spec(arch)
    parameters = fold_norms(spec, random_parameters(spec, seed))
    rng = np.random.default_rng(seed)
    rows = np.clip(rng.normal(size=(2, 200, N_FEATURES)), -CLIP, CLIP).astype(np.float32)
    observers = {name: make_observer("minmax", name) for name in describe(spec).points}
    scores_of(spec, parameters, rows, numerics=ObservingNumerics(observers))
    scheme = make_scheme(
        spec,
        parameters,
        lambda name: observers[name].range(),
        rule=rule,
        kept=kept,
        symmetric=symmetric,
        per_channel=per_channel,
    )
    int8, int8_state = quantised_graph(spec, parameters, scheme, {})
    fp32, fp32_state = float_graph(spec, parameters, {})
    return Twins(spec, parameters, scheme, int8, int8_state, fp32, fp32_state)


def rows_for(arch: str, n: int, seed: int = 1) -> np.ndarray:
    """Ordinary and hard rows, mixed, with what the architecture remembers in front."""
    context = architecture(small_spec(arch)).context
    return hard_rows(N_FEATURES, CLIP, n + context, seed)
