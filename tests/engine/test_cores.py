"""The hot path keeps to its core, and everything else keeps off it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine import cores
from feeds.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, os, subprocess, sys, threading
from engine import cores
ready, done = threading.Event(), threading.Event()
other = []
def rest():
    other.append(threading.get_native_id())
    ready.set()
    done.wait()
thread = threading.Thread(target=rest)
thread.start()
ready.wait()
allowed = os.sched_getaffinity(0)
core = max(allowed)
cores.keep_to(core)
own = sorted(os.sched_getaffinity(0))
others = sorted(os.sched_getaffinity(other[0]))
ask = "import os; print(sorted(os.sched_getaffinity(0)))"
child = subprocess.run([*cores.beside(), sys.executable, "-c", ask], capture_output=True, text=True)
cores.let_go()
done.set()
after = sorted(os.sched_getaffinity(0))
print(json.dumps([sorted(allowed), core, own, others, json.loads(child.stdout), after]))
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_this_thread_has_the_core_and_threads_and_children_have_the_others() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True
    )
    allowed, core, own, others, child, after = json.loads(done.stdout)
    rest = [number for number in allowed if number != core]
    assert own == [core]
    assert others == rest
    assert child == rest
    assert after == allowed


def test_a_core_that_is_not_ours_is_refused() -> None:
    with pytest.raises(InputError, match=r"loop\.core"):
        cores.keep_to(4_000)
    assert cores.beside() == []
