"""A model that remembers: each instrument has its own state, and a replay the same signals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.bundle import load_bundle
from engine.config import default_config
from engine.manifest import StateSection
from feeds.simulator import Simulator
from feeds.tape_reader import TapeReader
from models.dataset import Normalisation, collect
from models.export import write_bundle
from models.labels import CLASSES
from models.step_session import StepSession
from models.verify_system import TapeSource, run_pipeline
from replay.session import replay_tapes
from tests.models.small_networks import CLIP, N_FEATURES, Twins, twins

MESSAGES = 12_000


@pytest.fixture(scope="module")
def tape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three instruments, interleaved."""
    path = tmp_path_factory.mktemp("tape") / "sim.tape"
    Simulator(seed=8, n_instruments=3).write_tape(path, MESSAGES)
    return path


@pytest.fixture(scope="module", params=["gru", "tcn"])
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Twins]:
    """An untrained network with state, as a bundle."""
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
    return folder, found


def test_one_digest_whatever_the_threads_and_the_order(
    made: tuple[Path, Twins], tape: Path
) -> None:
    folder, _ = made
    meta = TapeReader(tape).meta
    names = [(item.venue, item.symbol) for item in meta.instruments]
    digests = {
        replay_tapes([tape], model=folder, threads=threads, config=default_config(order)).digest
        for threads in (1, 2)
        for order in (names, names[::-1])
    }
    assert len(digests) == 1


def test_the_pipeline_says_what_each_instruments_own_stream_says(
    made: tuple[Path, Twins], tape: Path
) -> None:
    folder, network = made
    source = TapeSource(tape)
    session = run_pipeline(load_bundle(folder), "int8", source.chunks(), source.instruments)
    rows = collect(source.chunks(), source.instruments)
    assert len(rows) == len(session.scores) > 1_000
    x = Normalisation(np.zeros(N_FEATURES), np.ones(N_FEATURES), CLIP).apply(rows.vector)
    for slot in np.unique(rows.slot):
        own = rows.slot == slot
        alone = StepSession(network.int8, network.int8_state).run(x[own])
        assert np.array_equal(session.scores[session.slot == slot], alone)
    # It does remember: without its past it says something else.
    fresh = StepSession(network.int8, network.int8_state).run(x[own][-1:])
    assert not np.array_equal(fresh[0], alone[-1])
