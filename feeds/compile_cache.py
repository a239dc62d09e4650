"""Where compiled kernels are kept: a folder for each state of the sources.

Numba's cache looks only at the file a function stands in. A kernel that was compiled with another
file's function inlined would live on after that file changed, and an engine would run code that
its hash does not name. So the cache folder carries a hash over every source file that a kernel can
depend on: any change there starts an empty one, and folders of other states are dropped in time.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Final

PACKAGES: Final = ("feeds", "engine", "replay", "models", "benchmarks")
MAX_FOLDERS: Final = 8
_MARKS: Final = (b"njit", b"@inner", b"intrinsic")
_IMPORT: Final = re.compile(
    rb"^(?:from|import) ((?:feeds|engine|replay|models|benchmarks)[\w.]*)"
    rb"(?: import (?:\(([^)]*)\)|([^\n(]*)))?",
    re.MULTILINE,
)
_NAME: Final = re.compile(rb"\w+")


def kernel_sources(root: Path) -> dict[str, bytes]:
    """Every source a compiled kernel can depend on: path below ``root`` → bytes, sorted.

    Those with a kernel in them, and what they import of ours, directly or not: a constant is
    compiled in like a function.
    """
    sources = {
        path.relative_to(root).as_posix(): path.read_bytes()
        for package in PACKAGES
        for path in (root / package).rglob("*.py")
    }
    queue = [name for name, text in sources.items() if any(mark in text for mark in _MARKS)]
    found: set[str] = set()
    while queue:
        name = queue.pop()
        if name in found:
            continue
        found.add(name)
        for module, inside, line in _IMPORT.findall(sources[name]):
            base = module.decode().replace(".", "/")
            names = [base, *(f"{base}/{n.decode()}" for n in _NAME.findall(inside or line))]
            queue += [f"{n}.py" for n in names if f"{n}.py" in sources]
    return {name: sources[name] for name in sorted(found)}


def kernel_hash(root: Path) -> str:
    """16 hex digits that name the state of all sources that kernels below ``root`` depend on."""
    digest = hashlib.sha256()
    for name, source in kernel_sources(root).items():
        digest.update(f"{name}\0{len(source)}\0".encode())
        digest.update(source)
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/octick``, ``~/.cache/octick`` where that is not set."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "octick"


def use_compile_cache() -> None:
    """Point Numba at this state's folder, unless ``NUMBA_CACHE_DIR`` says another one.

    Where no folder can be made, Numba keeps to its own rule.
    """
    if "NUMBA_CACHE_DIR" in os.environ:
        return
    parent = cache_folder()
    folder = parent / kernel_hash(Path(__file__).resolve().parent.parent)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
        folders = sorted(
            (path for path in parent.iterdir() if path.is_dir()), key=lambda p: p.stat().st_mtime
        )
        for old in folders[:-MAX_FOLDERS]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError:
        return
    os.environ["NUMBA_CACHE_DIR"] = str(folder)
    if "numba" in sys.modules:
        # A program that imported Numba before us: its configuration is read already.
        sys.modules["numba"].config.CACHE_DIR = str(folder)
