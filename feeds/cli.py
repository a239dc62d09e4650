"""``octick publish``. Heavy imports stand inside the function."""

from __future__ import annotations

from pathlib import Path

import click

from feeds.output import JSON, print_json


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
