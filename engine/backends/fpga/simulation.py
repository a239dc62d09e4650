"""The device `rtl-sim`: the generated circuit, simulated cycle by cycle in this process.

The circuit has the state of one stream. Every stream has a simulated circuit of its own, made at
its first step, of some tens of kilobytes; the code is loaded once.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from engine.backends.fpga.rtl import Design
from engine.backends.fpga.verilator_build import PREFIX, build_library

MAX_CYCLES: Final = 1 << 20  # without an answer
HELD: Final = 1  # the value of HOLD: see `engine.backends.fpga.rtl_library`


def wrapper_text(design: Design) -> str:
    """C++ that drives a verilated design one cycle, or one inference, at a time."""
    return f"""\
#include <cstdint>
#include <cstring>
#include "verilated.h"
#include "{PREFIX}.h"

namespace {{

constexpr int CODES = {design.n_features};
constexpr int SCORES = {design.n_outputs};
constexpr int MAX_CYCLES = {MAX_CYCLES};

struct Circuit {{
    VerilatedContext context;
    {PREFIX} top{{&context}};
    bool fresh = true;

    void rise() {{
        top.clk = 1;
        top.eval();
    }}
    void fall() {{
        top.clk = 0;
        top.eval();
    }}
}};

void answer(const Circuit& circuit, int32_t* out, uint32_t* violations) {{
    std::memcpy(out, &circuit.top.out_data, sizeof(int32_t) * SCORES);
    *violations = circuit.top.out_violations;
}}

}}  // namespace

extern "C" {{

void* octick_create() {{
    auto* circuit = new Circuit;
    circuit->top.in_valid = 0;
    circuit->top.out_ready = 0;
    circuit->top.rst = 1;
    circuit->fall();
    circuit->rise();
    circuit->top.rst = 0;
    circuit->fall();
    return circuit;
}}

void octick_destroy(void* handle) {{
    auto* circuit = static_cast<Circuit*>(handle);
    circuit->top.final();
    delete circuit;
}}

void octick_reset(void* handle) {{
    static_cast<Circuit*>(handle)->fresh = true;
}}

// One clock cycle. The inputs stand until its edge; what is returned and written stood before it:
// bit 0 in_ready, bit 1 out_valid.
int octick_cycle(void* handle, int in_valid, int in_reset, const uint8_t* codes, int out_ready,
                 int rst, int32_t* out, uint32_t* violations) {{
    auto* circuit = static_cast<Circuit*>(handle);
    auto& top = circuit->top;
    top.in_valid = in_valid;
    top.in_reset = in_reset;
    std::memcpy(&top.in_data, codes, CODES);
    top.out_ready = out_ready;
    top.rst = rst;
    circuit->fall();
    const int seen = top.in_ready | top.out_valid << 1;
    answer(*circuit, out, violations);
    circuit->rise();
    top.rst = 0;
    return seen;
}}

// One inference: the cycles from the edge that takes the input to the one that takes the answer;
// -1 where none comes.
int octick_step(void* handle, const uint8_t* codes, int32_t* out, uint32_t* violations) {{
    auto* circuit = static_cast<Circuit*>(handle);
    auto& top = circuit->top;
    top.in_valid = 1;
    top.in_reset = circuit->fresh;
    std::memcpy(&top.in_data, codes, CODES);
    top.out_ready = 1;
    circuit->fall();
    for (int waited = 0; !top.in_ready; ++waited) {{
        if (waited == MAX_CYCLES) return -1;
        circuit->rise();
        circuit->fall();
    }}
    circuit->rise();
    top.in_valid = 0;
    circuit->fresh = false;
    for (int cycles = 1; cycles <= MAX_CYCLES; ++cycles) {{
        circuit->fall();
        if (top.out_valid) {{
            answer(*circuit, out, violations);
            circuit->rise();
            return cycles;
        }}
        circuit->rise();
    }}
    return -1;
}}

}}  // extern "C"
"""


class Edge(NamedTuple):
    """What stood at the outputs before a clock edge."""

    in_ready: bool
    out_valid: bool
    out: np.ndarray
    violations: int


class Library:
    """The functions of a design's shared library."""

    def __init__(self, path: Path) -> None:
        loaded = ctypes.CDLL(str(path))
        pointer, number = ctypes.c_void_p, ctypes.c_int
        self.create = loaded.octick_create
        self.create.restype, self.create.argtypes = pointer, ()
        self.destroy = loaded.octick_destroy
        self.destroy.restype, self.destroy.argtypes = None, (pointer,)
        self.reset = loaded.octick_reset
        self.reset.restype, self.reset.argtypes = None, (pointer,)
        self.cycle = loaded.octick_cycle
        self.cycle.restype = number
        self.cycle.argtypes = (pointer, number, number, pointer, number, number, pointer, pointer)
        self.step = loaded.octick_step
        self.step.restype, self.step.argtypes = number, (pointer,) * 4


