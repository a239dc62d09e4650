"""Stages of a start add up to the process's age."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from engine.start_up import StartUp, age_ns
from tests.conftest import ROOT

TICK_S = 0.02  # the kernel's clock tick, and its neighbour
NO_PROC = not sys.platform.startswith("linux")


@pytest.mark.skipif(NO_PROC, reason="no /proc/self/stat here")
def test_the_age_of_a_process_lies_within_what_its_parent_saw() -> None:
    started = time.monotonic()
    code = "import time; time.sleep(0.1); from engine.start_up import age_ns; print(age_ns())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert 0.1 - TICK_S <= int(done.stdout) / 1e9 <= time.monotonic() - started + TICK_S


@pytest.mark.skipif(NO_PROC, reason="no /proc/self/stat here")
def test_stages_add_up_to_the_age() -> None:
    start_up = StartUp()
    time.sleep(0.03)
    start_up.mark("first")
    start_up.mark("second")
    assert list(start_up.seconds) == ["imports", "first", "second"]
    assert start_up.seconds["first"] >= 0.03
    assert sum(start_up.seconds.values()) == pytest.approx(age_ns() / 1e9, abs=2 * TICK_S)
