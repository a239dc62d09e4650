"""The demo, and the benchmarks' commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from feeds.simulator import Simulator
from tests.conftest import ROOT


def octick_json(*args: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "octick", *args, "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_demo_ends_with_two_equal_digests(tmp_path: Path) -> None:
    result = octick_json("demo", "--seconds", "3", "--out", str(tmp_path))
    assert result["equal"]
    assert result["digest_live"] == result["digest_replay"]
    assert result["messages"] > 500
    assert result["signals"] >= result["received"] > 100
    assert result["lost_by_engine"] == result["lost_by_subscriber"] == 0
    assert Path(result["tape"]).parent == tmp_path


def test_bench_memory_watches_a_replay() -> None:
    result = octick_json("bench", "memory", "--messages", "700000")
    assert result["messages"] == 700_000
    assert result["samples"] >= 8
    assert abs(result["growth_mb"]) < 16


def test_bench_convert_counts_every_line(data_dir: Path) -> None:
    result = octick_json("bench", "convert", "--runs", "1")
    assert result["lines"] == 93_954
    assert result["lines_per_s"] > 0
    assert result["process_s"] > result["seconds"][0]


def test_compile_finds_everything_compiled(tmp_path: Path) -> None:
    """After it, a replay adds nothing to the cache."""
    done = subprocess.run(
        [sys.executable, "-m", "octick", "compile"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    cache = Path(
        subprocess.run(
            [sys.executable, "-c", "import feeds, os; print(os.environ['NUMBA_CACHE_DIR'])"],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        ).stdout.strip()
    )
    before = sorted(cache.rglob("*.nbc"))
    tape = tmp_path / "a.tape"
    Simulator(seed=1, n_instruments=1).write_tape(tape, messages=2_000)
    octick_json("replay", str(tape), "--model", str(ROOT / "models" / "reference"))
    assert sorted(cache.rglob("*.nbc")) == before
