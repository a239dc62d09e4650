"""`octick why`: from a signal's id to all that led to it, out of the tape alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from engine import trust
from engine.backends.registry import open_backend
from engine.bundle import load_bundle
from engine.config import Config, config_hash, semantic
from engine.controls import ControlsConfig
from engine.pipeline import Pipeline
from engine.trust_events import DEMOTE, DRIFT, HALT, SWAP, Control, ShadowAnswer
from feeds import codec, tape, wire
from feeds.crc32c import crc32c
from feeds.errors import InputError
from feeds.simulator import Simulator
from feeds.tape import InstrumentMeta, TapeMeta
from feeds.tape_reader import TapeReader
from feeds.tape_writer import TapeWriter
from replay import cli
from replay.opening import load_swapped
from replay.session import replay_tapes
from replay.verify import recorded_signals
from replay.why import SignalId, parse_id, why
from tests.engine.bundles import make_bundle, write_manifest
from tests.engine.records import START_NS, SYMBOLS, VENUE, config, flow, opening

A = 0
EPOCH = 77
WARM = 450
LAG_NS = 5_000  # from receipt to sent, of the session that is recorded here


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two bundles of different models, side by side."""
    place = tmp_path_factory.mktemp("bundles")
    for seed, name in ((1, "one"), (2, "two")):
        make_bundle(place / name, seed=seed)
    return place / "one", place / "two"


def record(path: Path, chosen: Config, folder: Path, messages: Sequence[bytes]) -> Path:
    """A session as the daemon records it, each message received a microsecond after it was sent."""
    bundle = load_bundle(folder)
    pipeline = Pipeline(
        chosen,
        bundle,
        open_backend("onnx", bundle, precision=chosen.model.precision),
        load=partial(load_swapped, chosen, folder.parent),
        engine_epoch=EPOCH,
    )
    meta = TapeMeta(
        created_ns=START_NS,
        source="test session",
        instruments=[InstrumentMeta(VENUE, name, 1, i, "0.01", "1") for i, name in enumerate("AB")],
        engine_epoch=EPOCH,
        config=semantic(chosen),
        hashes={
            "model": f"{bundle.model_hash:016x}",
            "config": f"{config_hash(chosen):016x}",
        },
    )
    kinds = {wire.TIMER: tape.TIMER, wire.CONTROL: tape.CONTROL, wire.SHADOW_ANSWER: tape.SHADOW}
    recv_ns = START_NS
    with TapeWriter(path, meta) as writer:
        for message in messages:
            kind = kinds.get(codec.template_id(message), tape.MARKET)
            if kind == tape.MARKET:
                sent_ns = int.from_bytes(
                    message[wire.AT_SOURCE_TIME : wire.AT_SOURCE_TIME + 8], "little"
                )
                recv_ns = max(recv_ns, sent_ns + 1_000)
            arena, at = writer.room(len(message) + 64)
            start = at + tape.RECORD_HEADER_BYTES
            arena[start : start + len(message)] = memoryview(message)
            stop = tape.put_record(arena, at, kind, recv_ns, len(message))
            writer.advance(stop)
            made = []
            while at < stop:
                at = pipeline.advance(arena, at, stop)
                if pipeline.fired:
                    made.append(bytes(pipeline.answer(lambda now=recv_ns + LAG_NS: now)))
            del arena
            for signal in made:
                writer.append(tape.SIGNAL, recv_ns + LAG_NS, signal)
    pipeline.close()
    return path


def control(command: int, **fields: Any) -> bytes:
    return Control(command, 0, **fields).encode()


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory, folders: tuple[Path, Path]) -> Path:
    """Warm, then demoted, then another model, then a hole, then halted."""
    one, two = folders
    model_hash = load_bundle(two).model_hash
    messages = [*opening(A), *flow(A, 2, WARM, seed=1)]
    messages += [control(DEMOTE, by="Ada", text="trial"), *flow(A, WARM + 2, 40, seed=2)]
    messages += [
        control(DRIFT, by="drift monitor", text="input x"),
        control(SWAP, by="Bob", text=str(two), model_hash=model_hash),
        *flow(A, WARM + 42, 40, seed=3),
        control(HALT, by="Cyd", text="news"),
        *flow(A, WARM + 82, 20, seed=4),
        *flow(A, WARM + 110, 4, seed=5),
        codec.encode_timer(START_NS + 60_000_000_000),
    ]
    path = tmp_path_factory.mktemp("session") / "session.tape"
    return record(path, config(SYMBOLS), one, messages)


