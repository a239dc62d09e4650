"""Commands on tapes: ``octick tape …``. Heavy imports stand inside the functions."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from feeds.output import JSON, print_json, wide_console

TAPE = click.Path(path_type=Path)
TRUNCATED = click.option(
    "--allow-truncated",
    is_flag=True,
    help="Take a tape without an END record up to its last whole record.",
)
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace what exists already.")


def _time(ns: int) -> str:
    if ns <= 0:
        return "-"
    whole = datetime.fromtimestamp(ns // 1_000_000_000, tz=UTC)
    return f"{whole:%Y-%m-%d %H:%M:%S}.{ns % 1_000_000_000:09d}Z"


@click.command()
@click.argument("file", type=TAPE)
@click.option(
    "--venue",
    required=True,
    type=click.Choice(["binance-usdm", "binance-coinm", "binance-spot", "lobster"]),
    help="Whose recording it is.",
)
@click.option("--symbol", help="The instrument, where the recording holds several.")
@click.option("--tick", help="Price step as an exact decimal. Default: found from the data.")
@click.option("--lot", help="Quantity step as an exact decimal. Default: found from the data.")
@click.option("--out", type=TAPE, help="Default: beside FILE, under its name.")
@click.option("--seal", "sealed", is_flag=True, help="Compress the finished tape.")
@OVERWRITE
@JSON
def convert(
    file: Path,
    venue: str,
    symbol: str | None,
    tick: str | None,
    lot: str | None,
    out: Path | None,
    sealed: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Convert a raw recording to a tape.

    For LOBSTER, FILE is the message file; the orderbook file stands beside it.
    """
    import msgspec

    from feeds.progress import progress
    from feeds.venues.convert import convert as convert_recording

    with progress("converting", file.stat().st_size if file.is_file() else 0) as update:
        done = convert_recording(
            file,
            venue,
            symbol=symbol,
            tick=tick,
            lot=lot,
            out=out,
            overwrite=overwrite,
            seal=sealed,
            progress=update,
        )
    if as_json:
        found = msgspec.to_builtins(done)
        counts = found.pop("counts")
        print_json(found | counts)
        return
    click.echo(
        f"{done.tape}: {done.venue} {done.symbol}, tick {done.tick}, lot {done.lot}: "
        f"{done.lines:,} lines to {done.messages:,} messages ({done.snapshots:,} snapshots, "
        f"{done.deltas:,} deltas, {done.trades:,} trades, {done.gaps:,} gaps) "
        f"in {done.seconds:.2f} s, {done.lines_per_s:,.0f} lines/s"
    )
    odd = {name: n for name, n in done.counts.items() if n}
    if odd:
        click.echo(
            "also: " + ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in odd.items())
        )


@click.command()
@click.argument("file", type=TAPE)
@JSON
def info(file: Path, as_json: bool) -> None:
    """Say what a tape holds: instruments, counts, times, rate, size."""
    from feeds.progress import progress
    from feeds.tape_info import summarise

    with progress("reading", file.stat().st_size if file.is_file() else 0) as tick:
        found = summarise(file, tick=tick)
    if as_json:
        print_json(found)
        return
    from rich.table import Table

    console = wide_console()
    state = "sealed" if found["sealed"] else "raw"
    if found["truncated"]:
        state += f", cut short at byte {found['truncated_at']}"
    facts = Table.grid(padding=(0, 2))
    for name, value in (
        ("file", str(file)),
        ("state", state),
        ("size", f"{found['bytes']:,} bytes"),
        ("source", found["source"]),
        ("created", _time(found["created_ns"])),
        ("first event", _time(found["first_recv_ns"])),
        ("last event", _time(found["last_recv_ns"])),
        ("duration", f"{found['duration_s']:,.3f} s"),
        ("rate", f"{found['messages_per_s']:,.0f} messages/s"),
        ("records", f"{found['records']:,}"),
        ("kinds", ", ".join(f"{name} {n:,}" for name, n in found["kinds"].items())),
        ("templates", ", ".join(f"{name} {n:,}" for name, n in found["templates"].items())),
        ("levels", f"{found['levels']:,}"),
        ("signals", f"{found['signals']:,}, {found['tradable']:,} tradable"),
        ("malformed", f"{found['malformed']:,}"),
        ("config", "recorded" if found["config"] is not None else "none"),
        *((f"hash {name}", value) for name, value in found["hashes"].items()),
    ):
        facts.add_row(f"[bold]{name}[/]", value)
    console.print(facts)
    columns = ("messages", "snapshots", "deltas", "trades", "levels", "epochs", "signals")
    table = Table("venue", "symbol", "tick", "lot", *columns)
    for item in found["instruments"]:
        table.add_row(
            item["venue"],
            item["symbol"],
            item["tick"],
            item["lot"],
            *(f"{item[name]:,}" for name in columns),
        )
    console.print(table)


