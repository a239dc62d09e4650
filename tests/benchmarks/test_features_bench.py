"""`octick bench features`: what it runs is what the engine runs, and its figures fit together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import parts_cli
from benchmarks.feature_kernels import EMPTY, NOT_RUN, REACH_VECTOR, STAGES, WHOLE
from benchmarks.feature_stages import COMPUTE, GROUPS, TABLE, UPDATE
from benchmarks.features import Passes, Updates, read_updates
from engine.features import NAMES
from engine.pipeline import Pipeline
from feeds.errors import InputError
from feeds.simulator import Simulator
from feeds.tape_reader import TapeReader
from replay.session import choose_config

MESSAGES = 3_000


def simulated(folder: Path, instruments: int = 1) -> Path:
    path = folder / "market.tape"
    Simulator(seed=3, n_instruments=instruments).write_tape(path, MESSAGES)
    return path


@pytest.fixture(scope="module")
def tape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulated(tmp_path_factory.mktemp("tape"))


@pytest.fixture(scope="module")
def updates(tape: Path) -> Updates:
    return read_updates(tape, choose_config([TapeReader(tape).meta], None), "simulated")


@pytest.fixture(scope="module")
def served(tape: Path) -> np.ndarray:
    """The engine's own feature vector after the last message."""
    reader = TapeReader(tape)
    pipeline = Pipeline(choose_config([reader.meta], None), None, None, compute_always=True)
    for chunk in reader.chunks():
        at = chunk.start
        while at < chunk.stop:
            at = pipeline.advance(chunk.buf, at, chunk.stop)
    assert pipeline.vector.any()
    return pipeline.vector


def test_every_pass_ends_with_the_bits_of_the_pipeline(
    updates: Updates, served: np.ndarray
) -> None:
    passes = Passes(updates)
    passes.run(REACH_VECTOR)
    assert passes.vector.tobytes() == served.tobytes()
    passes.timed()
    assert passes.vector.tobytes() == served.tobytes()
    passes.staged()
    assert passes.vector.tobytes() == served.tobytes()


def test_parts_that_are_called_again_make_the_same_features(updates: Updates) -> None:
    passes = Passes(updates)
    passes.staged()
    names = {
        name for stage in TABLE if stage.within == ("_put_quotients",) for name in stage.features
    }
    names -= {"bid_slope", "ask_slope"}  # the stage clips them afterwards
    places = [NAMES.index(name) for name in sorted(names)]
    assert len(places) == 15
    assert passes.scratch[places].tobytes() == passes.vector[places].tobytes()


def test_each_update_is_timed_and_each_stage_where_it_is_one(updates: Updates) -> None:
    passes = Passes(updates)
    timed, staged = passes.timed(), passes.staged()
    assert len(timed) == len(staged) == len(updates.starts) > 0.9 * MESSAGES
    assert (timed[:, WHOLE] > 0).all()
    assert np.median(timed[:, WHOLE]) > np.median(timed[:, EMPTY]) >= 0
    ran = {name: staged[:, i] != NOT_RUN for i, name in enumerate(STAGES)}
    kinds = ran["on_book"].astype(int) + ran["on_trade"] + ran["on_snapshot"]
    assert (kinds == 1).all()
    assert (ran["_fill_buckets"] <= ran["on_trade"]).all()
    assert (ran["_learn_microprice"] <= ran["on_book"]).all()
    assert 0 < ran["_learn_microprice"].sum() < ran["on_book"].sum()
    assert (ran["_follow_side bid"] == ~ran["on_trade"]).all()
    assert ran["_put_block"].all()


def test_every_feature_is_made_in_one_group_and_fed_by_an_update() -> None:
    made = [
        name
        for group in GROUPS.values()
        for name in {f for stage in TABLE if stage.name in group for f in stage.features}
    ]
    assert sorted(made) == sorted(NAMES)
    alone = [stage for stage in TABLE if not stage.within]
    fed = {name for stage in alone if stage.part == UPDATE for name in stage.features}
    assert fed == set(NAMES)
    assert all(stage.features and stage.name in STAGES for stage in TABLE)
    assert {name for stage in TABLE for name in stage.within} <= {stage.name for stage in alone}
    whole = {stage.name: set(stage.features) for stage in alone if stage.part == COMPUTE}
    for stage in TABLE:
        if stage.part == COMPUTE and stage.within:
            assert set(stage.features) <= whole[stage.within[0]]


def test_a_tape_of_more_instruments_is_refused(tmp_path: Path) -> None:
    path = simulated(tmp_path, instruments=2)
    with pytest.raises(InputError, match="one instrument"):
        read_updates(path, choose_config([TapeReader(path).meta], None), "simulated")


def test_the_command_measures_and_its_figures_fit_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.features.JITTER_S", 0.01)
    monkeypatch.setattr("benchmarks.source_tape.SIMULATED_MESSAGES", MESSAGES)
    monkeypatch.setenv("OCTICK_DATA", str(tmp_path))
    result = CliRunner().invoke(parts_cli.features, ["--runs", "2", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {"machine", "versions", "commit", "date", "jitter", "clock_ns"} <= set(found)
    assert 0 < found["update_p50_ns"] <= found["update_p99_ns"]
    assert 0 < found["compute_p50_ns"] < 2 * found["update_p50_ns"]
    assert [kind["kind"] for kind in found["kinds"]] == ["delta", "trade"]
    assert 0.9 * found["updates"] < sum(kind["n"] for kind in found["kinds"]) <= found["updates"]
    stages = {stage["stage"]: stage for stage in found["stages"]}
    assert all(set(stage) >= {"stage", "features", "ns"} for stage in found["stages"])
    # Waited for one by one they take longer than in one, but not another order of magnitude.
    alone = [stage for stage in found["stages"] if stage["part"] == COMPUTE and not stage["within"]]
    assert 0.3 < sum(stage["ns"] for stage in alone) / found["compute_p50_ns"] < 5.0
    assert stages["on_book"]["ns_each"] is stages["clock_decays"]["ns_each"] is None
    block = stages["_put_block"]
    assert block["ns_each"] == pytest.approx(block["ns"] / 40, abs=0.02)
    assert sum(group["features"] for group in found["groups"]) == len(NAMES)
    assert stages["on_book"]["share"] + stages["on_trade"]["share"] == pytest.approx(1.0, abs=0.1)


def test_the_table_says_what_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.features.JITTER_S", 0.01)
    monkeypatch.setattr("benchmarks.source_tape.SIMULATED_MESSAGES", 500)
    monkeypatch.setenv("OCTICK_DATA", str(tmp_path))
    result = CliRunner().invoke(parts_cli.features, ["--runs", "1"])
    assert result.exit_code == 0, result.output
    for text in ("state and all features", "_put_block", "shared", "ns each", "host jitter"):
        assert text in result.stdout
