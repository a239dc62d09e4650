"""Which features each stage of the feature kernels makes or keeps something for.

A stage of `engine.features.compute` makes the features it is listed with, and but for the
logarithms, made in two stages, no other stage makes them; `clock_decays` alone serves others. A
stage of an update keeps state that several features read: those that warm up on such updates, or
whose formula in the catalogue has what the stage keeps. What it costs belongs to all of them
together and cannot be divided.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

import msgspec

from engine.feature_specs import NAMES, SPECS, FeatureSpec
from engine.feature_state import TRADES

UPDATE: Final = "update"
COMPUTE: Final = "compute"
_CLOCK: Final = re.compile(r"EW(1|4|16)s")
_SCALE: Final = re.compile(r"\b(mid|move|best bid)\b|(spread|size|width|move)'")


class Stage(msgspec.Struct, frozen=True):
    """A stage and what it is there for.

    Attributes
    ----------
    name : str
        The kernel, as in `benchmarks.feature_kernels.STAGES`.
    part : str
        "update" (of the state) or "compute" (of the vector).
    features : tuple of str
        A stage of "compute" makes them; one of "update" keeps something that they read.
    within : tuple of str
        The stages whose time this one's is a part of; empty where it stands for itself.
    """

    name: str
    part: str
    features: tuple[str, ...]
    within: tuple[str, ...] = ()


def _between(first: str, after: str | None) -> tuple[str, ...]:
    return NAMES[NAMES.index(first) : len(NAMES) if after is None else NAMES.index(after)]


def _those(good: Callable[[FeatureSpec], object]) -> tuple[str, ...]:
    return tuple(spec.name for spec in SPECS if good(spec))


def _starting(*starts: str) -> tuple[str, ...]:
    return tuple(name for name in NAMES if name.startswith(starts))


_LOGS: Final = _between("spread_ticks", "jump_share_16s")
# Sums that the clock decays, wherever a formula has one.
_DECAYED: Final = _those(lambda spec: _CLOCK.search(spec.formula))
# What is left of two such sums cancels out of a ratio of nothing but them.
_AGED: Final = tuple(name for name in _DECAYED if not name.startswith(("cancel_", "net_flow")))
_MEASURED: Final = _those(
    lambda spec: _SCALE.search(spec.formula) or spec.name == "queue_imbalance_1"
)

TABLE: Final[tuple[Stage, ...]] = (
    Stage("on_book", UPDATE, _those(lambda spec: spec.warmup[1] != TRADES)),
    Stage("_advance", UPDATE, _DECAYED, ("on_book", "on_trade")),
    Stage("_follow_side bid", UPDATE, _starting("bid_", "ofi_", "queue_"), ("on_book",)),
    Stage("_follow_side ask", UPDATE, _starting("ask_", "ofi_", "queue_"), ("on_book",)),
    Stage("_measure", UPDATE, _MEASURED, ("on_book",)),
    Stage("_learn_microprice", UPDATE, ("microprice",), ("on_book",)),
    Stage("on_trade", UPDATE, _those(lambda spec: spec.warmup[1] == TRADES)),
    Stage("_fill_buckets", UPDATE, ("vpin",), ("on_trade",)),
    Stage("clock_decays", COMPUTE, _AGED),
    Stage("_stage_logs", COMPUTE, _LOGS),
    Stage("_put_quotients", COMPUTE, _between("queue_imbalance_1", "spread_ticks")),
    Stage("_put_flow", COMPUTE, _starting("ofi_"), ("_put_quotients",)),
    Stage("_put_momentum", COMPUTE, _starting("momentum_"), ("_put_quotients",)),
    Stage("_put_slope", COMPUTE, ("bid_slope", "ask_slope"), ("_put_quotients",)),
    Stage("_put_logs", COMPUTE, _LOGS),
    Stage("_put_ratios", COMPUTE, _between("jump_share_16s", None)),
    Stage("_put_block", COMPUTE, NAMES[: NAMES.index("queue_imbalance_1")]),
)

# Groups of the catalogue and the stages that together make each of them, and nothing else.
GROUPS: Final[dict[str, tuple[str, ...]]] = {
    "book block": ("_put_block",),
    "prices, flow, momentum, shape": ("_put_quotients",),
    "logarithms": ("_stage_logs", "_put_logs"),
    "ratios": ("_put_ratios",),
}
