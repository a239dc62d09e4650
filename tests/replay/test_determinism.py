"""One digest, whatever is not an input is changed: each variant is a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SIM_MESSAGES = 20_000


def replay(tapes: list[Path], bundle: Path, *options: str, **environment: str) -> dict[str, object]:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "octick", "replay", *map(str, tapes)),
            *("--model", str(bundle), "--json", *options),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout)
    return result


def convert(raw: Path, venue: str, out: Path, **environment: str) -> Path:
    subprocess.run(
        [
            *(sys.executable, "-m", "octick", "tape", "convert", str(raw)),
            *("--venue", venue, "--out", str(out)),
        ],
        check=True,
        capture_output=True,
        cwd=ROOT,
        env=os.environ | environment,
    )
    return out


def config_file(path: Path, names: list[tuple[str, str]]) -> Path:
    path.write_text("".join(f'[[instrument]]\nvenue = "{v}"\nsymbol = "{s}"\n' for v, s in names))
    return path


@pytest.fixture(scope="module")
def sim_tape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from feeds.simulator import Simulator

    path = tmp_path_factory.mktemp("sim") / "sim.tape"
    Simulator(seed=5, n_instruments=3).write_tape(path, messages=SIM_MESSAGES)
    return path


@pytest.fixture(scope="module")
def plain(sim_tape: Path, reference_bundle: Path) -> dict[str, object]:
    result = replay([sim_tape], reference_bundle, PYTHONHASHSEED="0")
    assert int(str(result["tradable"])) > 1_000
    return result


def test_hash_seed(sim_tape: Path, reference_bundle: Path, plain: dict[str, object]) -> None:
    other = replay([sim_tape], reference_bundle, PYTHONHASHSEED="4242")
    assert other["digest"] == plain["digest"]


def test_threads_of_onnx_runtime(
    sim_tape: Path, reference_bundle: Path, plain: dict[str, object]
) -> None:
    other = replay([sim_tape], reference_bundle, "--threads", "2")
    assert other["digest"] == plain["digest"]


def test_a_cpu_without_vector_units(
    sim_tape: Path, reference_bundle: Path, plain: dict[str, object]
) -> None:
    other = replay([sim_tape], reference_bundle, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="")
    assert other["digest"] == plain["digest"]


def test_replay_speed(sim_tape: Path, reference_bundle: Path, plain: dict[str, object]) -> None:
    other = replay([sim_tape], reference_bundle, "--speed", "500")
    assert other["digest"] == plain["digest"]


def test_order_of_instruments(
    sim_tape: Path, reference_bundle: Path, plain: dict[str, object], tmp_path: Path
) -> None:
    names = [("sim", "GAMMA"), ("sim", "ALPHA"), ("sim", "BETA")]
    for order in (names, names[::-1]):
        config = config_file(tmp_path / "config.toml", order)
        other = replay([sim_tape], reference_bundle, "--config", str(config))
        assert other["digest"] == plain["digest"]


def test_a_sealed_tape(
    sim_tape: Path, reference_bundle: Path, plain: dict[str, object], tmp_path: Path
) -> None:
    from feeds.tape_seal import seal_tape

    sealed = tmp_path / "sim.tape.zst"
    seal_tape(sim_tape, sealed, keep=True)
    assert replay([sealed], reference_bundle)["digest"] == plain["digest"]


def test_another_tape_has_another_digest(
    tmp_path: Path, reference_bundle: Path, plain: dict[str, object]
) -> None:
    from feeds.simulator import Simulator

    path = tmp_path / "other.tape"
    Simulator(seed=6, n_instruments=3).write_tape(path, messages=SIM_MESSAGES)
    assert replay([path], reference_bundle)["digest"] != plain["digest"]


def test_recordings_of_two_venues_in_any_order(
    data_dir: Path, tmp_path: Path, reference_bundle: Path
) -> None:
    """Converted twice and replayed twice, in fresh processes, the tapes named in either order."""
    digests = set()
    for attempt, seed in enumerate(("1", "2")):
        tapes = [
            convert(
                data_dir / "binance" / f"{name}_20240808.gz",
                venue,
                tmp_path / f"{name}-{attempt}.tape",
                PYTHONHASHSEED=seed,
            )
            for name, venue in (
                ("usdm_btcusdt", "binance-usdm"),
                ("spot_ethusdt", "binance-spot"),
            )
        ]
        ordered = tapes if attempt == 0 else tapes[::-1]
        result = replay(ordered, reference_bundle, PYTHONHASHSEED=seed)
        assert int(str(result["tradable"])) > 1_000
        digests.add(result["digest"])
    assert len(digests) == 1
    one, two = (tmp_path / f"usdm_btcusdt-{attempt}.tape" for attempt in range(2))
    assert one.read_bytes() == two.read_bytes()
