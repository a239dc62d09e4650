"""``octick model …``: making and measuring models."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the bundle; models/reference by default.",
)
@click.option("--messages", type=click.IntRange(min=1), help="Length of the simulated session.")
@click.option("--seed", type=click.IntRange(min=0), help="Of the market and of the training.")
@click.option(
    "--signal-strength",
    type=click.FloatRange(0.0, 1.0),
    default=1.0,
    show_default=True,
    help="Of the planted signal; at 0 there is nothing to find.",
)
@click.option("--epochs", type=click.IntRange(min=1), help="Passes over the training rows.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def reference(
    out: Path | None,
    messages: int | None,
    seed: int | None,
    signal_strength: float,
    epochs: int | None,
    as_json: bool,
) -> None:
    """Rebuild the reference model from simulated data: train, quantise, check, write.

    Needs the extra "models". Exits with 1, and writes nothing, if INT8 and FP32 agree too rarely.
    """
    import msgspec
    from rich.console import Console
    from rich.table import Table

    from feeds.errors import InputError

    try:
        import onnx  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise InputError(
            'the extra "models" is not installed',
            where="octick model reference",
            expected="torch and onnx",
            found=str(error),
            fix="pip install 'octick[models]'",
        ) from None
    from models import reference as made

    console = Console(stderr=True)
    with console.status("starting") as status:
        try:
            report = made.build(
                made.DEFAULT_OUT if out is None else out,
                messages=made.MESSAGES if messages is None else messages,
                seed=made.SEED if seed is None else seed,
                signal_strength=signal_strength,
                epochs=made.EPOCHS if epochs is None else epochs,
                on_stage=status.update,
            )
        except made.CheckFailed as error:
            console.print(f"check failed: {error}", style="red", highlight=False)
            raise SystemExit(1) from None
    if as_json:
        click.echo(msgspec.json.encode(report).decode())
        return
    table = Table("measured on later rows", "int8", "fp32", title=report.bundle)
    for field in report.int8.__struct_fields__:
        table.add_row(
            field, f"{getattr(report.int8, field):.2%}", f"{getattr(report.fp32, field):.2%}"
        )
    table.add_row("agreement", f"{report.agreement:.2%}", "")
    table.add_row("optimum of the simulated market", f"{report.optimum_accuracy:.2%}", "")
    table.add_row("most frequent class alone", f"{report.majority_accuracy:.2%}", "")
    Console().print(table)
    click.echo(f"model {report.model_hash}, {report.bundle_bytes} bytes")
