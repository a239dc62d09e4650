"""The simulated market: determinism, a sound order book, Hawkes clustering, the planted signal."""

from __future__ import annotations

import hashlib
import math
import struct

import numpy as np
import pytest

from feeds import codec, wire
from feeds.errors import InputError
from feeds.market_state import negative_exp, negative_log
from feeds.optimum import bayes_accuracy, displacement_given_state, optimum
from feeds.simulator import MAX_INSTRUMENTS, START_NS, Simulator
from feeds.tape_reader import TapeReader

GOLDEN_MESSAGES = 20_000
GOLDEN_SHA256 = "01f2d50a1c966e6a9a18f0f10d957bd163d948e9491656f6a5063aa45f01fcab"


def digest(simulator: Simulator, messages: int, chunk_bytes: int = 1 << 20) -> str:
    sha = hashlib.sha256()
    for buf, start, stop, _ in simulator.chunks(messages, chunk_bytes=chunk_bytes):
        sha.update(buf[start:stop].tobytes())
    return sha.hexdigest()


def test_the_bytes_are_the_same_on_every_machine() -> None:
    assert digest(Simulator(7), GOLDEN_MESSAGES) == GOLDEN_SHA256


def test_the_bytes_do_not_depend_on_how_they_are_cut() -> None:
    assert digest(Simulator(7), GOLDEN_MESSAGES, chunk_bytes=9_999) == GOLDEN_SHA256


def test_another_seed_gives_another_market() -> None:
    assert digest(Simulator(8), GOLDEN_MESSAGES) != GOLDEN_SHA256


def test_an_instrument_does_not_depend_on_how_many_others_there_are() -> None:
    alone = [p for _, p in Simulator(3, 1).stream(seconds=5)]
    among = [p for t, p in Simulator(3, 5).stream(seconds=5) if t == b"l2.sim.ALPHA"]
    assert len(alone) > 500
    assert alone == among


def test_log_and_exp_are_accurate() -> None:
    for u in np.linspace(1e-9, 1.0, 1_001).tolist():
        assert negative_log(u) == pytest.approx(-math.log(u), abs=1e-11)
    for x in np.linspace(0.0, 39.0, 1_001).tolist():
        assert negative_exp(x) == pytest.approx(math.exp(-x), rel=1e-11)


def test_every_message_keeps_the_book_sound() -> None:
    """Each Delta and Trade is checked against a naive book of the instrument."""
    books: dict[int, tuple[dict[int, int], dict[int, int]]] = {}
    seqs: dict[int, int] = {}
    traded: dict[int, tuple[int, int, int]] = {}
    clock = 0
    counts = {wire.SNAPSHOT: 0, wire.DELTA: 0, wire.TRADE: 0}
    spreads = []
    for _, payload in Simulator(11, 3).stream(30_000):
        array = np.frombuffer(payload, dtype=np.uint8).copy()
        assert wire.check(array, 0, len(array)) == 0
        template = codec.template_id(payload)
        if template == wire.INSTRUMENT:
            continue
        counts[template] += 1
        prefix = codec.decode_block(payload, wire.PREFIX_DTYPE)
        i, seq = int(prefix["instrument_id"]), int(prefix["seq"])
        assert seq == seqs.get(i, 0) + 1
        seqs[i] = seq
        assert int(prefix["exchange_time_ns"]) >= clock
        clock = int(prefix["exchange_time_ns"])
        if template == wire.TRADE:
            trade = codec.decode_block(payload, wire.TRADE_DTYPE)
            buy = int(trade["aggressor"]) == wire.AGGRESSOR_BUY
            side = books[i][1 if buy else 0]
            price = int(trade["price_ticks"])
            assert price == (min(side) if buy else max(side)), "a trade takes the best price"
            traded[i] = (1 if buy else 0, price, side[price] - int(trade["quantity_lots"]))
            continue
        sides = [dict(levels.tolist()) for levels in codec.decode_levels(payload)]
        if template == wire.SNAPSHOT:
            assert i not in books
            books[i] = (sides[0], sides[1])
        else:
            assert 1 <= len(sides[0]) + len(sides[1]) <= 3
            if i in traded:
                on, price, left = traded.pop(i)
                assert sides[on][price] == left, "the Delta after a Trade takes its liquidity"
            for book, changes in zip(books[i], sides, strict=True):
                for price, quantity in changes.items():
                    assert quantity >= 0
                    if quantity:
                        book[price] = quantity
                    else:
                        del book[price]
        bids, asks = books[i]
        spreads.append(min(asks) - max(bids))
        assert 1 <= spreads[-1] <= 3
        assert min(len(bids), len(asks)) >= 45
        assert all(max(bids) - k in bids and min(asks) + k in asks for k in range(10))
    assert counts[wire.SNAPSHOT] == 3
    assert counts[wire.TRADE] > 2_000
    assert len(set(spreads)) == 3