def told(path: Path) -> list[np.void]:
    """The recorded signals of A."""
    blocks = [
        codec.decode_block(bytes(message), wire.SIGNAL_DTYPE).copy()
        for message in recorded_signals(path)
    ]
    return [block for block in blocks if block["symbol"] == b"A"]


def seq_of(path: Path, **fields: Any) -> int:
    """The last signal with these fields."""
    return max(
        int(block["signal_seq"])
        for block in told(path)
        if all(block[name] == value for name, value in fields.items())
    )


def call(*arguments: object) -> Any:
    result = CliRunner().invoke(cli.why, [*map(str, arguments), "--json"])
    if result.exception is not None:
        raise result.exception
    return json.loads(result.stdout)


def outcome(found: Any, name: str) -> str:
    (rule,) = (rule for rule in found["rules"] if rule["name"] == name)
    return str(rule["outcome"])


def crc(found: Any) -> int:
    """CRC32C of the model inputs that a story names."""
    x = np.array([item["model_input"] for item in found["inputs"]], dtype="<f4")
    data = x.view(np.uint8)
    return int(crc32c(data, 0, len(data)))


def test_the_ids_that_are_understood() -> None:
    assert parse_id("sim.ALPHA/1234") == SignalId(None, "sim", "ALPHA", 1234)
    assert parse_id("17:cme.ES.H6/1") == SignalId(17, "cme", "ES.H6", 1)
    assert parse_id("fx.EUR/USD/9") == SignalId(None, "fx", "EUR/USD", 9)
    assert str(parse_id("17:cme.ES.H6/1")) == "17:cme.ES.H6/1"
    for text in ("", "ALPHA/1", "sim.ALPHA", "sim.ALPHA/0", "sim.ALPHA/x", "sim.A/" + "9" * 5_000):
        with pytest.raises(InputError, match="not a signal's id"):
            parse_id(text)


def test_a_tradable_signal(session: Path, folders: tuple[Path, Path]) -> None:
    first = load_bundle(folders[0]).model_hash
    seq = seq_of(session, reasons=0, precision=trust.PRECISION_INT8, model_hash=first)
    block = next(item for item in told(session) if item["signal_seq"] == seq)
    found = call(f"test.A/{seq}", "--tape", session, "--model", folders[0])
    signal = found["signal"]
    assert found["id"] == f"{EPOCH}:test.A/{seq}"
    assert (signal["signal_seq"], signal["input_crc"]) == (seq, int(block["input_crc"]))
    assert (signal["tradable"], signal["reasons"], signal["precision"]) == (True, [], "int8")
    assert found["recorded"] == {"found": True, "equal": True, "fields": []}
    assert len(found["inputs"]) == 96
    assert crc(found) == signal["input_crc"]
    extreme = [item for item in found["inputs"] if "most extreme" in item["marks"]]
    assert len(extreme) == 1
    size = max(abs(item["normalised"]) for item in found["inputs"])
    assert abs(extreme[0]["normalised"]) == size
    assert list(found["scores"].values()) == signal["outputs"]
    assert max(found["scores"], key=found["scores"].get) == signal["class_name"]
    assert found["book"]["bids"][0][0] == signal["best_bid_ticks"]
    assert found["book"]["asks"][0][0] == signal["best_ask_ticks"]
    assert len(found["book"]["bids"]) == 10
    assert found["model"]["hash"] == signal["model_hash"]
    assert found["model"]["path"] == str(folders[0])
    assert found["config"]["hash"] == signal["config_hash"]
    assert found["config"]["recorded"] == TapeReader(session).meta.config
    assert found["config"]["used_is_recorded"]
    assert {rule["outcome"] for rule in found["rules"]} <= {"passed", "off"}
    assert outcome(found, "value check: input not finite") == "passed"
    assert (found["moves"], found["events"], found["caused"]) == ([], [], [])


