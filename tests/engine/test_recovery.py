"""Faults of one instrument: it recovers to the reference book, and no other one notices."""

from __future__ import annotations

import struct

import pytest

from engine.config import default_config
from feeds import codec, wire
from feeds.faults import Fault, FaultInjector, Message
from feeds.simulator import SYMBOLS, VENUE, Simulator
from tests.engine.records import Run

FAULTED, OTHER = SYMBOLS[0], SYMBOLS[1]
MESSAGES = 4_000
ANSWER_EVERY = 7  # messages between a request and its answer, so that deltas are held meanwhile


def new_run() -> Run:
    return Run(default_config([(VENUE, FAULTED), (VENUE, OTHER)]))


class Market:
    """A stream, its undisturbed reference, and a snapshot service that knows what was sent."""

    def __init__(self, faults: tuple[Fault, ...], seed: int) -> None:
        self.simulator = Simulator(seed=seed, n_instruments=2, levels=32)
        self.injector = FaultInjector(faults, seed=seed)
        self.reference, self.torn = new_run(), new_run()
        self.last: dict[bytes, tuple[int, int]] = {}

    def send(self, topic: bytes, payload: bytes) -> None:
        self.reference.send(payload)
        epoch, seq = struct.unpack_from("<QQ", payload, wire.AT_EPOCH)
        self.last[topic] = (epoch, seq)
        self.deliver(self.injector.push(topic, payload))

    def deliver(self, messages: list[Message]) -> None:
        for _, message in messages:
            self.torn.send(message)

    def answer(self) -> None:
        """Serve the snapshots that are wanted, as of the last message that was sent."""
        for slot in self.torn.pipeline.wanted_snapshots():
            venue, symbol = self.torn.pipeline.names[slot]
            topic = codec.topic("l2", venue, symbol)
            if topic not in self.last or self.injector.stalled(topic):
                continue
            epoch, seq = self.injector.numbers(topic, *self.last[topic])
            sides = [
                [(price, quantity) for price, quantity in levels.tolist()]
                for levels in (self.reference.pipeline.book(slot, side) for side in range(2))
            ]
            instrument = self.simulator.instruments[SYMBOLS.index(symbol)].instrument_id
            self.torn.send(
                codec.encode_book(
                    wire.SNAPSHOT, 1, instrument, epoch, seq, 1, 1, *sides, wire.FLAG_ANSWER
                )
            )

    def finish(self) -> None:
        """What a publisher does at the end: everything out, a heartbeat, and the service."""
        self.deliver(self.injector.flush())
        for topic, numbers in self.last.items():
            epoch, seq = self.injector.numbers(topic, *numbers)
            instrument = 0 if topic.endswith(FAULTED.encode()) else 1
            self.torn.send(codec.encode_heartbeat(1, instrument, epoch, seq, 1, 1))
        self.answer()


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    "faults",
    [
        (Fault("drop", 0.01, symbol=FAULTED),),
        (Fault("drop", positions=(MESSAGES // 3,), symbol=FAULTED),),
        (Fault("drop", positions=tuple(range(500, 560)), symbol=FAULTED),),
        (Fault("duplicate", 0.02, symbol=FAULTED),),
        (Fault("reorder", 0.02, symbol=FAULTED),),
        (Fault("reset", 0.002, symbol=FAULTED),),
        (Fault("stall", 0.001, symbol=FAULTED, length=50),),
        (
            Fault("drop", 0.01, symbol=FAULTED),
            Fault("duplicate", 0.01, symbol=FAULTED),
            Fault("reorder", 0.01, symbol=FAULTED),
            Fault("reset", 0.001, symbol=FAULTED),
        ),
    ],
    ids=["drop", "drop one", "drop sixty", "duplicate", "reorder", "reset", "stall", "all"],
)
def test_the_book_ends_as_the_reference_and_the_other_never_notices(
    faults: tuple[Fault, ...], seed: int
) -> None:
    market = Market(faults, seed)
    for n, (topic, payload) in enumerate(market.simulator.stream(messages=MESSAGES)):
        market.send(topic, payload)
        if n > ANSWER_EVERY and n % ANSWER_EVERY == 0:  # the stream itself brings the first books
            market.answer()
    market.finish()
    assert market.injector.injected, "a test without a fault proves nothing"
    assert market.torn.pipeline.synced() == 2
    for symbol in (FAULTED, OTHER):
        slot = market.torn.pipeline.names.index((VENUE, symbol))
        for side in range(2):
            ours = market.torn.pipeline.book(slot, side).tolist()
            assert ours == market.reference.pipeline.book(slot, side).tolist(), symbol
    assert market.torn.canonical[OTHER] == market.reference.canonical[OTHER]
    counters = market.torn.pipeline.counters
    kinds = {fault.kind for fault in faults}
    if kinds == {"drop"}:
        assert counters["lost"] == market.injector.counts["drop"]
        assert counters["duplicates"] == 0
    if kinds == {"duplicate"}:
        assert counters["gaps"] == counters["lost"] == 0
        assert counters["duplicates"] == market.injector.counts["duplicate"]
        assert market.torn.canonical[FAULTED] == market.reference.canonical[FAULTED]
    if kinds == {"reorder"}:
        assert counters["lost"] == 0
    if kinds == {"reset"}:
        assert counters["resets"] == market.injector.counts["reset"]