def test_the_rate_is_the_one_asked_for_and_events_cluster() -> None:
    rate_hz, seconds = 200.0, 400
    times = np.array(
        [
            struct.unpack_from("<q", p, wire.AT_EXCHANGE_TIME)[0] - START_NS
            for _, p in Simulator(5, 1, rate_hz=rate_hz).stream(seconds=seconds)
            if codec.template_id(p) == wire.DELTA
        ]
    )
    assert times[-1] < seconds * 10**9
    assert len(times) / seconds == pytest.approx(rate_hz, rel=0.05)
    counts = np.bincount(times // 100_000_000)
    # A Poisson process has 1; an exponential Hawkes process tends to 1 / (1 - 0.6)**2 = 6.25.
    assert 3.0 < counts.var() / counts.mean() < 8.0


def test_a_tape_holds_the_stream(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "sim.tape"
    simulator = Simulator(2, 6)
    assert len(simulator.write_tape(path, messages=5_000)) == 0
    reader = TapeReader(path)
    assert [x.symbol for x in reader.meta.instruments][3:] == ["DELTA", "SIM04", "SIM05"]
    assert reader.meta.instruments == simulator.instruments
    assert [bytes(r.payload) for r in reader.records()] == [
        p for _, p in Simulator(2, 6).stream(5_000)
    ]
    with pytest.raises(InputError, match="exists already"):
        Simulator(2).write_tape(path, messages=10)


def test_truth_names_each_delta(tmp_path) -> None:  # type: ignore[no-untyped-def]
    truth = Simulator(2).write_tape(tmp_path / "t.tape", messages=5_000, truth=True)
    deltas = [
        struct.unpack_from("<IQQ", r.payload, wire.AT_INSTRUMENT_ID)[::2]
        for r in TapeReader(tmp_path / "t.tape").records()
        if codec.template_id(r.payload) == wire.DELTA
    ]
    assert deltas == list(zip(truth["instrument_id"].tolist(), truth["seq"].tolist(), strict=True))
    assert np.allclose(truth["posterior"].sum(axis=1), 1.0)


def labelled(tmp_path, strength: float, seed: int, horizon: int):  # type: ignore[no-untyped-def]
    simulator = Simulator(seed, 1, signal_strength=strength)
    truth = simulator.write_tape(tmp_path / f"{seed}.tape", messages=900_000, truth=True)
    best = optimum(simulator, horizon)
    moves = truth["mid_half_ticks"][horizon:] - truth["mid_half_ticks"][:-horizon]
    labels = 1 + (moves > best.threshold_half_ticks) - (moves < -best.threshold_half_ticks)
    return truth[:-horizon], labels.astype(int), best


def test_the_optimum_is_what_bayes_rule_reaches(tmp_path) -> None:  # type: ignore[no-untyped-def]
    truth, labels, best = labelled(tmp_path, 1.0, 21, 100)
    assert 0.6 < best.accuracy < 0.75
    assert best.chance < 0.36
    knowing = bayes_accuracy(labels, truth["hidden"], best.class_given_state)
    seeing = bayes_accuracy(labels, truth["posterior"], best.class_given_state)
    assert knowing == pytest.approx(best.accuracy, abs=0.025)
    assert knowing - 0.015 < seeing <= knowing + 0.003, "the messages show the state soon"
    assert (truth["posterior"].argmax(axis=1) - 1 == truth["hidden"]).mean() > 0.98
    for s in (-1, 0, 1):
        shares = np.bincount(labels[truth["hidden"] == s], minlength=3)
        shares = shares / shares.sum()
        assert np.abs(shares - best.class_given_state[s + 1]).max() < 0.05


def test_without_the_signal_nothing_beats_chance(tmp_path) -> None:  # type: ignore[no-untyped-def]
    truth, labels, best = labelled(tmp_path, 0.0, 22, 100)
    assert best.accuracy == pytest.approx(best.chance)
    assert np.all(truth["posterior"] == truth["posterior"][0]), "the messages say nothing of s"
    moves = displacement_given_state(Simulator(1, 1, signal_strength=0.0), 100)
    assert np.allclose(moves, moves[:, ::-1])
    free = bayes_accuracy(labels, truth["hidden"])
    majority = np.bincount(labels).max() / len(labels)
    assert free - majority < 0.03


@pytest.mark.parametrize(
    "arguments",
    [
        {"n_instruments": 0},
        {"n_instruments": MAX_INSTRUMENTS + 1},
        {"signal_strength": 1.5},
        {"signal_strength": float("nan")},
        {"levels": 5},
        {"rate_hz": 0.0},
        {"seed": -1},
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(InputError, match="expected"):
        Simulator(**{"seed": 1, **arguments})  # type: ignore[arg-type]
