"""Signals as rows of Parquet, in bounded memory: for `octick replay --out` and `tape export`."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feeds import wire
from feeds.errors import InputError

ROW_GROUP_ROWS: Final = 1 << 16
SIGNAL_ROWS: Final = 1 << 14  # of a row group of signals: with all their fields they are wide
TIMESTAMP: Final = pa.timestamp("ns", tz="UTC")
NAME: Final = pa.dictionary(pa.int32(), pa.string())
_PLAIN: Final = {
    "u1": pa.uint8(),
    "u2": pa.uint16(),
    "u4": pa.uint32(),
    "u8": pa.uint64(),
    "i8": pa.int64(),
}
_AT_OUTPUTS: Final = wire.HEADER_BYTES + wire.SIGNAL_BLOCK + wire.GROUP_HEADER_BYTES
_BLOCK_END: Final = wire.HEADER_BYTES + wire.SIGNAL_BLOCK


def _column(name: str, dtype: np.dtype) -> pa.Field:
    if name.endswith("_ns"):
        return pa.field(name.removesuffix("_ns"), TIMESTAMP)
    if dtype.kind == "S":
        return pa.field(name, NAME)
    return pa.field(name, _PLAIN[f"{dtype.kind}{dtype.itemsize}"])


_FIELDS: Final = [name for name in wire.SIGNAL_DTYPE.names or () if "padding" not in name]
SIGNAL_SCHEMA: Final = pa.schema(
    [
        *(_column(name, wire.SIGNAL_DTYPE[name]) for name in _FIELDS),
        pa.field("tradable", pa.bool_()),
        pa.field("outputs", pa.list_(pa.float32())),
    ]
)


def names_column(values: np.ndarray) -> pa.DictionaryArray:
    """Fixed byte strings as a dictionary column of text."""
    unique, index = np.unique(values, return_inverse=True)
    words = pa.array([word.decode("ascii", "replace") for word in unique.tolist()], pa.string())
    return pa.DictionaryArray.from_arrays(pa.array(index.astype(np.int32)), words)


def timestamps(values: np.ndarray) -> pa.Array:
    """int64 nanoseconds since the UNIX epoch as UTC timestamps, without a copy."""
    return pa.array(np.ascontiguousarray(values, dtype=np.int64)).view(TIMESTAMP)


def signal_batch(blocks: np.ndarray, outputs: np.ndarray, counts: np.ndarray) -> pa.Table:
    """Rows for signals.

    Parameters
    ----------
    blocks : ndarray of SIGNAL_DTYPE, shape (n,)
    outputs : ndarray of float32, shape (sum of counts,)
    counts : ndarray of int, shape (n,)
        Outputs of each signal.
    """
    columns: list[Any] = []
    for name in _FIELDS:
        values = blocks[name]
        if name.endswith("_ns"):
            columns.append(timestamps(values))
        elif values.dtype.kind == "S":
            columns.append(names_column(values))
        else:
            columns.append(pa.array(np.ascontiguousarray(values)))
    columns.append(pa.array(blocks["reasons"] == 0))
    offsets = np.zeros(len(blocks) + 1, dtype=np.int32)
    np.cumsum(counts, out=offsets[1:])
    columns.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(outputs, pa.float32())))
    return pa.Table.from_arrays(columns, schema=SIGNAL_SCHEMA)


class ParquetFile:
    """A Parquet file written in row groups of at least ``row_group_rows`` rows.

    What was written is a valid file once `close` ran, also after an error half-way.

    Parameters
    ----------
    path : path-like
    schema : pyarrow.Schema
    overwrite : bool
        Replace an existing file instead of refusing.
    row_group_rows : int
        Rows that wait in memory until they are written together.

    Raises
    ------
    InputError
        If the file exists or cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        schema: pa.Schema,
        *,
        overwrite: bool = False,
        row_group_rows: int = ROW_GROUP_ROWS,
    ) -> None:
        self.path = Path(path)
        self.rows = 0
        self._row_group_rows = row_group_rows
        self._schema = schema
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        if self.path.exists() and not overwrite:
            raise InputError(
                "file exists already",
                where=str(self.path),
                fix="name another file with --out, or pass --overwrite",
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(
                self.path, schema, compression="zstd", version="2.6", write_statistics=True
            )
        except OSError as error:
            raise InputError(
                "file cannot be written",
                where=str(self.path),
                found=error.strerror or str(error),
            ) from None

    def add(self, table: pa.Table) -> None:
        """Append rows; they reach the file with the next full row group."""
        if table.num_rows == 0:
            return
        self._waiting.append(table)
        self._waiting_rows += table.num_rows
        self.rows += table.num_rows
        if self._waiting_rows >= self._row_group_rows:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            table = pa.concat_tables(self._waiting).unify_dictionaries()
            self._waiting, self._waiting_rows = [], 0
            self._writer.write_table(table, row_group_size=4 * self._row_group_rows)

    def close(self) -> None:
        """Write what is left and the footer."""
        try:
            self._flush()
        finally:
            self._writer.close()

    def __enter__(self) -> ParquetFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class SignalFile:
    """Takes SBE Signals one by one and writes them as Parquet.

    Parameters
    ----------
    path : path-like
    metadata : dict of str to str, optional
        Goes into the schema metadata.
    overwrite : bool
        Replace an existing file instead of refusing.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        metadata: dict[str, str] | None = None,
        overwrite: bool = False,
    ) -> None:
        schema = SIGNAL_SCHEMA.with_metadata(metadata) if metadata else SIGNAL_SCHEMA
        self._file = ParquetFile(path, schema, overwrite=overwrite, row_group_rows=SIGNAL_ROWS)
        self._schema = schema
        self._blocks = bytearray()
        self._outputs = bytearray()
        self._counts: list[int] = []

    def append(self, message: bytes | memoryview) -> None:
        """Add one SBE Signal."""
        self._blocks += message[wire.HEADER_BYTES : _BLOCK_END]
        self._outputs += message[_AT_OUTPUTS:]
        self._counts.append((len(message) - _AT_OUTPUTS) // wire.OUTPUT_BYTES)
        if len(self._counts) >= SIGNAL_ROWS:
            self._flush()

    def _flush(self) -> None:
        blocks = np.frombuffer(bytes(self._blocks), dtype=wire.SIGNAL_DTYPE)
        outputs = np.frombuffer(bytes(self._outputs), dtype="<f4")
        table = signal_batch(blocks, outputs, np.array(self._counts, dtype=np.int64))
        self._blocks.clear()
        self._outputs.clear()
        self._counts.clear()
        self._file.add(table.replace_schema_metadata(self._schema.metadata))

    def close(self) -> None:
        """Write what is left and close the file."""
        try:
            self._flush()
        finally:
            self._file.close()

    @property
    def rows(self) -> int:
        """Signals taken."""
        return self._file.rows + len(self._counts)

    def __enter__(self) -> SignalFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
