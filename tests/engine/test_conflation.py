"""When messages come too fast: fewer signals, the same book, and the same again in a replay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine import trust
from engine.backends.registry import open_backend
from engine.bundle import load_bundle
from engine.digest import Digest
from engine.pipeline import Pipeline
from engine.trust_events import CONFLATION, Control
from feeds import codec, wire
from tests.engine.records import Run, book, config, definition, flow, ladder, opening, records

EVERY_NS = 20_000_000  # of market time; `flow` has a message a millisecond
REFERENCE = Path(__file__).resolve().parents[2] / "models" / "reference"
A, B = 0, 1


def conflation(every_ns: int) -> bytes:
    return Control(CONFLATION, 1, "engine", "", every_ns).encode()


BEGIN, END = conflation(EVERY_NS), conflation(0)


def both(first: int, count: int) -> list[bytes]:
    """Messages of both instruments, interleaved."""
    pair = zip(flow(A, 2, 900, seed=1), flow(B, 2, 900, seed=2, middle=5000), strict=True)
    messages = [message for two in pair for message in two]
    return messages[2 * first : 2 * (first + count)]


def start() -> list[bytes]:
    return [*opening(A), *opening(B, 5000)]


def test_an_instrument_has_one_signal_in_so_much_market_time() -> None:
    run = Run().send(*start(), *both(0, 300))
    before = len(run.signals)
    run.send(BEGIN, *both(300, 400))
    for symbol in (b"A", b"B"):
        times = [s["exchange_time_ns"] for s in run.signals[before:] if s["symbol"] == symbol]
        assert 15 <= len(times) <= 21
        assert np.diff(times).min() >= EVERY_NS


def test_every_message_still_goes_into_book_and_features() -> None:
    plain = Run(folder=REFERENCE).send(*start(), *both(0, 900))
    conflated = Run(folder=REFERENCE).send(
        *start(), *both(0, 500), BEGIN, *both(500, 399), END, *both(899, 1)
    )
    by_seq = {(s["symbol"], s["last_seq"]): s for s in plain.signals}
    late = [s for s in conflated.signals if s["reasons"] == 0][-30:]
    assert len(late) == 30
    for signal in late:
        same = by_seq.get((signal["symbol"], signal["last_seq"]))
        if same is not None:  # a signal held back may leave at a message that moved nothing
            for field in ("input_crc", "best_bid_ticks", "best_ask_ticks", "predicted_class"):
                assert signal[field] == same[field]
    for symbol in ("A", "B"):
        assert conflated.levels(symbol) == plain.levels(symbol)
    assert len(conflated.signals) < len(plain.signals)


def test_the_signals_tell_what_they_follow_from_without_a_hole() -> None:
    run = Run().send(*start(), *both(0, 300), BEGIN, *both(300, 200), END, *both(500, 100))
    for symbol in (b"A", b"B"):
        own = [s for s in run.signals if s["symbol"] == symbol]
        assert [s["signal_seq"] for s in own] == list(range(1, len(own) + 1))
        last = 0
        for signal in own:
            assert last < signal["first_seq"] <= signal["last_seq"]
            last = signal["last_seq"]


def test_what_was_held_back_is_told_at_the_end_and_once() -> None:
    run = Run().send(*start(), *both(0, 300), BEGIN, *both(300, 50))
    before = len(run.signals)
    run.send(END, definition(A, seq=351))
    released = run.signals[before:]
    assert [s["symbol"] for s in released] == [b"A", b"B"]
    assert all(s["last_seq"] == 351 for s in released)
    run.send(END, definition(A, seq=351))
    assert len(run.signals) == before + 2


def test_a_lost_book_is_told_at_once() -> None:
    run = Run().send(*start(), *both(0, 300), BEGIN, *both(300, 1))
    run.send(book(wire.DELTA, A, 400, [(999, 5)], []))
    assert run.signals[-1]["book_state"] == trust.GAP


def test_a_new_book_after_a_hole_is_told_at_once() -> None:
    run = Run().send(*start(), *both(0, 300), BEGIN, *both(300, 1))
    run.send(book(wire.DELTA, A, 400, [(999, 5)], []))
    run.send(book(wire.SNAPSHOT, A, 401, *ladder(1000), flags=wire.FLAG_ANSWER))
    assert run.signals[-1]["book_state"] == trust.SYNCED


@pytest.mark.parametrize("pieces", [2, 13, 805])
def test_signals_do_not_depend_on_how_the_records_are_cut(pieces: int) -> None:
    messages = [*start(), *both(0, 200), BEGIN, *both(200, 100), END, *both(300, 100)]
    data = records(messages)
    whole, cut = Run().take(data), Run().take(data, pieces)
    assert cut.digest.hexdigest() == whole.digest.hexdigest()
    assert len(whole.signals) > 100


def test_a_native_answer_releases_the_same() -> None:
    messages = [*start(), *both(0, 500), BEGIN, *both(500, 100), END, *both(600, 50)]
    data = np.frombuffer(records(messages), dtype=np.uint8).copy()
    digests = []
    for backend in ("compiled", "onnx"):
        bundle = load_bundle(REFERENCE)
        pipeline = Pipeline(config(), bundle, open_backend(backend, bundle))
        digest, at = Digest(), 0
        while at < len(data):
            at = pipeline.serve(data, at, len(data))
            if pipeline.served:
                digest.update_all(pipeline.served, pipeline.signal_bytes)
        pipeline.close()
        digests.append((digest.hexdigest(), pipeline.tradable))
    assert digests[0] == digests[1]
    assert digests[0][1] > 50
    assert codec.template_id(END) == wire.CONTROL
