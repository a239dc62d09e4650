"""``octick fpga build | verilog``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from feeds.output import JSON

if TYPE_CHECKING:
    from engine.backends.fpga.build_report import BuildReport
    from engine.backends.fpga.rtl import Design
    from engine.bundle import Bundle

TARGET_NAMES: Final = ("ecp5-85k", "ultrascale+")
MAX_SEEDS: Final = 64
NETLIST_VECTORS: Final = 5000


def _lanes(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> Any:
    """``LAYER=INPUTSxOUTPUTS`` or ``LAYER=INPUTSxOUTPUTS:BLOCKS``."""
    import re

    found: dict[str, tuple[int, int, int]] = {}
    for value in values:
        matched = re.fullmatch(r"(.+)=(\d+)x(\d+)(?::(\d+))?", value)
        if matched is None or 0 in (numbers := [int(n) for n in matched.groups()[1:3]]):
            raise click.BadParameter(f"{value!r}: expected LAYER=INPUTSxOUTPUTS[:BLOCKS]")
        found[matched[1]] = (numbers[0], numbers[1], int(matched[4] or 0))
    return found


_BUNDLE = click.argument("bundle", type=click.Path(path_type=Path, file_okay=False))


def _parallelism(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say how many multipliers a design gets."""
    for option in (
        click.option(
            "--blocks",
            type=click.IntRange(0),
            default=None,
            help="How many of the multipliers may be the device's blocks. [default: 96]",
        ),
        click.option(
            "--multipliers",
            type=click.IntRange(1),
            default=None,
            help="Budget of all layers, shared out so that there are few cycles. [default: 416]",
        ),
        click.option(
            "--parallelism",
            "lanes",
            multiple=True,
            callback=_lanes,
            metavar="LAYER=INPUTSxOUTPUTS[:BLOCKS]",
            help="Multipliers of a layer instead, and how many of them are blocks. Repeatable.",
        ),
    ):
        command = option(command)
    return command


@click.command()
@_BUNDLE
@click.option("--target", type=click.Choice(TARGET_NAMES), default="ecp5-85k", show_default=True)
@click.option("--speed-grade", type=int, default=None, help="Of the part: 6, 7 or 8. [default: 6]")
@click.option(
    "--seeds",
    type=click.IntRange(0, MAX_SEEDS),
    default=3,
    show_default=True,
    help="How often it is placed and routed; the worst counts. 0: synthesis alone.",
)
@click.option(
    "--jobs",
    type=click.IntRange(1, MAX_SEEDS),
    default=None,
    help="Seeds at once, up to 2 GB each. [default: one a core]",
)
@click.option(
    "--check-netlist",
    is_flag=True,
    help="Simulate the netlist beside the RTL; exit code 1 where they differ.",
)
@click.option(
    "--vectors",
    type=click.IntRange(1),
    default=None,
    help="Inputs for --check-netlist. [default: 5000]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to write. [default: build/fpga/BUNDLE-TARGET]",
)
@_parallelism
@JSON
def build(
    bundle: Path,
    target: str,
    speed_grade: int | None,
    seeds: int,
    jobs: int | None,
    check_netlist: bool,
    vectors: int | None,
    out: Path | None,
    lanes: dict[str, tuple[int, int, int]],
    multipliers: int | None,
    blocks: int | None,
    as_json: bool,
) -> None:
    """Build BUNDLE for an FPGA: resources, clock frequency and latency, with open tools.

    The default target is placed, routed and timed for a Lattice ECP5-85F; ultrascale+ is
    synthesised only, and its figures are an estimate. Reports and netlists stay in --out.
    """
    import msgspec

    from engine.backends.fpga.build import build_design
    from engine.backends.fpga.targets import TARGETS
    from engine.host import allowed_cores
    from feeds.progress import stages

    chosen = TARGETS[target]
    if speed_grade is None:
        speed_grade = chosen.speed_grades[0] if chosen.speed_grades else None
    elif speed_grade not in chosen.speed_grades:
        known = ", ".join(map(str, chosen.speed_grades)) or "none"
        raise click.BadParameter(f"{target} has speed grades: {known}", param_hint="--speed-grade")
    if vectors is not None and not check_netlist:
        raise click.UsageError("--vectors says how many inputs --check-netlist takes")
    if check_netlist and chosen.estimate:
        raise click.UsageError(f"--check-netlist has no models of the cells of {target}")
    loaded, design = _generated(bundle, lanes, multipliers, blocks)
    folder = out or Path("build") / "fpga" / f"{loaded.name}-{target}"
    with stages() as progress:
        report = build_design(
            loaded,
            design,
            chosen,
            folder,
            speed_grade=speed_grade,
            seeds=list(range(1, seeds + 1)),
            jobs=jobs or allowed_cores(),
            progress=progress,
            say=lambda line: click.echo(line, err=True),
            check_vectors=(vectors or NETLIST_VECTORS) if check_netlist else 0,
        )
    encoded = msgspec.json.encode(report)
    (folder / "report.json").write_bytes(msgspec.json.format(encoded, indent=2))
    if as_json:
        click.echo(encoded.decode())
    else:
        _print_report(report, folder)
    if report.netlist is not None and report.netlist.differing:
        click.get_current_context().exit(1)


