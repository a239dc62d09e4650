"""The sender of ``octick bench latency``: each message once, in order, when it is due."""

from __future__ import annotations

import json
import signal as os_signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import zmq

from benchmarks.wire_sender import Sender, load_market, send_due
from feeds import codec, outgoing, tape, wire
from feeds.departures import Departures
from feeds.errors import InputError
from feeds.simulator import Simulator
from feeds.tape import InstrumentMeta, TapeMeta
from feeds.tape_reader import TapeReader
from feeds.tape_writer import TapeWriter
from tests.conftest import ROOT

RECEIVE_TIMEOUT_MS = 20_000
HOUR_NS = 3_600_000_000_000
WIRE = wire.PREFIX_DTYPE
META = TapeMeta(1, "test", [InstrumentMeta("sim", "ALPHA", 9, 4, "1", "1")])


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("market") / "market.tape"
    Simulator(seed=6, n_instruments=1).write_tape(path, 400)
    return path


def written(path: Path, payloads: list[bytes]) -> Path:
    with TapeWriter(path, META) as writer:
        for n, payload in enumerate(payloads):
            writer.append(tape.MARKET, 1_000 + n, payload)
    return path


def restarted(path: Path) -> Path:
    """A tape whose feed began a new epoch on it, with heartbeats at both ends."""
    bids, asks = [(99, 10)], [(101, 10)]
    return written(
        path,
        [
            codec.encode_heartbeat(9, 4, 5, 0, 10, 10),
            codec.encode_book(wire.SNAPSHOT, 9, 4, 5, 1, 11, 11, bids, asks),
            codec.encode_book(wire.DELTA, 9, 4, 5, 2, 12, 12, [(98, 3)], []),
            codec.encode_book(wire.SNAPSHOT, 9, 4, 7, 1, 13, 13, [(90, 1)], asks),
            codec.encode_trade(9, 4, 7, 2, 14, 14, 101, 1, 1, wire.AGGRESSOR_BUY),
            codec.encode_book(wire.DELTA, 9, 4, 7, 3, 15, 15, [], [(101, 7)]),
            codec.encode_heartbeat(9, 4, 7, 3, 16, 16),
        ],
    )


@contextmanager
def heard(source: Path, folder: Path) -> Iterator[tuple[Sender, zmq.Socket[bytes]]]:
    """A sender, and a subscriber that it has reached."""
    with zmq.Context() as context, context.socket(zmq.PUB) as pub, context.socket(zmq.SUB) as sub:
        for socket in (pub, sub):
            socket.set_hwm(0)
            socket.linger = 0
        pub.bind(f"ipc://{folder}/feed")
        sub.setsockopt(zmq.SUBSCRIBE, b"l2.")
        sub.connect(f"ipc://{folder}/feed")
        sender = Sender(load_market(str(source)), pub)
        while not sub.poll(5):
            sender.define()
        sub.setsockopt(zmq.RCVTIMEO, RECEIVE_TIMEOUT_MS)
        yield sender, sub


def taken(sub: zmq.Socket[bytes], n: int) -> list[bytes]:
    """The next messages that are about the market."""
    found: list[bytes] = []
    while len(found) < n:
        topic, message = sub.recv_multipart()
        assert topic == b"l2.sim.ALPHA"
        if codec.template_id(message) != wire.INSTRUMENT:
            found.append(message)
    return found


def sent_at(messages: list[bytes]) -> np.ndarray:
    return np.array([fields(message)["source_time_ns"] for message in messages], dtype=np.int64)


def fields(message: bytes) -> np.void:
    return np.frombuffer(message, dtype=WIRE, count=1, offset=wire.HEADER_BYTES)[0]


def expected(source: Path, n: int) -> tuple[list[bytes], list[list[tuple[int, int]]]]:
    """What a publisher of the tape in a loop sends, and its book behind the last of it."""
    departures = Departures(TapeReader(source), loop=True)
    found: list[bytes] = []
    for batch in departures.batches():
        for k, place in enumerate(batch.places):
            at, length = place[outgoing.OFFSET], place[outgoing.LENGTH]
            message = bytes(batch.view[at : at + length])
            if codec.template_id(message) in (wire.INSTRUMENT, wire.HEARTBEAT):
                continue
            found.append(message)
            departures.sent = k + 1
            if len(found) == n:
                book = departures.book(0)
                return found, [book.bids, book.asks]
        departures.sent = len(batch.places)
    raise AssertionError("a loop does not end")


def but_for_clocks(messages: list[bytes]) -> list[bytes]:
    """The messages without when they were sent, and with epochs from the first one's on."""
    first = int(fields(messages[0])["epoch"])
    made = []
    for message in messages:
        whole = bytearray(message)
        prefix = np.frombuffer(whole, dtype=WIRE, count=1, offset=wire.HEADER_BYTES)
        prefix["source_time_ns"] = 0
        prefix["epoch"] -= first
        made.append(bytes(whole))
    return made


