"""A bundle of an untrained network: its cost and its bits are those of a trained one.

Weights are drawn, ranges calibrated on drawn rows, and the graphs, the proof of exactness and the
value check made by the very code that makes a trained bundle. Its scores mean nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from engine.features import N_FEATURES

if TYPE_CHECKING:
    from models.operations import Spec

CLIP: Final = 4.0
STREAMS: Final = 2  # of calibration
ROWS: Final = 160  # of each: past the memory of every architecture
INPUT_BOUND: Final = 10_000.0
CALIBRATION_SD: Final = 1.0


def draw_network(
    arch: str, seed: int = 0, widths: Mapping[str, int] | None = None
) -> tuple[Spec, dict[str, np.ndarray]]:
    """A network and drawn weights for it, BatchNorm folded: the same seed gives the same ones.

    Parameters
    ----------
    arch : str
        A key of `models.architectures.ARCHITECTURES`.
    seed : int
    widths : mapping of str to int, optional
        Of layers that are to have another width than the architecture's.

    Raises
    ------
    InputError
        If there is no such architecture.
    """
    from models.labels import CLASSES
    from models.operations import Spec
    from models.shapes import fold_norms

    spec = Spec(arch, N_FEATURES, len(CLASSES), CLIP, dict(widths or {}))
    return spec, fold_norms(spec, _drawn(spec, seed))


def make_untrained(
    arch: str, folder: Path, seed: int = 0, widths: Mapping[str, int] | None = None
) -> Path:
    """Write a bundle of an architecture with drawn weights, exact-int8, its value check included.

    Parameters
    ----------
    arch : str
        A key of `models.architectures.ARCHITECTURES`.
    folder : Path
        The bundle's.
    seed : int
        Of weights and calibration rows: the same seed gives the same bundle.
    widths : mapping of str to int, optional
        See `draw_network`.

    Raises
    ------
    InputError
        If there is no such architecture, or the models extra is not installed.
    """
    from models.extra import need_models_extra

    need_models_extra("an untrained network")

    from engine.backends.exactness import prove_exact
    from engine.manifest import VIOLATIONS, CheckSection, StateSection
    from models.check_limits import saturation_limits
    from models.dataset import Normalisation
    from models.execute import scores_of
    from models.export import write_bundle
    from models.labels import CLASSES
    from models.numerics import ObservingNumerics
    from models.observers import make_observer
    from models.quantised_graph import quantised_graph
    from models.scheme import make_scheme
    from models.shapes import describe
    from models.step_graph import float_graph
    from models.value_checks import with_checks

    spec, parameters = draw_network(arch, seed, widths)
    anatomy = describe(spec)
    rng = np.random.default_rng(seed)
    drawn = rng.normal(scale=CALIBRATION_SD, size=(STREAMS, ROWS, N_FEATURES))
    rows = np.clip(drawn, -CLIP, CLIP).astype(np.float32)
    observers = {name: make_observer("minmax", name) for name in anatomy.points}
    scores_of(spec, parameters, rows, numerics=ObservingNumerics(observers))
    scheme = make_scheme(
        spec, parameters, lambda name: observers[name].range(), rule="power-of-two"
    )
    int8, int8_state = quantised_graph(spec, parameters, scheme, {})
    fp32, fp32_state = float_graph(spec, parameters, {})
    prove_exact(int8, int8_state, arch)
    layers = [item for item, _ in saturation_limits(int8, int8_state, iter(rows))]
    write_bundle(
        folder,
        f"{arch}-untrained",
        with_checks(int8, CLIP, layers, quantised=True),
        with_checks(fp32, CLIP, quantised=False),
        numerics="exact-int8",
        normalisation=Normalisation(np.zeros(N_FEATURES), np.ones(N_FEATURES), CLIP),
        classes=CLASSES,
        state=StateSection(int8=int8_state, fp32=fp32_state),
        checks=CheckSection(
            output=VIOLATIONS,
            int8=tuple(item.layer.name for item in layers if not item.layer.scores),
            input_bound=(INPUT_BOUND,) * N_FEATURES,
            max_constant=(0,) * N_FEATURES,
        ),
        training={"architecture": arch, "epochs": 0, "seed": seed},
    )
    return folder


def _drawn(spec: Spec, seed: int) -> dict[str, np.ndarray]:
    """Fresh weights whose biases and BatchNorm statistics are drawn too: none of them is 0."""
    from models.shapes import initial_parameters

    rng = np.random.default_rng(seed)
    parameters = initial_parameters(spec, seed)
    for name, array in parameters.items():
        if ".norm." in name:
            array[:] = rng.uniform(0.5, 1.5, array.shape)
        elif name.endswith(".bias"):
            array += rng.normal(scale=0.1, size=array.shape).astype(np.float32)
    return parameters
