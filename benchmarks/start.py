"""``octick bench start``: from a process's start to READY, and what is compiled after it."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from benchmarks.processes import Lines, children, last_json, octick, stop
from benchmarks.provenance import ROOT, provenance
from engine.control import Command, ask
from engine.jitter import Jitter, measure_jitter
from feeds.compile_cache import use_compile_cache
from feeds.errors import InputError

CONFIG: Final = ROOT / "configs" / "simulator.toml"
MAX_START_S: Final = 3.0
TRADABLE_TIMEOUT_S: Final = 60.0
POLL_S: Final = 0.05
AFTER_S: Final = 1.5  # of signals once the first is tradable: past a timer, a state, a collection
MAX_PACKAGES: Final = 16
_ENDPOINT: Final = re.compile(r"tcp://127\.0\.0\.1:(\d+)")
_IMPORT: Final = re.compile(r"^import time:\s+(\d+) \|\s+\d+ \|\s+([\w.]+)")


class StartTimes(msgspec.Struct, frozen=True):
    """Seconds from the start of ``octick run`` to its READY, over ``n`` runs."""

    p50: float
    max: float
    n: int
    runs: list[float]


class StartBench(msgspec.Struct, frozen=True):
    """What was measured; ``ok`` within `MAX_START_S` (median) and with nothing compiled after it.

    Attributes
    ----------
    start_to_ready_s : StartTimes
        With a warm cache; ``first_s`` is that of the run before them, which may have filled it.
    compilations_after_ready : int
        Functions that Numba compiled in the engines after READY: while they took messages, were
        asked, halted, armed and stopped. ``compiled`` names the first ones.
    cache_files_written : int
        By these runs, shadow processes included: what compiles with a cache writes it.
    stages_s : dict of str to float
        Medians of what the engine says of itself; ``report`` is what its clock does not see.
    imports_s : dict of str to float
        Time that imports took of their own, by top-level package, most first, in one more run that
        prints each of them. What is loaded from Numba's cache stands under our own packages.
    """

    ok: bool
    start_to_ready_s: StartTimes
    first_s: float
    compilations_after_ready: int
    compiled: list[str]
    cache_files_written: int
    stages_s: dict[str, float]
    imports_s: dict[str, float]
    config: str
    jitter: Jitter
    machine: dict[str, str | int]
    versions: dict[str, str]
    commit: str
    date: str


def bench_start(
    runs: int, *, progress: Callable[[str, float], Any] = lambda stage, share: None
) -> StartBench:
    """Start the shipped config ``runs`` times beside its running simulator.

    Its endpoints are moved from TCP ports, which may be taken, to sockets in a folder of their own.
    """
    use_compile_cache()
    cache = Path(os.environ["NUMBA_CACHE_DIR"])
    jitter = measure_jitter()
    seconds: list[float] = []
    totals: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="octick-bench-") as name, children() as alive:
        folder = Path(name)
        text = _ENDPOINT.sub(lambda port: f"ipc://{folder}/{port[1]}", CONFIG.read_text())
        config = folder / CONFIG.name
        config.write_text(text.replace('"../', f'"{ROOT}/'))
        feed, snapshots = (f"ipc://{folder}/{port}" for port in ("5555", "5556"))
        market = octick("publish", "sim", "--bind", feed, "--snapshots", snapshots)
        alive.append(market)
        pipes = [Lines(pipe) for pipe in (market.stdout, market.stderr) if pipe is not None]
        pipes[1].wait_for("publishing", market, "octick publish")
        progress("filling the cache", 0.0)
        first, _, _ = _start(config, folder, alive)
        files = set(cache.rglob("*"))
        for run in range(runs):
            progress(f"start {run + 1} of {runs}", run / (runs + 1))
            taken, found, _ = _start(config, folder, alive)
            seconds.append(taken)
            totals.append(found)
        written = len({path for path in cache.rglob("*") if path.is_file()} - files)
        progress("timing the imports", runs / (runs + 1))
        _, _, lines = _start(config, folder, alive, {"PYTHONPROFILEIMPORTTIME": "1"})
        stop(market)
    stages = {
        stage: round(float(np.median([found["start_up_s"][stage] for found in totals])), 3)
        for stage in totals[0]["start_up_s"]
    }
    p50 = float(np.median(seconds))
    stages["report"] = round(max(0.0, p50 - sum(stages.values())), 3)
    compilations = sum(found["compilations"] for found in totals)
    return StartBench(
        ok=p50 < MAX_START_S and compilations == 0 and written == 0,
        start_to_ready_s=StartTimes(
            p50=round(p50, 3),
            max=round(max(seconds), 3),
            n=runs,
            runs=[round(value, 3) for value in seconds],
        ),
        first_s=round(first, 3),
        compilations_after_ready=compilations,
        compiled=sorted({name for found in totals for name in found["compiled"]}),
        cache_files_written=written,
        stages_s=stages,
        imports_s=import_times(lines),
        config=CONFIG.name,
        jitter=jitter,
        **provenance(),
    )


def _start(
    config: Path, folder: Path, alive: list[Any], environment: dict[str, str] | None = None
) -> tuple[float, dict[str, Any], list[str]]:
    """One run: seconds to READY, its totals, and what it wrote to stderr until READY."""
    started = time.perf_counter()
    engine = octick("run", str(config), "--json", environment=environment or {})
    alive.append(engine)
    out, err = (Lines(pipe) for pipe in (engine.stdout, engine.stderr) if pipe is not None)
    lines = err.wait_for("READY", engine, "octick run")
    seconds = time.perf_counter() - started
    endpoint = f"ipc://{folder}/5558"
    _wait_until_tradable(endpoint)
    ask(endpoint, Command("halt", "bench"))
    ask(endpoint, Command("arm", "bench"))
    _wait_until_tradable(endpoint)
    time.sleep(AFTER_S)
    stop(engine)
    return seconds, last_json(out.finish(), "octick run"), lines


def _wait_until_tradable(endpoint: str) -> None:
    """Wait for one more tradable signal."""
    before = ask(endpoint, Command("status"))["tradable"]
    deadline = time.monotonic() + TRADABLE_TIMEOUT_S
    while ask(endpoint, Command("status"))["tradable"] <= before:
        if time.monotonic() > deadline:
            raise InputError("no tradable signal", where="octick run", fix="run 'octick doctor'")
        time.sleep(POLL_S)


def import_times(lines: list[str]) -> dict[str, float]:
    """Seconds of their own that imports took, by top-level package, most first.

    Source: Python documentation, ``-X importtime``: self time in microseconds, cumulative, name.
    """
    found: dict[str, int] = {}
    for line in lines:
        match = _IMPORT.match(line)
        if match:
            package = match[2].partition(".")[0]
            found[package] = found.get(package, 0) + int(match[1])
    most = sorted(found.items(), key=lambda item: -item[1])[:MAX_PACKAGES]
    return {package: round(micros / 1e6, 3) for package, micros in most}
