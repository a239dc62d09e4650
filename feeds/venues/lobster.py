"""LOBSTER message and orderbook files to canonical messages on a tape.

Format: see ``feeds.venues.lobster_files``.

- The first orderbook row is the starting Snapshot; the first event is already in it.
- Types 1 (new), 2 (part cancelled), 3 (deleted): a Delta. 4 (execution): a Trade, then a Delta.
  5 (hidden execution): a Trade. 6 (cross, such as an auction): a Trade of unknown aggressor.
- 7 (trading halt): counted. Quoting goes on or stops by itself in the book, which LOBSTER repeats
  in that row; the wire has no message for a venue's trading status.
- The direction is that of the resting order, so an executed sell order is a buy.
- A Delta also removes the level that a new one pushes out of view, and adds the one that a removal
  brings into view.

Tick: 0.0001 dollar, in which LOBSTER gives prices; hidden executions fall between cents. Lot: one
share. ``seq`` counts from 1 in epoch 1; ``trade_id`` is the line of the message file. Times are
New York wall clock, turned into UTC with that day's offset.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from feeds import codec, wire
from feeds.errors import InputError
from feeds.tape import MARKET
from feeds.tape_writer import TapeWriter
from feeds.venues.conversion import Conversion, Target, grid
from feeds.venues.lobster_files import (
    ASK,
    BID,
    CROSS,
    E_DIRECTION,
    E_PRICE,
    E_SIZE,
    E_TIME_NS,
    E_TYPE,
    EXECUTION,
    HALT,
    HIDDEN_EXECUTION,
    Step,
    read_row,
    steps,
)
from feeds.venues.lobster_names import Files, find_files
from feeds.venues.recording import Recording

TICKS_A_DOLLAR: Final = 10_000


def convert(
    recording: Recording, target: Target, symbol: str | None, tick: str | None, lot: str | None
) -> Conversion:
    """Write a message file's events onto the target; arguments as in ``convert.convert``.

    Raises
    ------
    InputError
        If a file is missing or damaged, or a price lies off an explicit ``tick``.
    """
    files = find_files(recording.path, symbol)
    orderbook = Recording(files.orderbook)
    tick_units = _units(tick, "--tick", TICKS_A_DOLLAR)
    lot_units = _units(lot, "--lot", 1)
    scribe = _Scribe(target, files, tick_units, lot_units)
    try:
        for step in steps(files, recording, orderbook):
            scribe.write(step)
    except InputError as error:
        raise target.abandon(error, scribe.counts["snapshots"] > 0) from None
    if scribe.writer is None:
        raise InputError("empty recording", where=str(files.message))
    counts = scribe.counts
    return Conversion(
        symbol=files.symbol,
        tick=scribe.tick,
        lot=scribe.lot,
        lines=counts.pop("lines"),
        messages=scribe.seq,
        snapshots=counts.pop("snapshots"),
        deltas=counts.pop("deltas"),
        trades=counts.pop("trades"),
        gaps=0,
        counts=counts,
    )


def _units(text: str | None, option: str, units_a_whole: int) -> int:
    """A tick or lot given by the user in LOBSTER's own units."""
    if text is None:
        return 1
    decimals, units = grid(text, option)
    scaled, rest = divmod(units * units_a_whole, 10**decimals)
    if rest or scaled == 0:
        raise InputError(
            "finer than LOBSTER's own unit", where=option,
            expected=f"a multiple of {1 / units_a_whole:g}", found=text,
        )  # fmt: skip
    return scaled


