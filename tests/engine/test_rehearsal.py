"""Rehearsals: all the way to a signal, in code that is the session's, and nothing of it moves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from engine import live
from engine.backends.registry import open_backend
from engine.bundle import load_bundle
from engine.config import LimitsConfig, OverloadConfig, default_config
from engine.live_link import LiveLink
from engine.pipeline import Pipeline
from engine.recorder import ScratchTape
from engine.rehearsal import Rehearsal
from engine.trust import MODE_FP32
from feeds import codec, tape
from feeds.simulator import Simulator
from feeds.tape_reader import TapeReader
from tests.engine.bundles import make_bundle

REFERENCE = Path(__file__).resolve().parents[2] / "models" / "reference"
LIMITS = msgspec.structs.replace(LimitsConfig(), max_message_bytes=1 << 16)
EVERY_NS = 20_000


class Session:
    """A pipeline with a link that rehearses, fed over its tape."""

    def __init__(self, folder: Path, model: Path, backend: str) -> None:
        self.folder, self.model, self.backend = folder, model, backend
        market = folder / "market.tape"
        if not market.exists():
            Simulator(seed=9, n_instruments=2).write_tape(market, 2_000)
        reader = TapeReader(market)
        self.payloads = [bytes(r.payload) for r in reader.records() if r.kind == tape.MARKET]
        names = [(one.venue, one.symbol) for one in reader.meta.instruments]
        self.config = default_config(names)
        bundle = load_bundle(model)
        backend_of = open_backend(backend, bundle)
        self.pipeline = Pipeline(self.config, bundle, backend_of)
        self.context: zmq.Context[Any] = zmq.Context()
        self.sub, self.out = self.context.socket(zmq.SUB), self.context.socket(zmq.XPUB)
        offset = time.time_ns() - time.monotonic_ns()
        self.offset_ns = offset
        self.rehearsal = Rehearsal(self.config, bundle, backend_of, self.context, offset)
        self.link = LiveLink(
            self.pipeline,
            [self.sub],
            self.out,
            [codec.topic("signal", *name) for name in self.pipeline.names],
            LIMITS,
            OverloadConfig(conflate_after_ns=0),
            room=1 << 18,
            now_ns=time.monotonic_ns(),
            offset_ns=offset,
        )
        self.recorder = ScratchTape(1 << 20)
        rehearsal = self.rehearsal
        self.link.rehearse(rehearsal.handles, EVERY_NS, rehearsal.alarm, rehearsal.follow)

    def wait(self, seconds: float, spin_ns: int = 0) -> int:
        """How many rehearsals a wait has."""
        before = self.rehearsal.rehearsals
        wait_ns = round(seconds * 1e9)
        self.link.begin(time.monotonic_ns(), LIMITS, spin_ns=spin_ns, wait_ns=wait_ns)
        assert self.link.take(self.recorder, None) == live.NOTHING_WAITS
        return self.rehearsal.rehearsals - before

    def signals(self, payloads: list[bytes]) -> list[bytes]:
        """What the pipeline makes of messages, without the times that the clock gives."""
        found = []
        for payload in payloads:
            at = self.recorder.append(tape.MARKET, 1, payload)
            self.pipeline.advance(self.recorder.arena, at, self.recorder.position)
            if self.pipeline.fired:
                found.append(bytes(self.pipeline.answer()))
        return found

    def close(self) -> None:
        self.rehearsal.close()
        self.pipeline.close()
        self.context.destroy(linger=0)


@pytest.fixture(scope="module", params=["reference", "lstm"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle without state, and one with."""
    if request.param == "reference":
        return REFERENCE
    path = tmp_path_factory.mktemp("bundle")
    make_bundle(path, graph=request.param)
    return path


@pytest.fixture(params=["compiled", "onnx"])
def session(request: pytest.FixtureRequest, model: Path, tmp_path: Path) -> Iterator[Session]:
    one = Session(tmp_path, model, request.param)
    yield one
    one.close()


@pytest.mark.parametrize("spin_ns", [0, 100_000], ids=["asleep", "looking"])
def test_a_wait_rehearses_and_each_rehearsal_comes_to_a_signal(
    session: Session, spin_ns: int
) -> None:
    assert session.wait(0.05, spin_ns) > 1
    # Long enough for an input or an output that never moves to be held against it.
    while session.rehearsal.rehearsals < 8_000:
        session.wait(0.2, spin_ns)
    assert session.rehearsal.sent == session.rehearsal.rehearsals


def test_however_often_they_are_wanted_rehearsals_leave_most_of_a_wait(session: Session) -> None:
    rehearsal = session.rehearsal
    session.link.rehearse(rehearsal.handles, 1, rehearsal.alarm, rehearsal.follow)
    session.wait(0.1)
    begun, used = time.monotonic_ns(), time.thread_time_ns()
    assert session.wait(0.5) > 1
    assert time.thread_time_ns() - used < (time.monotonic_ns() - begun) / 2


def test_nothing_of_the_session_moves(session: Session) -> None:
    half = len(session.payloads) // 2
    assert session.signals(session.payloads[:half])
    session.wait(0)  # prepares
    before = [one.copy() for one in session.pipeline.arrays]
    position, records = session.recorder.position, session.recorder.records
    assert session.wait(0.2) > 1
    for was, one in zip(before, session.pipeline.arrays, strict=True):
        np.testing.assert_array_equal(was, one)
    assert (session.recorder.position, session.recorder.records) == (position, records)
    assert session.link.sent.sum() == 0
    assert not session.pipeline.trust.notes


def test_signals_are_the_same_bytes_with_and_without(session: Session) -> None:
    alone = Session(session.folder, session.model, session.backend)
    try:
        rehearsed = []
        for i in range(0, len(session.payloads), 200):
            rehearsed += session.signals(session.payloads[i : i + 200])
            session.wait(0.002)
        assert session.rehearsal.sent > 1
        assert len(rehearsed) > 100
        assert rehearsed == alone.signals(alone.payloads)
    finally:
        alone.close()


def test_a_rehearsal_follows_the_model_that_answers(session: Session) -> None:
    half = len(session.payloads) // 2
    session.signals(session.payloads[:half])
    session.wait(0.002)
    serving = session.pipeline.trust.serving
    assert serving is not None
    own, before = serving.native_model(), serving.spare_model()
    assert own is not None
    assert before is not None
    assert (own.step, own.arena) == (before.step, before.arena)
    assert before.states[0] not in own.states, "a stream that is no instrument's"
    serving.switch(MODE_FP32)
    session.signals(session.payloads[half:])  # a model with state has caught up
    sent = session.rehearsal.sent
    assert session.wait(0.05) > 1
    after = serving.spare_model()
    assert after is not None
    assert (after.step, after.arena) != (before.step, before.arena)
    assert session.rehearsal.sent > sent


def test_where_only_python_can_infer_the_rest_is_rehearsed(session: Session) -> None:
    session.wait(0.002)
    sent, before = session.rehearsal.sent, session.rehearsal.rehearsals
    session.pipeline.trust.serving.native_model = lambda: None  # type: ignore
    session.pipeline.prepared = False
    assert session.wait(0.05) > 1
    assert session.rehearsal.rehearsals > before
    assert session.rehearsal.sent == sent


def test_closing_twice_is_fine(session: Session) -> None:
    session.rehearsal.close()
    session.rehearsal.close()
