"""Faults on purpose: drop, duplicate, reorder, reset, cross and stall, in a stream of messages.

The injector stands between a source and its socket. It is deterministic: the same stream, faults
and seed give the same output, and it keeps a list of what it did. A fault of one instrument
touches no message of another.

===========  ==================================================================================
kind         what a subscriber sees
===========  ==================================================================================
drop         a message is missing; the next one shows a hole in seq
duplicate    a message comes twice
reorder      a message comes after the next one of its instrument
reset        the source seems to restart: a higher epoch, seq from 1, no snapshot by itself
cross        a Delta also puts a bid above its ask; the instrument's next Delta takes it away
stall        the instrument is silent for ``length`` messages, heartbeats too; then all come
===========  ==================================================================================
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from feeds import codec, wire
from feeds.errors import InputError

KINDS: Final = ("drop", "duplicate", "reorder", "reset", "cross", "stall")
STALL_MESSAGES: Final = 100
MAX_STALL_MESSAGES: Final = 100_000

Message = tuple[bytes, bytes]


class Fault(NamedTuple):
    """One fault to inject.

    Attributes
    ----------
    kind : str
        One of `KINDS`.
    rate : float
        Probability a message, 0 to 1.
    positions : tuple of int
        Where to do it for certain: the n-th message with a seq of an instrument, from 0.
    symbol : str
        Only this instrument; empty for all.
    length : int
        Of a stall, in messages of the instrument.
    """

    kind: str
    rate: float = 0.0
    positions: tuple[int, ...] = ()
    symbol: str = ""
    length: int = STALL_MESSAGES


class Injected(NamedTuple):
    """One fault that was injected: into which message, by its numbers before any fault."""

    kind: str
    topic: bytes
    position: int
    epoch: int
    seq: int


def parse_fault(text: str) -> Fault:
    """A fault from ``KIND:RATE[:SYMBOL]`` or ``KIND:@POSITION[,POSITION…][:SYMBOL]``.

    Raises
    ------
    InputError
        If the text is neither.
    """
    kind, _, rest = text.partition(":")
    amount, _, symbol = rest.partition(":")
    try:
        if kind not in KINDS or not amount:
            raise ValueError
        if amount.startswith("@"):
            positions = tuple(int(part) for part in amount[1:].split(","))
            fault = Fault(kind, 0.0, positions, symbol)
        else:
            fault = Fault(kind, float(amount), (), symbol)
        if not 0.0 <= fault.rate <= 1.0 or any(n < 0 for n in fault.positions):
            raise ValueError
    except ValueError:
        raise InputError(
            "not a fault",
            where="--fault",
            expected=f"KIND:RATE[:SYMBOL] with KIND one of {', '.join(KINDS)} and RATE 0 to 1",
            found=repr(text),
            fix="for example drop:0.001 or reset:@5000:ALPHA",
        ) from None
    return fault


class _State:
    """What the injector knows of one instrument."""

    def __init__(self) -> None:
        self.position = 0
        self.epoch_shift = 0
        self.epoch = -1  # of the source's last message
        self.seq_shift = 0
        self.crossed_ticks = 0
        self.held: list[Message] = []
        self.stall_left = 0


class FaultInjector:
    """Injects faults into a stream.

    Parameters
    ----------
    faults : sequence of Fault
        Where several hit the same message, the first of them is done.
    seed : int

    Attributes
    ----------
    injected : list of Injected
        What was done, in order; at most `MAX_INJECTED` are kept, all are counted.
    counts : dict
        By kind.
    """

    MAX_INJECTED: Final = 1_000_000

    def __init__(self, faults: Sequence[Fault], seed: int = 1) -> None:
        for fault in faults:
            if fault.kind not in KINDS:
                raise InputError(
                    "unknown fault", where="faults", expected=", ".join(KINDS), found=fault.kind
                )
            if not 1 <= fault.length <= MAX_STALL_MESSAGES:
                raise InputError(
                    "out of range",
                    where="fault length",
                    expected=f"1 to {MAX_STALL_MESSAGES} messages",
                    found=str(fault.length),
                )
        self._faults = tuple(faults)
        self._positions = [frozenset(fault.positions) for fault in faults]
        self._seed = seed
        self._random: dict[bytes, random.Random] = {}
        self._states: dict[bytes, _State] = {}
        self.injected: list[Injected] = []
        self.counts: dict[str, int] = {fault.kind: 0 for fault in faults}

    def apply(self, stream: Iterable[Message]) -> Iterator[Message]:
        """The stream with its faults, what was held back at the end included."""
        for topic, payload in stream:
            yield from self.push(topic, payload)
        yield from self.flush()

    def push(self, topic: bytes, payload: bytes) -> list[Message]:
        """What to send for one message of the source: none, one or several."""
        state = self._states.get(topic)
        if state is None:
            state = self._states[topic] = _State()
            self._random[topic] = random.Random(f"{self._seed}.{topic.decode()}")
        template = codec.template_id(payload)
        if template not in (wire.SNAPSHOT, wire.DELTA, wire.TRADE):
            if state.stall_left:
                return []
            return [(topic, self._renumber(topic, payload))]
        epoch, seq = struct.unpack_from("<QQ", payload, wire.AT_EPOCH)
        if epoch > state.epoch:
            state.epoch, state.seq_shift = epoch, 0
        fault = self._choose(topic, state.position)
        if fault is not None and not _possible(fault, state, payload):
            fault = None
        position, state.position = state.position, state.position + 1
        if fault is not None:
            self.counts[fault.kind] += 1
            if len(self.injected) < self.MAX_INJECTED:
                self.injected.append(Injected(fault.kind, topic, position, epoch, seq))
            if fault.kind == "reset":
                state.epoch_shift += 1
                state.seq_shift = 1 - seq
        crossing = fault is not None and fault.kind == "cross"
        if template == wire.DELTA and (state.crossed_ticks or crossing):
            payload = _with_cross(payload, state, crossing)
        elif template == wire.SNAPSHOT:
            state.crossed_ticks = 0  # it replaces the whole book
        message = (topic, self._renumber(topic, payload))
        if state.stall_left:
            state.stall_left -= 1
            state.held.append(message)
            return [] if state.stall_left else self._release(state)
        kind = "" if fault is None else fault.kind
        if kind == "drop":
            return self._release(state)
        if kind == "duplicate":
            return [message, message, *self._release(state)]
        if kind == "reorder" and not state.held:
            state.held.append(message)
            return []
        if kind == "stall":
            assert fault is not None
            out = self._release(state)
            state.held.append(message)
            state.stall_left = fault.length - 1
            return out if state.stall_left else out + self._release(state)
        return [message, *self._release(state)]

    def flush(self) -> list[Message]:
        """What is still held back, instruments in the order of their first message."""
        out: list[Message] = []
        for state in self._states.values():
            state.stall_left = 0
            out += self._release(state)
        return out

    def numbers(self, topic: bytes, epoch: int, seq: int) -> tuple[int, int]:
        """What the stream's subscribers know a source's (epoch, seq) by."""
        state = self._states.get(topic)
        if state is None:
            return epoch, seq
        shift = state.seq_shift if epoch == state.epoch else 0
        return epoch + state.epoch_shift, max(seq + shift, 0)

    def stalled(self, topic: bytes) -> bool:
        """Is the instrument silent now, so that it must not send heartbeats either?"""
        state = self._states.get(topic)
        return state is not None and state.stall_left > 0

    def _renumber(self, topic: bytes, payload: bytes) -> bytes:
        epoch, seq = struct.unpack_from("<QQ", payload, wire.AT_EPOCH)
        numbers = self.numbers(topic, epoch, seq)
        if numbers == (epoch, seq):
            return payload
        return (
            payload[: wire.AT_EPOCH] + struct.pack("<QQ", *numbers) + payload[wire.AT_EPOCH + 16 :]
        )

    def _choose(self, topic: bytes, position: int) -> Fault | None:
        chosen = None
        rng = self._random[topic]
        symbol = topic.decode().split(".", 2)[-1]
        for fault, positions in zip(self._faults, self._positions, strict=True):
            # One draw a fault and message, whatever the others do.
            hit = (fault.rate > 0.0 and rng.random() < fault.rate) or position in positions
            if hit and chosen is None and fault.symbol in ("", symbol):
                chosen = fault
        return chosen

    @staticmethod
    def _release(state: _State) -> list[Message]:
        out, state.held = state.held, []
        return out


def _possible(fault: Fault, state: _State, payload: bytes) -> bool:
    if state.stall_left or (fault.kind == "reorder" and state.held):
        return False
    return fault.kind != "cross" or _can_cross(payload)


def _can_cross(payload: bytes) -> bool:
    if codec.template_id(payload) != wire.DELTA:
        return False
    return any(quantity > 0 for _, quantity in codec.decode_levels(payload)[1].tolist())


def _with_cross(payload: bytes, state: _State, crossing: bool) -> bytes:
    """The Delta without the last crossing bid, and with a new one if asked."""
    bids, asks = (levels.tolist() for levels in codec.decode_levels(payload))
    if state.crossed_ticks:
        # The true book has no bid there: it was above its best ask one Delta ago.
        if all(price != state.crossed_ticks for price, _ in bids):
            bids.insert(0, (state.crossed_ticks, 0))
        state.crossed_ticks = 0
    if crossing:
        price = min(price for price, quantity in asks if quantity > 0) + 1
        bids = [(p, q) for p, q in bids if p != price]
        bids.insert(0, (price, 1))
        state.crossed_ticks = price
    prefix = payload[wire.HEADER_BYTES : wire.AT_LEVELS]
    changed = codec.encode_book(wire.DELTA, 0, 0, 0, 0, 0, 0, bids, asks)
    return changed[: wire.HEADER_BYTES] + prefix + changed[wire.AT_LEVELS :]
