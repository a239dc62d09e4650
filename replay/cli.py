"""Commands of replay: ``octick replay``, ``octick why`` and ``octick tape check``."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from replay.session import Report


def _speed(context: click.Context, parameter: click.Parameter, value: str) -> float:
    if value == "max":
        return 0.0
    try:
        speed = float(value)
    except ValueError:
        speed = -1.0
    if not 0 < speed < float("inf"):
        raise click.BadParameter("expected 'max' or a positive number, such as 1 or 0.5")
    return speed


@click.command()
@click.argument(
    "tapes", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="TAPE..."
)
@click.option("--model", type=click.Path(path_type=Path), help="Model bundle (a folder).")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="Default: what the tape recorded, else the default over its instruments.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Write the signals as Parquet.")
@click.option("--verify", is_flag=True, help="Compare with the signals recorded on the tape.")
@click.option("--no-inference", is_flag=True, help="Book, features and triggers alone.")
@click.option("--backend", help="What runs the model. Default: what the config says.")
@click.option("--device", help="Of the backend. Default: the config's, or the backend's first.")
@click.option("--threads", type=click.IntRange(1, 256), help="Of the model's runtime.")
@click.option(
    "--speed", callback=_speed, default="max", show_default=True, help="'max', or times the pace."
)
@click.option(
    "--evidence",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for an evidence file of each move between INT8, FP32 and HALTED.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing --out.")
@click.option(
    "--allow-truncated",
    is_flag=True,
    help="Take a tape without an END record up to its last whole record.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def replay(
    tapes: tuple[Path, ...],
    model: Path | None,
    config: Path | None,
    out: Path | None,
    verify: bool,
    no_inference: bool,
    backend: str | None,
    device: str | None,
    threads: int | None,
    speed: float,
    evidence: Path | None,
    overwrite: bool,
    allow_truncated: bool,
    as_json: bool,
) -> None:
    """Run the engine over recorded tapes, without ZeroMQ in between.

    Several tapes are merged by receive time, in whatever order they are named. With --verify it
    exits with 1 unless every recorded signal comes out again, byte for byte.
    """
    import msgspec

    from feeds.progress import progress
    from replay.session import replay_tapes

    if verify and len(tapes) > 1:
        raise click.UsageError("--verify takes one tape: each has the signals of its own session")
    if verify and no_inference:
        raise click.UsageError("--verify needs inference")
    with ExitStack() as stack:
        report = replay_tapes(
            tapes,
            model=model,
            config=config,
            out=out,
            inference=not no_inference,
            backend=backend,
            device=device,
            threads=threads,
            speed=speed,
            verify=verify,
            evidence=evidence,
            overwrite=overwrite,
            allow_truncated=allow_truncated,
            watch=lambda size: stack.enter_context(progress("replaying", size)),
        )
    if as_json:
        click.echo(msgspec.json.encode(report).decode())
    else:
        _print_report(report)
    if report.interrupted:
        click.get_current_context().exit(130)
    if report.verification is not None and not report.verification.ok:
        click.get_current_context().exit(1)


def _print_report(report: Report) -> None:
    from rich.table import Table

    from feeds.output import wide_console

    console = wide_console()
    table = Table.grid(padding=(0, 2))
    suppressed = ", ".join(f"{name} {n:,}" for name, n in report.suppressed.items() if n)
    for name, value in (
        ("messages", f"{report.messages:,}"),
        ("book levels", f"{report.book_levels:,}"),
        ("gaps, lost", f"{report.gaps:,}, {report.lost:,}"),
        ("signals", f"{report.signals:,}"),
        ("tradable", f"{report.tradable:,}"),
        ("suppressed", suppressed or "none"),
        ("time", f"{report.seconds:,.3f} s"),
        ("rate", f"{report.messages_per_s:,.0f} messages/s"),
        ("model", report.model_hash),
        ("config", report.config_hash),
        ("features", report.feature_hash),
        ("digest", report.digest),
    ):
        table.add_row(f"[bold]{name}[/]", value)
    console.print(table)
    if report.out:
        console.print(f"signals written to {report.out}")
    if report.interrupted:
        console.print("[bold]interrupted[/]: the figures are those of what was replayed")
    if report.truncated:
        console.print("a tape had no END record: replayed up to its last whole record")
    verification = report.verification
    if verification is None:
        return
    first = verification.first_difference
    if verification.ok:
        console.print(f"[bold]verified[/]: {verification.recorded:,} recorded signals, 0 differ")
    elif first is None:
        console.print("[bold]not verified[/]: the tape has no recorded signals")
    else:
        console.print(
            f"[bold]{verification.differing:,} signals differ[/] "
            f"({verification.recorded:,} recorded, {verification.replayed:,} replayed); "
            f"first: signal {first.index}, {first.venue} {first.symbol}, "
            f"signal_seq {first.signal_seq}"
        )
        fields = Table("field", "recorded", "replayed")
        for item in first.fields:
            fields.add_row(item.field, str(item.recorded), str(item.replayed))
        console.print(fields)


@click.command()
@click.argument("signal_id", metavar="SIGNAL_ID")
@click.option("--tape", required=True, type=click.Path(path_type=Path), help="Where it stands.")
@click.option("--model", type=click.Path(path_type=Path), help="Model bundle (a folder).")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="Default: what the tape recorded, else the default over its instruments.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def why(signal_id: str, tape: Path, model: Path | None, config: Path | None, as_json: bool) -> None:
    """Tell the whole story of a signal: SIGNAL_ID is venue.symbol/signal_seq.

    The tape is replayed up to the signal. Printed are the signal and whether it was recorded so,
    the rules that it passed or not, its inputs, book, messages, times, model and config, and what
    moved the engine before it. With epoch: before the SIGNAL_ID the tape's engine epoch has to
    match. A tape that is still being written is taken up to its last whole record.
    """
    import msgspec

    from feeds.output import wide_console
    from feeds.progress import progress
    from replay.why import why as tell_of

    with ExitStack() as stack:
        story = tell_of(
            signal_id,
            tape,
            model=model,
            config=config,
            watch=lambda size: stack.enter_context(progress("replaying", size)),
        )
    if as_json:
        click.echo(msgspec.json.encode(story).decode())
    else:
        from replay.why_tables import show

        show(story, wide_console())


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--venue",
    required=True,
    type=click.Choice(["binance-usdm", "binance-coinm", "binance-spot", "lobster"]),
    help="Whose recording it is.",
)
@click.option("--symbol", help="The instrument, where the recording holds several.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(file: Path, venue: str, symbol: str | None, as_json: bool) -> None:
    """Rebuild the book from a raw recording and hold it against the recording's own statement.

    Binance: bookTicker. LOBSTER: the orderbook file beside the message file. Exits with 1 where a
    comparison differs, the book crosses, the recording has a hole, or nothing could be compared.
    """
    import msgspec

    from feeds.progress import progress
    from replay.check import check as check_recording

    with progress("checking", file.stat().st_size if file.is_file() else 0) as update:
        verdict = check_recording(file, venue, symbol=symbol, progress=update)
    if as_json:
        found = msgspec.to_builtins(verdict)
        counts = found.pop("counts")
        click.echo(msgspec.json.encode(found | counts).decode())
    else:
        click.echo(
            f"{file}: {verdict.venue} {verdict.symbol}: {verdict.updates:,} updates, "
            f"{verdict.equal:,} of {verdict.compared:,} comparisons equal, "
            f"{verdict.crossed:,} crossed, {verdict.gaps:,} gaps"
        )
        first = verdict.first_difference
        if first is not None:
            click.echo(f"line {first.line}: expected {first.expected}, found {first.found}")
    if not verdict.ok:
        click.get_current_context().exit(1)
