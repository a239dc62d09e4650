"""Every rule that a signal had to pass, in the order in which the engine asks, one line each."""

from __future__ import annotations

from typing import Final, Literal

import msgspec
import numpy as np

from engine import controls, trust
from engine.bundle import Bundle
from engine.config import Config
from engine.feature_specs import NAMES
from engine.feature_state import WARM_BOOK_UPDATES, WARM_TRADES
from replay.moment import Moment

Outcome = Literal["passed", "failed", "off", "not reached"]

_BOOK_REASONS: Final = (
    trust.REASON_SYNCING | trust.REASON_GAP | trust.REASON_STALE | trust.REASON_CROSSED
)
_CONTROL_REASONS: Final = trust.REASON_THROTTLED | trust.REASON_REPEATED | trust.REASON_COLLAR
_OF_OUTPUT: Final = (trust.CHECK_OUTPUT, trust.CHECK_STUCK_OUTPUT)
LAST_BIT: Final = 31  # which the layers that have none of their own share
_CHECKS: Final = dict(trust.CHECK_NAMES)


class Rule(msgspec.Struct, frozen=True):
    """One rule.

    Attributes
    ----------
    name : str
    outcome : str
        "passed", "failed", "off" where the config does not ask for it, or "not reached" where
        something before it had decided.
    saw : str
        The figure it saw, and the limit.
    """

    name: str
    outcome: Outcome
    saw: str


def rules(moment: Moment, config: Config) -> list[Rule]:
    """What each rule said of a signal."""
    return [
        *_book(moment, config),
        *_inputs(moment),
        *_inference(moment, config),
        *_outputs(moment, config),
        *_controls(moment, config),
    ]


def unclipped(moment: Moment, bundle: Bundle) -> np.ndarray:
    """Normalised features before the clip, which is what their bounds are held against."""
    with np.errstate(invalid="ignore", over="ignore"):
        values: np.ndarray = (moment.vector - bundle.mean) * bundle.inv_scale
    return values


def _judged(failed: bool | int) -> Outcome:
    return "failed" if failed else "passed"


def _reasons(moment: Moment) -> int:
    return int(moment.signal["reasons"])


def _book(moment: Moment, config: Config) -> list[Rule]:
    signal, reasons = moment.signal, _reasons(moment)
    state = int(signal["book_state"])
    saw = f"{trust.BOOK_STATES[state]}, message {signal['last_seq']} of epoch "
    saw += f"{signal['source_epoch']}; {moment.gaps} gaps and {moment.lost} lost before"
    if state == trust.CROSSED:
        saw += f"; bid {signal['best_bid_ticks']}, ask {signal['best_ask_ticks']}"
    age_ns = int(signal["received_ns"]) - moment.last_received_ns
    limit_ns = config.trust.stale_after_ns
    return [
        Rule("book state", _judged(reasons & _BOOK_REASONS), saw),
        Rule(
            "stale data",
            _judged(reasons & trust.REASON_STALE),
            f"{age_ns / 1e6:,.3f} ms old, at most {limit_ns / 1e6:,g} ms"
            if moment.last_received_ns
            else "nothing received yet",
        ),
        Rule(
            "warm-up",
            _judged(reasons & trust.REASON_WARMING_UP),
            f"{moment.book_updates} book updates of {WARM_BOOK_UPDATES}, "
            f"{moment.trades} trades of {WARM_TRADES}",
        ),
        Rule(
            "empty side",
            _judged(reasons & trust.REASON_EMPTY_SIDE),
            f"{len(moment.bids)} bid levels, {len(moment.asks)} ask levels",
        ),
    ]


def _inputs(moment: Moment) -> list[Rule]:
    """The value check of the inputs, each bit by its name."""
    names = [_check(bit) for bit in (trust.CHECK_INPUT, trust.CHECK_RANGE, trust.CHECK_STUCK_INPUT)]
    bundle = moment.bundle
    if bundle is None or not moment.computed:
        return [Rule(name, "not reached", "no features were computed") for name in names]
    mask = int(moment.signal["value_check"])
    z = unclipped(moment, bundle)
    n = len(z)
    finite = np.isfinite(z)
    bad = [NAMES[i] for i in np.flatnonzero(~finite)]
    bound = np.broadcast_to(np.asarray(bundle.input_bound, dtype=np.float64), n)
    share = np.where(finite, np.abs(z) / bound, 0.0)
    worst = int(np.argmax(share))
    longest = np.broadcast_to(np.asarray(bundle.max_constant, dtype=np.float64), n)
    watched = longest > 0.0
    run = np.divide(moment.run, longest, out=np.zeros(n), where=watched)
    stuck = int(np.argmax(run))
    return [
        Rule(
            names[0],
            _judged(mask & trust.CHECK_INPUT),
            f"{', '.join(bad)}" if bad else f"all {n} are finite",
        ),
        Rule(
            names[1],
            _judged(mask & trust.CHECK_RANGE) if np.isfinite(bound).any() else "off",
            f"nearest its bound: {NAMES[worst]} at {z[worst]:.4g}, bound {bound[worst]:.4g}"
            if np.isfinite(bound).any()
            else "no bound in the bundle",
        ),
        Rule(
            names[2],
            _judged(mask & trust.CHECK_STUCK_INPUT) if watched.any() else "off",
            f"longest for its limit: {NAMES[stuck]}, {moment.run[stuck]:.0f} inputs the same, "
            f"limit {longest[stuck]:.0f}"
            if watched.any()
            else "no limit in the bundle",
        ),
    ]


