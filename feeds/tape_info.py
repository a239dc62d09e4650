# Hot path: the free @njit function `survey`; the rest summarises for people.
"""What a tape holds (`summarise`), and whether every record of it is good (`verify`)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final

import msgspec
import numpy as np
from numba import njit

from feeds import tape, tape_reader, wire
from feeds.describe import NAMES, field_offset
from feeds.errors import InputError
from feeds.instruments import InstrumentTable, find_instrument, find_name
from feeds.rawbytes import load_i64, load_u16, load_u32
from feeds.tape import InstrumentMeta
from feeds.tape_reader import TapeReader

TEMPLATES: Final = 64  # ids beyond share the last slot
KINDS: Final = 256  # the same

# Columns of the survey's totals.
RECORDS: Final = 0
FIRST_RECV: Final = 1
LAST_RECV: Final = 2
INPUTS: Final = 3
BACKWARD: Final = 4
FIRST_BACKWARD: Final = 5  # index of the record
MALFORMED: Final = 6
FIRST_MALFORMED: Final = 7
FIRST_MALFORMED_OFFSET: Final = 8
FIRST_BACKWARD_OFFSET: Final = 9
LEVELS: Final = 10
SIGNALS: Final = 11
TRADABLE: Final = 12
TOTALS: Final = 13

# Columns of the survey's rows, one an instrument and a last one for what no header names.
MESSAGES: Final = 0
_SNAPSHOTS: Final = 1
_DELTAS: Final = 2
_TRADES: Final = 3
_HEARTBEATS: Final = 4
_LEVELS: Final = 5
_FIRST_EXCHANGE: Final = 6
_LAST_EXCHANGE: Final = 7
FIRST_SEQ: Final = 8
LAST_SEQ: Final = 9
_EPOCHS: Final = 10
EPOCH: Final = 11  # the last one
_SOURCE_GAPS: Final = 12
_SIGNALS: Final = 13
_TRADABLE: Final = 14
FIRST_EPOCH: Final = 15
_COLUMNS: Final = 16

_AT_REASONS: Final = field_offset(wire.SIGNAL_DTYPE, "reasons")


@njit(
    "void(uint8[::1], int64, int64, int64, int64[::1], uint8[::1], int64[:,::1], int64[::1],"
    " int64[::1], int64[::1], int64[:,::1], int64[::1])",
    cache=True,
)
def survey(  # type: ignore[no-untyped-def]
    buf, start, stop, file_offset, keys, names, steps, state, kinds, templates, table, totals
):
    """Count the whole, checked records of ``buf[start:stop]``.

    Parameters
    ----------
    keys, names, steps, state : ndarray
        Those of an `InstrumentTable` of n rows.
    kinds, templates : ndarray of int64, shapes (KINDS,) and (TEMPLATES,)
    table : ndarray of int64, shape (n + 1, columns)
    totals : ndarray of int64, shape (TOTALS,)
        All are added to.
    """
    n = len(keys)
    at = start
    while at < stop:
        length = load_u32(buf, at + 4)
        recv_ns = load_i64(buf, at + 8)
        kind = load_u16(buf, at + 16)
        body = at + tape.RECORD_HEADER_BYTES
        end = body + length
        index = totals[RECORDS]
        totals[RECORDS] += 1
        kinds[min(kind, KINDS - 1)] += 1
        template = load_u16(buf, body + 2) if length >= wire.HEADER_BYTES else 0
        templates[min(template, TEMPLATES - 1)] += 1
        if kind == tape.SIGNAL:
            if template == wire.SIGNAL and length >= wire.HEADER_BYTES + wire.SIGNAL_BLOCK:
                row = find_name(buf, body + wire.HEADER_BYTES, names, state)
                if row < 0:
                    row = n
                good = 1 if load_u16(buf, body + _AT_REASONS) == 0 else 0
                totals[SIGNALS] += 1
                totals[TRADABLE] += good
                table[row, _SIGNALS] += 1
                table[row, _TRADABLE] += good
        else:
            if totals[INPUTS] == 0:
                totals[FIRST_RECV] = recv_ns
            elif recv_ns < totals[LAST_RECV]:
                if totals[BACKWARD] == 0:
                    totals[FIRST_BACKWARD] = index
                    totals[FIRST_BACKWARD_OFFSET] = file_offset + at - start
                totals[BACKWARD] += 1
            totals[LAST_RECV] = recv_ns
            totals[INPUTS] += 1
        if kind == tape.MARKET:
            if wire.check(buf, body, end) != 0:
                if totals[MALFORMED] == 0:
                    totals[FIRST_MALFORMED] = index
                    totals[FIRST_MALFORMED_OFFSET] = file_offset + at - start
                totals[MALFORMED] += 1
            elif template != wire.TIMER:
                row = find_instrument(buf, body, keys, names, steps, state)
                epoch = load_i64(buf, body + wire.AT_EPOCH)
                seq = load_i64(buf, body + wire.AT_SEQ)
                exchange_ns = load_i64(buf, body + wire.AT_EXCHANGE_TIME)
                if table[row, MESSAGES] == 0 or table[row, EPOCH] != epoch:
                    table[row, _EPOCHS] += 1
                    table[row, EPOCH] = epoch
                if table[row, MESSAGES] == 0:
                    table[row, FIRST_SEQ] = seq
                    table[row, FIRST_EPOCH] = epoch
                table[row, LAST_SEQ] = seq
                table[row, MESSAGES] += 1
                if exchange_ns > 0:
                    if table[row, _FIRST_EXCHANGE] == 0:
                        table[row, _FIRST_EXCHANGE] = exchange_ns
                    table[row, _LAST_EXCHANGE] = exchange_ns
                if load_i64(buf, body + wire.AT_FLAGS) & wire.FLAG_SOURCE_GAP:
                    table[row, _SOURCE_GAPS] += 1
                if template == wire.SNAPSHOT or template == wire.DELTA:
                    table[row, _SNAPSHOTS if template == wire.SNAPSHOT else _DELTAS] += 1
                    place = body + wire.HEADER_BYTES + load_u16(buf, body)
                    for _ in range(2):
                        count = load_u16(buf, place + 2)
                        table[row, _LEVELS] += count
                        totals[LEVELS] += count
                        place += wire.GROUP_HEADER_BYTES + count * load_u16(buf, place)
                elif template == wire.TRADE:
                    table[row, _TRADES] += 1
                elif template == wire.HEARTBEAT:
                    table[row, _HEARTBEATS] += 1
        at = body + tape.padded(length)


class Survey:
    """The arrays that `survey` adds to, for one tape.

    Attributes
    ----------
    instruments : InstrumentTable
    table : ndarray of int64
        A row an instrument, and a last one for messages that nothing defined.
    totals : ndarray of int64, shape (TOTALS,)
    """

    def __init__(self, instruments: list[InstrumentMeta]) -> None:
        self.instruments = InstrumentTable(instruments)
        self.kinds = np.zeros(KINDS, dtype=np.int64)
        self.templates = np.zeros(TEMPLATES, dtype=np.int64)
        self.table = np.zeros((len(self.instruments.keys) + 1, _COLUMNS), dtype=np.int64)
        self.totals = np.zeros(TOTALS, dtype=np.int64)

    def add(self, chunk: tape_reader.Chunk) -> None:
        """Count in a chunk."""
        survey(
            chunk.buf,
            chunk.start,
            chunk.stop,
            chunk.file_offset,
            self.instruments.keys,
            self.instruments.names,
            self.instruments.steps,
            self.instruments.state,
            self.kinds,
            self.templates,
            self.table,
            self.totals,
        )


def _nothing(_: int) -> None:
    pass


def summarise(
    path: str | os.PathLike[str], *, tick: Callable[[int], None] = _nothing
) -> dict[str, Any]:
    """What a tape holds; a tape that was cut short is summarised up to its last whole record.

    Parameters
    ----------
    path : path-like
    tick : callable
        Told how many bytes of the file are read.

    Returns
    -------
    dict
        Ready for JSON. Times are int64 ns; ``duration_s`` and ``messages_per_s`` are those of the
        receive times of market messages and timers.

    Raises
    ------
    InputError
        If the file is no tape or a record is damaged.
    """
    reader = TapeReader(path)
    found = Survey(reader.meta.instruments)
    for chunk in reader.chunks(allow_truncated=True):
        found.add(chunk)
        tick(reader.file_bytes_read)
    totals = found.totals
    duration_s = float(totals[LAST_RECV] - totals[FIRST_RECV]) / 1e9
    market = int(found.kinds[tape.MARKET])
    meta = msgspec.to_builtins(reader.meta)
    del meta["instruments"]
    instruments = [
        {**found.instruments.describe(row), **_row(found.table[row])}
        for row in range(len(found.instruments))
    ]
    return {
        "file": str(path),
        "bytes": reader.file_bytes,
        "sealed": reader.sealed,
        "truncated": reader.truncated_at is not None,
        "truncated_at": reader.truncated_at,
        **meta,
        "records": int(totals[RECORDS]),
        "kinds": {
            tape.KIND_NAMES.get(k, f"kind {k}"): int(found.kinds[k])
            for k in np.flatnonzero(found.kinds).tolist()
        },
        "templates": {
            NAMES.get(k, f"template {k}"): int(found.templates[k])
            for k in np.flatnonzero(found.templates).tolist()
        },
        "levels": int(totals[LEVELS]),
        "signals": int(totals[SIGNALS]),
        "tradable": int(totals[TRADABLE]),
        "malformed": int(totals[MALFORMED]),
        "unknown_instrument": int(found.table[-1, MESSAGES]),
        "first_recv_ns": int(totals[FIRST_RECV]),
        "last_recv_ns": int(totals[LAST_RECV]),
        "duration_s": duration_s,
        "messages_per_s": market / duration_s if duration_s > 0 else 0.0,
        "instruments": instruments,
    }


def _row(row: np.ndarray) -> dict[str, int]:
    return {
        "messages": int(row[MESSAGES]),
        "snapshots": int(row[_SNAPSHOTS]),
        "deltas": int(row[_DELTAS]),
        "trades": int(row[_TRADES]),
        "heartbeats": int(row[_HEARTBEATS]),
        "levels": int(row[_LEVELS]),
        "epochs": int(row[_EPOCHS]),
        "first_seq": int(row[FIRST_SEQ]),
        "last_seq": int(row[LAST_SEQ]),
        "first_exchange_ns": int(row[_FIRST_EXCHANGE]),
        "last_exchange_ns": int(row[_LAST_EXCHANGE]),
        "source_gaps": int(row[_SOURCE_GAPS]),
        "signals": int(row[_SIGNALS]),
        "tradable": int(row[_TRADABLE]),
    }


class Fault(msgspec.Struct, frozen=True):
    """What `verify` found first: the record's index (from 0), its offset, and what is wrong."""

    what: str
    index: int
    offset: int


