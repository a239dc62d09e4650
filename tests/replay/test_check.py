"""`tape check` agrees with a true recording, and finds whatever is wrong with another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from feeds.errors import InputError
from replay import check_binance
from replay.check import check
from replay.cli import check as command
from replay.verdict import Verdict
from tests.feeds.venues.mock_binance import MockBinance, edit, is_diff, is_snapshot, message, write
from tests.feeds.venues.mock_lobster import MockLobster

VENUES = ("binance-usdm", "binance-coinm", "binance-spot")


def run(tmp_path: Path, lines: list[bytes], venue: str = "binance-usdm", **options: Any) -> Verdict:
    return check(write(tmp_path / "raw", lines), venue, **options)


def is_ticker(line: bytes) -> bool:
    data = message(line)
    return "B" in data and "u" in data


def places(lines: list[bytes], kind: Any) -> list[int]:
    return [i for i, line in enumerate(lines) if kind(line)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("venue", VENUES)
def test_a_true_recording_agrees_everywhere(tmp_path, venue, seed):
    lines = MockBinance(venue, seed=seed).session(80)
    verdict = run(tmp_path, lines, venue)
    assert verdict.ok
    assert verdict.updates == verdict.compared == verdict.equal
    assert verdict.updates > 60
    assert (verdict.crossed, verdict.gaps, verdict.first_difference) == (0, 0, None)


@pytest.mark.parametrize("venue", VENUES)
@pytest.mark.parametrize("shift", [-40, -3, 3, 40])
def test_the_ticker_stream_may_run_ahead_or_behind(tmp_path, venue, shift):
    lines = MockBinance(venue, seed=4).session(80)
    keys = []
    for i, line in enumerate(lines):
        keys.append((i + shift if is_ticker(line) else i, i))
    moved = [lines[i] for _, i in sorted(keys)]
    verdict = run(tmp_path, moved, venue)
    straight = run(tmp_path, lines, venue)
    assert (verdict.compared, verdict.equal) == (straight.compared, straight.equal)
    assert verdict.ok


def test_every_update_is_compared_or_counted_with_its_reason(tmp_path):
    market = MockBinance("binance-usdm")
    lines = market.session(40)
    lines = [x for i, x in enumerate(lines) if not (is_ticker(x) and i < 120)]
    while is_ticker(lines[-1]):
        lines.pop()
    verdict = run(tmp_path, lines)
    assert verdict.not_compared["before_the_first_ticker"] > 0
    assert verdict.not_compared["no_later_ticker"] > 0
    assert verdict.compared + sum(verdict.not_compared.values()) == verdict.updates
    assert verdict.ok


def test_a_wrong_level_is_found_with_its_line(tmp_path):
    lines = MockBinance("binance-usdm", seed=2).session(60)
    for at in places(lines, is_diff)[20:]:
        data = message(lines[at])
        if data["b"] and data["b"][-1][1] != "0.000":
            break
    price, quantity = data["b"][-1]
    wrong = f"{float(quantity) + 1:.3f}"
    lines[at] = edit(lines[at], b=[*data["b"][:-1], [price, wrong]])
    verdict = run(tmp_path, lines)
    assert not verdict.ok
    assert verdict.compared - verdict.equal >= 1
    first = verdict.first_difference
    assert first is not None
    assert first.line == at + 1
    assert (first.found["bid"], first.found["bid_quantity"]) == (price, wrong)
    assert first.expected["bid_quantity"] == quantity


def test_a_missing_ticker_costs_only_the_comparisons_it_would_have_served(tmp_path):
    lines = MockBinance("binance-usdm", seed=3).session(200)
    whole = run(tmp_path, lines)
    diffs = places(lines, is_diff)
    # The last ticker before a diff that others follow.
    at = max(i for i in places(lines, is_ticker) if i < diffs[100])
    verdict = run(tmp_path, lines[:at] + lines[at + 1 :])
    assert verdict.compared == whole.compared
    assert 1 <= verdict.compared - verdict.equal <= 3
    assert not verdict.ok, "a difference is a difference"


@pytest.mark.parametrize("venue", VENUES)
def test_a_hole_is_counted_and_healed_by_a_snapshot(tmp_path, venue):
    market = MockBinance(venue, seed=5)
    lines = market.session(40)
    del lines[places(lines, is_diff)[25]]
    snapshot = market.snapshot()
    for i in range(30):
        lines += market.activity()
        lines.append(market.diff())
        if i == 2:
            lines.append(snapshot)
    verdict = run(tmp_path, lines, venue)
    assert verdict.gaps == 1
    assert not verdict.ok
    assert verdict.compared == verdict.equal
    assert verdict.counts["snapshots"] == 2
    assert verdict.compared > 40


def test_a_crossed_book_is_counted(tmp_path):
    market = MockBinance("binance-usdm")
    lines = market.session(20)
    lines.append(edit(market.diff(), b=[["150.00", "1.000"]], u=market.update_id + 1))
    verdict = run(tmp_path, lines)
    assert verdict.crossed == 1
    assert not verdict.ok


def test_without_tickers_nothing_is_proved(tmp_path):
    lines = [x for x in MockBinance("binance-usdm").session(20) if not is_ticker(x)]
    verdict = run(tmp_path, lines)
    assert verdict.compared == 0
    assert not verdict.ok


def test_queues_that_are_full_are_counted(tmp_path, monkeypatch):
    lines = MockBinance("binance-usdm", seed=4).session(80)
    ordered = [x for x in lines if not is_ticker(x)] + [x for x in lines if is_ticker(x)]
    ahead = [x for x in lines if is_ticker(x)] + [x for x in lines if not is_ticker(x)]
    monkeypatch.setattr(check_binance, "MAX_DIFFS_AHEAD", 10)
    monkeypatch.setattr(check_binance, "MAX_TICKERS_AHEAD", 10)
    behind = run(tmp_path, ordered)
    assert behind.not_compared["no_later_ticker"] > 0
    assert behind.compared == behind.equal
    early = run(tmp_path, ahead)
    assert early.counts["forgotten_tickers"] > 0
    assert early.compared == early.equal


def test_number_formats_do_not_matter(tmp_path):
    lines = MockBinance("binance-spot").session(40)
    padded = [x.replace(b'"B":"', b'"B":"0').replace(b'","a"', b'00","a"') for x in lines]
    assert run(tmp_path, padded, "binance-spot").equal == run(tmp_path, lines, "binance-spot").equal


def test_a_recording_without_a_snapshot_is_refused(tmp_path):
    lines = [x for x in MockBinance("binance-usdm").session(20) if not is_snapshot(x)]
    with pytest.raises(InputError, match="no REST snapshot"):
        run(tmp_path, lines)


def test_a_recording_of_another_venue_is_refused(tmp_path):
    lines = MockBinance("binance-spot").session(5, before=2, late=1)
    with pytest.raises(InputError, match="pass --venue binance-spot"):
        run(tmp_path, lines, "binance-usdm")
    with pytest.raises(InputError, match="unknown venue"):
        run(tmp_path, lines, "nowhere")


@pytest.mark.parametrize("levels", [1, 3, 10])
def test_lobster_agrees_row_by_row(tmp_path, levels):
    path = MockLobster(levels, seed=levels).session(500).save(tmp_path)
    verdict = check(path, "lobster")
    assert verdict.ok
    assert verdict.updates == verdict.compared == verdict.equal == 499


def test_a_wrong_lobster_row_is_found(tmp_path):
    mock = MockLobster(3, seed=7).session(100)
    cells = mock.rows[50].split(",")
    cells[1] = str(int(cells[1]) + 1)
    mock.rows[50] = ",".join(cells)
    verdict = check(mock.save(tmp_path), "lobster")
    assert verdict.compared - verdict.equal == 1
    first = verdict.first_difference
    assert first is not None
    assert first.line == 51
    assert list(first.expected) == ["ask_size_1"]
    assert int(first.expected["ask_size_1"]) == int(first.found["ask_size_1"]) + 1


def test_a_lost_lobster_message_shows(tmp_path):
    mock = MockLobster(3, seed=7).session(100)
    at = next(i for i in range(40, 100) if mock.messages[i].split(",")[1] == "1")
    del mock.messages[at], mock.rows[at]
    assert not check(mock.save(tmp_path), "lobster").ok


@pytest.mark.parametrize(
    ("file", "venue", "compared", "updates"),
    [
        ("binance/usdm_btcusdt_20240808.gz", "binance-usdm", 6_545, 6_547),
        ("binance/cm_btcusd_perp_20240808.gz", "binance-coinm", 26_807, 26_824),
        ("binance/spot_ethusdt_20240808.gz", "binance-spot", 3_432, 3_432),
        ("lobster/AAPL_2012-06-21_34200000_57600000_message_10.csv", "lobster", 998, 998),
    ],
)
def test_real_recordings_agree_everywhere(data_dir, file, venue, compared, updates):
    verdict = check(data_dir / file, venue)
    assert verdict.ok
    assert (verdict.compared, verdict.equal, verdict.updates) == (compared, compared, updates)
    assert (verdict.crossed, verdict.gaps) == (0, 0)


def test_the_command_says_it_in_json_and_by_its_exit_code(tmp_path):
    lines = MockBinance("binance-usdm", seed=2).session(40)
    path = write(tmp_path / "raw", lines)
    result = CliRunner().invoke(command, [str(path), "--venue", "binance-usdm", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    keys = ("file", "venue", "symbol", "lines", "updates", "compared", "equal", "crossed", "gaps")
    assert list(found)[: len(keys)] == list(keys)
    assert found["first_difference"] is None
    assert {"trades", "buffered", "snapshots"} <= found.keys()
    del lines[places(lines, is_diff)[20]]
    result = CliRunner().invoke(command, [str(write(path, lines)), "--venue", "binance-usdm"])
    assert result.exit_code == 1