class _Scribe:
    """Writes steps as canonical messages."""

    def __init__(self, target: Target, files: Files, tick_units: int, lot_units: int) -> None:
        self.writer: TapeWriter | None = None
        self.seq = 0
        self.counts = dict.fromkeys(
            ("lines", "snapshots", "deltas", "trades", "halts", "unseen", "clock_backwards"), 0
        )
        self.tick = _decimal(tick_units, 4)
        self.lot = _decimal(lot_units, 0)
        self._target, self._files = target, files
        self._units = (tick_units, lot_units)
        self._clock_ns = 0
        self._ids = (0, 0)

    def write(self, step: Step) -> None:
        """Write the messages of one step."""
        event = step.event
        kind = int(event[E_TYPE])
        time_ns = self._files.midnight_ns + int(event[E_TIME_NS])
        self.counts["lines"] += 1
        if time_ns < self._clock_ns:
            self.counts["clock_backwards"] += 1
        self._clock_ns = max(self._clock_ns, time_ns)
        if self.writer is None:
            self.writer = self._target.open(self._files.symbol, self.tick, self.lot, time_ns)
            meta = self.writer.meta.instruments[0]
            self._ids = (meta.source_id, meta.instrument_id)
        if kind in (EXECUTION, HIDDEN_EXECUTION, CROSS) and event[E_SIZE] > 0:
            self._trade(step, kind, time_ns)
        if step.line == 1:
            self._snapshot(step, time_ns)
        elif step.n:
            sides: tuple[list[tuple[int, int]], ...] = ([], [])
            for side, price, size in step.changes[: step.n].tolist():
                sides[side].append(self._level(price, size, step))
            self.counts["deltas"] += 1
            self._book(wire.DELTA, time_ns, sides)
        elif kind == HALT:
            self.counts["halts"] += 1
        elif kind <= EXECUTION:
            self.counts["unseen"] += 1

    def _snapshot(self, step: Step, time_ns: int) -> None:
        book = np.zeros((2, 2, self._files.levels), dtype=np.int64)
        depth = np.zeros(2, dtype=np.int64)
        read_row(step.row, book, depth)
        sides = tuple(
            [
                self._level(price, size, step)
                for price, size in book[side, :, : depth[side]].T.tolist()
            ]
            for side in (BID, ASK)
        )
        self.counts["snapshots"] += 1
        self._book(wire.SNAPSHOT, time_ns, sides)

    def _level(self, price: int, size: int, step: Step) -> tuple[int, int]:
        tick_units, lot_units = self._units
        if price % tick_units:
            raise _off_grid("price", step, price, self.tick)
        if size % lot_units:
            raise _off_grid("size", step, size, self.lot)
        return price // tick_units, size // lot_units

    def _book(self, template: int, time_ns: int, sides: tuple[list[tuple[int, int]], ...]) -> None:
        self.seq += 1
        self._append(
            codec.encode_book(
                template, *self._ids, 1, self.seq, time_ns, time_ns, sides[BID], sides[ASK]
            )
        )

    def _trade(self, step: Step, kind: int, time_ns: int) -> None:
        price, size = self._level(int(step.event[E_PRICE]), int(step.event[E_SIZE]), step)
        aggressor = wire.AGGRESSOR_UNKNOWN
        if kind != CROSS:
            resting_buy = step.event[E_DIRECTION] > 0
            aggressor = wire.AGGRESSOR_SELL if resting_buy else wire.AGGRESSOR_BUY
        self.seq += 1
        self.counts["trades"] += 1
        self._append(
            codec.encode_trade(
                *self._ids, 1, self.seq, time_ns, time_ns, price, size, step.line, aggressor
            )
        )

    def _append(self, message: bytes) -> None:
        assert self.writer is not None, "the tape is open before its first message"
        self.writer.append(MARKET, self._clock_ns, message)


def _decimal(units: int, decimals: int) -> str:
    whole, fraction = divmod(units, 10**decimals)
    text = f"{fraction:0{decimals}d}".rstrip("0") if decimals else ""
    return f"{whole}.{text}" if text else str(whole)


def _off_grid(name: str, step: Step, value: int, size: str) -> InputError:
    return InputError(
        f"a {name} off the grid",
        where=step.place(),
        expected=f"a multiple of {size}",
        found=f"{value} in LOBSTER's unit",
        fix=f"leave out {'--tick' if name == 'price' else '--lot'} to keep LOBSTER's own unit",
    )
