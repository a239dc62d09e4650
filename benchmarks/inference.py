"""``octick bench inference``: one step of every architecture in every runtime, and the crossover.

Batch 1, one thread, buffers bound once, drawn weights. All cells of an architecture are timed in
turn in short blocks of one process, so that what else the machine does falls on all of them alike.
The compiled backend answers with its value check, the others run the graph without one. A cell that
cannot be says why.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from benchmarks.backends import backend_lane, empty_lane, timed_rows
from benchmarks.contest import Lane, Timing, time_in_turn
from benchmarks.crossover import (
    COMPILED,
    ONNX_RUNTIME,
    WIDTHS,
    Crossing,
    WidthTiming,
    crossings,
    show_widths,
    time_widths,
)
from benchmarks.provenance import provenance
from benchmarks.rivals import RIVALS
from benchmarks.untrained import draw_network, make_untrained
from engine.backends.registry import open_backend
from engine.bundle import Bundle, load_bundle
from engine.jitter import Jitter, measure_jitter
from feeds.errors import InputError

ARCHITECTURES: Final = ("mlp", "tcn", "lstm", "gru", "deeplob", "attention")
PRECISIONS: Final = ("int8", "fp32")
OPENVINO: Final = "openvino"
TORCH_COMPILE: Final = "torch.compile"
RUNTIMES: Final = (COMPILED, ONNX_RUNTIME, OPENVINO, TORCH_COMPILE)
LIBRARIES: Final = {ONNX_RUNTIME: "ort", OPENVINO: "openvino"}  # as `benchmarks.rivals` calls them
FURTHER_PACKAGES: Final = ("openvino", "torch")
DEFAULT_RUNS: Final = 50
CROSSOVER_SHARE: Final = 0.3  # of the progress bar
JITTER_S: Final = 1.0


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One architecture in one precision in one runtime.

    Attributes
    ----------
    architecture : str
    parameters : int
    precision : str
        "int8" (exact) or "fp32".
    runtime : str
        One of `RUNTIMES`.
    p50_us, p99_us : float or None
        Of a step, as Python calls it; see `benchmarks.contest.Timing`.
    n : int
        Steps that were timed.
    reason : str
        Why there is no figure; empty where there is.
    """

    architecture: str
    parameters: int
    precision: str
    runtime: str
    p50_us: float | None = None
    p99_us: float | None = None
    n: int = 0
    reason: str = ""


class InferenceBench(msgspec.Struct, frozen=True):
    """Result of ``octick bench inference``.

    Attributes
    ----------
    cells : list of Cell
    crossover : list of Crossing
        Of each runtime that has INT8.
    widths : list of WidthTiming
        What the crossover was read from; empty where it was left out.
    runs : int
        Blocks of each cell.
    empty_us : float
        p50 of a call that does nothing, in the same rounds: it is in every figure.
    jitter : Jitter
        Gaps of a loop that only reads the clock, on the same machine right after.
    machine, versions, commit, date
    """

    cells: list[Cell]
    crossover: list[Crossing]
    widths: list[WidthTiming]
    runs: int
    empty_us: float
    jitter: Jitter
    machine: dict[str, str | int]
    versions: dict[str, str]
    commit: str
    date: str


@dataclass
class _Place:
    """A cell to be: its lane, or why it has none."""

    precision: str
    runtime: str
    lane: Lane | None = None
    reason: str = ""


def bench_inference(
    archs: Sequence[str] = ARCHITECTURES,
    runs: int = DEFAULT_RUNS,
    widths: Sequence[int] = WIDTHS,
    *,
    progress: Callable[[str, float], Any] = lambda stage, share: None,
) -> InferenceBench:
    """Time every cell of some architectures, and INT8 against FP32 by size.

    Parameters
    ----------
    archs : sequence of str
        Keys of `models.architectures.ARCHITECTURES`.
    runs : int
        Blocks of each cell.
    widths : sequence of int
        Of the crossover's MLPs; none leaves it out.
    progress : callable
        Takes the stage and its share done.

    Raises
    ------
    InputError
        If there is no such architecture, or the models extra is not installed.
    """
    from models.architectures import architecture
    from models.extra import need_models_extra

    need_models_extra("octick bench inference")
    for arch in archs:
        architecture(draw_network(arch)[0])
    cells: list[Cell] = []
    empty_us = 0.0
    rest = 1.0 - CROSSOVER_SHARE
    for number, arch in enumerate(archs):

        def tell(stage: str, share: float, arch: str = arch, number: int = number) -> None:
            progress(f"{arch}: {stage}", rest * (number + share) / len(archs))

        found, empty = _contest(arch, runs, tell)
        cells += found
        empty_us = max(empty_us, empty)
    timed = time_widths(
        widths,
        max(runs // 2, 1),
        progress=lambda stage, share: progress(stage, rest + CROSSOVER_SHARE * share),
    )
    return InferenceBench(
        cells,
        crossings(timed),
        timed,
        runs,
        empty_us,
        measure_jitter(JITTER_S),
        **provenance(FURTHER_PACKAGES),
    )


def _contest(arch: str, runs: int, tell: Callable[[str, float], None]) -> tuple[list[Cell], float]:
    """All cells of one architecture; and what an empty call takes."""
    from models.compiled_step import inference_settings
    from models.shapes import describe

    parameters = describe(draw_network(arch)[0]).parameters
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="octick-infer-")))
        stack.enter_context(inference_settings())
        tell("drawing weights", 0.0)
        bundle = load_bundle(make_untrained(arch, folder / arch))
        places = []
        for precision in PRECISIONS:
            for runtime in RUNTIMES:
                tell(f"opening {runtime} {precision}", 0.0)
                places.append(stack.enter_context(_opened(bundle, arch, precision, runtime)))
        lanes = [place.lane for place in places if place.lane is not None]
        *timings, empty = time_in_turn(
            [*lanes, empty_lane(bundle)],
            timed_rows(bundle),
            runs,
            progress=lambda share: tell("timing in turn", share),
        )
    timed = iter(timings)
    return [
        _cell(arch, parameters, place, next(timed) if place.lane is not None else None)
        for place in places
    ], empty.p50_us


