"""Commands on tapes and feeds: ``octick tape …`` and ``octick publish``."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

TAPE = click.Path(path_type=Path)
PIPE_COLUMNS = 200
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
TRUNCATED = click.option(
    "--allow-truncated",
    is_flag=True,
    help="Take a tape without an END record up to its last whole record.",
)
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace what exists already.")


def print_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    click.echo(json.dumps(value, separators=(", ", ": ")))


def wide_console() -> Any:
    """A console for tables: where stdout is no terminal no column is cut to its 80 characters."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=PIPE_COLUMNS)


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
        print_json({**found, **found.pop("counts")})
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


@click.command()
@click.argument("source", metavar="sim|FILE")
@click.option(
    "--bind",
    "bind_to",
    default="tcp://127.0.0.1:5555",
    show_default=True,
    metavar="ENDPOINT",
    help="Where subscribers connect; tcp://127.0.0.1:* takes a free port.",
)
@click.option(
    "--snapshots",
    default="tcp://127.0.0.1:5556",
    show_default=True,
    metavar="ENDPOINT",
    help="Where late joiners ask for a book; 'none' for no service.",
)
@click.option(
    "--speed",
    default="1",
    show_default=True,
    metavar="FACTOR|max",
    help="1 as recorded, 2 twice as fast, max without waiting (and without loss).",
)
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), help="Of source time.")
@click.option("--messages", type=click.IntRange(min=1), help="Stop after so many.")
@click.option(
    "--instruments",
    type=click.IntRange(1, 1024),
    default=4,
    show_default=True,
    help="Of the simulator.",
)
@click.option(
    "--rate",
    type=float,
    default=250.0,
    show_default=True,
    help="Simulator: events a second of each instrument.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Of simulator and faults.",
)
@click.option(
    "--signal-strength",
    type=click.FloatRange(0, 1),
    default=1.0,
    show_default=True,
    help="Simulator: of the planted signal; 0 switches it off.",
)
@click.option(
    "--fault",
    "faults",
    multiple=True,
    metavar="KIND:RATE[:SYMBOL]",
    help="Inject drop, duplicate, reorder, reset, cross or stall; again for more. "
    "KIND:@N[,N...] names messages instead of a rate.",
)
@click.option("--venue", help="FILE is a raw recording of this venue: convert it first.")
@click.option("--symbol", help="With --venue: the instrument, where the recording does not say.")
@click.option("--loop", is_flag=True, help="Start FILE over at its end.")
@click.option(
    "--wait-subscribers",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Begin only when N subscribers are there.",
)
@click.option("--keep-epoch", is_flag=True, help="Leave the epochs of FILE as they are.")
@click.option("--stamp", is_flag=True, help="Write the time of sending into each message.")
@click.option("--precise", is_flag=True, help="Spin through the last 50 us before a message.")
@JSON
def publish(
    source: str,
    bind_to: str,
    snapshots: str,
    speed: str,
    seconds: float | None,
    messages: int | None,
    instruments: int,
    rate: float,
    seed: int,
    signal_strength: float,
    faults: tuple[str, ...],
    venue: str | None,
    symbol: str | None,
    loop: bool,
    wait_subscribers: int,
    keep_epoch: bool,
    stamp: bool,
    precise: bool,
    as_json: bool,
) -> None:
    """Put the simulator, a tape or a raw recording on ZeroMQ, with a snapshot service.

    SOURCE is 'sim', a .tape or .tape.zst, or with --venue a raw recording.
    """
    import tempfile

    import msgspec

    from feeds.faults import parse_fault
    from feeds.publish_view import publish_view, stopped_by_signals
    from feeds.publisher import MAX_SPEED, Publisher
    from feeds.simulator import Simulator

    try:
        factor = MAX_SPEED if speed == "max" else float(speed)
        if speed != "max" and not 0 < factor < float("inf"):
            raise ValueError
    except ValueError:
        raise click.BadParameter(f"{speed!r} is no positive number nor 'max'") from None
    if source == "sim" and (loop or venue):
        raise click.UsageError("--loop and --venue go with a file: the simulator never ends")
    parsed = [parse_fault(text) for text in faults]
    with tempfile.TemporaryDirectory(prefix="octick-") as folder:
        opened: Simulator | Path = Path(source)
        if source == "sim":
            opened = Simulator(seed, instruments, rate_hz=rate, signal_strength=signal_strength)
        elif venue:
            from feeds.venues.convert import convert

            opened = Path(folder) / "converted.tape"
            convert(Path(source), venue, symbol=symbol, out=opened)
        with publish_view(as_json) as view:
            publisher = Publisher(
                opened,
                bind_to,
                None if snapshots == "none" else snapshots,
                speed=factor,
                messages=messages,
                seconds=seconds,
                keep_epoch=keep_epoch,
                loop=loop,
                stamp=stamp,
                precise=precise,
                faults=parsed,
                fault_seed=seed,
                on_progress=view,
            )
            click.echo(
                f"publishing {source} on {publisher.endpoint}"
                + (f", snapshots on {publisher.snapshot_endpoint}" if snapshots != "none" else ""),
                err=True,
            )
            with stopped_by_signals(publisher):
                if wait_subscribers:
                    publisher.wait_subscribers(wait_subscribers)
                totals = publisher.run()
    if as_json:
        print_json(msgspec.to_builtins(totals))
        return
    click.echo(
        f"{totals.messages:,} messages, {totals.bytes:,} bytes in {totals.seconds:,.3f} s: "
        f"{totals.rate:,.0f} messages/s; {totals.snapshots_served:,} snapshots served"
        + "".join(f"; {kind} {count:,}" for kind, count in totals.faults.items())
    )
