"""``octick model train`` and ``octick model reference``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from feeds.output import JSON
from models.extra import need_models_extra


def _trigger(context: click.Context, parameter: click.Parameter, value: str) -> dict[str, Any]:
    kind, _, number = value.partition(":")
    key = {"events": "every_events", "time": "every_ns"}.get(kind)
    if kind == "top-of-book" and not number:
        return {}
    if key is None or not number.isdigit() or int(number) == 0:
        raise click.BadParameter("expected top-of-book, events:COUNT or time:NANOSECONDS")
    return {"kind": kind, key: int(number)}


@click.command()
@click.option(
    "--tape",
    "tapes",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A tape to learn from; may be given several times.",
)
@click.option(
    "--simulate", type=click.IntRange(min=1), help="Messages of the built-in market, for no tape."
)
@click.option(
    "--signal-strength",
    type=click.FloatRange(0.0, 1.0),
    default=1.0,
    show_default=True,
    help="Of the simulated market's planted signal; at 0 there is nothing to find.",
)
@click.option("--arch", required=True, help="One of the architectures below.")
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--horizon", type=click.IntRange(1, 100_000), default=100, show_default=True, help="Signals."
)
@click.option(
    "--label",
    type=click.Choice(["smoothed", "fixed", "triple-barrier"]),
    default="smoothed",
    show_default=True,
    help="Mean of the next mids; the mid after the horizon; the barrier touched first.",
)
@click.option(
    "--threshold",
    type=click.FloatRange(min=0.0),
    help="Half ticks that count as flat, or the barrier; by default classes come out even.",
)
@click.option("--epochs", type=click.IntRange(1, 10_000), default=4, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True)
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0.0, min_open=True),
    default=2e-3,
    show_default=True,
)
@click.option("--rows-a-batch", type=click.IntRange(1, 1_000_000), default=1_024, show_default=True)
@click.option("--validation-share", type=click.FloatRange(0.01, 0.5), default=0.1)
@click.option(
    "--test-share",
    type=click.FloatRange(0.01, 0.9),
    default=0.2,
    show_default=True,
    help="The last part of the session, by time.",
)
@click.option("--embargo-ns", type=click.IntRange(min=0), help="Pause before each later part.")
@click.option("--max-levels", type=click.IntRange(min=10), default=16_384, show_default=True)
@click.option(
    "--trigger",
    callback=_trigger,
    default="top-of-book",
    show_default=True,
    help="When a row is taken: top-of-book, events:COUNT, time:NANOSECONDS.",
)
@JSON
def train(
    tapes: tuple[Path, ...], simulate: int | None, out: Path, as_json: bool, **options: Any
) -> None:
    """Make a data set of tapes with the engine's own features, and train a network on it.

    \b
    linear     logistic regression, the baseline
    mlp        features → 64 → 32, no state
    tcn        temporal convolutions, 4 residual blocks, 61 steps
    lstm, gru  one layer of 64 units
    deeplob    DeepLOB: convolutions, inception, LSTM of 64 units
    attention  self-attention over 32 steps

    Interrupted, the same command goes on after the last whole epoch, to the same result.
    """
    import msgspec

    from engine.config import TriggerConfig
    from feeds.progress import stages

    need_models_extra("octick model train")
    from models.train_run import Request, train_run

    if bool(tapes) == (simulate is not None):
        raise click.UsageError("name tapes with --tape, or a length with --simulate")
    if options["validation_share"] + options["test_share"] > 0.9:
        raise click.UsageError("--validation-share and --test-share leave too little to train on")
    request = Request(
        tapes=tuple(str(path.resolve()) for path in tapes),
        simulate=simulate or 0,
        **options | {"trigger": TriggerConfig(**options["trigger"])},
    )
    with stages() as progress:
        record = train_run(request, out, progress)
    if as_json:
        click.echo(msgspec.json.encode(record).decode())
        return
    _print_run(out, record)


def _print_run(out: Path, record: Any) -> None:
    from rich.table import Table

    from feeds.output import wide_console

    table = Table("on the test part", record.spec.arch, "logistic", title=str(out))
    ours, linear = record.metrics, record.baselines["logistic"]
    for name, key, form in (
        ("rows", "rows", "{:,}"),
        ("accuracy", "accuracy", "{:.2%}"),
        ("balanced accuracy", "balanced_accuracy", "{:.2%}"),
        ("F1, macro", "macro_f1", "{:.4f}"),
        ("calibration error", "calibration_error", "{:.4f}"),
        ("log loss, nats", "log_loss", "{:.4f}"),
        ("information coefficient", "information_coefficient", "{:.4f}"),
    ):
        table.add_row(name, form.format(ours[key]), form.format(linear[key]))
    for name, key, form in (
        ("followed, gross half ticks", "gross_half_ticks", "{:,.0f}"),
        ("its cost", "cost_half_ticks", "{:,.0f}"),
        ("net", "net_half_ticks", "{:,.0f}"),
        ("Sharpe a signal, net", "sharpe_a_signal", "{:.4f}"),
    ):
        values = [form.format(found["following"][key]) for found in (ours, linear)]
        table.add_row(name, *values)
    table.add_row("most frequent class alone", f"{ours['majority']:.2%}", "")
    if record.optimum_accuracy is not None:
        table.add_row("optimum of the simulated market", f"{record.optimum_accuracy:.2%}", "")
    wide_console().print(table)


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
@JSON
def reference(
    out: Path | None,
    messages: int | None,
    seed: int | None,
    signal_strength: float,
    epochs: int | None,
    as_json: bool,
) -> None:
    """Rebuild the reference model from simulated data: train, quantise, verify, write.

    Needs the extra "models". Exits with 1, and writes nothing, if a check fails.
    """
    import msgspec

    from feeds.progress import stages

    need_models_extra("octick model reference")
    from models import reference as made

    with stages() as progress:
        try:
            report = made.build(
                made.DEFAULT_OUT if out is None else out,
                messages=made.MESSAGES if messages is None else messages,
                seed=made.SEED if seed is None else seed,
                signal_strength=signal_strength,
                epochs=made.EPOCHS if epochs is None else epochs,
                progress=progress,
            )
        except made.CheckFailed as error:
            click.secho(f"check failed: {error}", fg="red", err=True)
            raise SystemExit(1) from None
    if as_json:
        click.echo(msgspec.json.encode(report).decode())
        return
    _print_run(Path(report.bundle), report.run)
    from models.bundle_cli import print_made

    print_made(report.made)
