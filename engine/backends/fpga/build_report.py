"""What a build found, read from the tools' own reports: resources, clock, critical path, latency.

Where several seeds were routed, the worst one counts for every figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from engine.backends.fpga.synthesis import Routed
from engine.backends.fpga.targets import RESOURCES, Target
from feeds.errors import InputError

NS_PER_US: Final = 1e3
# nextpnr's names for what it counts on the device.
_PLACED_AS: Final = {
    "LUT": "TRELLIS_COMB",
    "FF": "TRELLIS_FF",
    "DSP": "MULT18X18D",
    "BRAM": "DP16KD",
}


class Resource(msgspec.Struct, frozen=True):
    """What a design takes of one kind.

    Attributes
    ----------
    name : str
        "LUT", "FF", "DSP" or "BRAM".
    unit : str
        The vendor's name for one of them.
    used, available : int
    share : float
        0 to 1.
    placed : int or None
        What was placed, the frame around the design and the carries' ends included; None where
        nothing was.
    """

    name: str
    unit: str
    used: int
    available: int
    share: float
    placed: int | None


class Step(msgspec.Struct, frozen=True):
    """One part of a path: ``kind`` is nextpnr's "clk-to-q", "routing", "logic" or "setup"."""

    kind: str
    delay_ns: float
    at: str
    net: str = ""


class CriticalPath(msgspec.Struct, frozen=True):
    """The slowest path from a register to a register, of the slowest seed."""

    seed: int
    begin: str
    end: str
    delay_ns: float
    logic_ns: float
    routing_ns: float
    steps: tuple[Step, ...]


class SeedResult(msgspec.Struct, frozen=True):
    """What one seed reached; ``seconds`` on a machine that may have had other work."""

    seed: int
    fmax_mhz: float
    seconds: float
    router: str


class NetlistCheck(msgspec.Struct, frozen=True):
    """The netlist simulated beside the RTL that it was made from, cycle by cycle.

    Attributes
    ----------
    vectors : int
        Inputs, at random times, with random resets.
    cycles : int
        That both ran.
    differing : int
        Vectors whose answers are not the same bits.
    first : str
        The first cycle that differs, and how; empty where none does.
    simulator : str
    seconds : dict of str to float
        Wall time of building the simulation, and of running it.
    """

    vectors: int
    cycles: int
    differing: int
    first: str
    simulator: str
    seconds: dict[str, float]


class BuildReport(msgspec.Struct, frozen=True):
    """A build.

    Attributes
    ----------
    date : str
        When it was finished, UTC.
    bundle, model : str
        Folder, and hash of the model.
    target, device, package : str
    speed_grade : int or None
    estimate : bool
        Whether the figures are those of synthesis alone.
    cycles : int
        Of one inference, from the input's handshake to the answer's.
    lanes : dict of str to str
        By layer: ``INPUTSxOUTPUTS``, and how many of them are multiplier blocks.
    resources : tuple of Resource
    capacity_source : str
    seeds : tuple of SeedResult
        Empty where nothing was routed; likewise the next four are None.
    aimed_mhz, fmax_mhz, latency_ns : float or None
        What nextpnr aimed at; the lowest of all seeds; cycles at it.
    critical_path : CriticalPath or None
    netlist : NetlistCheck or None
        None where it was not asked for.
    includes : str
        What is in the figures, and what is not.
    tools : dict of str to str
        Versions.
    seconds : dict of str to float
        Wall time of each step.
    """

    date: str
    bundle: str
    model: str
    target: str
    device: str
    package: str
    speed_grade: int | None
    estimate: bool
    cycles: int
    lanes: dict[str, str]
    resources: tuple[Resource, ...]
    capacity_source: str
    seeds: tuple[SeedResult, ...]
    aimed_mhz: float | None
    fmax_mhz: float | None
    latency_ns: float | None
    critical_path: CriticalPath | None
    netlist: NetlistCheck | None
    includes: str
    tools: dict[str, str]
    seconds: dict[str, float]


