"""The synthesised netlist held against the RTL that it was made from: both simulated, in lockstep.

The netlist's cells are simulated by models that are not ours (Yosys' ``cells_sim.v``), and the
multiplier and memory blocks by `engine.backends.fpga.ecp5_cells`. What is compared is every cycle:
when an input is taken, when an answer is there, and its bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from engine.backends.fpga.ecp5_cells import LINT_OFF, MODELS
from engine.backends.fpga.rtl import Design
from engine.backends.fpga.simulation import Circuit, Edge, Library, wrapper_text
from engine.backends.fpga.synthesis import BUILT_HOLD, HOLD, NETLIST_VERILOG, Synthesis
from engine.backends.fpga.toolchain import Tool, yosys_data
from engine.backends.fpga.verilator_build import FOR_BUILD_TIME, Progress, build_library
from engine.backends.integer_graph import CODE_MAX
from feeds.errors import InputError

VALID_SHARE: Final = 0.75  # of cycles in which an input is offered
READY_SHARE: Final = 0.5  # of cycles in which an answer would be taken
RESET_SHARE: Final = 0.1  # of inputs that begin a state afresh
EXTREMES_EVERY: Final = 4
MAX_WAITS: Final = 8  # times the cycles of a design, for an answer
MAX_INCLUDES: Final = 3  # of files within files


class Compared(NamedTuple):
    """How much was compared, and what was found.

    Attributes
    ----------
    vectors : int
        Inputs that were to be answered.
    cycles : int
        In which both ran in step.
    differing : int
        Vectors whose answers differ. Where one takes an input or answers in a cycle in which the
        other does not, that ends the comparison, and all that were not answered until then count.
    first : str
        The first cycle that differs, and how; empty where none does.
    """

    vectors: int
    cycles: int
    differing: int
    first: str


def netlist_files(synthesis: Synthesis, yosys: Tool) -> dict[str, str]:
    """The netlist as Verilog with models of its cells, ready for Verilator.

    Returns
    -------
    dict of str to str
        Verilog by file name.

    Raises
    ------
    InputError
        If the netlist has cells without a model.
    """
    module = synthesis.netlist["modules"][synthesis.top]
    kinds = {cell["type"] for cell in module["cells"].values()}
    models = yosys_models(yosys_data(yosys) / "ecp5")
    unknown = sorted(kinds - set(MODELS) - set(re.findall(r"^module (\w+)", models, re.M)))
    if unknown:
        raise InputError(
            "the netlist cannot be simulated",
            where=str(synthesis.folder / NETLIST_VERILOG),
            expected="cells with a simulation model",
            found=", ".join(unknown),
        )
    return {
        "yosys_cells.v": LINT_OFF + models,
        "octick_cells.v": LINT_OFF + "\n".join(MODELS.values()),
        NETLIST_VERILOG: LINT_OFF + (synthesis.folder / NETLIST_VERILOG).read_text(),
    }


def yosys_models(folder: Path) -> str:
    """Yosys' models as one text: without its black boxes, and without cells of the I/O ring."""

    def include(found: re.Match[str]) -> str:
        wanted = found[1].endswith("_sim.vh")
        return (folder / found[1]).read_text() if wanted else ""

    text = (folder / "cells_sim.v").read_text()
    for _ in range(MAX_INCLUDES):
        text = re.sub(r'^`include "(.*)"', include, text, flags=re.M)
    return re.sub(r"\(\* blackbox \*\)\s*module.*?endmodule", "", text, flags=re.S)


def netlist_library(
    design: Design, synthesis: Synthesis, yosys: Tool, progress: Progress | None = None
) -> Library:
    """The netlist, with the ports of the design that it was made from."""
    files = netlist_files(synthesis, yosys)
    path, _ = build_library(
        files, synthesis.top, wrapper_text(design), {}, FOR_BUILD_TIME, progress
    )
    return Library(path)


def rtl_library(design: Design, progress: Progress | None = None) -> Library:
    """The design itself, with the parameters that it is built with."""
    path, _ = build_library(
        design.files, design.top, wrapper_text(design), {HOLD: BUILT_HOLD}, progress=progress
    )
    return Library(path)


def vectors(count: int, features: int, rng: np.random.Generator) -> np.ndarray:
    """Random codes; every `EXTREMES_EVERY`-th vector has the least and the greatest one only.

    Returns
    -------
    ndarray of uint8, shape (count, features)
    """
    codes = rng.integers(0, CODE_MAX + 1, (count, features)).astype(np.uint8)
    extreme = codes[::EXTREMES_EVERY]
    extreme[:] = np.where(extreme > CODE_MAX // 2, CODE_MAX, 0)
    return codes


def compare(
    rtl: Circuit,
    netlist: Circuit,
    codes: np.ndarray,
    rng: np.random.Generator,
    most_cycles: int,
    on_progress: Callable[[float], None] = lambda done: None,
) -> Compared:
    """Run a design's RTL and its netlist side by side, until every input is answered.

    Inputs come and answers are taken at random times; some inputs begin a state afresh.

    Parameters
    ----------
    rtl, netlist : Circuit
        Both just reset.
    codes : ndarray of uint8, shape (inputs, features)
    rng : Generator
    most_cycles : int
        A design's, of one inference: to give up where no answer comes.
    on_progress : callable
        Called with the share done.

    Returns
    -------
    Compared
    """
    count = len(codes)
    taken = answers = cycles = differing = 0
    first = ""
    reset = wrong = False
    limit = MAX_WAITS * (most_cycles + 2) * count
    while answers < count:
        offered = bool(taken < count and rng.random() < VALID_SHARE)
        ready = bool(rng.random() < READY_SHARE)
        x = codes[min(taken, count - 1)]
        expected, found = (
            one.cycle(x, in_valid=offered, in_reset=reset, out_ready=ready)
            for one in (rtl, netlist)
        )
        wrong = wrong or _said(expected) != _said(found)
        if wrong and not first:
            first = f"cycle {cycles}: expected {expected}, found {found}"
        in_step = expected.in_ready == found.in_ready and expected.out_valid == found.out_valid
        if not in_step or cycles == limit:
            first = first or f"no answer within {limit} cycles"
            return Compared(count, cycles, differing + count - answers, first)
        if expected.out_valid and ready:
            answers += 1
            differing += wrong
            wrong = False
            on_progress(answers / count)
        if offered and expected.in_ready:
            taken += 1
            reset = bool(rng.random() < RESET_SHARE)
        cycles += 1
    return Compared(count, cycles, differing, first)


def _said(edge: Edge) -> tuple[bool, bool, bytes, int]:
    """What others can see of a cycle: outputs count only where they are valid."""
    if not edge.out_valid:
        return edge.in_ready, False, b"", 0
    return edge.in_ready, True, edge.out.tobytes(), edge.violations
