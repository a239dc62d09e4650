"""``octick bench inference``, ``crossover``, ``features``: parts of the hot path on their own.

Heavy imports stand inside the functions.
"""

from __future__ import annotations

import click


@click.command()
@click.option(
    "--arch",
    "archs",
    multiple=True,
    help="Repeatable. [default: mlp, tcn, lstm, gru, deeplob, attention]",
)
@click.option(
    "--runs",
    type=click.IntRange(1, 2_000),
    default=50,
    show_default=True,
    help="Blocks of each cell, in turn.",
)
@click.option("--crossover/--no-crossover", default=True, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inference(archs: tuple[str, ...], runs: int, crossover: bool, as_json: bool) -> None:
    """One step of every architecture, INT8 and FP32, in every runtime, and the crossover.

    Untrained networks, batch 1, timed in turn in one process: the compiled backend, ONNX Runtime,
    OpenVINO and torch.compile. The crossover is the size from which on INT8 is faster than FP32.
    """
    import msgspec

    from benchmarks.crossover import WIDTHS
    from benchmarks.inference import ARCHITECTURES, bench_inference, show
    from feeds.progress import stages

    with stages() as progress:
        result = bench_inference(
            archs or ARCHITECTURES, runs, WIDTHS if crossover else (), progress=progress
        )
    if as_json:
        click.echo(msgspec.json.encode(result).decode())
    else:
        show(result)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def crossover(as_json: bool) -> None:
    """From how many parameters on INT8 is faster than FP32 on this machine.

    In ONNX Runtime, and in the compiled backend against ONNX Runtime's FP32.
    """
    import msgspec

    from benchmarks.crossover import bench_crossover, show
    from feeds.progress import stages

    with stages() as progress:
        result = bench_crossover(progress=progress)
    if as_json:
        click.echo(msgspec.json.encode(result).decode())
    else:
        show(result)


@click.command()
@click.option("--runs", type=click.IntRange(1, 1_000), default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def features(runs: int, as_json: bool) -> None:
    """Nanoseconds an update of all features, and of each stage that makes some of them.

    On the recording in OCTICK_DATA, or on a simulated market where there is none.
    """
    import msgspec

    from benchmarks.features import bench_features, show
    from feeds.progress import stages

    with stages() as progress:
        result = bench_features(runs, progress=progress)
    if as_json:
        click.echo(msgspec.json.encode(result).decode())
    else:
        show(result)
