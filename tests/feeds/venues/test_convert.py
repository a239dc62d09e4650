"""A conversion gives the same bytes each time, and bad input costs nothing that was written."""

from __future__ import annotations

import gzip
import json
import lzma
import shutil
from pathlib import Path

import pytest
import zstandard
from click.testing import CliRunner

from feeds.errors import InputError
from feeds.tape_cli import convert as command
from feeds.tape_reader import TapeReader
from feeds.venues.conversion import SOURCE_IDS, instrument_id
from feeds.venues.convert import convert, tape_path
from tests.feeds.venues.mock_binance import MockBinance, edit, is_diff, write

VENUE = "binance-usdm"


def session(diffs: int = 40, **options) -> list[bytes]:
    return MockBinance(VENUE, **options).session(diffs)


def records(path: Path | str) -> int:
    return sum(1 for _ in TapeReader(path).records())


def test_converting_twice_gives_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        convert(write(tmp_path / folder / "raw", session()), VENUE)
    assert (tmp_path / "a/raw.tape").read_bytes() == (tmp_path / "b/raw.tape").read_bytes()


def test_compression_does_not_change_the_records(tmp_path):
    plain = write(tmp_path / "raw", session()).read_bytes()
    (tmp_path / "raw.gz").write_bytes(gzip.compress(plain))
    (tmp_path / "raw.xz").write_bytes(lzma.compress(plain))
    (tmp_path / "raw.zst").write_bytes(zstandard.compress(plain))
    tapes = [
        convert(tmp_path / name, VENUE, out=tmp_path / f"{i}.tape")
        for i, name in enumerate(("raw", "raw.gz", "raw.xz", "raw.zst"))
    ]
    contents = {
        b"".join(bytes(r.payload) for r in TapeReader(done.tape).records()) for done in tapes
    }
    assert len(contents) == 1


def test_the_header_says_where_the_tape_comes_from(tmp_path):
    lines = session()
    done = convert(write(tmp_path / "raw", lines), VENUE)
    meta = TapeReader(done.tape).meta
    assert meta.created_ns == int(lines[0].split(b" ")[0])
    item = meta.instruments[0]
    assert (item.venue, item.symbol, item.tick, item.lot) == (VENUE, "TESTUSDT", "0.01", "0.001")
    assert item.source_id == SOURCE_IDS[VENUE]
    assert item.instrument_id == instrument_id("TESTUSDT") != instrument_id("TESTUSDC")
    assert str(tmp_path) not in meta.source


@pytest.mark.parametrize(
    ("file", "out", "seal", "expected"),
    [
        ("a/b.gz", None, False, "a/b.tape"),
        ("a/b.jsonl.xz", None, False, "a/b.tape"),
        ("a/m_1.csv", None, True, "a/m_1.tape.zst"),
        ("a/b", "c/d.tape", False, "c/d.tape"),
        ("a/b", "c/d.tape", True, "c/d.tape.zst"),
        ("a/b", "c/d.tape.zst", True, "c/d.tape.zst"),
    ],
)
def test_where_the_tape_goes(file, out, seal, expected):
    assert tape_path(file, out, seal) == Path(expected)


def test_an_existing_tape_is_kept_unless_told(tmp_path):
    raw = write(tmp_path / "raw", session())
    (tmp_path / "raw.tape").write_bytes(b"precious")
    with pytest.raises(InputError, match="exists already"):
        convert(raw, VENUE)
    assert (tmp_path / "raw.tape").read_bytes() == b"precious"
    convert(raw, VENUE, overwrite=True)
    assert records(tmp_path / "raw.tape") > 1


def test_a_sealed_tape_holds_the_same_records(tmp_path):
    raw = write(tmp_path / "raw", session())
    plain = convert(raw, VENUE, out=tmp_path / "p.tape")
    sealed = convert(raw, VENUE, out=tmp_path / "s.tape", seal=True)
    assert sealed.tape.endswith("s.tape.zst")
    assert not (tmp_path / "s.tape").exists()
    assert TapeReader(sealed.tape).sealed
    assert [bytes(r.payload) for r in TapeReader(sealed.tape).records()] == [
        bytes(r.payload) for r in TapeReader(plain.tape).records()
    ]
    with pytest.raises(InputError, match="exists already"):
        convert(raw, VENUE, out=tmp_path / "s.tape", seal=True)


def test_a_cut_recording_leaves_a_valid_tape_and_says_so(tmp_path):
    data = gzip.compress(write(tmp_path / "raw", session(200)).read_bytes())
    raw = tmp_path / "raw.gz"
    raw.write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(InputError, match="cut short") as caught:
        convert(raw, VENUE)
    kept = records(tmp_path / "raw.tape")
    assert kept > 100
    assert f"the {kept} messages before it are in {tmp_path / 'raw.tape'}" in str(caught.value)


def test_a_damaged_line_leaves_what_stands_before_it(tmp_path):
    lines = session(60)
    good = convert(write(tmp_path / "good", lines[:200]), VENUE)
    bad = [*lines[:200], lines[200][:40], *lines[201:]]
    with pytest.raises(InputError) as caught:
        convert(write(tmp_path / "bad", bad), VENUE)
    offset = sum(len(line) + 1 for line in lines[:200])
    assert f"bad line 201 (byte {offset}): damaged line" in str(caught.value)
    kept = [bytes(r.payload) for r in TapeReader(tmp_path / "bad.tape").records()]
    assert kept == [bytes(r.payload) for r in TapeReader(good.tape).records()]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"b": [["-1.00", "1"]]}, "a negative number"),
        ({"b": [["NaN", "1"]]}, "no plain decimal"),
        ({"b": [["0.00", "1"]]}, "not positive"),
        ({"pu": None}, "another venue"),
        ({"ps": "TEST"}, "another venue"),
        ({"s": "OTHER"}, "several symbols"),
    ],
)
def test_each_kind_of_bad_diff_is_one_clear_line(tmp_path, change, what):
    lines = session()
    at = [i for i, line in enumerate(lines) if is_diff(line)][30]
    lines[at] = edit(lines[at], **change)
    with pytest.raises(InputError, match=what) as caught:
        convert(write(tmp_path / "raw", lines), VENUE)
    text = str(caught.value)
    assert "\n" not in text
    assert f"raw line {at + 1} (byte {sum(len(x) + 1 for x in lines[:at])}" in text


def test_nothing_is_left_of_a_recording_that_is_no_recording(tmp_path):
    for name, lines in (("words", [b"hello", b"world"]), ("other", [b'5 {"e":"kline"}'])):
        with pytest.raises(InputError):
            convert(write(tmp_path / name, lines), VENUE)
        assert not (tmp_path / f"{name}.tape").exists()


def test_an_unknown_venue_is_refused(tmp_path):
    with pytest.raises(InputError, match="unknown venue; expected binance-usdm"):
        convert(write(tmp_path / "raw", session()), "nasdaq")


def test_the_command_prints_one_json_object(tmp_path):
    raw = write(tmp_path / "raw", session())
    result = CliRunner().invoke(command, [str(raw), "--venue", VENUE, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["lines"] == len(session())
    assert found["messages"] == records(tmp_path / "raw.tape") - 1
    assert found["tape"] == str(tmp_path / "raw.tape")
    assert {"snapshots", "deltas", "trades", "gaps", "tickers", "lines_per_s"} <= found.keys()
    shutil.rmtree(tmp_path)
