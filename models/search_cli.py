"""``octick model tune``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from feeds.output import JSON
from models.extra import need_models_extra

if TYPE_CHECKING:
    from models.search.compare import SearchComparison
    from models.search.space import Choice

FRONT_NAME: Final = "front.png"


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--trials", type=click.IntRange(1, 100_000), default=60, show_default=True)
@click.option(
    "--searcher",
    "searchers",
    multiple=True,
    type=click.Choice(["optuna", "reinforce", "random"]),
    help="May be given several times; all three by default, each with the same budget.",
)
@click.option("--seeds", type=click.IntRange(1, 100), default=1, show_default=True)
@click.option(
    "--rows", type=click.IntRange(256), default=2_048, show_default=True, help="To calibrate."
)
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="RUN/tune by default."
)
@click.option("--resume", is_flag=True, help="Go on with the trials logged in --out.")
@JSON
def tune(
    run: Path,
    trials: int,
    searchers: tuple[str, ...],
    seeds: int,
    rows: int,
    out: Path | None,
    resume: bool,
    as_json: bool,
) -> None:
    """Search layers, precisions, observers and scale rules for the network of a training RUN.

    Two objectives: disagreement with FP32 on the validation part, and p99 latency of a step over
    that of FP32. Writes every trial as it is measured, the Pareto front as a table and a plot, and
    the commands that make its bundles; reports of bundles made afterwards show the front too.
    """
    import msgspec

    from feeds.progress import stages

    need_models_extra("octick model tune")
    from models.runs import SEARCH_FOLDER, SEARCH_NAME, load_run
    from models.search.compare import compare_searches, plot_front
    from models.search.evaluator import Evaluator
    from models.search.front import pareto_front

    loaded = load_run(run)
    folder = out or run / SEARCH_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with stages() as progress:
        progress("preparing the evaluator", 0.0)
        evaluator = Evaluator(
            loaded.spec, loaded.parameters, loaded.data, loaded.record.seed, rows=rows
        )
        found = compare_searches(
            evaluator,
            trials,
            range(seeds),
            searchers=searchers or ("random", "optuna", "reinforce"),
            folder=folder,
            resume=resume,
            progress=progress,
        )
    (folder / FRONT_NAME).write_bytes(plot_front(*found.results))
    front = pareto_front(trial for result in found.results for trial in result.trials)
    rows_of_front = [
        {
            "disagreement": trial.measured.disagreement,
            "latency_ratio": trial.measured.latency_ratio,
            "p99_us": trial.measured.p99_us,
            "command": command(run, trial.choice),
        }
        for trial in front
    ]
    best = {id(trial) for trial in front}
    answer = {
        "run": str(run),
        "points": [
            {
                "label": f"{result.searcher} {trial.number}",
                "disagreement": trial.measured.disagreement,
                "p99_us": trial.measured.p99_us,
                "on_front": id(trial) in best,
            }
            for result in found.results
            for trial in result.trials
            if not trial.measured.refused
        ],
        "trials": trials,
        "front": rows_of_front,
        "searchers": found.summary(),
        "after": found.to_table(max(1, trials // 6)),
        "plot": str(folder / FRONT_NAME),
    }
    data = msgspec.json.format(msgspec.json.encode(answer), indent=2)
    (folder / SEARCH_NAME).write_bytes(data + b"\n")
    if as_json:
        click.echo(msgspec.json.encode(answer).decode())
        return
    _print(found, answer)


def command(run: Path, choice: Choice) -> str:
    """What makes the bundle of a choice."""
    words = [f"octick model quantize {run} --scales {choice.scales} --observer {choice.observer}"]
    if not choice.per_channel:
        words.append("--per-tensor")
    if not choice.symmetric:
        words.append("--asymmetric")
    for name, precision in choice.precision.items():
        if precision != "int8":
            words.append(f"--keep {name}" + ("=fp16" if precision == "fp16" else ""))
    return " ".join(words)


def _print(found: SearchComparison, answer: dict[str, Any]) -> None:
    from rich.table import Table

    from feeds.output import wide_console

    console = wide_console()
    table = Table("disagreement", "p99 over FP32", "p99, us", "command", title="Pareto front")
    for row in answer["front"]:
        table.add_row(
            f"{row['disagreement']:.3%}",
            f"{row['latency_ratio']:.3f}",
            f"{row['p99_us']:.1f}",
            row["command"],
        )
    console.print(table)
    for title, rows in (
        ("hypervolume after so many evaluations", answer["after"]),
        ("searchers, budget for budget", answer["searchers"]),
    ):
        table = Table(*rows[0], title=title)
        for row in rows:
            table.add_row(*(f"{v:.5g}" if isinstance(v, float) else str(v) for v in row.values()))
        console.print(table)
    console.print(f"plot: {answer['plot']}")
