"""The pipeline as a pure function of its events."""

from __future__ import annotations

import numpy as np
import pytest

from engine import trust
from engine.config import TriggerConfig, TrustConfig
from engine.features import N_FEATURES
from engine.model_input import BOUND, INV_SCALE, MAX_CONSTANT, MEAN
from feeds import codec, tape, wire
from tests.engine.records import Run, book, config, definition, flow, ladder, opening, records

A, B = 0, 1


def stream(count: int = 600) -> list[bytes]:
    """Both instruments, interleaved."""
    pair = zip(flow(A, 2, count, seed=1), flow(B, 2, count, seed=2, middle=5000), strict=True)
    return [*opening(A), *opening(B, 5000), *(message for both in pair for message in both)]


def states(run: Run, symbol: str = "A") -> list[str]:
    """Book states told by an instrument's signals, repetitions left out."""
    told = [
        trust.BOOK_STATES[s["book_state"]] for s in run.signals if s["symbol"] == symbol.encode()
    ]
    return [state for i, state in enumerate(told) if i == 0 or told[i - 1] != state]


@pytest.mark.parametrize("pieces", [2, 7, 1202])
def test_signals_do_not_depend_on_how_the_records_are_cut(pieces: int) -> None:
    data = records(stream())
    assert Run().take(data, pieces).digest.hexdigest() == Run().take(data).digest.hexdigest()


def test_signals_do_not_depend_on_the_order_of_instruments_in_the_config() -> None:
    data = records(stream())
    one, other = Run(config(("A", "B"))).take(data), Run(config(("B", "A"))).take(data)
    assert one.digest.hexdigest() == other.digest.hexdigest()
    assert len(one.signals) > 100


def test_the_digest_tells_streams_apart() -> None:
    messages = stream()
    changed = [*messages[:700], book(wire.DELTA, A, 352, [(999, 12345)], []), *messages[701:]]
    assert Run().send(*messages).digest.hexdigest() != Run().send(*changed).digest.hexdigest()


def test_warm_signals_are_tradable_and_carry_their_sequence_range() -> None:
    run = Run().send(*stream())
    tradable = [s for s in run.signals if s["reasons"] == 0 and s["symbol"] == b"A"]
    assert len(tradable) > 20
    assert all(s["warm"] == 1 and s["book_state"] == trust.SYNCED for s in tradable)
    last = 0
    for signal in (s for s in run.signals if s["symbol"] == b"A"):
        assert last < signal["first_seq"] <= signal["last_seq"]
        last = signal["last_seq"]
    assert [s["signal_seq"] for s in run.signals if s["symbol"] == b"A"] == list(
        range(1, len(run.canonical["A"]) + 1)
    )


def test_a_cold_signal_is_published_but_says_warming_up() -> None:
    run = Run().send(*opening(A))
    (signal,) = run.signals
    assert signal["reasons"] == trust.REASON_WARMING_UP
    assert signal["predicted_class"] == trust.NO_CLASS
    assert signal["precision"] == trust.PRECISION_NONE


def test_a_hole_is_told_at_once_and_nothing_is_tradable_until_it_is_healed() -> None:
    messages = flow(A, 2, 700, seed=1)
    run = Run().send(*opening(A), *messages[:500])
    assert run.signals[-1]["reasons"] == 0
    before = len(run.signals)
    run.send(*messages[501:600])
    assert states(run)[-1] == "GAP"
    assert len(run.signals) == before + 1, "one suppressed signal says it"
    assert run.signals[-1]["reasons"] & trust.REASON_GAP
    answer = book(wire.SNAPSHOT, A, 620, *ladder(1000), flags=wire.FLAG_ANSWER)
    run.send(answer, *messages[619:650])
    assert states(run) == ["SYNCED", "GAP", "SYNCED"]
    assert run.signals[-1]["reasons"] == trust.REASON_WARMING_UP, "past flow is unknown again"


def test_a_gap_of_one_instrument_touches_no_other() -> None:
    messages = stream()
    whole = Run().send(*messages)
    holes = [m for n, m in enumerate(messages) if n < 400 or n % 9 or m[12] != A]
    torn = Run().send(*holes)
    assert "GAP" in states(torn, "A")
    assert torn.canonical["B"] == whole.canonical["B"]
    assert torn.canonical["A"] != whole.canonical["A"]


