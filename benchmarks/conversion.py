"""``octick bench convert``: raw lines a second, in the converter and as a whole process."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import msgspec

from benchmarks.provenance import RECORDING, ROOT, VENUE, provenance, recorded
from engine.jitter import measure_jitter
from feeds.errors import InputError

JITTER_S: Final = 1.0


class ConvertBench(msgspec.Struct, frozen=True):
    """Medians over fresh processes with a warm cache of kernels.

    ``lines_per_s`` counts decompression, parsing, synchronising and writing the tape;
    ``process_s`` is the whole command, with the start of the interpreter and of Numba.
    """

    file: str
    lines: int
    runs: int
    lines_per_s: float
    process_s: float
    seconds: list[float]
    jitter_p99_us: float
    jitter_max_us: float
    machine: dict[str, str | int]
    versions: dict[str, str]
    commit: str
    date: str


def bench_convert(path: Path | None, venue: str | None, runs: int) -> ConvertBench:
    """Convert a recording ``runs`` times, after one time that does not count.

    Raises
    ------
    InputError
        If there is no recording, or it cannot be converted.
    """
    recording = path or recorded(RECORDING)
    if recording is None:
        raise InputError(
            "no recording to convert",
            where="bench convert",
            fix="name a file and its --venue, or set OCTICK_DATA",
        )
    jitter = measure_jitter(JITTER_S)
    found: list[dict[str, float]] = []
    walls: list[float] = []
    with tempfile.TemporaryDirectory(prefix="octick-bench-") as folder:
        for _ in range(runs + 1):
            started = time.perf_counter()
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "octick", "tape", "convert", str(recording)),
                    *("--venue", venue or VENUE, "--out", f"{folder}/out.tape"),
                    *("--overwrite", "--json"),
                ],
                capture_output=True,
                text=True,
                check=False,
                cwd=ROOT,
                env=os.environ,
            )
            walls.append(time.perf_counter() - started)
            if done.returncode:
                raise InputError(
                    "conversion failed", where=str(recording), found=done.stderr[-300:]
                )
            found.append(json.loads(done.stdout))
    counted = found[1:]
    return ConvertBench(
        file=recording.name,
        lines=int(counted[0]["lines"]),
        runs=runs,
        lines_per_s=statistics.median(run["lines_per_s"] for run in counted),
        process_s=round(statistics.median(walls[1:]), 3),
        seconds=[run["seconds"] for run in counted],
        jitter_p99_us=jitter.p99_ns / 1e3,
        jitter_max_us=jitter.max_ns / 1e3,
        **provenance(),
    )
