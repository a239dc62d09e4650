# Hot path: the free @njit function `fill_columns`; the rest hands its columns to Parquet.
"""A tape as Parquet: one row a level update, one a trade, one a signal.

``book.parquet``, ``trades.parquet`` and ``signals.parquet`` open in pandas, polars and duckdb.
Prices and quantities stay int64 ticks and lots; each instrument's tick and lot stand as exact
decimals in the schema metadata, key ``octick.instruments`` (JSON). Times are timestamps in
nanoseconds, UTC. A snapshot's rows have ``snapshot`` set: all levels of that (epoch, seq)
replace the book; an empty one is a single row without side, price and quantity.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import pyarrow as pa
from numba import njit

from feeds import tape, wire
from feeds.errors import InputError
from feeds.instruments import MAX_INSTRUMENTS, InstrumentTable, find_instrument
from feeds.rawbytes import load_i64, load_u16, load_u32
from feeds.signal_table import (
    NAME,
    SIGNAL_SCHEMA,
    TIMESTAMP,
    ParquetFile,
    signal_batch,
    timestamps,
)
from feeds.tape_reader import Chunk, TapeReader

TABLES: Final = ("book", "trades", "signals")

# Columns of the book's rows, int64; trades share the first eight.
_RECORD: Final = 0
_RECV: Final = 1
_EXCHANGE: Final = 2
_SOURCE: Final = 3
_ROW: Final = 4
_EPOCH: Final = 5
_SEQ: Final = 6
_FLAGS: Final = 7
_PRICE: Final = 8
_QUANTITY: Final = 9
_SNAPSHOT: Final = 10
_SIDE: Final = 11
_BOOK_COLUMNS: Final = 12
_TRADE_ID: Final = 10
_AGGRESSOR: Final = 11
_TRADE_COLUMNS: Final = 12

_NO_SIDE: Final = 2

# The least bytes of tape that a row takes.
_LEVEL_ROW_BYTES: Final = wire.LEVEL_BYTES
_TRADE_ROW_BYTES: Final = tape.RECORD_HEADER_BYTES + wire.HEADER_BYTES + wire.TRADE_BLOCK
_SIGNAL_ROW_BYTES: Final = tape.RECORD_HEADER_BYTES + wire.HEADER_BYTES + wire.SIGNAL_BLOCK
_OUTPUT_ROW_BYTES: Final = wire.OUTPUT_BYTES

# What `fill_columns` counts.
_BOOK_ROWS: Final = 0
_TRADE_ROWS: Final = 1
_SIGNAL_ROWS: Final = 2
_OUTPUTS: Final = 3
_RECORDS: Final = 4
_SKIPPED: Final = 5
_COUNTS: Final = 6

_COMMON: Final = [
    pa.field("record", pa.int64()),
    pa.field("recv_time", TIMESTAMP),
    pa.field("exchange_time", TIMESTAMP),
    pa.field("source_time", TIMESTAMP),
    pa.field("venue", NAME),
    pa.field("symbol", NAME),
    pa.field("epoch", pa.uint64()),
    pa.field("seq", pa.uint64()),
    pa.field("flags", pa.uint64()),
]
_WORD: Final = pa.dictionary(pa.int8(), pa.string())
BOOK_SCHEMA: Final = pa.schema(
    [
        *_COMMON,
        pa.field("snapshot", pa.bool_()),
        pa.field("side", _WORD),
        pa.field("price_ticks", pa.int64()),
        pa.field("quantity_lots", pa.int64()),
    ]
)
TRADES_SCHEMA: Final = pa.schema(
    [
        *_COMMON,
        pa.field("price_ticks", pa.int64()),
        pa.field("quantity_lots", pa.int64()),
        pa.field("trade_id", pa.uint64()),
        pa.field("aggressor", _WORD),
    ]
)
_SIDES: Final = pa.array(["bid", "ask"])
_AGGRESSORS: Final = pa.array(["unknown", "buy", "sell"])
_SCHEMAS: Final = {"book": BOOK_SCHEMA, "trades": TRADES_SCHEMA, "signals": SIGNAL_SCHEMA}


@njit("void(int64[:,::1], int64, int64, uint8[::1], int64, int64, int64)", cache=True)
def _common(columns, i, record, buf, body, recv_ns, row):  # type: ignore[no-untyped-def]
    columns[_RECORD, i] = record
    columns[_RECV, i] = recv_ns
    columns[_EXCHANGE, i] = load_i64(buf, body + wire.AT_EXCHANGE_TIME)
    columns[_SOURCE, i] = load_i64(buf, body + wire.AT_SOURCE_TIME)
    columns[_ROW, i] = row
    columns[_EPOCH, i] = load_i64(buf, body + wire.AT_EPOCH)
    columns[_SEQ, i] = load_i64(buf, body + wire.AT_SEQ)
    columns[_FLAGS, i] = load_i64(buf, body + wire.AT_FLAGS)


@njit(
    "void(uint8[::1], int64, int64, int64[::1], uint8[::1], int64[:,::1], int64[::1],"
    " int64[:,::1], int64[:,::1], uint8[::1], uint8[::1], int64[::1], int64[::1])",
    cache=True,
)
def fill_columns(  # type: ignore[no-untyped-def]
    buf, start, stop, keys, names, steps, state, book, trades, blocks, outputs, lengths, counts
):
    """Spread the whole, checked records of ``buf[start:stop]`` over columns.

    ``keys``, ``names``, ``steps`` and ``state`` are those of an `InstrumentTable`; ``book`` and
    ``trades`` are int64 columns with room for every row that the bytes can hold; ``blocks``,
    ``outputs`` and ``lengths`` take the signals. ``counts`` is set to the rows of this call, but
    its records and skipped messages go on counting.
    """
    levels, n_trades, n_signals, n_outputs = 0, 0, 0, 0
    at = start
    while at < stop:
        length = load_u32(buf, at + 4)
        recv_ns = load_i64(buf, at + 8)
        kind = load_u16(buf, at + 16)
        body = at + tape.RECORD_HEADER_BYTES
        end = body + length
        record = counts[_RECORDS]
        counts[_RECORDS] += 1
        at = body + tape.padded(length)
        if kind == tape.SIGNAL:
            place = body + wire.HEADER_BYTES + load_u16(buf, body)
            if (
                length < wire.HEADER_BYTES + wire.SIGNAL_BLOCK + wire.GROUP_HEADER_BYTES
                or load_u16(buf, body + 2) != wire.SIGNAL
                or load_u16(buf, body) < wire.SIGNAL_BLOCK
                or place + wire.GROUP_HEADER_BYTES > end
            ):
                counts[_SKIPPED] += 1
                continue
            entry, count = load_u16(buf, place), load_u16(buf, place + 2)
            place += wire.GROUP_HEADER_BYTES
            if entry < wire.OUTPUT_BYTES or place + entry * count > end:
                counts[_SKIPPED] += 1
                continue
            for i in range(wire.SIGNAL_BLOCK):
                blocks[n_signals * wire.SIGNAL_BLOCK + i] = buf[body + wire.HEADER_BYTES + i]
            for k in range(count):
                for i in range(wire.OUTPUT_BYTES):
                    outputs[n_outputs * wire.OUTPUT_BYTES + i] = buf[place + k * entry + i]
                n_outputs += 1
            lengths[n_signals] = count
            n_signals += 1
            continue
        if kind != tape.MARKET:
            continue
        if wire.check(buf, body, end) != 0 or load_u16(buf, body + 2) == wire.TIMER:
            counts[_SKIPPED] += 1
            continue
        row = find_instrument(buf, body, keys, names, steps, state)
        template = load_u16(buf, body + 2)
        if template == wire.TRADE:
            _common(trades, n_trades, record, buf, body, recv_ns, row)
            trades[_PRICE, n_trades] = load_i64(buf, body + wire.AT_PRICE)
            trades[_QUANTITY, n_trades] = load_i64(buf, body + wire.AT_QUANTITY)
            trades[_TRADE_ID, n_trades] = load_i64(buf, body + wire.AT_TRADE_ID)
            trades[_AGGRESSOR, n_trades] = min(np.int64(buf[body + wire.AT_AGGRESSOR]), 3)
            n_trades += 1
        elif template == wire.SNAPSHOT or template == wire.DELTA:
            snapshot = 1 if template == wire.SNAPSHOT else 0
            first = levels
            place = body + wire.HEADER_BYTES + load_u16(buf, body)
            for side in range(2):
                entry = load_u16(buf, place)
                count = load_u16(buf, place + 2)
                place += wire.GROUP_HEADER_BYTES
                for _ in range(count):
                    _common(book, levels, record, buf, body, recv_ns, row)
                    book[_PRICE, levels] = load_i64(buf, place)
                    book[_QUANTITY, levels] = load_i64(buf, place + 8)
                    book[_SNAPSHOT, levels] = snapshot
                    book[_SIDE, levels] = side
                    levels += 1
                    place += entry
            if snapshot == 1 and levels == first:
                _common(book, levels, record, buf, body, recv_ns, row)
                book[_PRICE, levels] = 0
                book[_QUANTITY, levels] = 0
                book[_SNAPSHOT, levels] = 1
                book[_SIDE, levels] = _NO_SIDE
                levels += 1
    counts[_BOOK_ROWS] = levels
    counts[_TRADE_ROWS] = n_trades
    counts[_SIGNAL_ROWS] = n_signals
    counts[_OUTPUTS] = n_outputs


class _Columns:
    """Arrays for the rows that one chunk can hold; made anew only for a larger chunk."""

    def __init__(self) -> None:
        self.capacity = -1
        self.counts = np.zeros(_COUNTS, dtype=np.int64)

    def fill(self, chunk: Chunk, instruments: InstrumentTable) -> None:
        size = chunk.stop - chunk.start
        if size > self.capacity:
            self.capacity = size
            signals = size // _SIGNAL_ROW_BYTES + 1
            self.book = np.empty((_BOOK_COLUMNS, size // _LEVEL_ROW_BYTES + 1), dtype=np.int64)
            self.trades = np.empty((_TRADE_COLUMNS, size // _TRADE_ROW_BYTES + 1), dtype=np.int64)
            self.blocks = np.empty(signals * wire.SIGNAL_BLOCK, dtype=np.uint8)
            self.outputs = np.empty(size, dtype=np.uint8)
            self.lengths = np.empty(signals, dtype=np.int64)
        fill_columns(
            chunk.buf,
            chunk.start,
            chunk.stop,
            instruments.keys,
            instruments.names,
            instruments.steps,
            instruments.state,
            self.book,
            self.trades,
            self.blocks,
            self.outputs,
            self.lengths,
            self.counts,
        )

    def table(self, name: str, schema: pa.Schema, instruments: InstrumentTable) -> pa.Table:
        """Rows of one table that the last `fill` found."""
        counts = self.counts
        if name == "signals":
            n = int(counts[_SIGNAL_ROWS])
            blocks = self.blocks[: n * wire.SIGNAL_BLOCK].copy().view(wire.SIGNAL_DTYPE)
            outputs = self.outputs[: counts[_OUTPUTS] * wire.OUTPUT_BYTES].copy().view("<f4")
            table = signal_batch(blocks, outputs, self.lengths[:n])
            return table.replace_schema_metadata(schema.metadata)
        if name == "trades":
            rows = self.trades[:, : counts[_TRADE_ROWS]].copy()
            own = [
                pa.array(rows[_PRICE]),
                pa.array(rows[_QUANTITY]),
                pa.array(rows[_TRADE_ID].view(np.uint64)),
                _words(rows[_AGGRESSOR], _AGGRESSORS),
            ]
        else:
            rows = self.book[:, : counts[_BOOK_ROWS]].copy()
            empty = rows[_SIDE] == _NO_SIDE
            own = [
                pa.array(rows[_SNAPSHOT] != 0),
                _words(rows[_SIDE], _SIDES),
                pa.array(rows[_PRICE], mask=empty),
                pa.array(rows[_QUANTITY], mask=empty),
            ]
        names = [instruments.name(row) for row in range(len(instruments))]
        common = [
            pa.array(rows[_RECORD]),
            *(timestamps(rows[column]) for column in (_RECV, _EXCHANGE, _SOURCE)),
            _words(rows[_ROW], pa.array([venue for venue, _ in names], pa.string()), np.int32),
            _words(rows[_ROW], pa.array([symbol for _, symbol in names], pa.string()), np.int32),
            *(pa.array(rows[column].view(np.uint64)) for column in (_EPOCH, _SEQ, _FLAGS)),
        ]
        return pa.Table.from_arrays(common + own, schema=schema)


def _words(codes: np.ndarray, words: pa.Array, index: Any = np.int8) -> pa.DictionaryArray:
    """Codes as words; a code without a word is null."""
    indices = pa.array(codes.astype(index), mask=codes >= len(words))
    return pa.DictionaryArray.from_arrays(indices, words)


class Exported(msgspec.Struct, frozen=True):
    """What `export` wrote: files and their rows by table, and messages that it had to skip."""

    source: str
    files: dict[str, str]
    rows: dict[str, int]
    skipped: int


def _nothing(_: int) -> None:
    pass


def export(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    table: str = "book",
    overwrite: bool = False,
    allow_truncated: bool = False,
    tick: Callable[[int], None] = _nothing,
) -> Exported:
    """Write a tape as Parquet, a chunk at a time.

    Parameters
    ----------
    source : path-like
        The tape, raw or sealed.
    out : path-like
        A folder, which gets a file a table; or a name that ends in ``.parquet``, which gets
        ``table`` alone.
    table : str
        One of `TABLES`; only read where ``out`` is a file.
    overwrite : bool
        Replace existing files.
    allow_truncated : bool
        Take a tape without an END record up to its last whole record.
    tick : callable
        Told how many bytes of the tape are read.

    Raises
    ------
    InputError
        If the tape is damaged (the files then hold what stands before the damage) or a file
        cannot be written.
    """
    if table not in TABLES:
        raise InputError(
            "no such table", where="--table", expected=" or ".join(TABLES), found=repr(table)
        )
    target = Path(out)
    paths = (
        {table: target}
        if target.suffix == ".parquet"
        else {name: target / f"{name}.parquet" for name in TABLES}
    )
    reader = TapeReader(source)
    # A first pass learns instruments that only messages define, for the schema metadata.
    known = InstrumentTable(reader.meta.instruments, MAX_INSTRUMENTS)
    columns = _Columns()
    metadata = {
        "octick.instruments": msgspec.json.encode(_instruments(source, known)).decode(),
        "octick.source": reader.meta.source,
        "octick.created_ns": str(reader.meta.created_ns),
    }
    schemas = {name: _SCHEMAS[name].with_metadata(metadata) for name in paths}
    instruments = InstrumentTable(reader.meta.instruments, MAX_INSTRUMENTS)
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(ParquetFile(path, schemas[name], overwrite=overwrite))
            for name, path in paths.items()
        }
        for chunk in reader.chunks(allow_truncated=allow_truncated):
            columns.fill(chunk, instruments)
            for name, file in files.items():
                file.add(columns.table(name, schemas[name], instruments))
            tick(reader.file_bytes_read)
    return Exported(
        str(source),
        {name: str(path) for name, path in paths.items()},
        {name: file.rows for name, file in files.items()},
        int(columns.counts[_SKIPPED]),
    )


@njit(
    "void(uint8[::1], int64, int64, int64[::1], uint8[::1], int64[:,::1], int64[::1])",
    cache=True,
)
def _learn(buf, start, stop, keys, names, steps, state):  # type: ignore[no-untyped-def]
    """Take in the Instrument messages of whole, checked records."""
    at = start
    while at < stop:
        length = load_u32(buf, at + 4)
        body = at + tape.RECORD_HEADER_BYTES
        if (
            load_u16(buf, at + 16) == tape.MARKET
            and length >= wire.HEADER_BYTES
            and load_u16(buf, body + 2) == wire.INSTRUMENT
            and wire.check(buf, body, body + length) == 0
        ):
            find_instrument(buf, body, keys, names, steps, state)
        at = body + tape.padded(length)


def _instruments(source: str | os.PathLike[str], known: InstrumentTable) -> list[dict[str, Any]]:
    try:
        for chunk in TapeReader(source).chunks(allow_truncated=True):
            _learn(
                chunk.buf,
                chunk.start,
                chunk.stop,
                known.keys,
                known.names,
                known.steps,
                known.state,
            )
    except InputError:
        pass  # damage: told by the pass that writes, after what stands before it is kept
    return [known.describe(row) for row in range(len(known))]
