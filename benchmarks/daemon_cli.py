"""``octick bench soak`` and ``octick bench start``: the daemon as an operator runs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from benchmarks.slopes import Slope
    from benchmarks.soak import Soak
    from benchmarks.start import StartBench


@click.command()
@click.option(
    "--hours",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Of the simulated market's time.",
)
@click.option(
    "--speed",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    help="Seconds of market time in one of wall time.",
)
@click.option(
    "--window",
    "window_s",
    type=click.FloatRange(0.1, 3600),
    default=5.0,
    show_default=True,
    help="Wall seconds of one sample.",
)
@click.option("--model", type=click.Path(path_type=Path), help="Bundle; default: the reference.")
@click.option("--backend", default="compiled", show_default=True, help="What runs the model.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def soak(
    hours: float, speed: float, window_s: float, model: Path | None, backend: str, as_json: bool
) -> None:
    """A live engine at twice the recorded peak for hours of market time: does anything creep?

    Tape, FP32 shadow and value check are on. An hour takes six minutes and 5 GB of disk at the
    default speed. Ctrl-C ends it with the result so far. Exit code 1 where resident memory or
    p99.9 has a slope that can be told from 0, a message is lost, or a GC pause takes 1 ms.
    """
    import msgspec

    from benchmarks.provenance import REFERENCE
    from benchmarks.soak import bench_soak
    from feeds.progress import stages

    with stages() as progress:
        result = bench_soak(
            hours,
            speed=speed,
            window_s=window_s,
            model=model or REFERENCE,
            backend=backend,
            progress=progress,
        )
    if as_json:
        click.echo(msgspec.json.encode(result).decode())
    else:
        _show_soak(result)
    sys.exit(0 if result.ok else 1)


@click.command()
@click.option("--runs", type=click.IntRange(1, 1_000), default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def start(runs: int, as_json: bool) -> None:
    """From a start of the shipped simulator config to READY, with a warm cache; stage by stage.

    Exit code 1 where the median is 3 s or more, or something is compiled after READY.
    """
    import msgspec

    from benchmarks.start import bench_start
    from feeds.progress import stages

    with stages() as progress:
        result = bench_start(runs, progress=progress)
    if as_json:
        click.echo(msgspec.json.encode(result).decode())
    else:
        _show_start(result)
    sys.exit(0 if result.ok else 1)


def _interval(slope: Slope | None, unit: str) -> str:
    if slope is None:
        return "too short to say"
    verdict = "no slope" if slope.zero else "a slope"
    return f"{slope.value:+.3g} ({slope.low:+.3g} to {slope.high:+.3g}) {unit}: {verdict}"


def _show_soak(result: Soak) -> None:
    from rich.table import Table

    from feeds.output import wide_console

    console = wide_console()
    table = Table(box=None, pad_edge=False)
    names = "at s|messages/s|lost|missed|RSS MB|anonymous MB|CPU|taken away|p50 us|p99.9 us|max us"
    for name in names.split("|"):
        table.add_column(name, justify="right")
    for w in result.windows:
        row = (
            *(w.at_s, w.messages_per_s, w.lost, w.shadow_missed, w.rss_mb, w.rss_anon_mb),
            *(w.cpu_share, w.preempted, w.p50_us, w.p999_us, w.max_us),
        )
        table.add_row(*(f"{value:,}" for value in row), style="dim" if w.warm_up else None)
    console.print(table)
    console.print(
        f"{result.hours:.3g} market hours at {result.times_peak:.3g} times the recorded peak of "
        f"{result.peak.lines_per_s:,}/s, {result.speed:g} times as fast: "
        f"{result.messages:,} messages in {result.wall_s:,.1f} s, {result.messages_per_s:,}/s, "
        f"{result.lost} lost{'; interrupted' if result.interrupted else ''}",
        highlight=False,
    )
    facts = {
        "anonymous memory": _interval(result.rss_slope_mb_per_hour, "MB an hour"),
        "p99.9": _interval(result.p999_slope_us_per_hour, "us an hour"),
        "GC": f"{result.gc['collections']:,.0f} collections, "
        f"longest pause {result.gc['longest_pause_us']:.1f} us",
        "compilations": str(result.compilations),
        "jitter": "; ".join(f"{when} {jitter}" for when, jitter in result.jitter.items()),
        "failed": "; ".join(result.failed) or "nothing",
    }
    for name, text in facts.items():
        console.print(f"{name}: {text}", highlight=False)
    _show_provenance(result)


def _show_start(result: StartBench) -> None:
    from rich.table import Table

    from feeds.output import wide_console

    console = wide_console()
    times = result.start_to_ready_s
    console.print(
        f"start to READY: p50 {times.p50:.3f} s, max {times.max:.3f} s of {times.n}; "
        f"compiled after it: {result.compilations_after_ready} {' '.join(result.compiled)}",
        highlight=False,
    )
    for title, seconds in (("stage", result.stages_s), ("imports of", result.imports_s)):
        table = Table(title, "s", box=None, pad_edge=False)
        for name, value in seconds.items():
            table.add_row(name, f"{value:.3f}")
        console.print(table)
    console.print(f"jitter: {result.jitter}", highlight=False)
    _show_provenance(result)


def _show_provenance(result: Soak | StartBench) -> None:
    click.echo(f"{result.machine}; {result.versions}; {result.commit}; {result.date}")
