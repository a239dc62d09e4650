"""``octick model quantize | verify | info | report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from feeds.output import JSON
from models.extra import need_models_extra

if TYPE_CHECKING:
    from engine.bundle import Bundle
    from models.bundles import Made
    from models.verify import Verification


def _kept(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> Any:
    """``LAYER`` or ``LAYER=fp16``, and ``worst:N``."""
    named: dict[str, str] = {}
    worst = 0
    for value in values:
        name, _, precision = value.partition("=")
        if name.startswith("worst:"):
            if not name[6:].isdigit():
                raise click.BadParameter(f"{value!r}: expected worst:COUNT")
            worst = int(name[6:])
            continue
        if (precision or "fp32") not in ("fp32", "fp16"):
            raise click.BadParameter(f"{value!r}: expected LAYER, LAYER=fp32 or LAYER=fp16")
        named[name] = precision or "fp32"
    return named, worst


def _columns(context: click.Context, parameter: click.Parameter, value: str) -> slice:
    first, _, after = value.partition(":")
    if not (first.isdigit() and after.isdigit() and int(first) < int(after)):
        raise click.BadParameter("expected FIRST:AFTER, such as 0:40")
    return slice(int(first), int(after))


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder to write.")
@click.option(
    "--method",
    type=click.Choice(["ptq", "qat", "dynamic", "int4"]),
    default="ptq",
    show_default=True,
    help="Calibrate; train under fake quantisation; ONNX Runtime's dynamic; 4-bit weights.",
)
@click.option(
    "--scales",
    type=click.Choice(["free", "power-of-two"]),
    default="power-of-two",
    show_default=True,
    help="power-of-two makes an exact-int8 bundle: the same bits on every backend.",
)
@click.option("--observer", default="mse", show_default=True, help="How ranges are found.")
@click.option("--per-channel/--per-tensor", default=True, show_default=True, help="Of weights.")
@click.option("--symmetric/--asymmetric", default=True, show_default=True, help="Of activations.")
@click.option(
    "--keep",
    multiple=True,
    callback=_kept,
    help="Keep LAYER in fp32 (LAYER=fp16: weights as halves), or worst:N found by itself.",
)
@click.option(
    "--prune",
    type=click.FloatRange(0.0, 1.0, max_open=True),
    default=0.0,
    help="Cut this share of units first, and train again.",
)
@click.option(
    "--rows", type=click.IntRange(1), default=10_000, show_default=True, help="To calibrate."
)
@click.option("--epochs", type=click.IntRange(1, 1_000), default=1, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    help="Run whose data set calibrates another's model (an ONNX file, or FILE.py:FACTORY).",
)
@click.option("--window", type=click.IntRange(1, 10_000), default=100, help="Of such a model.")
@click.option("--columns", callback=_columns, default="0:40", help="Features it sees, FIRST:AFTER.")
@click.option("--name", default="", help="Of the bundle; the architecture's by default.")
@JSON
def quantize(
    model: Path,
    out: Path | None,
    keep: tuple[dict[str, Any], int],
    data: Path | None,
    window: int,
    columns: slice,
    name: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Quantise MODEL and write a bundle with its FP32 twin and report.

    MODEL is the folder of a training run; or an ONNX file or FILE.py:FACTORY of others, with
    --data RUN to calibrate and compare.

    Observers: minmax, moving-average, percentile-99.99, percentile-99.9, coverage-95, entropy, mse.
    """
    import msgspec

    from feeds.progress import stages

    need_models_extra("octick model quantize")
    from models.bundles import make_bundle
    from models.quantisation import Options
    from models.runs import load_run

    ours = model.is_dir() or not (model.suffix == ".onnx" or ":" in model.name)
    source = click.get_current_context().get_parameter_source("scales")
    if source is click.core.ParameterSource.DEFAULT:
        # ONNX Runtime's own scales are free: what was not asked for is no contradiction.
        if not ours or options["method"] in ("dynamic", "int4"):
            options["scales"] = "free"
    named, worst = keep
    wanted = Options(keep=named, keep_worst=worst, **options)
    with stages() as progress:
        if ours:
            run = load_run(model)
            target = out or model / _default_name(wanted)
            made = make_bundle(run, wanted, target, name=name, progress=progress)
        else:
            from models.foreign.bundle import make_foreign_bundle

            if data is None:
                raise click.UsageError("--data RUN is needed to calibrate another's model")
            made = make_foreign_bundle(
                str(model),
                load_run(data),
                wanted,
                out or Path(model.name.partition(":")[0]).with_suffix(".bundle"),
                window=window,
                columns=columns,
                name=name,
                progress=progress,
            )
    if as_json:
        click.echo(msgspec.json.encode(made).decode())
    else:
        print_made(made)
    if made.failed:
        click.secho(f"not verified: {', '.join(made.failed)}", fg="red", err=True)
        click.get_current_context().exit(1)