def test_times_and_messages(session: Path, folders: tuple[Path, Path]) -> None:
    signals = told(session)
    block = next(
        item for item in signals if item["first_seq"] < item["last_seq"] and item["reasons"] == 0
    )
    found = call(f"test.A/{block['signal_seq']}", "--tape", session, "--model", folders[0])
    messages, times = found["messages"], found["times"]
    assert sum(messages["kinds"].values()) == block["last_seq"] - block["first_seq"] + 1
    assert messages["last"]["seq"] == block["last_seq"]
    assert messages["made_due"] == messages["last"]
    assert times["received_to_emitted_us"] == LAG_NS / 1e3
    assert times["exchange_to_source_us"] == 0.0
    assert times["source_to_received_us"] >= 1.0


def test_suppressed_signals(session: Path, folders: tuple[Path, Path]) -> None:
    found = call("test.A/1", "--tape", session, "--model", folders[0])
    assert found["signal"]["reasons"] == ["WARMING_UP"]
    assert found["inputs"] == []
    assert found["scores"] is None
    assert outcome(found, "book state") == "passed"
    assert outcome(found, "warm-up") == "failed"
    assert outcome(found, "value check: input out of range") == "not reached"
    assert outcome(found, "inference") == "not reached"

    seq = seq_of(session, reasons=trust.REASON_HALTED)
    found = call(f"test.A/{seq}", "--tape", session, "--model", folders[0])
    assert outcome(found, "halted") == "failed"
    assert outcome(found, "inference") == "passed"
    assert crc(found) == found["signal"]["input_crc"]
    assert found["signal"]["outputs"] == [None] * 3
    assert len(found["scores"]) == 3, "what the model said, for whoever asks why"
    assert found["engine"]["mode"] == "HALTED"
    assert found["engine"]["halted_why"] == "halt: news"
    assert found["moves"][-1]["by"] == "Cyd"

    seq = seq_of(session, book_state=trust.GAP)
    found = call(f"test.A/{seq}", "--tape", session, "--model", folders[0])
    assert outcome(found, "book state") == "failed"
    assert found["recorded"]["equal"]


def test_after_a_demotion_and_a_swap(session: Path, folders: tuple[Path, Path]) -> None:
    seq = seq_of(session, precision=trust.PRECISION_FP32)
    found = call(f"test.A/{seq}", "--tape", session, "--model", folders[0])
    assert found["engine"]["mode"] == found["engine"]["answers"] == "FP32"
    assert found["engine"]["trust_events"] == "followed"
    assert found["recorded"]["equal"]
    assert crc(found) == found["signal"]["input_crc"]
    (move,) = found["moves"]
    assert (move["from"], move["to"], move["by"]) == ("INT8", "FP32", "Ada")
    (event,) = found["events"]
    assert (event["event"], event["by"], event["text"]) == ("demote", "Ada", "trial")

    second = load_bundle(folders[1]).model_hash
    seq = seq_of(session, model_hash=second, reasons=0)
    found = call(f"{EPOCH}:test.A/{seq}", "--tape", session, "--model", folders[0])
    assert found["model"]["hash"] == found["signal"]["model_hash"] == f"{second:016x}"
    assert found["model"]["path"] == str(folders[1])
    assert found["engine"]["mode"] == "INT8", "a new model starts with INT8"
    assert found["recorded"]["equal"]
    assert crc(found) == found["signal"]["input_crc"]
    assert [event["event"] for event in found["events"]] == ["demote", "drift", "swap"]
    assert found["events"][2]["model_hash"] == f"{second:016x}"


