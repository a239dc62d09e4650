"""``octick backend``: which backends are here, and whether one keeps what it promises."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from engine.backends.availability import Availability
    from engine.backends.conformance import CheckResult
    from engine.bundle import Bundle

# Beside the engine, in a checkout and in an installation.
REFERENCE: Final = Path(__file__).resolve().parents[1] / "models" / "reference"
MAX_VECTORS: Final = 1_000_000


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_command(as_json: bool) -> None:
    """Every registered backend, its devices, and whether they open the reference bundle here.

    A device that does not says why, in one line.
    """
    import msgspec

    from engine.backends.availability import list_backends
    from engine.bundle import load_bundle
    from feeds.progress import stages

    with stages() as show:
        found = list_backends(load_bundle(REFERENCE), show)
    if as_json:
        click.echo(msgspec.json.encode({"backends": found}).decode())
    else:
        _show_list(found)


@click.command()
@click.argument("name")
@click.option("--device", help="In place of the one that the config takes without a word.")
@click.option(
    "--bundle",
    "bundles",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Check with this bundle; repeatable. [default: the reference, and small ones with delays,"
    " an LSTM and a GRU cell]",
)
@click.option(
    "--vectors",
    type=click.IntRange(1, MAX_VECTORS),
    help="Inputs that are held against the reference. [default: 512]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(
    name: str, device: str | None, bundles: tuple[Path, ...], vectors: int | None, as_json: bool
) -> None:
    """Whether backend NAME keeps what a backend promises: the conformance suite.

    For backends of any party (entry point octick.backends). Scores, masks, streams, queue,
    refusals; see engine/backends/conformance_checks.py. Exit code 1 if a check fails, 2 if the
    backend opens none of the bundles.
    """
    import msgspec

    from engine.backends.conformance import VECTORS, check_backend
    from engine.backends.registry import default_device, find_backend
    from feeds.errors import InputError
    from feeds.progress import stages

    find_backend(name)
    device = device or default_device(name)
    results: list[CheckResult] = []
    with _opened(bundles) as opened, stages() as show:
        for i, bundle in enumerate(opened):

            def on_check(what: str, share: float, i: int = i, said: str = bundle.name) -> None:
                show(f"{said}: {what}", (i + share) / len(opened))

            results += check_backend(
                name, bundle, device, vectors=vectors or VECTORS, on_check=on_check
            )
    ok = all(result.ok for result in results)
    if ok and not any(result.applies for result in results):
        raise InputError(
            "this backend opens none of the bundles",
            where=f"{name} {device}",
            found=results[0].detail,
        )
    if as_json:
        whole = {"ok": ok, "backend": name, "device": device, "results": results}
        click.echo(msgspec.json.encode(whole).decode())
    else:
        _show_results(results)
    sys.exit(0 if ok else 1)


@contextmanager
def _opened(paths: tuple[Path, ...]) -> Iterator[list[Bundle]]:
    """The bundles at these paths; without any, the reference and the small ones."""
    import tempfile

    from engine.backends.conformance_bundles import GRAPHS, write_small_bundle
    from engine.bundle import load_bundle

    if paths:
        yield [load_bundle(path) for path in paths]
        return
    with tempfile.TemporaryDirectory(prefix="octick-") as folder:
        small = [write_small_bundle(Path(folder) / name, name) for name in GRAPHS]
        yield [load_bundle(path) for path in (REFERENCE, *small)]


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column != columns[-1], overflow="fold")
    return table


def _show_list(found: list[Availability]) -> None:
    from rich.text import Text

    from feeds.output import wide_console

    table = _table("backend", "device", "", "what computes, or why it does not open")
    for item in found:
        verdict = Text("opens", "green") if item.opens else Text("no", "yellow")
        said = f"{item.isa}, {item.library}" if item.opens else item.reason
        table.add_row(item.backend, item.device, verdict, Text(said))
    wide_console().print(table)


def _show_results(results: list[CheckResult]) -> None:
    from rich.text import Text

    from feeds.output import wide_console

    console, table = wide_console(), _table("bundle", "check", "", "")
    for item in results:
        verdict = Text("ok", "green") if item.applies else Text("–", "dim")
        verdict = verdict if item.ok else Text("FAILED", "bold red")
        table.add_row(item.bundle, item.check, verdict, Text(item.detail))
    console.print(table)
    counts = (
        f"{sum(item.ok and item.applies for item in results)} ok",
        f"{sum(not item.ok for item in results)} failed",
        f"{sum(not item.applies for item in results)} not applicable",
    )
    console.print(", ".join(counts), highlight=False)
