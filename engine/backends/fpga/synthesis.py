"""From a generated design to a netlist, and from a netlist to a placed and routed device.

Yosys makes the netlist; nextpnr-ecp5 places and routes it, once for every seed, and times every
path. Multipliers that the design asks blocks for are instances of the primitive
(`engine.backends.fpga.ecp5_multiplier`), so that synthesis infers none. Technology mapping is
plain ABC in place of ABC9: the same on every version of Yosys, and nothing here has combinational
boxes that ABC9 would have to see through.

Sources: Yosys manual, "synth_ecp5", "synth_xilinx"; ``nextpnr-ecp5 --help``.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from engine.backends.fpga.ecp5_multiplier import with_ecp5_multiplier
from engine.backends.fpga.harness import FRAME, harness_text, ports_of
from engine.backends.fpga.rtl import Design
from engine.backends.fpga.targets import ECP5_85K, Target
from engine.backends.fpga.toolchain import StalledError, Tool, run_tool

NETLIST_JSON: Final = "netlist.json"
NETLIST_VERILOG: Final = "netlist.v"
FRAMED_JSON: Final = "framed.json"
# nextpnr aims at it and gives up no slack beyond: what is reported is what was reached.
AIM_MHZ: Final = 200.0
HOLD: Final = "HOLD"  # see `engine.backends.fpga.rtl_library`
BUILT_HOLD: Final = 0  # spares the wiring of enables
ROUTERS: Final = ("router1", "router2")  # of nextpnr: what is tried first reaches more
# router1 searches ever further for the last arcs; of those that ended, none took as long for fewer.
STALLED_AFTER_S: Final = 900.0  # of CPU time
# Shares of the time that place and route takes, by what nextpnr's log says.
_PLACED: Final = 0.25
_REFINED: Final = 0.55
_MAX_PASSES: Final = 46  # of synth_ecp5, as numbered in Yosys' log

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Synthesis:
    """A synthesised design.

    Attributes
    ----------
    folder : Path
        With `NETLIST_JSON` and `NETLIST_VERILOG`.
    netlist : dict
        What `NETLIST_JSON` says.
    top : str
    seconds : float
    """

    folder: Path
    netlist: dict[str, Any]
    top: str
    seconds: float


@dataclass(frozen=True)
class Routed:
    """One place and route.

    Attributes
    ----------
    seed : int
    report : dict
        nextpnr's, with ``fmax``, ``utilization`` and ``critical_paths``.
    seconds : float
    router : str
        Of `ROUTERS`.
    """

    seed: int
    report: dict[str, Any]
    seconds: float
    router: str


def write_rtl(design: Design, target: Target | None, folder: Path) -> list[str]:
    """Write a design's SystemVerilog, with the multiplier of a target where it has its own.

    Returns
    -------
    list of str
        File names, sorted.
    """
    own = target is not None and not target.estimate
    files = with_ecp5_multiplier(design.files) if own else design.files
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return sorted(files)


def synthesis_script(design: Design, target: Target, files: list[str]) -> str:
    """What Yosys is to do, a command a line."""
    begin = [
        *(f"read_verilog -sv {name}" for name in files),
        f"hierarchy -top {design.top} -chparam {HOLD} {BUILT_HOLD}",
        f"rename -top {design.top}",
    ]
    if not target.estimate:
        synth = f"synth_ecp5 -nodsp -top {design.top}"
        made = [
            f"{synth} -run begin:coarse",
            "proc",
            "flatten",
            # What is to stay a copy says so at its wire; merged are cells.
            "setattr -set keep 1 w:* a:keep %i %ci1 t:$*dff* %i",
            f"{synth} -run coarse:map_luts",
            "abc -lut 4:7 -dress",
            "clean",
            f"{synth} -run map_cells:check",
            "blackbox =A:whitebox",
        ]
    else:
        made = [f"synth_xilinx -family xcup -noiopad -noclkbuf -flatten -top {design.top}"]
    write = [
        "delete t:$scopeinfo",  # of newer versions; no cell of any device
        "hierarchy -check",
        "check -assert",
        f"write_json {NETLIST_JSON}",
        f"write_verilog -noattr {NETLIST_VERILOG}",
    ]
    return "\n".join([*begin, *made, *write, ""])


def synthesise(
    design: Design, target: Target, folder: Path, yosys: Tool, on_progress: Progress
) -> Synthesis:
    """Synthesise a design in a folder.

    Raises
    ------
    InputError
        If Yosys refuses it.
    """
    files = write_rtl(design, target, folder)
    (folder / "synthesis.ys").write_text(synthesis_script(design, target, files))
    begun = time.perf_counter()

    def follow(line: str) -> None:
        step = re.match(r"\d+\.(\d+)\. Executing", line)
        if step is not None:
            on_progress(min(1.0, int(step[1]) / _MAX_PASSES))

    run_tool(
        yosys,
        ["-s", "synthesis.ys"],
        folder,
        "synthesis.log",
        [NETLIST_JSON, NETLIST_VERILOG],
        follow,
    )
    netlist = json.loads((folder / NETLIST_JSON).read_text())
    return Synthesis(folder, netlist, design.top, time.perf_counter() - begun)


def frame(synthesis: Synthesis, yosys: Tool) -> None:
    """Join a netlist with the frame of `engine.backends.fpga.harness`: `FRAMED_JSON`."""
    folder = synthesis.folder
    ports = ports_of(synthesis.netlist, synthesis.top)
    (folder / "frame.v").write_text(harness_text(synthesis.top, ports))
    script = [
        f"read_json {NETLIST_JSON}",
        "read_verilog frame.v",
        f"hierarchy -top {FRAME}",
        "flatten",
        "opt_clean -purge",
        f"write_json {FRAMED_JSON}",
        "",
    ]
    (folder / "frame.ys").write_text("\n".join(script))
    run_tool(yosys, ["-s", "frame.ys"], folder, "frame.log", [FRAMED_JSON])


def place_and_route(
    folder: Path,
    nextpnr: Tool,
    speed_grade: int,
    seeds: list[int],
    jobs: int,
    on_progress: Progress,
    say: Callable[[str], None],
) -> list[Routed]:
    """Place and route `FRAMED_JSON` with every seed.

    Where a router gets no further, the next of `ROUTERS` begins anew.

    Parameters
    ----------
    folder : Path
    nextpnr : Tool
    speed_grade : int
    seeds : list of int
    jobs : int
        At once. Each takes a core and up to 2 GB.
    on_progress : callable
        Called with the share done.
    say : callable
        Takes a line for the user.

    Raises
    ------
    InputError
        If nextpnr finds no place or no route.
    """
    shares = dict.fromkeys(seeds, 0.0)

    def routed(seed: int, router: str, *, give_up: bool) -> dict[str, Any]:
        following = RouteProgress()

        def follow(line: str) -> None:
            shares[seed] = following.share(line)
            on_progress(sum(shares.values()) / len(shares))

        report = f"report_{seed}.json"
        arguments = ["--85k", "--package", ECP5_85K.package, "--speed", str(speed_grade)]
        arguments += ["--json", FRAMED_JSON, "--freq", f"{AIM_MHZ:g}", "--seed", str(seed)]
        arguments += ["--router", router, "--report", report, "--timing-allow-fail"]
        watch = following.stalled if give_up else None
        try:
            run_tool(nextpnr, arguments, folder, f"route_{seed}.log", [report], follow, watch)
        except StalledError:
            raise StalledError(f"at its last {following.remaining} arcs") from None
        found: dict[str, Any] = json.loads((folder / report).read_text())
        return found

    def one(seed: int) -> Routed:
        begun = time.perf_counter()
        for router, other in pairwise(ROUTERS):
            try:
                report = routed(seed, router, give_up=True)
            except StalledError as error:
                say(f"seed {seed}: {router} got no further {error}; {other} begins anew")
            else:
                return Routed(seed, report, time.perf_counter() - begun, router)
        report = routed(seed, ROUTERS[-1], give_up=False)
        return Routed(seed, report, time.perf_counter() - begun, ROUTERS[-1])

    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(one, seed) for seed in seeds]
        try:
            return [future.result() for future in waiting]
        except BaseException:
            for future in waiting:
                future.cancel()
            raise


class RouteProgress:
    """How far one place and route is, from the lines of its log.

    Attributes
    ----------
    remaining : int or None
        Arcs that router1 has left, or wires that router2 has given away twice; None before.
    """

    def __init__(self) -> None:
        self._share = 0.0
        self._most = 0
        self.remaining: int | None = None
        self._least: int | None = None
        self._fell_at_s = 0.0

    def share(self, line: str) -> float:
        """The share done after a line; it never falls."""
        found = self._share
        if placing := re.match(r"Info:\s+at iteration #(\d+), type", line):
            found = _PLACED * min(1.0, int(placing[1]) / 25)
        elif refining := re.match(r"Info:\s+at iteration #(\d+): temp", line):
            found = _PLACED + (_REFINED - _PLACED) * min(1.0, int(refining[1]) / 25)
        elif routing := re.match(r"Info:\s+\d+ \|\s+\d+\s+\d+ \|\s+\d+\s+\d+ \|\s+(\d+)\|", line):
            left = self._left(int(routing[1]))
            found = _REFINED + (1.0 - _REFINED) * (1.0 - left / max(1, self._most))
        elif routing := re.match(r"Info:\s+iter=\d+ wires=\d+ overused=(\d+)", line):
            # It falls by a like share each time.
            left = self._left(int(routing[1]))
            found = _REFINED + (1.0 - _REFINED) * (1.0 - math.log1p(left) / math.log1p(self._most))
        self._share = max(self._share, found)
        return self._share

    def _left(self, remaining: int) -> int:
        self._most = max(self._most, remaining, 1)
        self.remaining = remaining
        return remaining

    def stalled(self, cpu_s: float) -> bool:
        """Whether a router has had `STALLED_AFTER_S` of CPU time with no fewer left than before."""
        left = self.remaining
        if left is None:
            return False
        if self._least is None or left < self._least:
            self._least, self._fell_at_s = left, cpu_s
        return cpu_s - self._fell_at_s > STALLED_AFTER_S
