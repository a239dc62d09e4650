"""Replayed signals against those that the live session recorded, byte for byte."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from engine.digest import Digest, canonical
from feeds import tape, wire
from feeds.describe import describe, differences
from feeds.tape import RECORD_HEADER_BYTES, padded
from feeds.tape_diff import next_of_kind
from feeds.tape_reader import TapeReader

# Fields of a Signal outside its canonical part: the digest and this comparison pass over them.
_OUTSIDE: Final = frozenset(
    name
    for name, (_, offset, *_) in (wire.SIGNAL_DTYPE.fields or {}).items()
    if offset >= wire.SIGNAL_CANONICAL_BLOCK
)


def recorded_signals(
    path: str | os.PathLike[str], *, allow_truncated: bool = False
) -> Iterator[memoryview]:
    """Signals of a tape in their order; each is valid until the next one is asked for."""
    for chunk in TapeReader(path).chunks(allow_truncated=allow_truncated):
        view = chunk.buf.data
        at = chunk.start
        while True:
            at = next_of_kind(chunk.buf, at, chunk.stop, tape.SIGNAL)
            if at >= chunk.stop:
                break
            (length,) = struct.unpack_from("<I", view, at + 4)
            body = at + RECORD_HEADER_BYTES
            yield view[body : body + length]
            at = body + padded(length)


class FieldPair(msgspec.Struct, frozen=True):
    """One field, as recorded and as replayed; None where there is none."""

    field: str
    recorded: Any
    replayed: Any


class SignalDifference(msgspec.Struct, frozen=True):
    """The first signal that differs; ``index`` counts all signals of the tape from 0."""

    index: int
    venue: str
    symbol: str
    signal_seq: int
    fields: list[FieldPair]


class Verification(msgspec.Struct, frozen=True):
    """Answer of a verified replay; ``ok`` only if there were signals and every one is equal."""

    ok: bool
    recorded: int
    replayed: int
    differing: int
    recorded_digest: str
    first_difference: SignalDifference | None


class Verifier:
    """Takes replayed signals one by one and holds each against the recorded one.

    Parameters
    ----------
    path : path-like
        The tape.
    instruments : int
        How many the session followed. A tape that was cut short may lack the signals of its last
        event, at most one an instrument.
    allow_truncated : bool
        The tape may have no END record.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, instruments: int, allow_truncated: bool = False
    ) -> None:
        self._recorded = recorded_signals(path, allow_truncated=allow_truncated)
        self._instruments = instruments
        self._digest = Digest()
        self._replayed = 0
        self._surplus = 0
        self._differing = 0
        self._first: SignalDifference | None = None
        self._first_surplus: SignalDifference | None = None

    def take(self, message: memoryview) -> None:
        """Compare the next replayed signal."""
        index = self._replayed
        self._replayed += 1
        expected = next(self._recorded, None)
        if expected is None:
            self._surplus += 1
            if self._first_surplus is None:
                self._first_surplus = explain(index, None, message)
            return
        self._digest.update(expected)
        if canonical(expected) != canonical(message):
            self._differing += 1
            if self._first is None:
                self._first = explain(index, expected, message)

    def finish(self, *, truncated: bool) -> Verification:
        """Count what the replay did not give, and judge."""
        missing = 0
        for expected in self._recorded:
            self._digest.update(expected)
            missing += 1
            if self._first is None:
                self._first = explain(self._replayed, expected, None)
        recorded = self._digest.signals
        first = self._first
        surplus = self._surplus
        if truncated and surplus <= self._instruments:
            surplus = 0
        elif first is None:
            first = self._first_surplus
        differing = self._differing + missing + surplus
        return Verification(
            differing == 0 and recorded > 0,
            recorded,
            self._replayed,
            differing,
            self._digest.hexdigest(),
            first,
        )


def explain(
    index: int, recorded: bytes | memoryview | None, replayed: bytes | memoryview | None
) -> SignalDifference:
    """Name the canonical fields in which a signal differs; either side may be missing."""
    left = {} if recorded is None else describe(recorded)
    right = {} if replayed is None else describe(replayed)
    named = left or right
    pairs = [FieldPair(*item) for item in differences(left, right) if item[0] not in _OUTSIDE]
    return SignalDifference(
        index,
        str(named.get("venue", "")),
        str(named.get("symbol", "")),
        int(named.get("signal_seq", 0)),
        pairs,
    )