def test_reordered_messages_give_the_same_final_book() -> None:
    messages = flow(A, 2, 300, seed=5)
    whole = Run().send(*opening(A), *messages)
    swapped = list(messages)
    for i in range(10, 290, 20):
        swapped[i], swapped[i + 3] = swapped[i + 3], swapped[i]
    torn = Run().send(*opening(A), *swapped)
    assert torn.levels("A") == whole.levels("A")
    assert torn.pipeline.counters["lost"] == 0
    assert torn.pipeline.counters["late"] > 0


def test_a_restarted_source_starts_over() -> None:
    run = Run().send(*opening(A), *flow(A, 2, 100, seed=1))
    run.send(*opening(A, 2000, epoch=2))
    assert states(run) == ["SYNCED", "SYNCING", "SYNCED"]
    assert run.levels("A")[0][0] == (1999, 10)
    assert run.signals[-1]["source_epoch"] == 2
    assert run.pipeline.counters["resets"] == 1


def test_silence_makes_an_instrument_stale_and_its_next_message_mends_it() -> None:
    settings = config(trust=TrustConfig(stale_after_ns=1_000_000))
    run = Run(settings).take(records([*opening(A), *opening(B)]))
    timer = codec.encode_timer(10_000_000)
    run.take(records([timer], first_ns=10_000_000))
    assert states(run, "A") == ["SYNCED", "STALE"]
    assert states(run, "B") == ["SYNCED", "STALE"]
    assert run.signals[-1]["reasons"] & trust.REASON_STALE
    told = len(run.signals)
    run.take(records([timer], first_ns=10_000_001))
    assert len(run.signals) == told, "told once"
    heartbeat = codec.encode_heartbeat(1, A, 1, 1, 0, 0)
    run.take(records([heartbeat], first_ns=10_000_100))
    assert states(run, "A") == ["SYNCED", "STALE", "SYNCED"]
    assert states(run, "B") == ["SYNCED", "STALE"]


def test_repetitions_do_not_keep_a_book_fresh() -> None:
    settings = config(("A",), trust=TrustConfig(stale_after_ns=1_000_000))
    messages = flow(A, 2, 100, seed=1)
    run = Run(settings).send(*opening(A), *messages)
    behind = codec.encode_heartbeat(1, A, 1, 51, 0, 0)
    run.take(records([*messages[:30], behind], first_ns=2_000_000))
    timer = codec.encode_timer(2_040_000)
    run.take(records([timer], first_ns=2_040_000))
    assert states(run) == ["SYNCED", "STALE"]
    current = codec.encode_heartbeat(1, A, 1, 101, 0, 0)
    run.take(records([current], first_ns=2_050_000))
    assert states(run) == ["SYNCED", "STALE", "SYNCED"]


def test_a_source_that_starts_over_without_a_new_epoch_is_followed() -> None:
    again = [*opening(A, 3000), *flow(A, 2, 50, seed=2, middle=3000)]
    run = Run().send(*opening(A), *flow(A, 2, 100, seed=1), *again)
    fresh = Run().send(*again)
    assert run.levels("A") == fresh.levels("A")
    assert run.pipeline.counters["resets"] == 1


def test_a_crossed_book_is_not_tradable() -> None:
    run = Run().send(*opening(A), *flow(A, 2, 500, seed=1))
    run.send(book(wire.DELTA, A, 502, [(1003, 5)], []))
    assert run.signals[-1]["reasons"] == trust.REASON_CROSSED
    run.send(book(wire.DELTA, A, 503, [(1003, 0)], []))
    assert run.signals[-1]["reasons"] == 0
    assert states(run) == ["SYNCED", "CROSSED", "SYNCED"]


def test_an_empty_side_is_not_tradable() -> None:
    run = Run().send(*opening(A), *flow(A, 2, 500, seed=1))
    asks = [(price, 0) for price, _ in run.levels("A")[1]]
    run.send(book(wire.DELTA, A, 502, [], asks))
    assert run.signals[-1]["reasons"] == trust.REASON_EMPTY_SIDE


def test_trigger_every_n_events() -> None:
    settings = config(("A",), trigger=TriggerConfig(kind="events", every_events=10))
    run = Run(settings).send(*opening(A), *flow(A, 2, 100, seed=1))
    assert len(run.signals) == 1 + 10, "one at the first book, then every tenth event"
    assert [int(s["last_seq"]) for s in run.signals] == [1, *range(11, 102, 10)]