def _default_name(options: Any) -> str:
    scales = "" if options.method in ("dynamic", "int4") else f"-{options.scales}"
    return f"bundle-{options.method}{scales}"


def print_made(made: Made) -> None:
    """The comparison of the twins as a table."""
    from rich.table import Table

    from feeds.output import wide_console

    found = made.comparison
    console = wide_console()
    table = Table("on the test part", "INT8", "FP32", title=f"{made.bundle}: {made.numerics}")
    for name, key, form in (
        ("accuracy", "accuracy", "{:.2%}"),
        ("F1, macro", "macro_f1", "{:.4f}"),
        ("calibration error", "calibration_error", "{:.4f}"),
        ("information coefficient", "information_coefficient", "{:.4f}"),
    ):
        values = [getattr(metrics, key) for metrics in (found.int8, found.fp32)]
        table.add_row(name, *("" if v is None else form.format(v) for v in values))
    table.add_row("bytes", f"{found.bytes_int8:,}", f"{found.bytes_fp32:,}")
    table.add_row("p50, us", f"{found.p50_us_int8:.1f}", f"{found.p50_us_fp32:.1f}")
    table.add_row("p99, us", f"{found.p99_us_int8:.1f}", f"{found.p99_us_fp32:.1f}")
    table.add_row("fused integer nodes", str(found.int8_nodes), "")
    table.add_row("same class", f"{found.agreement:.2%}", "")
    table.add_row("accuracy lost, points", f"{found.accuracy_loss_points:.3f}", "")
    console.print(table)
    if made.accumulator_headroom_bits is not None:
        console.print(f"proved exact, {made.accumulator_headroom_bits:.2f} bits to spare")
    for name, value in list(made.sensitivities.items())[:5]:
        console.print(f"sensitive: {name}, {value:.6f} nats")
    if made.unchecked:
        console.print(f"no value check: {made.unchecked}", markup=False)
    console.print(f"model {made.model_hash}")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--tape",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="For the system level; a simulated session by default.",
)
@click.option(
    "--level",
    "levels",
    multiple=True,
    type=click.Choice(["operator", "subgraph", "system"]),
    help="Only these; all three by default.",
)
@click.option(
    "--vectors",
    type=click.IntRange(16),
    default=400,
    show_default=True,
    help="Inputs of the operator level, hard ones among them.",
)
@click.option("--all", "show_all", is_flag=True, help="Show the checks that hold, too.")
@JSON
def verify(
    bundle: Path,
    tape: Path | None,
    levels: tuple[Any, ...],
    vectors: int,
    show_all: bool,
    as_json: bool,
) -> None:
    """Verify BUNDLE in three levels: operator, subgraph, system. Exits with 1 where one fails."""
    import msgspec

    from engine.bundle import load_bundle
    from feeds.progress import stages

    need_models_extra("octick model verify")
    from models.verify import verify as verified
    from models.verify_system import TapeSource, recorded_rows, system_level

    loaded = load_bundle(bundle)
    with stages() as progress:
        progress("running the pipeline for live rows", 0.0)
        source = TapeSource(tape)
        found = verified(
            loaded,
            recorded_rows(loaded, source),
            system=lambda checks: system_level(loaded, source, checks),
            levels=levels or ("operator", "subgraph", "system"),
            vectors=vectors,
            on_stage=lambda stage: progress(stage, 0.0),
        )
    if as_json:
        click.echo(msgspec.json.encode(found).decode())
    else:
        _print_verification(found, show_all)
    if not found.ok:
        click.get_current_context().exit(1)