def count_resources(netlist: Mapping[str, Any], top: str, target: Target) -> dict[str, int]:
    """What a synthesised netlist takes, by resource.

    Raises
    ------
    InputError
        If it holds modules that are neither cells of the device nor part of it.
    """
    counted = dict.fromkeys(RESOURCES, 0)
    module = netlist["modules"][top]
    for cell in module["cells"].values():
        kind = cell["type"]
        if kind in target.cells:
            resource, number = target.cells[kind]
            counted[resource] += number
        elif kind in netlist["modules"] and not _is_cell(netlist["modules"][kind]):
            raise InputError(
                "the netlist is not flat", where=top, expected="cells of the device", found=kind
            )
    return counted


def _is_cell(module: Mapping[str, Any]) -> bool:
    attributes = module.get("attributes", {})
    return "blackbox" in attributes or "whitebox" in attributes or not module.get("cells")


def check_fits(counted: Mapping[str, int], target: Target, where: str) -> None:
    """Refuse a design that the device cannot hold.

    Raises
    ------
    InputError
        Naming every resource that it needs more of than is there.
    """
    over = [name for name in RESOURCES if counted[name] > target.capacity[name]]
    if over:
        raise InputError(
            f"the design does not fit the {target.device}",
            where=where,
            expected=" and ".join(f"at most {target.capacity[name]:,} {name}" for name in over),
            found=" and ".join(f"{counted[name]:,} {name}" for name in over),
            fix="give it fewer with --multipliers or --blocks, or take a smaller model",
        )


def resources(
    counted: Mapping[str, int], target: Target, routed: Sequence[Routed]
) -> tuple[Resource, ...]:
    """What was used, against what is there."""
    found = []
    for name in RESOURCES:
        placed = [one.report["utilization"][_PLACED_AS[name]]["used"] for one in routed]
        found.append(
            Resource(
                name,
                target.units[name],
                counted[name],
                target.capacity[name],
                max([counted[name], *placed]) / target.capacity[name],
                max(placed) if placed else None,
            )
        )
    return tuple(found)


def fmax_mhz(report: Mapping[str, Any]) -> float:
    """The highest clock frequency that one routed design bears: the lowest of its clocks'.

    Raises
    ------
    InputError
        If nothing in it is clocked.
    """
    achieved = [clock["achieved"] for clock in report["fmax"].values()]
    if not achieved:
        raise InputError(
            "nextpnr timed no clock", where="report", expected="a path between two registers"
        )
    return float(min(achieved))


def critical_path(routed: Routed) -> CriticalPath:
    """The slowest path between registers of a routed design."""
    inside = [
        path
        for path in routed.report["critical_paths"]
        if "<async>" not in (path["from"], path["to"]) and path["path"]
    ]
    slowest = max(inside, key=lambda path: sum(step["delay"] for step in path["path"]))
    steps = tuple(
        Step(
            step["type"],
            round(step["delay"], 3),
            f"{step['to']['cell']}.{step['to']['port']}",
            step.get("net", ""),
        )
        for step in slowest["path"]
    )
    routing = sum(step.delay_ns for step in steps if step.kind == "routing")
    total = sum(step.delay_ns for step in steps)
    first = slowest["path"][0]["from"]
    return CriticalPath(
        seed=routed.seed,
        begin=f"{first['cell']}.{first['port']}",
        end=steps[-1].at,
        delay_ns=round(total, 3),
        logic_ns=round(total - routing, 3),
        routing_ns=round(routing, 3),
        steps=steps,
    )


def latency_ns(cycles: int, frequency_mhz: float) -> float:
    """Cycles at a clock frequency, in nanoseconds."""
    return cycles / frequency_mhz * NS_PER_US


def worst(routed: Sequence[Routed]) -> Routed:
    """The seed that reached the lowest frequency."""
    return min(routed, key=lambda one: fmax_mhz(one.report))


def lanes_text(lanes: Mapping[str, Any]) -> dict[str, str]:
    """Lanes by layer, as `BuildReport` says them."""
    return {
        name: f"{each.inputs}x{each.outputs}, {each.dsp} in multiplier blocks"
        for name, each in lanes.items()
    }


def included(target: Target, routed: Sequence[Routed]) -> str:
    """What the figures are of."""
    if target.estimate:
        return (
            "an estimate: synthesis alone, which takes a block for every multiplier; nothing is "
            "placed, routed or timed; I/O not included"
        )
    if not routed:
        return "synthesis alone: nothing is placed, routed or timed"
    return "placed, routed and timed from register to register; I/O not included"