def test_trigger_every_t_of_event_time() -> None:
    settings = config(("A",), trigger=TriggerConfig(kind="time", every_ns=5_000_000))
    run = Run(settings).send(*opening(A), *flow(A, 2, 100, seed=1))
    times = [int(s["exchange_time_ns"]) // 5_000_000 for s in run.signals]
    assert len(times) == len(set(times)) == 21


def test_a_top_of_book_trigger_is_silent_below_the_top() -> None:
    run = Run().send(*opening(A))
    run.send(book(wire.DELTA, A, 2, [(995, 77)], [(1006, 77)]))
    assert len(run.signals) == 1
    run.send(book(wire.DELTA, A, 3, [(999, 11)], []))
    assert len(run.signals) == 2
    assert run.signals[-1]["first_seq"] == 2, "the silent message is part of it"
    assert run.signals[-1]["last_seq"] == 3


def test_malformed_and_foreign_messages_are_counted_and_change_nothing() -> None:
    messages = stream(100)
    clean = Run().send(*messages)
    bad = book(wire.DELTA, A, 2, [(-5, 1)], [])
    cut = messages[10][:-5]
    foreign = codec.encode_heartbeat(9, 9, 1, 4, 0, 0)
    torn = Run().send(*messages[:20], bad, cut, b"\x01", foreign, *messages[20:])
    assert torn.digest.hexdigest() == clean.digest.hexdigest()
    assert torn.pipeline.counters["rejected"] == 3
    assert torn.pipeline.counters["unknown_instrument"] == 1
    assert torn.pipeline.last_error() == wire.ERRORS[1]


def test_recorded_signals_are_passed_over() -> None:
    messages = stream(100)
    signal = records([b"\0" * 64], kinds=tape.SIGNAL)
    data = records(messages[:50]) + signal + records(messages[50:])
    assert Run().take(data).digest.hexdigest() == Run().send(*messages).digest.hexdigest()


def test_an_instrument_may_be_defined_again_under_other_ids() -> None:
    run = Run().send(*opening(A))
    renamed = bytearray(definition(A, epoch=2))
    renamed[12] = 7
    run.send(bytes(renamed))
    snapshot = bytearray(book(wire.SNAPSHOT, A, 1, *ladder(1500), epoch=2))
    snapshot[12] = 7
    run.send(bytes(snapshot))
    assert run.levels("A")[0][0][0] == 1499


def test_nothing_is_compiled_while_it_runs() -> None:
    from engine import advance, book, feature_state, latency, signals
    from feeds.inner import DECLARED

    data = records(stream())
    before = [len(kernel.overloads) for kernel, _ in DECLARED]
    assert len(Run().take(data).signals) > 100
    assert [len(kernel.overloads) for kernel, _ in DECLARED] == before
    called = (
        advance.advance,
        book.side_levels,
        feature_state.reset,
        latency.quantile,
        latency.record,
        signals.encode_signal,
        tape.put_record,
    )
    for kernel in called:
        assert len(kernel.signatures) == 1
        assert kernel._can_compile is False


PLANTS = {
    "nan": (MEAN, np.nan, trust.CHECK_INPUT),
    "inf": (MEAN, -np.inf, trust.CHECK_INPUT),
    "-inf": (MEAN, np.inf, trust.CHECK_INPUT),
    "1e30": (MEAN, -1e30, trust.CHECK_RANGE),
    "-1e30": (MEAN, 1e30, trust.CHECK_RANGE),
    "constant": (INV_SCALE, 0.0, trust.CHECK_STUCK_INPUT),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_no_impossible_input_reaches_a_tradable_signal(plant: str) -> None:
    row, value, bit = PLANTS[plant]
    run = Run(config(("A",))).send(*opening(A), *flow(A, 2, 500, seed=1))
    run.pipeline.take_stream_reset(0)  # no model takes it here
    norm = run.pipeline._norm
    norm[BOUND] = 1e6
    messages = iter(flow(A, 502, 40 * N_FEATURES, seed=2))
    for feature in range(N_FEATURES):
        kept = norm[:, feature].copy()
        norm[row, feature] = value
        norm[MAX_CONSTANT, feature] = 3
        told = len(run.signals)
        run.send(*(next(messages) for _ in range(38)))
        planted = run.signals[told:]
        if plant == "constant":
            # It takes its declared run to be known as stuck.
            assert len(planted) > 4
            planted = planted[4:]
        assert planted
        for signal in planted:
            assert signal["reasons"] == trust.REASON_VALUE_CHECK
            assert signal["value_check"] == bit
            assert signal["predicted_class"] == trust.NO_CLASS
        norm[:, feature] = kept
        run.send(next(messages), next(messages))
    assert run.pipeline.suppressed["VALUE_CHECK"] > N_FEATURES
    run.send(*flow(A, 502 + 40 * N_FEATURES, 20, seed=3))
    assert run.signals[-1]["reasons"] == 0, "and all is well again"
