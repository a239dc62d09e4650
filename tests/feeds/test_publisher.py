"""The publisher: what subscribers get, and the book that late joiners are given."""

from __future__ import annotations

import json
import random
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import zmq
from click.testing import CliRunner, Result

from feeds import codec, outgoing, wire
from feeds.cli import publish
from feeds.errors import InputError
from feeds.faults import Fault
from feeds.publisher import MAX_SPEED, Publisher
from feeds.simulator import Simulator
from feeds.snapshots import BookFold
from feeds.tape import MARKET, InstrumentMeta, TapeMeta
from feeds.tape_writer import TapeWriter

RECEIVE_TIMEOUT_MS = 20_000
QUIET_MS = 200
Book = tuple[dict[int, int], dict[int, int]]
ALPHA = b"l2.sim.ALPHA"


def numbers(payload: bytes) -> tuple[int, int]:
    epoch, seq = struct.unpack_from("<QQ", payload, wire.AT_EPOCH)
    return epoch, seq


def takes_seq(payload: bytes) -> bool:
    return codec.template_id(payload) in (wire.SNAPSHOT, wire.DELTA, wire.TRADE)


def apply(book: Book, payload: bytes) -> None:
    """The naive book of these tests: two dicts."""
    if codec.template_id(payload) not in (wire.SNAPSHOT, wire.DELTA):
        return
    for side, levels in zip(book, codec.decode_levels(payload), strict=True):
        if codec.template_id(payload) == wire.SNAPSHOT:
            side.clear()
        for price, quantity in levels.tolist():
            side[price] = quantity
            if quantity == 0:
                del side[price]


def as_book(payload: bytes) -> Book:
    bids, asks = codec.decode_levels(payload)
    assert bids["price_ticks"].tolist() == sorted(bids["price_ticks"].tolist(), reverse=True)
    assert asks["price_ticks"].tolist() == sorted(asks["price_ticks"].tolist())
    return dict(bids.tolist()), dict(asks.tolist())


@contextmanager
def sockets() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context = zmq.Context()
    try:
        yield context
    finally:
        context.destroy(linger=0)


def connect(context: zmq.Context[zmq.Socket[bytes]], kind: int, to: str) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.setsockopt(zmq.RCVTIMEO, RECEIVE_TIMEOUT_MS)
    if kind == zmq.SUB:
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
    socket.connect(to)
    return socket


def published(publisher: Publisher) -> list[tuple[bytes, bytes]]:
    """Run the publisher in a thread and collect everything that it sends."""

    def work() -> None:
        publisher.wait_subscribers(1)
        publisher.run()

    got: list[tuple[bytes, bytes]] = []
    with sockets() as context:
        subscriber = connect(context, zmq.SUB, publisher.endpoint)
        thread = threading.Thread(target=work)
        thread.start()
        try:
            # `run` ends when everything has left, so what is missing then is on its way.
            while thread.is_alive() or subscriber.poll(QUIET_MS):
                while subscriber.poll(QUIET_MS):
                    topic, payload = subscriber.recv_multipart()
                    got.append((topic, payload))
        finally:
            publisher.stop()
            thread.join()
    return got


def free(tmp_path: Path, **arguments: object) -> dict[str, object]:
    return {
        "bind_to": f"ipc://{tmp_path}/feed",
        "snapshots": f"ipc://{tmp_path}/snapshots",
        "speed": MAX_SPEED,
        **arguments,
    }


def test_subscribers_get_the_source_with_a_fresh_epoch(tmp_path: Path) -> None:
    publisher = Publisher(Simulator(4, 2), messages=3_000, **free(tmp_path, epoch=77))  # type: ignore[arg-type]
    got = published(publisher)
    for symbol in ("ALPHA", "BETA"):
        topic = codec.topic("l2", "sim", symbol)
        own = [p for t, p in got if t == topic]
        assert codec.template_id(own[0]) == wire.INSTRUMENT
        assert {numbers(p)[0] for p in own} == {77}
        sent = [p for p in own if takes_seq(p)]
        source = [p for t, p in Simulator(4, 2).stream(3_000) if t == topic and takes_seq(p)]
        assert codec.template_id(sent[0]) == wire.SNAPSHOT
        assert [p[:16] + p[24:] for p in sent] == [p[:16] + p[24:] for p in source]
        assert numbers(own[-1]) == (77, len(source)), "the last heartbeat shows a loss at the end"
    assert publisher.totals.messages == len(got)
    assert publisher.totals.bytes == sum(len(p) for _, p in got)


