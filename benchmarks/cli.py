"""``octick demo`` and ``octick bench …``. Heavy imports stand inside the functions."""

from __future__ import annotations

import sys
from pathlib import Path

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
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def replay(tape: Path | None, runs: int, model: Path | None, as_json: bool) -> None:
    """Book levels, messages and signals a second, on one core.

    Without TAPE on the recording in OCTICK_DATA, or on a simulated market where there is none.
    """
    import msgspec
    from rich.console import Console

    from benchmarks.replay import REFERENCE, bench_replay, show

    console = Console(stderr=True)
    with console.status("measuring") as status:
        result = bench_replay(tape, runs=runs, model=model or REFERENCE, progress=status.update)
    if as_json:
        click.echo(msgspec.json.encode(result).decode())
    else:
        show(result)


@click.command("compile")
def compile_kernels() -> None:
    """Compile every native kernel now, so that no first run has to wait for it.

    The result is cached for this machine and this state of the sources; a second call returns at
    once. Worth a line in an image's build.
    """
    import importlib
    import time

    from rich.console import Console

    from feeds.compile_cache import kernel_sources

    started = time.monotonic()
    root = Path(__file__).resolve().parent.parent
    with Console(stderr=True).status("compiling") as status:
        for name in kernel_sources(root):
            module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            status.update(f"compiling {module}")
            importlib.import_module(module)
    click.echo(f"compiled in {time.monotonic() - started:.1f} s", err=True)
