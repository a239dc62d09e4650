"""The engine's own messages: its state once a second, and alerts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from feeds import codec, wire

STATE_TOPIC: Final = b"state.engine"
ALERT_TOPIC: Final = b"alert.engine"  # what is about no single instrument

INFO: Final = 1
WARNING: Final = 2
CRITICAL: Final = 3


def encode_state(values: Mapping[str, float]) -> bytes:
    """An EngineState; ``values`` names every field of `feeds.wire.ENGINE_STATE_DTYPE`."""
    block = np.zeros(1, dtype=wire.ENGINE_STATE_DTYPE)
    for name in wire.ENGINE_STATE_DTYPE.names or ():
        if not name.startswith("padding"):
            block[name] = values[name]
    return codec.header(wire.ENGINE_STATE, wire.ENGINE_STATE_BLOCK) + block.tobytes()


def encode_alert(
    engine_epoch: int, seq: int, now_ns: int, venue: str, symbol: str, severity: int, text: str
) -> bytes:
    """An Alert; the text is cut at 128 characters."""
    block = np.zeros(1, dtype=wire.ALERT_DTYPE)
    block["engine_epoch"] = engine_epoch
    block["seq"] = seq
    block["now_ns"] = now_ns
    block["venue"] = venue.encode()
    block["symbol"] = symbol.encode()
    block["severity"] = severity
    block["text"] = text.encode("ascii", "replace")[:128]
    return codec.header(wire.ALERT, wire.ALERT_BLOCK) + block.tobytes()
