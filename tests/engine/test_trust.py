"""Trust events in the pipeline: who answers, what is suppressed, what a replay makes of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from engine import evidence, trust
from engine.config import Config
from engine.controls import ControlsConfig
from engine.failover import FailoverConfig
from engine.serving import CATCH_UP_ROWS, Loaded
from engine.swap import open_model
from engine.trust_events import (
    ARM,
    DEMOTE,
    DRIFT,
    HALT,
    INFERENCE_LATE,
    PROMOTE,
    ROLLBACK,
    SHADOW_LOST,
    SHADOW_UP,
    SWAP,
    Control,
    ShadowAnswer,
)
from feeds import codec, wire
from feeds.errors import InputError
from tests.engine.bundles import make_bundle
from tests.engine.records import VENUE, Run, config, flow, opening, records

A = 0
WARM = 450


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "one"
    make_bundle(path, seed=1)
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "other"
    make_bundle(path, seed=2)
    return path


@pytest.fixture(scope="module")
def stateful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "stateful"
    make_bundle(path, seed=3, stateful=True)
    return path


def settings(**failover: object) -> Config:
    return config(("A",), failover=FailoverConfig(**failover))


def warm(folder: Path, chosen: Config | None = None, **options: object) -> Run:
    run = Run(chosen or settings(), folder, **options)
    return run.send(*opening(A), *flow(A, 2, WARM, seed=1))


def more(count: int, start: int = WARM + 2, seed: int = 9) -> list[bytes]:
    return flow(A, start, count, seed=seed)


def control(command: int, **fields: object) -> bytes:
    return Control(command, 0, **fields).encode()


def answer(run: Run, ticket: int, *, off: float = 0.0, other_class: bool = False) -> bytes:
    """What a shadow says of an inference: the serving scores, moved by ``off``."""
    row = run.pipeline.trust.recent.find(ticket)
    assert row is not None
    fp32 = row.outputs + np.float32(off)
    if other_class:
        fp32 = -row.outputs
    return ShadowAnswer(ticket, row.signal_seq, VENUE, "A", 0, fp32, row.outputs.copy()).encode()


def last(run: Run) -> np.void:
    return run.signals[-1]


def test_signals_say_which_precision_answered(folder: Path) -> None:
    run = warm(folder)
    assert last(run)["reasons"] == 0
    assert last(run)["precision"] == trust.PRECISION_INT8
    assert last(run)["numerics"] == trust.NUMERICS_EXACT_INT8
    run.send(control(DEMOTE, by="Ada"), *more(20))
    assert last(run)["precision"] == trust.PRECISION_FP32
    assert last(run)["numerics"] == trust.NUMERICS_TOLERANCE
    run.send(control(PROMOTE, by="Ada"), *more(20, WARM + 22))
    assert last(run)["precision"] == trust.PRECISION_INT8


def test_no_tick_is_missed_and_none_answered_twice_over_a_switch(folder: Path) -> None:
    messages = more(60)
    plain = warm(folder).send(*messages)
    events = [control(DEMOTE, by="Ada"), control(PROMOTE, by="Ada"), control(HALT, by="Ada")]
    switched = warm(folder).send(
        *messages[:10], events[0], *messages[10:30], events[1], *messages[30:50], events[2],
        *messages[50:],
    )  # fmt: skip
    assert [s["signal_seq"] for s in switched.signals] == [s["signal_seq"] for s in plain.signals]
    assert [s["last_seq"] for s in switched.signals] == [s["last_seq"] for s in plain.signals]
    assert [s["input_crc"] for s in switched.signals] == [s["input_crc"] for s in plain.signals]


def test_diverging_answers_demote_within_the_configured_k(folder: Path, tmp_path: Path) -> None:
    chosen = settings(divergence=0.5, divergences=3, divergences_in=10)
    run = warm(folder, chosen)
    run.send(control(SHADOW_UP), *more(5))
    assert last(run)["shadow_state"] == trust.SHADOW_AGREEING
    ticket = run.pipeline.ticket
    run.send(*(answer(run, ticket - n, off=0.6) for n in range(2)), *more(20, WARM + 7))
    assert last(run)["precision"] == trust.PRECISION_INT8
    run.send(answer(run, ticket - 2, off=0.6))
    (move,) = run.pipeline.trust.moves
    assert move.transition.rule == "divergences"
    found = evidence.gather(run.pipeline, chosen, move)
    run.send(*more(20, WARM + 27))
    assert last(run)["precision"] == trust.PRECISION_FP32
    assert last(run)["shadow_state"] == trust.SHADOW_DIVERGED

    path = evidence.write(str(tmp_path), found)
    assert path.name.endswith("-0001-INT8-FP32.json")
    read = json.loads(path.read_text())
    assert read["rule"] == "divergences"
    assert read["inference"] == ticket - 2
    assert set(read["scores"]) == {"int8", "fp32"}
    assert len(read["inputs"]) == len(read["features"]) == len(run.pipeline.vector)
    assert read["book"]["bids"][0][0] < read["book"]["asks"][0][0]
    assert read["hashes"]["model"] == f"{run.pipeline.trust.model_hash:016x}"
    gap = np.array(read["scores"]["fp32"]) - np.array(read["scores"]["int8"])
    assert np.abs(gap).max() == pytest.approx(0.6, abs=1e-5)


def test_answers_that_agree_change_nothing_but_the_shadow_s_state(folder: Path) -> None:
    run = warm(folder)
    run.send(*(answer(run, run.pipeline.ticket - n) for n in range(20)), *more(20))
    assert run.pipeline.trust.shadow_answers == 20
    assert run.pipeline.trust.disagreements == 0
    assert not run.pipeline.trust.moves
    assert last(run)["shadow_state"] == trust.SHADOW_AGREEING


def test_answers_to_what_is_forgotten_settling_or_of_other_shape_count_for_nothing(
    folder: Path,
) -> None:
    run = warm(folder, settings(divergence=0.5, divergences=1, divergences_in=1))
    row = run.pipeline.trust.recent.find(run.pipeline.ticket)
    assert row is not None
    far = row.outputs + np.float32(9.0)
    two = far[:2]
    for ticket, flags, scores in ((10**6, 0, far), (row.ticket, 1, far), (row.ticket, 0, two)):
        event = ShadowAnswer(ticket, 1, VENUE, "A", flags, scores, scores)
        run.send(event.encode())
    assert not run.pipeline.trust.moves
    run.send(ShadowAnswer(row.ticket, 1, VENUE, "A", 0, far, row.outputs).encode())
    assert len(run.pipeline.trust.moves) == 1


def test_promotion_by_rule_looks_at_what_int8_would_have_said(folder: Path) -> None:
    run = warm(folder, settings(promote_after=5))
    run.send(control(DEMOTE, by="Ada"), *more(30))
    ticket = run.pipeline.ticket
    run.send(*(answer(run, ticket - n) for n in range(4)))
    assert run.pipeline.trust.failover.mode == trust.MODE_FP32
    run.send(answer(run, ticket - 4), *more(20, WARM + 32))
    assert last(run)["precision"] == trust.PRECISION_INT8


def test_a_halt_stops_everything_until_a_named_person_arms(folder: Path) -> None:
    run = warm(folder)
    told = len(run.signals)
    run.send(control(HALT, by="Ada", text="news"), *more(60))
    halted = run.signals[told:]
    assert len(halted) > 5
    assert all(s["reasons"] & trust.REASON_HALTED for s in halted)
    assert all(s["predicted_class"] == trust.NO_CLASS for s in halted)
    run.send(control(ARM, by="Bob"), *more(40, WARM + 62))
    assert last(run)["reasons"] == 0
    moves = [str(move.transition) for move in run.pipeline.trust.moves]
    assert moves == [
        "INT8 -> HALTED by Ada: halt: news",
        "HALTED -> INT8 by Bob: arm: after halt: news",
    ]


def test_start_halted(folder: Path) -> None:
    chosen = config(("A",), controls=ControlsConfig(start_halted=True))
    run = warm(folder, chosen)
    assert all(s["reasons"] for s in run.signals)
    run.send(control(ARM, by="Ada"), *more(40))
    assert last(run)["reasons"] == 0


def test_the_throttle_of_repetitions_latches_until_armed(folder: Path) -> None:
    chosen = config(("A",), controls=ControlsConfig(max_repeats=2))
    run = warm(folder, chosen).send(*more(200))
    assert last(run)["reasons"] == trust.REASON_REPEATED
    assert run.pipeline.tradable > 0
    run.send(control(ARM, by="Ada"), *more(8, WARM + 202))
    assert run.signals[-1]["reasons"] == 0 or run.signals[-2]["reasons"] == 0


def test_a_late_inference_is_suppressed_and_steps_down(folder: Path) -> None:
    run = warm(folder)
    seq = int(last(run)["signal_seq"]) + 1
    event = control(
        INFERENCE_LATE, by="clock", value=200_000_000, signal_seq=seq, venue=VENUE, symbol="A"
    )
    run.send(event, *more(40))
    late = next(s for s in run.signals if s["signal_seq"] == seq)
    assert late["reasons"] == trust.REASON_LATE
    after = next(s for s in run.signals if s["signal_seq"] == seq + 1)
    assert after["precision"] == trust.PRECISION_FP32
    (move,) = run.pipeline.trust.moves
    assert "200,000,000 ns" in move.transition.detail


def test_the_clock_makes_an_inference_late_live(folder: Path) -> None:
    run = warm(folder, settings(inference_budget_ns=1_000))
    assert last(run)["reasons"] == 0, "a replay has no clock"
    buf = np.frombuffer(records(more(40)), dtype=np.uint8).copy()
    clock: Iterator[int] = iter(range(0, 10**9, 2_000))
    at, blocked = 0, 0
    while at < len(buf):
        at = run.pipeline.advance(buf, at, len(buf))
        if run.pipeline.fired:
            message = bytes(run.pipeline.answer(lambda: next(clock)))
            block = codec.decode_block(message, wire.SIGNAL_DTYPE)
            blocked += bool(block["reasons"] & trust.REASON_LATE)
            assert run.pipeline.late_ns == 2_000
    assert blocked > 2
    assert run.pipeline.trust.failover.mode == trust.MODE_HALTED, "INT8 late, then FP32 late"


def test_a_model_that_fails_is_stepped_down_from(folder: Path) -> None:
    run = warm(folder, settings(violations=2, violations_in=10))
    loaded = run.pipeline.trust.loaded
    assert loaded is not None

    def fail(stream: int, x: np.ndarray, out: np.ndarray) -> int:
        raise RuntimeError("device lost")

    loaded.backend(trust.MODE_INT8).infer = fail  # type: ignore[method-assign]
    told = len(run.signals)
    run.send(*more(40))
    failed = [bool(s["reasons"] & trust.REASON_INFERENCE_FAILED) for s in run.signals[told:]]
    assert failed[:2] == [True, True]
    assert not any(failed[2:])
    assert last(run)["precision"] == trust.PRECISION_FP32


def test_what_the_graph_s_own_check_says_suppresses_and_counts(folder: Path) -> None:
    run = warm(folder, settings(violations=3, violations_in=10))
    loaded = run.pipeline.trust.loaded
    assert loaded is not None
    backend = loaded.backend(trust.MODE_INT8)
    infer = backend.infer

    def saturate(stream: int, x: np.ndarray, out: np.ndarray) -> int:
        infer(stream, x, out)
        return 1 << trust.CHECK_LAYERS

    backend.infer = saturate  # type: ignore[method-assign]
    told = len(run.signals)
    run.send(*more(40))
    checked = [int(s["value_check"]) for s in run.signals[told:]]
    assert checked[:3] == [256] * 3
    assert not any(checked[3:])
    (move,) = run.pipeline.trust.moves
    assert "saturated" in move.transition.detail


def test_notes_tell_what_moved_nothing(folder: Path) -> None:
    run = warm(folder)
    run.send(control(SHADOW_LOST, by="shadow", text="killed"), control(DRIFT, text="input x"))
    assert [(note.severity, note.text) for note in run.pipeline.trust.notes] == [
        ("warning", "shadow lost: shadow: killed"),
        ("warning", "drift: input x"),
    ]
    run.send(*more(5))
    assert last(run)["shadow_state"] == trust.SHADOW_LOST


# Another model.


def loaded_from(folder: Path, chosen: Config) -> Loaded:
    from engine.bundle import load_bundle

    return open_model(chosen, str(folder), load_bundle(folder).model_hash)


def swap_event(loaded: Loaded) -> bytes:
    bundle = loaded.bundle
    return control(SWAP, by="Ada", text=str(bundle.path), model_hash=bundle.model_hash)


def test_a_swap_takes_over_between_two_ticks_and_a_rollback_undoes_it(
    folder: Path, other: Path
) -> None:
    chosen = settings()
    messages = more(90)
    run = warm(folder, chosen)
    first = run.pipeline.trust.model_hash
    new = loaded_from(other, chosen)
    run.pipeline.trust.offer(new)
    run.send(*messages[:30], swap_event(new), *messages[30:60])
    assert last(run)["model_hash"] == new.bundle.model_hash == run.pipeline.trust.model_hash
    run.send(control(ROLLBACK, by="Ada", model_hash=first), *messages[60:])
    assert last(run)["model_hash"] == first
    assert run.pipeline.trust.swaps == 2
    assert not run.pipeline.trust.retired, "the other one is kept for the next rollback"

    one, two = warm(folder).send(*messages), warm(other).send(*messages)
    seqs = [int(s["signal_seq"]) for s in run.signals]
    assert seqs == [int(s["signal_seq"]) for s in one.signals], "none missed, none twice"
    hashes = [int(s["model_hash"]) for s in run.signals]
    start, stop = (
        hashes.index(new.bundle.model_hash),
        len(hashes) - hashes[::-1].index(new.bundle.model_hash),
    )
    swapped = run.canonical["A"]
    assert swapped[:start] == one.canonical["A"][:start]
    assert swapped[start:stop] == two.canonical["A"][start:stop]
    assert swapped[stop:] == one.canonical["A"][stop:]


def test_a_second_swap_retires_the_first_model(folder: Path, other: Path, stateful: Path) -> None:
    chosen = settings()
    run = warm(folder, chosen)
    for place in (other, stateful):
        new = loaded_from(place, chosen)
        run.pipeline.trust.offer(new)
        run.send(swap_event(new))
    (retired,) = run.pipeline.trust.retired
    assert retired.bundle.path == folder
    run.send(*more(30))
    assert last(run)["reasons"] == 0


def test_a_replay_has_to_have_the_model_that_took_over(folder: Path, other: Path) -> None:
    chosen = settings()
    new = loaded_from(other, chosen)
    with pytest.raises(InputError, match="not at hand"):
        warm(folder, chosen).send(swap_event(new))
    asked = []

    def load(model_hash: int, place: str) -> Loaded:
        asked.append((model_hash, place))
        return new

    run = warm(folder, chosen, load=load).send(swap_event(new), *more(20))
    assert asked == [(new.bundle.model_hash, str(other))]
    assert last(run)["model_hash"] == new.bundle.model_hash


def test_a_bundle_that_is_not_the_one_named_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="another model"):
        open_model(settings(), str(folder), 5)


@pytest.mark.parametrize("event", ["demote", "swap"])
def test_a_model_with_state_catches_up_before_it_takes_over(
    stateful: Path, folder: Path, event: str
) -> None:
    chosen = settings()
    messages = more(400)
    if event == "demote":
        run = warm(stateful, chosen).send(*messages[:200], control(DEMOTE, by="Ada"))
        whole = warm(
            stateful,
            msgspec.structs.replace(
                chosen, model=msgspec.structs.replace(chosen.model, precision="fp32")
            ),
        )
    else:
        new = loaded_from(stateful, chosen)
        run = warm(folder, chosen)
        run.pipeline.trust.offer(new)
        run.send(*messages[:200], swap_event(new))
        whole = warm(stateful, chosen)
    assert run.pipeline.ticket > CATCH_UP_ROWS
    told = len(run.signals)
    run.send(*messages[200:])
    whole.send(*messages)
    ours = np.array([s["predicted_class"] for s in run.signals[told:]])
    theirs = np.array([s["predicted_class"] for s in whole.signals[told:]])
    assert np.mean(ours == theirs) == 1.0


# Replays.


def test_a_session_with_everything_in_it_replays_to_the_same_digest(
    folder: Path, other: Path
) -> None:
    chosen = config(
        ("A",),
        failover=FailoverConfig(divergence=0.5, divergences=2, divergences_in=4, promote_after=6),
        controls=ControlsConfig(max_signals_per_s=1_000_000, collar_change=50.0),
    )
    new = loaded_from(other, chosen)
    live = warm(folder, chosen)
    live.pipeline.trust.offer(new)
    first = live.pipeline.trust.model_hash
    messages = iter(more(400))
    tape: list[bytes] = []

    def happen(*events: bytes, then: int = 20) -> None:
        stretch = [*events, *(next(messages) for _ in range(then))]
        tape.extend(stretch)
        live.send(*stretch)

    happen(control(SHADOW_UP))
    happen(*(answer(live, live.pipeline.ticket - n, off=0.7) for n in range(2)))
    happen(*(answer(live, live.pipeline.ticket - n) for n in range(6)))
    happen(control(HALT, by="Ada"))
    happen(control(ARM, by="Ada"))
    seq = int(live.signals[-1]["signal_seq"]) + 1
    happen(
        control(INFERENCE_LATE, value=10**8, signal_seq=seq, venue=VENUE, symbol="A", by="clock")
    )
    happen(control(SHADOW_LOST, text="killed"))
    happen(swap_event(new))
    happen(control(ROLLBACK, by="Ada", model_hash=first))
    happen(control(DEMOTE, by="Ada"), then=40)
    assert live.pipeline.trust.failover.transitions == 6
    assert len({s["precision"] for s in live.signals}) == 3

    def load(model_hash: int, place: str) -> Loaded:
        return loaded_from(other, chosen)

    for pieces in (1, 7):
        replayed = warm(folder, chosen, load=load)
        replayed.take(records(tape), pieces)
        assert replayed.digest.hexdigest() == live.digest.hexdigest()
        assert [m.transition for m in replayed.pipeline.trust.moves] == [
            m.transition for m in live.pipeline.trust.moves
        ]
    alone = warm(folder, chosen, follow_trust_events=False).take(records(tape))
    assert alone.digest.hexdigest() != live.digest.hexdigest()
    assert {int(s["precision"]) for s in alone.signals} == {0, trust.PRECISION_INT8}