@pytest.mark.parametrize("restart", [False, True])
def test_pass_after_pass_it_sends_what_a_publisher_would(
    restart: bool, market: Path, tmp_path: Path
) -> None:
    source = restarted(tmp_path / "restarted.tape") if restart else market
    one_pass = len(load_market(str(source)).places)
    with heard(source, tmp_path) as (sender, sub):
        total = 0
        for n in (one_pass // 2, one_pass // 2 + 2 * one_pass, one_pass, 1):
            sender.send(np.zeros(n, dtype=np.int64), stamp_due=True)
            total += n
            messages, sides = expected(source, total)
            assert sender.sides() == sides
        assert but_for_clocks(taken(sub, total)) == but_for_clocks(messages)


def test_each_message_says_when_it_should_have_left(market: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    gaps = rng.choice(np.array([0, 1_000, 12_000, 40_000, 90_000, 700_000]), 200)
    schedule = np.cumsum(gaps) + 1_000_000
    with heard(market, tmp_path) as (sender, sub):
        asked = time.monotonic_ns()
        late = sender.send(schedule, stamp_due=True)
        ended = time.monotonic_ns()
        due = sent_at(taken(sub, len(schedule)))
    assert np.diff(due).tolist() == gaps[1:].tolist()
    assert due[0] >= asked + schedule[0]
    assert late.min() > 0, "none leaves before it is due"
    assert (due + late).max() <= ended
    assert np.all(np.diff(due + late) > 0)


def test_or_when_it_did_leave(market: Path, tmp_path: Path) -> None:
    schedule = np.arange(20, dtype=np.int64) // 5 * 1_000_000
    with heard(market, tmp_path) as (sender, sub):
        asked = time.monotonic_ns()
        sender.send(schedule, stamp_due=False)
        ended = time.monotonic_ns()
        left = sent_at(taken(sub, len(schedule)))
    assert np.all(np.diff(left) > 0), "also of those that are due in the same instant"
    assert np.all(left >= asked + schedule)
    assert left[-1] <= ended


def test_what_is_overdue_counts_as_late(market: Path, tmp_path: Path) -> None:
    overdue_ns = 30_000_000
    with heard(market, tmp_path) as (sender, sub):
        late = sender.send(np.full(50, -overdue_ns, dtype=np.int64), stamp_due=True)
        due = sent_at(taken(sub, 50))
    assert len(set(due.tolist())) == 1
    assert late.min() > overdue_ns
    assert np.all(np.diff(late) > 0), "each leaves behind the one before it"


def test_a_long_wait_gives_python_its_turn(market: Path, tmp_path: Path) -> None:
    with heard(market, tmp_path) as (sender, _):
        due = np.array([0, time.monotonic_ns() + HOUR_NS], dtype=np.int64)
        arrays = (sender._state, sender._messages, sender._market.places, sender._topic)
        assert send_due(*arrays, due, np.zeros(2, dtype=np.int64), 0, True) == 1


def test_a_tape_that_cannot_be_sent_is_one_line(tmp_path: Path) -> None:
    quiet = written(tmp_path / "quiet.tape", [codec.encode_heartbeat(9, 4, 5, 0, 10, 10)])
    with pytest.raises(InputError, match="without market messages"):
        load_market(str(quiet))
    Simulator(seed=6, n_instruments=2).write_tape(tmp_path / "two.tape", 100)
    with pytest.raises(InputError, match="several instruments"):
        load_market(str(tmp_path / "two.tape"))


def test_ctrl_c_ends_it_in_the_middle_of_a_schedule(market: Path, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/feed"
    np.save(tmp_path / "schedule.npy", np.array([0, HOUR_NS], dtype=np.int64))
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.wire_ends", "send", str(market), endpoint],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        assert json.loads(child.stdout.readline()) == {"ready": True}
        with zmq.Context() as context, context.socket(zmq.SUB) as sub:
            sub.setsockopt(zmq.RCVTIMEO, RECEIVE_TIMEOUT_MS)
            sub.setsockopt(zmq.SUBSCRIBE, b"l2.")
            sub.connect(endpoint)
            sub.recv_multipart()
            command = {"to": 0, "schedule": str(tmp_path / "schedule.npy"), "stamp_due": True}
            child.stdin.write(json.dumps(command) + "\n")
            child.stdin.flush()
            taken(sub, 1)
        child.send_signal(os_signal.SIGINT)
        assert child.wait(20) == 0
    finally:
        child.kill()
        child.communicate()
