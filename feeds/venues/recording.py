"""Raw recordings: text files of whole lines, plain or compressed, read in blocks of bounded size.

The compression is told by the first bytes (gzip: RFC 1952; xz: the .xz file format 1.2; zstd:
RFC 8878), never by the name alone. A file that ends inside its compressed stream still gives every
whole line it holds; the error comes after them.
"""

from __future__ import annotations

import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np
import zstandard

from feeds.errors import InputError

BLOCK_BYTES: Final = 1 << 20
READ_BYTES: Final = 1 << 16
PIECE_BYTES: Final = 1 << 18
MAX_LINE_BYTES: Final = 1 << 25
NEWLINE: Final = 10

_MAGICS: Final = (
    (b"\x1f\x8b", "gzip", ".gz"),
    (b"\xfd7zXZ\x00", "xz", ".xz"),
    (b"\x28\xb5\x2f\xfd", "zstd", ".zst"),
)


class Block(NamedTuple):
    """Whole lines in ``buf[:stop]``, each closed by a newline; one more newline follows them.

    ``first_line`` counts from 1, ``offset`` is where the block stands in the uncompressed data.
    """

    buf: np.ndarray
    stop: int
    first_line: int
    offset: int


class Recording:
    """A raw recording.

    Parameters
    ----------
    path : path-like
    block_bytes : int
        How much uncompressed data to hand out at a time.
    progress : callable, optional
        Called with the number of bytes of the file read so far.

    Attributes
    ----------
    lines : int
        Whole lines handed out so far by the current `blocks`.

    Raises
    ------
    InputError
        If the file is missing, empty, or not what its name says.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        block_bytes: int = BLOCK_BYTES,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        self.path = Path(path)
        self.lines = 0
        self._block_bytes = block_bytes
        self._piece_bytes = min(PIECE_BYTES, block_bytes)
        self._progress = progress
        try:
            with open(self.path, "rb") as file:
                start = file.read(8)
            self.file_bytes = self.path.stat().st_size
        except OSError as error:
            raise InputError(
                "recording cannot be read", where=str(path), found=error.strerror or str(error)
            ) from None
        if not start:
            raise InputError("empty recording", where=f"{path} at byte 0")
        self.compression = ""
        for magic, name, suffix in _MAGICS:
            if start.startswith(magic):
                self.compression = name
            elif self.path.suffix == suffix:
                raise InputError(
                    f"not a {name} file",
                    where=f"{path} at byte 0",
                    expected=repr(magic),
                    found=repr(start[: len(magic)]),
                    fix="record it again, or name it after what it is",
                )

    def blocks(self) -> Iterator[Block]:
        """Yield the recording from its start; a block's array is the caller's to keep.

        Raises
        ------
        InputError
            After the last whole line, where the compressed data is cut short or damaged; at a line
            longer than `MAX_LINE_BYTES`.
        """
        self.lines = 0
        offset = 0
        pieces: list[bytes] = []
        size = 0
        source = self._pieces()
        failure: Exception | None = None
        ended = False
        while not ended:
            try:
                piece = next(source, None)
            except (zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError) as error:
                failure = error
                piece = None
            if piece is None:
                ended = True
            else:
                pieces.append(piece)
                size += len(piece)
                if size < self._block_bytes:
                    continue
            data = bytearray().join([*pieces, b"\n"])
            # A last line without a newline is a line, but not where the data was cut.
            whole = size if ended and failure is None else 0
            stop = data.rfind(b"\n", 0, size) + 1
            if whole > stop:
                stop = whole + 1
                data += b"\n"
            if stop == 0:
                if size > MAX_LINE_BYTES:
                    raise InputError(
                        "line too long",
                        where=f"{self.path} line {self.lines + 1} (byte {offset})",
                        expected=f"at most {MAX_LINE_BYTES} bytes",
                        fix="this is no line-by-line recording",
                    )
                continue
            rest = bytes(data[stop:size])
            data[stop : stop + 1] = b"\n"
            first_line = self.lines + 1
            self.lines += data.count(b"\n", 0, stop)
            yield Block(np.frombuffer(data, dtype=np.uint8), stop, first_line, offset)
            offset += stop
            pieces, size = [rest], len(rest)
        if failure is not None:
            raise self._damaged(failure) from None

    def where(self, block: Block, position: int) -> str:
        """File, line and byte offset of ``block.buf[position]``, for an error."""
        line = block.first_line + int(np.count_nonzero(block.buf[:position] == NEWLINE))
        return self.place(line, block.offset + position)

    def place(self, line: int, offset: int) -> str:
        """File, line and byte offset, for an error."""
        inside = f" of the uncompressed {self.compression} data" if self.compression else ""
        return f"{self.path} line {line} (byte {offset}{inside})"

    def _damaged(self, error: Exception) -> InputError:
        cut = isinstance(error, EOFError)
        return InputError(
            "recording cut short" if cut else f"damaged {self.compression} data",
            where=f"{self.path} after line {self.lines}",
            found=f"the file ends inside its {self.compression} stream" if cut else str(error),
            fix=f"the {self.lines} lines before it are good",
        )

    def _read(self, file: BinaryIO) -> bytes:
        data = file.read(min(READ_BYTES, self._piece_bytes))
        if self._progress is not None:
            self._progress(file.tell())
        return data

    def _pieces(self) -> Iterator[bytes]:
        with open(self.path, "rb") as file:
            if self.compression == "":
                while piece := self._read(file):
                    yield piece
            elif self.compression == "gzip":
                yield from self._inflate(file)
            else:
                yield from self._decompress(file)

    def _inflate(self, file: BinaryIO) -> Iterator[bytes]:
        stream = zlib.decompressobj(wbits=31)
        while data := self._read(file):
            while data:
                if stream.eof:  # another member, or zero padding, follows
                    data = data.lstrip(b"\0")
                    if not data:
                        break
                    stream = zlib.decompressobj(wbits=31)
                if piece := stream.decompress(data, self._piece_bytes):
                    yield piece
                data = stream.unused_data if stream.eof else stream.unconsumed_tail
        if not stream.eof:
            if piece := stream.flush():
                yield piece
            raise EOFError

    def _decompress(self, file: BinaryIO) -> Iterator[bytes]:
        xz = self.compression == "xz"

        def start() -> Any:
            return lzma.LZMADecompressor() if xz else zstandard.ZstdDecompressor().decompressobj()

        stream = start()
        while data := self._read(file):
            while data:
                if stream.eof:
                    data = data.lstrip(b"\0")
                    if not data:
                        break
                    stream = start()
                if xz:
                    piece = stream.decompress(data, self._piece_bytes)
                    while piece:
                        yield piece
                        if stream.eof or stream.needs_input:
                            break
                        piece = stream.decompress(b"", self._piece_bytes)
                elif piece := stream.decompress(data):
                    yield piece
                data = stream.unused_data if stream.eof else b""
        if not stream.eof:
            raise EOFError
