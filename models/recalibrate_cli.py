"""``octick model recalibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from feeds.output import JSON
from models.extra import need_models_extra

if TYPE_CHECKING:
    from models.recalibrate import Recalibration


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--tape",
    "tapes",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A recent tape, the one of a running daemon too; may be given several times.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of the candidate; there must be none yet.",
)
@click.option(
    "--calibration-set",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File (.npz) that keeps recent and older rows from one recalibration to the next.",
)
@click.option(
    "--rows",
    type=click.IntRange(1_000, 10_000_000),
    default=65_536,
    show_default=True,
    help="Tradable rows taken from the end of the tapes; 1.7 kB of memory each.",
)
@click.option(
    "--half-life-h",
    type=click.FloatRange(1e-3, 100_000.0),
    default=24.0,
    show_default=True,
    help="Hours of event time after which a row is half as likely to be kept.",
)
@click.option(
    "--max-agreement-loss",
    type=click.FloatRange(0.0, 1.0),
    default=0.005,
    show_default=True,
    help="Share of rows that INT8's agreement with FP32 may fall by.",
)
@click.option(
    "--max-latency-ratio",
    type=click.FloatRange(0.0, 1_000.0),
    default=0.0,
    help="Refuse a candidate whose inference takes longer by more; 0 only reports it.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@JSON
def recalibrate(
    bundle: Path,
    tapes: tuple[Path, ...],
    out: Path,
    calibration_set: Path | None,
    rows: int,
    half_life_h: float,
    max_agreement_loss: float,
    max_latency_ratio: float,
    seed: int,
    as_json: bool,
) -> None:
    """Quantise BUNDLE's own weights again, with ranges from recent tapes.

    The candidate is verified in three levels and compared with BUNDLE on recent rows that it was
    not calibrated from. Where it fails or is worse nothing is written, and the exit code is 1.
    """
    import msgspec

    from feeds.progress import stages

    need_models_extra("octick model recalibrate")
    from models.recalibrate import Request, load_parent
    from models.recalibrate import recalibrate as made
    from models.serving_comparison import Limits

    request = Request(
        rows=rows,
        calibration_set=calibration_set,
        half_life_ns=round(half_life_h * 3_600_000_000_000),
        seed=seed,
        limits=Limits(max_agreement_loss=max_agreement_loss, max_latency_ratio=max_latency_ratio),
    )
    with stages() as progress:
        found = made(load_parent(bundle), tapes, out, request, progress)
    if as_json:
        click.echo(msgspec.json.encode(found).decode())
    elif found.comparison is not None:
        _print_comparison(found)
    if not found.ok:
        if not as_json:
            click.secho(f"refused: {'; '.join(found.refused)}", fg="red", err=True)
        click.get_current_context().exit(1)
    if not as_json:
        click.echo(f"{found.bundle}: model {found.model_hash}, {found.name}")
        if found.unchanged:
            click.echo("every range came out as it was: the candidate computes the same bits")


def _print_comparison(found: Recalibration) -> None:
    from rich.table import Table

    from feeds.output import wide_console

    comparison = found.comparison
    assert comparison is not None
    table = Table(
        "on held-out rows",
        "serving",
        "candidate",
        title=f"{comparison.rows:,} of {found.rows:,} recent rows",
    )
    both = comparison.serving, comparison.candidate
    for name, key, form in (
        ("INT8 agrees with FP32", "agreement", "{:.2%}"),
        ("saturated codes", "saturation", "{:.3%}"),
        ("value checks, rows", "violations", "{}"),
        ("accuracy INT8", "int8_accuracy", "{:.2%}"),
        ("accuracy FP32", "fp32_accuracy", "{:.2%}"),
        ("p50, us", "p50_us", "{:.1f}"),
        ("p99, us", "p99_us", "{:.1f}"),
    ):
        table.add_row(name, *(form.format(getattr(standing, key)) for standing in both))
    for name in comparison.serving.divergence:
        values = [f"{standing.divergence[name]:.4g}" for standing in both]
        table.add_row(f"divergence of a score, {name}", *values)
    console = wide_console()
    console.print(table)
    failed = sum(not check.ok for check in found.checks)
    console.print(f"{len(found.checks)} checks in three levels, {failed} fail")
