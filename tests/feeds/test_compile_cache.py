"""Compiled kernels never outlive the sources they were compiled from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from feeds.compile_cache import MAX_FOLDERS, cache_folder, kernel_hash, kernel_sources
from tests.conftest import ROOT

CONSTANT = "NUMBER = {}\n"
CALLEE = """\
from numba import njit
from feeds import constant
@njit('int64()', cache=True)
def number():
    return {} * constant.NUMBER
"""
CALLER = (
    "from numba import njit\nfrom feeds.callee import number\n"
    "@njit('int64()', cache=True)\ndef twice():\n    return 2 * number()\n"
)


def run(folder: Path, code: str, cache: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
        env=environment | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(folder)},
    )
    return done.stdout.strip()


def test_a_change_in_a_called_file_reaches_its_callers(tmp_path: Path) -> None:
    package = tmp_path / "feeds"
    package.mkdir()
    (package / "compile_cache.py").write_bytes((ROOT / "feeds/compile_cache.py").read_bytes())
    (package / "__init__.py").write_bytes((ROOT / "feeds/__init__.py").read_bytes())
    (package / "caller.py").write_text(CALLER)
    code = "from feeds.caller import twice; print(twice())"
    for number in (1, 2, 3):
        (package / "callee.py").write_text(CALLEE.format(number))
        for constant in (1, 10):
            (package / "constant.py").write_text(CONSTANT.format(constant))
            assert run(tmp_path, code, tmp_path / "cache") == str(2 * number * constant)


def test_a_constant_is_as_good_as_a_kernel() -> None:
    names = kernel_sources(ROOT)
    assert {"engine/advance.py", "engine/trust.py", "feeds/wire.py"} <= set(names)
    assert "engine/cli.py" not in names


def test_folders_of_other_states_are_dropped_in_time(tmp_path: Path) -> None:
    for i in range(MAX_FOLDERS + 5):
        (tmp_path / "octick" / f"{i:016x}").mkdir(parents=True)
    run(ROOT, "import feeds", tmp_path)
    left = {path.name for path in (tmp_path / "octick").iterdir()}
    assert len(left) == MAX_FOLDERS
    assert kernel_hash(ROOT) in left


def test_the_folder_follows_the_users_cache(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/octick")
