"""A seeded market of several instruments, as a stream of wire messages or a tape.

The order flow itself is in ``feeds/order_flow.py``, the optimum that a model can reach on it in
``feeds/optimum.py``, and what is planted in it for models to find in ``feeds/SIMULATOR.md``.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from decimal import Decimal
from typing import Final

import numpy as np

from feeds import market_state as flow
from feeds import order_flow
from feeds.codec import encode_instrument, topic
from feeds.errors import InputError
from feeds.tape import MARKET, RECORD_HEADER_BYTES, InstrumentMeta, TapeMeta, padded, put_record
from feeds.tape_reader import Chunk
from feeds.tape_writer import TapeWriter
from feeds.wire import HEADER_BYTES, INSTRUMENT_BLOCK

VENUE: Final = "sim"
SOURCE_ID: Final = 1
SYMBOLS: Final = ("ALPHA", "BETA", "GAMMA", "DELTA")
TICKS_AND_LOTS: Final = (("0.01", "1"), ("0.05", "1"), ("0.0001", "100"), ("0.25", "1"))
START_NS: Final = 1_767_623_400_000_000_000  # 2026-01-05 14:30:00 UTC
MAX_INSTRUMENTS: Final = 1_024
MIN_LEVELS: Final = 2 * flow.PROTECTED_LEVELS
CHUNK_BYTES: Final = 1 << 20
NO_LIMIT: Final = (1 << 63) - 1

BRANCHING: Final = 0.6  # events that one event sets off, on average
MEMORY_EVENTS: Final = 4.0  # the excitation of one event decays over so many mean waiting times
MEAN_DWELL_EVENTS: Final = 2_000.0
TILT: Final = 0.85
DRIFT: Final = 0.45
FIRST_PRICE_TICKS: Final = 50_000
PRICE_STEP_TICKS: Final = 10_000
BASE_QUANTITY_LOTS: Final = (120, 60, 400, 200)

TRUTH_DTYPE: Final = np.dtype(
    [
        ("instrument_id", "<u4"),
        ("seq", "<u8"),
        ("hidden", "i1"),
        ("mid_half_ticks", "<i8"),
        ("posterior", "<f8", (3,)),
    ]
)

_SPLITMIX_STEP: Final = 0x9E3779B97F4A7C15
_U64: Final = (1 << 64) - 1


def _splitmix(x: int) -> int:
    # Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    x = (x + _SPLITMIX_STEP) & _U64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _U64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _U64
    return x ^ (x >> 31)


class Simulator:
    """Several independent instruments with Hawkes order flow and a planted signal.

    The stream starts with an in-band Snapshot of each instrument and never ends. It is a function
    of the arguments alone: the same bytes on every machine, however it is cut into chunks. The
    messages of one instrument do not depend on how many others there are.

    Parameters
    ----------
    seed : int
    n_instruments : int
        1 to `MAX_INSTRUMENTS`.
    rate_hz : float
        Mean events (Deltas) a second of one instrument; messages are about 1.15 times as many.
    signal_strength : float
        0 (the mid is a pure random walk that nothing predicts) to 1.
    start_ns : int
        Exchange time of the first snapshot, ns since the UNIX epoch.
    levels : int
        Levels a side, of which the deep ones may be empty at times.
    epoch : int
    mean_dwell_events : float
        Mean events between two changes of the hidden state.

    Attributes
    ----------
    instruments : list of InstrumentMeta

    Raises
    ------
    InputError
        If an argument is out of range.
    """

    def __init__(
        self,
        seed: int = 1,
        n_instruments: int = 4,
        *,
        rate_hz: float = 250.0,
        signal_strength: float = 1.0,
        start_ns: int = START_NS,
        levels: int = 60,
        epoch: int = 1,
        mean_dwell_events: float = MEAN_DWELL_EVENTS,
    ) -> None:
        _require("instruments", 1 <= n_instruments <= MAX_INSTRUMENTS, n_instruments)
        _require("rate_hz", 0.001 <= rate_hz <= 1e6, rate_hz)
        _require("signal_strength", 0.0 <= signal_strength <= 1.0, signal_strength)
        _require("levels", MIN_LEVELS <= levels <= flow.MAX_LEVELS, levels)
        _require("mean_dwell_events", mean_dwell_events >= 1.0, mean_dwell_events)
        _require("seed", 0 <= seed <= _U64, seed)
        self.seed = seed
        self.rate_hz = rate_hz
        self.signal_strength = signal_strength
        self.start_ns = start_ns
        self.levels = levels
        self.messages = 0
        self.parameters = np.zeros(flow.PARAMETERS)
        decay = rate_hz / MEMORY_EVENTS
        self.parameters[flow.BASE_RATE] = rate_hz * (1.0 - BRANCHING)
        self.parameters[flow.JUMP] = BRANCHING * decay
        self.parameters[flow.DECAY] = decay
        self.parameters[flow.SWITCH] = 1.0 / mean_dwell_events
        self.parameters[flow.TILT] = TILT * signal_strength
        self.parameters[flow.DRIFT] = DRIFT * signal_strength
        self.instruments = [
            InstrumentMeta(
                venue=VENUE,
                symbol=SYMBOLS[i] if i < len(SYMBOLS) else f"SIM{i:02d}",
                source_id=SOURCE_ID,
                instrument_id=i,
                tick=TICKS_AND_LOTS[i % len(TICKS_AND_LOTS)][0],
                lot=TICKS_AND_LOTS[i % len(TICKS_AND_LOTS)][1],
            )
            for i in range(n_instruments)
        ]
        self._table = order_flow.level_table(levels)
        self._ints = np.zeros((n_instruments, flow.INTEGERS), dtype=np.int64)
        self._floats = np.zeros((n_instruments, flow.FLOATS))
        self._floats[:, flow.POSTERIOR :] = 1.0 / 3.0
        self._rng = np.zeros(n_instruments, dtype=np.uint64)
        self._book = np.zeros((n_instruments, 2, flow.RING), dtype=np.int64)
        self._caps = np.zeros((n_instruments, levels), dtype=np.int64)
        for i in range(n_instruments):
            self._open_instrument(i, epoch)

    def _open_instrument(self, i: int, epoch: int) -> None:
        self._rng[i] = _splitmix(_splitmix(self.seed) ^ _splitmix(i)) or 1
        self._caps[i] = order_flow.depth_profile(
            self.levels, BASE_QUANTITY_LOTS[i % len(BASE_QUANTITY_LOTS)]
        )
        ints = self._ints[i]
        ints[flow.EPOCH] = epoch
        ints[flow.NEXT_NS] = self.start_ns
        ints[flow.BEST_BID] = FIRST_PRICE_TICKS + PRICE_STEP_TICKS * (i % 8)
        ints[flow.BEST_ASK] = ints[flow.BEST_BID] + 1
        for side, outward in ((0, -1), (1, 1)):
            best = int(ints[flow.BEST_BID + side])
            for k in range(self.levels):
                cap = int(self._caps[i, k])
                self._book[i, side, (best + outward * k) & flow.RING_MASK] = cap // 4 + (
                    flow.share_of(flow.uniform(self._rng, i), cap)
                )
        ints[flow.HIDDEN] = int(flow.uniform(self._rng, i) * 3.0) - 1
        self._floats[i, flow.EXCITATION] = self.parameters[flow.JUMP]
        flow.draw_next_time(i, self._ints, self._floats, self._rng, self.parameters)

    @property
    def meta(self) -> TapeMeta:
        """Header of a tape of this market."""
        return TapeMeta(
            created_ns=self.start_ns,
            source=f"simulator seed={self.seed} signal_strength={self.signal_strength}",
            instruments=self.instruments,
        )

    @property
    def hidden(self) -> np.ndarray:
        """The hidden state of each instrument after the last event written, int64 of shape (n,)."""
        return self._ints[:, flow.HIDDEN].copy()

    def _snapshot_bytes(self) -> int:
        definition = RECORD_HEADER_BYTES + HEADER_BYTES + INSTRUMENT_BLOCK
        return definition + RECORD_HEADER_BYTES + 64 + 8 + 2 * 16 * self.levels + 8

    def _fill(
        self, buf: np.ndarray, at: int, stop: int, messages: int, until_ns: int, rows: int
    ) -> tuple[int, int, np.ndarray]:
        start, written = at, 0
        if self.messages == 0:
            # At the start: the same records whatever the limits are.
            recv_ns = self.start_ns + flow.SOURCE_DELAY_NS
            for i, instrument in enumerate(self.instruments):
                definition = encode_instrument(
                    instrument.source_id,
                    instrument.instrument_id,
                    int(self._ints[i, flow.EPOCH]),
                    0,
                    instrument.venue,
                    instrument.symbol,
                    Decimal(instrument.tick),
                    Decimal(instrument.lot),
                    self.start_ns,
                    recv_ns,
                )
                body = at + RECORD_HEADER_BYTES
                buf[body : body + len(definition)] = np.frombuffer(definition, dtype=np.uint8)
                at = put_record(buf, at, MARKET, recv_ns, len(definition))
                self._ints[i, flow.SEQ] = 1
                body = at + RECORD_HEADER_BYTES
                end = flow.put_snapshot(
                    buf, body, i, 1, self._ints, self._book, self.levels, self.start_ns
                )
                at = put_record(buf, at, MARKET, recv_ns, end - body)
                written += 2
        truth_ints = np.zeros((rows, 4), dtype=np.int64)
        truth_floats = np.zeros((rows, 3))
        at, count, events = order_flow.generate(
            buf,
            at,
            stop,
            messages - written,
            until_ns,
            self._ints,
            self._floats,
            self._rng,
            self._book,
            self._caps,
            self._table,
            self.parameters,
            self.levels,
            truth_ints,
            truth_floats,
        )
        assert start <= at <= stop, "an event took more than EVENT_BYTES"
        truth = np.zeros(events if rows else 0, dtype=TRUTH_DTYPE)
        if rows:
            truth["instrument_id"] = truth_ints[:events, 0]
            truth["seq"] = truth_ints[:events, 1]
            truth["hidden"] = truth_ints[:events, 2]
            truth["mid_half_ticks"] = truth_ints[:events, 3]
            truth["posterior"] = truth_floats[:events]
        self.messages += written + count
        return at, written + count, truth

    def _need(self) -> int:
        return flow.EVENT_BYTES + len(self.instruments) * self._snapshot_bytes()

    def chunks(
        self,
        messages: int | None = None,
        seconds: float | None = None,
        *,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> Iterator[Chunk]:
        """Go on with the stream, as tape records in chunks like those of `TapeReader.chunks`.

        Parameters
        ----------
        messages : int, optional
            Stop after so many more messages (one more where a Trade and its Delta belong together).
        seconds : float, optional
            Stop before the first event at or after ``start_ns`` plus so many seconds.
        chunk_bytes : int
            Size of the buffer; raised to what the opening snapshots need.

        Yields
        ------
        Chunk
            Its array is valid until the next chunk.
        """
        left, until_ns = self._limits(messages, seconds)
        buf = np.zeros(max(chunk_bytes, self._need()), dtype=np.uint8)
        offset = 0
        while left > 0:
            stop, count, _ = self._fill(buf, 0, len(buf), left, until_ns, 0)
            if count == 0:
                return
            yield Chunk(buf, 0, stop, offset)
            left -= count
            offset += stop

    def _limits(self, messages: int | None, seconds: float | None) -> tuple[int, int]:
        _require("messages", messages is None or messages > 0, messages)
        _require("seconds", seconds is None or seconds > 0, seconds)
        until_ns = NO_LIMIT if seconds is None else self.start_ns + round(seconds * 1e9)
        return (NO_LIMIT if messages is None else messages), until_ns

    def stream(
        self, messages: int | None = None, seconds: float | None = None
    ) -> Iterator[tuple[bytes, bytes]]:
        """The same stream as (topic, payload) pairs, one Python object each: the cold path."""
        topics = [topic("l2", x.venue, x.symbol) for x in self.instruments]
        for buf, at, stop, _ in self.chunks(messages, seconds):
            while at < stop:
                (length,) = struct.unpack_from("<I", buf.data, at + 4)
                body = at + RECORD_HEADER_BYTES
                payload = buf[body : body + length].tobytes()
                (instrument,) = struct.unpack_from("<I", payload, 12)
                yield topics[instrument], payload
                at = body + padded(length)

    def write_tape(
        self,
        path: str | os.PathLike[str],
        messages: int | None = None,
        seconds: float | None = None,
        *,
        overwrite: bool = False,
        truth: bool = False,
    ) -> np.ndarray:
        """Write the next part of the stream to a tape.

        Parameters
        ----------
        path : path-like
            The ``.tape`` to make.
        messages, seconds
            At least one of them; as in `chunks`.
        overwrite : bool
            Replace an existing file.
        truth : bool
            Also return what is hidden.

        Returns
        -------
        ndarray of TRUTH_DTYPE
            With ``truth``: a row for each event, in the order of the tape, found by (instrument_id,
            seq of its Delta): the hidden state, the mid in half ticks, and the exact filter's
            P(s = -1, 0, +1 | messages so far). Else empty.

        Raises
        ------
        InputError
            If the file exists or cannot be written, or neither limit is given.
        """
        if messages is None and seconds is None:
            raise InputError(
                "no length", where="simulator", expected="messages or seconds", found="neither"
            )
        left, until_ns = self._limits(messages, seconds)
        parts = [np.zeros(0, dtype=TRUTH_DTYPE)]
        need = max(CHUNK_BYTES, self._need())
        rows = need // 100 if truth else 0
        with TapeWriter(path, self.meta, overwrite=overwrite) as tape:
            while left > 0:
                arena, at = tape.room(need)
                stop, count, part = self._fill(arena, at, at + need, left, until_ns, rows)
                if count == 0:
                    break
                tape.advance(stop, count)
                del arena  # the window can only move on when nobody looks at it
                left -= count
                if truth:
                    parts.append(part)
        return np.concatenate(parts)


def _require(name: str, good: bool, found: object) -> None:
    limits = {
        "instruments": f"1 to {MAX_INSTRUMENTS}",
        "rate_hz": "0.001 to 1e6",
        "signal_strength": "0 to 1",
        "levels": f"{MIN_LEVELS} to {flow.MAX_LEVELS}",
        "mean_dwell_events": "at least 1",
        "seed": "0 to 2**64 - 1",
        "messages": "a positive count",
        "seconds": "a positive time",
    }
    if not good:
        raise InputError(
            "out of range", where=f"simulator {name}", expected=limits[name], found=str(found)
        )