def test_an_input_that_the_value_check_refuses(tmp_path: Path) -> None:
    folder = tmp_path / "checked"
    _, manifest = make_bundle(folder, seed=1, checks=True)
    checks = manifest.checks
    assert checks is not None
    tight = (*checks.input_bound[:4], 1e-9, *checks.input_bound[5:])
    checks = msgspec.structs.replace(checks, input_bound=tight)
    write_manifest(folder, msgspec.structs.replace(manifest, checks=checks))
    messages = [*opening(A), *flow(A, 2, WARM, seed=1)]
    path = record(tmp_path / "s.tape", config(("A",)), folder, messages)
    seq = seq_of(path, reasons=trust.REASON_VALUE_CHECK)
    found = call(f"test.A/{seq}", "--tape", path, "--model", folder)
    signal = found["signal"]
    assert (signal["reasons"], signal["input_crc"]) == (["VALUE_CHECK"], 0)
    assert signal["value_check_names"] == ["input out of range"]
    assert outcome(found, "value check: input not finite") == "passed"
    assert outcome(found, "value check: input out of range") == "failed"
    assert outcome(found, "value check: output stuck") == "not reached"
    saw = {rule["name"]: rule["saw"] for rule in found["rules"]}
    name = found["inputs"][4]["name"]
    assert name in saw["value check: input out of range"]
    marked = [item["name"] for item in found["inputs"] if "beyond its bound" in item["marks"]]
    assert marked == [name]
    layers = [item["layer"] for item in found["model"]["value_check_layers"]]
    assert layers == list(checks.int8)
    assert outcome(found, f"value check: saturated: {layers[0]}") == "not reached"
    assert found["scores"] is None


