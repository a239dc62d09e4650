"""House rules that no linter knows."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

MAX_LINES = 550
MAX_FILE_BYTES = 1_000_000
FORBIDDEN_NAMES = re.compile(r"^(utils?|helpers?|managers?|common|misc|base)\.py$")
UNSAFE = re.compile(r"import pickle|pickle\.loads?\(|allow_pickle=True|yaml\.load\(|[^a-z_.]eval\(")
LIBM = re.compile(r"\b(?:math|np)\.(?:log|log2|log10|log1p|exp|exp2|expm1|pow|power|tanh)\(")
KERNEL_MARK = re.compile(r"^@(?:njit|inner)\b", re.MULTILINE)
OURS = ("octick.py", "feeds/", "engine/", "replay/", "models/", "benchmarks/")


def tracked() -> list[str]:
    done = subprocess.run(
        ["git", "ls-files"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def sources() -> list[Path]:
    return [ROOT / name for name in tracked() if name.endswith(".py") and name.startswith(OURS)]


def test_files_are_named_for_what_they_hold_and_are_one_thing() -> None:
    for path in sources():
        assert not FORBIDDEN_NAMES.match(path.name), path
        assert len(path.read_text().splitlines()) <= MAX_LINES, path


def test_nothing_loads_what_could_run_code() -> None:
    for path in sources():
        assert not UNSAFE.search(path.read_text()), path


def test_torch_stays_in_models() -> None:
    for path in sources():
        if "models" not in path.parts:
            assert not re.search(r"^\s*(?:import|from) torch", path.read_text(), re.M), path


def test_a_file_of_kernels_says_so_and_they_compile_ahead() -> None:
    for path in sources():
        text = path.read_text()
        if path.parts[-2] in ("feeds", "engine", "venues") and KERNEL_MARK.search(text):
            lazy = re.findall(r"^@njit(?:\(cache=True\))?\n", text, re.M)
            assert not lazy, f"{path}: a kernel without an eager signature compiles in the hot path"
            assert "fastmath" not in text, path


def test_no_kernel_that_feeds_a_signal_calls_the_platforms_libm() -> None:
    for name in ("features", "feature_updates", "feature_state", "advance", "signals", "book"):
        assert not LIBM.search((ROOT / "engine" / f"{name}.py").read_text()), name


def test_the_repository_holds_no_recorded_data() -> None:
    for name in tracked():
        # The reference bundle is made of the simulator's data alone.
        ours = name.startswith("models/reference/") and name.endswith(".npz")
        recorded = (".gz", ".xz", ".dbn", ".zst", ".csv", ".npz", ".parquet")
        assert ours or not name.endswith(recorded), name
        assert (ROOT / name).stat().st_size <= MAX_FILE_BYTES, name
