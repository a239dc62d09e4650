"""What an engine publishes, as objects: `Signal`, `EngineState`, `Alert`."""

from __future__ import annotations

import math
import struct
from typing import Any, ClassVar, Final

import msgspec
import numpy as np

from engine import trust
from feeds import wire

SEVERITIES: Final = ("none", "info", "warning", "critical")

_HEADER: Final = struct.Struct("<HHHH")
_GROUP: Final = struct.Struct("<HH")
_SIGNAL: Final = struct.Struct("<16s32sQQQQqBBBBBBHI4xqqQQQI4xQQqqq16s")
_STATE: Final = struct.Struct("<QQqQQQQQQQIIqqQQQQBB6xQQQQQQffffqQB7x")
_ALERT: Final = struct.Struct("<QQq16s32sB7x128s")
assert _SIGNAL.size == wire.SIGNAL_BLOCK
assert _STATE.size == wire.ENGINE_STATE_BLOCK
_AT_MODE: Final = 18  # of the mode among the state's fields; the shadow's state follows
assert _ALERT.size == wire.ALERT_BLOCK


class Signal(msgspec.Struct, eq=False):
    """One signal of one instrument, and how far it can be trusted.

    Attributes
    ----------
    venue, symbol : str
        The instrument.
    signal_seq : int
        Counts this instrument's signals within ``engine_epoch``, from 1.
    source_epoch, first_seq, last_seq : int
        The market messages it follows from: the first since the previous signal, and the last in
        the book.
    exchange_time_ns, received_ns, emitted_ns, source_time_ns : int
        Matching engine's time of the last message; when this engine received it and sent the
        signal; when the feed handler had it. Nanoseconds since the UNIX epoch.
    book_state : str
        SYNCING, SYNCED, GAP, STALE or CROSSED.
    warm : bool
        Every feature has its declared history.
    precision, numerics, backend : str
        What answered: ``int8`` or ``fp32`` (``none`` if suppressed), ``exact-int8`` or
        ``tolerance``, and the backend's name.
    shadow_state : int
        0 off, 1 agreeing, 2 diverged, 3 lost.
    predicted_class : int or None
        Index of the largest output; None if suppressed.
    tradable : bool
        True if nothing speaks against it; otherwise ``reasons`` says what does, and every output
        is NaN.
    reasons : tuple of str
        Names of the reasons it is suppressed for.
    value_check : int
        Violation bitmask of the value check; 0 is clean, see `engine.trust.check_names`.
    best_bid_ticks, best_ask_ticks : int
        The top of the book it was computed from.
    outputs : numpy.ndarray
        float32 of shape (n,), read-only.
    model_hash, config_hash, feature_hash, code_hash : int
        What made it.
    input_crc : int
        CRC32C of the model's input vector; 0 when no inference ran.
    engine_epoch : int
        The engine's run.
    lost_before : int
        Signals of this instrument that this client lost just before this one.
    restarted : bool
        First signal of a newer engine run.
    conflict : bool
        Another engine publishes this instrument at the same endpoint.
    conflict_why : str
        What is different about that engine: "another engine with model 0123456789abcdef, ...".
    """

    kind: ClassVar[str] = "signal"

    venue: str
    symbol: str
    signal_seq: int
    source_epoch: int
    first_seq: int
    last_seq: int
    exchange_time_ns: int
    book_state: str
    warm: bool
    precision: str
    numerics: str
    shadow_state: int
    predicted_class: int | None
    tradable: bool
    reasons: tuple[str, ...]
    value_check: int
    best_bid_ticks: int
    best_ask_ticks: int
    outputs: np.ndarray
    model_hash: int
    config_hash: int
    feature_hash: int
    input_crc: int
    engine_epoch: int
    code_hash: int
    received_ns: int
    emitted_ns: int
    source_time_ns: int
    backend: str
    lost_before: int = 0
    restarted: bool = False
    conflict: bool = False
    conflict_why: str = ""


class EngineState(msgspec.Struct):
    """How the engine is: counters since its start, latency quantiles in nanoseconds, hashes.

    ``mode`` is INT8, FP32 or HALTED; ``divergence_*`` the greatest difference of a score between
    both models, of all inferences that the shadow answered; ``drift`` the worst population
    stability index of an input; ``lag_ns`` the longest lag behind the market since the state
    before. ``conflating`` says that messages come too fast for a signal each.
    """

    kind: ClassVar[str] = "state"

    engine_epoch: int
    seq: int
    now_ns: int
    messages: int
    signals: int
    tradable: int
    lost: int
    duplicates: int
    gaps: int
    rejected: int
    instruments: int
    synced: int
    latency_p50_ns: int
    latency_p99_ns: int
    code_hash: int
    model_hash: int
    config_hash: int
    feature_hash: int
    mode: str
    shadow_state: str
    transitions: int
    violations: int
    shadow_answers: int
    shadow_missed: int
    disagreements: int
    swaps: int
    divergence_p50: float
    divergence_p99: float
    divergence_max: float
    drift: float
    lag_ns: int
    conflations: int
    conflating: bool


