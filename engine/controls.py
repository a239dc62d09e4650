# Hot path: free @njit functions.
"""Controls on what leaves the engine: throttles, collar, a model that gives one answer to all.

They follow regulatory practice for automated trading and are applied to signals: RTS 6
(Commission Delegated Regulation (EU) 2017/589) Article 12 (kill functionality) and Article 15
(price collars, message throttles, repeated automated execution throttles that stay shut until a
named person opens them), and SEC Rule 15c3-5 (market access).
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
import numpy as np
from msgspec import Meta

from engine.failover import FailoverConfig, Threshold
from engine.trust import (
    CHECK_STUCK_OUTPUT,
    REASON_COLLAR,
    REASON_REPEATED,
    REASON_THROTTLED,
)
from feeds.inner import inner

SECOND_NS: Final = 1_000_000_000

# Columns of `limits_i`, int64, and `limits_f`, float64. 0 turns a control off.
MAX_A_SECOND: Final = 0
MAX_REPEATS: Final = 1
STUCK_OUTPUTS: Final = 2
INPUT_RULE: Final = 3  # 1 = a rule of the failover counts inputs that no model could answer
MODEL_RULE: Final = 4  # 1 = one counts what the value check holds against the model
LIMITS_I: Final = 5
COLLAR_SCORE: Final = 0
COLLAR_CHANGE: Final = 1
DIVERGENCE: Final = 2  # of the failover: scores further apart from FP32's diverge
LIMITS_F: Final = 3

# Columns of an instrument's guard, int64.
CREDIT_NS: Final = 0  # of the throttle: a signal costs a second's share of it
CREDIT_AT: Final = 1
LAST_CLASS: Final = 2  # of the last tradable signal, -1 before the first
REPEATS: Final = 3
LATCHED: Final = 4
STUCK_RUN: Final = 5
LAST_CRC: Final = 6
SEEN: Final = 7  # 1 = the second row of scores holds a tradable signal's
GUARD_FIELDS: Final = 8


class ControlsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a signal may not exceed; 0 turns a control off.

    Attributes
    ----------
    start_halted : bool
        Nothing is tradable until a named person arms the engine.
    halt_file : str
        A file whose appearance halts the engine; "" for none.
    max_signals_per_s : int
        Tradable signals of an instrument in a second of receive time; those above are suppressed.
    max_repeats : int
        Tradable signals of an instrument in a row with one class; the next is suppressed, and all
        after it until a named person arms.
    collar_score, collar_change : float
        Greatest absolute score, and greatest change of a score since the instrument's last
        tradable signal.
    """

    start_halted: bool = False
    halt_file: str = ""
    max_signals_per_s: Threshold = 0
    max_repeats: Threshold = 0
    collar_score: Annotated[float, Meta(ge=0.0)] = 0.0
    collar_change: Annotated[float, Meta(ge=0.0)] = 0.0


def limits(controls: ControlsConfig, failover: FailoverConfig) -> tuple[np.ndarray, np.ndarray]:
    """`limits_i` and `limits_f` of a config."""
    whole = np.zeros(LIMITS_I, dtype=np.int64)
    whole[MAX_A_SECOND] = controls.max_signals_per_s
    whole[MAX_REPEATS] = controls.max_repeats
    whole[STUCK_OUTPUTS] = failover.stuck_outputs
    whole[INPUT_RULE] = failover.input_violations > 0
    whole[MODEL_RULE] = failover.violations > 0
    real = np.zeros(LIMITS_F, dtype=np.float64)
    real[COLLAR_SCORE], real[COLLAR_CHANGE] = controls.collar_score, controls.collar_change
    real[DIVERGENCE] = failover.divergence
    return whole, real


def new_guards(n: int, n_outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """State of ``n`` instruments: int64 (n, GUARD_FIELDS), float32 (n, 2, n_outputs).

    The two rows of scores are those of the last inference and of the last tradable signal.
    """
    guards = np.zeros((n, GUARD_FIELDS), dtype=np.int64)
    guards[:, CREDIT_NS] = SECOND_NS
    guards[:, LAST_CLASS] = -1
    return guards, np.zeros((n, 2, n_outputs), dtype=np.float32)


def rearm(guards: np.ndarray) -> None:
    """Open what latched."""
    guards[:, LATCHED] = 0
    guards[:, REPEATS] = 0


@inner("int64(float32[::1], int64, int64[::1], float32[:,::1], int64[::1])")
def stuck_output(outputs, crc, guard, scores, limits_i):  # type: ignore[no-untyped-def]
    """`CHECK_STUCK_OUTPUT` where different inputs have had the same scores too often in a row."""
    same = True
    for i in range(len(outputs)):
        if outputs[i] != scores[0, i]:
            same = False
        scores[0, i] = outputs[i]
    if not same:
        guard[STUCK_RUN] = 0
    elif crc != guard[LAST_CRC]:
        guard[STUCK_RUN] += 1
    guard[LAST_CRC] = crc
    if limits_i[STUCK_OUTPUTS] > 0 and guard[STUCK_RUN] >= limits_i[STUCK_OUTPUTS]:
        return CHECK_STUCK_OUTPUT
    return 0


@inner("int64(float32[::1], int64, int64, int64[::1], float32[:,::1], int64[::1], float64[::1])")
def check_controls(  # type: ignore[no-untyped-def]
    outputs, best, received_ns, guard, scores, limits_i, limits_f
):
    """Reasons to suppress a signal that nothing else speaks against; 0 lets it pass.

    A signal that passes is counted: it uses up the throttle's credit, and is what the next one's
    class and scores are held against.
    """
    if guard[LATCHED] == 1:
        return REASON_REPEATED
    score, change = limits_f[COLLAR_SCORE], limits_f[COLLAR_CHANGE]
    for i in range(len(outputs)):
        if score > 0.0 and abs(np.float64(outputs[i])) > score:
            return REASON_COLLAR
        if change > 0.0 and guard[SEEN] == 1:
            if abs(np.float64(outputs[i]) - np.float64(scores[1, i])) > change:
                return REASON_COLLAR
    if limits_i[MAX_A_SECOND] > 0:
        # A bucket that fills with time and holds one second's signals.
        passed = max(received_ns - guard[CREDIT_AT], 0)
        guard[CREDIT_AT] = max(received_ns, guard[CREDIT_AT])
        guard[CREDIT_NS] = min(guard[CREDIT_NS] + min(passed, SECOND_NS), SECOND_NS)
        cost = SECOND_NS // limits_i[MAX_A_SECOND]
        if guard[CREDIT_NS] < cost:
            return REASON_THROTTLED
        guard[CREDIT_NS] -= cost
    guard[REPEATS] = guard[REPEATS] + 1 if best == guard[LAST_CLASS] else 1
    guard[LAST_CLASS] = best
    if limits_i[MAX_REPEATS] > 0 and guard[REPEATS] > limits_i[MAX_REPEATS]:
        guard[LATCHED] = 1
        return REASON_REPEATED
    guard[SEEN] = 1
    for i in range(len(outputs)):
        scores[1, i] = outputs[i]
    return 0
