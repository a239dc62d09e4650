"""Events about trust: what a person commanded, what the shadow answered, what the clock told.

They stand on the tape among the market data, in the order in which the engine took them, and
nothing else moves the engine between INT8, FP32 and HALTED. So a replay moves where the live
session moved.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from feeds import codec, wire
from feeds.errors import InputError

# Commands of a person. The numbers stand on the wire: they are never reused.
HALT: Final = 1
ARM: Final = 2
DEMOTE: Final = 3
PROMOTE: Final = 4
SWAP: Final = 5
ROLLBACK: Final = 6
# What the engine saw of itself outside its events.
SHADOW_UP: Final = 16
SHADOW_LOST: Final = 17
INFERENCE_LATE: Final = 18
DRIFT: Final = 19
SWAP_REFUSED: Final = 20
RECALIBRATION: Final = 21
CONFLATION: Final = 22

COMMAND_NAMES: Final = {
    HALT: "halt",
    ARM: "arm",
    DEMOTE: "demote",
    PROMOTE: "promote",
    SWAP: "swap",
    ROLLBACK: "rollback",
    SHADOW_UP: "shadow up",
    SHADOW_LOST: "shadow lost",
    INFERENCE_LATE: "inference late",
    DRIFT: "drift",
    SWAP_REFUSED: "swap refused",
    RECALIBRATION: "recalibration",
    CONFLATION: "conflation",
}

SETTLING: Final = 1  # flag of an answer: the shadow's model state is too young to judge by

MAX_BY: Final = 32
MAX_TEXT: Final = 256

_CONTROL: Final = struct.Struct("<qqQQB7x16s32s32s256s")
_ANSWER: Final = struct.Struct("<QQ16s32sI4x")
assert _CONTROL.size == wire.CONTROL_BLOCK
assert _ANSWER.size == wire.SHADOW_ANSWER_BLOCK

# Offsets in a ShadowAnswer.
AT_TICKET: Final = wire.HEADER_BYTES
AT_SEQ: Final = AT_TICKET + 8
AT_FLAGS: Final = AT_SEQ + 8 + 16 + 32  # behind venue and symbol
AT_GROUPS: Final = wire.HEADER_BYTES + wire.SHADOW_ANSWER_BLOCK  # FP32's scores, then INT8's


class Control(NamedTuple):
    """One command or observation.

    Attributes
    ----------
    command : int
        `HALT` to `CONFLATION`.
    now_ns : int
        When, by the engine's clock, ns since the UNIX epoch.
    by : str
        Who asked: a person's name, or what of the engine.
    text : str
        Why; of a swap or rollback the bundle's folder.
    value : int
        Of a late inference, nanoseconds it took; of a drift, rows observed; of conflation, the
        nanoseconds of market time between two signals of an instrument from here on, 0 to end it.
    model_hash : int
        Of a swap or rollback: the model to serve.
    signal_seq, venue, symbol : int, str, str
        Of a late inference: the signal that it was for. Empty for the whole engine.
    """

    command: int
    now_ns: int
    by: str = ""
    text: str = ""
    value: int = 0
    model_hash: int = 0
    signal_seq: int = 0
    venue: str = ""
    symbol: str = ""

    def encode(self) -> bytes:
        """The SBE message; ``text`` is cut at `MAX_TEXT`."""
        return codec.header(wire.CONTROL, wire.CONTROL_BLOCK) + _CONTROL.pack(
            self.now_ns,
            self.value,
            self.model_hash,
            self.signal_seq,
            self.command,
            self.venue.encode(),
            self.symbol.encode(),
            self.by.encode("ascii", "replace"),
            self.text.encode("ascii", "replace"),
        )


class ShadowAnswer(NamedTuple):
    """Both models' scores for one inference, computed beside the hot path.

    Attributes
    ----------
    ticket : int
        Which inference, counted from 1.
    signal_seq, venue, symbol : int, str, str
        The signal it was for.
    flags : int
        `SETTLING` or 0.
    fp32, int8 : ndarray of float32, shape (classes,)
    """

    ticket: int
    signal_seq: int
    venue: str
    symbol: str
    flags: int
    fp32: np.ndarray
    int8: np.ndarray

    def encode(self) -> bytes:
        """The SBE message."""
        block = _ANSWER.pack(
            self.ticket, self.signal_seq, self.venue.encode(), self.symbol.encode(), self.flags
        )
        return (
            codec.header(wire.SHADOW_ANSWER, wire.SHADOW_ANSWER_BLOCK)
            + block
            + codec.encode_floats(self.fp32)
            + codec.encode_floats(self.int8)
        )


def answer_templates(names: Sequence[tuple[str, str]], n_outputs: int) -> np.ndarray:
    """A ShadowAnswer of each instrument, to be filled in: uint8 of shape (names, bytes)."""
    scores = np.zeros(n_outputs, dtype=np.float32)
    messages = [ShadowAnswer(0, 0, *name, 0, scores, scores).encode() for name in names]
    return np.frombuffer(b"".join(messages), dtype=np.uint8).reshape(len(names), -1).copy()


def decode_event(message: bytes) -> Control | ShadowAnswer:
    """The event of a CONTROL or SHADOW record.

    Raises
    ------
    InputError
        If it is neither, or cut short.
    """
    template = codec.template_id(message)
    block = int.from_bytes(message[:2], "little")
    try:
        if template == wire.CONTROL and block >= wire.CONTROL_BLOCK:
            now_ns, value, model_hash, signal_seq, command, venue, symbol, by, text = (
                _CONTROL.unpack_from(message, wire.HEADER_BYTES)
            )
            return Control(
                command,
                now_ns,
                _text(by),
                _text(text),
                value,
                model_hash,
                signal_seq,
                _text(venue),
                _text(symbol),
            )
        if template == wire.SHADOW_ANSWER and block >= wire.SHADOW_ANSWER_BLOCK:
            ticket, signal_seq, venue, symbol, flags = _ANSWER.unpack_from(
                message, wire.HEADER_BYTES
            )
            fp32, int8 = codec.decode_floats(message, 2)
            return ShadowAnswer(ticket, signal_seq, _text(venue), _text(symbol), flags, fp32, int8)
    except (struct.error, ValueError):
        pass
    raise InputError(
        "a trust event that cannot be read",
        where="tape record of kind control or shadow",
        expected="a Control or a ShadowAnswer",
        found=f"template {template}, {len(message)} bytes",
        fix="run 'octick tape verify', and replay with the version that recorded it",
    )


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode("ascii", "replace")
