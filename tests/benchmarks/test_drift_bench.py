"""The drift benchmark is a function of its arguments, and its table adds up."""

from __future__ import annotations

import msgspec

from benchmarks.drift import AFTER_LEARNING, SHIFTS_SD, bench_drift
from engine.drift import DriftConfig
from tests.benchmarks.test_demo import octick_json

# So short that the windows must be, too.
CONFIG = DriftConfig(every_rows=1, window_rows=64, rungs=2)
HOURS = 0.03


def test_a_large_shift_is_found_in_more_features_than_a_small_one() -> None:
    result = bench_drift(HOURS, 5, CONFIG)
    assert result.inferences // result.share == result.rows > 2_000
    alone = {
        row["shift_sd"]: row
        for row in result.table
        if row["begins"] == AFTER_LEARNING and row["what"].startswith("one feature")
    }
    shares = [alone[shift]["detected"] for shift in SHIFTS_SD]
    assert shares == sorted(shares)
    assert shares[-1] > 0.0
    for row in result.table:
        assert row["rows_worst"] is None or row["detected"] > 0.0
        if row["rows_median"] is not None:
            assert row["detected"] >= 0.5
            assert row["rows_median"] <= row["rows_worst"]


def test_the_same_arguments_give_the_same_result() -> None:
    first, again = (bench_drift(HOURS, 5, CONFIG) for _ in range(2))
    assert msgspec.json.encode(first) == msgspec.json.encode(again)


def test_the_command_prints_one_object() -> None:
    result = octick_json("bench", "drift", "--hours", "0.01", "--seed", "3")
    assert result["seed"] == 3
    assert result["config"]["every_rows"] == 1
    assert len(result["table"]) == 2 * len(SHIFTS_SD) * 4
