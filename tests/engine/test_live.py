"""From the feeds' sockets to the publisher's: what a kernel does by itself, and what it leaves."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from engine import latency, live, shadow_ring
from engine.answering import handle_of
from engine.backends.registry import open_backend
from engine.bundle import load_bundle
from engine.config import Config, LimitsConfig, OverloadConfig, default_config
from engine.failover import FailoverConfig
from engine.live_link import LiveLink
from engine.model_input import BOUND
from engine.pipeline import Pipeline
from engine.recorder import ScratchTape
from engine.signals import AT_SIGNAL_SEQ
from engine.trust import MODE_FP32, MODE_HALTED
from engine.trust_events import ShadowAnswer, answer_templates
from feeds import codec, tape, wire
from feeds.simulator import Simulator
from feeds.tape_reader import TapeReader
from tests.engine import onnx_sessions

REFERENCE = Path(__file__).resolve().parents[2] / "models" / "reference"
LIMITS = msgspec.structs.replace(LimitsConfig(), max_message_bytes=1 << 16)
NEVER = OverloadConfig(conflate_after_ns=0)
USUAL = FailoverConfig()


@dataclass
class Line:
    """A publisher of market data, a link, and a subscriber to its signals, in this process."""

    link: LiveLink
    pipeline: Pipeline
    recorder: ScratchTape
    feed: zmq.Socket[bytes]
    signals: zmq.Socket[bytes]
    topic: bytes
    definition: bytes
    messages: list[bytes]
    config: Config

    def send(self, messages: list[bytes]) -> None:
        for message in messages:
            self.feed.send_multipart([self.topic, message])

    def take(self) -> list[int]:
        """Take what waits, as the daemon does; why the kernel came back each time."""
        whys = []
        while True:
            self.link.begin(time.monotonic_ns(), LIMITS)
            whys.append(self.link.take(self.recorder, None))
            if whys[-1] == live.NOTHING_WAITS:
                return whys

    def received(self) -> list[bytes]:
        found = []
        while True:
            try:
                found.append(self.signals.recv_multipart(zmq.NOBLOCK)[1])
            except zmq.Again:
                return found


def _market(tmp_path: Path, messages: int) -> tuple[bytes, bytes, list[bytes], tuple[str, str]]:
    path = tmp_path / "market.tape"
    Simulator(seed=4, n_instruments=1).write_tape(path, messages)
    reader = TapeReader(path)
    meta = reader.meta.instruments[0]
    payloads = [bytes(one.payload) for one in reader.records() if one.kind == tape.MARKET]
    definition = codec.encode_instrument(
        *(meta.source_id, meta.instrument_id, 1, 0, meta.venue, meta.symbol),
        *(Decimal(meta.tick), Decimal(meta.lot)),
    )
    name = (meta.venue, meta.symbol)
    return codec.topic("l2", *name), definition, payloads, name


@pytest.fixture
def lines(tmp_path: Path) -> Iterator[Any]:
    opened: list[Any] = []

    def make(
        *,
        backend: str = "compiled",
        overload: OverloadConfig = NEVER,
        failover: FailoverConfig = USUAL,
        messages: int = 3_000,
    ) -> Line:
        topic, definition, payloads, name = _market(tmp_path, messages)
        bundle = load_bundle(REFERENCE)
        config = msgspec.structs.replace(default_config([name]), failover=failover)
        pipeline = Pipeline(config, bundle, open_backend(backend, bundle))
        context: zmq.Context[Any] = zmq.Context()
        feed, sub = context.socket(zmq.PUB), context.socket(zmq.SUB)
        out, signals = context.socket(zmq.XPUB), context.socket(zmq.SUB)
        for bound, connected, where in (
            (feed, sub, "inproc://feed"),
            (out, signals, "inproc://out"),
        ):
            bound.set_hwm(0)
            connected.set_hwm(0)
            bound.bind(where)
            connected.setsockopt(zmq.SUBSCRIBE, b"")
            connected.connect(where)
        out.recv()  # the subscription
        opened.extend((pipeline, context))
        link = LiveLink(
            pipeline,
            [sub],
            out,
            [codec.topic("signal", *name)],
            LIMITS,
            overload,
            room=1 << 18,
            now_ns=time.monotonic_ns(),
            offset_ns=time.time_ns() - time.monotonic_ns(),
        )
        line = Line(
            link, pipeline, ScratchTape(1 << 24), feed, signals, topic, definition, payloads, config
        )
        line.send([definition])
        assert line.take() == [live.NOTHING_WAITS]
        return line

    yield make
    for one in opened:
        if isinstance(one, Pipeline):
            one.close()
        else:
            one.destroy(linger=0)


def _bound(pipeline: Pipeline) -> None:
    """Let every input that moves at all be out of range."""
    pipeline.arrays[handle_of("norm")][BOUND] = 0.0


def _as_replayed(line: Line, *, bound: bool = False) -> list[bytes]:
    """The signals of the same messages, answered by Python over a tape of them."""
    bundle = load_bundle(REFERENCE)
    pipeline = Pipeline(line.config, bundle, open_backend("onnx", bundle))
    if bound:
        _bound(pipeline)
    records = ScratchTape(1 << 24)
    found = []
    for message in [line.definition, *line.messages]:
        at = records.append(tape.MARKET, 0, message)
        pipeline.advance(records.arena, at, records.position)
        if pipeline.fired:
            found.append(bytes(pipeline.answer()))
    pipeline.close()
    return found


def _canonical(signals: list[bytes]) -> list[bytes]:
    end = wire.HEADER_BYTES + wire.SIGNAL_CANONICAL_BLOCK
    outputs = wire.HEADER_BYTES + wire.SIGNAL_BLOCK
    return [one[:end] + one[outputs:] for one in signals]


def test_a_signal_has_the_bytes_that_a_replay_gives(lines: Any) -> None:
    line = lines()
    line.send(line.messages)
    sent = []
    while True:
        line.link.begin(time.monotonic_ns(), LIMITS)
        why = line.link.take(line.recorder, None)
        sent += line.received()
        if why == live.SIGNAL_DUE:
            sent.append(bytes(line.pipeline.served))
        if why == live.NOTHING_WAITS:
            break
    replayed = _as_replayed(line)
    assert len(replayed) > 500
    assert _canonical(sent) == _canonical(replayed)
    counters = line.pipeline.counters
    assert counters["signals"] == len(sent)
    assert counters["tradable"] == line.pipeline.tradable > 400
    suppressed = sum(line.pipeline.suppressed.values())
    assert suppressed >= len(sent) - line.pipeline.tradable


def test_the_last_signal_sent_is_kept_and_counted(lines: Any) -> None:
    line = lines()
    line.send(line.messages)
    line.take()
    received = line.received()
    assert received[-1] == line.link.last[0].tobytes()
    assert line.link.sent[0] == len(received)
    assert line.link.latencies[latency.AT_COUNT] == len(received)
    assert line.link.latencies[latency.AT_MIN] > 0


def test_messages_and_signals_stand_on_the_tape_in_the_order_in_which_they_were_taken(
    lines: Any,
) -> None:
    line = lines()
    begin = line.recorder.position
    line.send(line.messages[:1_500])
    line.take()
    kinds, seqs, at = [], [], begin
    arena = line.recorder.arena
    position, records, status = tape.scan(arena, begin, line.recorder.position)
    assert (position, status) == (line.recorder.position, tape.SCAN_CLEAN)
    while at < position:
        length = int.from_bytes(arena[at + 4 : at + 8].tobytes(), "little")
        kind = int.from_bytes(arena[at + 16 : at + 18].tobytes(), "little")
        body = at + tape.RECORD_HEADER_BYTES
        kinds.append(kind)
        if kind == tape.SIGNAL:
            seqs.append(
                int.from_bytes(
                    arena[body + AT_SIGNAL_SEQ : body + AT_SIGNAL_SEQ + 8].tobytes(), "little"
                )
            )
        at = body + int(tape.padded(length))
    assert records == len(kinds)
    assert kinds.count(tape.MARKET) == 1_500
    assert kinds.count(tape.SIGNAL) == line.link.sent[0] > 0
    assert seqs == sorted(seqs)
    assert kinds[0] == tape.MARKET


def test_a_model_that_no_kernel_can_run_is_answered_by_the_pipeline(
    lines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx_sessions.use("python", monkeypatch)
    line = lines(backend="onnx")
    line.send(line.messages)
    answers = 0
    while True:
        line.link.begin(time.monotonic_ns(), LIMITS)
        why = line.link.take(line.recorder, None)
        if why == live.NOTHING_WAITS:
            break
        if why == live.SIGNAL_DUE:
            assert line.pipeline.fired
            line.pipeline.answer()
            answers += 1
    assert answers == len(_as_replayed(line))
    assert line.link.sent[0] == 0


@pytest.mark.parametrize("frames", [[b"l2.x"], [b"l2.x", b"a", b"b"], [b"l2.x", b"b" * (1 << 17)]])
def test_what_is_no_message_is_dropped_and_counted(lines: Any, frames: list[bytes]) -> None:
    line = lines()
    line.feed.send_multipart(frames)
    line.send(line.messages[:100])
    line.take()
    assert line.link.malformed == 1
    assert line.pipeline.counters["messages"] == 101  # the definition, and all behind it


def test_a_turn_ends_at_its_budget(lines: Any) -> None:
    line = lines()
    line.send(line.messages[:300])
    limits = msgspec.structs.replace(LIMITS, max_drain_messages=100)
    line.link.begin(time.monotonic_ns(), limits)
    whys = []
    while True:
        whys.append(line.link.take(line.recorder, None))
        if whys[-1] == live.TURN_ENDED:
            break
    assert line.pipeline.counters["messages"] == 101


def test_a_full_window_of_the_tape_is_told_before_anything_is_received(lines: Any) -> None:
    line = lines()
    line.send(line.messages[:10])
    line.link.begin(time.monotonic_ns(), LIMITS)
    short = ScratchTape(1 << 18)
    short.room = lambda need: (short.arena, 100)  # type: ignore[method-assign]
    assert line.link.take(short, None) == live.WINDOW_FULL
    assert line.pipeline.counters["messages"] == 1


@pytest.mark.parametrize("rule", [0, 5], ids=["no rule", "a rule"])
def test_an_input_that_is_out_of_range_is_python_s_only_where_a_rule_counts_it(
    lines: Any, rule: int
) -> None:
    line = lines(
        failover=FailoverConfig(input_violations=rule, input_violations_in=100), messages=600
    )
    _bound(line.pipeline)
    line.send(line.messages)
    whys, signals = [live.TURN_ENDED], []
    while whys[-1] != live.NOTHING_WAITS:
        line.link.begin(time.monotonic_ns(), LIMITS)
        whys.append(line.link.take(line.recorder, None))
        signals += line.received()
        if whys[-1] == live.SIGNAL_DUE:
            signals.append(bytes(line.pipeline.served))
    pipeline = line.pipeline
    assert len(signals) == pipeline.signals > 50
    assert pipeline.suppressed["VALUE_CHECK"] > 50
    assert pipeline.tradable == 0
    assert (pipeline.trust.failover.mode == MODE_HALTED) == (rule > 0)
    assert (pipeline.suppressed["HALTED"] > 0) == (rule > 0)
    # A book that is not whole is Python's in any case.
    assert (whys.count(live.SIGNAL_DUE) > 50) == (rule > 0)
    assert _canonical(signals) == _canonical(_as_replayed(line, bound=True))


WAITS = pytest.mark.parametrize("spin_ns", [0, 100_000], ids=["asleep", "looking"])


@WAITS
def test_waiting_takes_what_comes_and_goes_on_behind_it(lines: Any, spin_ns: int) -> None:
    line = lines()
    take_ns, sleep_ns = 300_000_000, 50_000_000

    def send() -> None:
        for message in line.messages[:3]:
            time.sleep(sleep_ns / 1e9)
            line.send([message])

    sender = threading.Thread(target=send)
    begun = time.monotonic_ns()
    line.link.begin(begun, LIMITS, spin_ns=spin_ns, wait_ns=take_ns)
    sender.start()
    assert line.link.take(line.recorder, None) == live.NOTHING_WAITS
    sender.join()
    assert time.monotonic_ns() - begun >= take_ns
    assert line.pipeline.counters["messages"] == 4  # the definition among them


@WAITS
def test_waiting_ends_where_the_loop_has_something_to_do(lines: Any, spin_ns: int) -> None:
    line = lines()
    end, other = os.pipe()
    line.link.wake_for(end)
    try:
        line.link.begin(time.monotonic_ns(), LIMITS, spin_ns=spin_ns, wait_ns=60_000_000_000)
        os.write(other, b"x")
        assert line.link.take(line.recorder, None) == live.NOTHING_WAITS
    finally:
        os.close(end)
        os.close(other)


class Shadowed:
    """A line whose shadow is played by the test."""

    def __init__(self, line: Line) -> None:
        self.line = line
        keeper = line.pipeline.trust
        outputs = keeper.recent.outputs.shape[1]
        self.area, self._fd = shadow_ring.ShadowRing.make(64, line.pipeline.x.shape[1], outputs)
        self.handles = shadow_ring.no_handles()
        self._arrays = (
            np.array([1, 1, 0, 0], dtype=np.int64),
            np.zeros(1, dtype=np.int64),
            self.area,
            answer_templates(line.pipeline.names, outputs),
        )
        shadow_ring.set_handles(self.handles, *self._arrays)

    def take(self, wait_ns: int = 0, *, look: bool = True) -> int:
        """Why it came back."""
        now = time.monotonic_ns()
        look_ns = now if look else live.NEVER_NS
        self.line.link.begin(now, LIMITS, wait_ns=wait_ns, look_ns=look_ns)
        return self.line.link.take(self.line.recorder, self.handles)

    def say(self, ticket: int, flags: int, payload: bytes) -> None:
        row = np.array([ticket, 0, 17, flags], dtype=np.int64)
        area, data = self.area, np.frombuffer(payload, dtype=np.uint8).copy()
        assert shadow_ring.push_answer(area.header, area.answers, area.payloads, row, data)

    def answer(self, ticket: int, *, off: float = 0.0) -> bytes:
        """Answer one inference; returns the event that it should become."""
        row = self.line.pipeline.trust.recent.find(ticket)
        assert row is not None
        fp32 = row.outputs + np.float32(off)
        self.say(ticket, 0, np.concatenate((fp32, row.outputs)).tobytes())
        name = self.line.pipeline.names[0]
        return ShadowAnswer(ticket, 17, *name, 0, fp32, row.outputs).encode()

    @property
    def waiting(self) -> int:
        header = self.area.header
        return int(header[shadow_ring.ANSWER_HEAD] - header[shadow_ring.ANSWER_TAIL])

    def recorded(self) -> list[tuple[int, bytes]]:
        """Kind and payload of what is on the tape."""
        recorder, found, at = self.line.recorder, [], 0
        arena, stop = recorder.arena, recorder.position
        position, n, status = tape.scan(arena, 0, stop)
        assert (position, status) == (stop, tape.SCAN_CLEAN)
        for _ in range(n):
            length = int.from_bytes(bytes(arena[at + 4 : at + 8]), "little")
            body = at + tape.RECORD_HEADER_BYTES
            found.append((int(arena[at + 16]), bytes(arena[body : body + length])))
            at = body + int(tape.padded(length))
        return found

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def shadowed(lines: Any) -> Iterator[Shadowed]:
    line = lines()
    line.send(line.messages)
    line.take()
    line.recorder.advance(0)
    line.recorder.arena[:] = 0
    line.pipeline.trust.failover.shadow_up()
    one = Shadowed(line)
    yield one
    one.close()


def test_answers_that_agree_are_taken_onto_the_tape_without_python(shadowed: Shadowed) -> None:
    line = shadowed.line
    last = line.pipeline.ticket
    events = [shadowed.answer(ticket) for ticket in range(last - 9, last + 1)]
    before = line.pipeline.trust.shadow_answers
    assert shadowed.take() == live.NOTHING_WAITS
    assert shadowed.waiting == 0
    assert line.pipeline.trust.shadow_answers == before + 10
    assert [record for kind, record in shadowed.recorded() if kind == tape.SHADOW] == events


def test_an_answer_that_may_move_something_is_python_s(shadowed: Shadowed) -> None:
    keeper = shadowed.line.pipeline.trust
    last = shadowed.line.pipeline.ticket
    shadowed.answer(last)
    for n in range(8):
        shadowed.answer(last - n, off=10.0)
    shadowed.answer(last)
    whys = [shadowed.take() for _ in range(9)]
    assert whys == [live.EVENT_TAKEN] * 8 + [live.EVENT_TAKEN]  # FP32 answers: the last as well
    assert keeper.failover.mode == MODE_FP32
    assert keeper.shadow_answers == 10
    assert shadowed.take() == live.NOTHING_WAITS


def test_messages_come_before_answers(shadowed: Shadowed) -> None:
    line = shadowed.line
    for n in range(3):
        shadowed.answer(line.pipeline.ticket - n)
    line.send([line.definition] * 200)
    time.sleep(0.05)
    assert shadowed.take() == live.NOTHING_WAITS
    kinds = [kind for kind, _ in shadowed.recorded()]
    assert kinds == [tape.MARKET] * 200 + [tape.SHADOW] * 3


def test_what_is_no_answer_ends_a_call_behind_a_message(shadowed: Shadowed) -> None:
    line, briefly_ns = shadowed.line, 20_000_000

    def took(wait_ns: int, *, look: bool = True) -> int:
        begun = time.monotonic_ns()
        assert shadowed.take(wait_ns, look=look) == live.NOTHING_WAITS
        return time.monotonic_ns() - begun

    shadowed.say(0, shadow_ring.ALERT, b"drift")
    assert took(briefly_ns) >= briefly_ns, "it waits, and no message came"
    line.send(line.messages[:1])
    time.sleep(0.02)
    assert took(briefly_ns, look=False) >= briefly_ns, "not yet time to look"
    line.send(line.messages[1:2])
    time.sleep(0.02)
    assert took(60_000_000_000) < 30_000_000_000
    assert shadowed.waiting == 1


def _sent_now(message: bytes) -> bytes:
    at, now = wire.AT_SOURCE_TIME, time.time_ns().to_bytes(8, "little")
    return message[:at] + now + message[at + 8 :]


def test_who_is_behind_conflates_until_nothing_waits(lines: Any) -> None:
    line = lines(overload=OverloadConfig(conflate_after_ns=1_000_000))
    line.send([_sent_now(message) for message in line.messages[:50]])
    line.take()
    line.send([_sent_now(message) for message in line.messages[50:100]])
    time.sleep(0.02)
    line.link.begin(time.monotonic_ns(), LIMITS)
    whys = [line.link.take(line.recorder, None)]
    while whys[-1] == live.SIGNAL_DUE:
        whys.append(line.link.take(line.recorder, None))
    assert whys[-1] == live.BEHIND
    assert line.link.lag_ns > 1_000_000
    line.link.conflating = True
    while whys[-1] != live.CAUGHT_UP:
        whys.append(line.link.take(line.recorder, None))
    assert line.link.lag_ns == 0
    assert line.link.longest_lag_ns > 1_000_000
    assert line.pipeline.counters["messages"] == 101
    line.link.forget_lag()
    assert line.link.longest_lag_ns == 0


def test_nothing_is_allocated_for_a_message(lines: Any) -> None:
    """100,000 messages in steady state: no block and no byte more than before."""
    line = lines(messages=210_000)
    warm, counted, traced = (
        line.messages[start:stop]
        for start, stop in ((0, 10_000), (10_000, 110_000), (110_000, 210_000))
    )

    def pass_on(messages: list[bytes]) -> None:
        for start in range(0, len(messages), 500):
            line.send(messages[start : start + 500])
            why = live.TURN_ENDED
            while why != live.NOTHING_WAITS:
                line.link.begin(time.monotonic_ns(), LIMITS)
                why = line.link.take(line.recorder, None)
            try:
                while True:
                    line.signals.recv(zmq.NOBLOCK)
            except zmq.Again:
                pass

    pass_on(warm)
    gc.collect()
    before = sys.getallocatedblocks()
    pass_on(counted)
    gc.collect()
    grown = sys.getallocatedblocks() - before
    tracemalloc.start()
    pass_on(traced[:1_000])
    first = tracemalloc.take_snapshot()
    pass_on(traced[1_000:])
    last = tracemalloc.take_snapshot()
    tracemalloc.stop()
    own = [tracemalloc.Filter(True, "*/engine/*"), tracemalloc.Filter(True, "*/feeds/*")]
    changed = last.filter_traces(own).compare_to(first.filter_traces(own), "filename")
    assert line.pipeline.counters["messages"] == 210_001
    assert line.link.sent[0] > 10_000
    assert grown <= 4  # of 100,000 messages: numbers that the pipeline counts with
    assert sum(max(0, one.count_diff) for one in changed) <= 4