class Circuit:
    """One simulated circuit, for those who look at single cycles.

    Parameters
    ----------
    library : Library
    design : Design
    """

    def __init__(self, library: Library, design: Design) -> None:
        self._library, self._design = library, design
        self.handle: int = library.create()
        self._destroy = weakref.finalize(self, library.destroy, self.handle)

    def cycle(
        self,
        codes: np.ndarray,
        *,
        in_valid: bool = False,
        in_reset: bool = False,
        out_ready: bool = False,
        reset: bool = False,
    ) -> Edge:
        """One clock cycle with these inputs: what the outputs were before its edge."""
        codes = np.ascontiguousarray(codes, dtype=np.uint8)
        assert codes.shape == (self._design.n_features,)
        out = np.zeros(self._design.n_outputs, dtype=np.int32)
        mask = np.zeros(1, dtype=np.uint32)
        seen = self._library.cycle(
            self.handle,
            in_valid,
            in_reset,
            codes.ctypes.data,
            out_ready,
            reset,
            out.ctypes.data,
            mask.ctypes.data,
        )
        return Edge(bool(seen & 1), bool(seen & 2), out, int(mask[0]))

    def close(self) -> None:
        """Free it."""
        self._destroy()


class RtlSimulation:
    """A design as a `engine.backends.graph_backend.GraphDevice`.

    Parameters
    ----------
    design : Design
    hold : int
        The design's parameter ``HOLD``.

    Attributes
    ----------
    cycles : int
        Of the last inference, as simulated.
    """

    def __init__(self, design: Design, hold: int = HELD) -> None:
        path, verilator = build_library(
            design.files, design.top, wrapper_text(design), {"HOLD": hold}
        )
        self.isa = f"rtl, {design.cycles} cycles"
        self.library = f"verilator {verilator.version}"
        self.cycles = 0
        self._design, self._code = design, Library(path)
        self._circuits: dict[int, Circuit] = {}
        self._mask = np.zeros(1, dtype=np.uint32)
        self._mask_at = self._mask.ctypes.data
        # Addresses of the arrays of the last step: asking numpy costs as much as the call.
        self._codes: np.ndarray | None = None
        self._out: np.ndarray | None = None
        self._codes_at = self._out_at = 0
        self._step: Callable[[int, int, int, int], int] = self._code.step

    def circuit(self) -> Circuit:
        """A circuit of one's own, just reset."""
        return Circuit(self._code, self._design)

    def step(self, stream: int, codes: np.ndarray, out: np.ndarray) -> int:
        """One inference; see `GraphDevice.step`."""
        found = self._circuits.get(stream)
        if found is None:
            found = self._circuits[stream] = self.circuit()
        if codes is not self._codes or out is not self._out:
            self._bind(codes, out)
        cycles = self._step(found.handle, self._codes_at, self._out_at, self._mask_at)
        if cycles != self._design.cycles:
            raise RuntimeError(
                f"the simulated circuit took {cycles} cycles, its design says {self._design.cycles}"
            )
        self.cycles = cycles
        return int(self._mask[0])

    def _bind(self, codes: np.ndarray, out: np.ndarray) -> None:
        for array, dtype, n in (
            (codes, np.uint8, self._design.n_features),
            (out, np.int32, self._design.n_outputs),
        ):
            assert array.dtype == dtype, f"{array.dtype}, not {np.dtype(dtype)}"
            assert array.shape == (n,), f"shape {array.shape}, not ({n},)"
            assert array.flags.c_contiguous, "strided"
        self._codes, self._out = codes, out
        self._codes_at, self._out_at = codes.ctypes.data, out.ctypes.data

    def reset(self, stream: int) -> None:
        """Start a stream afresh; see `GraphDevice.reset`."""
        found = self._circuits.get(stream)
        if found is not None:
            self._code.reset(found.handle)

    def close(self) -> None:
        """Free all circuits; see `GraphDevice.close`."""
        for circuit in self._circuits.values():
            circuit.close()
        self._circuits.clear()
