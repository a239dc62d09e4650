"""How far a signal can be trusted: book states, suppression reasons, value checks, modes.

The numbers stand on the wire (``feeds/schema.xml``, message Signal): they are never reused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

SYNCING: Final = 0
SYNCED: Final = 1
GAP: Final = 2
STALE: Final = 3
CROSSED: Final = 4
BOOK_STATES: Final = ("SYNCING", "SYNCED", "GAP", "STALE", "CROSSED")

REASON_SYNCING: Final = 1
REASON_GAP: Final = 2
REASON_STALE: Final = 4
REASON_CROSSED: Final = 8
REASON_WARMING_UP: Final = 16
REASON_EMPTY_SIDE: Final = 32
REASON_VALUE_CHECK: Final = 64
REASON_HALTED: Final = 128
REASON_INFERENCE_FAILED: Final = 256
REASON_THROTTLED: Final = 512  # more tradable signals a second than the config allows
REASON_REPEATED: Final = 1024  # one class too often in a row; latched until armed
REASON_COLLAR: Final = 2048  # a score, or its change, beyond the collar
REASON_LATE: Final = 4096  # the inference took longer than its budget
REASONS: Final = (
    (REASON_SYNCING, "SYNCING"),
    (REASON_GAP, "GAP"),
    (REASON_STALE, "STALE"),
    (REASON_CROSSED, "CROSSED"),
    (REASON_WARMING_UP, "WARMING_UP"),
    (REASON_EMPTY_SIDE, "EMPTY_SIDE"),
    (REASON_VALUE_CHECK, "VALUE_CHECK"),
    (REASON_HALTED, "HALTED"),
    (REASON_INFERENCE_FAILED, "INFERENCE_FAILED"),
    (REASON_THROTTLED, "THROTTLED"),
    (REASON_REPEATED, "REPEATED"),
    (REASON_COLLAR, "COLLAR"),
    (REASON_LATE, "LATE"),
)

PRECISION_NONE: Final = 0
PRECISION_INT8: Final = 1
PRECISION_FP32: Final = 2
PRECISIONS: Final = ("none", "int8", "fp32")

NUMERICS_NONE: Final = 0
NUMERICS_EXACT_INT8: Final = 1
NUMERICS_TOLERANCE: Final = 2
NUMERICS: Final = ("none", "exact-int8", "tolerance")

SHADOW_OFF: Final = 0
SHADOW_AGREEING: Final = 1
SHADOW_DIVERGED: Final = 2
SHADOW_LOST: Final = 3
SHADOW_STATES: Final = ("off", "agreeing", "diverged", "lost")

# What answers.
MODE_INT8: Final = 0
MODE_FP32: Final = 1
MODE_HALTED: Final = 2
MODES: Final = ("INT8", "FP32", "HALTED")

# Bits of a signal's value check. Those from 8 on are the model's own, one a quantised layer: more
# of its codes saturated than calibration ever saw; the bundle's manifest names them.
CHECK_INPUT: Final = 1  # an input that is no finite number
CHECK_OUTPUT: Final = 2  # an output that is no finite number, or saturated
CHECK_RANGE: Final = 4  # an input far beyond anything that calibration saw
CHECK_STUCK_INPUT: Final = 8  # an input that has not changed for longer than it ever did
CHECK_STUCK_OUTPUT: Final = 16  # the same scores for different inputs, too often in a row
CHECK_LAYERS: Final = 8  # number of the first layer's bit
CHECKS_OF_INPUT: Final = CHECK_INPUT | CHECK_RANGE | CHECK_STUCK_INPUT
CHECK_NAMES: Final = (
    (CHECK_INPUT, "input not finite"),
    (CHECK_OUTPUT, "output not finite or saturated"),
    (CHECK_RANGE, "input out of range"),
    (CHECK_STUCK_INPUT, "input stuck"),
    (CHECK_STUCK_OUTPUT, "output stuck"),
)

NO_CLASS: Final = 255


def reason_names(reasons: int) -> tuple[str, ...]:
    """Names of the bits set in a signal's reasons, lowest first."""
    return tuple(name for bit, name in REASONS if reasons & bit)


def check_names(mask: int, layers: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of the bits set in a value check; ``layers`` as the bundle's manifest lists them."""
    names = [name for bit, name in CHECK_NAMES if mask & bit]
    for i in range(32 - CHECK_LAYERS):
        if mask >> (CHECK_LAYERS + i) & 1:
            names.append(f"saturated: {layers[i] if i < len(layers) else f'layer {i}'}")
    return tuple(names)
