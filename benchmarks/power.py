"""Energy counters, where the machine has any: RAPL of the CPU package, NVML of a GPU.

Both count joules since some start, so that two readings give what was used between them, by
everything on that package or card.

Source: the kernel's ``Documentation/power/powercap/powercap.rst``; NVML API reference,
``nvmlDeviceGetTotalEnergyConsumption``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

NO_COUNTER: Final = "no counter"
ON_GPU: Final = ("cuda", "tensorrt")
UJ_PER_J: Final = 1e6
MJ_PER_J: Final = 1e3


class Power(msgspec.Struct, frozen=True):
    """Mean power of a contestant's blocks.

    Attributes
    ----------
    counter : str
        What counted, or `NO_COUNTER`.
    watts, uj_per_inference : float or None
    """

    counter: str
    watts: float | None = None
    uj_per_inference: float | None = None


@dataclass
class EnergyCounter:
    """A source of readings in joules.

    Attributes
    ----------
    name : str
    read : callable
        Joules, modulo ``wrap_j``.
    wrap_j : float
        Where it starts again from 0; infinite where it never does.
    """

    name: str
    read: Callable[[], float]
    wrap_j: float = float("inf")

    def used(self, before_j: float, after_j: float) -> float:
        """Joules between two readings, at most one wrap apart."""
        return after_j - before_j if after_j >= before_j else after_j - before_j + self.wrap_j


def counter_of(device: str, root: Path = Path("/")) -> EnergyCounter | None:
    """The counter that sees a device; None where there is none, or it may not be read."""
    kind, _, number = device.partition(":")
    if kind in ON_GPU:
        return nvml_counter(int(number) if number.isdecimal() else 0)
    return rapl_counter(root)


def rapl_counter(root: Path = Path("/")) -> EnergyCounter | None:
    """The first CPU package; reading it usually needs root."""
    folder = root / "sys/class/powercap/intel-rapl:0"
    path = folder / "energy_uj"
    try:
        int(path.read_text())
        wrap = int((folder / "max_energy_range_uj").read_text())
    except (OSError, ValueError):
        return None
    return EnergyCounter(
        "RAPL package 0", lambda: int(path.read_text()) / UJ_PER_J, wrap / UJ_PER_J
    )


def nvml_counter(number: int) -> EnergyCounter | None:
    """A GPU, through nvidia-ml-py where it is installed."""
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        card = nvml.nvmlDeviceGetHandleByIndex(number)
        nvml.nvmlDeviceGetTotalEnergyConsumption(card)
    except Exception:  # the package, the driver, the card or its counter is missing
        return None
    return EnergyCounter(
        f"NVML GPU {number}",
        lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(card) / MJ_PER_J,
    )


def power_of(
    counter: EnergyCounter | None, joules: float, seconds: float, inferences: int
) -> Power:
    """Mean power, and the energy of one inference."""
    if counter is None or not seconds or not inferences:
        return Power(NO_COUNTER)
    watts, each = joules / seconds, joules * UJ_PER_J / inferences
    return Power(counter.name, round(watts, 2), round(each, 2))
