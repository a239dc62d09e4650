"""Python processes of the engine's own: where they find it, and how long they may take."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Final

from engine.cores import beside
from feeds.errors import InputError

NICE: Final = "5"  # the hot path comes first where cores are short


def child_environment() -> dict[str, str]:
    """Environment in which a child finds the engine, however this process was started."""
    root = str(Path(__file__).resolve().parent.parent)
    before = os.environ.get("PYTHONPATH", "")
    return os.environ | {"PYTHONPATH": os.pathsep.join((root, before)) if before else root}


async def run_child(*arguments: str, timeout_s: float) -> tuple[int, bytes, bytes]:
    """Run Python with arguments, niced; returns exit code, stdout and stderr.

    Raises
    ------
    InputError
        If it takes longer than ``timeout_s``; it is killed then.
    """
    child = await asyncio.create_subprocess_exec(
        *(*beside(), "nice", "-n", NICE, sys.executable, *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=child_environment(),
    )
    try:
        out, err = await asyncio.wait_for(child.communicate(), timeout_s)
    except (TimeoutError, asyncio.CancelledError) as error:
        if child.returncode is None:
            child.kill()
        await child.wait()
        if isinstance(error, asyncio.CancelledError):
            raise
        raise InputError(
            "a child process took too long",
            where=" ".join(arguments[:4]),
            expected=f"at most {timeout_s:g} s",
        ) from None
    return child.returncode or 0, out, err
