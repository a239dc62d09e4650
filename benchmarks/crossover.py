"""``octick bench crossover``: from how many parameters on INT8 is faster than FP32.

One step of ever wider MLPs, each timed in turn in ONNX Runtime in both precisions and in the
compiled backend, all from the same exact-int8 bundle. The compiled backend has no FP32: what it is
held against is the FP32 that would serve instead of it, ONNX Runtime's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from benchmarks.backends import backend_lane, timed_rows
from benchmarks.contest import time_in_turn
from benchmarks.provenance import provenance
from benchmarks.rivals import onnx_runtime
from benchmarks.untrained import draw_network, make_untrained
from engine.backends.registry import open_backend
from engine.bundle import Bundle, load_bundle
from engine.jitter import Jitter, measure_jitter

WIDTHS: Final = (16, 32, 64, 128, 256, 512, 1024, 2048)
ROUNDS: Final = 20
JITTER_S: Final = 1.0
BAR_PER_UNIT: Final = 8  # characters of a bar for one time as fast
MAX_BAR: Final = 64
COMPILED: Final = "compiled"
ONNX_RUNTIME: Final = "onnxruntime"


class WidthTiming(msgspec.Struct, frozen=True):
    """Both precisions of one MLP.

    Attributes
    ----------
    parameters : int
    p50_us_fp32 : float
        In ONNX Runtime.
    p50_us_int8 : dict of str to float
        By runtime: "onnxruntime", without its value check, and "compiled", with it.
    size_ratio : float
        Bytes of the INT8 graph over those of the FP32 one.
    """

    parameters: int
    p50_us_fp32: float
    p50_us_int8: dict[str, float]
    size_ratio: float

    def speed_up(self, runtime: str) -> float:
        """How many times as fast as FP32 the INT8 of a runtime is."""
        return self.p50_us_fp32 / self.p50_us_int8[runtime]


class Crossing(msgspec.Struct, frozen=True):
    """Fewest parameters measured from which a runtime's INT8 stays faster; None where never."""

    runtime: str
    parameters: int | None


class CrossoverBench(msgspec.Struct, frozen=True):
    """Result of ``octick bench crossover``."""

    rows: list[WidthTiming]
    crossover: list[Crossing]
    jitter: Jitter
    machine: dict[str, str | int]
    versions: dict[str, str]
    commit: str
    date: str


def bench_crossover(
    widths: Sequence[int] = WIDTHS,
    rounds: int = ROUNDS,
    *,
    progress: Callable[[str, float], Any] = lambda stage, share: None,
) -> CrossoverBench:
    """Time every width; see `time_widths`."""
    rows = time_widths(widths, rounds, progress=progress)
    return CrossoverBench(
        rows,
        crossings(rows),
        measure_jitter(JITTER_S),
        **provenance(),
    )


def time_widths(
    widths: Sequence[int] = WIDTHS,
    rounds: int = ROUNDS,
    *,
    progress: Callable[[str, float], Any] = lambda stage, share: None,
) -> list[WidthTiming]:
    """Time one step of an MLP of two hidden layers, for each of their widths.

    Parameters
    ----------
    widths : sequence of int
    rounds : int
        Of timing in turn.
    progress : callable
        Takes the stage and the share that is done of all.

    Raises
    ------
    InputError
        If the models extra is not installed.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="octick-crossover-") as folder:
        for number, width in enumerate(widths):
            progress(f"crossover: two layers of {width}", number / len(widths))
            layers = {"hidden0": width, "hidden1": width}
            path = make_untrained("mlp", Path(folder) / str(width), widths=layers)
            rows.append(_time(load_bundle(path), layers, rounds))
    return rows


def _time(bundle: Bundle, layers: Mapping[str, int], rounds: int) -> WidthTiming:
    from models.shapes import describe

    spec, _ = draw_network("mlp", widths=layers)
    compiled = open_backend(COMPILED, bundle)
    try:
        int8, fp32 = (onnx_runtime(bundle, precision) for precision in ("int8", "fp32"))
        lanes = [fp32.lane_of(0), int8.lane_of(0), backend_lane(compiled, 0)]
        timings = time_in_turn(lanes, timed_rows(bundle), rounds)
    finally:
        compiled.close()
    p50_us_fp32, *others = (timing.p50_us for timing in timings)
    return WidthTiming(
        describe(spec).parameters,
        p50_us_fp32,
        dict(zip((ONNX_RUNTIME, COMPILED), others, strict=True)),
        round(int8.size_bytes / fp32.size_bytes, 3),
    )


def crossings(rows: Sequence[WidthTiming]) -> list[Crossing]:
    """Where each runtime's INT8 begins to stay faster than FP32.

    Parameters
    ----------
    rows : sequence of WidthTiming
        By rising number of parameters.
    """
    found = []
    for runtime in rows[0].p50_us_int8 if rows else ():
        first = len(rows)
        while first and rows[first - 1].speed_up(runtime) > 1.0:
            first -= 1
        at = rows[first].parameters if first < len(rows) else None
        found.append(Crossing(runtime, at))
    return found


def told(crossing: Crossing) -> str:
    """A crossing in words."""
    if crossing.parameters is None:
        return f"{crossing.runtime}: INT8 is not the faster one at the largest size measured"
    return f"{crossing.runtime}: INT8 stays faster from {crossing.parameters:,} parameters on"


def show_widths(rows: Sequence[WidthTiming], found: Sequence[Crossing]) -> None:
    """A table with a bar for each runtime: as long as INT8 is fast, FP32 being the mark."""
    from rich.table import Table

    from feeds.output import wide_console

    console = wide_console()
    runtimes = [item.runtime for item in found]
    table = Table(title="one step of an MLP: INT8 against the FP32 of ONNX Runtime")
    table.add_column("parameters", justify="right")
    table.add_column("FP32, us", justify="right")
    for runtime in runtimes:
        table.add_column(f"{runtime} INT8, us", justify="right")
    table.add_column(f"times as fast as FP32 (│ is 1): {', '.join(runtimes)}")
    for row in rows:
        bars = "\n".join(
            f"{_bar(row.speed_up(name))} {row.speed_up(name):.2f}" for name in runtimes
        )
        cells = [f"{row.p50_us_int8[name]:,.2f}" for name in runtimes]
        table.add_row(f"{row.parameters:,}", f"{row.p50_us_fp32:,.2f}", *cells, bars)
    console.print(table)
    for crossing in found:
        console.print(told(crossing), highlight=False)


def _bar(times: float) -> str:
    length = min(max(round(BAR_PER_UNIT * times), 1), MAX_BAR)
    drawn = ("█" * length).ljust(BAR_PER_UNIT)
    return drawn[: BAR_PER_UNIT - 1] + "│" + drawn[BAR_PER_UNIT:]


def show(result: CrossoverBench) -> None:
    """Print the result as a table."""
    from feeds.output import wide_console

    show_widths(result.rows, result.crossover)
    jitter = result.jitter
    wide_console().print(
        f"host jitter: p99 {jitter.p99_ns / 1e3:g} us, max {jitter.max_ns / 1e3:g} us;"
        f" {result.machine['cpu']}; commit {result.commit or 'none'}, {result.date}",
        highlight=False,
    )
