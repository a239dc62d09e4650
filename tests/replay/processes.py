"""The engine's commands as real processes, for tests of live sessions."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from feeds.errors import InputError
from feeds.tape_reader import TapeReader
from tests.conftest import ROOT

READY_S = 180.0
SYMBOLS = ("ALPHA", "BETA", "GAMMA")


class Processes:
    """Children of one test, all gone at its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.children: list[subprocess.Popen[str]] = []
        self.tape = folder / "session.tape"

    def endpoint(self, name: str) -> str:
        return f"ipc://{self.folder}/{name}"

    def start(self, *args: str, out: Path | None = None) -> subprocess.Popen[str]:
        return self.python("-m", "octick", *args, out=out)

    def python(self, *args: str, out: Path | None = None) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, *args],
            stdout=subprocess.PIPE if out is None else out.open("w"),
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        self.children.append(child)
        return child

    def config(self, bundle: Path, symbols: tuple[str, ...] = SYMBOLS, extra: str = "") -> Path:
        text = (
            f'[[feed]]\nendpoint = "{self.endpoint("feed")}"\n'
            f'snapshot_endpoint = "{self.endpoint("snapshots")}"\n'
            f'[model]\nbundle = "{bundle}"\n[publish]\nendpoint = "{self.endpoint("signals")}"\n'
            f'[tape]\npath = "{self.tape}"\n[limits]\nsnapshot_timeout_ns = 100_000_000\n{extra}'
        )
        for symbol in symbols:
            text += f'[[instrument]]\nvenue = "sim"\nsymbol = "{symbol}"\n'
        path = self.folder / "engine.toml"
        path.write_text(text)
        return path

    def engine(self, config: Path, *args: str) -> subprocess.Popen[str]:
        """A daemon that has said READY."""
        return self.ready(self.start("run", str(config), "--json", *args))

    def ready(self, child: subprocess.Popen[str]) -> subprocess.Popen[str]:
        """Wait until a daemon says READY."""
        assert child.stderr is not None
        deadline = time.monotonic() + READY_S
        seen = ""
        while time.monotonic() < deadline:
            line = child.stderr.readline()
            seen += line
            if line.startswith("READY"):
                return child
            if not line:
                break
        pytest.fail(f"the engine did not become ready: {seen}")

    def market(self, *args: str) -> subprocess.Popen[str]:
        return self.start(
            *("publish", "sim", "--bind", self.endpoint("feed")),
            *("--snapshots", self.endpoint("snapshots"), "--instruments", "3", "--json", *args),
        )

    def wait_for_records(self, count: int) -> None:
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            # The engine writes on meanwhile: the last record may be read half done.
            with contextlib.suppress(InputError):
                if sum(1 for _ in TapeReader(self.tape).records(allow_truncated=True)) > count:
                    return
        pytest.fail(f"the tape did not grow to {count} records")

    def verify(self, bundle: Path) -> dict[str, Any]:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "octick", "replay", str(self.tape)),
                *("--model", str(bundle), "--verify", "--json"),
            ],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr + done.stdout
        result: dict[str, Any] = json.loads(done.stdout)
        return result


def stop(child: subprocess.Popen[str], number: int = signal.SIGINT) -> dict[str, Any]:
    """End a child as an operator would; its closing JSON."""
    child.send_signal(number)
    out, err = child.communicate(timeout=30)
    assert child.returncode == 0, err
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found
