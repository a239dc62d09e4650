"""`octick replay`: one digest whatever is varied, and recorded signals that come out again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from engine.backends.registry import open_backend
from engine.bundle import load_bundle
from engine.config import config_hash, default_config, semantic
from engine.digest import Digest
from engine.pipeline import Pipeline
from feeds import codec, tape, wire
from feeds.errors import InputError
from feeds.simulator import Simulator
from feeds.tape import TapeMeta
from feeds.tape_reader import TapeReader
from feeds.tape_seal import seal_tape
from feeds.tape_writer import TapeWriter
from replay import cli
from replay.session import Report, choose_config, replay_tapes
from replay.verify import recorded_signals

ROOT = Path(__file__).resolve().parents[2]
MESSAGES = 6_000


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated market of two instruments."""
    path = tmp_path_factory.mktemp("market") / "market.tape"
    Simulator(seed=5, n_instruments=2).write_tape(path, MESSAGES)
    return path


@pytest.fixture(scope="module")
def recorded(market: Path, reference_bundle: Path, tmp_path_factory) -> Path:
    """The market as a session recorded it, signals behind the events that made them.

    Like the daemon it advances one record at a time, over a tape with a config in its header.
    """
    path = tmp_path_factory.mktemp("recorded") / "session.tape"
    source = TapeReader(market)
    config = default_config([(item.venue, item.symbol) for item in source.meta.instruments])
    bundle = load_bundle(reference_bundle)
    backend = open_backend("onnx", bundle, "cpu", threads=1, precision="int8")
    pipeline = Pipeline(config, bundle, backend, engine_epoch=77)
    meta = TapeMeta(
        created_ns=source.meta.created_ns,
        source="test session",
        instruments=source.meta.instruments,
        engine_epoch=77,
        config=semantic(config),
    )
    with TapeWriter(path, meta) as writer:
        for i, record in enumerate(source.records()):
            bodies = [(record.kind, bytes(record.payload))]
            if i % 500 == 499:
                bodies.append((tape.TIMER, codec.encode_timer(record.recv_ns)))
            for kind, body in bodies:
                arena, at = writer.room(len(body) + 64)
                start = at + tape.RECORD_HEADER_BYTES
                arena[start : start + len(body)] = memoryview(body)
                stop = tape.put_record(arena, at, kind, record.recv_ns, len(body))
                writer.advance(stop)
                signals = []
                while at < stop:
                    at = pipeline.advance(arena, at, stop)
                    if pipeline.fired:
                        signals.append(bytes(pipeline.answer(lambda: 123)))
                del arena
                for message in signals:
                    writer.append(tape.SIGNAL, record.recv_ns, message)
    backend.close()
    return path


def answers(report: Report) -> tuple[Any, ...]:
    """What must be the same on every machine."""
    return (
        report.digest,
        report.messages,
        report.signals,
        report.tradable,
        report.book_levels,
        report.suppressed,
        report.counters,
        report.config_hash,
        report.model_hash,
    )