class Verdict(msgspec.Struct, frozen=True):
    """Answer of `verify`; ``records`` are good, and stand before the damage if there is any."""

    file: str
    ok: bool
    sealed: bool
    records: int
    good_bytes: int
    fault: Fault | None


def verify(path: str | os.PathLike[str], *, tick: Callable[[int], None] = _nothing) -> Verdict:
    """Check the CRC of every record, that inputs do not run back in time, and the END record.

    Offsets count the bytes of the unsealed tape.

    Raises
    ------
    InputError
        If the file cannot be read or is no tape at all.
    """
    try:
        reader = TapeReader(path)
    except InputError as error:
        if error.what not in ("damaged tape header", "damaged zstd data"):
            raise
        header = Fault(f"{error.what}: {error.found}", 0, 0)
        return Verdict(str(path), False, error.what == "damaged zstd data", 0, 0, header)
    found = Survey(reader.meta.instruments)
    good_bytes = reader.data_offset
    fault: Fault | None = None
    try:
        for chunk in reader.chunks():
            found.add(chunk)
            good_bytes = chunk.file_offset + chunk.stop - chunk.start
            tick(reader.file_bytes_read)
    except InputError as error:
        fault = Fault(f"{error.what}: {error.found}", int(found.totals[RECORDS]), good_bytes)
    totals = found.totals
    records = int(totals[RECORDS])
    fault = _first(fault, totals)
    if fault is not None:
        records, good_bytes = fault.index, fault.offset
    return Verdict(str(path), fault is None, reader.sealed, records, good_bytes, fault)


def _first(fault: Fault | None, totals: np.ndarray) -> Fault | None:
    """The earlier of a read error and a step back in time."""
    faults = [fault] if fault is not None else []
    if totals[BACKWARD]:
        faults.append(
            Fault(
                f"receive time runs backwards ({totals[BACKWARD]} times)",
                int(totals[FIRST_BACKWARD]),
                int(totals[FIRST_BACKWARD_OFFSET]),
            )
        )
    return min(faults, key=lambda item: item.index) if faults else None
