"""Market messages and tape records for tests, and a pipeline run over them."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from engine.backends.registry import open_backend
from engine.bundle import load_bundle
from engine.config import Config, default_config
from engine.digest import Digest, canonical
from engine.pipeline import Pipeline
from feeds import codec, tape, wire

VENUE = "test"
SYMBOLS = ("A", "B")
EPOCH = 1
START_NS = 1_700_000_000_000_000_000


def definition(i: int, *, epoch: int = EPOCH, seq: int = 0) -> bytes:
    return codec.encode_instrument(
        1, i, epoch, seq, VENUE, SYMBOLS[i], Decimal("0.01"), Decimal("1")
    )


def book(
    template: int,
    i: int,
    seq: int,
    bids: list[tuple[int, int]],
    asks: list[tuple[int, int]],
    *,
    epoch: int = EPOCH,
    flags: int = 0,
    step_ns: int = 1_000_000,
) -> bytes:
    t = START_NS + seq * step_ns
    return codec.encode_book(template, 1, i, epoch, seq, t, t, bids, asks, flags)


def ladder(middle: int, levels: int = 12) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    return (
        [(middle - 1 - k, 10 + k) for k in range(levels)],
        [(middle + 1 + k, 10 + k) for k in range(levels)],
    )


def opening(i: int, middle: int = 1000, *, epoch: int = EPOCH) -> list[bytes]:
    return [definition(i, epoch=epoch), book(wire.SNAPSHOT, i, 1, *ladder(middle), epoch=epoch)]


def flow(i: int, first: int, count: int, seed: int, middle: int = 1000) -> list[bytes]:
    """Deltas and trades that move the top, in sequence from ``first``; never crossed."""
    rng = np.random.default_rng(seed)
    messages = []
    for seq in range(first, first + count):
        t = START_NS + seq * 1_000_000
        if rng.random() < 0.3:
            side = int(rng.integers(1, 3))
            price = middle + 1 if side == wire.AGGRESSOR_BUY else middle - 1
            lots = int(rng.integers(1, 9))
            messages.append(codec.encode_trade(1, i, EPOCH, seq, t, t, price, lots, seq, side))
            continue
        k, quantity = int(rng.integers(0, 12) * rng.integers(0, 2)), int(rng.integers(1, 50))
        if rng.random() < 0.5:
            messages.append(book(wire.DELTA, i, seq, [(middle - 1 - k, quantity)], []))
        else:
            messages.append(book(wire.DELTA, i, seq, [], [(middle + 1 + k, quantity)]))
    return messages


def records(messages: Iterable[bytes], *, kinds: int = tape.MARKET, first_ns: int = 1) -> bytes:
    """Tape records of messages, received one microsecond apart; events find their own kind."""
    own = {wire.TIMER: tape.TIMER, wire.CONTROL: tape.CONTROL, wire.SHADOW_ANSWER: tape.SHADOW}
    out = bytearray()
    for n, message in enumerate(messages):
        kind = own.get(codec.template_id(message), kinds)
        size = tape.RECORD_HEADER_BYTES + tape.padded(len(message))
        buf = np.zeros(size, dtype=np.uint8)
        buf[tape.RECORD_HEADER_BYTES :][: len(message)] = np.frombuffer(message, dtype=np.uint8)
        assert tape.put_record(buf, 0, kind, first_ns + n * 1000, len(message)) == size
        out += buf.tobytes()
    return bytes(out)


def config(symbols: tuple[str, ...] = SYMBOLS, **sections: object) -> Config:
    import msgspec

    made = default_config((VENUE, symbol) for symbol in symbols)
    return msgspec.structs.replace(made, **sections)


class Run:
    """A pipeline, by default without a model, and everything it said."""

    def __init__(
        self, settings: Config | None = None, folder: Path | None = None, **options: Any
    ) -> None:
        chosen = settings or config()
        bundle = backend = None
        if folder is not None:
            bundle = load_bundle(folder)
            backend = open_backend("onnx", bundle, precision=chosen.model.precision)
        self.pipeline = Pipeline(chosen, bundle, backend, **options)
        self.signals: list[np.void] = []
        self.canonical: dict[str, list[bytes]] = {}
        self.digest = Digest()

    def take(self, data: bytes, pieces: int = 1) -> Run:
        bounds = [0]
        at = 0
        view = np.frombuffer(data, dtype=np.uint8)
        while at < len(data):
            at += tape.RECORD_HEADER_BYTES + int(
                tape.padded(int.from_bytes(data[at + 4 : at + 8], "little"))
            )
            bounds.append(at)
        cuts = sorted({bounds[len(bounds) * k // pieces] for k in range(pieces)} | {len(data)})
        for start, stop in pairwise(cuts):
            buf = view[start:stop].copy()
            position = 0
            while position < len(buf):
                position = self.pipeline.advance(buf, position, len(buf))
                if self.pipeline.fired:
                    message = bytes(self.pipeline.answer())
                    block = codec.decode_block(message, wire.SIGNAL_DTYPE)
                    self.signals.append(block)
                    self.digest.update(message)
                    symbol = block["symbol"].decode()
                    self.canonical.setdefault(symbol, []).append(canonical(message))
        return self

    def send(self, *messages: bytes) -> Run:
        return self.take(records(messages))

    def levels(self, symbol: str) -> list[list[tuple[int, int]]]:
        """Both sides of a book, best level first."""
        slot = self.pipeline.names.index((VENUE, symbol))
        return [
            [(price, quantity) for price, quantity in self.pipeline.book(slot, side).tolist()]
            for side in range(2)
        ]
