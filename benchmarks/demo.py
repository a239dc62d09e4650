"""The main job on one machine: simulator, daemon and subscriber as three processes, then a replay.

Everything is what a user would start: ``octick publish``, ``octick run``, ``octick subscribe`` and
``octick replay --verify``. This module only starts them, shows what the subscriber sees, and adds
up.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.live import Live
from rich.table import Table

from benchmarks.processes import Lines, children, last_json, octick, stop
from benchmarks.provenance import ROOT
from engine.bundle import load_bundle
from engine.config import load_config
from engine.jitter import Jitter, measure_jitter

CONFIG: Final = ROOT / "configs" / "simulator.toml"
JITTER_S: Final = 1.0
REFRESH_S: Final = 0.25
_LOST: Final = ""  # beside the instruments' counts: what the subscriber found missing


class DemoResult(msgspec.Struct):
    """What a person wants to see at the end."""

    seconds: float
    messages: int
    signals: int
    tradable: int
    received: int
    lost_by_engine: int
    lost_by_subscriber: int
    shadow_answers: int
    disagreements: int
    latency_p50_us: float
    latency_p99_us: float
    jitter_p99_us: float
    jitter_max_us: float
    tape: str
    digest_live: str
    digest_replay: str
    equal: bool


def _write_config(folder: Path, tape: Path) -> tuple[Path, dict[str, str]]:
    """The shipped simulator config on endpoints of this demo's own."""
    sockets = {name: f"ipc://{folder}/{name}" for name in ("feed", "snapshots", "signals")}
    shipped = load_config(CONFIG)
    text = (
        f'[[feed]]\nendpoint = "{sockets["feed"]}"\n'
        f'snapshot_endpoint = "{sockets["snapshots"]}"\n'
        f'[model]\nbundle = "{shipped.model.bundle}"\n'
        f'[publish]\nendpoint = "{sockets["signals"]}"\n'
        f'[tape]\npath = "{tape}"\n[shadow]\nevery = 1\n'
    )
    for item in shipped.instruments:
        text += f'[[instrument]]\nvenue = "{item.venue}"\nsymbol = "{item.symbol}"\n'
    path = folder / "demo.toml"
    path.write_text(text)
    return path, sockets


def _table(
    last: dict[str, dict[str, Any]],
    counts: dict[str, int],
    classes: tuple[str, ...],
    left_s: float,
) -> Table:
    table = Table(
        title=f"signals, {left_s:.0f} s to go", title_justify="left", padding=(0, 0, 0, 1)
    )
    for name in ("instrument", "signals", "book", "class", "logits", "best bid", "best ask"):
        left = name in ("instrument", "book", "class")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for name in sorted(last):
        signal = last[name]
        outputs = " ".join("-" if v is None else f"{v:+.1f}" for v in signal["outputs"])
        chosen = "-" if signal["predicted_class"] is None else classes[signal["predicted_class"]]
        trust = signal["book_state"] + ("" if signal["tradable"] else " !")
        table.add_row(
            name,
            f"{counts[name]:,}",
            trust,
            chosen,
            outputs,
            f"{signal['best_bid_ticks']}",
            f"{signal['best_ask_ticks']}",
        )
    return table


