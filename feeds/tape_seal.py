"""Sealing: a finished tape compressed, checked, and only then put in the raw one's place."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import zstandard

from feeds import tape
from feeds.errors import InputError
from feeds.tape_reader import TapeReader

SUFFIX: Final = ".zst"
LEVEL: Final = 6
_COMPARE_BYTES: Final = 1 << 20


class Sealed(msgspec.Struct, frozen=True):
    """What `seal_tape` did; sizes in bytes."""

    source: str
    target: str
    raw_bytes: int
    sealed_bytes: int
    kept: bool


def _nothing(_: int) -> None:
    pass


def seal_tape(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | None = None,
    *,
    keep: bool = False,
    overwrite: bool = False,
    level: int = LEVEL,
    tick: Callable[[int], None] = _nothing,
) -> Sealed:
    """Compress a raw tape to ``.tape.zst``, compare the result byte for byte, drop the raw one.

    The result appears under its name only when it is whole and on the disk, so an interruption
    leaves the raw tape as it was. ``zstd -d`` gives back the same bytes.

    Parameters
    ----------
    source : path-like
        A raw tape with its END record.
    target : path-like, optional
        Default is ``source`` with ``.zst`` behind.
    keep : bool
        Keep the raw tape.
    overwrite : bool
        Replace an existing target.
    level : int
        zstd level.
    tick : callable
        Told how many bytes are done; each byte counts twice, once written and once compared.

    Raises
    ------
    InputError
        If the source is sealed already, damaged or not closed, or the target cannot be written.
    """
    raw = Path(source)
    final = Path(target) if target is not None else raw.with_name(raw.name + SUFFIX)
    reader = TapeReader(raw)
    if reader.sealed:
        raise InputError("tape is sealed already", where=str(raw), fix="nothing to do")
    if final.exists() and not overwrite:
        raise InputError(
            "sealed tape exists already",
            where=str(final),
            fix="name another file with --out, or pass --overwrite",
        )
    for _ in reader.chunks():
        pass  # refuses damage and a missing END before anything is written
    part = final.with_name(final.name + ".part")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        tape.seal(raw, part, level)
        tick(reader.file_bytes)
        _compare(raw, part, reader.file_bytes, tick)
        sealed_bytes = part.stat().st_size
        os.replace(part, final)
        _sync_folder(final.parent)
    except OSError as error:
        raise InputError(
            "sealed tape cannot be written",
            where=str(final),
            found=error.strerror or str(error),
            fix="the raw tape is as it was",
        ) from None
    finally:
        part.unlink(missing_ok=True)
    if not keep:
        raw.unlink()
    return Sealed(str(raw), str(final), reader.file_bytes, sealed_bytes, keep)


def _compare(raw: Path, part: Path, size: int, tick: Callable[[int], None]) -> None:
    done = 0
    with (
        open(raw, "rb") as left,
        open(part, "rb") as file,
        zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as right,
    ):
        while True:
            expected, found = _read(left), _read(right)
            if expected != found:
                raise InputError(
                    "sealed tape does not unseal to the raw one",
                    where=f"{part} near byte {done} of the unsealed bytes",
                    fix="the raw tape is as it was; check the disk",
                )
            if not expected:
                return
            done += len(expected)
            tick(size + done)


def _read(stream: Any) -> bytes:
    parts = []
    missing = _COMPARE_BYTES
    while missing > 0 and (data := stream.read(missing)):
        parts.append(data)
        missing -= len(data)
    return b"".join(parts)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