def test_a_tape_is_published_like_the_simulator(tmp_path: Path) -> None:
    Simulator(4, 2).write_tape(tmp_path / "sim.tape", messages=3_000)
    publisher = Publisher(tmp_path / "sim.tape", **free(tmp_path, keep_epoch=True))  # type: ignore[arg-type]
    got = [x for x in published(publisher) if takes_seq(x[1])]
    assert got == [x for x in Simulator(4, 2).stream(3_000) if takes_seq(x[1])]


def test_a_loop_goes_on_without_a_hole(tmp_path: Path) -> None:
    Simulator(4, 2).write_tape(tmp_path / "sim.tape", messages=1_000)
    publisher = Publisher(
        tmp_path / "sim.tape",
        messages=3_500,
        **free(tmp_path, loop=True),  # type: ignore[arg-type]
    )
    got = [p for t, p in published(publisher) if t == ALPHA and takes_seq(p)]
    assert publisher.totals.loops == 3
    assert [numbers(p)[1] for p in got] == list(range(1, len(got) + 1))
    times = [struct.unpack_from("<q", p, wire.AT_EXCHANGE_TIME)[0] for p in got]
    assert times == sorted(times)
    assert sum(codec.template_id(p) == wire.SNAPSHOT for p in got) == 4


def test_seconds_are_those_of_the_source(tmp_path: Path) -> None:
    Simulator(4, 1).write_tape(tmp_path / "sim.tape", seconds=4)
    publisher = Publisher(tmp_path / "sim.tape", seconds=2, **free(tmp_path))  # type: ignore[arg-type]
    got = [x for x in published(publisher) if takes_seq(x[1])]
    assert len(got) == sum(takes_seq(p) for _, p in Simulator(4, 1).stream(seconds=2))


def test_scaled_speed_sends_the_same(tmp_path: Path) -> None:
    arguments = free(tmp_path, speed=40.0, precise=True, keep_epoch=True)
    publisher = Publisher(Simulator(4, 2), messages=2_000, **arguments)  # type: ignore[arg-type]
    got = [x for x in published(publisher) if takes_seq(x[1])]
    source = list(Simulator(4, 2).stream(2_000))
    assert got == [x for x in source if takes_seq(x[1])]
    span_s = (
        struct.unpack_from("<q", source[-1][1], wire.AT_EXCHANGE_TIME)[0]
        - struct.unpack_from("<q", source[0][1], wire.AT_EXCHANGE_TIME)[0]
    ) / 1e9
    assert publisher.totals.seconds >= span_s / 40.0, "nothing is sent before it is due"


def test_faults_are_injected_and_counted(tmp_path: Path) -> None:
    faults = [Fault("drop", positions=(10, 20), symbol="ALPHA")]
    publisher = Publisher(
        Simulator(4, 2),
        messages=3_000,
        **free(tmp_path, faults=faults),  # type: ignore[arg-type]
    )
    seqs = [numbers(p)[1] for t, p in published(publisher) if t == ALPHA and takes_seq(p)]
    assert sorted(set(range(1, max(seqs) + 1)) - set(seqs)) == [11, 21]
    assert publisher.totals.faults == {"drop": 2}


def request(
    dealer: zmq.Socket[bytes], venue: str, symbol: str, answers: int = 2
) -> list[list[bytes]]:
    dealer.send(codec.encode_snapshot_request(venue, symbol))
    return [dealer.recv_multipart() for _ in range(answers)]


