"""Both models beside the hot path: the same answers however they are run and gathered."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from engine import shadow_models
from engine import shadow_ring as ring
from engine.backends.interface import Backend
from engine.backends.onnx import OnnxBackend
from engine.backends.registry import open_backend
from engine.bundle import Bundle, load_bundle
from engine.drift import DriftAlert, DriftConfig
from engine.shadow_models import Models
from engine.shadow_stretch import SETTLE_ROWS
from engine.shadow_watch import Watch
from engine.trust_events import SETTLING
from feeds.errors import InputError
from tests.conftest import ROOT
from tests.engine import onnx_sessions
from tests.engine.bundles import make_bundle

ROWS = 1_024
COUNT = 900
SLOTS = 3
STEADY = DriftConfig()
# Sees a change soon, and so does this test.
EAGER = DriftConfig(every_rows=1, window_rows=16, learn_windows=4, rungs=2)
Open = Callable[[Bundle, DriftConfig], Models]


class Request(NamedTuple):
    """One row of the ring."""

    slot: int
    flags: int
    x: np.ndarray


@pytest.fixture(scope="module", params=["reference", "lstm"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    if request.param == "reference":
        return load_bundle(ROOT / "models" / "reference")
    path = tmp_path_factory.mktemp("bundle")
    make_bundle(path, graph=request.param)
    return load_bundle(path)


@pytest.fixture(params=onnx_sessions.KINDS)
def opened(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Open:
    onnx_sessions.use(request.param, monkeypatch)
    return Models


@pytest.fixture
def native() -> Open:
    if onnx_sessions.find_api() is None:
        pytest.skip("this ONNX Runtime does not bring its C functions")
    return Models


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that the compiled backend does not know."""

    def refuse(name: str, *rest: object, **options: object) -> Backend:
        if name == "compiled":
            raise InputError("a graph that is not compiled", where="the test")
        return open_backend(name, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(shadow_models, "open_backend", refuse)


def requests(bundle: Bundle, count: int = COUNT, shift_from: int = COUNT) -> list[Request]:
    """Streams that begin when they like, some anew, some with a gap."""
    rng = np.random.default_rng(5)
    flags = rng.choice([0, ring.FRESH, ring.GAP], count, p=[0.992, 0.004, 0.004])
    xs = rng.normal(size=(count, 1, bundle.n_features)).astype(np.float32)
    xs[shift_from:] += np.float32(1.5)
    slots = rng.integers(0, SLOTS, count)
    return [Request(int(s), int(f), x) for s, f, x in zip(slots, flags, xs, strict=True)]


def expected(bundle: Bundle, wanted: list[Request]) -> list[bytes]:
    """One inference after the other, and the age of each stream's state."""
    backends = [OnnxBackend.open(bundle, precision=name) for name in ("fp32", "int8")]
    has_state = any(bundle.state(name) for name in ("fp32", "int8"))
    ages: dict[int, int] = {}
    outs = np.zeros((2, bundle.n_outputs), dtype=np.float32)
    found = []
    for number, (slot, flags, x) in enumerate(wanted):
        if flags & ring.FRESH:
            ages[slot] = SETTLE_ROWS
            for backend in backends:
                backend.reset(slot)
        if flags & ring.GAP:
            ages[slot] = 0
        age = ages.setdefault(slot, 0)
        ages[slot] += 1
        for backend, out in zip(backends, outs, strict=True):
            backend.infer(slot, x, out)
        settling = SETTLING if has_state and age < SETTLE_ROWS else 0
        row = np.array([number, slot, 7 * number, settling], dtype=np.int64)
        found.append(row.tobytes() + outs.tobytes())
    return found


class Engine:
    """The other end of a ring."""

    def __init__(self, bundle: Bundle, rows: int = ROWS) -> None:
        self.area, _ = ring.ShadowRing.make(rows, bundle.n_features, bundle.n_outputs)
        self._asked = 0
        self._bytes = 8 * bundle.n_outputs

    def ask(self, wanted: list[Request]) -> None:
        area = self.area
        for slot, flags, x in wanted:
            number = self._asked
            pushed = ring.push_request(
                *(area.header, area.requests, area.inputs, number, slot, 7 * number, flags, x)
            )
            assert pushed
            self._asked += 1

    def taken(self) -> list[bytes]:
        area = self.area
        row = np.zeros(ring.META, dtype=np.int64)
        payload = np.zeros(area.payloads.shape[1], dtype=np.uint8)
        found = []
        while ring.pop_answer(area.header, area.answers, area.payloads, row, payload):
            assert not payload[self._bytes :].any()
            found.append(row.tobytes() + payload[: self._bytes].tobytes())
        return found

    def stretch(self, models: Models, wanted: list[Request]) -> list[DriftAlert]:
        """Have requests answered, and watched as far as that is due."""
        self.ask(wanted)
        alerts, left = [], len(wanted)
        while left:
            taken = models.answer_waiting(self.area, left)
            assert 0 < taken <= left
            left -= taken
            alerts += models.overdue()
        return alerts


def stretches(wanted: list[Request], lengths: tuple[int, ...]) -> list[list[Request]]:
    """Requests as they gather."""
    found, at = [], 0
    while at < len(wanted):
        length = lengths[len(found) % len(lengths)]
        found.append(wanted[at : at + length])
        at += length
    return found


@pytest.mark.parametrize("lengths", [(1,), (11, 1, 200)], ids=["one by one", "gathered"])
def test_answers_are_those_of_single_inferences(
    bundle: Bundle, opened: Open, lengths: tuple[int, ...]
) -> None:
    wanted = requests(bundle)
    models, engine = opened(bundle, STEADY), Engine(bundle)
    found = []
    for part in stretches(wanted, lengths):
        engine.stretch(models, part)
        found += engine.taken()
    assert found == expected(bundle, wanted)
    settling = {np.frombuffer(one, dtype=np.int64, count=ring.META)[ring.FLAGS] for one in found}
    assert settling == ({0, SETTLING} if bundle.state("int8") else {0})


@pytest.mark.parametrize("lengths", [(3,), (40, 150)])
def test_alerts_are_those_of_single_answers_and_no_later_than_their_stretch(
    native: Open, bundle: Bundle, lengths: tuple[int, ...]
) -> None:
    wanted = requests(bundle, shift_from=COUNT // 2)
    one_by_one, gathered, engine = Models(bundle, EAGER), native(bundle, EAGER), Engine(bundle)
    single, found = [], []
    for part in stretches(wanted, lengths):
        for slot, flags, x in part:
            single += one_by_one.answer(slot, flags, x)[1]
        found += engine.stretch(gathered, part)
        assert found == single
        engine.taken()
    found += gathered.catch_up()
    assert found == single
    assert single or bundle.state("int8")  # that one was never calibrated
    assert gathered.watch.figures() == one_by_one.watch.figures()
    assert gathered.watch.quantiles_by_output() == one_by_one.watch.quantiles_by_output()
    assert gathered.watch.figures()["rows"] == COUNT


def test_what_is_no_number_is_watched_the_same_in_any_number(bundle: Bundle) -> None:
    rng = np.random.default_rng(2)
    xs = rng.normal(size=(96, bundle.n_features)).astype(np.float32)
    scores = rng.normal(size=(96, 2, bundle.n_outputs)).astype(np.float32)
    scores[5, 0, 0], scores[40, 1, 1], xs[7, 3] = np.nan, np.inf, np.nan
    told = []
    for length in (1, 32):
        watch = Watch(bundle, EAGER)
        for at in range(0, len(xs), length):
            end = at + length
            watch.take([0] * length, [0] * length, xs[at:end], scores[at:end])
        told.append((watch.figures(), watch.quantiles_by_output()))
    assert told[0] == told[1]
    assert told[0][0]["not_finite"] >= 2


def test_a_full_ring_is_waited_for_with_nothing_lost(bundle: Bundle, opened: Open) -> None:
    rows = 8
    wanted = requests(bundle, count=3 * rows)
    models, engine = opened(bundle, STEADY), Engine(bundle, rows)
    engine.ask(wanted[:rows])
    assert models.answer_waiting(engine.area, rows) == rows
    engine.ask(wanted[rows : 2 * rows])
    assert models.answer_waiting(engine.area, rows) == 0
    found = engine.taken()
    models.catch_up()
    assert models.answer_waiting(engine.area, 3) == 3
    engine.ask(wanted[2 * rows : 2 * rows + 3])
    models.catch_up()
    assert models.answer_waiting(engine.area, rows) == rows - 3
    found += engine.taken()
    models.catch_up()
    engine.ask(wanted[2 * rows + 3 :])
    assert models.answer_waiting(engine.area, rows) == rows
    assert found + engine.taken() == expected(bundle, wanted)


def test_it_stops_behind_a_reload_and_where_it_is_told_to(bundle: Bundle, opened: Open) -> None:
    wanted = requests(bundle, count=12)
    wanted[6] = wanted[6]._replace(flags=ring.RELOAD)
    models, engine = opened(bundle, STEADY), Engine(bundle)
    engine.ask(wanted)
    assert models.answer_waiting(engine.area, 4) == 4
    assert not models.reload
    assert models.answer_waiting(engine.area, 8) == 3
    assert models.reload
    assert engine.area.waiting == 5
    assert engine.taken() == expected(bundle, wanted[:6])
    engine.area.header[ring.STOP] = 1
    assert Models(bundle, STEADY).answer_waiting(engine.area, 5) == 0
    assert engine.area.waiting == 5
    assert engine.taken() == []


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("which", [0, 1], ids=["fp32", "int8"])
def test_a_step_that_fails_is_taken_again_and_told_where_it_fails_again(
    native: Open, bundle: Bundle, which: int
) -> None:
    wanted = requests(bundle, count=100)
    models, engine = native(bundle, STEADY), Engine(bundle)
    backend = models._backends[which]
    assert isinstance(backend, OnnxBackend)
    for slot in range(SLOTS):  # the first answer of a slot is not the kernel's
        first = next(i for i, one in enumerate(wanted) if one.slot == slot)
        wanted[first], wanted[slot] = wanted[slot], wanted[first]
    engine.stretch(models, wanted[:SLOTS])
    failing = onnx_sessions.Failing(backend, after=3)
    engine.stretch(models, wanted[SLOTS:])
    assert engine.taken() == expected(bundle, wanted)
    assert failing.failed > 10
    failing.fails = True
    with pytest.raises(RuntimeError, match=onnx_sessions.GONE):
        engine.stretch(models, wanted[:1])


def test_the_kernel_answers_every_slot_that_was_seen(
    native: Open, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, engine = native(bundle, STEADY), Engine(bundle)
    engine.stretch(models, [one._replace(slot=5) for one in requests(bundle, count=1)])
    monkeypatch.setattr(models, "_answer_left", None)
    engine.stretch(
        models, [one._replace(slot=slot) for slot in range(6) for one in requests(bundle, 9)]
    )
    assert len(engine.taken()) == 1 + 6 * 9
