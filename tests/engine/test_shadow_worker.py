"""The shadow's own process: when it answers what has gathered, and what it does beside it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine import features
from engine import shadow_ring as ring
from engine.backends.onnx import OnnxBackend
from engine.bundle import load_bundle
from engine.drift import DriftConfig
from engine.shadow_worker import STATS_EVERY, serve
from tests.conftest import ROOT
from tests.engine.bundles import make_bundle

ROWS = 32
MANY = 8
LOOK_NS = 1_000_000
MOST_NS = 100_000_000
LONG_NS = 20_000_000_000


@pytest.fixture
def area() -> ring.ShadowRing:
    made, _ = ring.ShadowRing.make(ROWS, 4, 3)
    return made


def request(area: ring.ShadowRing, count: int = 1) -> None:
    x = np.zeros((1, 4), dtype=np.float32)
    for _ in range(count):
        assert ring.push_request(area.header, area.requests, area.inputs, 1, 0, 1, 0, x)


def gathered(area: ring.ShadowRing, most_ns: int) -> tuple[int, int]:
    """How many, and after how many nanoseconds."""
    begun = time.monotonic_ns()
    found = int(ring.gather(area.header, MANY, LOOK_NS, most_ns))
    return found, time.monotonic_ns() - begun


def test_one_request_waits_for_others_and_no_longer_than_it_may(area: ring.ShadowRing) -> None:
    request(area)
    later = threading.Timer(MOST_NS / 4e9, request, [area, 2])
    later.start()
    found, took_ns = gathered(area, MOST_NS)
    later.join()
    assert found == 3
    assert took_ns >= MOST_NS


def test_many_wait_for_no_more(area: ring.ShadowRing) -> None:
    request(area, MANY)
    found, took_ns = gathered(area, LONG_NS)
    assert found == MANY
    assert took_ns < LONG_NS / 2
    request(area, MANY)
    assert gathered(area, LONG_NS)[0] == 2 * MANY


def test_where_nothing_comes_it_says_so_and_that_it_is_there(area: ring.ShadowRing) -> None:
    found, took_ns = gathered(area, MOST_NS)
    assert (found, took_ns >= MOST_NS) == (0, True)
    assert time.monotonic_ns() - area.header[ring.ALIVE_NS] < LONG_NS
    assert area.header[ring.ALIVE_NS] > 0


def test_a_stop_ends_the_wait(area: ring.ShadowRing) -> None:
    request(area)

    def stop() -> None:
        area.header[ring.STOP] = 1

    threading.Timer(0.1, stop).start()
    found, took_ns = gathered(area, LONG_NS)
    assert found == 0
    assert took_ns < LONG_NS / 2


REFERENCE = ROOT / "models" / "reference"
N_FEATURES = features.N_FEATURES


def until(true: Callable[[], bool]) -> None:
    end_ns = time.monotonic_ns() + LONG_NS
    while not true():
        assert time.monotonic_ns() < end_ns
        time.sleep(0.001)


class Served:
    """A ring with the shadow at its other end, in a thread."""

    def __init__(self, bundle: Path, rows: int, drift: DriftConfig) -> None:
        self.area, _ = ring.ShadowRing.make(rows, N_FEATURES, 3)
        arguments = (self.area, os.getppid(), bundle, drift, 1_000_000)
        self._thread = threading.Thread(target=serve, args=arguments)
        self._thread.start()
        until(lambda: bool(self.area.header[ring.READY]))

    def ask(self, xs: np.ndarray, flags: int = 0) -> None:
        area = self.area
        for number, x in enumerate(xs):
            until(lambda: area.waiting < len(area.requests))
            assert ring.push_request(
                *(area.header, area.requests, area.inputs, number, 0, 0, flags, x[None])
            )

    def answer(self) -> tuple[list[int], bytes]:
        area = self.area
        row, payload = np.zeros(ring.META, dtype=np.int64), np.zeros(256, dtype=np.uint8)
        until(lambda: ring.pop_answer(area.header, area.answers, area.payloads, row, payload))
        return row.tolist(), payload.tobytes()

    def stop(self) -> None:
        self.area.header[ring.STOP] = 1
        self._thread.join(LONG_NS / 1e9)
        assert not self._thread.is_alive()


def scores(bundle: Path, xs: np.ndarray) -> list[bytes]:
    """Of a model without state."""
    backends = [OnnxBackend.open(load_bundle(bundle), precision=name) for name in ("fp32", "int8")]
    outs = np.zeros((2, 3), dtype=np.float32)
    found = []
    for x in xs:
        for backend, out in zip(backends, outs, strict=True):
            backend.infer(0, x[None].copy(), out)
        found.append(outs.tobytes())
    return found


def inputs(count: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(count)
    return (rng.normal(size=(count, N_FEATURES)) + shift).astype(np.float32)


def test_another_bundle_answers_what_comes_behind_its_name(tmp_path: Path) -> None:
    make_bundle(tmp_path, seed=3)
    before, after = inputs(20), inputs(30)
    served = Served(REFERENCE, ROWS, DriftConfig())
    try:
        served.area.text = str(tmp_path)
        served.ask(before)
        served.ask(before[:1], ring.RELOAD)
        served.ask(after[:4])
        found = [served.answer() for _ in range(24)]
        served.ask(after[4:])
        found += [served.answer() for _ in range(26)]
    finally:
        served.stop()
    assert [row[ring.TICKET] for row, _ in found] == [*range(20), *range(4), *range(26)]
    assert [payload[:24] for _, payload in found] == scores(REFERENCE, before) + scores(
        tmp_path, after
    )
    assert not served.area.waiting


def test_alerts_and_figures_come_with_answers_that_had_to_wait_for_room() -> None:
    config = DriftConfig(every_rows=1, window_rows=16, learn_windows=4, rungs=1)
    count = STATS_EVERY + 80
    xs = np.concatenate((inputs(200), inputs(count - 200, shift=3.0)))
    served = Served(REFERENCE, 8, config)
    answers, alerts = [], []
    try:
        asking = threading.Thread(target=served.ask, args=(xs,))
        asking.start()
        until(lambda: served.area.waiting == 8)  # and as many answers that nobody took
        while len(answers) < count:
            row, payload = served.answer()
            (alerts if row[ring.FLAGS] & ring.ALERT else answers).append((row, payload))
        asking.join()
        stats = dict(zip(ring.STAT_NAMES, served.area.stats.tolist(), strict=True))
    finally:
        served.stop()
    assert [row[ring.TICKET] for row, _ in answers] == list(range(count))
    assert [payload[:24] for _, payload in answers] == scores(REFERENCE, xs)
    assert alerts
    assert all(b"threshold" in payload for _, payload in alerts)
    assert 0.0 < stats["divergence_p50"] <= stats["divergence_p99"]
    assert 0.0 < stats["drift_alerts"] <= len(alerts)
    assert (served.area.output_stats[:3] > 0.0).all()


def test_one_that_waits_for_room_ends_when_it_is_told_to() -> None:
    served = Served(REFERENCE, 8, DriftConfig())
    served.ask(inputs(12))
    until(lambda: served.area.waiting == 4)
    served.stop()
    assert served.area.waiting == 4
