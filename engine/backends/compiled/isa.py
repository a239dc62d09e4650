"""The instruction sets that a step can be compiled for, and which of them this CPU has.

=========  =====================================================  ====================
`vnni`     ``vpdpbusd`` on 512 bits: 64 products an instruction   AVX-512 VNNI
`avxvnni`  ``vpdpbusd`` on 256 bits: 32 products                  AVX-VNNI, or AVX-512
`avx2`     ``vpmaddwd`` on 16-bit operands: 16 products           AVX2
`plain`    vectors of the compiler's own choice                   any CPU
=========  =====================================================  ====================

All give the same bits: sums of products in int32, which none of them saturates.
(``vpmaddubsw``, which does, is not used.)

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Final

from feeds.cpu import cpu_features
from feeds.errors import InputError

DEVICE: Final = "cpu"


@dataclass(frozen=True)
class Isa:
    """How products are computed.

    Attributes
    ----------
    name : str
    lanes : int
        Accumulators of a vector.
    group : int
        Inputs that an instruction multiplies and adds up in each lane.
    needs : tuple of tuple of str
        CPU features, as LLVM names them: all of any one of these.
    """

    name: str
    lanes: int
    group: int
    needs: tuple[tuple[str, ...], ...]


ISAS: Final = (
    Isa("vnni", 16, 4, (("avx512vnni", "avx512vl", "avx512bw"),)),
    Isa("avxvnni", 8, 4, (("avxvnni", "avx2"), ("avx512vnni", "avx512vl"))),
    Isa("avx2", 8, 2, (("avx2",),)),
    Isa("plain", 8, 1, ((),)),
)


def available_isas() -> tuple[Isa, ...]:
    """Those that this CPU has, fastest first."""
    present = cpu_features()
    return tuple(isa for isa in ISAS if any(present.issuperset(names) for names in isa.needs))


def choose_isa(device: str) -> Isa:
    """The instruction set of a device name: ``cpu`` for the fastest, or ``cpu:NAME``.

    Raises
    ------
    InputError
        If there is no such device, or this CPU lacks its instructions.
    """
    base, _, name = device.partition(":")
    known = [DEVICE, *(f"{DEVICE}:{isa.name}" for isa in ISAS)]
    present = available_isas()
    if device == DEVICE:
        return present[0]
    found = next((isa for isa in ISAS if base == DEVICE and isa.name == name), None)
    if found is None:
        nearest = difflib.get_close_matches(device, known, n=1)
        raise InputError(
            "unknown device of the compiled backend",
            where="model.device",
            expected="one of " + ", ".join(known),
            found=repr(device),
            fix=f"did you mean {nearest[0]}?" if nearest else "use cpu",
        )
    if found not in present:
        raise InputError(
            f"this CPU cannot run {device}",
            where="model.device",
            expected=" or ".join(", ".join(names) for names in found.needs),
            found=", ".join(isa.name for isa in present),
            fix="use cpu, which takes the fastest that is there",
        )
    return found
