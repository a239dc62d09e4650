"""What every feature has to keep, whichever it is. One suite, run over the whole catalogue."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import feature_state, features
from engine.feature_state import BOOK, TRADES, WARM_BOOK_UPDATES, WARM_TRADES
from tests.engine import feature_reference
from tests.engine.feature_reference import Book, Event, Level, Snapshot, Trade
from tests.engine.feature_streams import Instrument, digest, hostile, market, mirrored, trace

ROOT = Path(__file__).resolve().parents[2]
LATER_NS = (0, 700_000_000, 0, 90_000_000_000, 1)
MIDDLE = 1_000_000

STREAMS = {
    "lively": lambda: market(1, 420, middle=MIDDLE),
    "quiet": lambda: market(2, 260, trades=0.02),
    "thin": lambda: market(3, 260, levels=1),
    "hostile": lambda: hostile(4, 220),
    "more hostile": lambda: hostile(5, 220),
}

each_feature = pytest.mark.parametrize("spec", features.SPECS, ids=lambda spec: spec.name)


def _column(spec: features.FeatureSpec) -> int:
    return features.NAMES.index(spec.name)


def _range(spec: features.FeatureSpec) -> tuple[float, float]:
    """The bounds that the catalogue states in the feature's unit."""
    if "clipped at 20" in spec.unit:
        return 0.0, 20.0
    found = re.search(r"[\[(](-?\d+), (\d+)[\])]", spec.unit)
    assert found, f"{spec.name}: no range in its unit"
    return float(found[1]), float(found[2])


@functools.cache
def _both(stream: str) -> tuple[np.ndarray, np.ndarray]:
    """Vectors along a stream: from the kernels event by event, and from the history each time."""
    events = STREAMS[stream]()
    checked = [i for i in range(len(events)) if i < 12 or i % 9 == 0 or i == len(events) - 1]
    times = [min(events[i].t_ns + LATER_NS[i % 5], 2**63 - 1) for i in range(len(events))]
    instrument = Instrument()
    streamed, batch = [], []
    for i, event in enumerate(events):
        instrument.take(event)
        if i in checked:
            streamed.append(instrument.values(times[i]))
            values = feature_reference.batch(events[: i + 1], times[i])
            batch.append([values[name] for name in features.NAMES])
    return np.array(streamed), np.array(batch)


@each_feature
@pytest.mark.parametrize("stream", STREAMS)
def test_streaming_equals_batch_bit_for_bit(spec: features.FeatureSpec, stream: str) -> None:
    streamed, batch = (values[:, _column(spec)] for values in _both(stream))
    differ = np.flatnonzero(streamed.view(np.int64) != batch.view(np.int64))
    assert differ.size == 0, (differ[0], streamed[differ[0]], batch[differ[0]])


@each_feature
def test_the_streams_move_it(spec: features.FeatureSpec) -> None:
    values = _both("lively")[0][:, _column(spec)]
    assert len(np.unique(values)) > 8, "a feature that stands still proves nothing above"


def _ready_but_one(kind: str, count: int) -> Instrument:
    """``count`` events of a kind, and of the other kind as many as anything needs."""
    instrument = Instrument()
    left = {BOOK: WARM_BOOK_UPDATES, TRADES: WARM_TRADES, kind: count}
    for event in market(11, 2_000):
        of = BOOK if isinstance(event, Book) else TRADES
        if not isinstance(event, Snapshot):
            if left[of] == 0:
                continue
            left[of] -= 1
        instrument.take(event)
    assert left == {BOOK: 0, TRADES: 0}
    return instrument


