"""The `fpga` backend: the circuit generated from the bundle, simulated or on a card.

=================  ================================================================================
``rtl-sim``        the generated SystemVerilog, simulated cycle by cycle in this process
``xrt:<card>``     the same circuit on an AMD Alveo card: `engine.backends.fpga.xrt_card`
``vollo:<card>``   a VOLLO accelerator: `engine.backends.fpga.vollo_card`
=================  ================================================================================
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, ClassVar, Final, Self

from engine.backends.graph_backend import GraphBackend, GraphDevice
from engine.backends.integer_graph import IntegerGraph
from engine.bundle import Bundle
from feeds.errors import InputError

SIMULATION: Final = "rtl-sim"
CARDS: Final = {
    "xrt": "engine.backends.fpga.xrt_card:XrtCard",
    "vollo": "engine.backends.fpga.vollo_card:VolloCard",
}


class FpgaBackend(GraphBackend):
    """A bundle as a circuit; see `engine.backends.interface.Backend`."""

    name: ClassVar[str] = "fpga"

    @classmethod
    def devices(cls) -> tuple[str, ...]:
        """Devices to try where none is named; cards by their first."""
        return (SIMULATION, *(f"{kind}:0" for kind in CARDS))

    @classmethod
    def open(
        cls, bundle: Bundle, device: str, *, threads: int = 1, precision: str = "int8"
    ) -> Self:
        """Open a bundle's model; see `Backend.open`.

        Of a card, its own class answers: what comes back has the methods of a `Backend`.
        """
        kind = device.partition(":")[0]
        if kind in CARDS and kind != device:
            module, _, name = CARDS[kind].partition(":")
            card: Any = getattr(import_module(module), name)
            return card.open(bundle, device, threads=threads, precision=precision)  # type: ignore[no-any-return]
        return super().open(bundle, device, threads=threads, precision=precision)

    @classmethod
    def open_device(cls, graph: IntegerGraph, device: str) -> GraphDevice:
        """The simulated circuit of a graph, or of a part of one; see `GraphBackend.open_device`."""
        if device != SIMULATION:
            raise InputError(
                "unknown device of the fpga backend",
                where="model.device",
                expected=", ".join([SIMULATION, *(f"{kind}:<card>" for kind in CARDS)]),
                found=repr(device),
            )
        from engine.backends.fpga.rtl import generate
        from engine.backends.fpga.simulation import RtlSimulation

        return RtlSimulation(generate(graph))