def run_demo(seconds: float, folder: Path, console: Console) -> DemoResult:
    """Run the demo.

    Parameters
    ----------
    seconds : float
        How long the session lasts once the engine is ready.
    folder : Path
        Where its tape is left.
    console : Console
        For the live table and what is going on.

    Raises
    ------
    InputError
        If one of the processes does not come up.
    """
    tape = folder / f"demo-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.tape"
    with console.status("compiling the kernels (once; cached afterwards)"):
        # What the three processes need, so that they do not all compile it at once.
        for module in ("engine.daemon", "feeds.publisher"):
            importlib.import_module(module)
    jitter: Jitter = measure_jitter(JITTER_S)
    with tempfile.TemporaryDirectory(prefix="octick-") as temporary, children() as alive:
        config, sockets = _write_config(Path(temporary), tape.resolve())
        watcher = octick("subscribe", sockets["signals"], "--json")
        engine_process = octick("run", str(config), "--json")
        market = octick(
            "publish", "sim", "--bind", sockets["feed"], "--snapshots", sockets["snapshots"]
        )  # fmt: skip
        alive += [watcher, engine_process, market]
        pipes = [child.stdout for child in alive] + [child.stderr for child in alive]
        out, engine_out, _, _, engine_err, _ = [Lines(p) for p in pipes if p is not None]
        with console.status("starting simulator, engine and subscriber"):
            engine_err.wait_for("READY", engine_process, "octick run")
        console.print("octick publish sim  →  octick run  →  octick subscribe", highlight=False)
        classes = load_bundle(load_config(CONFIG).model.bundle).classes
        last: dict[str, dict[str, Any]] = {}
        counts: dict[str, int] = {}
        deadline = time.monotonic() + seconds
        with Live(console=console, refresh_per_second=4, transient=False) as live:
            while (left_s := deadline - time.monotonic()) > 0 and engine_process.poll() is None:
                for line in out.take():
                    _note(line, last, counts)
                live.update(_table(last, counts, classes, left_s))
                time.sleep(min(REFRESH_S, max(left_s, 0.0)))
        stop(engine_process)
        stop(market)
        stop(watcher)
        totals = last_json(engine_out.finish(), "octick run")
        for line in out.finish():
            _note(line, last, counts)
    with console.status("replaying the tape"):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "octick", "replay", str(tape), "--verify", "--json"),
                *("--model", load_config(CONFIG).model.bundle),
            ],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        replayed = last_json([*done.stdout.splitlines(), done.stderr], "octick replay")
    live_digest = _recorded_digest(tape)
    return DemoResult(
        seconds=seconds,
        messages=totals["messages"],
        signals=totals["signals"],
        tradable=totals["tradable"],
        received=sum(n for name, n in counts.items() if name != _LOST),
        lost_by_engine=totals["lost"],
        lost_by_subscriber=counts.get(_LOST, 0),
        shadow_answers=totals["shadow_answers"],
        disagreements=totals["disagreements"],
        latency_p50_us=totals["latency_p50_us"],
        latency_p99_us=totals["latency_p99_us"],
        jitter_p99_us=jitter.p99_ns / 1e3,
        jitter_max_us=jitter.max_ns / 1e3,
        tape=str(tape),
        digest_live=live_digest,
        digest_replay=replayed["digest"],
        equal=done.returncode == 0 and live_digest == replayed["digest"],
    )


def _note(line: str, last: dict[str, dict[str, Any]], counts: dict[str, int]) -> None:
    message = json.loads(line)
    if message.get("kind", "signal") == "signal":
        name = f"{message['venue']}.{message['symbol']}"
        last[name] = message
        counts[name] = counts.get(name, 0) + 1
        counts[_LOST] = counts.get(_LOST, 0) + message["lost_before"]


def _recorded_digest(path: Path) -> str:
    from engine.digest import Digest
    from feeds.tape import SIGNAL
    from feeds.tape_reader import TapeReader

    digest = Digest()
    for record in TapeReader(path).records():
        if record.kind == SIGNAL:
            digest.update(record.payload)
    return digest.hexdigest()


def show(result: DemoResult, console: Console) -> None:
    """The end of the demo, for a person."""
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in (
        ("messages", f"{result.messages:,} in {result.seconds:.0f} s"),
        ("signals", f"{result.signals:,}, {result.tradable:,} tradable"),
        ("subscriber", f"{result.received:,} signals since it joined"),
        ("lost", f"{result.lost_by_engine} on the feed, {result.lost_by_subscriber} by the client"),
        ("FP32 shadow", f"{result.shadow_answers:,} inferences answered again, "
                        f"{result.disagreements:,} of another class"),
        ("latency", f"p50 {result.latency_p50_us:.1f} µs, p99 {result.latency_p99_us:.1f} µs "
                    "from receipt to sent"),
        ("host jitter", f"p99 {result.jitter_p99_us:.1f} µs, max {result.jitter_max_us:.1f} µs "
                        "(a spinning thread's gaps, before the run)"),
        ("tape", result.tape),
        ("digest, live", result.digest_live),
        ("digest, replay", result.digest_replay),
    ):  # fmt: skip
        table.add_row(f"[bold]{name}[/]", value)
    console.print()
    console.print(table)
    console.print()
    verdict = "[green]equal: the replay gave the same signals, byte for byte[/]"
    console.print(verdict if result.equal else "[red]the digests differ[/]")
