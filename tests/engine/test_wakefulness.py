"""Idle cores are kept awake while someone asks for it, and not a moment longer."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.processes import children, octick
from engine import wakefulness
from engine.config import load_config, parse_config
from engine.daemon import Daemon, run_daemon
from engine.wakefulness import UNBOUND_US, Wakefulness, asked_us, cores_stay_awake, refusal
from feeds.errors import InputError
from tests.conftest import ROOT

NOBODY = 65_534
needs_device = pytest.mark.skipif(bool(refusal()), reason=f"/dev/cpu_dma_latency: {refusal()}")


def requests_of_this_process() -> int:
    links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    return sum(os.path.lexists(x) and os.readlink(x) == "/dev/cpu_dma_latency" for x in links)


def run_session(config: str) -> None:
    """In a process of its own: requests before, at READY (and what the kernel says) and after."""
    seen: list[int | None] = [requests_of_this_process()]

    def ready(daemon: Daemon) -> None:
        seen.extend([requests_of_this_process(), asked_us()])

    run_daemon(load_config(config), lambda line: None, seconds=0.2, on_ready=ready)
    print(json.dumps([*seen, requests_of_this_process()]))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tree whose device is a file: it says what was written to it."""
    device = tmp_path / "dev" / "cpu_dma_latency"
    device.parent.mkdir()
    device.write_bytes(struct.pack("=i", UNBOUND_US))
    return tmp_path


@pytest.fixture
def closed_root() -> Iterator[Path]:
    """A tree that everybody may look into, with a device that nobody may write to."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        (root / "dev").mkdir(mode=0o755)
        (root / "dev/cpu_dma_latency").touch(mode=0o400)
        yield root


@pytest.fixture
def unprivileged(closed_root: Path) -> Iterator[None]:
    """No superuser, to whom every file is open; one again before the tree is removed."""
    assert closed_root.is_dir()
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    yield
    if before == 0:
        os.seteuid(before)


@needs_device
def test_the_kernel_says_what_is_asked_of_it_while_it_is_held() -> None:
    with Wakefulness(0) as held:
        assert asked_us() == 0
        assert requests_of_this_process() == 1
        held.close()
        assert requests_of_this_process() == 0
    assert requests_of_this_process() == 0


@needs_device
def test_another_process_that_is_killed_asks_for_nothing_any_more() -> None:
    program = "import sys; from engine.wakefulness import Wakefulness; Wakefulness(7).hold();"
    with children() as alive:
        child = subprocess.Popen(
            [sys.executable, "-c", program + "print(flush=True); sys.stdin.read()"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        alive.append(child)
        assert child.stdout is not None
        child.stdout.readline()
        least = asked_us()
        assert least is not None
        assert least <= 7
        child.kill()
        child.wait()
    assert asked_us() != 7


def test_what_is_asked_for_is_written_as_the_kernel_reads_it(root: Path) -> None:
    with Wakefulness(20, root):
        assert (root / "dev/cpu_dma_latency").read_bytes() == (20).to_bytes(4, sys.byteorder)
        assert asked_us(root) == 20


def test_below_zero_nothing_is_touched(tmp_path: Path) -> None:
    with Wakefulness(-1, tmp_path):
        assert asked_us(tmp_path) is None


def test_closing_twice_and_holding_again_are_fine(root: Path) -> None:
    request = Wakefulness(5, root)
    request.close()
    for _ in range(2):
        request.hold()
        request.close()
        request.close()


def test_looking_asks_for_nothing(root: Path) -> None:
    assert refusal(root) == ""
    assert asked_us(root) == UNBOUND_US


def test_where_there_is_no_device_one_line_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        Wakefulness(0, tmp_path).hold()
    assert caught.value.where == "config key 'loop.cpu_dma_latency_us'"
    assert caught.value.found == refusal(tmp_path) == "No such file or directory"
    assert "CONFIG_CPU_IDLE" in caught.value.fix
    assert "-1" in caught.value.fix
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("unprivileged")
def test_where_it_may_not_be_written_one_line_says_who_may(closed_root: Path) -> None:
    with pytest.raises(InputError) as caught:
        Wakefulness(0, closed_root).hold()
    assert caught.value.found == refusal(closed_root) == "Permission denied"
    assert str(closed_root / "dev/cpu_dma_latency") in caught.value.expected
    assert "udev" in caught.value.fix


@pytest.mark.parametrize(
    ("driver", "boot", "asked", "awake"),
    [
        ("haltpoll", "quiet", 0, True),
        ("intel_idle", "quiet", 1, False),
        ("intel_idle", "quiet", UNBOUND_US, False),
        ("none", "quiet", 0, False),
        ("none", "quiet idle=poll", UNBOUND_US, True),
    ],
)
def test_cores_stay_awake_where_a_driver_is_asked_or_the_kernel_was_booted_so(
    driver: str, boot: str, asked: int, awake: bool, root: Path
) -> None:
    for name, text in (
        ("sys/devices/system/cpu/cpuidle/current_driver", driver),
        ("proc/cmdline", boot),
    ):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text(text + "\n")
    (root / "dev/cpu_dma_latency").write_bytes(struct.pack("=i", asked))
    assert cores_stay_awake(root) is awake


def config_text(folder: Path, bundle: Path) -> str:
    return (
        f'[[feed]]\nendpoint = "ipc://{folder}/feed"\n'
        f'snapshot_endpoint = "ipc://{folder}/snapshots"\n'
        f'[[instrument]]\nvenue = "sim"\nsymbol = "ALPHA"\n'
        f'[model]\nbundle = "{bundle}"\nbackend = "compiled"\n'
        f'[publish]\nendpoint = "ipc://{folder}/signals"\n'
        "[loop]\ncpu_dma_latency_us = 0\n"
    )


@needs_device
def test_a_session_keeps_cores_awake_before_it_is_ready_and_lets_go_at_its_end(
    tmp_path: Path, reference_bundle: Path
) -> None:
    config = tmp_path / "engine.toml"
    config.write_text(config_text(tmp_path, reference_bundle))
    with children() as alive:
        feed = ("--bind", f"ipc://{tmp_path}/feed", "--snapshots", f"ipc://{tmp_path}/snapshots")
        alive.append(octick("publish", "sim", *feed))
        done = subprocess.run(
            [sys.executable, "-c", f"import {__name__} as t; t.run_session({str(config)!r})"],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    before, while_ready, asked, after = json.loads(done.stdout)
    assert (before, while_ready, asked, after) == (0, 1, 0, 0)


def test_a_session_that_cannot_have_it_does_not_start(
    tmp_path: Path, reference_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wakefulness, "DEVICE", Path("dev/no_such_device"))
    raw = tomllib.loads(config_text(tmp_path, reference_bundle))
    with pytest.raises(InputError, match=r"loop\.cpu_dma_latency_us"):
        Daemon(parse_config(raw, where="x.toml"), lambda line: None)
