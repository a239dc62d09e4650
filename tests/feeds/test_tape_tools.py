"""`octick tape info | verify | diff | export | seal`: what they say, and their exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from feeds import codec, tape, tape_cli, wire
from feeds.describe import describe, differences
from feeds.errors import InputError
from feeds.signal_table import SignalFile
from feeds.tape import InstrumentMeta, TapeMeta
from feeds.tape_diff import ANY_KIND, diff
from feeds.tape_export import export
from feeds.tape_info import summarise, verify
from feeds.tape_reader import TapeReader
from feeds.tape_seal import seal_tape
from feeds.tape_writer import TapeWriter

NAMED = InstrumentMeta("sim", "AAA", 7, 1, "0.01", "1")
START_NS = 1_700_000_000_000_000_000


def signal(seq: int, reasons: int = 0, symbol: bytes = b"AAA", received_ns: int = 5) -> bytes:
    block = np.zeros(1, dtype=wire.SIGNAL_DTYPE)
    block["venue"], block["symbol"], block["signal_seq"] = b"sim", symbol, seq
    block["reasons"], block["received_ns"], block["exchange_time_ns"] = reasons, received_ns, seq
    block["model_hash"] = 2**64 - 1
    outputs = np.array([0.25, 0.5, 0.25] if reasons == 0 else [np.nan] * 3, dtype="<f4")
    return (
        codec.header(wire.SIGNAL, wire.SIGNAL_BLOCK)
        + block.tobytes()
        + (4).to_bytes(2, "little")
        + (3).to_bytes(2, "little")
        + outputs.tobytes()
    )


def session(seed: int = 0) -> list[tuple[int, int, bytes]]:
    """Two instruments, one of them only defined on the way, with trades, timers and signals."""
    t = START_NS
    return [
        (
            tape.MARKET,
            t,
            codec.encode_instrument(9, 4, 1, 0, "sim", "BBB", Decimal("0.5"), Decimal(10)),
        ),
        (
            tape.MARKET,
            t + 1,
            codec.encode_book(
                wire.SNAPSHOT, 7, 1, 1, 1, t, t, [(100, 5), (99, 4)], [(101, 6 + seed)]
            ),
        ),
        (tape.MARKET, t + 2, codec.encode_book(wire.SNAPSHOT, 9, 4, 1, 1, t, t, [], [])),
        (tape.MARKET, t + 3, codec.encode_book(wire.DELTA, 7, 1, 1, 2, t + 9, t, [(100, 0)], [])),
        (tape.SIGNAL, t + 3, signal(1, reasons=16)),
        (tape.MARKET, t + 4, codec.encode_trade(9, 4, 1, 2, t + 8, t, 50, 3, 77, 1)),
        (tape.TIMER, t + 5, codec.encode_timer(t + 5)),
        (tape.MARKET, t + 6, codec.encode_trade(5, 5, 1, 2, t + 8, t, 51, 4, 78, 2)),
        (tape.MARKET, t + 7, codec.encode_heartbeat(7, 1, 1, 2, t + 9, t)),
        (tape.SIGNAL, t + 8, signal(2)),
    ]


def write(path: Path, records: list[tuple[int, int, bytes]], **meta: Any) -> Path:
    header = TapeMeta(created_ns=START_NS, source="test", instruments=[NAMED], **meta)
    with TapeWriter(path, header) as writer:
        for kind, recv_ns, payload in records:
            writer.append(kind, recv_ns, payload)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "a.tape", session())


def call(command: Any, *arguments: object) -> tuple[int, Any]:
    """Exit code, and stdout as JSON."""
    result: Result = CliRunner().invoke(command, [*map(str, arguments), "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, json.loads(result.stdout)


# info


def test_info_counts_what_is_there(path: Path) -> None:
    code, found = call(tape_cli.info, path)
    assert code == 0
    assert found == json.loads(json.dumps(summarise(path)))
    assert found["records"] == 10
    assert found["kinds"] == {"market": 7, "timer": 1, "signal": 2}
    assert found["templates"] == {
        "Instrument": 1,
        "Snapshot": 2,
        "Delta": 1,
        "Trade": 2,
        "Heartbeat": 1,
        "Timer": 1,
        "Signal": 2,
    }
    assert (found["levels"], found["signals"], found["tradable"]) == (4, 2, 1)
    assert (found["first_recv_ns"], found["last_recv_ns"]) == (START_NS, START_NS + 7)
    assert found["unknown_instrument"] == 1
    assert not found["truncated"]
    assert not found["sealed"]
    first, second = found["instruments"]
    assert (first["symbol"], first["deltas"], first["snapshots"], first["levels"]) == (
        "AAA",
        1,
        1,
        4,
    )
    assert (first["first_seq"], first["last_seq"], first["signals"]) == (1, 2, 2)
    assert (second["symbol"], second["tick"], second["lot"]) == ("BBB", "0.5", "10")
    assert (second["source_id"], second["instrument_id"], second["trades"]) == (9, 4, 1)


def test_info_on_a_tape_that_was_cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])
    code, found = call(tape_cli.info, path)
    assert code == 0
    assert found["truncated"]
    assert found["records"] == 9
    assert found["truncated_at"] < path.stat().st_size


def test_the_tables_print(path: Path) -> None:
    for command, arguments in (
        (tape_cli.info, [path]),
        (tape_cli.verify, [path]),
        (tape_cli.diff, [path, path]),
    ):
        result = CliRunner().invoke(command, [str(argument) for argument in arguments])
        assert result.exit_code == 0
        assert result.stdout


# verify


def test_verify_accepts_a_good_tape_and_its_sealed_twin(path: Path) -> None:
    code, found = call(tape_cli.verify, path)
    assert (code, found["ok"], found["records"], found["fault"]) == (0, True, 10, None)
    seal_tape(path)
    code, found = call(tape_cli.verify, path.with_name("a.tape.zst"))
    assert (code, found["ok"], found["records"], found["sealed"]) == (0, True, 10, True)


@pytest.mark.parametrize("index", range(10))
def test_verify_names_the_first_bad_record(path: Path, index: int) -> None:
    offsets = [record.offset for record in TapeReader(path).records()]
    data = bytearray(path.read_bytes())
    data[offsets[index] + tape.RECORD_HEADER_BYTES] ^= 1
    if index < 9:
        data[offsets[9] + 9] ^= 1
    path.write_bytes(data)
    code, found = call(tape_cli.verify, path)
    assert code == 1
    assert (found["fault"]["index"], found["fault"]["offset"]) == (index, offsets[index])
    assert (found["records"], found["good_bytes"]) == (index, offsets[index])


def test_verify_finds_a_missing_end_and_time_that_runs_backwards(tmp_path: Path) -> None:
    records = session()
    cut = write(tmp_path / "cut.tape", records)
    cut.write_bytes(cut.read_bytes()[:-8])
    code, found = call(tape_cli.verify, cut)
    assert (code, found["records"]) == (1, 10)
    kind, _, payload = records[5]
    records[5] = (kind, START_NS, payload)
    back = write(tmp_path / "back.tape", records)
    offsets = [record.offset for record in TapeReader(back).records()]
    code, found = call(tape_cli.verify, back)
    assert code == 1
    assert (found["fault"]["index"], found["fault"]["offset"]) == (5, offsets[5])


def test_verify_tells_a_damaged_header_from_what_is_no_tape(path: Path, tmp_path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    verdict = verify(path)
    assert not verdict.ok
    assert verdict.records == 0
    (tmp_path / "text").write_text("no tape")
    with pytest.raises(InputError):
        verify(tmp_path / "text")


# diff


def test_equal_tapes_have_no_difference(path: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "b.tape", session(), hashes={"model": "0"})
    code, found = call(tape_cli.diff, path, other)
    assert (code, found["equal"], found["records"], found["same_header"]) == (0, True, 10, False)
    seal_tape(other)
    assert diff(path, tmp_path / "b.tape.zst").equal


def test_diff_names_record_offsets_and_fields(path: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "b.tape", session(seed=1))
    code, found = call(tape_cli.diff, path, other)
    offsets = [record.offset for record in TapeReader(path).records()]
    assert code == 1
    assert found["difference"] == {
        "index": 1,
        "offset_a": offsets[1],
        "offset_b": offsets[1],
        "fields": [{"field": "asks[0]", "a": [101, 6], "b": [101, 7]}],
    }


@pytest.mark.parametrize("chunk_bytes", [64, 200, 1 << 20])
def test_diff_names_the_record_that_one_tape_lacks(path, tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(TapeReader.__init__, "__kwdefaults__", {"chunk_bytes": chunk_bytes})
    other = write(tmp_path / "b.tape", session()[:-1])
    for a, b in ((path, other), (other, path)):
        difference = diff(a, b).difference
        assert difference is not None
        assert difference.index == 9
        assert (difference.offset_a is None) == (a == other)
        assert (difference.offset_b is None) == (b == other)
    assert diff(path, other, kind=tape.MARKET).equal
    assert diff(other, path, kind=tape.MARKET).records == 7
    assert not diff(other, path, kind=tape.SIGNAL).equal


def test_diff_can_pass_over_wall_clock_times(tmp_path: Path) -> None:
    a = write(tmp_path / "a.tape", session())
    moved = [(kind, recv_ns + 50, payload) for kind, recv_ns, payload in session()]
    moved[9] = (tape.SIGNAL, START_NS, signal(2, received_ns=999))
    b = write(tmp_path / "b.tape", moved)
    first = diff(a, b).difference
    assert first is not None
    assert first.index == 0
    assert [item.field for item in first.fields] == ["recv_ns"]
    assert diff(a, b, ignore_receive_time=True).equal
    moved[9] = (tape.SIGNAL, START_NS, signal(3))
    c = write(tmp_path / "c.tape", moved)
    last = diff(a, c, ignore_receive_time=True, kind=ANY_KIND).difference
    assert last is not None
    assert last.index == 9
    assert {"signal_seq", "exchange_time_ns"} <= {item.field for item in last.fields}


# export


def test_export_writes_every_level_trade_and_signal(path: Path, tmp_path: Path) -> None:
    code, done = call(tape_cli.export, path, "--out", tmp_path / "out")
    assert code == 0
    assert done["rows"] == {"book": 5, "trades": 2, "signals": 2}
    book = pq.read_table(tmp_path / "out" / "book.parquet")
    columns = book.to_pydict()
    assert columns["symbol"] == ["AAA", "AAA", "AAA", "BBB", "AAA"]
    assert columns["snapshot"] == [True, True, True, True, False]
    assert columns["side"] == ["bid", "bid", "ask", None, "bid"]
    assert columns["price_ticks"] == [100, 99, 101, None, 100]
    assert columns["quantity_lots"] == [5, 4, 6, None, 0]
    assert columns["record"] == [1, 1, 1, 2, 3]
    assert columns["seq"] == [1, 1, 1, 1, 2]
    assert str(book.schema.field("recv_time").type) == "timestamp[ns, tz=UTC]"
    assert book["recv_time"].cast("int64").to_pylist()[0] == START_NS + 1
    metadata = pq.read_schema(tmp_path / "out" / "book.parquet").metadata
    instruments = json.loads(metadata[b"octick.instruments"])
    assert [(i["symbol"], i["tick"], i["lot"]) for i in instruments] == [
        ("AAA", "0.01", "1"),
        ("BBB", "0.5", "10"),
    ]
    trades = pq.read_table(tmp_path / "out" / "trades.parquet").to_pydict()
    assert trades["symbol"] == ["BBB", None]
    assert trades["price_ticks"] == [50, 51]
    assert trades["trade_id"] == [77, 78]
    assert trades["aggressor"] == ["buy", "sell"]
    signals = pq.read_table(tmp_path / "out" / "signals.parquet").to_pydict()
    assert signals["signal_seq"] == [1, 2]
    assert signals["tradable"] == [False, True]
    assert signals["outputs"][1] == [0.25, 0.5, 0.25]
    assert all(value != value for value in signals["outputs"][0])
    assert signals["model_hash"] == [2**64 - 1] * 2


def test_export_does_not_depend_on_the_chunks(tmp_path, monkeypatch) -> None:
    records = [
        (tape.MARKET, START_NS + i, codec.encode_book(wire.DELTA, 7, 1, 1, i, i, i, [(i, 2)], []))
        for i in range(1, 200)
    ]
    source = write(tmp_path / "a.tape", records)
    export(source, tmp_path / "large")
    monkeypatch.setattr(TapeReader.__init__, "__kwdefaults__", {"chunk_bytes": 512})
    export(source, tmp_path / "small")
    large = pq.read_table(tmp_path / "large" / "book.parquet")
    assert large.num_rows == 199
    assert large["price_ticks"].to_pylist() == list(range(1, 200))
    assert large.equals(pq.read_table(tmp_path / "small" / "book.parquet"))


def test_export_of_one_table_to_one_file(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.parquet"
    code, done = call(tape_cli.export, path, "--out", out, "--table", "trades")
    assert (code, done["files"]) == (0, {"trades": str(out)})
    assert pq.read_metadata(out).num_rows == 2
    with pytest.raises(InputError, match="exists"):
        export(path, out, table="trades")
    export(path, out, table="trades", overwrite=True)


def test_export_of_a_damaged_tape_keeps_what_stands_before(path: Path, tmp_path: Path) -> None:
    last = list(TapeReader(path).records())[-1].offset
    data = bytearray(path.read_bytes())
    data[last + 30] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"byte {last}"):
        export(path, tmp_path / "out")
    assert pq.read_metadata(tmp_path / "out" / "book.parquet").num_rows == 5
    assert pq.read_metadata(tmp_path / "out" / "signals.parquet").num_rows == 1


@pytest.mark.parametrize("package", ["pandas", "polars", "duckdb"])
def test_exported_files_open_elsewhere(path: Path, tmp_path: Path, package: str) -> None:
    module = pytest.importorskip(package)
    export(path, tmp_path / "out")
    for name, rows in (("book", 5), ("trades", 2), ("signals", 2)):
        file = str(tmp_path / "out" / f"{name}.parquet")
        if package == "duckdb":
            assert module.sql(f"select * from '{file}'").to_arrow_table().num_rows == rows
        else:
            assert len(module.read_parquet(file)) == rows


def test_signals_written_one_by_one_are_a_valid_file_at_any_time(tmp_path: Path) -> None:
    def interrupted() -> None:
        with SignalFile(tmp_path / "s.parquet") as file:
            file.append(signal(1))
            file.append(memoryview(signal(2, reasons=3)))
            assert file.rows == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert pq.read_table(tmp_path / "s.parquet")["signal_seq"].to_pylist() == [1, 2]


# seal


def test_seal_replaces_the_raw_tape_by_the_same_bytes(path: Path) -> None:
    before = path.read_bytes()
    code, done = call(tape_cli.seal, path)
    sealed = Path(done["target"])
    assert code == 0
    assert sealed == path.with_name("a.tape.zst")
    assert not path.exists()
    assert sorted(item.name for item in path.parent.iterdir()) == ["a.tape.zst"]
    if shutil.which("zstd"):
        subprocess.run(["zstd", "-dq", str(sealed)], check=True)
        assert path.read_bytes() == before


def test_seal_can_keep_the_raw_tape_and_takes_a_name(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "kept" / "x.tape.zst"
    assert seal_tape(path, target, keep=True).sealed_bytes == target.stat().st_size
    assert path.exists()
    with pytest.raises(InputError, match="exists"):
        seal_tape(path, target)
    with pytest.raises(InputError, match="sealed already"):
        seal_tape(target)


def test_seal_refuses_damage_and_leaves_the_raw_tape(path: Path) -> None:
    data = path.read_bytes()[:-8]
    path.write_bytes(data)
    with pytest.raises(InputError, match="cut short"):
        seal_tape(path)
    assert [item.name for item in path.parent.iterdir()] == ["a.tape"]
    assert path.read_bytes() == data


# descriptions


def test_describe_names_every_field_and_never_fails() -> None:
    trade = codec.encode_trade(1, 2, 3, 4, 5, 6, 7, 8, 9, 1)
    assert describe(trade) == {
        "message": "Trade",
        "source_id": 1,
        "instrument_id": 2,
        "epoch": 3,
        "seq": 4,
        "exchange_time_ns": 5,
        "source_time_ns": 6,
        "flags": 0,
        "price_ticks": 7,
        "quantity_lots": 8,
        "trade_id": 9,
        "aggressor": 1,
    }
    suppressed = describe(signal(1, reasons=1))
    assert suppressed["outputs"] == [None] * 3
    assert suppressed["model_hash"] == "f" * 16
    for message in (trade, signal(1), session()[1][2]):
        for length in range(len(message)):
            assert "message" in describe(message[:length])
    assert describe(b"") == {"message": "template 0", "bytes": ""}


def test_differences_compare_lists_entry_by_entry() -> None:
    a, b = {"x": 1, "l": [1, 2]}, {"x": 2, "l": [1, 3, 4], "y": 5}
    assert differences(a, b) == [
        ("x", 1, 2),
        ("l[1]", 2, 3),
        ("l[2]", None, 4),
        ("y", None, 5),
    ]
