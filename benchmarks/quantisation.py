"""``octick bench calibration``: the field's claims about calibration, measured.

How many rows are enough, and whether they or symmetric zero points mend a difference between
PyTorch and ONNX Runtime.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from benchmarks.provenance import ROOT, provenance

CALIBRATION_ROWS: Final = (1_000, 10_000, 100_000)
# A process of its own for each: what counts is the greatest resident memory of one calibration.
_CALIBRATE: Final = """
import json, resource, sys
from pathlib import Path
import numpy as np
from models.comparison import part_scores
from models.execute import scores_of
from models.numerics import SchemeNumerics
from models.quantisation import Options, quantise
from models.runs import load_run
from models.sequences import TEST
from models.step_session import StepSession

run_path, observer, symmetric, rows = sys.argv[1:]
run = load_run(Path(run_path))
options = Options(scales="free", observer=observer, symmetric=symmetric == "symmetric",
                  rows=int(rows))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
twins = quantise(run.spec, run.parameters, run.data, options)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
numbers, int8 = part_scores(StepSession(twins.int8, twins.state.int8).stream, run.data, TEST)
_, fp32 = part_scores(StepSession(twins.fp32, twins.state.fp32).stream, run.data, TEST)
stretch = next(run.data.stretches(TEST, 0, 4_000))
x = np.asarray(run.data.x[stretch.begin : stretch.stop])
served = StepSession(twins.int8, twins.state.int8).run(x)
torch = scores_of(twins.spec, twins.parameters, x, numerics=SchemeNumerics(twins.scheme))
label = run.data.label[numbers]
print(json.dumps({
    "rows": twins.observed_rows, "observer": observer, "symmetric": options.symmetric,
    "peak_rss_mb": round(peak / 1024, 1), "grown_rss_mb": round((peak - before) / 1024, 1),
    "int8_accuracy": round(float((int8.argmax(1) == label).mean()), 5),
    "fp32_accuracy": round(float((fp32.argmax(1) == label).mean()), 5),
    "agreement": round(float((int8.argmax(1) == fp32.argmax(1)).mean()), 5),
    "pytorch_class_difference": round(float((served.argmax(1) != torch.argmax(1)).mean()), 6),
    "pytorch_score_difference": round(float(np.abs(served - torch).max()), 6),
}))
"""


class CalibrationBench(msgspec.Struct, frozen=True):
    """One row for each number of rows and kind of zero point; see `bench_calibration`."""

    run: str
    rows: list[dict[str, Any]]
    machine: dict[str, str | int]
    versions: dict[str, str]
    commit: str
    date: str


def bench_calibration(
    run: Path, observer: str, *, progress: Callable[[str], Any] = lambda _: None
) -> CalibrationBench:
    """Calibrate a run's network on 1,000, 10,000 and 100,000 rows, symmetric and asymmetric.

    For each: peak resident memory of the process, accuracy, agreement with FP32, and how often and
    how far PyTorch's fake quantisation and ONNX Runtime differ.

    Raises
    ------
    subprocess.CalledProcessError
        If a calibration fails.
    """
    found = []
    for symmetric in ("symmetric", "asymmetric"):
        for rows in CALIBRATION_ROWS:
            progress(f"calibrating on {rows} rows, {symmetric}")
            done = subprocess.run(
                [sys.executable, "-c", _CALIBRATE, str(run), observer, symmetric, str(rows)],
                check=True,
                capture_output=True,
                text=True,
                cwd=ROOT,
            )
            found.append(json.loads(done.stdout))
    return CalibrationBench(
        str(run),
        found,
        **provenance(),
    )


def show_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """A table of rows of one shape."""
    from rich.table import Table

    from feeds.output import wide_console

    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{v:,}" if isinstance(v, int | float) else str(v) for v in row.values()))
    wide_console().print(table)