@click.command()
@click.argument("file", type=TAPE)
@JSON
def verify(file: Path, as_json: bool) -> None:
    """Check every record of a tape: checksums, order of times, END record.

    Exits with 1 where it finds damage, and names the first bad record.
    """
    import msgspec

    from feeds.progress import progress
    from feeds.tape_info import verify as verify_tape

    with progress("verifying", file.stat().st_size if file.is_file() else 0) as tick:
        verdict = verify_tape(file, tick=tick)
    if as_json:
        print_json(msgspec.to_builtins(verdict))
    elif verdict.fault is None:
        click.echo(f"{file}: {verdict.records:,} records, all good")
    else:
        fault = verdict.fault
        click.echo(
            f"{file}: record {fault.index} at byte {fault.offset}: {fault.what}; "
            f"the {verdict.records} records before it are good"
        )
    if not verdict.ok:
        click.get_current_context().exit(1)


@click.command()
@click.argument("a", type=TAPE)
@click.argument("b", type=TAPE)
@click.option("--kind", type=click.Choice(["market", "signal"]), help="Compare only these records.")
@click.option(
    "--ignore-receive-time", is_flag=True, help="Look at no wall-clock time of the recorder."
)
@TRUNCATED
@JSON
def diff(
    a: Path,
    b: Path,
    kind: str | None,
    ignore_receive_time: bool,
    allow_truncated: bool,
    as_json: bool,
) -> None:
    """Name the first record in which two tapes differ; exits with 1 if they do."""
    import msgspec

    from feeds import tape
    from feeds.progress import progress
    from feeds.tape_diff import ANY_KIND
    from feeds.tape_diff import diff as diff_tapes

    kinds = {"market": tape.MARKET, "signal": tape.SIGNAL}
    with progress("comparing", a.stat().st_size if a.is_file() else 0) as tick:
        found = diff_tapes(
            a,
            b,
            kind=kinds[kind] if kind else ANY_KIND,
            ignore_receive_time=ignore_receive_time,
            allow_truncated=allow_truncated,
            tick=tick,
        )
    if as_json:
        print_json(msgspec.to_builtins(found))
    elif found.difference is None:
        header = "" if found.same_header else "; only their headers differ"
        click.echo(f"{found.records:,} records, no difference{header}")
    else:
        _print_difference(found)
    if not found.equal:
        click.get_current_context().exit(1)


def _print_difference(found: Any) -> None:
    from rich.table import Table

    first = found.difference
    places = (
        "ended before it" if offset is None else f"byte {offset}"
        for offset in (first.offset_a, first.offset_b)
    )
    click.echo(f"record {first.index} differs: {found.a} {next(places)}, {found.b} {next(places)}")
    table = Table("field", "a", "b")
    for item in first.fields:
        table.add_row(item.field, str(item.a), str(item.b))
    wide_console().print(table)


@click.command()
@click.argument("file", type=TAPE)
@click.option(
    "--out", required=True, type=TAPE, help="A folder, or one file that ends in .parquet."
)
@click.option(
    "--table",
    type=click.Choice(["book", "trades", "signals"]),
    default="book",
    show_default=True,
    help="What goes into a single file.",
)
@OVERWRITE
@TRUNCATED
@JSON
def export(
    file: Path, out: Path, table: str, overwrite: bool, allow_truncated: bool, as_json: bool
) -> None:
    """Write a tape as Parquet: level updates, trades and signals."""
    import msgspec

    from feeds.progress import progress
    from feeds.tape_export import export as export_tape

    with progress("exporting", file.stat().st_size if file.is_file() else 0) as tick:
        done = export_tape(
            file,
            out,
            table=table,
            overwrite=overwrite,
            allow_truncated=allow_truncated,
            tick=tick,
        )
    if as_json:
        print_json(msgspec.to_builtins(done))
        return
    for name, path in done.files.items():
        click.echo(f"{path}: {done.rows[name]:,} rows")
    if done.skipped:
        click.echo(f"{done.skipped:,} malformed messages skipped")


@click.command()
@click.argument("file", type=TAPE)
@click.option("--out", type=TAPE, help="Default: FILE with .zst behind.")
@click.option("--keep", is_flag=True, help="Keep the raw tape.")
@OVERWRITE
@JSON
def seal(file: Path, out: Path | None, keep: bool, overwrite: bool, as_json: bool) -> None:
    """Compress a finished tape with zstd; `zstd -d` gives back the same bytes.

    The raw tape goes only after the sealed one is compared with it byte for byte.
    """
    import msgspec

    from feeds.progress import progress
    from feeds.tape_seal import seal_tape

    with progress("sealing", 2 * file.stat().st_size if file.is_file() else 0) as tick:
        done = seal_tape(file, out, keep=keep, overwrite=overwrite, tick=tick)
    if as_json:
        print_json(msgspec.to_builtins(done))
        return
    ratio = done.raw_bytes / max(done.sealed_bytes, 1)
    click.echo(
        f"{done.target}: {done.sealed_bytes:,} bytes, {ratio:.1f} times smaller"
        + ("" if done.kept else f"; {done.source} removed")
    )