def test_a_late_joiner_gets_the_book_as_of_the_seq_it_carries(tmp_path: Path) -> None:
    """Requests while the stream runs; every answer is compared with a naive book at its seq."""
    arguments = free(tmp_path, speed=2.0, lossless=True)
    publisher = Publisher(Simulator(4, 2), **arguments)  # type: ignore[arg-type]
    thread = threading.Thread(target=lambda: (publisher.wait_subscribers(1), publisher.run()))
    books: dict[int, Book] = {}
    book: Book = ({}, {})
    with sockets() as context:
        subscriber = connect(context, zmq.SUB, publisher.endpoint)
        dealer = connect(context, zmq.DEALER, publisher.snapshot_endpoint)
        thread.start()
        answers = []
        try:
            while len(books) < 200:
                topic, payload = subscriber.recv_multipart()
                if topic == ALPHA and takes_seq(payload):
                    apply(book, payload)
                    books[numbers(payload)[1]] = (dict(book[0]), dict(book[1]))
                    if len(books) % 40 == 0:
                        answers.append(request(dealer, "sim", "ALPHA"))
            (rejected,) = request(dealer, "sim", "OMEGA", 1)
            last = max(numbers(answer[1][1])[1] for answer in answers)
            while max(books) < last:
                topic, payload = subscriber.recv_multipart()
                if topic == ALPHA and takes_seq(payload):
                    apply(book, payload)
                    books[numbers(payload)[1]] = (dict(book[0]), dict(book[1]))
        finally:
            publisher.stop()
            thread.join()
    assert len(answers) == 5
    for (topic, instrument), (same, snapshot) in answers:
        assert topic == same == ALPHA
        assert codec.template_id(instrument) == wire.INSTRUMENT
        assert numbers(instrument) == numbers(snapshot)
        for answer in (instrument, snapshot):
            (flags,) = struct.unpack_from("<q", answer, wire.AT_FLAGS)
            assert flags == wire.FLAG_ANSWER
        assert as_book(snapshot) == books[numbers(snapshot)[1]]
    assert codec.template_id(rejected[1]) == wire.REJECT
    assert b"sim.ALPHA, sim.BETA" in rejected[1]
    assert publisher.totals.snapshots_served == 5
    assert publisher.totals.snapshots_rejected == 1


def test_a_taken_endpoint_is_refused(tmp_path: Path) -> None:
    for endpoint in ("tcp://127.0.0.1:*", f"ipc://{tmp_path}/taken"):
        holder = Publisher(Simulator(1, 1), endpoint, None)
        with pytest.raises(InputError, match="taken") as caught:
            Publisher(Simulator(1, 1), holder.endpoint, None)
        assert caught.value.where == holder.endpoint
        assert "--bind" in str(caught.value)
        with pytest.raises(InputError, match="--snapshots"):
            Publisher(Simulator(1, 1), "tcp://127.0.0.1:*", holder.endpoint)
        holder.close()
    with pytest.raises(InputError, match="cannot be bound"):
        Publisher(Simulator(1, 1), "nonsense", None)


def test_a_damaged_tape_is_sent_up_to_the_damage(tmp_path: Path) -> None:
    path = tmp_path / "sim.tape"
    Simulator(4, 1).write_tape(path, messages=2_000)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    publisher = Publisher(path, **free(tmp_path))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="damaged record"):
        publisher.run()
    assert 900 < publisher.totals.messages < 1_100


