"""A raw recording to a tape, whatever the venue.

Converting twice gives the same bytes: nothing on the tape depends on the clock, the machine or the
folder.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from feeds.errors import InputError
from feeds.venues.conversion import SOURCE_IDS, VENUES, Target
from feeds.venues.recording import Recording


class Converted(msgspec.Struct, frozen=True):
    """What a conversion made; ``counts`` holds what was met on the way and is on no tape."""

    file: str
    venue: str
    symbol: str
    tape: str
    tick: str
    lot: str
    lines: int
    messages: int
    snapshots: int
    deltas: int
    trades: int
    gaps: int
    counts: dict[str, int]
    tape_bytes: int
    seconds: float
    lines_per_s: float


def tape_path(file: str | os.PathLike[str], out: str | os.PathLike[str] | None, seal: bool) -> Path:
    """Where the tape goes: ``out``, else beside the recording under its name."""
    if out is not None:
        path = Path(out)
    else:
        path = Path(file)
        while path.suffix in (".gz", ".xz", ".zst", ".csv", ".jsonl", ".txt"):
            path = path.with_suffix("")
        path = path.with_name(path.name + ".tape")
    if seal and path.suffix != ".zst":
        path = path.with_name(path.name + ".zst")
    return path


def convert(
    file: str | os.PathLike[str],
    venue: str,
    *,
    symbol: str | None = None,
    tick: str | None = None,
    lot: str | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    seal: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Converted:
    """Convert a raw recording to a tape.

    Parameters
    ----------
    file : path-like
        The recording; for LOBSTER the message file.
    venue : str
        One of `VENUES`.
    symbol : str, optional
        The instrument wanted, where the recording holds several.
    tick, lot : str, optional
        Exact decimals; found from the data where left out.
    out : path-like, optional
        The tape; default: beside the recording.
    seal : bool
        Compress the finished tape to ``.tape.zst``.

    Raises
    ------
    InputError
        If the recording cannot be used or the tape cannot be written. What was converted before a
        bad line stays on a valid tape, which the error names.
    """
    if venue not in SOURCE_IDS:
        raise InputError(
            "unknown venue", where="--venue", expected=", ".join(VENUES), found=repr(venue)
        )
    recording = Recording(file, progress=progress)
    final = tape_path(file, out, seal)
    if seal and final.exists() and not overwrite:
        raise InputError(
            "tape exists already",
            where=str(final),
            fix="name another file with --out, or pass --overwrite",
        )
    raw = final.with_suffix("") if seal else final
    target = Target(recording, venue, raw, overwrite)
    if venue == "lobster":
        from feeds.venues.lobster import convert as convert_venue
    else:
        from feeds.venues.binance import convert as convert_venue
    begun = time.perf_counter()
    done = convert_venue(recording, target, symbol, tick, lot)
    target.close()
    if seal:
        from feeds.tape_seal import seal_tape

        seal_tape(raw, final, overwrite=overwrite)
    seconds = time.perf_counter() - begun
    return Converted(
        file=str(file),
        venue=venue,
        symbol=done.symbol,
        tape=str(final),
        tick=done.tick,
        lot=done.lot,
        lines=done.lines,
        messages=done.messages,
        snapshots=done.snapshots,
        deltas=done.deltas,
        trades=done.trades,
        gaps=done.gaps,
        counts=done.counts,
        tape_bytes=final.stat().st_size,
        seconds=round(seconds, 6),
        lines_per_s=round(done.lines / max(seconds, 1e-9)),
    )
