"""What an engine says of itself when its session ends: start, pauses, compilations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.processes import children, octick
from tests.conftest import ROOT

SECONDS = 1.6  # past a state, and with it a collection
RUN = f"""
import sys
import msgspec
from numba import njit
from engine.config import load_config
from engine.daemon import run_daemon

def compile_one(daemon):
    njit("int64(int64)")(lambda x: x + 1)

totals = run_daemon(
    load_config(sys.argv[1]), lambda line: None, seconds={SECONDS}, on_ready=compile_one
)
print(msgspec.json.encode(totals).decode())
"""


def test_a_compilation_after_ready_is_counted_and_so_are_pauses_and_stages(
    tmp_path: Path, reference_bundle: Path
) -> None:
    config = tmp_path / "engine.toml"
    config.write_text(
        f'[[feed]]\nendpoint = "ipc://{tmp_path}/feed"\n'
        f'snapshot_endpoint = "ipc://{tmp_path}/snapshots"\n'
        f'[[instrument]]\nvenue = "sim"\nsymbol = "ALPHA"\n'
        f'[model]\nbundle = "{reference_bundle}"\nbackend = "compiled"\n'
        f'[publish]\nendpoint = "ipc://{tmp_path}/signals"\n'
    )
    with children() as alive:
        feed = ("--bind", f"ipc://{tmp_path}/feed", "--snapshots", f"ipc://{tmp_path}/snapshots")
        alive.append(octick("publish", "sim", *feed))
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(config)],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    totals = json.loads(done.stdout)
    assert totals["signals"] > 0
    assert totals["compilations"] == 1
    assert len(totals["compiled"]) == 1
    assert totals["compiled"][0].endswith("compile_one.<locals>.<lambda>")
    assert totals["collections"] >= 1
    assert totals["longest_gc_pause_us"] > 0
    stages = totals["start_up_s"]
    assert {"imports", "backend", "handshake", "warm-up"} <= set(stages)
    # The session's own clock starts behind the imports, and goes on for `SECONDS`.
    assert sum(stages.values()) - stages["imports"] < totals["seconds"] - SECONDS + 0.1