class Recorded:
    """A stream of one instrument with losses, restarts and answers of a snapshot service."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.epoch, self.seq, self.first = 5, self.random.randrange(100), True
        self.book: Book = ({}, {})
        self.known = False
        self.history: list[tuple[int, Book]] = []

    def next(self) -> bytes | None:
        """One message that reached the recorder, or None for one that was lost."""
        rng = self.random
        dice = rng.random()
        if dice < 0.01:
            self.epoch, self.seq, self.known = self.epoch + 3, 0, False
            self.book = ({}, {})
            self.history.clear()
        if not self.known and self.history and rng.random() < 0.2:
            # An answer of the snapshot service, as of some messages ago.
            seq, book = rng.choice(self.history[-4:])
            self.known = True
            return self._message(wire.SNAPSHOT, seq, book)
        self.seq += 1
        if dice > 0.97:
            payload = self._message(wire.SNAPSHOT, self.seq, self.book)
            self.known = True
        else:
            changes: Book = ({}, {})
            for side in changes:
                for _ in range(rng.randrange(3)):
                    side[rng.randrange(1, 30)] = rng.choice([0, 1, 2, 3])
            payload = self._message(wire.DELTA, self.seq, changes)
            for side, change in zip(self.book, changes, strict=True):
                side.update(change)
                for price in [p for p, q in side.items() if q == 0]:
                    del side[price]
        self.history.append((self.seq, (dict(self.book[0]), dict(self.book[1]))))
        if 0.02 < dice < 0.03:
            self.known = False
            self.history.clear()
            return None
        return payload

    def _message(self, template: int, seq: int, book: Book) -> bytes:
        return codec.encode_book(
            template, 9, 4, self.epoch, seq, 0, 0, book[0].items(), book[1].items()
        )


@pytest.mark.parametrize("seed", range(8))
def test_the_fold_equals_a_naive_book(seed: int, tmp_path: Path) -> None:
    """Whatever was lost, restarted or answered out of band, the fold is right or says unknown."""
    stream = Recorded(seed)
    fold = BookFold(1)
    state = np.zeros((1, outgoing.NUMBERS), dtype=np.int64)
    state[:, outgoing.FIRST_EPOCH] = -1
    keys = np.array([[9, 4]], dtype=np.int64)
    compared = known = 0
    waiting_gap = False
    for _ in range(1_000):
        payload = stream.next()
        if payload is None:
            waiting_gap = True
            continue
        path = tmp_path / "one.tape"
        meta = TapeMeta(1, "test", [InstrumentMeta("v", "s", 9, 4, "1", "1")])
        with TapeWriter(path, meta, overwrite=True, window_bytes=1 << 16) as tape:
            at = tape.position
            tape.append(MARKET, 1, payload)
            buf, stop = tape.arena[at : tape.position].copy(), tape.position - at
        places = np.zeros((outgoing.most_places(stop), outgoing.PLACE_COLUMNS), dtype=np.int64)
        changes = np.zeros((outgoing.most_changes(stop), outgoing.CHANGE_COLUMNS), dtype=np.int64)
        count, rows, refused = outgoing.index_records(buf, 0, stop, keys, state, 0, places, changes)
        assert refused == 0
        if count:
            assert numbers(buf[24:].tobytes())[0] == places[0, outgoing.OUT_EPOCH]
        if stream.random.random() < 0.5:
            book = fold.book(0, changes[:rows])
            fold.absorb(changes[:rows])
        else:
            fold.absorb(changes[:rows])
            book = fold.book(0, changes[:0])
        if stream.random.random() < 0.1:
            fold.fold()
        if codec.template_id(payload) == wire.SNAPSHOT:
            waiting_gap = False
        compared += 1
        if stream.known and not waiting_gap:
            known += 1
            assert book.known
            assert (dict(book.bids), dict(book.asks)) == stream.book
        elif waiting_gap:
            assert not book.known
    assert 300 < known < compared


def invoke(*arguments: str) -> Result:
    # In a terminal the front door turns an InputError into one line and exit code 2.
    return CliRunner().invoke(publish, arguments, catch_exceptions=True)


def test_command_prints_one_object() -> None:
    result = invoke(
        *("sim", "--bind", "tcp://127.0.0.1:*", "--snapshots", "tcp://127.0.0.1:*"),
        *("--messages", "2000", "--speed", "max", "--fault", "drop:0.1:ALPHA", "--json"),
    )
    assert result.exit_code == 0, result.output
    totals = json.loads(result.stdout)
    assert 1_800 < totals["messages"] < 2_000
    assert totals["faults"]["drop"] > 10
    assert totals["snapshots_served"] == 0
    assert {"bytes", "seconds", "rate", "endpoint", "snapshots"} <= totals.keys()


@pytest.mark.parametrize(
    "arguments",
    [("sim", "--speed", "fast"), ("sim", "--speed", "-1"), ("sim", "--loop"), ()],
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    assert invoke(*arguments).exit_code == 2


def test_wrong_input_says_what_to_do(tmp_path: Path) -> None:
    result = invoke(str(tmp_path / "no.tape"))
    assert isinstance(result.exception, InputError)
    assert str(tmp_path / "no.tape") in str(result.exception)
