"""Injected faults: each does what it says, to its instrument alone, and the same every time."""

from __future__ import annotations

import struct

import pytest

from feeds import codec, wire
from feeds.errors import InputError
from feeds.faults import KINDS, Fault, FaultInjector, parse_fault
from feeds.simulator import Simulator

ALPHA, BETA = b"l2.sim.ALPHA", b"l2.sim.BETA"
STREAM = list(Simulator(9, 2).stream(4_000))
AT = 500


def of(topic: bytes, stream: list[tuple[bytes, bytes]]) -> list[bytes]:
    """Messages of one instrument that take a seq."""
    return [p for t, p in stream if t == topic and codec.template_id(p) != wire.INSTRUMENT]


def numbers(payload: bytes) -> tuple[int, int]:
    epoch, seq = struct.unpack_from("<QQ", payload, wire.AT_EPOCH)
    return epoch, seq


def inject(*faults: Fault, seed: int = 1) -> tuple[list[tuple[bytes, bytes]], FaultInjector]:
    injector = FaultInjector(faults, seed)
    return list(injector.apply(STREAM)), injector


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_touches_no_other_instrument(kind: str) -> None:
    out, injector = inject(Fault(kind, 0.05, symbol="ALPHA"))
    assert injector.counts[kind] > 0
    assert of(BETA, out) == of(BETA, STREAM)
    assert out != STREAM
    assert {done.topic for done in injector.injected} == {ALPHA}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_injects_the_same(kind: str) -> None:
    out, injector = inject(Fault(kind, 0.02))
    again, same = inject(Fault(kind, 0.02))
    assert out == again
    assert injector.injected == same.injected
    assert len(injector.injected) == injector.counts[kind]
    assert inject(Fault(kind, 0.02), seed=2)[0] != out


def test_drop() -> None:
    out, injector = inject(Fault("drop", positions=(AT, AT + 1), symbol="ALPHA"))
    source = of(ALPHA, STREAM)
    assert of(ALPHA, out) == source[:AT] + source[AT + 2 :]
    assert [(x.position, x.seq) for x in injector.injected] == [(AT, AT + 1), (AT + 1, AT + 2)]


def test_duplicate() -> None:
    out, _ = inject(Fault("duplicate", positions=(AT,), symbol="ALPHA"))
    source = of(ALPHA, STREAM)
    assert of(ALPHA, out) == [*source[: AT + 1], source[AT], *source[AT + 1 :]]


def test_reorder() -> None:
    out, _ = inject(Fault("reorder", positions=(AT,), symbol="ALPHA"))
    source = of(ALPHA, STREAM)
    assert of(ALPHA, out) == [*source[:AT], source[AT + 1], source[AT], *source[AT + 2 :]]


def test_reorder_of_the_last_message_loses_nothing() -> None:
    last = len(of(ALPHA, STREAM)) - 1
    out, _ = inject(Fault("reorder", positions=(last,), symbol="ALPHA"))
    assert of(ALPHA, out) == of(ALPHA, STREAM)


def test_reset() -> None:
    out, injector = inject(Fault("reset", positions=(AT,), symbol="ALPHA"))
    source = of(ALPHA, STREAM)
    changed = of(ALPHA, out)
    assert changed[:AT] == source[:AT]
    assert [numbers(p) for p in changed[AT:]] == [(2, n + 1) for n in range(len(source) - AT)]
    assert [p[:16] + p[32:] for p in changed] == [p[:16] + p[32:] for p in source]
    assert injector.numbers(ALPHA, 1, len(source)) == (2, len(source) - AT)
    assert injector.numbers(BETA, 1, 7) == (1, 7)


def test_stall_is_silence_and_then_everything() -> None:
    injector = FaultInjector([Fault("stall", positions=(AT,), symbol="ALPHA", length=50)])
    source = of(ALPHA, STREAM)
    out = []
    for n, payload in enumerate(source):
        got = injector.push(ALPHA, payload)
        assert injector.stalled(ALPHA) == (AT <= n < AT + 49)
        assert len(got) == (0 if AT <= n < AT + 49 else 50 if n == AT + 49 else 1)
        out += [p for _, p in got]
    assert out == source


def test_stall_at_the_end_is_flushed() -> None:
    last = len(of(ALPHA, STREAM)) - 3
    out, _ = inject(Fault("stall", positions=(last,), symbol="ALPHA"))
    assert of(ALPHA, out) == of(ALPHA, STREAM)


def test_cross_lasts_one_delta_and_the_final_book_is_right() -> None:
    def replayed(payloads: list[bytes]) -> tuple[list[dict[int, int]], int]:
        sides: list[dict[int, int]] = [{}, {}]
        crossed = 0
        for payload in payloads:
            if codec.template_id(payload) == wire.TRADE:
                continue
            for side, levels in zip(sides, codec.decode_levels(payload), strict=True):
                for price, quantity in levels.tolist():
                    side[price] = quantity
                    if quantity == 0:
                        del side[price]
            crossed += max(sides[0]) >= min(sides[1])
        return sides, crossed

    out, injector = inject(Fault("cross", 0.02, symbol="ALPHA"))
    changed = of(ALPHA, out)
    assert [numbers(p) for p in changed] == [numbers(p) for p in of(ALPHA, STREAM)]
    reference, none = replayed(of(ALPHA, STREAM))
    final, crossed = replayed(changed)
    assert none == 0
    assert crossed == injector.counts["cross"] > 5
    assert final == reference


def test_parse() -> None:
    assert parse_fault("drop:0.001") == Fault("drop", 0.001)
    assert parse_fault("cross:0.5:BETA") == Fault("cross", 0.5, symbol="BETA")
    assert parse_fault("reset:@5,9:ALPHA") == Fault("reset", positions=(5, 9), symbol="ALPHA")


@pytest.mark.parametrize(
    "text", ["", "drop", "drop:", "drop:2", "drop:nan", "lose:0.1", "drop:@-1"]
)
def test_what_is_no_fault_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="KIND:RATE"):
        parse_fault(text)