@click.command()
@_BUNDLE
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="To write."
)
@click.option(
    "--target",
    type=click.Choice(TARGET_NAMES),
    default=None,
    help="With the multipliers of this device; portable by default.",
)
@_parallelism
@JSON
def verilog(
    bundle: Path,
    out: Path,
    target: str | None,
    lanes: dict[str, tuple[int, int, int]],
    multipliers: int | None,
    blocks: int | None,
    as_json: bool,
) -> None:
    """Write BUNDLE's circuit as SystemVerilog, for any tool and device."""
    from engine.backends.fpga.build_report import lanes_text
    from engine.backends.fpga.synthesis import write_rtl
    from engine.backends.fpga.targets import TARGETS

    _, design = _generated(bundle, lanes, multipliers, blocks)
    files = write_rtl(design, TARGETS[target] if target else None, out)
    found = {
        "top": design.top,
        "cycles": design.cycles,
        "lanes": lanes_text(design.lanes),
        "files": [str(out / name) for name in files],
    }
    if as_json:
        from feeds.output import print_json

        print_json(found)
        return
    click.echo(f"{len(files)} files in {out}, top module {design.top}, {design.cycles} cycles")


def _generated(
    path: Path,
    lanes: dict[str, tuple[int, int, int]],
    multipliers: int | None,
    blocks: int | None,
) -> tuple[Bundle, Design]:
    """A bundle and its design, with the multipliers that were asked for."""
    import difflib

    from engine.backends.fpga.parallelism import BLOCKS, MULTIPLIERS, choose_parallelism
    from engine.backends.fpga.rtl import generate
    from engine.backends.fpga.rtl_value import Lanes, Parallelism
    from engine.backends.lowering import lower_bundle
    from engine.bundle import load_bundle

    bundle = load_bundle(path)
    graph = lower_bundle(bundle)
    if not lanes:
        wanted = MULTIPLIERS if multipliers is None else multipliers
        allowed = BLOCKS if blocks is None else blocks
        return bundle, generate(graph, choose_parallelism(graph, wanted, allowed))
    if multipliers is not None or blocks is not None:
        raise click.UsageError("--parallelism says what --multipliers and --blocks would choose")
    named = {name: Lanes(*numbers) for name, numbers in lanes.items()}
    design = generate(graph, Parallelism(named))
    for name in named:
        if name not in design.lanes:
            near = difflib.get_close_matches(name, design.lanes, n=1)
            hint = f", did you mean {near[0]}?" if near else ""
            known = ", ".join(design.lanes)
            raise click.BadParameter(
                f"no layer {name!r} with multipliers among {known}{hint}",
                param_hint="--parallelism",
            )
    return bundle, design


def _print_report(report: BuildReport, folder: Path) -> None:
    from rich.table import Table

    from feeds.output import wide_console

    console = wide_console()
    part = " ".join(
        [report.device, report.package, f"-{report.speed_grade}" if report.speed_grade else ""]
    )
    title = f"{report.bundle} on {part.strip()}" + (" (estimate)" if report.estimate else "")
    table = Table("resource", "used", "placed", "there", "share", title=title)
    for each in report.resources:
        placed = "" if each.placed is None else f"{each.placed:,}"
        row = (f"{each.used:,}", placed, f"{each.available:,}", f"{each.share:.1%}")
        table.add_row(f"{each.name} ({each.unit})", *row)
    console.print(table)
    for name, text in report.lanes.items():
        console.print(f"{name}: {text}", markup=False)
    console.print(f"{report.cycles} cycles an inference")
    if report.netlist is not None:
        checked = report.netlist
        console.print(
            f"netlist beside RTL: {checked.differing:,} of {checked.vectors:,} vectors differ, "
            f"{checked.cycles:,} cycles"
        )
        if checked.first:
            console.print(checked.first, markup=False)
    for seed in report.seeds:
        console.print(
            f"seed {seed.seed}: {seed.fmax_mhz:.1f} MHz, {seed.seconds:.0f} s, {seed.router}"
        )
    if report.critical_path is not None:
        path = report.critical_path
        console.print(
            f"slowest path: {path.begin} to {path.end}, {path.delay_ns:.2f} ns, "
            f"{path.routing_ns:.2f} ns of it wires",
            markup=False,
        )
        console.print(
            f"[bold]{report.latency_ns:.0f} ns[/] an inference at {report.fmax_mhz:.1f} MHz, "
            "the worst seed"
        )
    console.print(report.includes)
    console.print("; ".join(report.tools.values()), markup=False)
    console.print(f"in {folder}", markup=False)