@each_feature
def test_warm_up_is_as_declared(spec: features.FeatureSpec) -> None:
    count, kind = spec.warmup
    whole = {BOOK: WARM_BOOK_UPDATES, TRADES: WARM_TRADES}[kind]
    assert 1 <= count <= whole, "an instrument would be warm before its features are"
    assert features.is_warm(_ready_but_one(kind, count - 1).fi) == 0
    assert features.is_warm(_ready_but_one(kind, whole).fi) == 1
    if count < whole:
        # Declared to need one update: then nothing older can be in it.
        after = market(12, 700)
        last = next(e for e in reversed(after) if isinstance(e, Book))
        fresh = trace([Snapshot(last.t_ns, last.bids, last.asks), last])[-1]
        aged = trace([*after, last])[-1]
        assert fresh[_column(spec)] == aged[_column(spec)]


@functools.cache
def _forgetting() -> tuple[np.ndarray, np.ndarray]:
    """Two instruments with different pasts and, for 40 warm-ups, the same present."""
    present = market(23, 9_000)
    ends = []
    for seed, middle in ((21, 1_000_000), (22, 1_000_900)):
        instrument = Instrument()
        shift = present[0].t_ns - 1_700_000_000_000_000_000
        for event in [*market(seed, 400, middle=middle), *present]:
            instrument.take(event._replace(t_ns=event.t_ns + shift))
        ends.append(instrument.values())
    return ends[0], ends[1]


@each_feature
def test_old_events_fade(spec: features.FeatureSpec) -> None:
    one, other = (values[_column(spec)] for values in _forgetting())
    low, high = _range(spec)
    # Not equal: recurrences fade, and the buckets of VPIN keep the phase they once had.
    assert abs(one - other) <= (high - low) * 2e-2


@functools.cache
def _reset() -> tuple[np.ndarray, np.ndarray]:
    events = market(31, 300)
    used = Instrument()
    for event in [*hostile(32, 200), *market(33, 200)]:
        used.take(event)
    features.reset(used.fi, used.ff)
    rows = []
    for event in events:
        used.take(event)
        rows.append(used.values())
    return np.array(rows), trace(events)


@each_feature
def test_reset_forgets_everything(spec: features.FeatureSpec) -> None:
    after_reset, fresh = (values[:, _column(spec)] for values in _reset())
    assert after_reset.tobytes() == fresh.tobytes()


@functools.cache
def _hostile_values() -> np.ndarray:
    later = (0, 1, 10**18, 2**62)
    rows = []
    for seed in range(60):
        instrument = Instrument()
        rows.append(instrument.values(seed))  # nothing known at all
        for i, event in enumerate(hostile(seed, 150)):
            instrument.take(event)
            rows.append(instrument.values(min(event.t_ns + later[i % 4], 2**63 - 1)))
    return np.array(rows)


@each_feature
def test_it_is_finite_and_in_its_range_whatever_comes(spec: features.FeatureSpec) -> None:
    values = _hostile_values()[:, _column(spec)]
    low, high = _range(spec)
    assert np.isfinite(values).all()
    assert low <= values.min()
    assert values.max() <= high


