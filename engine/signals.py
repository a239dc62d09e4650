# Hot path: free @njit functions.
"""The bytes of a Signal: a template for each instrument, completed in place for each signal."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import njit

from engine.controls import check_controls, stuck_output
from engine.trust import (
    CHECK_OUTPUT,
    NO_CLASS,
    NUMERICS_NONE,
    PRECISION_NONE,
    REASON_VALUE_CHECK,
)
from feeds import codec, wire
from feeds.rawbytes import store_f32, store_i64, store_u8, store_u16, store_u32

# Offsets from the message's first byte; the schema's plus the 8 bytes of the SBE header.
_AT: Final = {
    name: wire.HEADER_BYTES + field[1] for name, field in (wire.SIGNAL_DTYPE.fields or {}).items()
}
AT_SIGNAL_SEQ: Final = _AT["signal_seq"]
AT_SOURCE_EPOCH: Final = _AT["source_epoch"]
AT_FIRST_SEQ: Final = _AT["first_seq"]
AT_LAST_SEQ: Final = _AT["last_seq"]
AT_EXCHANGE_TIME: Final = _AT["exchange_time_ns"]
AT_BOOK_STATE: Final = _AT["book_state"]
AT_WARM: Final = _AT["warm"]
AT_PRECISION: Final = _AT["precision"]
AT_NUMERICS: Final = _AT["numerics"]
AT_SHADOW_STATE: Final = _AT["shadow_state"]
AT_PREDICTED_CLASS: Final = _AT["predicted_class"]
AT_REASONS: Final = _AT["reasons"]
AT_VALUE_CHECK: Final = _AT["value_check"]
AT_BEST_BID: Final = _AT["best_bid_ticks"]
AT_BEST_ASK: Final = _AT["best_ask_ticks"]
AT_MODEL_HASH: Final = _AT["model_hash"]
AT_INPUT_CRC: Final = _AT["input_crc"]
AT_RECEIVED: Final = _AT["received_ns"]
AT_EMITTED: Final = _AT["emitted_ns"]
AT_SOURCE_TIME: Final = _AT["source_time_ns"]
AT_OUTPUTS: Final = wire.HEADER_BYTES + wire.SIGNAL_BLOCK + wire.GROUP_HEADER_BYTES

# Columns of the facts that the pipeline hands over for one signal, int64.
FACT_SIGNAL_SEQ: Final = 0
FACT_EPOCH: Final = 1
FACT_FIRST_SEQ: Final = 2
FACT_LAST_SEQ: Final = 3
FACT_EXCHANGE_TIME: Final = 4
FACT_SOURCE_TIME: Final = 5
FACT_BOOK_STATE: Final = 6
FACT_WARM: Final = 7
FACT_REASONS: Final = 8
FACT_VALUE_CHECK: Final = 9
FACT_BEST_BID: Final = 10
FACT_BEST_ASK: Final = 11
FACT_INPUT_CRC: Final = 12
FACT_RECEIVED: Final = 13
FACT_FIELDS: Final = 14


def signal_template(
    venue: str,
    symbol: str,
    n_outputs: int,
    *,
    model_hash: int,
    config_hash: int,
    feature_hash: int,
    code_hash: int,
    engine_epoch: int,
    backend: str,
) -> np.ndarray:
    """Bytes of a Signal with everything in it that does not change from one to the next.

    Returns
    -------
    ndarray of uint8, shape (AT_OUTPUTS + 4 * n_outputs,)
    """
    block = np.zeros(1, dtype=wire.SIGNAL_DTYPE)
    block["venue"] = codec.ascii_field(venue, 16, "venue")
    block["symbol"] = codec.ascii_field(symbol, 32, "symbol")
    block["model_hash"] = model_hash
    block["config_hash"] = config_hash
    block["feature_hash"] = feature_hash
    block["code_hash"] = code_hash
    block["engine_epoch"] = engine_epoch
    block["backend"] = codec.ascii_field(backend, 16, "backend")
    group = wire.OUTPUT_BYTES.to_bytes(2, "little") + n_outputs.to_bytes(2, "little")
    data = codec.header(wire.SIGNAL, wire.SIGNAL_BLOCK) + block.tobytes() + group
    data += bytes(wire.OUTPUT_BYTES * n_outputs)
    return np.frombuffer(data, dtype=np.uint8).copy()


def set_model_hash(message: np.ndarray, model_hash: int) -> None:
    """Let a template name another model."""
    message[AT_MODEL_HASH : AT_MODEL_HASH + 8] = np.frombuffer(
        model_hash.to_bytes(8, "little"), dtype=np.uint8
    )


@njit(
    "int64(uint8[::1], int64[::1], float32[::1], int64, int64, int64, int64, int64, int64,"
    " int64[::1], float32[:,::1], int64[::1], float64[::1])",
    cache=True,
)
def encode_signal(  # type: ignore[no-untyped-def]
    out, facts, outputs, mask, blocked, precision, numerics, shadow_state, emitted_ns, guard,
    scores, limits_i, limits_f,
):  # fmt: skip
    """Complete a template with the facts and the model's outputs.

    A signal with any reason against it gets NaN outputs and no class: no number that anybody
    could trade on. An output that is no finite number is such a reason.

    Parameters
    ----------
    mask : int
        The value check of the model's own graph.
    blocked : int
        Reasons from outside: halted, late.
    guard, scores, limits_i, limits_f : ndarray
        See `engine.controls`.

    Returns
    -------
    int
        The reasons: 0 for a tradable signal. ``facts`` then has the whole value check.
    """
    reasons = facts[FACT_REASONS]
    n = len(outputs)
    best: Any = np.int64(0)
    if reasons == 0:
        for i in range(n):
            if not np.isfinite(outputs[i]):
                mask |= CHECK_OUTPUT
            elif outputs[i] > outputs[best]:
                best = i
        if n > 0:
            mask |= stuck_output(outputs, facts[FACT_INPUT_CRC], guard, scores, limits_i)
        facts[FACT_VALUE_CHECK] |= mask
        if mask != 0:
            reasons = REASON_VALUE_CHECK
    reasons |= blocked
    if reasons == 0:
        reasons = check_controls(
            outputs, best, facts[FACT_RECEIVED], guard, scores, limits_i, limits_f
        )
    if reasons != 0:
        best = NO_CLASS
        precision = PRECISION_NONE
        numerics = NUMERICS_NONE
        for i in range(n):
            store_f32(out, AT_OUTPUTS + 4 * i, np.float32(np.nan))
    else:
        for i in range(n):
            store_f32(out, AT_OUTPUTS + 4 * i, outputs[i])
    store_i64(out, AT_SIGNAL_SEQ, facts[FACT_SIGNAL_SEQ])
    store_i64(out, AT_SOURCE_EPOCH, facts[FACT_EPOCH])
    store_i64(out, AT_FIRST_SEQ, facts[FACT_FIRST_SEQ])
    store_i64(out, AT_LAST_SEQ, facts[FACT_LAST_SEQ])
    store_i64(out, AT_EXCHANGE_TIME, facts[FACT_EXCHANGE_TIME])
    store_i64(out, AT_SOURCE_TIME, facts[FACT_SOURCE_TIME])
    store_u8(out, AT_BOOK_STATE, facts[FACT_BOOK_STATE])
    store_u8(out, AT_WARM, facts[FACT_WARM])
    store_u8(out, AT_PRECISION, precision)
    store_u8(out, AT_NUMERICS, numerics)
    store_u8(out, AT_SHADOW_STATE, shadow_state)
    store_u8(out, AT_PREDICTED_CLASS, best)
    store_u16(out, AT_REASONS, reasons)
    store_u32(out, AT_VALUE_CHECK, facts[FACT_VALUE_CHECK])
    store_i64(out, AT_BEST_BID, facts[FACT_BEST_BID])
    store_i64(out, AT_BEST_ASK, facts[FACT_BEST_ASK])
    store_u32(out, AT_INPUT_CRC, facts[FACT_INPUT_CRC])
    store_i64(out, AT_RECEIVED, facts[FACT_RECEIVED])
    store_i64(out, AT_EMITTED, emitted_ns)
    return reasons
