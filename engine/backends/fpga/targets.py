"""The devices that designs are built for, what they hold, and where those numbers come from.

Sources: Lattice, *ECP5 and ECP5-5G Family Data Sheet* FPGA-DS-02012, table 1.1 (LFE5U-85: 84 K
LUTs, 208 sysMEM blocks of 18 Kbit, 156 multipliers of 18x18; its exact count of LUTs and registers
is that of Project Trellis' database, as ``nextpnr-ecp5`` prints it). AMD, *UltraScale Architecture
and Product Data Sheet: Overview* DS890, table of Virtex UltraScale+ devices (XCVU9P).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

RESOURCES: Final = ("LUT", "FF", "DSP", "BRAM")


@dataclass(frozen=True)
class Target:
    """A device, and how far the open tools carry a design on it.

    Attributes
    ----------
    name : str
        As on the command line.
    device, package : str
        The part; no package where nothing is placed.
    speed_grades : tuple of int
        That the part is sold in, the slowest first; empty where nothing is timed.
    capacity : mapping of str to int
        Of each of `RESOURCES`.
    units : mapping of str to str
        What one of each is called in the vendor's documents.
    cells : mapping of str to (str, int)
        What a cell of a synthesised netlist takes: a resource, and how many of it. Cells that are
        not named take nothing that is counted: wide multiplexers, for example, are part of a slice.
    estimate : bool
        Whether the figures are synthesis alone: nothing is placed, routed or timed.
    source : str
        Where the capacity stands.
    """

    name: str
    device: str
    package: str
    speed_grades: tuple[int, ...]
    capacity: Mapping[str, int]
    units: Mapping[str, str]
    cells: Mapping[str, tuple[str, int]]
    estimate: bool
    source: str


# A CCU2C is two LUT4 with their carry; a 16x4 RAM takes four LUT4 and the two that drive its
# write port (FPGA-DS-02012, "Slice" and "RAM mode").
_ECP5_CELLS: Final = {
    "LUT4": ("LUT", 1),
    "CCU2C": ("LUT", 2),
    "TRELLIS_DPR16X4": ("LUT", 6),
    "DPR16X4C": ("LUT", 6),
    "TRELLIS_FF": ("FF", 1),
    "MULT18X18D": ("DSP", 1),
    "DP16KD": ("BRAM", 1),
    "PDPW16KD": ("BRAM", 1),
}

# UG574: a LUT is a 64-bit RAM or a 32-bit shift register; a CARRY8 uses the LUTs of its slice,
# which are counted as such. UG573: a RAMB18E2 is half a block.
_ULTRASCALE_CELLS: Final = {
    **{f"LUT{inputs}": ("LUT", 1) for inputs in range(1, 7)},
    "INV": ("LUT", 1),
    "SRL16E": ("LUT", 1),
    "SRLC32E": ("LUT", 1),
    "RAM32X1S": ("LUT", 1),
    "RAM64X1S": ("LUT", 1),
    "RAM32X1D": ("LUT", 2),
    "RAM64X1D": ("LUT", 2),
    "RAM128X1S": ("LUT", 2),
    "RAM128X1D": ("LUT", 4),
    "RAM256X1S": ("LUT", 4),
    "RAM512X1S": ("LUT", 8),
    "RAM32M": ("LUT", 4),
    "RAM64M": ("LUT", 4),
    "RAM32M16": ("LUT", 8),
    "RAM64M8": ("LUT", 8),
    "RAM256X1D": ("LUT", 8),
    **{f"FD{kind}E": ("FF", 1) for kind in "RSCP"},
    "DSP48E2": ("DSP", 1),
    "RAMB36E2": ("BRAM", 2),
    "RAMB18E2": ("BRAM", 1),
}

ECP5_85K: Final = Target(
    name="ecp5-85k",
    device="LFE5U-85F",
    package="CABGA381",
    speed_grades=(6, 7, 8),
    capacity=MappingProxyType({"LUT": 83_640, "FF": 83_640, "DSP": 156, "BRAM": 208}),
    units=MappingProxyType(
        {"LUT": "LUT4", "FF": "register", "DSP": "MULT18X18D", "BRAM": "sysMEM block of 18 Kbit"}
    ),
    cells=MappingProxyType(_ECP5_CELLS),
    estimate=False,
    source="Lattice FPGA-DS-02012, table 1.1; LUTs and registers as nextpnr-ecp5 counts them",
)

ULTRASCALE_PLUS: Final = Target(
    name="ultrascale+",
    device="XCVU9P",
    package="",
    speed_grades=(),
    capacity=MappingProxyType({"LUT": 1_182_240, "FF": 2_364_480, "DSP": 6_840, "BRAM": 4_320}),
    units=MappingProxyType(
        {"LUT": "LUT6", "FF": "register", "DSP": "DSP48E2", "BRAM": "half block of 18 Kbit"}
    ),
    cells=MappingProxyType(_ULTRASCALE_CELLS),
    estimate=True,
    source="AMD DS890, table of Virtex UltraScale+ devices",
)

TARGETS: Final = MappingProxyType({target.name: target for target in (ECP5_85K, ULTRASCALE_PLUS)})
