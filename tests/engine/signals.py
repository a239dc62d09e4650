"""Signals made by hand, for tests of the publisher and the client."""

from __future__ import annotations

from typing import Any

import numpy as np

from feeds import codec, wire

EPOCH = 1_700_000_000_000_000_000


def encode_signal(
    seq: int,
    *,
    venue: str = "sim",
    symbol: str = "ALPHA",
    epoch: int = EPOCH,
    outputs: tuple[float, ...] = (0.25, 0.5, -1.0),
    block: int = wire.SIGNAL_BLOCK,
    **fields: Any,
) -> bytes:
    """The bytes of one Signal; ``fields`` overrides any field of ``wire.SIGNAL_DTYPE``."""
    record = np.zeros(1, dtype=wire.SIGNAL_DTYPE)
    record["venue"], record["symbol"] = venue.encode(), symbol.encode()
    record["signal_seq"], record["engine_epoch"] = seq, epoch
    record["book_state"], record["warm"], record["precision"], record["numerics"] = 1, 1, 1, 1
    record["backend"] = b"onnx"
    for name, value in fields.items():
        record[name] = value
    body = record.tobytes().ljust(block, b"\7")
    group = len(outputs).to_bytes(2, "little")
    return (
        codec.header(wire.SIGNAL, block)
        + body
        + wire.OUTPUT_BYTES.to_bytes(2, "little")
        + group
        + np.array(outputs, dtype="<f4").tobytes()
    )


def encode_state(seq: int, *, epoch: int = EPOCH, **fields: Any) -> bytes:
    """The bytes of one EngineState."""
    record = np.zeros(1, dtype=wire.ENGINE_STATE_DTYPE)
    record["engine_epoch"], record["seq"] = epoch, seq
    for name, value in fields.items():
        record[name] = value
    return codec.header(wire.ENGINE_STATE, wire.ENGINE_STATE_BLOCK) + record.tobytes()


def encode_alert(seq: int, text: str, *, epoch: int = EPOCH, **fields: Any) -> bytes:
    """The bytes of one Alert."""
    record = np.zeros(1, dtype=wire.ALERT_DTYPE)
    record["engine_epoch"], record["seq"], record["text"] = epoch, seq, text.encode()
    record["severity"] = 2
    for name, value in fields.items():
        record[name] = value
    return codec.header(wire.ALERT, wire.ALERT_BLOCK) + record.tobytes()
