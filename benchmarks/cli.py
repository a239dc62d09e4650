"""``octick demo`` and ``octick bench …``. Heavy imports stand inside the functions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


@click.command()
@click.option("--seconds", type=click.FloatRange(1), default=20.0, show_default=True)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="Folder for the recorded tape.",
)
@click.option("--json", "as_json", is_flag=True, help="The result as one JSON object.")
def demo(seconds: float, out: Path, as_json: bool) -> None:
    """Run simulator, engine and subscriber as three processes, then replay what was recorded.

    Exit code 1 if the replay's digest differs from the live one.
    """
    import msgspec
    from rich.console import Console

    from benchmarks.demo import run_demo, show

    console = Console(stderr=as_json)
    result = run_demo(seconds, out, console)
    if as_json:
        click.echo(msgspec.json.encode(result).decode())
    else:
        show(result, console)
    sys.exit(0 if result.equal else 1)


@click.command()
@click.argument("tape", required=False, type=click.Path(path_type=Path))
@click.option("--runs", type=click.IntRange(1, 1000), default=5, show_default=True)
@click.option("--model", type=click.Path(path_type=Path), help="Bundle; default: the reference.")
@click.option("--backend", default="compiled", show_default=True, help="What runs the model.")
@click.option(
    "--rivals/--no-rivals",
    default=True,
    show_default=True,
    help="hftbacktest and a book of Python dicts in the same rounds.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def replay(
    tape: Path | None, runs: int, model: Path | None, backend: str, rivals: bool, as_json: bool
) -> None:
    """Book levels, messages and signals a second, on one core, beside other books.

    Without TAPE on the recording in OCTICK_DATA, or on a simulated market where there is none.
    hftbacktest is left out where it is not installed (pip install --no-deps hftbacktest).
    """
    import msgspec
    from rich.console import Console

    from benchmarks.provenance import REFERENCE
    from benchmarks.replay import bench_replay
    from benchmarks.replay_report import show

    console = Console(stderr=True)
    with console.status("measuring") as status:
        result = bench_replay(
            tape,
            runs=runs,
            model=model or REFERENCE,
            backend=backend,
            rivals=rivals,
            progress=status.update,
        )
    if as_json:
        click.echo(msgspec.json.encode(result).decode())
    else:
        show(result)


def _show_facts(result: object) -> None:
    """A flat result, one fact a line."""
    import msgspec
    from rich.console import Console
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for name, value in msgspec.to_builtins(result).items():
        shown = f"{value:,}" if isinstance(value, int | float) else str(value)
        table.add_row(f"[bold]{name}[/]", shown)
    Console().print(table)


@click.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--venue", help="Of FILE.")
@click.option("--runs", type=click.IntRange(1, 100), default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def convert(file: Path | None, venue: str | None, runs: int, as_json: bool) -> None:
    """Raw lines a second of ``octick tape convert``, in fresh processes.

    Without FILE on the recording in OCTICK_DATA.
    """
    import msgspec
    from rich.console import Console

    from benchmarks.conversion import bench_convert

    if file is not None and venue is None:
        raise click.UsageError("FILE needs its --venue")
    with Console(stderr=True).status("converting"):
        result = bench_convert(file, venue, runs)
    if as_json:
        click.echo(msgspec.json.encode(result).decode())
    else:
        _show_facts(result)


@click.command()
@click.option("--messages", type=click.IntRange(100_000), default=10_000_000, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def memory(messages: int, as_json: bool) -> None:
    """Resident memory over a long replay with inference: it should not grow."""
    import msgspec
    from rich.console import Console

    from benchmarks.memory import bench_memory

    with Console(stderr=True).status("measuring") as status:
        result = bench_memory(messages, progress=status.update)
    if as_json:
        click.echo(msgspec.json.encode(result).decode())
    else:
        _show_facts(result)


@click.command("compile")
def compile_kernels() -> None:
    """Compile every native kernel now, so that no first run has to wait for it.

    The result is cached for this machine and this state of the sources; a second call returns at
    once. Worth a line in an image's build.
    """
    import importlib
    import time

    from rich.console import Console

    from benchmarks.provenance import REFERENCE
    from feeds.compile_cache import kernel_sources

    started = time.monotonic()
    root = Path(__file__).resolve().parent.parent
    with Console(stderr=True).status("compiling") as status:
        for name in kernel_sources(root):
            module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            status.update(f"compiling {module}")
            importlib.import_module(module)
        status.update("compiling the reference model")
        from engine.backends.registry import open_backend
        from engine.bundle import load_bundle

        open_backend("compiled", load_bundle(REFERENCE)).close()
    click.echo(f"compiled in {time.monotonic() - started:.1f} s", err=True)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--observer", default="percentile-99.99", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def calibration(run: Path, observer: str, as_json: bool) -> None:
    """Calibrate the network of a training RUN on 1,000, 10,000 and 100,000 rows.

    Peak memory, accuracy, agreement with FP32, and how far PyTorch and ONNX Runtime differ, with
    symmetric and asymmetric zero points.
    """
    import msgspec
    from rich.console import Console

    from benchmarks.quantisation import bench_calibration, show_rows

    with Console(stderr=True).status("calibrating") as status:
        result = bench_calibration(run, observer, progress=status.update)
    if as_json:
        click.echo(msgspec.json.encode(result).decode())
    else:
        show_rows(str(run), result.rows)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def deeplob(as_json: bool) -> None:
    """Two public DeepLOB networks on recorded futures data: INT8 against FP32, by observer.

    Needs the recordings and weights in OCTICK_DATA. Calibrated on the first third of the rows,
    compared on the last.
    """
    import msgspec
    from rich.console import Console

    from benchmarks.deeplob import bench_deeplob
    from benchmarks.quantisation import show_rows

    with Console(stderr=True).status("measuring") as status:
        result = bench_deeplob(progress=status.update)
    if as_json:
        click.echo(msgspec.json.encode(result).decode())
    else:
        show_rows("class agreement with FP32", result.rows)


@click.command()
@click.option("--hours", type=click.FloatRange(0.01, 240.0), default=24.0, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=11, show_default=True, help="The market's.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def drift(hours: float, seed: int, as_json: bool) -> None:
    """How soon the drift monitor finds a planted shift of the inputs, and false alarms in a day.

    Hours are of event time, of the simulated market; a day takes about ten minutes.
    """
    import msgspec

    from benchmarks.drift import bench_drift, show
    from feeds.progress import stages

    with stages() as progress:
        result = bench_drift(hours, seed, progress=progress)
    if as_json:
        click.echo(msgspec.json.encode(result).decode())
    else:
        show(result)


@click.command()
@click.option("--halts", type=click.IntRange(1, 10_000), default=20, show_default=True)
@click.option("--model", type=click.Path(path_type=Path), help="Bundle; default: the reference.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def halt(halts: int, model: Path | None, as_json: bool) -> None:
    """How soon a halt by command, file and signal takes effect while a feed floods the engine.

    Exit code 1 where one took longer than 10 ms, or a tradable signal slipped through.
    """
    from benchmarks.halts import bench_halt
    from benchmarks.provenance import REFERENCE

    _run(as_json, lambda tell: bench_halt(halts, model=model or REFERENCE, progress=tell))


@click.command()
@click.argument("other", type=click.Path(path_type=Path, exists=True))
@click.option("--swaps", type=click.IntRange(2, 100_000), default=500, show_default=True)
@click.option("--model", type=click.Path(path_type=Path), help="Bundle; default: the reference.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def swap(other: Path, swaps: int, model: Path | None, as_json: bool) -> None:
    """Swap the bundle OTHER in and out of a live engine, over and over.

    Exit code 1 where a tick is missed or doubled, memory grows, or ticks near a swap are slow.
    """
    from benchmarks.provenance import REFERENCE
    from benchmarks.swaps import bench_swap

    _run(as_json, lambda tell: bench_swap(swaps, other, model=model or REFERENCE, progress=tell))


@click.command()
@click.option("--rounds", type=click.IntRange(1, 1_000), default=5, show_default=True)
@click.option("--ticks", type=click.IntRange(100), default=3_000, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def shadow(rounds: int, ticks: int, as_json: bool) -> None:
    """What the FP32 shadow costs a tick: well, slow, stopped, killed.

    Exit code 1 where p99 is more than 5 % above that without one.
    """
    from benchmarks.shadow import bench_shadow

    _run(as_json, lambda tell: bench_shadow(rounds, ticks, progress=tell))


@click.command()
@click.option("--hours", type=click.FloatRange(0.01), default=24.0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def quiet(hours: float, as_json: bool) -> None:
    """A quiet day with heartbeats, then a silent feed: which of them is called stale.

    Exit code 1 where the day is, or the silence is not within its limit.
    """
    from benchmarks.quiet import bench_quiet

    seconds = round(hours * 3600)
    _run(
        as_json,
        lambda tell: bench_quiet(
            seconds, progress=lambda done: tell(f"hour {done / 3600:.1f} of {hours:g}")
        ),
    )


@click.command()
@click.option(
    "--bundle",
    "bundles",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Repeatable. [default: the reference]",
)
@click.option(
    "--arch",
    "archs",
    multiple=True,
    help="An untrained network of this architecture, made for the purpose. Repeatable.",
)
@click.option(
    "--backend", "only", multiple=True, help="NAME or NAME/DEVICE. Repeatable. [default: all]"
)
@click.option("--rounds", type=click.IntRange(1, 100_000), default=50, show_default=True)
@click.option("--vectors", type=click.IntRange(1, 1_000_000), default=1_000, show_default=True)
@click.option("--rivals", is_flag=True, help="ONNX Runtime and OpenVINO in the same rounds.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
def backends(
    bundles: tuple[Path, ...],
    archs: tuple[str, ...],
    only: tuple[str, ...],
    rounds: int,
    vectors: int,
    rivals: bool,
    as_json: bool,
) -> None:
    """Latency, throughput, size, power and bits of every backend and device on this machine.

    In short blocks, one backend after the other, round after round. Exit code 1 where one that
    calls itself exact differs from the reference in a score or in a value check.
    """
    import tempfile

    import msgspec

    from benchmarks.backends import bench_backends, show
    from benchmarks.provenance import REFERENCE
    from benchmarks.untrained import make_untrained
    from feeds.progress import stages

    with stages() as progress, tempfile.TemporaryDirectory() as folder:
        paths = list(bundles)
        for arch in archs:
            progress(f"making an untrained {arch}", 0.0)
            paths.append(make_untrained(arch, Path(folder) / arch))
        rows = bench_backends(
            paths or [REFERENCE], rounds, vectors, only=only, rivals=rivals, progress=progress
        )
    if as_json:
        for row in rows:
            click.echo(msgspec.json.encode(row).decode())
    else:
        show(rows)
    sys.exit(0 if all(row.ok for row in rows) else 1)


@click.command()
@click.option("--vectors", type=click.IntRange(1, 10_000_000), default=100_000, show_default=True)
@click.option(
    "--simulated",
    type=click.IntRange(1, 10_000_000),
    default=20_000,
    show_default=True,
    help="Vectors of a backend that simulates.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def bits(vectors: int, simulated: int, as_json: bool) -> None:
    """The bits of every exact backend on MLP, TCN, LSTM and GRU, over many vectors.

    Exit code 1 where one differs from the reference in a score or in a value check.
    """
    import msgspec

    from benchmarks.bits import bench_bits, show
    from feeds.progress import stages

    with stages() as progress:
        result = bench_bits(vectors, simulated, progress)
    if as_json:
        click.echo(msgspec.json.encode(result).decode())
    else:
        show(result)
    sys.exit(0 if result.equal else 1)


@click.command("value-checks")
@click.option("--model", type=click.Path(path_type=Path), help="Bundle; default: the reference.")
@click.option("--rounds", type=click.IntRange(2, 1_000_000), default=3_000, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def value_checks(model: Path | None, rounds: int, as_json: bool) -> None:
    """What the value-check nodes of a model cost, in microseconds an inference.

    With and without them in turn, one thread, buffers bound; beside it what the session without
    them differs by from itself.
    """
    import msgspec
    from rich.console import Console

    from benchmarks.provenance import REFERENCE
    from benchmarks.value_checks import bench_value_checks, show

    with Console(stderr=True).status("measuring") as status:
        result = bench_value_checks(model or REFERENCE, rounds, progress=status.update)
    if as_json:
        click.echo(msgspec.json.encode(result).decode())
    else:
        show(result)


@click.command()
@click.option("--hours", type=click.FloatRange(0.1), default=25.0, show_default=True)
@click.option(
    "--recalibrate-after",
    "after_h",
    type=click.FloatRange(0.01),
    default=24.0,
    show_default=True,
    help="Hours of event time.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def day(hours: float, after_h: float, as_json: bool) -> None:
    """A simulated day that crosses a recalibration, then the same day from its events alone.

    Exit code 1 where the two differ, or something is called stale, impossible or demoted.
    """
    from benchmarks.day import HOUR_NS, bench_day

    after_ns = round(after_h * HOUR_NS)
    _run(as_json, lambda tell: bench_day(hours, recalibrate_after_ns=after_ns, progress=tell))


def _run(as_json: bool, measure: Callable[[Callable[[str], Any]], Any]) -> None:
    """Measure with a status line, print, and exit by ``ok``."""
    import msgspec
    from rich.console import Console

    with Console(stderr=True).status("measuring") as status:
        result = measure(status.update)
    if as_json:
        click.echo(msgspec.json.encode(result).decode())
    else:
        _show_facts(result)
    sys.exit(0 if result.ok else 1)
