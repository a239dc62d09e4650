"""One build: synthesis, does it fit, place and route with every seed, and the report."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from engine.backends.fpga.build_report import (
    BuildReport,
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
from engine.backends.fpga.rtl import Design
from engine.backends.fpga.synthesis import AIM_MHZ, Routed, frame, place_and_route, synthesise
from engine.backends.fpga.targets import RESOURCES, Target
from engine.backends.fpga.toolchain import NEXTPNR_ECP5, YOSYS, find_tool
from engine.bundle import Bundle

SYNTHESIS_SHARE: Final = 0.25  # of the time of a build that is placed and routed


def build_design(
    bundle: Bundle,
    design: Design,
    target: Target,
    folder: Path,
    *,
    speed_grade: int | None,
    seeds: list[int],
    jobs: int,
    progress: Callable[[str, float], None],
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
        Takes what is being done, and the share done.

    Raises
    ------
    InputError
        If a tool is missing or fails, or the device is too small.
    """
    blocks = sum(lanes.dsp for lanes in design.lanes.values())
    check_fits(dict.fromkeys(RESOURCES, 0) | {"DSP": blocks}, target, str(bundle.path))
    yosys = find_tool(YOSYS)
    nextpnr = None if target.estimate else find_tool(NEXTPNR_ECP5)
    tools = [tool for tool in (yosys, nextpnr) if tool is not None]
    share = 1.0 if nextpnr is None else SYNTHESIS_SHARE
    progress("synthesis", 0.0)
    synthesis = synthesise(
        design, target, folder, yosys, lambda done: progress("synthesis", share * done)
    )
    counted = count_resources(synthesis.netlist, synthesis.top, target)
    check_fits(counted, target, str(bundle.path))
    seconds = {"synthesis": synthesis.seconds}
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
            lambda done: progress("place and route", share + (1.0 - share) * done),
        )
        seconds["place and route"] = time.perf_counter() - begun
    slowest = worst(routed) if routed else None
    frequency = None if slowest is None else fmax_mhz(slowest.report)
    return BuildReport(
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
        seeds=tuple(SeedResult(one.seed, fmax_mhz(one.report), one.seconds) for one in routed),
        aimed_mhz=None if slowest is None else AIM_MHZ,
        fmax_mhz=frequency,
        latency_ns=None if frequency is None else latency_ns(design.cycles, frequency),
        critical_path=None if slowest is None else critical_path(slowest),
        includes=included(target),
        tools={tool.name: tool.version for tool in tools},
        seconds=seconds,
    )
