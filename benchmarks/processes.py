"""The engine's commands as child processes: started, listened to, and all gone at the end."""

from __future__ import annotations

import json
import os
import queue
import signal as os_signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import IO, Any, Final

from benchmarks.provenance import ROOT
from feeds.errors import InputError

READY_TIMEOUT_S: Final = 120.0
STOP_TIMEOUT_S: Final = 20.0
MAX_QUEUED_LINES: Final = 100_000


class Lines:
    """Lines of a child's output, taken by a thread so that its pipe never fills."""

    def __init__(self, stream: IO[str]) -> None:
        self._queue: queue.Queue[str] = queue.Queue(MAX_QUEUED_LINES)
        self._thread = threading.Thread(target=self._pump, args=(stream,), daemon=True)
        self._thread.start()

    def _pump(self, stream: IO[str]) -> None:
        for line in stream:
            self._queue.put(line)

    def take(self) -> Iterator[str]:
        """What has come since the last time."""
        while True:
            try:
                yield self._queue.get_nowait()
            except queue.Empty:
                return

    def wait_for(self, start: str, child: subprocess.Popen[str], what: str) -> list[str]:
        """Lines up to one that starts so."""
        seen: list[str] = []
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                seen.append(self._queue.get(timeout=0.1))
            except queue.Empty:
                if child.poll() is not None and self._queue.empty():
                    break
                continue
            if seen[-1].startswith(start):
                return seen
        raise InputError(
            f"{what} did not become ready",
            where=what,
            found=" ".join("".join(seen).split())[-300:] or "no output",
            fix="run 'octick doctor'",
        )

    def finish(self) -> list[str]:
        """All that is left, once the child has ended."""
        self._thread.join(STOP_TIMEOUT_S)
        return list(self.take())


def octick(
    *args: str, environment: Mapping[str, str] = MappingProxyType({})
) -> subprocess.Popen[str]:
    """Start ``octick`` with arguments, both outputs piped, out of reach of this Ctrl-C."""
    return subprocess.Popen(
        [sys.executable, "-m", "octick", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | dict(environment),
        start_new_session=True,
    )


@contextmanager
def children() -> Iterator[list[subprocess.Popen[str]]]:
    """A list for children; those still there at the end are killed."""
    alive: list[subprocess.Popen[str]] = []
    try:
        yield alive
    finally:
        for child in alive:
            if child.poll() is None:
                child.kill()
            child.wait()


def stop(child: subprocess.Popen[str]) -> None:
    """End a child as an operator would."""
    if child.poll() is None:
        child.send_signal(os_signal.SIGINT)
    child.wait(STOP_TIMEOUT_S)


def last_json(lines: list[str], where: str) -> dict[str, Any]:
    """The last JSON object that a child printed."""
    for line in reversed(lines):
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    raise InputError("no result", where=where, found="".join(lines)[-300:])
