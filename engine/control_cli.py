"""``octick control``: commands to a running engine. Exit code 1 where it refused."""

from __future__ import annotations

import getpass
import json
import os
import sys
from collections.abc import Callable
from typing import Any, Final

import click

ENDPOINT_VARIABLE: Final = "OCTICK_CONTROL"


def _connection(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say which engine."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print the whole answer as JSON."),
        click.option(
            "--timeout", "timeout_s", type=click.FloatRange(0.01), help="Seconds to wait."
        ),
        click.option("--client-key", default="", help="Own secret key file, with --server-key."),
        click.option("--server-key", default="", help="The engine's public key file (CURVE)."),
        click.option(
            "--endpoint",
            envvar=ENDPOINT_VARIABLE,
            help=f"control.endpoint of the engine. [env {ENDPOINT_VARIABLE}; else by --config]",
        ),
        click.option("--config", help="Config file that names control.endpoint."),
    ):
        function = option(function)
    return function


def _send(
    name: Any,
    *,
    endpoint: str | None,
    config: str | None,
    server_key: str,
    client_key: str,
    timeout_s: float | None,
    as_json: bool,
    by: str = "",
    reason: str = "",
    bundle: str = "",
) -> None:
    from engine.control import DEFAULT_TIMEOUT_S, Command, ask

    if endpoint is None:
        if config is None:
            raise click.UsageError(
                f"which engine? name --endpoint, --config or {ENDPOINT_VARIABLE}"
            )
        from engine.config import load_config

        endpoint = load_config(config).control.endpoint
        if not endpoint:
            raise click.UsageError(f"{config} has no control.endpoint")
    answer = ask(
        endpoint,
        Command(name, by, reason, bundle),
        timeout_s=timeout_s or DEFAULT_TIMEOUT_S,
        server_key_file=server_key,
        client_key_file=client_key,
    )
    if as_json:
        click.echo(json.dumps(answer))
    elif answer["ok"]:
        click.echo(_lines(answer))
    else:
        click.echo(f"refused: {answer['error']}", err=True)
    sys.exit(0 if answer["ok"] else 1)


def _lines(answer: dict[str, Any]) -> str:
    suppressed = ", ".join(f"{name} {n:,}" for name, n in answer["suppressed"].items() if n)
    rows = {
        "mode": answer["mode"] + (f" ({answer['halted_why']})" if answer["halted_why"] else ""),
        "model": f"{answer['model_hash']} {answer['bundle']}",
        "before it": answer["previous_bundle"] or "none",
        "shadow": f"{answer['shadow_health']}, {answer['shadow_state']}, "
        f"{answer['shadow_answers']:,} answers, {answer['shadow_missed']:,} missed, "
        f"{answer['disagreements']:,} of another class",
        "divergence": f"p50 {answer['divergence_p50']:.4g}, p99 {answer['divergence_p99']:.4g}, "
        f"greatest {answer['divergence_max']:.4g}",
        "drift": f"{answer['drift_alarms']:.0f} alarms stand, {answer['drift_alerts']:.0f} so far; "
        f"worst stability index {answer['drift']:.3f}",
        "signals": f"{answer['signals']:,}, {answer['tradable']:,} tradable",
        "suppressed": suppressed or "none",
        "moves": f"{answer['transitions']:,}, {answer['evidence_files']:,} evidence files",
        "lag": f"{answer['lag_ns'] / 1e6:.1f} ms"
        + (", conflating" if answer["conflating"] else ""),
        "swaps": f"{answer['swaps']:,}" + (", one under way" if answer["changing"] else ""),
    }
    width = max(map(len, rows))
    lines = [f"{name:<{width}}  {value}" for name, value in rows.items()]
    if "warning" in answer:
        lines.append(f"warning: {answer['warning']}")
    return "\n".join(lines)


def _me() -> str:
    try:
        return getpass.getuser()[:32]
    except (KeyError, OSError):
        return ""


@click.command()
@_connection
def status(**where: Any) -> None:
    """Say how the engine is: mode, model, shadow, drift, what is suppressed."""
    _send("status", **where)


@click.command()
@click.option("--reason", default="", help="Why; stands in the evidence.")
@click.option("--by", default=_me, help="Who; by default the user of this shell.")
@_connection
def halt(**options: Any) -> None:
    """Stop: from the next message on nothing is tradable, until a named person arms the engine."""
    _send("halt", **options)


@click.command()
@click.option("--by", required=True, help="The person who takes responsibility.")
@click.option("--reason", default="", help="Why; stands on the tape.")
@_connection
def arm(**options: Any) -> None:
    """Let the engine go on after a halt, and open throttles that latched."""
    _send("arm", **options)


@click.command()
@click.option("--reason", default="", help="Why; stands in the evidence.")
@click.option("--by", default=_me, help="Who; by default the user of this shell.")
@_connection
def demote(**options: Any) -> None:
    """Let FP32 answer from the next signal on."""
    _send("demote", **options)


@click.command()
@click.option("--by", required=True, help="The person who takes responsibility.")
@_connection
def promote(**options: Any) -> None:
    """Let INT8 answer again from the next signal on."""
    _send("promote", **options)


@click.command()
@click.argument("bundle", type=click.Path(file_okay=False))
@click.option("--by", default=_me, help="Who; by default the user of this shell.")
@_connection
def swap(bundle: str, **options: Any) -> None:
    """Put BUNDLE in the place of the serving one, between two ticks.

    The engine judges it first in a process of its own; a bundle that is refused changes nothing.
    """
    _send("swap", bundle=os.path.abspath(bundle), **options)


@click.command()
@click.option("--by", default=_me, help="Who; by default the user of this shell.")
@_connection
def rollback(**options: Any) -> None:
    """Bring the model back that served before the last swap."""
    _send("rollback", **options)


@click.command()
@click.option("--by", default=_me, help="Who; by default the user of this shell.")
@_connection
def recalibrate(timeout_s: float | None, **options: Any) -> None:
    """Calibrate anew from the session's tape, verify, and swap if it is no worse."""
    from engine.oversight import RECALIBRATION_TIMEOUT_S

    _send("recalibrate", timeout_s=timeout_s or RECALIBRATION_TIMEOUT_S, **options)


@click.command()
@click.argument("folder", type=click.Path(file_okay=False))
def keys(folder: str) -> None:
    """Make a CURVE key pair in FOLDER, for a control socket that other machines reach."""
    from engine.control import make_keys

    public, secret = make_keys(folder)
    click.echo(f"{public}\tto hand out\n{secret}\tto keep")