def test_a_timer_makes_a_book_stale(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    timer = codec.encode_timer(START_NS + 60_000_000_000)
    messages = [*opening(A), *flow(A, 2, WARM, seed=1), timer, *flow(A, WARM + 2, 5, seed=2)]
    path = record(tmp_path / "s.tape", config(("A",)), folders[0], messages)
    found = call(
        f"test.A/{seq_of(path, book_state=trust.STALE)}", "--tape", path, "--model", folders[0]
    )
    assert found["messages"]["made_due"]["message"] == "Timer"
    assert found["messages"]["last"]["seq"] == WARM + 1
    assert outcome(found, "stale data") == "failed"
    assert found["recorded"]["equal"]


def test_the_figures_that_controls_saw(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    chosen = config(
        ("A",), controls=ControlsConfig(max_repeats=1, collar_score=1e6, max_signals_per_s=10_000)
    )
    messages = [*opening(A), *flow(A, 2, 2 * WARM, seed=1)]
    path = record(tmp_path / "s.tape", chosen, folders[0], messages)
    repeated = [s for s in told(path) if s["reasons"] == trust.REASON_REPEATED]
    first, second = (
        call(f"test.A/{block['signal_seq']}", "--tape", path, "--model", folders[0])
        for block in repeated[:2]
    )
    assert outcome(first, "repeats latched") == "passed"
    assert outcome(first, "collar") == outcome(first, "throttle") == "passed"
    assert outcome(first, "repeats") == "failed"
    assert outcome(second, "repeats latched") == "failed"
    assert outcome(second, "repeats") == "not reached"
    saw = {rule["name"]: rule["saw"] for rule in first["rules"]}
    assert saw["repeats"].startswith("2 in a row")
    assert "10000 a second" in saw["throttle"]


def test_what_the_shadow_said_and_what_it_led_to(
    tmp_path: Path, folders: tuple[Path, Path]
) -> None:
    messages = [*opening(A), *flow(A, 2, WARM, seed=1)]
    plain = record(tmp_path / "plain.tape", config(("A",)), folders[0], messages)
    seq = seq_of(plain, reasons=0)
    ticket = sum(block["input_crc"] != 0 for block in told(plain))
    int8 = np.array([0.5, 0.25, 0.0], dtype=np.float32)
    said = ShadowAnswer(ticket, seq, VENUE, "A", 0, int8 + np.float32(0.125), int8)
    path = record(tmp_path / "s.tape", config(("A",)), folders[0], [*messages, said.encode()])
    found = call(f"test.A/{seq}", "--tape", path, "--model", folders[0])
    assert found["shadow_answer"]["ticket"] == ticket
    assert found["shadow_answer"]["greatest_difference"] == 0.125
    assert found["engine"]["shadow_state"] == "off", "it answered afterwards"


def test_another_model_is_told(session: Path, folders: tuple[Path, Path]) -> None:
    seq = seq_of(session, precision=trust.PRECISION_FP32)
    found = call(f"test.A/{seq}", "--tape", session, "--model", folders[1])
    assert found["engine"]["trust_events"] == "not followed"
    assert not found["recorded"]["equal"]
    differing = {pair["field"] for pair in found["recorded"]["fields"]}
    assert {"model_hash", "precision"} <= differing
    assert [event["event"] for event in found["events"]] == ["demote"], "told, though not followed"


def test_a_market_tape_and_the_reference_model(tmp_path: Path, reference_bundle: Path) -> None:
    path = tmp_path / "market.tape"
    Simulator(seed=5, n_instruments=2).write_tape(path, 3_000)
    report = replay_tapes([path], model=reference_bundle)
    assert report.tradable > 0
    found = call("sim.BETA/300", "--tape", path, "--model", reference_bundle)
    assert found["signal"]["symbol"] == "BETA"
    assert found["recorded"] == {"found": False, "equal": None, "fields": []}
    assert found["engine"]["trust_events"] == "none recorded"
    assert found["times"]["emitted_ns"] is None
    assert crc(found) == found["signal"]["input_crc"] != 0


def test_a_tape_that_is_still_written(
    session: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    signals = [
        record.offset for record in TapeReader(session).records() if record.kind == tape.SIGNAL
    ]
    cut = tmp_path / "cut.tape"
    cut.write_bytes(session.read_bytes()[: signals[100] + 11])
    story = why(SignalId(None, VENUE, "A", 100), cut, model=folders[0])
    assert story.recorded["equal"]
    story = why(SignalId(None, VENUE, "A", 101), cut, model=folders[0])
    assert not story.recorded["found"], "its record is the one that was cut"


def test_damage_behind_the_signal_does_not_matter(
    session: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    offsets = [record.offset for record in TapeReader(session).records()]
    data = bytearray(session.read_bytes())
    data[offsets[-3] + 40] ^= 1
    broken = tmp_path / "broken.tape"
    broken.write_bytes(data)
    assert why("test.A/100", broken, model=folders[0]).recorded["equal"]
    with pytest.raises(InputError, match="damaged record"):
        why("test.A/100000", broken, model=folders[0])


def test_errors_say_what_to_do(session: Path, folders: tuple[Path, Path], tmp_path: Path) -> None:
    model = folders[0]
    for text, match in (
        ("test.A", "not a signal's id"),
        ("test.C/1", "no instrument test.C on the tape.*one of test.A, test.B.*did you mean"),
        (f"{EPOCH + 1}:test.A/1", "another run of the engine"),
        ("test.A/100000", "no signal 100000 of test.A.*expected 1 to"),
        ("test.B/1", "the tape has none of it"),
    ):
        with pytest.raises(InputError, match=match):
            why(text, session, model=model)
    with pytest.raises(InputError, match="no model named"):
        why("test.A/1", session)
    with pytest.raises(InputError, match="cannot be read"):
        why("test.A/1", tmp_path / "none.tape", model=model)


def test_tables_are_printed_for_people(session: Path, folders: tuple[Path, Path]) -> None:
    for seq in (1, seq_of(session, precision=trust.PRECISION_FP32), seq_of(session, reasons=0)):
        result = CliRunner().invoke(
            cli.why, [f"test.A/{seq}", "--tape", str(session), "--model", str(folders[0])]
        )
        assert result.exit_code == 0
        for title in ("signal", "rules", "inputs", "book", "messages", "times", "config"):
            assert f"\n{title}\n" in result.stdout
