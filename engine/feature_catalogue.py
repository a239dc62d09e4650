"""The entries of the feature catalogue, group by group, in the order of the vector.

Terms used in the formulas:

======== =========================================================================================
mid      (best bid + best ask) / 2; while a side is empty, the last one known
move     change of the mid over one book update
EWn(x)   sum over events of x * 2**(-k/n), k = events of that kind since; EW1s: 2**(-age/1 s)
spread'  mean spread: a running mean with half-life 256 book updates, seeded by the first book
size'    mean size of the top ten levels of both sides, the same way
width'   mean distance of those levels from the mid, the same way
move'    mean of |move| over moves that are not 0: half-life 32 of them, seeded by the first
trade'   mean trade size: half-life 32 trades, seeded by the first trade
sgn      +1 buyer took, -1 seller took; where the venue does not say, the quote test (Lee, Ready)
sq(x)    x / (1 + |x|)
======== =========================================================================================

A running mean m takes a value x in by m + g (x - m), g = 1 - 2**(-1/half-life). sq(a / b) is taken
as a / (b + |a|). A ratio with nothing in its denominator is 0.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from engine.feature_state import BOOK, LEVELS, TRADES, WARM_BOOK_UPDATES, WARM_TRADES

BLOCK_LIMIT: Final = 8.0
"""The 40 values of the block lie in [-8, 8]; a level that is not there has price 8, size -8."""

ODD: Final = "odd"
EVEN: Final = "even"

NOW: Final = (1, BOOK)
BOOK_WARM: Final = (WARM_BOOK_UPDATES, BOOK)
TRADE_WARM: Final = (WARM_TRADES, TRADES)


class FeatureSpec(NamedTuple):
    """One value of the feature vector.

    Attributes
    ----------
    name : str
        As in `NAMES`.
    formula : str
        In the terms of this module's table.
    source : str
        Paper or practice it comes from. Not part of the hash: a better citation is no new value.
    unit : str
        Unit and range.
    warmup : tuple of (int, str)
        How many events of which kind (`BOOK` or `TRADES`) it needs after a reset.
    symmetry : str
        What swapping bid and ask does: "odd" (changes sign), "even" (stays), or "swap:NAME"
        (takes the value of the feature NAME).
    """

    name: str
    formula: str
    source: str
    unit: str
    warmup: tuple[int, str]
    symmetry: str


_DEEPLOB: Final = "Zhang, Zohren, Roberts (2019) DeepLOB; Ntakaris et al. (2018) FI-2010 ordering"
CONT: Final = "Cont, Kukanov, Stoikov (2014) The price impact of order book events"
_XU: Final = "Xu, Gould, Howison (2018) Multi-level order-flow imbalance in a limit order book"
_GOULD: Final = "Gould, Bonart (2016) Queue imbalance as a one-tick-ahead price predictor"
_STOIKOV: Final = "Stoikov (2018) The micro-price"
_LEE: Final = "Lee, Ready (1991) Inferring trade direction"
_NAES: Final = "after Naes, Skjeltorp (2006) Order book characteristics; slope through the origin"
BIAIS: Final = "Biais, Hillion, Spatt (1995) An empirical analysis of the limit order book"
_PENA: Final = "de la Pena, Lai, Shao (2009) Self-normalized processes"
ROLL: Final = "Goyenko, Holden, Trzcinka (2009) Do liquidity measures measure liquidity?"


def block() -> list[FeatureSpec]:
    """The ten best levels of both sides: 40 values."""
    specs = []
    for k in range(1, LEVELS + 1):
        for side, other in (("ask", "bid"), ("bid", "ask")):
            specs.append(
                FeatureSpec(
                    f"{side}_price_{k}",
                    f"distance of {side} level {k} outwards from mid / width'",
                    f"{_DEEPLOB}; relative to mid, in mean distances of a level, so that it is"
                    " free of tick and scale",
                    "width', [-8, 8]; 8 where there is no such level; 0 while mid is unknown",
                    BOOK_WARM,
                    f"swap:{other}_price_{k}",
                )
            )
            specs.append(
                FeatureSpec(
                    f"{side}_size_{k}",
                    f"ln(1 + lots of {side} level {k}) - ln(1 + size')",
                    f"{_DEEPLOB}; logarithm relative to the mean size",
                    "nepers, [-8, 8]; -8 where there is no such level",
                    BOOK_WARM,
                    f"swap:{other}_size_{k}",
                )
            )
    return specs


def prices() -> list[FeatureSpec]:
    """Queues, spread and fair price."""
    queues = [
        FeatureSpec(
            f"queue_imbalance_{n}",
            f"(B - A) / (B + A), lots of the best {n} levels of each side",
            _GOULD,
            "[-1, 1]",
            NOW,
            ODD,
        )
        for n in (1, 5, 10)
    ]
    return [
        *queues,
        FeatureSpec(
            "spread_bp",
            "10000 * (best ask - best bid) / mid",
            "quoted spread; " + ROLL,
            "basis points, [-1000, 1000]",
            NOW,
            EVEN,
        ),
        FeatureSpec(
            "spread_ratio",
            "s / (s + spread'), s = max(best ask - best bid, 0)",
            BIAIS + ": the spread against its usual value",
            "[0, 1)",
            BOOK_WARM,
            EVEN,
        ),
        FeatureSpec(
            "mid_move",
            "sq(move at the last book update / move')",
            "Cont, Kukanov, Stoikov (2014): the mid-price change over one event",
            "(-1, 1)",
            BOOK_WARM,
            ODD,
        ),
        FeatureSpec(
            "weighted_mid",
            "(I * Pa + (1 - I) * Pb - mid) / spread', I = B / (B + A) of the best levels",
            _STOIKOV + ", the weighted mid (the closed form it starts from)",
            "spread', [-8, 8]; 0 while a side is empty",
            BOOK_WARM,
            ODD,
        ),
        FeatureSpec(
            "microprice",
            "sgn(q) * S[b] / (N[b] + 16) / move', q = queue_imbalance_1, b = floor(8|q|); at each"
            " move m every earlier update since the move before adds sgn(q) m to S[b] and 1 to"
            " N[b]; half-life 64 moves",
            _STOIKOV + ": its first-order adjustment G1 = E[next move | imbalance], estimated on"
            " the stream with the paper's bid-ask symmetrisation, shrunk to 0; without its spread"
            " states and without the iteration to the limit",
            "move', [-8, 8]; 0 while a side is empty",
            BOOK_WARM,
            ODD,
        ),
    ]


def flows() -> list[FeatureSpec]:
    """Order flow, momentum, trade flow."""
    specs = []
    for label, window, scale in (
        ("8_updates", "EW8", ""),
        ("64_updates", "EW64", " * 4"),
        ("1s", "EW1s", " * 4"),
    ):
        for n in (1, 5, 10):
            specs.append(
                FeatureSpec(
                    f"ofi_{n}_{label}",
                    f"sq({window}(sum over {n} levels of e) / (size' * {n}{scale})), e ="
                    " [Pb >= Pb-] qb - [Pb <= Pb-] qb- - [Pa <= Pa-] qa + [Pa >= Pa-] qa-",
                    CONT if n == 1 else _XU,
                    "(-1, 1)",
                    BOOK_WARM,
                    ODD,
                )
            )
    for label, window in (
        ("4_updates", "EW4"),
        ("16_updates", "EW16"),
        ("64_updates", "EW64"),
        ("1s", "EW1s"),
        ("4s", "EW4s"),
        ("16s", "EW16s"),
    ):
        specs.append(
            FeatureSpec(
                f"momentum_{label}",
                f"M / sqrt(M**2 + V), M = {window}(move), V = {window}(move**2)",
                _PENA + "; exponentially weighted",
                "(-1, 1)",
                BOOK_WARM,
                ODD,
            )
        )
    specs.append(
        FeatureSpec(
            "trade_imbalance_16_trades",
            "EW16(sgn * lots) / EW16(lots)",
            "Chordia, Subrahmanyam (2004) Order imbalance; " + _LEE,
            "[-1, 1]",
            TRADE_WARM,
            ODD,
        )
    )
    for label in ("1s", "16s"):
        specs.append(
            FeatureSpec(
                f"trade_imbalance_{label}",
                f"EW{label}(sgn * lots) / (EW{label}(lots) + trade')",
                "Chordia, Subrahmanyam (2004) Order imbalance; " + _LEE,
                "(-1, 1), fading to 0 without trades",
                TRADE_WARM,
                ODD,
            )
        )
    return specs


def shape() -> list[FeatureSpec]:
    """How size lies in the book."""
    specs = []
    for side, other in (("bid", "ask"), ("ask", "bid")):
        specs.append(
            FeatureSpec(
                f"{side}_slope",
                "sum(c x) / sum(x x) over the best n <= 10 levels, c = cumulated lots / those of n,"
                " x = distance from mid / that of level n",
                _NAES,
                "[-10, 10]; large = lots near the touch; 0 for an empty side, below 0 if crossed",
                NOW,
                f"swap:{other}_slope",
            )
        )
    for n in (1, 5):
        for side, other in (("bid", "ask"), ("ask", "bid")):
            specs.append(
                FeatureSpec(
                    f"{side}_depth_{n}",
                    f"lots of the best {n} / lots of the best 10 levels",
                    BIAIS + ": depth curve",
                    "[0, 1]",
                    NOW,
                    f"swap:{other}_depth_{n}",
                )
            )
    return specs