def _print_verification(found: Verification, show_all: bool) -> None:
    from rich.table import Table

    from feeds.output import wide_console

    console = wide_console()
    table = Table("level", "check", "", "found", "limit", "what", title=found.bundle)
    shown = [
        check for check in found.checks if show_all or not check.ok or check.level != "subgraph"
    ]
    for check in shown:
        mark = "[green]holds[/]" if check.ok else "[red]fails[/]"
        value, limit = f"{check.value:.6g}", f"{check.limit:.6g}"
        table.add_row(check.level, check.name, mark, value, limit, check.detail)
    console.print(table)
    for name, value in found.system.items():
        console.print(f"{name}: {value}")
    failed = sum(not check.ok for check in found.checks)
    if failed:
        console.print(f"[bold red]not verified[/]: {failed} of {len(found.checks)} checks fail")
    else:
        console.print(
            f"[bold]verified[/]: {len(found.checks)} checks hold, model {found.model_hash}"
        )


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@JSON
def info(bundle: Path, as_json: bool) -> None:
    """Say what BUNDLE is: numerics, features, labels, state, how it was made and measured."""
    from engine.bundle import check_files, load_bundle

    loaded = load_bundle(bundle)
    check_files(loaded)
    facts = _facts(loaded)
    if as_json:
        from feeds.output import print_json

        print_json(facts)
        return
    from rich.table import Table

    from feeds.output import wide_console

    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(f"[bold]{name}[/]", _plain(value))
    wide_console().print(table)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    return str(value)


def _facts(bundle: Bundle) -> dict[str, Any]:
    manifest, training = bundle.manifest, bundle.manifest.training
    sizes = {path.name: path.stat().st_size for path in sorted(bundle.path.iterdir())}
    return {
        "name": bundle.name,
        "model": manifest.model_hash,
        "numerics": bundle.numerics,
        "bound": manifest.bound,
        "features": manifest.feature_schema,
        "classes": list(bundle.classes),
        "clip": bundle.clip,
        "state": {
            precision: {
                item.input: f"{item.dtype} {list(item.shape)}" for item in bundle.state(precision)
            }
            for precision in ("int8", "fp32")
        },
        "checks": _checks(bundle),
        "fp32 parent": manifest.fp32_sha256,
        "bytes": sizes,
        **{key: training[key] for key in sorted(training)},
    }


def _checks(bundle: Bundle) -> dict[str, Any] | None:
    """What the value check of a bundle looks at."""
    checks = bundle.checks
    if checks is None:
        return None
    rows = [count for count in checks.max_constant if count]
    return {
        "output": checks.output,
        "layers from bit 8 on": list(checks.int8),
        "input bounds": [min(checks.input_bound), max(checks.input_bound)],
        "features that can be stuck": len(rows),
        "after rows": [min(rows), max(rows)] if rows else [],
    }


@click.command()
@click.argument(
    "bundles", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="BUNDLE..."
)
@click.option("--markdown", is_flag=True, help="Print the table as Markdown.")
@JSON
def report(bundles: tuple[Path, ...], markdown: bool, as_json: bool) -> None:
    """Compare bundles in one table; latencies are measured anew, all in one run.

    A folder that is no bundle is searched for bundles one level below it. The plots stand in each
    bundle's report.html.
    """
    import msgspec

    from feeds.progress import stages

    need_models_extra("octick model report")
    from models.report.bundle_report import found_bundles, report_rows
    from models.report.table import comparison_markdown, comparison_table

    with stages() as progress:
        rows = report_rows(found_bundles(bundles), progress)
    if as_json:
        click.echo(msgspec.json.encode(rows).decode())
    elif markdown:
        click.echo(comparison_markdown(rows))
    else:
        from feeds.output import wide_console

        wide_console().print(comparison_table(rows))