def call(*arguments: object) -> tuple[int, Any]:
    result = CliRunner().invoke(cli.replay, [*map(str, arguments), "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, json.loads(result.stdout) if result.exit_code in (0, 1) else None


def test_json_has_the_promised_keys(market: Path, reference_bundle: Path) -> None:
    code, found = call(market, "--model", reference_bundle)
    assert code == 0
    assert {"messages", "signals", "tradable", "messages_per_s", "digest"} <= set(found)
    assert {"book_levels", "gaps", "lost", "suppressed", "seconds"} <= set(found)
    assert found["messages"] == MESSAGES
    assert 0 < found["tradable"] < found["signals"]
    assert found["suppressed"]["WARMING_UP"] > 0
    assert (found["gaps"], found["lost"], found["rejected"]) == (0, 0, 0)
    assert all(len(found[f"{name}_hash"]) == 16 for name in ("model", "config", "feature"))
    assert len(found["digest"]) == 64


def test_threads_pace_and_sealing_change_nothing(market, reference_bundle, tmp_path) -> None:
    expected = answers(replay_tapes([market], model=reference_bundle))
    assert answers(replay_tapes([market], model=reference_bundle, threads=2)) == expected
    assert answers(replay_tapes([market], model=reference_bundle, speed=1e6)) == expected
    sealed = tmp_path / "market.tape.zst"
    seal_tape(market, sealed, keep=True)
    assert answers(replay_tapes([sealed], model=reference_bundle)) == expected


def test_fresh_processes_give_one_digest(market: Path, reference_bundle: Path) -> None:
    digests = set()
    for seed, cpu in (("0", None), ("1", "generic")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        if cpu is not None:
            environment["NUMBA_CPU_NAME"] = cpu
        done = subprocess.run(
            [
                sys.executable,
                "octick.py",
                "replay",
                str(market),
                "--model",
                str(reference_bundle),
                "--json",
            ],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(json.loads(done.stdout)["digest"])
    assert len(digests) == 1


def test_the_order_of_tapes_and_instruments_changes_nothing(tmp_path, reference_bundle) -> None:
    paths = []
    for seed in (1, 2):
        whole = tmp_path / f"whole{seed}.tape"
        Simulator(seed=seed, n_instruments=2).write_tape(whole, 2_000)
        paths.append(_only(whole, seed - 1, tmp_path / f"{seed}.tape"))
    one = replay_tapes(paths, model=reference_bundle)
    other = replay_tapes(paths[::-1], model=reference_bundle)
    assert answers(one) == answers(other)
    assert one.signals > 0
    names = [
        (item.venue, item.symbol) for path in paths for item in TapeReader(path).meta.instruments
    ]
    config = tmp_path / "c.toml"
    digests = set()
    for order in (names, names[::-1]):
        config.write_text(
            "".join(f'[[instrument]]\nvenue = "{v}"\nsymbol = "{s}"\n' for v, s in order)
        )
        digests.add(replay_tapes(paths, model=reference_bundle, config=config).digest)
    assert digests == {one.digest}


def _only(source: Path, index: int, target: Path) -> Path:
    """The part of a tape that is about one of its instruments."""
    reader = TapeReader(source)
    item = reader.meta.instruments[index]
    meta = TapeMeta(reader.meta.created_ns, reader.meta.source, [item])
    with TapeWriter(target, meta) as writer:
        for record in reader.records():
            ids = int.from_bytes(bytes(record.payload[12:16]), "little")
            if ids == item.instrument_id:
                writer.append(record.kind, record.recv_ns, record.payload)
    return target


def test_instruments_replayed_together_give_the_signals_they_give_alone(
    market: Path, reference_bundle: Path, tmp_path: Path
) -> None:
    """One instrument touches no other: together is the merge of alone."""
    names = [item.symbol for item in TapeReader(market).meta.instruments]
    config = default_config(
        [(item.venue, item.symbol) for item in TapeReader(market).meta.instruments]
    )
    replay_tapes([market], model=reference_bundle, config=config, out=tmp_path / "all.parquet")
    whole = pq.read_table(tmp_path / "all.parquet").to_pylist()
    for index, symbol in enumerate(names):
        alone = _only(market, index, tmp_path / f"{index}.tape")
        out = tmp_path / f"{index}.parquet"
        replay_tapes([alone], model=reference_bundle, config=config, out=out)
        expected = [str(row) for row in whole if row["symbol"] == symbol]
        assert [str(row) for row in pq.read_table(out).to_pylist()] == expected
        assert expected


# Verify.


def test_a_recorded_session_verifies(recorded: Path, reference_bundle: Path) -> None:
    code, found = call(recorded, "--model", reference_bundle, "--verify")
    verification = found["verification"]
    assert code == 0
    assert verification["ok"]
    assert verification["differing"] == 0
    assert verification["recorded"] == verification["replayed"] == found["signals"] > 0
    assert verification["recorded_digest"] == found["digest"]
    digest = Digest()
    for message in recorded_signals(recorded):
        digest.update(message)
    assert digest.hexdigest() == found["digest"]
    assert 0 < found["tradable"] < found["signals"]


def _altered(source: Path, target: Path, index: int, change) -> Path:
    """A copy of a session whose signal ``index`` went through ``change``; None drops it."""
    reader, seen = TapeReader(source), 0
    with TapeWriter(target, reader.meta) as writer:
        for record in reader.records():
            payload: bytes | None = bytes(record.payload)
            if record.kind == tape.SIGNAL:
                if seen == index:
                    payload = change(bytearray(record.payload))
                seen += 1
            if payload is not None:
                writer.append(record.kind, record.recv_ns, bytes(payload))
    return target


def _set_byte(at: int, value: int):
    def change(message: bytearray) -> bytearray:
        message[at] = value
        return message

    return change


@pytest.mark.parametrize("index", [0, 100])
def test_verify_names_the_first_difference(recorded, reference_bundle, tmp_path, index) -> None:
    at = wire.HEADER_BYTES + wire.SIGNAL_DTYPE.fields["book_state"][1]
    path = _altered(recorded, tmp_path / "a.tape", index, _set_byte(at, 4))
    messages = [bytes(message) for message in recorded_signals(recorded)]
    block = codec.decode_block(messages[index], wire.SIGNAL_DTYPE)
    code, found = call(path, "--model", reference_bundle, "--verify")
    first = found["verification"]["first_difference"]
    assert code == 1
    assert found["verification"]["differing"] == 1
    assert (first["index"], first["symbol"]) == (index, block["symbol"].decode())
    assert first["signal_seq"] == block["signal_seq"]
    assert first["fields"] == [
        {"field": "book_state", "recorded": 4, "replayed": int(block["book_state"])}
    ]


def test_verify_looks_at_the_outputs_and_not_at_the_clock(
    recorded, reference_bundle, tmp_path
) -> None:
    at = wire.HEADER_BYTES + wire.SIGNAL_BLOCK + wire.GROUP_HEADER_BYTES
    path = _altered(recorded, tmp_path / "a.tape", 3, _set_byte(at, 1))
    code, found = call(path, "--model", reference_bundle, "--verify")
    assert code == 1
    at = wire.HEADER_BYTES + wire.SIGNAL_DTYPE.fields["emitted_ns"][1]
    path = _altered(recorded, tmp_path / "b.tape", 3, _set_byte(at, 1))
    code, found = call(path, "--model", reference_bundle, "--verify")
    assert (code, found["verification"]["differing"]) == (0, 0)


def test_verify_misses_no_signal(recorded, market, reference_bundle, tmp_path) -> None:
    signals = sum(1 for _ in recorded_signals(recorded))
    dropped = _altered(recorded, tmp_path / "a.tape", signals - 1, lambda _: None)
    code, found = call(dropped, "--model", reference_bundle, "--verify")
    assert code == 1
    assert found["verification"]["recorded"] == signals - 1
    assert found["verification"]["replayed"] == signals
    assert found["verification"]["first_difference"]["index"] == signals - 1
    reader = TapeReader(recorded)
    with TapeWriter(tmp_path / "b.tape", reader.meta) as writer:
        last = b""
        for record in reader.records():
            if record.kind == tape.SIGNAL:
                last = bytes(record.payload)
            writer.append(record.kind, record.recv_ns, record.payload)
        writer.append(tape.SIGNAL, 0, last)
    code, found = call(tmp_path / "b.tape", "--model", reference_bundle, "--verify")
    assert (code, found["verification"]["differing"]) == (1, 1)
    code, found = call(market, "--model", reference_bundle, "--verify")
    assert code == 1
    assert not found["verification"]["ok"]
    assert found["verification"]["recorded"] == 0


def test_a_session_that_was_killed_verifies_up_to_its_last_record(
    recorded, reference_bundle, tmp_path
) -> None:
    data = recorded.read_bytes()
    offsets = [record.offset for record in TapeReader(recorded).records()]
    cut = tmp_path / "cut.tape"
    for offset in offsets[-12:]:
        cut.write_bytes(data[: offset + 11])
        with pytest.raises(InputError, match="cut short"):
            replay_tapes([cut], model=reference_bundle, verify=True)
        report = replay_tapes([cut], model=reference_bundle, verify=True, allow_truncated=True)
        assert report.truncated
        assert report.verification is not None
        assert report.verification.ok


def test_tables_are_printed_for_people(recorded, reference_bundle, tmp_path) -> None:
    at = wire.HEADER_BYTES + wire.SIGNAL_DTYPE.fields["book_state"][1]
    bad = _altered(recorded, tmp_path / "a.tape", 1, _set_byte(at, 4))
    for path, code in ((recorded, 0), (bad, 1)):
        result = CliRunner().invoke(
            cli.replay, [str(path), "--model", str(reference_bundle), "--verify"]
        )
        assert result.exit_code == code
        assert result.stdout


# Config, input, output.


def test_the_recorded_config_is_used_unless_one_is_named(recorded, market, tmp_path) -> None:
    meta = TapeReader(recorded).meta
    assert semantic(choose_config([meta], None)) == meta.config
    default = choose_config([TapeReader(market).meta], None)
    assert config_hash(default) == config_hash(choose_config([meta], None))
    first = meta.instruments[0]
    config = tmp_path / "c.toml"
    config.write_text(
        f'[[instrument]]\nvenue = "{first.venue}"\nsymbol = "{first.symbol}"\n'
        '[trigger]\nkind = "events"\nevery_events = 10\n'
    )
    report = replay_tapes([recorded], config=config, inference=False)
    assert report.config_hash != f"{config_hash(default):016x}"
    assert 0 < report.unknown_instrument < report.messages
    with pytest.raises(InputError, match="different configs"):
        choose_config([meta, TapeReader(market).meta], None)
    with pytest.raises(InputError, match="names no instrument"):
        choose_config([TapeMeta(0, "test", [])], None)


def test_without_inference_the_books_are_the_same(market, reference_bundle) -> None:
    with_model = replay_tapes([market], model=reference_bundle)
    without = replay_tapes([market], inference=False)
    assert without.book_levels == with_model.book_levels
    assert without.signals == with_model.signals
    assert without.digest != with_model.digest
    with pytest.raises(InputError, match="no model"):
        replay_tapes([market])


def test_signals_are_written_as_parquet(recorded, reference_bundle, tmp_path) -> None:
    out = tmp_path / "s.parquet"
    code, found = call(recorded, "--model", reference_bundle, "--out", out)
    assert code == 0
    table = pq.read_table(out)
    assert table.num_rows == found["signals"]
    assert sum(table["tradable"].to_pylist()) == found["tradable"]
    seqs = [
        int(codec.decode_block(bytes(message), wire.SIGNAL_DTYPE)["last_seq"])
        for message in recorded_signals(recorded)
    ]
    assert table["last_seq"].to_pylist() == seqs
    metadata = pq.read_schema(out).metadata
    assert metadata[b"octick.model_hash"].decode() == found["model_hash"]
    with pytest.raises(InputError, match="exists"):
        replay_tapes([recorded], model=reference_bundle, out=out)


def test_damage_ends_the_replay_and_keeps_what_was_written(
    market, reference_bundle, tmp_path
) -> None:
    offsets = [record.offset for record in TapeReader(market).records()]
    data = bytearray(market.read_bytes())
    data[offsets[-10] + 40] ^= 1
    broken, out = tmp_path / "broken.tape", tmp_path / "s.parquet"
    broken.write_bytes(data)
    with pytest.raises(InputError, match=f"byte {offsets[-10]}"):
        replay_tapes([broken], model=reference_bundle, out=out)
    assert pq.read_metadata(out).num_rows > 0


def test_wrong_usage_ends_with_2(market: Path) -> None:
    for arguments in (
        [market, market, "--verify"],
        [market, "--verify", "--no-inference"],
        [market, "--speed", "fast"],
        [market, "--speed", "0"],
        [],
    ):
        assert CliRunner().invoke(cli.replay, [*map(str, arguments)]).exit_code == 2


def test_ctrl_c_closes_the_output(market, reference_bundle, tmp_path) -> None:
    """Replayed at a hundredth of its pace, the tape would take minutes."""
    out = tmp_path / "s.parquet"
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; sys.argv[0] = 'octick'; import octick; octick.main()",
            "replay",
            str(market),
            "--model",
            str(reference_bundle),
            "--speed",
            "0.01",
            "--out",
            str(out),
            "--json",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    while not out.exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    found = json.loads(stdout)
    assert found["interrupted"]
    assert found["messages"] < MESSAGES
    assert pq.read_metadata(out).num_rows == found["signals"]


_MEMORY = """
import sys
import psutil
from replay.session import replay_tapes

process, seen = psutil.Process(), []
def watch(size):
    def tick(done):
        seen.append((done / size, process.memory_info().rss))
    return tick
replay_tapes([sys.argv[1]], model=sys.argv[2], watch=watch, out=sys.argv[3])
early = max(rss for share, rss in seen if share <= 0.4)
print(early, max(rss for _, rss in seen))
"""


def test_memory_stays_flat(reference_bundle: Path, tmp_path: Path) -> None:
    """From 40 % of a tape on, nothing grows: not with the messages, not with the signals."""
    path = tmp_path / "long.tape"
    Simulator(seed=3, n_instruments=1).write_tape(path, 300_000)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            _MEMORY,
            str(path),
            str(reference_bundle),
            str(tmp_path / "o.parquet"),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    early, late = map(int, done.stdout.split())
    assert late - early < 24 << 20
