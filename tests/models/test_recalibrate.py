"""Recalibration: a candidate from recent rows, the same each time; or a refusal and no more."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from engine.bundle import check_files, load_bundle
from engine.candidate import judge
from engine.manifest import MANIFEST_NAME, read_manifest
from feeds.errors import InputError
from feeds.simulator import Simulator
from feeds.tape_reader import TapeReader
from models.bundles import make_bundle
from models.calibration_set import BLOCK_ROWS, load_calibration_set
from models.dataset import collect
from models.export import npz_bytes, write_manifest
from models.quantisation import Options
from models.recalibrate import Recalibration, Request, load_parent, recalibrate
from models.recalibrate_cli import recalibrate as command
from models.recent_rows import FrozenTapes, recent_rows
from models.runs import load_run
from models.source import SOURCE_NAME
from models.train_run import Request as TrainRequest
from models.train_run import train_run
from tests.engine.bundles import make_bundle as make_foreign_bundle

MESSAGES = 20_000
ROWS = 4_096


@pytest.fixture(scope="module")
def tape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished session."""
    path = tmp_path_factory.mktemp("tape") / "session.tape"
    Simulator(seed=4, n_instruments=2).write_tape(path, MESSAGES)
    return path


def trained(arch: str, folder: Path) -> Path:
    """A bundle that serves: a short run on another session."""
    train_run(TrainRequest(arch=arch, simulate=MESSAGES, horizon=20, epochs=1, seed=2), folder)
    options = Options(scales="power-of-two", observer="mse", rows=2_000)
    make_bundle(load_run(folder), options, folder / "bundle", name=arch, with_report=False)
    return folder / "bundle"


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained("mlp", tmp_path_factory.mktemp("mlp"))


