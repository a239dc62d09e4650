"""One digest, whichever backend answers: in a replay, and live."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.backends.registry import default_device, open_backend
from engine.bundle import load_bundle
from engine.manifest import StateSection
from feeds.simulator import Simulator
from models.dataset import Normalisation
from models.export import write_bundle
from models.labels import CLASSES
from replay.session import replay_tapes
from tests.conftest import ROOT
from tests.engine.bundles import make_bundle
from tests.models.small_networks import CLIP, N_FEATURES, twins
from tests.replay.processes import READY_S, Processes, stop

MESSAGES = 6_000
RTL_SIM = ("fpga", "rtl-sim")


def needs(backend: str) -> None:
    """Skip where a backend's tools are missing."""
    if backend == "fpga" and not (shutil.which("g++") and shutil.which("make")):
        pytest.skip("rtl-sim is built with g++ and make; on Debian: apt-get install g++ make")


@pytest.fixture(scope="module")
def tape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three instruments, interleaved, with a fault now and then that resets a stream."""
    path = tmp_path_factory.mktemp("tape") / "sim.tape"
    Simulator(seed=21, n_instruments=3).write_tape(path, MESSAGES)
    return path


@pytest.fixture(scope="module", params=["reference", "tcn", "lstm", "gru"])
def bundle(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    reference_bundle: Path,
) -> Path:
    """The shipped model, and untrained ones that remember."""
    if request.param == "reference":
        return reference_bundle
    found = twins(request.param)
    folder = tmp_path_factory.mktemp(request.param) / "bundle"
    write_bundle(
        folder,
        request.param,
        found.int8,
        found.fp32,
        numerics="exact-int8",
        normalisation=Normalisation(np.zeros(N_FEATURES), np.ones(N_FEATURES), CLIP),
        classes=CLASSES,
        state=StateSection(int8=found.int8_state, fp32=found.fp32_state),
    )
    return folder


@pytest.mark.slow
def test_a_replay_has_one_digest(bundle: Path, tape: Path) -> None:
    expected = replay_tapes([tape], model=bundle)
    assert expected.tradable > 500
    others = [("compiled", "cpu"), ("compiled", "cpu:plain")]
    if bundle.name == "reference":
        needs("fpga")
        others += [("split", "compiled/cpu > hidden0 > compiled/cpu:plain"), RTL_SIM]
    for backend, device in others:
        found = replay_tapes([tape], model=bundle, backend=backend, device=device)
        assert (found.digest, found.signals) == (expected.digest, expected.signals), backend


def test_violations_and_moves_are_the_same(tape: Path, tmp_path: Path) -> None:
    """A model to which one saturated code is too many: suppressed, demoted, promoted, halted."""
    make_bundle(tmp_path / "bundle", checks=True)
    reports = [
        replay_tapes([tape], model=tmp_path / "bundle", backend=name, evidence=tmp_path / name)
        for name in ("onnx", "compiled")
    ]
    slow, fast = (
        (r.digest, r.signals, r.tradable, r.suppressed, r.transitions, r.counters) for r in reports
    )
    assert slow == fast
    assert reports[0].suppressed["VALUE_CHECK"] > 0
    assert reports[0].transitions > 0
    files = [sorted(path.name for path in (tmp_path / n).iterdir()) for n in ("onnx", "compiled")]
    assert files[0] == files[1]
    assert files[0]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["compiled", "fpga"])
def test_a_live_session_replays_on_another_backend(
    backend: str, processes: Processes, reference_bundle: Path
) -> None:
    needs(backend)
    open_backend(backend, load_bundle(reference_bundle), default_device(backend)).close()  # builds
    market = processes.market("--rate", "400", "--seconds", "6")
    engine = processes.engine(processes.config(reference_bundle), "--backend", backend)
    market.communicate(timeout=READY_S)
    totals = stop(engine)
    assert totals["lost"] == 0
    assert totals["tradable"] > 50
    for other in ("onnx", "compiled"):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "octick", "replay", str(processes.tape), "--json"),
                *("--model", str(reference_bundle), "--verify", "--backend", other),
            ],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr + done.stdout
        verification = json.loads(done.stdout)["verification"]
        assert (verification["differing"], verification["recorded"]) == (0, totals["signals"])
