"""Memory for a backlog: there once, and none more for the next."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import time, zmq
from engine import backlog
def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
if not backlog.keep_memory():
    raise SystemExit("no mallopt here")
context = zmq.Context()
backlog.make_room(context, 10)
found = [resident()]
for messages in (40_000, *[2_000] * 20):
    backlog.make_room(context, messages)
    found.append(resident())
context.term()
print(*found)
"""


def test_what_a_long_backlog_took_the_shorter_ones_find() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if "no mallopt" in done.stderr:
        pytest.skip("this C library has no mallopt")
    before, first, *others = map(int, done.stdout.split())
    assert first - before > 4_000, "kB that stay"
    assert max(others) - first < (first - before) / 10
