"""The client library over real sockets, fed by the real publisher."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from engine import trust
from engine.board import line_text, totals_text
from engine.cli import subscribe
from engine.client import CONFLICT_MEMORY, MAX_EPOCHS, SignalClient
from engine.conflicts import Conflicts, Heard, Judged
from engine.messages import Alert, EngineState, Signal, as_json, decode
from engine.publisher import SignalPublisher
from feeds import wire
from feeds.errors import InputError
from tests.engine.signals import EPOCH, encode_alert, encode_signal, encode_state

A, B = b"signal.sim.ALPHA", b"signal.sim.BETA"
STATE, ALERT = b"state.engine", b"alert.sim.ALPHA"
WAIT_S = 10.0
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["tcp", "ipc"])
def publisher(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SignalPublisher]:
    endpoint = "tcp://127.0.0.1:*" if request.param == "tcp" else f"ipc://{tmp_path / 's'}"
    with SignalPublisher(endpoint, [A, B, STATE, ALERT]) as made:
        yield made


def joined(publisher: SignalPublisher, *topics: str, conflicts: Conflicts = "mark") -> SignalClient:
    """A client whose subscriptions the publisher has answered."""
    client = SignalClient(publisher.endpoint, topics or ("signal.",), conflicts=conflicts)
    expected = publisher.joins + len(client.topics)
    while publisher.joins < expected:
        assert publisher._socket.poll(WAIT_S * 1_000), "nobody subscribed"
        publisher.serve_joins()
    return client


def take(client: SignalClient) -> Signal:
    message = client.receive(WAIT_S)
    assert isinstance(message, Signal)
    return message


# One message.


def test_every_field_of_the_wire_arrives() -> None:
    rng = np.random.default_rng(3)
    record = np.frombuffer(
        bytearray(rng.integers(1, 100, wire.SIGNAL_BLOCK, dtype=np.uint8)), wire.SIGNAL_DTYPE
    ).copy()
    record["venue"], record["symbol"], record["backend"] = b"sim", b"ALPHA", b"compiled"
    record["book_state"], record["precision"], record["numerics"] = 2, 2, 1
    record["reasons"] = trust.REASON_GAP | trust.REASON_HALTED | 1 << 15
    fields = {name: record[name][0] for name in wire.SIGNAL_DTYPE.names or ()}
    names = {"venue", "symbol"}
    signal_ = decode(encode_signal(1, **{k: v for k, v in fields.items() if k not in names}))
    assert isinstance(signal_, Signal)
    texts = {"venue": "sim", "symbol": "ALPHA", "backend": "compiled", "book_state": "GAP"}
    texts |= {"precision": "fp32", "numerics": "exact-int8"}
    for name, value in fields.items():
        if name.startswith("padding") or name == "reasons":
            continue
        expected = texts.get(name, bool(value) if name == "warm" else value)
        assert getattr(signal_, name) == expected, name
    assert signal_.reasons == ("GAP", "HALTED", "BIT_15")
    assert not signal_.tradable
    assert signal_.outputs.dtype == np.float32
    assert signal_.outputs.tolist() == [0.25, 0.5, -1.0]


def test_a_suppressed_signal_is_no_number() -> None:
    nan = float("nan")
    suppressed = decode(
        encode_signal(
            1,
            outputs=(nan, nan),
            reasons=trust.REASON_STALE,
            predicted_class=trust.NO_CLASS,
            precision=0,
        )
    )
    assert isinstance(suppressed, Signal)
    assert suppressed.predicted_class is None
    assert suppressed.precision == "none"
    assert np.isnan(suppressed.outputs).all()
    plain = as_json(suppressed)
    assert plain["outputs"] == [None, None]
    assert plain["reasons"] == ("STALE",)
    assert plain["model_hash"] == "0" * 16
    json.dumps(plain, allow_nan=False)


def test_a_longer_block_of_a_newer_schema_is_understood() -> None:
    newer = decode(encode_signal(7, block=wire.SIGNAL_BLOCK + 24))
    assert isinstance(newer, Signal)
    assert newer.signal_seq == 7
    assert newer.outputs.tolist() == [0.25, 0.5, -1.0]


@given(st.data())
def test_no_bytes_can_raise(data: st.DataObject) -> None:
    whole = data.draw(
        st.sampled_from([encode_signal(1), encode_state(1), encode_alert(1, "x"), b""])
    )
    cut = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if cut:
            cut[data.draw(st.integers(0, len(cut) - 1))] = data.draw(st.integers(0, 255))
    message = decode(bytes(cut))
    if message is not None:
        json.dumps(as_json(message), allow_nan=False)


def test_a_message_cut_anywhere_is_none() -> None:
    for whole in (encode_signal(1), encode_state(1), encode_alert(1, "x")):
        assert decode(whole) is not None
        assert not [cut for cut in range(len(whole)) if decode(whole[:cut]) is not None]


# Joining, losing, repeating.


def test_who_joins_gets_the_last_signal_and_then_each_next_one_once(
    publisher: SignalPublisher,
) -> None:
    for seq in (1, 2, 3):
        publisher.publish(A, encode_signal(seq))
    with joined(publisher) as client:
        first = take(client)
        assert (first.signal_seq, first.lost_before) == (3, 0)
        with joined(publisher):  # the last value goes to everybody again
            publisher.publish(A, encode_signal(4))
            assert take(client).signal_seq == 4
        assert client.duplicates == 1
        assert (client.received, client.lost) == (2, 0)


def test_losses_are_counted_for_each_instrument(publisher: SignalPublisher) -> None:
    with joined(publisher) as client:
        for seq in (5, 6, 9, 10, 20):
            publisher.publish(A, encode_signal(seq))
        publisher.publish(B, encode_signal(1, symbol="BETA"))
        publisher.publish(B, encode_signal(2, symbol="BETA"))
        got = [take(client) for _ in range(7)]
    assert [item.lost_before for item in got] == [0, 0, 2, 0, 9, 0, 0]
    assert client.lost == 11
    assert client.losses() == {("sim", "ALPHA"): 11, ("sim", "BETA"): 0}


def test_what_zeromq_drops_is_found(tmp_path: Path) -> None:
    context = zmq.Context()
    with (
        SignalPublisher("inproc://s", [A], send_hwm=8, context=context) as publisher,
        SignalClient("inproc://s", receive_hwm=8, context=context) as client,
    ):
        assert publisher._socket.poll(WAIT_S * 1_000)
        publisher.serve_joins()
        for seq in range(1, 1_001):
            publisher.publish(A, encode_signal(seq))
        received = 0
        while client.receive_now() is not None:
            received += 1
        publisher.serve_joins()  # libzmq looks at the room that came free
        publisher.publish(A, encode_signal(1_001))
        last = take(client)
        assert publisher.drops == 1
        assert last.lost_before == 1_000 - received > 0
        assert client.lost + client.received == 1_001
    context.term()


def test_an_engine_that_restarts_starts_a_new_count(publisher: SignalPublisher) -> None:
    with joined(publisher) as client:
        publisher.publish(A, encode_signal(50))
        publisher.publish(A, encode_signal(1, epoch=EPOCH + 1))
        publisher.publish(A, encode_signal(2, epoch=EPOCH + 1))
        publisher.publish(A, encode_signal(4, epoch=EPOCH + 2))
        got = [take(client) for _ in range(4)]
    assert [item.restarted for item in got] == [False, True, False, True]
    assert [item.lost_before for item in got] == [0, 0, 0, 3]
    assert (client.restarts, client.conflicts, client.lost) == (2, 0, 3)
    assert not any(item.conflict for item in got)


def test_two_engines_on_one_topic_are_noticed(publisher: SignalPublisher) -> None:
    with joined(publisher) as client:
        for seq in (1, 2, 3):
            publisher.publish(A, encode_signal(seq))
            publisher.publish(A, encode_signal(seq, epoch=EPOCH + 1))
        got = [take(client) for _ in range(6)]
        assert [item.conflict for item in got] == [False, False, True, True, True, True]
        assert (client.restarts, client.conflicts, client.lost) == (1, 4, 0)
        for seq in range(4, 5 + CONFLICT_MEMORY):
            publisher.publish(A, encode_signal(seq))
        rest = [take(client) for _ in range(CONFLICT_MEMORY + 1)]
    assert rest[0].conflict
    assert not rest[-1].conflict, "the other engine has been silent for long"
    assert client.lost == 0


def test_many_epochs_are_bounded(publisher: SignalPublisher) -> None:
    with joined(publisher) as client:
        for epoch in range(1, 3 * MAX_EPOCHS):
            publisher.publish(A, encode_signal(1, epoch=epoch))
            take(client)
        assert client.restarts == 3 * MAX_EPOCHS - 2
        assert all(len(item.last) <= MAX_EPOCHS for item in client._sequences.values())


def test_a_conflict_says_what_the_other_engine_is(publisher: SignalPublisher) -> None:
    ours = {"model_hash": 1, "config_hash": 2, "feature_hash": 3, "code_hash": 4}
    theirs = {"model_hash": 0xABC, "config_hash": 2, "feature_hash": 3, "code_hash": 0xDEF}
    with joined(publisher) as client:
        for seq in (1, 2):
            publisher.publish(A, encode_signal(seq, **ours))
            publisher.publish(A, encode_signal(seq, epoch=EPOCH + 1, **theirs))
        got = [take(client) for _ in range(4)]
    assert [item.conflict_why for item in got] == [
        "",
        "",
        "another engine with model 0000000000000abc, code 0000000000000def",
        "another engine with model 0000000000000001, code 0000000000000004",
    ]
    assert "two engines: another engine with model 0000000000000abc" in line_text(got[2])
    assert as_json(got[2])["conflict_why"] == got[2].conflict_why
    same = "another engine with the same model, config, features and code"
    heard = Heard()
    for epoch, seq in ((1, 1), (2, 1), (1, 2)):
        judged = heard.judge(epoch, seq, (1, 2, 3, 4))
    assert judged.why == same


def test_the_second_engine_is_refused_where_that_is_asked_for(publisher: SignalPublisher) -> None:
    with joined(publisher, conflicts="refuse") as client:
        for seq in (1, 2, 3):
            publisher.publish(A, encode_signal(seq, model_hash=1))
            publisher.publish(A, encode_signal(seq, epoch=EPOCH + 1, model_hash=2))
            publisher.publish(B, encode_signal(seq, epoch=EPOCH + 1, symbol="BETA", model_hash=2))
        got = [take(client) for _ in range(6)]
        assert client.receive_now() is None
        ours = [item for item in got if item.symbol == "ALPHA"]
        assert [(item.signal_seq, item.model_hash) for item in ours] == [(1, 1), (2, 1), (3, 1)]
        assert [item.conflict for item in ours] == [False, True, True]
        assert ours[1].conflict_why == "another engine with model 0000000000000002"
        assert not any(item.conflict for item in got if item.symbol == "BETA")
        assert (client.refused, client.conflicts, client.restarts, client.lost) == (3, 2, 0, 0)
        assert client.received == 6
        assert "3 refused of another engine" in totals_text(client)


def test_an_engine_that_was_refused_is_followed_once_the_first_is_silent(
    publisher: SignalPublisher,
) -> None:
    with joined(publisher, conflicts="refuse") as client:
        publisher.publish(A, encode_signal(9, model_hash=1))
        for seq in range(1, CONFLICT_MEMORY + 3):
            publisher.publish(A, encode_signal(seq, epoch=EPOCH + 1, model_hash=2))
        publisher.publish(A, encode_signal(10, model_hash=1))
        got = [take(client) for _ in range(3)]
        assert client.receive_now() is None
    assert [item.signal_seq for item in got] == [9, CONFLICT_MEMORY + 1, CONFLICT_MEMORY + 2]
    assert [item.restarted for item in got] == [False, True, False]
    assert not any(item.conflict or item.lost_before for item in got)
    assert client.refused == CONFLICT_MEMORY + 1, "now it is the first engine that is refused"
    assert (client.restarts, client.lost) == (1, 0)


@pytest.mark.parametrize("conflicts", ["mark", "refuse"])
def test_a_new_version_is_followed_at_once_over_a_new_connection(
    tmp_path: Path, conflicts: Conflicts
) -> None:
    endpoint = f"ipc://{tmp_path / 's'}"
    with SignalPublisher(endpoint, [A]) as old:
        client = joined(old, conflicts=conflicts)
        old.publish(A, encode_signal(50, model_hash=1))
        assert take(client).signal_seq == 50
    hashes = {"model_hash": 2, "config_hash": 3, "code_hash": 4}
    with client, SignalPublisher(endpoint, [A]) as new:
        deadline = time.monotonic() + WAIT_S
        while new.joins == 0:
            assert time.monotonic() < deadline, "nobody connected again"
            assert client.receive_now() is None  # libzmq subscribes again when the client asks
            new._socket.poll(10)
            new.serve_joins()
        for seq in (2, 3):
            new.publish(A, encode_signal(seq, epoch=EPOCH + 1, **hashes))
        got = [take(client) for _ in range(2)]
    assert [(item.restarted, item.lost_before) for item in got] == [(True, 1), (False, 0)]
    assert not any(item.conflict for item in got)
    assert (client.restarts, client.refused, client.conflicts) == (1, 0, 0)


SAME, OTHER = (1, 2, 3, 4), (5, 2, 3, 4)


def refusing(*heard: tuple[int, int], hashes: tuple[int, int, int, int] = SAME) -> list[Judged]:
    """What (epoch, seq) pairs are, over one connection; epoch 1 has the hashes `SAME`."""
    topic = Heard()
    return [
        topic.judge_refusing(epoch, seq, SAME if epoch == 1 else hashes, 0) for epoch, seq in heard
    ]


def test_a_restart_of_the_same_version_is_followed_at_once_until_the_old_one_speaks() -> None:
    pairs = ((1, 1), (2, 1), (2, 2), (1, 2), (2, 3), (1, 3))
    found = refusing(*pairs)
    assert [item.verdict for item in found] == ["taken"] * 4 + ["refused", "taken"]
    assert [item.restarted for item in found] == [False, True, False, False, False, False]
    assert [item.noticed for item in found] == [False] * 3 + [True, False, True]
    assert [item.verdict for item in refusing(*pairs, hashes=OTHER)] == [
        *("taken", "refused", "refused", "taken", "refused", "taken"),
    ]


def test_an_older_engine_that_turns_up_later_is_refused_too() -> None:
    assert [item.verdict for item in refusing((2, 1), (1, 5), (2, 2))] == [
        *("taken", "refused", "taken"),
    ]


@given(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 3)), max_size=200), st.booleans())
def test_nothing_is_taken_twice_and_memory_is_bounded(
    steps: list[tuple[int, int]], same: bool
) -> None:
    topic = Heard()
    seqs: dict[int, int] = {}
    taken: set[tuple[int, int]] = set()
    for epoch, step in steps:
        seqs[epoch] = seqs.get(epoch, 0) + step
        hashes = SAME if same else (epoch, 2, 3, 4)
        judged = topic.judge_refusing(epoch, seqs[epoch], hashes, 0)
        if judged.verdict == "taken":
            assert (epoch, seqs[epoch]) not in taken
            taken.add((epoch, seqs[epoch]))
            assert topic.judge_refusing(epoch, seqs[epoch], hashes, 0).verdict == "duplicate"
        assert len(topic.last) <= MAX_EPOCHS
        assert topic.epoch in topic.last
    if not same and steps:
        assert {epoch for epoch, _ in taken} == {steps[0][0]}, "no other has come to 256 yet"


def test_malformed_messages_are_counted_and_passed_over(publisher: SignalPublisher) -> None:
    with joined(publisher) as client:
        publisher.publish(A, b"")
        publisher.publish(A, b"\xff" * 500)
        publisher.publish(A, encode_signal(1)[:-1])
        publisher._socket.send_multipart([A])
        publisher._socket.send_multipart([A, encode_signal(1), b"third"])
        publisher.publish(A, encode_signal(2))
        assert take(client).signal_seq == 2
        assert client.malformed == 5


def test_states_and_alerts_arrive_too(publisher: SignalPublisher) -> None:
    with joined(publisher, "state.", "alert.") as client:
        publisher.publish(STATE, encode_state(1, messages=12, latency_p99_ns=34, model_hash=255))
        publisher.publish(ALERT, encode_alert(9, "feed is silent", venue=b"sim", symbol=b"ALPHA"))
        publisher.publish(A, encode_signal(1))
        state, alert = client.receive(WAIT_S), client.receive(WAIT_S)
        assert isinstance(state, EngineState)
        assert (state.messages, state.latency_p99_ns, state.model_hash) == (12, 34, 255)
        assert isinstance(alert, Alert)
        assert (alert.severity, alert.symbol, alert.text) == ("warning", "ALPHA", "feed is silent")
        assert client.receive_now() is None
        assert client.lost == 0


# Iterating.


def test_a_plain_iteration(publisher: SignalPublisher) -> None:
    with joined(publisher) as client:
        for seq in range(1, 11):
            publisher.publish(A, encode_signal(seq))
        seen = []
        for item in client:
            assert isinstance(item, Signal)
            seen.append(item.signal_seq)
            if item.signal_seq == 10:
                client.close()
    assert seen == list(range(1, 11))


async def test_an_asynchronous_iteration(publisher: SignalPublisher) -> None:
    with joined(publisher) as client:

        async def publish() -> None:
            for seq in range(1, 201):
                publisher.publish(A, encode_signal(seq))
                await asyncio.sleep(0)

        task = asyncio.create_task(publish())
        seen = []
        async for item in client:
            assert isinstance(item, Signal)
            seen.append(item.signal_seq)
            if item.signal_seq == 200:
                client.close()
        await task
    assert seen == list(range(1, 201))


async def test_a_cancelled_wait_loses_nothing(publisher: SignalPublisher) -> None:
    with joined(publisher) as client:
        waiting = asyncio.create_task(client.receive_async())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        publisher.publish(A, encode_signal(1))
        got = await client.receive_async(WAIT_S)
        assert isinstance(got, Signal)
        assert got.signal_seq == 1
        assert await client.receive_async(0.0) is None


async def test_other_tasks_run_while_messages_pour_in(publisher: SignalPublisher) -> None:
    with joined(publisher) as client:
        for seq in range(1, 1_001):
            publisher.publish(A, encode_signal(seq))
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        other = asyncio.create_task(count())
        for _ in range(1_000):
            assert await client.receive_async(WAIT_S) is not None
        other.cancel()
    assert turns > 5


def test_nothing_there_is_no_error(tmp_path: Path) -> None:
    with SignalClient(f"ipc://{tmp_path / 'nobody'}") as client:
        assert client.receive(0.0) is None
        assert not client.connected


def test_a_client_knows_when_it_is_connected(publisher: SignalPublisher) -> None:
    with joined(publisher) as client:
        assert client._monitor.poll(WAIT_S * 1_000)
        assert client.connected


@pytest.mark.parametrize("endpoint", ["localhost:5557", "tcp://*:5557", "udp://a:1", "tcp://a:0"])
def test_an_endpoint_that_cannot_be_is_refused(endpoint: str) -> None:
    with pytest.raises(InputError, match="endpoint"):
        SignalClient(endpoint)


# The command.


def test_subscribe_prints_one_json_object_a_line(publisher: SignalPublisher) -> None:
    process = subprocess.Popen(
        [sys.executable, "octick.py", "subscribe", publisher.endpoint, "--json", "--count", "3"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    publisher.publish(A, encode_signal(1))
    publisher.publish(B, encode_signal(1, symbol="BETA"))
    while not publisher.serve_joins():
        assert publisher._socket.poll(30_000), "nobody subscribed"
    publisher.publish(A, encode_signal(4))
    out, err = process.communicate(timeout=30)
    lines = [json.loads(line) for line in out.splitlines()]
    assert process.returncode == 0
    assert [(line["symbol"], line["signal_seq"]) for line in lines] == [
        ("ALPHA", 1),
        ("BETA", 1),
        ("ALPHA", 4),
    ]
    assert lines[2]["lost_before"] == 2
    assert lines[0]["type"] == "signal"
    assert lines[0]["tradable"] is True
    assert err.strip()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_subscribe_stops_clean(stop: signal.Signals, tmp_path: Path) -> None:
    with SignalPublisher(f"ipc://{tmp_path / 's'}", [A]) as publisher:
        process = subprocess.Popen(
            [sys.executable, "octick.py", "subscribe", publisher.endpoint],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        publisher.publish(A, encode_signal(1))
        while not publisher.serve_joins():
            assert publisher._socket.poll(30_000), "nobody subscribed"
        assert process.stdout is not None
        assert "ALPHA" in process.stdout.readline()
        process.send_signal(stop)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert out == ""
    assert "Traceback" not in err


def test_subscribe_fails_when_less_came_than_asked_for(tmp_path: Path) -> None:
    arguments = [f"ipc://{tmp_path / 'nobody'}", "--count", "1", "--seconds", "0.01"]
    result = CliRunner().invoke(subscribe, arguments)
    assert result.exit_code == 1
    assert result.stdout == ""


def test_subscribe_can_refuse_a_second_engine(publisher: SignalPublisher) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "octick.py", "subscribe", publisher.endpoint),
            *("--refuse-conflicts", "--json", "--count", "2"),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while publisher.joins == 0:
        assert publisher._socket.poll(30_000), "nobody subscribed"
        publisher.serve_joins()
    publisher.publish(A, encode_signal(1, model_hash=1))
    publisher.publish(A, encode_signal(1, epoch=EPOCH + 1, model_hash=2))
    publisher.publish(A, encode_signal(2, model_hash=1))
    out, err = process.communicate(timeout=30)
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["signal_seq"], line["conflict"]) for line in lines] == [(1, False), (2, True)]
    assert lines[1]["conflict_why"].endswith("model 0000000000000002")
    assert "1 refused of another engine" in err


def test_subscribe_for_a_time_ends_well(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        subscribe, [f"ipc://{tmp_path / 'nobody'}", "--seconds", "0.01", "--json"]
    )
    assert result.exit_code == 0