class Alert(msgspec.Struct):
    """Something that a person should know; ``severity`` is info, warning or critical."""

    kind: ClassVar[str] = "alert"

    engine_epoch: int
    seq: int
    now_ns: int
    venue: str
    symbol: str
    severity: str
    text: str


Message = Signal | EngineState | Alert


def decode(payload: bytes) -> Message | None:
    """A published message as an object, or None if it is none that this version knows.

    Longer blocks of a newer minor schema version are understood.
    """
    if len(payload) < wire.HEADER_BYTES:
        return None
    block, template, schema, _ = _HEADER.unpack_from(payload)
    if schema != wire.SCHEMA_ID or wire.HEADER_BYTES + block > len(payload):
        return None
    if template == wire.SIGNAL and block >= wire.SIGNAL_BLOCK:
        return _signal(payload, wire.HEADER_BYTES + block)
    if template == wire.ENGINE_STATE and block >= wire.ENGINE_STATE_BLOCK:
        values = list(_STATE.unpack_from(payload, wire.HEADER_BYTES))
        values[_AT_MODE] = _name(trust.MODES, values[_AT_MODE])
        values[_AT_MODE + 1] = _name(trust.SHADOW_STATES, values[_AT_MODE + 1])
        values[-1] = bool(values[-1])
        return EngineState(*values)
    if template == wire.ALERT and block >= wire.ALERT_BLOCK:
        epoch, seq, now_ns, venue, symbol, severity, text = _ALERT.unpack_from(
            payload, wire.HEADER_BYTES
        )
        severity_name = _name(SEVERITIES, severity)
        return Alert(epoch, seq, now_ns, _text(venue), _text(symbol), severity_name, _text(text))
    return None


def as_json(message: Message) -> dict[str, Any]:
    """Plain values for JSON: hashes as 16 hex digits, outputs that are no number as null."""
    plain: dict[str, Any] = {"type": message.kind}
    for name in message.__struct_fields__:
        value = getattr(message, name)
        if name.endswith("_hash"):
            value = f"{value:016x}"
        elif name == "outputs":
            value = [x if math.isfinite(x) else None for x in value.tolist()]
        plain[name] = value
    return plain


def _signal(payload: bytes, at: int) -> Signal | None:
    if at + wire.GROUP_HEADER_BYTES > len(payload):
        return None
    entry, count = _GROUP.unpack_from(payload, at)
    at += wire.GROUP_HEADER_BYTES
    if entry < wire.OUTPUT_BYTES or at + entry * count > len(payload):
        return None
    outputs: np.ndarray = np.ndarray((count,), "<f4", payload, at, (entry,))
    (
        venue,
        symbol,
        signal_seq,
        source_epoch,
        first_seq,
        last_seq,
        exchange_time_ns,
        book_state,
        warm,
        precision,
        numerics,
        shadow_state,
        predicted_class,
        reasons,
        value_check,
        best_bid_ticks,
        best_ask_ticks,
        model_hash,
        config_hash,
        feature_hash,
        input_crc,
        engine_epoch,
        code_hash,
        received_ns,
        emitted_ns,
        source_time_ns,
        backend,
    ) = _SIGNAL.unpack_from(payload, wire.HEADER_BYTES)
    return Signal(
        _text(venue),
        _text(symbol),
        signal_seq,
        source_epoch,
        first_seq,
        last_seq,
        exchange_time_ns,
        _name(trust.BOOK_STATES, book_state),
        warm != 0,
        _name(trust.PRECISIONS, precision),
        _name(trust.NUMERICS, numerics),
        shadow_state,
        None if predicted_class == trust.NO_CLASS else predicted_class,
        reasons == 0,
        _reasons(reasons) if reasons else (),
        value_check,
        best_bid_ticks,
        best_ask_ticks,
        outputs,
        model_hash,
        config_hash,
        feature_hash,
        input_crc,
        engine_epoch,
        code_hash,
        received_ns,
        emitted_ns,
        source_time_ns,
        _text(backend),
    )


def _reasons(bits: int) -> tuple[str, ...]:
    names = trust.reason_names(bits)
    unknown = bits & ~sum(bit for bit, _ in trust.REASONS)
    return (*names, *(f"BIT_{n}" for n in range(16) if unknown >> n & 1))


def _name(names: tuple[str, ...], index: int) -> str:
    return names[index] if index < len(names) else f"UNKNOWN_{index}"


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode("ascii", "replace")
