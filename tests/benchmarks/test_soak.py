"""`octick bench soak`: a live engine for seconds, what its tape says, and how it ends."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import daemon_cli
from benchmarks.recorded_peak import KNOWN_LINES_PER_S, busiest, recorded_peak
from benchmarks.signal_latency import latency_windows
from benchmarks.soak import MIN_WINDOWS, bench_soak, events_rate
from engine.signals import AT_EXCHANGE_TIME, AT_OUTPUTS, AT_RECEIVED
from feeds import tape
from feeds.errors import InputError
from feeds.simulator import Simulator
from feeds.tape_writer import TapeWriter

WINDOW_S = 0.15
MARKET_S = 6.5  # of which the engine's warm-up takes the first


@pytest.fixture(autouse=True)
def short_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.soak.JITTER_S", 0.01)


def test_a_short_soak_says_what_it_saw(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reference_bundle: Path
) -> None:
    """Without the recording: at the peak that is known of it."""
    monkeypatch.setenv("OCTICK_DATA", str(tmp_path))
    arguments = ["--hours", str(MARKET_S / 3600), "--speed", "1", "--window", str(WINDOW_S)]
    done = CliRunner().invoke(
        daemon_cli.soak, [*arguments, "--model", str(reference_bundle), "--json"]
    )
    assert done.exit_code in (0, 1), done.output
    result = json.loads(done.stdout)
    assert result["ok"] == (done.exit_code == 0) == (not result["failed"])
    assert result["peak"]["lines_per_s"] == KNOWN_LINES_PER_S
    assert not result["interrupted"]
    assert result["times_peak"] == pytest.approx(2.0, abs=0.2)
    windows = result["windows"]
    assert result["messages"] == sum(w["messages"] for w in windows)
    assert result["signals"] == sum(w["signals"] for w in windows)
    assert result["wall_s"] == windows[-1]["at_s"]
    assert result["hours"] == pytest.approx(result["wall_s"] / 3600, rel=0.1)
    used = [w for w in windows if not w["warm_up"]]
    assert MIN_WINDOWS <= len(used) < len(windows)
    for w in used:
        assert w["signals"] > 0
        assert 0 < w["p50_us"] <= w["p999_us"] <= w["max_us"]
        assert 0 < w["rss_anon_mb"] < w["rss_mb"]
    for name, word in (("rss_slope_mb_per_hour", "resident"), ("p999_slope_us_per_hour", "p99.9")):
        slope = result[name]
        assert slope["low"] <= slope["value"] <= slope["high"]
        crept = not slope["low"] <= 0 <= slope["high"]
        assert crept == any(what.startswith(word) for what in result["failed"])
    assert result["gc"]["collections"] > 0
    assert result["gc"]["longest_pause_us"] > 0
    assert result["compilations"] == 0
    assert {"before", "after"} == set(result["jitter"])
    assert {"machine", "versions", "commit", "date"} <= set(result)


def test_ctrl_c_ends_it_with_the_result_so_far(reference_bundle: Path) -> None:
    def interrupt(stage: str, share: float) -> None:
        if stage.startswith("window 3 "):
            raise KeyboardInterrupt

    result = bench_soak(
        1.0, speed=1.0, window_s=WINDOW_S, model=reference_bundle, progress=interrupt
    )
    assert len(result.windows) == 3
    assert all(window.signals > 0 for window in result.windows)
    assert 0 < result.hours < result.hours_asked
    assert result.rss_slope_mb_per_hour is None
    assert "too short for slopes" in result.failed
    assert result.interrupted
    assert not result.ok


def test_what_is_too_short_or_too_large_is_refused_before_anything_starts() -> None:
    with pytest.raises(InputError, match="too short"):
        bench_soak(0.01, speed=10.0, window_s=1.0)
    with pytest.raises(InputError, match="would not fit"):
        bench_soak(1e6, speed=10.0)


def test_the_simulators_rate_is_set_so_that_messages_come_as_fast_as_asked() -> None:
    rate = events_rate(5_000.0, 4)
    market = Simulator(3, 4, rate_hz=rate)
    for _ in market.chunks(seconds=60.0):
        pass
    assert market.messages / 60.0 == pytest.approx(5_000.0, rel=0.03)


def test_the_busiest_interval_is_found_wherever_it_begins() -> None:
    times = np.array([0, 95, 99, 101, 104, 194, 195, 300])
    assert busiest(times, 100) == 5  # from 95 to 194, or from 99 to 195: not all six
    assert busiest(times[::-1], 100) == 5
    assert busiest(times, 101) == 6
    assert busiest(times[:1], 100) == 1
    assert busiest(times[:0], 100) == 0


def test_the_recording_has_the_peak_that_is_known_of_it(data_dir: Path) -> None:
    peak = recorded_peak()
    assert peak.lines_per_s == KNOWN_LINES_PER_S
    assert peak.lines_per_s > peak.messages_per_s > peak.messages_per_10ms > 0
    assert peak.lines_per_10ms >= peak.messages_per_10ms


def test_latencies_of_a_tape_fall_into_the_windows_in_which_they_were_sent(tmp_path: Path) -> None:
    path = tmp_path / "session.tape"
    rng = np.random.default_rng(7)
    sent_ns = np.sort(rng.integers(1_000, 900_000_000, 30_000))
    latency_ns = rng.integers(1_000, 90_000, len(sent_ns))
    with TapeWriter(path, Simulator(n_instruments=1).meta) as writer:
        for sent, latency in zip(sent_ns.tolist(), latency_ns.tolist(), strict=True):
            payload = bytearray(AT_OUTPUTS)
            struct.pack_into("<q", payload, AT_RECEIVED, sent - latency)
            struct.pack_into("<q", payload, AT_EXCHANGE_TIME, 10 * sent)
            writer.append(tape.TIMER, sent, b"another kind")
            writer.append(tape.SIGNAL, sent, bytes(payload))
    assert path.stat().st_size > 4 << 20  # several chunks
    edges = [500, 1_000, 200_000_000, 200_000_500, 650_000_000, 800_000_000, 2_000_000_000]
    found = latency_windows(path, edges)
    assert found[0].signals == 0
    assert len(found) == len(edges) - 1
    for window, low, high in zip(found, edges[:-1], edges[1:], strict=True):
        inside = (sent_ns >= low) & (sent_ns < high)
        assert window.signals == inside.sum()
        if window.signals:
            p50, p999 = np.percentile(latency_ns[inside] / 1e3, [50, 99.9])
            assert window.p50_us == pytest.approx(p50, abs=0.01)
            assert window.p999_us == pytest.approx(p999, abs=0.01)
            assert window.exchange_ns == 10 * sent_ns[inside].max()
