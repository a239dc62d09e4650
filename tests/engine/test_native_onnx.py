"""ONNX Runtime run by the kernel itself: the signals that Python gives, also where it fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine import trust
from engine.backends.onnx import OnnxBackend
from engine.bundle import load_bundle
from engine.config import Config
from engine.failover import FailoverConfig
from engine.pipeline import Pipeline
from feeds import codec, wire
from tests.engine import onnx_sessions
from tests.engine.bundles import make_bundle
from tests.engine.records import config, flow, opening, records

CALM = FailoverConfig(violations=0, input_violations=0, divergences=0)
COUNT = 700


@pytest.fixture(autouse=True)
def native_session(monkeypatch: pytest.MonkeyPatch) -> None:
    onnx_sessions.use("native", monkeypatch)


@pytest.fixture(scope="module", params=[False, True], ids=["without state", "with state"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle")
    make_bundle(path, seed=1, stateful=request.param)
    return path


def pipeline(folder: Path) -> tuple[Pipeline, OnnxBackend]:
    settings: Config = config(("A",), failover=CALM)
    bundle = load_bundle(folder)
    backend = OnnxBackend.open(bundle)
    return Pipeline(settings, bundle, backend), backend


def served(one: Pipeline, data: bytes) -> list[bytes]:
    """Signals through kernels."""
    buf, at, found = np.frombuffer(data, dtype=np.uint8).copy(), 0, bytearray()
    while at < len(buf):
        at = one.serve(buf, at, len(buf))
        found += one.served
    return [bytes(found[i : i + one.signal_bytes]) for i in range(0, len(found), one.signal_bytes)]


def answered(one: Pipeline, data: bytes) -> list[bytes]:
    """Signals through Python, inference by inference."""
    buf, at, found = np.frombuffer(data, dtype=np.uint8).copy(), 0, []
    while at < len(buf):
        at = one.advance(buf, at, len(buf))
        if one.fired:
            found.append(bytes(one.answer()))
    return found


def reasons(signals: list[bytes]) -> list[int]:
    return [int(codec.decode_block(one, wire.SIGNAL_DTYPE)["reasons"]) for one in signals]


def market(first: int, count: int) -> bytes:
    begin = opening(0) if first == 2 else []
    return records([*begin, *flow(0, first, count, seed=first)])


def test_a_kernel_gives_the_signals_that_python_gives(folder: Path) -> None:
    by_kernel, backend = pipeline(folder)
    by_python, _ = pipeline(folder)
    data = market(2, COUNT)
    found = served(by_kernel, data)
    assert backend.native_model(1) is not None
    assert found == answered(by_python, data)
    assert reasons(found).count(0) > 20
    assert by_kernel.ticket == by_python.ticket
    assert by_kernel.counters == by_python.counters


def test_a_step_that_fails_once_is_taken_again_from_the_same_state(folder: Path) -> None:
    steady, _ = pipeline(folder)
    shaken, backend = pipeline(folder)
    failing = onnx_sessions.Failing(backend, after=3)
    data = market(2, COUNT)
    assert served(shaken, data) == served(steady, data)
    assert failing.failed > 10
    assert shaken.counters == steady.counters


def test_signals_before_and_behind_a_failure_are_told(folder: Path) -> None:
    by_kernel, kernel_backend = pipeline(folder)
    by_python, python_backend = pipeline(folder)
    runs = ((by_kernel, served, kernel_backend), (by_python, answered, python_backend))
    told = []
    for one, take, backend in runs:
        failing = onnx_sessions.Failing(backend)
        signals = take(one, market(2, COUNT))
        failing.fails = True
        signals += take(one, market(2 + COUNT, 40))
        failing.fails = False
        told.append(signals + take(one, market(42 + COUNT, 40)))
    assert told[0] == told[1]
    failed = [bool(mask & trust.REASON_INFERENCE_FAILED) for mask in reasons(told[0])]
    assert any(failed)
    assert not failed[0]
    assert not failed[-1]
    assert by_kernel.inference_failures == by_python.inference_failures == sum(failed)
