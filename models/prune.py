"""Structured pruning: whole units go, so that what is left is a smaller dense network.

In each width that can shrink on its own (not one that a residual sum ties to another) the units
with the least norm are cut, with every weight into and out of them. Source: Li et al. (2017),
"Pruning Filters for Efficient ConvNets".
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np

from models.operations import Spec
from models.shapes import Label, describe


def importance(spec: Spec, parameters: Mapping[str, np.ndarray], width: str) -> np.ndarray:
    """Product of the norms of the weights into and out of each unit, float64 of shape (units,)."""
    anatomy = describe(spec)
    units = anatomy.prunable[width]
    into, out_of = np.zeros(units), np.zeros(units)
    for name, layer in anatomy.layers.items():
        squared = np.square(parameters[f"{name}.weight"].astype(np.float64))
        for total, labels, axis in ((into, layer.outputs, 1), (out_of, layer.inputs, 0)):
            sums = squared.sum(axis=axis)
            for label, value in zip(labels, sums, strict=True):
                if label[0] == width:
                    total[label[1]] += value
    return np.sqrt(into) * np.sqrt(out_of)


def pruned(
    spec: Spec, parameters: Mapping[str, np.ndarray], share: float
) -> tuple[Spec, dict[str, np.ndarray]]:
    """Cut a share of the units of every width that can shrink.

    Parameters
    ----------
    parameters : mapping of str to ndarray
        BatchNorm folded.
    share : float
        0 to 1; at least one unit stays.

    Returns
    -------
    spec : Spec
        With the widths that are left.
    parameters : dict of ndarray
    """
    assert 0.0 <= share < 1.0
    anatomy = describe(spec)
    kept: dict[str, set[int]] = {}
    for width, units in anatomy.prunable.items():
        stay = max(1, units - int(units * share))
        order = np.argsort(-importance(spec, parameters, width), kind="stable")
        kept[width] = set(order[:stay].tolist())

    def stays(labels: tuple[Label, ...]) -> list[int]:
        return [
            i for i, (name, unit) in enumerate(labels) if name not in kept or unit in kept[name]
        ]

    smaller = {}
    for name, layer in anatomy.layers.items():
        rows, columns = stays(layer.outputs), stays(layer.inputs)
        smaller[f"{name}.weight"] = parameters[f"{name}.weight"][np.ix_(rows, columns)].copy()
        if layer.bias:
            smaller[f"{name}.bias"] = parameters[f"{name}.bias"][rows].copy()
    widths = dict(spec.widths) | {width: len(units) for width, units in kept.items()}
    return msgspec.structs.replace(spec, widths=widths), smaller
