"""One build: synthesis, does it fit, is it the RTL, place and route with every seed, the report."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import numpy as np

from engine.backends.fpga.build_report import (
    BuildReport,
    NetlistCheck,
    SeedResult,
    check_fits,
    count_resources,
    critical_path,
    fmax_mhz,
    included,
    lanes_text,
    latency_ns,
    resources,
    worst,
)
from engine.backends.fpga.netlist import compare, netlist_library, rtl_library, vectors
from engine.backends.fpga.rtl import Design
from engine.backends.fpga.simulation import Circuit
from engine.backends.fpga.synthesis import (
    AIM_MHZ,
    Routed,
    Synthesis,
    frame,
    place_and_route,
    synthesise,
)
from engine.backends.fpga.targets import RESOURCES, Target
from engine.backends.fpga.toolchain import NEXTPNR_ECP5, YOSYS, Tool, find_tool
from engine.backends.fpga.verilator_build import find_compiler, find_verilator
from engine.bundle import Bundle

CHECK_SEED: Final = 1

Progress = Callable[[str, float], None]


def build_design(
    bundle: Bundle,
    design: Design,
    target: Target,
    folder: Path,
    *,
    speed_grade: int | None,
    seeds: list[int],
    jobs: int,
    progress: Progress,
    say: Callable[[str], None],
    check_vectors: int = 0,
) -> BuildReport:
    """Build a design in a folder.

    Parameters
    ----------
    bundle : Bundle
        That the design was generated from.
    design : Design
    target : Target
    folder : Path
        Made where it is not there; takes all files of the tools.
    speed_grade : int or None
        One of the target's; None where it has none.
    seeds : list of int
        Each is placed and routed, unless the target is an estimate.
    jobs : int
        How many of them at once.
    progress : callable
        Takes what is being done, and the share of it that is done.
    say : callable
        Takes a line for the user: what went another way than it should.
    check_vectors : int
        So many inputs go through the netlist and through the RTL, before anything is placed; 0 for
        none. Only for targets that are no estimate.

    Raises
    ------
    InputError
        If a tool is missing or fails, or the device is too small.
    """
    blocks = sum(lanes.dsp for lanes in design.lanes.values())
    check_fits(dict.fromkeys(RESOURCES, 0) | {"DSP": blocks}, target, str(bundle.path))
    yosys = find_tool(YOSYS)
    nextpnr = find_tool(NEXTPNR_ECP5) if seeds and not target.estimate else None
    if check_vectors:
        find_verilator()
        find_compiler()
    tools = [tool for tool in (yosys, nextpnr) if tool is not None]
    progress("synthesis", 0.0)
    synthesis = synthesise(design, target, folder, yosys, lambda done: progress("synthesis", done))
    counted = count_resources(synthesis.netlist, synthesis.top, target)
    check_fits(counted, target, str(bundle.path))
    seconds = {"synthesis": synthesis.seconds}
    checked = check_netlist(design, synthesis, yosys, check_vectors, progress)
    routed: list[Routed] = []
    if nextpnr is not None:
        assert speed_grade is not None
        begun = time.perf_counter()
        frame(synthesis, yosys)
        seconds["frame"] = time.perf_counter() - begun
        begun = time.perf_counter()
        routed = place_and_route(
            folder,
            nextpnr,
            speed_grade,
            seeds,
            min(jobs, len(seeds)),
            lambda done: progress("place and route", done),
            say,
        )
        seconds["place and route"] = time.perf_counter() - begun
    slowest = worst(routed) if routed else None
    frequency = None if slowest is None else fmax_mhz(slowest.report)
    return BuildReport(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        bundle=str(bundle.path),
        model=bundle.manifest.model_hash,
        target=target.name,
        device=target.device,
        package=target.package,
        speed_grade=speed_grade,
        estimate=target.estimate,
        cycles=design.cycles,
        lanes=lanes_text(design.lanes),
        resources=resources(counted, target, routed),
        capacity_source=target.source,
        seeds=tuple(
            SeedResult(one.seed, fmax_mhz(one.report), one.seconds, one.router) for one in routed
        ),
        aimed_mhz=None if slowest is None else AIM_MHZ,
        fmax_mhz=frequency,
        latency_ns=None if frequency is None else latency_ns(design.cycles, frequency),
        critical_path=None if slowest is None else critical_path(slowest),
        netlist=checked,
        includes=included(target, routed),
        tools={tool.name: tool.version for tool in tools},
        seconds=seconds,
    )


def check_netlist(
    design: Design, synthesis: Synthesis, yosys: Tool, count: int, progress: Progress
) -> NetlistCheck | None:
    """Simulate a netlist beside the RTL that it was made from; None for no vectors.

    Raises
    ------
    InputError
        Without Verilator or a C++ compiler, or where the netlist has cells without a model.
    """
    if count == 0:
        return None
    rng = np.random.default_rng(CHECK_SEED)
    begun = time.perf_counter()
    rtl = Circuit(rtl_library(design, lambda tool, done: progress(f"RTL: {tool}", done)), design)
    made = netlist_library(
        design, synthesis, yosys, lambda tool, done: progress(f"netlist: {tool}", done)
    )
    netlist = Circuit(made, design)
    built = time.perf_counter()
    found = compare(
        rtl,
        netlist,
        vectors(count, design.n_features, rng),
        rng,
        design.cycles,
        lambda done: progress("netlist beside RTL", done),
    )
    rtl.close()
    netlist.close()
    return NetlistCheck(
        vectors=found.vectors,
        cycles=found.cycles,
        differing=found.differing,
        first=found.first,
        simulator=f"Verilator {find_verilator().version}",
        seconds={"build": built - begun, "run": time.perf_counter() - built},
    )