def _check(bit: int) -> str:
    return f"value check: {_CHECKS[bit]}"


def _inference(moment: Moment, config: Config) -> list[Rule]:
    budget_ns = config.failover.inference_budget_ns
    if not moment.inferred:
        why = "no inference"
        return [Rule("inference", "not reached", why), Rule("late", "not reached", why)]
    failed = _reasons(moment) & trust.REASON_INFERENCE_FAILED
    what = "the model gave an error" if failed else f"{trust.MODES[moment.serving]} answered"
    if moment.late_ns:
        took = f"{moment.late_ns:,} ns"
    else:
        took = "the tape tells of none" if budget_ns else "no budget"
    return [
        Rule("inference", _judged(failed), what),
        Rule(
            "late",
            _judged(_reasons(moment) & trust.REASON_LATE) if budget_ns else "off",
            f"{took}, budget {budget_ns:,} ns" if budget_ns else took,
        ),
    ]


def _outputs(moment: Moment, config: Config) -> list[Rule]:
    """The value check of the outputs and of each layer, by name."""
    layers = [f"value check: saturated: {name}" for name in moment.layers]
    names = [_check(bit) for bit in _OF_OUTPUT]
    scores = moment.scores
    if scores is None:
        return [Rule(name, "not reached", "no scores") for name in (*names, *layers)]
    mask = int(moment.signal["value_check"])
    limit = config.failover.stuck_outputs
    run = int(moment.guard[controls.STUCK_RUN])
    found = [
        Rule(
            names[0],
            _judged(mask & trust.CHECK_OUTPUT),
            " ".join(f"{score:+.5g}" for score in scores.tolist()),
        ),
        Rule(
            names[1],
            _judged(mask & trust.CHECK_STUCK_OUTPUT) if limit else "off",
            f"{run} times the same for other inputs, limit {limit or 'none'}",
        ),
    ]
    for i, name in enumerate(layers):
        if moment.serving != trust.MODE_INT8:
            found.append(Rule(name, "not reached", f"{trust.MODES[moment.serving]} answered"))
            continue
        bit = mask >> min(trust.CHECK_LAYERS + i, LAST_BIT) & 1
        saw = "more codes saturated than calibration saw" if bit else "as in calibration"
        found.append(Rule(name, _judged(bit), saw))
    return found


def _controls(moment: Moment, config: Config) -> list[Rule]:
    """Halted, and what is asked of a signal that nothing else speaks against, in that order."""
    reasons = _reasons(moment)
    halted = reasons & trust.REASON_HALTED
    saw = f"{trust.MODES[moment.mode]}" + (f", {moment.halted_why}" if halted else "")
    found = [Rule("halted", _judged(halted), saw)]
    wanted = config.controls
    before, guard = moment.guard_before, moment.guard
    latched = bool(before[controls.LATCHED])
    per_s = wanted.max_signals_per_s
    # `engine.controls.check_controls` stops at the first reason.
    reached = not reasons & ~_CONTROL_REASONS
    for name, bit, on, saw in (
        (
            "repeats latched",
            trust.REASON_REPEATED if latched else 0,
            wanted.max_repeats > 0,
            "shut until armed" if latched else "open",
        ),
        (
            "collar",
            trust.REASON_COLLAR,
            wanted.collar_score > 0.0 or wanted.collar_change > 0.0,
            _collar(moment, wanted),
        ),
        (
            "throttle",
            trust.REASON_THROTTLED,
            per_s > 0,
            f"credit for {_credit(moment, per_s):.2f} signals, {per_s} a second",
        ),
        (
            "repeats",
            trust.REASON_REPEATED,
            wanted.max_repeats > 0,
            f"{guard[controls.REPEATS]} in a row of class {guard[controls.LAST_CLASS]}, "
            f"at most {wanted.max_repeats}",
        ),
    ):
        if not on:
            found.append(Rule(name, "off", "no limit in the config"))
            continue
        if not reached:
            found.append(Rule(name, "not reached", "decided before"))
            continue
        failed = reasons & bit
        found.append(Rule(name, _judged(failed), saw))
        reached = not failed
    return found


def _collar(moment: Moment, wanted: controls.ControlsConfig) -> str:
    scores = moment.scores
    if scores is None or not len(scores):
        return "no scores"
    parts = []
    if wanted.collar_score > 0.0:
        parts.append(f"score {np.abs(scores).max():.4g}, at most {wanted.collar_score:g}")
    if wanted.collar_change > 0.0:
        if moment.guard_before[controls.SEEN]:
            change = np.abs(scores.astype(np.float64) - moment.scores_before[1]).max()
            parts.append(f"change {change:.4g}, at most {wanted.collar_change:g}")
        else:
            parts.append(f"nothing to change from, at most {wanted.collar_change:g}")
    return "; ".join(parts)


def _credit(moment: Moment, per_s: int) -> float:
    """How many signals the throttle would have let pass just then."""
    if per_s == 0:
        return 0.0
    before = moment.guard_before
    passed = max(int(moment.signal["received_ns"]) - int(before[controls.CREDIT_AT]), 0)
    credit = min(int(before[controls.CREDIT_NS]) + passed, controls.SECOND_NS)
    return credit / (controls.SECOND_NS // per_s)
