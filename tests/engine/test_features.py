"""The schema of the features, and one value of each worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from engine import feature_state, features
from engine.feature_catalogue import FeatureSpec
from engine.feature_specs import SCHEMA_VERSION, schema_hex
from tests.engine.feature_reference import Book, Event, Level, Snapshot, Trade
from tests.engine.feature_streams import Instrument

SECOND = 1_000_000_000
START = 1_700_000_000 * SECOND

# Bids 100, 99, ... and asks 102, 103, ..., 10 lots each: mid 101, spread 2.
BIDS: list[Level] = [(100 - k, 10) for k in range(10)]
ASKS: list[Level] = [(102 + k, 10) for k in range(10)]
STILL = (0, 0, 0, 0)


def value(name: str, *events: Event, at_ns: int | None = None) -> float:
    instrument = Instrument()
    for event in events:
        instrument.take(event)
    return float(instrument.values(at_ns)[features.NAMES.index(name)])


def with_best(levels: list[Level], lots: int) -> list[Level]:
    return [(levels[0][0], lots), *levels[1:]]


def moved(by: int, t_ns: int) -> Book:
    """The whole book ``by`` ticks higher."""
    return Book(t_ns, [(p + by, q) for p, q in BIDS], [(p + by, q) for p, q in ASKS], STILL)


FIRST = Snapshot(START, BIDS, ASKS)
BOUGHT = Trade(START, 102, 6, 1)
SOLD = Trade(START, 100, 2, 2)
UP = moved(1, START)
DECAY_32 = 2.0 ** (-1 / 32)

# name, events, value. Width: a level is 1, 2, ..., 10 ticks from the mid, on average 5.5.
BY_HAND: list[tuple[str, list[Event], float]] = [
    ("ask_price_1", [FIRST], 1 / 5.5),
    ("bid_price_1", [FIRST], 1 / 5.5),
    ("ask_price_10", [FIRST], 10 / 5.5),
    ("bid_price_10", [FIRST], 10 / 5.5),
    ("ask_price_10", [Snapshot(START, BIDS, ASKS[:9])], 8.0),
    ("ask_size_1", [FIRST], 0.0),
    ("ask_size_1", [Snapshot(START, BIDS, with_best(ASKS, 210))], math.log(211 / 21)),
    ("bid_size_3", [Snapshot(START, BIDS, with_best(ASKS, 210))], math.log(11 / 21)),
    ("bid_size_2", [Snapshot(START, BIDS[:1], ASKS)], -8.0),
    ("queue_imbalance_1", [Snapshot(START, with_best(BIDS, 30), ASKS)], 0.5),
    ("queue_imbalance_5", [Snapshot(START, with_best(BIDS, 30), ASKS)], 20 / 120),
    ("queue_imbalance_10", [Snapshot(START, with_best(BIDS, 30), ASKS)], 20 / 220),
    ("queue_imbalance_1", [Snapshot(START, BIDS, [])], 1.0),
    ("spread_bp", [FIRST], 2 / 101 * 1e4),
    ("spread_ratio", [FIRST], 0.5),
    ("mid_move", [FIRST, UP], 0.5),
    ("mid_move", [FIRST, UP, moved(1, START)], 0.0),
    ("weighted_mid", [Snapshot(START, with_best(BIDS, 30), ASKS)], (101.5 - 101) / 2),
    # One update with q = 1/2 before a move of one tick: S = 1, N = 1, and again q = 1/2.
    (
        "microprice",
        [
            Snapshot(START, with_best(BIDS, 30), ASKS),
            Book(START, with_best(BIDS, 30), ASKS, STILL),
            moved(1, START)._replace(bids=[(101, 30), *[(100 - k, 10) for k in range(9)]]),
        ],
        1 / 17,
    ),
    # 20 lots more at the best bid; mean level 10 + 1 * (1 - 2**(-1/256)).
    *[
        (f"ofi_{n}_{window}", [FIRST, Book(START, with_best(BIDS, 30), ASKS, STILL)], x)
        for n in (1, 5, 10)
        for window, scale in (("8_updates", 1), ("64_updates", 4), ("1s", 4))
        for x in [20 / (20 + (11 - 2 ** (-1 / 256)) * n * scale)]
    ],
    *[
        (f"momentum_{window}", [FIRST, UP], 1 / math.sqrt(2))
        for window in ("4_updates", "16_updates", "64_updates", "1s", "4s", "16s")
    ],
    # Down two ticks four updates after up one, half-life four: -2 + 1/2 over sqrt(... + 4 + 1/2).
    (
        "momentum_4_updates",
        [FIRST, UP, UP, UP, UP, moved(-1, START)],
        -1.5 / math.sqrt(1.5**2 + 4.5),
    ),
    # The same by the clock: one tick up and, one half-life later, two down.
    *[
        (
            f"momentum_{n}s",
            [FIRST, UP, moved(-1, START + n * SECOND)],
            -1.5 / math.sqrt(1.5**2 + 4.5),
        )
        for n in (1, 4, 16)
    ],
    (
        "trade_imbalance_16_trades",
        [FIRST, BOUGHT, SOLD],
        (6 * 2 ** (-1 / 16) - 2) / (6 * 2 ** (-1 / 16) + 2),
    ),
    # Mean trade: 6 + (2 - 6) * (1 - 2**(-1/32)).
    ("trade_imbalance_1s", [FIRST, BOUGHT, SOLD], 4 / (8 + 6 - 4 * (1 - DECAY_32))),
    ("trade_imbalance_16s", [FIRST, BOUGHT, SOLD], 4 / (8 + 6 - 4 * (1 - DECAY_32))),
    # c = x = 0.1, 0.2, ..., 1: a straight line.
    ("bid_slope", [FIRST], 1.0),
    ("ask_slope", [FIRST], 1.0),
    ("ask_slope", [Snapshot(START, BIDS, [(102, 10), (103, 30)])], (0.25 * 0.5 + 1) / 1.25),
    ("bid_depth_1", [FIRST], 0.1),
    ("ask_depth_1", [Snapshot(START, BIDS, with_best(ASKS, 110))], 0.55),
    ("bid_depth_5", [FIRST], 0.5),
    ("ask_depth_5", [Snapshot(START, BIDS, with_best(ASKS, 110))], 0.75),
    ("spread_ticks", [FIRST], math.log(3)),
    ("book_width_bp", [FIRST], math.log(1 + 1e4 * 5.5 / 101)),
    ("realised_vol_1s", [FIRST, UP], math.log(1 + 1e4 * math.sqrt(math.log(2)) / 102)),
    ("realised_vol_16s", [FIRST, UP], math.log(1 + 1e4 * math.sqrt(math.log(2) / 16) / 102)),
    # Moves of 1 and 2 ticks: pi/2 * 1 * 2.
    (
        "bipower_vol_16s",
        [FIRST, UP, moved(3, START)],
        math.log(1 + 1e4 * math.sqrt(math.pi * math.log(2) / 16) / 104),
    ),
    ("trade_rate_1s", [FIRST, BOUGHT, SOLD], math.log(1 + 2 * math.log(2))),
    ("trade_rate_16s", [FIRST, BOUGHT, SOLD], math.log(1 + 2 * math.log(2) / 16)),
    ("quote_rate_1s", [FIRST, UP, UP, UP], math.log(1 + 3 * math.log(2))),
    ("quote_rate_16s", [FIRST, UP, UP, UP], math.log(1 + 3 * math.log(2) / 16)),
    ("time_since_trade", [FIRST, BOUGHT, moved(0, START + SECOND)], math.log(1001)),
    ("time_since_move", [FIRST, UP, moved(1, START + SECOND)], math.log(1001)),
    # Moves of 1 and 2 ticks: 1 - pi/2 * 2 / 5.
    ("jump_share_16s", [FIRST, UP, moved(3, START)], 1 - math.pi / 5),
    ("vpin", [FIRST, BOUGHT, SOLD], 4 / 8),
    # A first trade of 6 lots makes a bucket of 96; 45 more each side fill it, evenly but for 6.
    (
        "vpin",
        [FIRST, BOUGHT, *[BOUGHT._replace(lots=3), SOLD._replace(lots=3)] * 15],
        6 / 96,
    ),
    # 6 bought, then the mid up by one tick = the mean move: 6 * 1 / (6 * 6) * mean trade, here 6.
    ("kyle_lambda", [FIRST, BOUGHT, UP, BOUGHT], 0.5),
    ("kyle_correlation", [FIRST, BOUGHT, UP, BOUGHT], 1.0),
    ("kyle_correlation", [FIRST, SOLD, UP, BOUGHT], -1.0),
    ("amihud", [FIRST, BOUGHT, UP, BOUGHT], 0.5),
    (
        "signed_volume_autocorrelation",
        [FIRST, BOUGHT, SOLD],
        -12 / (36 * DECAY_32 + 4),
    ),
    (
        "trade_sign_autocorrelation",
        [FIRST, BOUGHT, BOUGHT, SOLD],
        (DECAY_32 - 1) / (DECAY_32 + 1),
    ),
    (
        "large_trade_share",
        [FIRST, BOUGHT, BOUGHT._replace(lots=25)],
        25 / (25 + 6 * DECAY_32),
    ),
    ("large_trade_share", [FIRST, BOUGHT, BOUGHT._replace(lots=24)], 0.0),
    # 8 added, 12 removed of which 2 were sold into: 10 of 20 cancelled.
    ("cancel_ratio_bid", [FIRST, SOLD, Book(START, BIDS, ASKS, (8, 12, 0, 0))], 0.5),
    ("cancel_ratio_ask", [FIRST, BOUGHT, Book(START, BIDS, ASKS, (0, 0, 1, 9))], 0.3),
    ("net_flow_imbalance", [FIRST, Book(START, BIDS, ASKS, (9, 1, 2, 8))], (8 + 6) / 20),
    # Bought at the ask: 2 * (102 - 101) = the spread of 2.
    ("effective_spread", [FIRST, BOUGHT], 0.5),
    # Bought two ticks through it: three times the spread.
    ("effective_spread", [FIRST, BOUGHT._replace(price=104)], 0.75),
    # Eight trades later the mid is 102: nothing was earned.
    ("realised_spread", [FIRST, BOUGHT, UP, *[SOLD] * 8], 0.0),
    # Eight trades later the mid is 100: 2 * (102 - 100) against a spread of 2.
    ("realised_spread", [FIRST, BOUGHT, moved(-1, START), *[SOLD] * 8], 2 / 3),
]


@pytest.mark.parametrize(
    ("name", "events", "expected"), BY_HAND, ids=[f"{i}-{c[0]}" for i, c in enumerate(BY_HAND)]
)
def test_value_by_hand(name: str, events: list[Event], expected: float) -> None:
    assert value(name, *events) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_each_feature_has_a_value_by_hand() -> None:
    """Levels of the block differ by their number only: one of each kind stands for all."""
    done = {name for name, _, _ in BY_HAND}
    block = {f"{side}_{field}" for side in ("bid", "ask") for field in ("price", "size")}
    assert {"_".join(n.split("_")[:2]) for n in done} >= block
    missing = set(features.NAMES[40:]) - done
    assert not missing


def test_half_a_second_of_waiting_shows() -> None:
    """`compute` decays to the moment asked for, without an event."""
    later = START + 16 * SECOND
    rate = value("quote_rate_16s", FIRST, UP, UP, at_ns=later)
    assert rate == pytest.approx(math.log(1 + math.log(2) / 16))
    assert value("time_since_move", FIRST, UP, at_ns=later) == pytest.approx(math.log(16_001))


def test_a_side_that_empties_keeps_the_last_mid_and_spread() -> None:
    emptied = Book(START, BIDS, [], STILL)
    assert value("spread_bp", FIRST, emptied) == value("spread_bp", FIRST)
    assert value("weighted_mid", FIRST, emptied) == 0.0
    assert value("ask_price_1", FIRST, emptied) == 8.0
    assert value("ask_size_1", FIRST, emptied) == -8.0
    assert value("bid_price_1", FIRST, emptied) == value("bid_price_1", FIRST)
    back = moved(1, START)
    assert value("mid_move", FIRST, emptied, back) == 0.5, "the gap was crossed in one move"


def test_nothing_known_gives_a_declared_vector() -> None:
    values = Instrument().values(START)
    block = values[:40].reshape(10, 4)
    assert (block[:, [0, 2]] == 0).all(), "no mid, so no distance"
    assert (block[:, [1, 3]] == -8).all()
    assert (values[40:] == 0).all()


def test_a_trade_without_a_side_is_classified_by_the_quote() -> None:
    for price, sign in ((102, 1.0), (101, 0.0), (100, -1.0)):
        trade = Trade(START, price, 5, 0)
        assert value("trade_imbalance_16_trades", FIRST, trade) == sign


def test_a_snapshot_brings_neither_flow_nor_move() -> None:
    again = Snapshot(START, moved(5, 0).bids, moved(5, 0).asks)
    for name in ("ofi_10_1s", "momentum_1s", "mid_move", "quote_rate_1s"):
        assert value(name, FIRST, again) == 0.0
    assert value("mid_move", FIRST, again, moved(6, START)) == 0.5, "its book is the previous one"


def test_time_that_steps_back_is_held() -> None:
    straight = [FIRST, moved(1, START + SECOND), moved(2, START + SECOND)]
    back = [FIRST, moved(1, START + SECOND), moved(2, START)]
    end = START + 2 * SECOND
    for name in features.NAMES:
        assert value(name, *straight, at_ns=end) == value(name, *back, at_ns=end)


def test_a_trade_bigger_than_its_bucket_spills_over() -> None:
    # Buckets: 16 lots with 1 sold; then, the mean trade being 1 + 99_999 g, floor(16 of that) each.
    size = math.floor(16 * (1 + 99_999 * (1 - DECAY_32)))
    events = [FIRST, Trade(START, 102, 1, 2), Trade(START, 102, 100_000, 1)]
    assert 2 * size < 100_000 - 15 < 3 * size
    assert value("vpin", *events) == pytest.approx((14 + 100_000 - 15) / 100_001)


def test_the_catalogue_is_the_vector() -> None:
    assert len(features.SPECS) == len(features.NAMES) == features.N_FEATURES == 96
    assert features.NAMES[:4] == ("ask_price_1", "ask_size_1", "bid_price_1", "bid_size_1")
    for spec in features.SPECS:
        assert all((spec.name, spec.formula, spec.source, spec.unit)), spec
        if spec.symmetry.startswith("swap:"):
            other = next(s for s in features.SPECS if s.name == spec.symmetry[5:])
            assert other.symmetry == f"swap:{spec.name}"
        else:
            assert spec.symmetry in ("odd", "even")


def test_schema_hash_is_the_catalogue_and_nothing_else() -> None:
    assert schema_hex(features.SPECS, SCHEMA_VERSION) == features.SCHEMA_HEX
    assert features.SCHEMA_HEX[:16] == features.SCHEMA_HASH.to_bytes(8, "little").hex()
    first, *rest = features.SPECS
    for field in ("name", "formula", "unit", "symmetry"):
        other = (first._replace(**{field: "x"}), *rest)
        assert schema_hex(other, SCHEMA_VERSION) != features.SCHEMA_HEX, field
    assert schema_hex((*rest, first), SCHEMA_VERSION) != features.SCHEMA_HEX
    assert schema_hex(features.SPECS, SCHEMA_VERSION + 1) != features.SCHEMA_HEX
    cited = (first._replace(source="x"), *rest)
    assert schema_hex(cited, SCHEMA_VERSION) == features.SCHEMA_HEX


def test_decays_are_powers_of_two() -> None:
    for n in (4, 8, 16, 32, 64):
        assert getattr(feature_state, f"DECAY_{n}") == pytest.approx(2.0 ** (-1 / n), rel=1e-15)
    assert pytest.approx(1 - 2 ** (-1 / 256), rel=1e-13) == feature_state.GAIN_256
    assert pytest.approx(1 - 2 ** (-1 / 32), rel=1e-13) == feature_state.GAIN_32


def row(spec: FeatureSpec) -> str:
    """The feature's line in FEATURES.md."""
    warm = f"{spec.warmup[0]} {spec.warmup[1]}"
    cells = (f"`{spec.name}`", spec.formula, spec.source, spec.unit, warm, spec.symmetry)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def test_the_document_says_what_the_catalogue_says() -> None:
    text = Path(features.__file__).with_name("FEATURES.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    assert rows == [row(spec) for spec in features.SPECS]


def test_rows_have_their_declared_length() -> None:
    fi = np.zeros(features.STATE_I, dtype=np.int64)
    ff = np.zeros(features.STATE_F)
    features.reset(fi, ff)
    assert features.is_warm(fi) == 0