def _cell(arch: str, parameters: int, place: _Place, timing: Timing | None) -> Cell:
    cell = Cell(
        architecture=arch,
        parameters=parameters,
        precision=place.precision,
        runtime=place.runtime,
        reason=place.reason,
    )
    if timing is None:
        return cell
    return msgspec.structs.replace(cell, p50_us=timing.p50_us, p99_us=timing.p99_us, n=timing.runs)


@contextmanager
def _opened(bundle: Bundle, arch: str, precision: str, runtime: str) -> Iterator[_Place]:
    """A runtime with its lane, or with what keeps it from running this."""
    place = _Place(precision, runtime)
    with ExitStack() as stack:
        try:
            if runtime == COMPILED:
                backend = open_backend(COMPILED, bundle, precision=precision)
                stack.callback(backend.close)
                place.lane = backend_lane(backend, 0)
            elif runtime == TORCH_COMPILE:
                place.lane = _torch_lane(arch, precision)
            else:
                place.lane = RIVALS[LIBRARIES[runtime]](bundle, precision).lane_of(0)
        except InputError as error:
            place.reason = _reason(error, bundle)
        yield place


def _torch_lane(arch: str, precision: str) -> Lane:
    """The network of the same weights, compiled by PyTorch."""
    from models.compiled_step import CompiledStep

    if precision != "fp32":
        raise InputError(
            "runs the FP32 network only",
            where=TORCH_COMPILE,
            expected="fp32",
            found=repr(precision),
        )
    spec, parameters = draw_network(arch)
    x = np.zeros((1, spec.n_features), dtype=np.float32)
    out = np.zeros((1, spec.n_classes), dtype=np.float32)
    step = CompiledStep(spec, parameters, x, out)
    return Lane(x, out, (step,), partial(step.reset))


def _reason(error: InputError, bundle: Bundle) -> str:
    """One line without the temporary folder, which says nothing."""
    text = str(error).replace(f"{bundle.path}/", "").replace(str(bundle.path), bundle.name)
    return " ".join(text.split())


def show(result: InferenceBench) -> None:
    """A row for each architecture and precision, a column for each runtime; then the crossover."""
    from rich.table import Table

    from feeds.output import wide_console

    console = wide_console()
    table = Table(title=f"one step, batch 1: p50 / p99 in us, {result.runs} blocks of each in turn")
    table.add_column("architecture")
    table.add_column("parameters", justify="right")
    table.add_column("precision")
    for runtime in RUNTIMES:
        table.add_column(runtime, justify="right")
    rows: dict[tuple[str, str], dict[str, Cell]] = {}
    for cell in result.cells:
        rows.setdefault((cell.architecture, cell.precision), {})[cell.runtime] = cell
    for (arch, precision), cells in rows.items():
        least = min((c.p50_us for c in cells.values() if c.p50_us is not None), default=None)
        table.add_row(
            arch,
            f"{next(iter(cells.values())).parameters:,}",
            precision,
            *(_shown(cells[runtime], least) for runtime in RUNTIMES),
        )
    console.print(table)
    if result.widths:
        show_widths(result.widths, result.crossover)
    jitter = result.jitter
    console.print(
        f"an empty call: {result.empty_us:g} us; host jitter: p99 {jitter.p99_ns / 1e3:g} us,"
        f" max {jitter.max_ns / 1e3:g} us, preempted {jitter.preempted} times in"
        f" {jitter.seconds:g} s",
        highlight=False,
    )
    on = ", ".join(str(value) for value in result.machine.values())
    with_ = ", ".join(f"{name} {text}" for name, text in result.versions.items())
    console.print(f"{on}; {with_}; {result.commit}; {result.date}", markup=False, highlight=False)


def _shown(cell: Cell, least: float | None) -> str:
    from rich.markup import escape

    if cell.p50_us is None:
        return f"[dim]{escape(cell.reason.split('; ')[0])}[/]"  # whole in JSON
    text = f"{cell.p50_us:,.2f} / {cell.p99_us:,.2f}"
    return f"[bold]{text}[/]" if cell.p50_us == least else text
