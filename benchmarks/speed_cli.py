"""``octick bench latency`` and ``overload``. Heavy imports stand inside the functions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_TRANSPORTS = ("ipc", "tcp")
_SHARED = (
    click.argument("tape", required=False, type=click.Path(path_type=Path)),
    click.option(
        "--model", type=click.Path(path_type=Path), help="Bundle; default: the reference."
    ),
    click.option("--backend", default="compiled", show_default=True, help="What runs the model."),
    click.option(
        "--shadow-every",
        type=click.IntRange(0),
        default=10,
        show_default=True,
        help="Of how many inferences the shadow answers one; 0: none.",
    ),
    click.option(
        "--core",
        type=click.IntRange(-1),
        help="That the engine's hot path keeps to, and both ends keep off; -1: the system's choice."
        " Default: the last one of several.",
    ),
    click.option(
        "--let-sleep",
        is_flag=True,
        help="Leave idle cores to the system; else they are kept awake where that can be had.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
)


def _shared(command: Callable[..., None]) -> Callable[..., None]:
    """Parameters of both: the market, what answers, and how the result is told."""
    for parameter in reversed(_SHARED):
        command = parameter(command)
    return command


def _tell(
    measure: Callable[..., Any], show: Callable[[Any], None], as_json: bool, **options: Any
) -> Any:
    """Measure under a status line, then print the result."""
    import msgspec
    from rich.console import Console

    with Console(stderr=True).status("measuring") as status:
        result = measure(**options, progress=status.update)
    if as_json:
        click.echo(msgspec.json.encode(result).decode())
    else:
        show(result)
    return result


@click.command()
@click.option(
    "--transport",
    "transports",
    type=click.Choice(_TRANSPORTS),
    multiple=True,
    help="Default: both.",
)
@click.option(
    "--rate",
    "rates",
    type=click.IntRange(0, 1_000_000),
    multiple=True,
    help="Messages a second, 0 for the recorded arrival times. Default: 1000, 10000, 50000, 0.",
)
@click.option("--runs", type=click.IntRange(1, 100), default=3, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.2, 600), default=3.0, show_default=True)
@click.option("--busy-poll", is_flag=True, help="The engine never sleeps.")
@click.option(
    "--warm-us",
    type=click.IntRange(0, 1_000_000),
    help="The engine rehearses so often while it waits; 0: never. Default: 1000, as an engine's"
    " config.",
)
@click.option(
    "--io-core",
    type=click.IntRange(-1),
    default=-1,
    show_default=True,
    help="With --core: that the engine's ZeroMQ threads keep to; -1: any other.",
)
@_shared
def latency(
    tape: Path | None,
    transports: tuple[str, ...],
    rates: tuple[int, ...],
    runs: int,
    seconds: float,
    model: Path | None,
    backend: str,
    busy_poll: bool,
    warm_us: int | None,
    core: int | None,
    io_core: int,
    shadow_every: int,
    let_sleep: bool,
    as_json: bool,
) -> None:
    """Tick to signal: in the engine, over the wire, and beside a plain ZeroMQ echo.

    Without TAPE with the messages of the recording in OCTICK_DATA, or of a simulated market.
    """
    from benchmarks.latency import RATES, RECORDED, TRANSPORTS, bench_latency, show
    from benchmarks.provenance import REFERENCE
    from benchmarks.wire_setup import last_core

    _tell(
        bench_latency,
        show,
        as_json,
        path=tape,
        transports=transports or TRANSPORTS,
        rates=rates or (*RATES, RECORDED),
        runs=runs,
        seconds=seconds,
        model=model or REFERENCE,
        backend=backend,
        busy_poll=busy_poll,
        warm_us=warm_us,
        core=last_core() if core is None else core,
        io_core=io_core,
        shadow_every=shadow_every,
        let_sleep=let_sleep,
    )


@click.command()
@click.option(
    "--rate",
    type=click.IntRange(1, 10_000_000),
    help="Messages a second. Default: twice the recorded peak.",
)
@click.option("--seconds", type=click.FloatRange(0.5, 3600), default=60.0, show_default=True)
@click.option(
    "--trigger",
    type=click.Choice(["top-of-book", "events"]),
    default="top-of-book",
    show_default=True,
    help="What makes a signal due; events: every message.",
)
@click.option("--max-lag-ms", type=click.FloatRange(0.1), default=1_000.0, show_default=True)
@_shared
def overload(
    tape: Path | None,
    rate: int | None,
    seconds: float,
    trigger: str,
    max_lag_ms: float,
    core: int | None,
    model: Path | None,
    backend: str,
    shadow_every: int,
    let_sleep: bool,
    as_json: bool,
) -> None:
    """More messages than usual for a while, and then nothing: lag, losses, recovery, the book.

    Exit code 1 where something was lost, the books differ, or the lag was too long.
    """
    from benchmarks.overload import bench_overload, show
    from benchmarks.provenance import REFERENCE
    from benchmarks.wire_setup import last_core

    result = _tell(
        bench_overload,
        show,
        as_json,
        path=tape,
        rate=rate,
        seconds=seconds,
        model=model or REFERENCE,
        backend=backend,
        trigger=trigger,
        shadow_every=shadow_every,
        max_lag_ms=max_lag_ms,
        core=last_core() if core is None else core,
        let_sleep=let_sleep,
    )
    sys.exit(0 if result.ok else 1)
