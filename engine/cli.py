"""The engine's commands. Heavy imports stand inside the functions, so that --help is quick."""

from __future__ import annotations

import click


@click.command()
@click.argument("endpoint")
@click.option(
    "--topic",
    "topics",
    multiple=True,
    metavar="T",
    help="Topic prefix: signal., signal.sim.ALPHA, state., alert. Repeatable. [default: signal.]",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.option(
    "--refuse-conflicts",
    is_flag=True,
    help="Where two engines publish one instrument, show the one heard first alone.",
)
@click.option("--count", type=click.IntRange(1), default=None, help="Stop after N messages.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=None,
    help="Stop after S seconds; exit code 1 if --count was not reached by then.",
)
def subscribe(
    endpoint: str,
    topics: tuple[str, ...],
    as_json: bool,
    refuse_conflicts: bool,
    count: int | None,
    seconds: float | None,
) -> None:
    """Watch the signals that an engine publishes at ENDPOINT.

    On a terminal a live table, else one line a message. Ctrl-C stops; the totals, with what was
    lost on the way, are written to stderr. Signals of two engines that publish the same instrument
    are marked, or the second one's refused.
    """
    import sys

    from engine.client import SignalClient
    from engine.conflicts import Conflicts
    from engine.subscribe import follow

    if not topics:
        live = sys.stdout.isatty() and not as_json
        topics = ("signal.", "state.", "alert.") if live else ("signal.",)
    conflicts: Conflicts = "refuse" if refuse_conflicts else "mark"
    with SignalClient(endpoint, topics, conflicts=conflicts) as client:
        code = follow(client, as_lines=as_json, count=count or 0, seconds=seconds or 0.0)
    sys.exit(code)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option(
    "--tape",
    "tape_folder",
    type=click.Path(file_okay=False),
    default=".",
    show_default=True,
    help="Folder that tapes will be recorded in.",
)
def doctor(as_json: bool, tape_folder: str) -> None:
    """Check this machine: what would stop the engine, and what would make it slow.

    Exit code 1 if anything is bad; slow findings leave it 0.
    """
    import sys

    from engine.doctor import examine, show

    findings = examine(tape_folder)
    show(findings, as_json=as_json)
    sys.exit(1 if any(finding.verdict == "bad" for finding in findings) else 0)


@click.command()
@click.argument("config", type=click.Path(dir_okay=False))
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help="Stop after S seconds.")
@click.option("--tape", "tape_path", metavar="FILE", help="Record to FILE instead of tape.path.")
@click.option("--no-tape", is_flag=True, help="Record nothing.")
@click.option("--backend", help="What runs the model, in place of model.backend.")
@click.option("--device", help="Of the backend, in place of model.device.")
@click.option("--json", "as_json", is_flag=True, help="The session's totals as one JSON object.")
def run(
    config: str,
    seconds: float | None,
    tape_path: str | None,
    no_tape: bool,
    backend: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Run the engine as CONFIG says: market data in, signals out, the session on tape.

    Says READY on stderr once every instrument is defined and events are being taken. SIGINT and
    SIGTERM stop it cleanly: the tape is closed, the totals are printed, the exit code is 0.
    """
    import msgspec

    from engine.config import load_config, require_live, served_by
    from engine.daemon import run_daemon
    from engine.run_report import Reporter

    settings = served_by(load_config(config), backend, device)
    if tape_path is not None or no_tape:
        path = "" if no_tape else str(tape_path)
        settings = msgspec.structs.replace(
            settings, tape=msgspec.structs.replace(settings.tape, path=path)
        )
    require_live(settings, where=config)
    reporter = Reporter()
    totals = run_daemon(settings, reporter.notice, seconds=seconds or 0.0, on_ready=reporter.ready)
    if settings.tape.seal and totals.tape:
        from feeds.tape_seal import seal_tape

        totals.tape = seal_tape(totals.tape).target
    if as_json:
        click.echo(msgspec.json.encode(totals).decode())
    else:
        reporter.totals(totals)