_number = st.one_of(st.integers(1, 50), st.sampled_from([10**9, 10**12, 2**44, 2**63 - 1]))
_any_time = st.one_of(st.integers(0, 10**11), st.integers(-(2**63), 2**63 - 1))
_levels: st.SearchStrategy[list[Level]] = st.lists(st.tuples(_number, _number), max_size=12)
_flow = st.tuples(*[st.one_of(st.just(0), _number)] * 4)
_event: st.SearchStrategy[Event] = st.one_of(
    st.builds(Snapshot, _any_time, _levels, _levels),
    st.builds(Book, _any_time, _levels, _levels, _flow),
    st.builds(Trade, _any_time, _number, _number, st.integers(0, 3)),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(events=st.lists(_event, max_size=40), asked_ns=_any_time)
def test_no_sequence_of_events_gives_nan_or_infinity(events: list[Event], asked_ns: int) -> None:
    instrument = Instrument()
    for event in events:
        instrument.take(event)
    values = instrument.values(asked_ns)
    for spec, value in zip(features.SPECS, values, strict=True):
        low, high = _range(spec)
        assert low <= value <= high, f"{spec.name}: {value}"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(events=st.lists(_event, min_size=1, max_size=25), asked_ns=_any_time)
def test_no_sequence_of_events_parts_streaming_from_batch(
    events: list[Event], asked_ns: int
) -> None:
    instrument = Instrument()
    for event in events:
        instrument.take(event)
    values = instrument.values(asked_ns)
    batch = feature_reference.batch(events, asked_ns)
    for name, value in zip(features.NAMES, values, strict=True):
        assert value.tobytes() == np.float64(batch[name]).tobytes(), name


@functools.cache
def _mirrored() -> tuple[np.ndarray, np.ndarray]:
    events = market(41, 500, middle=MIDDLE)
    return trace(events, LATER_NS), trace(mirrored(events, 2 * MIDDLE), LATER_NS)


# Relative to the mid, which the mirror moves to the other side of the middle.
_RELATIVE_TO_MID = re.compile(r"spread_bp|book_width_bp|realised_vol_\w+|bipower_vol_\w+")


@each_feature
def test_swapping_bid_and_ask_does_what_is_declared(spec: features.FeatureSpec) -> None:
    straight, swapped = _mirrored()
    value = straight[:, _column(spec)]
    if spec.symmetry == "odd":
        expected = -value
    elif spec.symmetry == "even":
        expected = value
    else:
        kind, _, other = spec.symmetry.partition(":")
        assert kind == "swap"
        expected = straight[:, features.NAMES.index(other)]
    found = swapped[:, _column(spec)]
    if _RELATIVE_TO_MID.fullmatch(spec.name):
        np.testing.assert_allclose(found, expected, rtol=1e-3)
    else:
        np.testing.assert_array_equal(found, expected)


def test_memory_is_fixed_and_compute_writes_nothing_but_its_answer() -> None:
    assert feature_state.STATE_I + feature_state.STATE_F < 400
    instrument = Instrument()
    where = instrument.fi.ctypes.data, instrument.ff.ctypes.data
    for event in market(51, 300):
        instrument.take(event)
        before = [
            a.tobytes() for a in (instrument.fi, instrument.ff, instrument.levels, instrument.depth)
        ]
        first = instrument.values(event.t_ns + 10**9)
        again = instrument.values(event.t_ns + 10**9)
        assert first.tobytes() == again.tobytes()
        assert before == [
            a.tobytes() for a in (instrument.fi, instrument.ff, instrument.levels, instrument.depth)
        ]
    assert where == (instrument.fi.ctypes.data, instrument.ff.ctypes.data)
    assert instrument.fi.shape == (features.STATE_I,)
    assert instrument.ff.shape == (features.STATE_F,)


def test_rows_of_many_instruments_do_not_touch_each_other() -> None:
    """The pipeline hands in rows of two-dimensional arrays; neighbours keep their bytes."""
    fi = np.full((3, features.STATE_I), 99, dtype=np.int64)
    ff = np.full((3, features.STATE_F), 99.0)
    out = np.full((3, features.N_FEATURES), 99.0)
    instrument = Instrument()
    instrument.fi, instrument.ff = fi[1], ff[1]
    features.reset(fi[1], ff[1])
    for event in market(61, 200):
        instrument.take(event)
        features.compute(fi[1], ff[1], instrument.levels, instrument.depth, event.t_ns, out[1])
    assert np.array_equal(out[1], trace(market(61, 200))[-1])
    for a in (fi, ff, out):
        assert (a[[0, 2]] == 99).all()


def test_code_for_any_cpu_gives_the_same_bytes(tmp_path: Path) -> None:
    """No fused multiply-add, no instruction of this machine alone, may change a bit."""
    code = "from tests.engine.feature_streams import digest; print(digest())"
    environment = os.environ | {
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": "",
        "NUMBA_CACHE_DIR": str(tmp_path),
        "PYTHONHASHSEED": "123",
    }
    plain = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert plain.stdout.strip() == digest()
