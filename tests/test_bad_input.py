"""Bad input, from the command line: one clear line, exit code 2, and nothing lost."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from feeds.simulator import Simulator
from feeds.tape_reader import TapeReader
from tests.conftest import ROOT

T = 1_700_000_000_000_000_000


def octick(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "octick", *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ,
        timeout=120,
    )


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a refused command says."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    return errors[0]


def diff(first: int, last: int, previous: int, bids: object, asks: object, **more: object) -> str:
    data = {
        "e": "depthUpdate", "E": 1700000000000, "T": 1700000000000, "s": "TESTUSDT",
        "U": first, "u": last, "pu": previous, "b": bids, "a": asks, **more,
    }  # fmt: skip
    return json.dumps({"stream": "testusdt@depth@0ms", "data": data}, separators=(",", ":"))


def recording() -> list[str]:
    """A small USD-M recording that is good: a snapshot, diffs, trades, tickers."""
    snapshot = {
        "lastUpdateId": 100, "E": 1700000000000, "T": 1700000000000,
        "bids": [["10.0", "1.000"], ["9.9", "2.000"]], "asks": [["10.1", "1.000"]],
    }  # fmt: skip
    lines = [diff(90, 100, 89, [["10.0", "1.000"]], []), json.dumps(snapshot)]
    last = 100
    for i in range(50):
        lines.append(diff(last + 1, last + 2, last, [["9.8", f"{i + 1}.000"]], []))
        last += 2
        ticker = {"e": "bookTicker", "u": last + 1, "s": "TESTUSDT", "b": "10.0", "B": "1.000",
                  "a": "10.1", "A": "1.000", "T": 1700000000000, "E": 1700000000000}  # fmt: skip
        lines.append(json.dumps({"stream": "testusdt@bookTicker", "data": ticker}))
    return [f"{T + i * 1_000_000} {line}" for i, line in enumerate(lines)]


def write(path: Path, lines: list[str]) -> Path:
    path.write_bytes(gzip.compress("".join(line + "\n" for line in lines).encode()))
    return path


def convert(path: Path, *args: str) -> subprocess.CompletedProcess[str]:
    out = path.with_suffix(".tape")
    return octick("tape", "convert", path, "--venue", "binance-usdm", "--out", out, *args)


def good_records(path: Path) -> int:
    """Records of a tape that must be whole."""
    return sum(1 for _ in TapeReader(path).records())


@pytest.fixture
def sim_tape(tmp_path: Path) -> Path:
    path = tmp_path / "sim.tape"
    Simulator(seed=1, n_instruments=2).write_tape(path, messages=2_000)
    return path


def test_the_recording_itself_is_good(tmp_path: Path) -> None:
    path = write(tmp_path / "good.gz", recording())
    assert convert(path).returncode == 0
    checked = octick("tape", "check", path, "--venue", "binance-usdm", "--json")
    assert checked.returncode == 0, checked.stderr
    found = json.loads(checked.stdout)
    assert found["compared"] == found["equal"] > 40


def test_a_truncated_recording_keeps_what_was_converted(tmp_path: Path) -> None:
    path = write(tmp_path / "cut.gz", recording())
    path.write_bytes(path.read_bytes()[:-20])
    line = error_of(convert(path))
    assert "cut.gz" in line
    assert good_records(tmp_path / "cut.tape") > 10


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ('{"stream":"testusdt@depth@0ms","data":{"e":"depthUpd', "line 11"),
        (diff(119, 120, 118, [["-1.0", "1.000"]], []), "line 11"),
        (diff(119, 120, 118, [["NaN", "1.000"]], []), "line 11"),
        (diff(119, 120, 118, [["9.8", "Infinity"]], []), "line 11"),
        (diff(119, 120, 118, [["9.8", "-3"]], []), "line 11"),
        ("no json at all", "line 11"),
    ],
    ids=["cut", "negative price", "NaN price", "infinite size", "negative size", "no JSON"],
)
def test_a_corrupted_line_is_named(tmp_path: Path, bad: str, named: str) -> None:
    lines = recording()
    lines[10] = f"{T + 10_000_000} {bad}"
    path = write(tmp_path / "bad.gz", lines)
    line = error_of(convert(path))
    assert "bad.gz" in line
    assert named in line
    assert good_records(tmp_path / "bad.tape") >= 3, "what came before is kept"
    error_of(octick("tape", "check", path, "--venue", "binance-usdm"))


def test_an_off_tick_price_is_named(tmp_path: Path) -> None:
    lines = recording()
    lines[10] = f"{T + 10_000_000} " + diff(109, 110, 108, [["9.85", "1.000"]], [])
    line = error_of(convert(write(tmp_path / "off.gz", lines), "--tick", "0.1"))
    assert "9.85" in line
    assert "line 11" in line


def test_the_wrong_venue_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "usdm.gz", recording())
    for venue in ("binance-spot", "binance-coinm"):
        line = error_of(
            octick("tape", "convert", path, "--venue", venue, "--out", tmp_path / "x.tape")
        )
        assert "usdm.gz" in line
    assert octick("tape", "convert", path, "--venue", "nasdaq").returncode == 2


def test_an_unknown_symbol_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "r.gz", recording())
    assert "OTHER" in error_of(convert(path, "--symbol", "OTHER"))


def test_a_crossed_book_is_counted_and_fails_the_check(tmp_path: Path) -> None:
    lines = recording()
    lines[10] = f"{T + 10_000_000} " + diff(109, 110, 108, [["10.3", "1.000"]], [])
    path = write(tmp_path / "crossed.gz", lines)
    checked = octick("tape", "check", path, "--venue", "binance-usdm", "--json")
    assert checked.returncode == 1
    found = json.loads(checked.stdout)
    assert found["crossed"] > 0
    assert found["equal"] < found["compared"]
    assert convert(path).returncode == 0, "it is what the venue said"


@pytest.mark.parametrize("command", ["info", "verify", "replay", "publish"])
@pytest.mark.parametrize("kind", ["missing", "no tape"])
def test_a_file_that_is_no_tape(
    tmp_path: Path, reference_bundle: Path, command: str, kind: str
) -> None:
    path = tmp_path / "x.tape"
    if kind == "no tape":
        path.write_bytes(b"hello" * 100)
    if command == "replay":
        done = octick("replay", path, "--model", reference_bundle)
    elif command == "publish":
        done = octick("publish", path, "--bind", f"ipc://{tmp_path}/p")
    else:
        done = octick("tape", command, path)
    assert "x.tape" in error_of(done)


def test_a_flipped_bit_is_found_and_placed(
    tmp_path: Path, sim_tape: Path, reference_bundle: Path
) -> None:
    data = bytearray(sim_tape.read_bytes())
    data[len(data) // 2] ^= 0x10
    sim_tape.write_bytes(data)
    line = error_of(octick("replay", sim_tape, "--model", reference_bundle))
    assert "at byte" in line
    verified = octick("tape", "verify", sim_tape, "--json")
    assert verified.returncode == 1


def test_a_bundle_of_other_features(tmp_path: Path, sim_tape: Path, reference_bundle: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(reference_bundle, bundle)
    manifest = bundle / "manifest.json"
    found = json.loads(manifest.read_text())
    found["feature_schema"] = "0" * 64
    manifest.write_text(json.dumps(found))
    line = error_of(octick("replay", sim_tape, "--model", bundle))
    assert "manifest.json" in line
    assert "0" * 64 in line


def test_a_damaged_model_file(tmp_path: Path, sim_tape: Path, reference_bundle: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(reference_bundle, bundle)
    model = bundle / "model.int8.onnx"
    model.write_bytes(model.read_bytes()[:-100])
    assert "model.int8.onnx" in error_of(octick("replay", sim_tape, "--model", bundle))


def test_an_unknown_config_key(tmp_path: Path, sim_tape: Path, reference_bundle: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text('[trigger]\nkindd = "events"\n[[instrument]]\nvenue="sim"\nsymbol="ALPHA"\n')
    done = octick("replay", sim_tape, "--model", reference_bundle, "--config", config)
    line = error_of(done)
    assert "trigger.kindd" in line
    assert "did you mean 'trigger.kind'?" in line


def test_an_existing_file_is_never_written_over(tmp_path: Path, sim_tape: Path) -> None:
    before = sim_tape.read_bytes()
    path = write(tmp_path / "r.gz", recording())
    done = octick("tape", "convert", path, "--venue", "binance-usdm", "--out", sim_tape)
    assert "sim.tape" in error_of(done)
    assert sim_tape.read_bytes() == before


def test_a_taken_endpoint(tmp_path: Path, sim_tape: Path) -> None:
    endpoint = f"ipc://{tmp_path}/taken"
    first = subprocess.Popen(
        [sys.executable, "-m", "octick", "publish", "sim", "--bind", endpoint,
         "--snapshots", "none", "--seconds", "60"],
        stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        assert first.stderr is not None
        first.stderr.readline()
        done = octick("publish", sim_tape, "--bind", endpoint, "--snapshots", "none")
        assert endpoint in error_of(done)
    finally:
        first.kill()
        first.communicate()


def test_wrong_usage_is_two() -> None:
    for args in (["nonsense"], ["replay"], ["tape", "convert"], ["run", "--sekonds", "1"]):
        done = octick(*args)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