@pytest.fixture(scope="module")
def gru(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained("gru", tmp_path_factory.mktemp("gru"))


def made(parent: Path, tape: Path, out: Path, **request: Any) -> Recalibration:
    return recalibrate(load_parent(parent), [tape], out, Request(rows=ROWS, **request))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def altered(parent: Path, folder: Path, training: dict[str, Any], **files: bytes) -> Path:
    """The parent with other notes and further files, whole outside: hashes fit."""
    shutil.copytree(parent, folder)
    manifest = read_manifest(folder / MANIFEST_NAME)
    hashes = dict(manifest.files)
    for name, data in files.items():
        (folder / f"{name}.npz").write_bytes(data)
        hashes[f"{name}.npz"] = hashlib.sha256(data).hexdigest()
    manifest = msgspec.structs.replace(
        manifest, training=manifest.training | training, files=hashes
    )
    write_manifest(folder, manifest)
    return folder


# The candidate


@pytest.mark.parametrize("arch", ["mlp", "gru"])
def test_a_candidate_is_a_whole_bundle_of_the_same_weights(
    arch: str, request: pytest.FixtureRequest, tape: Path, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(arch)
    found = made(folder, tape, tmp_path / "candidate", calibration_set=tmp_path / "set.npz")
    assert found.ok, found.refused
    parent, candidate = load_bundle(folder), load_bundle(tmp_path / "candidate")
    check_files(candidate)
    assert found.model_hash == candidate.manifest.model_hash
    assert found.parent_hash == parent.manifest.model_hash
    assert found.unchanged == (candidate.model_hash == parent.model_hash)
    assert candidate.numerics == parent.numerics == "exact-int8"
    assert candidate.manifest.input == parent.manifest.input
    assert candidate.manifest.fp32_sha256 == parent.manifest.fp32_sha256
    assert candidate.name != parent.name
    assert candidate.name.startswith(f"{arch}-")
    assert candidate.manifest.training["options"] == parent.manifest.training["options"]
    assert {check.level for check in found.checks} == {"operator", "subgraph", "system"}
    assert all(check.ok for check in found.checks)
    assert found.comparison is not None
    assert found.comparison.candidate.agreement > 0.97
    assert found.comparison.fp32_difference == 0.0
    assert found.comparison.serving.divergence["p99"] > 0.0
    verdict = judge(folder, tmp_path / "candidate")
    assert verdict.ok, verdict.reasons
    assert not [item for item in tmp_path.iterdir() if "staged" in item.name]


def test_the_manifest_says_what_it_was_calibrated_from(
    mlp: Path, tape: Path, tmp_path: Path
) -> None:
    found = made(mlp, tape, tmp_path / "candidate")
    facts = load_bundle(tmp_path / "candidate").manifest.training["recalibration"]
    assert facts["parent_model_hash"] == found.parent_hash
    assert facts["tapes"] == [tape.name]
    assert facts["rows"] == found.rows == ROWS < found.rows_on_tape
    times = facts["event_time_from_ns"], facts["event_time_to_ns"]
    assert times == (found.event_time_from_ns, found.event_time_to_ns)
    held = facts["held_out"]
    # Nothing that is compared on was calibrated from.
    assert facts["calibration_set"]["event_time_to_ns"] < held["event_time_from_ns"]
    assert held["event_time_to_ns"] == found.event_time_to_ns
    again = made(tmp_path / "candidate", tape, tmp_path / "next")
    assert load_bundle(again.bundle).manifest.training["recalibration"]["generation"] == 2
    assert again.name == found.name


def test_ranges_that_do_not_fit_are_found_anew(mlp: Path, tape: Path, tmp_path: Path) -> None:
    options = Options(scales="power-of-two", observer="coverage-95", rows=2_000)
    make_bundle(load_run(mlp.parent), options, tmp_path / "narrow", with_report=False)
    recorded = load_bundle(mlp).manifest.training["options"]
    parent = altered(tmp_path / "narrow", tmp_path / "parent", {"options": recorded})
    found = made(parent, tape, tmp_path / "candidate")
    assert found.ok, found.refused
    assert not found.unchanged
    assert found.comparison is not None
    serving, candidate = found.comparison.serving, found.comparison.candidate
    assert candidate.agreement > serving.agreement
    assert candidate.divergence["p99"] < serving.divergence["p99"]
    assert candidate.saturation < serving.saturation


def test_the_same_tape_and_set_give_the_same_bytes(mlp: Path, tape: Path, tmp_path: Path) -> None:
    kept = tmp_path / "set.npz"
    made(mlp, tape, tmp_path / "first", calibration_set=kept, capacity=8)
    before = kept.read_bytes()
    made(mlp, tape, tmp_path / "second", calibration_set=kept, capacity=8)
    assert kept.read_bytes() == before
    assert contents(tmp_path / "second") == contents(tmp_path / "first")


def test_older_rows_are_mixed_in_and_the_set_stays_bounded(
    mlp: Path, tape: Path, tmp_path: Path
) -> None:
    kept, older = tmp_path / "set.npz", tmp_path / "older.tape"
    Simulator(seed=9, n_instruments=3, start_ns=1_600_000_000_000_000_000).write_tape(older, 20_000)
    made(mlp, older, tmp_path / "first", calibration_set=kept, capacity=8)
    before = load_calibration_set(kept)
    assert len(before) == 8
    # A half-life as long as the years between both: some of each.
    found = made(
        mlp,
        tape,
        tmp_path / "second",
        calibration_set=kept,
        capacity=8,
        half_life_ns=200_000_000_000_000_000,
    )
    after = load_calibration_set(kept)
    assert found.calibration_blocks == len(after) == 8
    old = np.isin(after.last_ns, before.last_ns)
    assert 0 < old.sum() < 8


# Recent rows


def test_the_last_rows_are_those_that_training_would_see(tape: Path) -> None:
    tapes = FrozenTapes([tape])
    found = recent_rows(tapes, 1_000)
    every = collect(TapeReader(tape).chunks(), tapes.instruments)
    assert found.seen == len(every) > 1_000
    assert not tapes.growing
    for name in ("vector", "slot", "mid_half_ticks", "time_ns", "last_seq"):
        tail = getattr(every, name)[-1_000:]
        assert getattr(found.rows, name).tobytes() == tail.tobytes(), name


def test_blocks_are_the_same_when_the_tape_has_grown_or_more_is_taken(
    tape: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut.tape"
    data = tape.read_bytes()
    cut.write_bytes(data[: len(data) * 2 // 3])

    def names(path: Path, rows: int) -> set[tuple[str, int]]:
        blocks = recent_rows(FrozenTapes([path]), rows).blocks(1 << 62)
        assert len(blocks) > 3
        return set(zip(blocks.instrument.tolist(), blocks.first_seq.tolist(), strict=True))

    assert names(cut, 50_000) < names(tape, 50_000)
    assert names(tape, 3_000) < names(tape, 50_000)


def test_a_block_is_unbroken_and_of_one_instrument(tape: Path) -> None:
    found = recent_rows(FrozenTapes([tape]), 6_000)
    cut_ns = found.time_of_last(0.25)
    blocks = found.blocks(cut_ns)
    assert blocks.last_ns.max() < cut_ns
    for i in range(len(blocks)):
        slot = [".".join(name) for name in found.names].index(str(blocks.instrument[i]))
        own = np.flatnonzero(found.rows.slot == slot)
        k = int(np.flatnonzero(found.rows.last_seq[own] == blocks.first_seq[i])[0])
        rows = found.rows.vector[own[k : k + BLOCK_ROWS]]
        assert rows.tobytes() == blocks.vector[i].tobytes()


@pytest.mark.parametrize("blank", [0, 64, 5_000])
def test_a_tape_that_grows_is_read_to_where_it_stood(
    blank: int, tape: Path, tmp_path: Path
) -> None:
    live = tmp_path / "live.tape"
    data = tape.read_bytes()
    start = TapeReader(tape).data_offset

    def read(tapes: FrozenTapes) -> bytes:
        return b"".join(bytes(chunk.buf[chunk.start : chunk.stop]) for chunk in tapes.chunks())

    live.write_bytes(data[: len(data) // 2 + 3])  # the last record is cut
    before = read(FrozenTapes([live]))
    assert before == data[start : start + len(before)]
    assert len(data) // 2 - start - len(before) < 1_000
    if blank:  # reserved and not written yet, as the daemon leaves it
        live.write_bytes(data[: start + len(before)] + bytes(blank))
    tapes = FrozenTapes([live])
    assert tapes.growing
    assert read(tapes) == before
    live.write_bytes(data)
    assert read(tapes) == before


def test_tapes_of_two_days_the_later_still_growing(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("monday.tape", "tuesday.tape")]
    for day, path in enumerate(paths):
        start_ns = 1_700_000_000_000_000_000 + day * 86_400_000_000_000
        Simulator(seed=day, n_instruments=1, start_ns=start_ns).write_tape(path, 4_000)
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[: len(whole) // 2])
    found = [recent_rows(FrozenTapes(order), 100_000) for order in (paths, paths[::-1])]
    assert found[0].rows.vector.tobytes() == found[1].rows.vector.tobytes()
    assert found[0].seen > recent_rows(FrozenTapes(paths[:1]), 100_000).seen
    tapes = FrozenTapes(paths)
    before = recent_rows(tapes, 100_000)
    paths[1].write_bytes(whole)
    assert recent_rows(tapes, 100_000).rows.time_ns.tolist() == before.rows.time_ns.tolist()
    assert recent_rows(FrozenTapes(paths), 100_000).seen > before.seen


# What is refused


def nothing_left(folder: Path) -> bool:
    return not [path for path in folder.iterdir() if "candidate" in path.name]


def test_a_candidate_worse_than_what_serves_is_refused(
    mlp: Path, tape: Path, tmp_path: Path
) -> None:
    options = load_bundle(mlp).manifest.training["options"] | {"observer": "coverage-95"}
    parent = altered(mlp, tmp_path / "parent", {"options": options})
    found = made(parent, tape, tmp_path / "candidate", calibration_set=tmp_path / "set.npz")
    assert not found.ok
    assert found.bundle == ""
    worse = [line for line in found.refused if line.startswith("worse than the serving model: ")]
    assert any("agreement" in line and " against " in line for line in worse)
    assert nothing_left(tmp_path)
    assert (tmp_path / "set.npz").exists()  # the market is followed all the same


def test_weights_that_are_not_those_that_serve_are_refused(
    mlp: Path, tape: Path, tmp_path: Path
) -> None:
    with np.load(mlp / SOURCE_NAME) as file:
        arrays = {name: file[name] for name in file.files}
    rng = np.random.default_rng(0)
    for name in arrays:
        if name.endswith(".weight") and not name.startswith("scale."):
            arrays[name] = (arrays[name] + rng.normal(size=arrays[name].shape)).astype(np.float32)
    parent = altered(mlp, tmp_path / "parent", {}, source=npz_bytes(arrays))
    found = made(parent, tape, tmp_path / "candidate")
    assert not found.ok
    assert any("FP32 twin is not the serving bundle's" in line for line in found.refused)
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("messages", [40, 1_500, 3_000])
def test_too_few_rows_are_refused(messages: int, mlp: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.tape"
    Simulator(seed=4, n_instruments=2).write_tape(short, messages)
    found = made(mlp, short, tmp_path / "candidate")
    assert not found.ok
    assert found.refused[0].startswith("too few recent rows")
    assert nothing_left(tmp_path)


def test_what_cannot_be_made_again_is_bad_input(mlp: Path, tape: Path, tmp_path: Path) -> None:
    make_foreign_bundle(tmp_path / "foreign")
    with pytest.raises(InputError, match="does not carry what it was quantised from"):
        load_parent(tmp_path / "foreign")
    options = load_bundle(mlp).manifest.training["options"]
    dynamic = altered(mlp, tmp_path / "dynamic", {"options": options | {"method": "dynamic"}})
    with pytest.raises(InputError, match="nothing to calibrate"):
        load_parent(dynamic)
    unknown = altered(mlp, tmp_path / "unknown", {"options": options | {"scales": "odd"}})
    with pytest.raises(InputError, match="does not say how"):
        load_parent(unknown)
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="something in the candidate's place"):
        made(mlp, tape, tmp_path / "there")
    (tmp_path / "set.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match="no calibration set"):
        made(mlp, tape, tmp_path / "candidate", calibration_set=tmp_path / "set.npz")
    assert nothing_left(tmp_path)


# The command


def call(*arguments: object) -> Any:
    return CliRunner().invoke(command, [str(item) for item in arguments])


def test_the_command_prints_one_object_and_exits_with_1_where_it_refuses(
    mlp: Path, tape: Path, tmp_path: Path
) -> None:
    arguments = (mlp, "--tape", tape, "--rows", ROWS, "--out", tmp_path / "candidate")
    done = call(*arguments, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["ok"]
    assert found["bundle"] == str(tmp_path / "candidate")
    assert {"refused", "model_hash", "parent_hash", "rows", "checks", "comparison"} < set(found)
    options = load_bundle(mlp).manifest.training["options"] | {"observer": "coverage-95"}
    parent = altered(mlp, tmp_path / "parent", {"options": options})
    done = call(parent, "--tape", tape, "--rows", ROWS, "--out", tmp_path / "worse")
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("refused: ")
    assert "worse than the serving model: agreement 9" in line
    assert not (tmp_path / "worse").exists()
    assert call(mlp, "--out", tmp_path / "none").exit_code == 2
