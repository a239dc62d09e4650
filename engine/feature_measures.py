"""The entries of the feature catalogue, continued: volatility, activity, liquidity.

Terms as in `engine.feature_catalogue`.
"""

from __future__ import annotations

from typing import Final

from engine.feature_catalogue import (
    BIAIS,
    BOOK_WARM,
    CONT,
    EVEN,
    NOW,
    ODD,
    ROLL,
    TRADE_WARM,
    FeatureSpec,
)

_BNS: Final = "Barndorff-Nielsen, Shephard (2004) Power and bipower variation"
_HASBROUCK: Final = "Hasbrouck, Saar (2013) Low-latency trading"
_HUANG: Final = "Huang, Stoll (1996) Dealer versus auction markets"
_LILLO: Final = "Lillo, Farmer (2004) The long memory of the efficient market"
_ENGLE: Final = "Engle, Russell (1998) Autoregressive conditional duration"


def magnitudes() -> list[FeatureSpec]:
    """What spans orders of magnitude, as ln(1 + x)."""
    bounded = ", clipped at 20"
    specs = [
        FeatureSpec(
            "spread_ticks",
            "ln(1 + max(best ask - best bid, 0))",
            "quoted spread; " + ROLL,
            "ln(1 + ticks)" + bounded,
            NOW,
            EVEN,
        ),
        FeatureSpec(
            "book_width_bp",
            "ln(1 + 10000 * width' / mid)",
            BIAIS,
            "ln(1 + basis points)" + bounded,
            BOOK_WARM,
            EVEN,
        ),
    ]
    for label in ("1s", "16s"):
        specs.append(
            FeatureSpec(
                f"realised_vol_{label}",
                f"ln(1 + 10000 * sqrt(EW{label}(move**2) * ln 2 / {label}) / mid)",
                _BNS + "; every move of the mid is a return",
                "ln(1 + basis points per sqrt(s))" + bounded,
                BOOK_WARM,
                EVEN,
            )
        )
    specs.append(
        FeatureSpec(
            "bipower_vol_16s",
            "ln(1 + 10000 * sqrt(pi/2 * EW16s(|move| |move-|) * ln 2 / 16s) / mid),"
            " move- the last move that was not 0",
            _BNS + ", sampled at the moves of the mid",
            "ln(1 + basis points per sqrt(s))" + bounded,
            BOOK_WARM,
            EVEN,
        )
    )
    for kind, warm in (("trade", TRADE_WARM), ("quote", BOOK_WARM)):
        event = "trade" if kind == "trade" else "book update"
        for label in ("1s", "16s"):
            specs.append(
                FeatureSpec(
                    f"{kind}_rate_{label}",
                    f"ln(1 + EW{label}(1 a {event}) * ln 2 / {label})",
                    _ENGLE if kind == "trade" else _HASBROUCK,
                    "ln(1 + events per second)" + bounded,
                    warm,
                    EVEN,
                )
            )
    specs.append(
        FeatureSpec(
            "time_since_trade",
            "ln(1 + ms since the last trade; before any trade: since the first event)",
            _ENGLE,
            "ln(1 + ms)" + bounded,
            TRADE_WARM,
            EVEN,
        )
    )
    specs.append(
        FeatureSpec(
            "time_since_move",
            "ln(1 + ms since the mid last moved; before any move: since the first event)",
            _ENGLE + ": price durations",
            "ln(1 + ms)" + bounded,
            BOOK_WARM,
            EVEN,
        )
    )
    return specs


def ratios() -> list[FeatureSpec]:
    """Jumps, toxicity, impact, autocorrelation, cancellations, spreads paid."""
    specs = [
        FeatureSpec(
            "jump_share_16s",
            "1 - pi/2 * EW16s(|move| |move-|) / EW16s(move**2)",
            _BNS + ": the relative jump",
            "[-1, 1]",
            BOOK_WARM,
            EVEN,
        ),
        FeatureSpec(
            "vpin",
            "sum |buys - sells| / sum lots over the last 32 full volume buckets and the one being"
            " filled; a bucket begun now has floor(16 * trade') lots",
            "Easley, Lopez de Prado, O'Hara (2012) Flow toxicity; true trade sides instead of bulk"
            " classification, bucket size by the mean trade instead of the daily volume",
            "[0, 1]",
            TRADE_WARM,
            EVEN,
        ),
        FeatureSpec(
            "kyle_lambda",
            "sq(L * trade' / move'), L = EW32(y x) / EW32(x x), x = sgn * lots of a trade, y ="
            " change of the mid from it to the next trade",
            "Kyle (1985) Continuous auctions; regression as in Hasbrouck (2009), no intercept",
            "(-1, 1)",
            TRADE_WARM,
            EVEN,
        ),
        FeatureSpec(
            "kyle_correlation",
            "EW32(y x) / sqrt(EW32(x x) * EW32(y y)), as in kyle_lambda",
            "Kyle (1985) Continuous auctions; fit of the regression",
            "[-1, 1]",
            TRADE_WARM,
            EVEN,
        ),
        FeatureSpec(
            "amihud",
            "sq(EW32(|y| / lots) / EW32(1) * trade' / move'), y as in kyle_lambda",
            "Amihud (2002) Illiquidity and stock returns, over trades instead of days",
            "[0, 1)",
            TRADE_WARM,
            EVEN,
        ),
        FeatureSpec(
            "signed_volume_autocorrelation",
            "EW32(x x-) / EW32(x x), x = sgn * lots, x- of the trade before",
            _LILLO,
            "[-1, 1]",
            TRADE_WARM,
            EVEN,
        ),
        FeatureSpec(
            "trade_sign_autocorrelation",
            "EW32(sgn sgn-) / EW32(1), sgn- of the trade before",
            _LILLO,
            "[-1, 1]",
            TRADE_WARM,
            EVEN,
        ),
        FeatureSpec(
            "large_trade_share",
            "EW32(lots of trades larger than 4 * trade') / EW32(lots)",
            "Barclay, Warner (1993) Stealth trading and volatility",
            "[0, 1]",
            TRADE_WARM,
            EVEN,
        ),
    ]
    for side, taker, other in (("bid", "sellers", "ask"), ("ask", "buyers", "bid")):
        specs.append(
            FeatureSpec(
                f"cancel_ratio_{side}",
                f"max(R - T, 0) / (A + R), EW16s of lots: R removed from the {side} side, A added"
                f" to it, T taken by {taker}",
                _HASBROUCK + ": cancellations",
                "[0, 1]",
                BOOK_WARM,
                f"swap:cancel_ratio_{other}",
            )
        )
    return [
        *specs,
        FeatureSpec(
            "net_flow_imbalance",
            "((A - R) of bid - (A - R) of ask) / (A + R of both), EW16s of lots added, removed",
            CONT + ", over the whole depth",
            "[-1, 1]",
            BOOK_WARM,
            ODD,
        ),
        FeatureSpec(
            "effective_spread",
            "sq(EW32(2 sgn (price - mid)) / EW32(max(spread, 1 tick)))",
            _HUANG + "; relative to the quoted spread",
            "(-1, 1); 1/2 = trades at the touch",
            TRADE_WARM,
            EVEN,
        ),
        FeatureSpec(
            "realised_spread",
            "sq(EW32(2 sgn (price - mid 8 trades later)) / EW32(max(spread then, 1 tick)))",
            _HUANG + "; relative to the quoted spread, horizon in trades",
            "(-1, 1)",
            TRADE_WARM,
            EVEN,
        ),
    ]
