"""Any message of the wire as plain names and values, for people and for JSON."""

from __future__ import annotations

import struct
from typing import Any, Final

import numpy as np

from feeds import codec, wire
from feeds.errors import InputError

NAMES: Final = {
    wire.INSTRUMENT: "Instrument",
    wire.SNAPSHOT: "Snapshot",
    wire.DELTA: "Delta",
    wire.TRADE: "Trade",
    wire.HEARTBEAT: "Heartbeat",
    wire.SNAPSHOT_REQUEST: "SnapshotRequest",
    wire.REJECT: "Reject",
    wire.TIMER: "Timer",
    wire.CONTROL: "Control",
    wire.SHADOW_ANSWER: "ShadowAnswer",
    wire.SIGNAL: "Signal",
    wire.ENGINE_STATE: "EngineState",
    wire.ALERT: "Alert",
}
BLOCKS: Final = {
    wire.INSTRUMENT: wire.INSTRUMENT_DTYPE,
    wire.SNAPSHOT: wire.PREFIX_DTYPE,
    wire.DELTA: wire.PREFIX_DTYPE,
    wire.TRADE: wire.TRADE_DTYPE,
    wire.HEARTBEAT: wire.PREFIX_DTYPE,
    wire.SNAPSHOT_REQUEST: np.dtype([("venue", "S16"), ("symbol", "S32")]),
    wire.REJECT: wire.REJECT_DTYPE,
    wire.TIMER: np.dtype([("now_ns", "<i8")]),
    wire.CONTROL: wire.CONTROL_DTYPE,
    wire.SHADOW_ANSWER: wire.SHADOW_ANSWER_DTYPE,
    wire.SIGNAL: wire.SIGNAL_DTYPE,
    wire.ENGINE_STATE: wire.ENGINE_STATE_DTYPE,
    wire.ALERT: wire.ALERT_DTYPE,
}
_HEX: Final = frozenset({"model_hash", "config_hash", "feature_hash", "code_hash"})


def field_offset(dtype: np.dtype, name: str) -> int:
    """Where a field of a block stands, counted from the message's first byte."""
    fields = dtype.fields
    assert fields is not None, "a dtype without fields"
    return wire.HEADER_BYTES + int(fields[name][1])


def template_name(template: int) -> str:
    """``Delta`` for 3; ``template 99`` for what the schema does not know."""
    return NAMES.get(template, f"template {template}")


def describe(message: bytes | memoryview) -> dict[str, Any]:
    """Fields of a message by name, under ``message`` the name of its template.

    Levels are ``[price_ticks, quantity_lots]``, hashes 16 hex digits, an output that is no number
    is None. What the schema does not know, or what is cut short, is given as hex under ``bytes``.
    """
    data = bytes(message)
    template = codec.template_id(data)
    dtype = BLOCKS.get(template)
    out: dict[str, Any] = {"message": template_name(template)}
    try:
        if dtype is None:
            raise InputError("unknown template", where="wire", found=str(template))
        block = codec.decode_block(data, dtype)
        for name in dtype.names or ():
            if not name.startswith("padding"):
                out[name] = _plain(name, block[name].item())
        if template in (wire.SNAPSHOT, wire.DELTA):
            bids, asks = codec.decode_levels(data)
            out["bids"] = [list(level) for level in bids.tolist()]
            out["asks"] = [list(level) for level in asks.tolist()]
        elif template == wire.SIGNAL:
            out["outputs"] = _numbers(codec.decode_floats(data, 1)[0])
        elif template == wire.SHADOW_ANSWER:
            fp32, int8 = codec.decode_floats(data, 2)
            out["fp32"], out["int8"] = _numbers(fp32), _numbers(int8)
    except (InputError, AssertionError, ValueError, struct.error):
        return {"message": out["message"], "bytes": data.hex()}
    return out


def _numbers(values: np.ndarray) -> list[float | None]:
    return [value if value == value else None for value in values.tolist()]


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("ascii", "replace")
    return f"{value:016x}" if name in _HEX else value


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Fields in which two descriptions differ: (name, in a, in b), lists entry by entry."""
    found: list[tuple[str, Any, Any]] = []
    for name in dict.fromkeys((*a, *b)):
        left, right = a.get(name), b.get(name)
        if left == right:
            continue
        if isinstance(left, list) and isinstance(right, list):
            for i in range(max(len(left), len(right))):
                one = left[i] if i < len(left) else None
                other = right[i] if i < len(right) else None
                if one != other:
                    found.append((f"{name}[{i}]", one, other))
        else:
            found.append((name, left, right))
    return found
