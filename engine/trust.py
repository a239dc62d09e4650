"""How far a signal can be trusted: book states, suppression reasons, precisions and numerics.

The numbers stand on the wire (``feeds/schema.xml``, message Signal): they are never reused.
"""

from __future__ import annotations

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

NO_CLASS: Final = 255


def reason_names(reasons: int) -> tuple[str, ...]:
    """Names of the bits set in a signal's reasons, lowest first."""
    return tuple(name for bit, name in REASONS if reasons & bit)
