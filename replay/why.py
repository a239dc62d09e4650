"""From one signal to its whole story.

The pipeline is a pure function of the tape, so nothing else needs to have been logged: the tape is
replayed up to the signal, and what the pipeline then has before it is what it had live.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from typing import Final, NamedTuple

from engine import trust
from engine.pipeline import Pipeline
from feeds import tape
from feeds.errors import InputError
from replay.merge import TapeStream
from replay.moment import Moment, answer
from replay.opening import opened
from replay.story import Story, tell
from replay.tape_search import search

MAX_NAMED: Final = 8  # instruments that an error names

_ID: Final = re.compile(
    r"(?:(?P<epoch>\d{1,20}):)?(?P<venue>[^.\s]+)\.(?P<symbol>\S+)/(?P<seq>\d{1,19})", re.ASCII
)
_MAX_SEQ: Final = (1 << 63) - 1


class SignalId(NamedTuple):
    """Which signal; ``epoch`` None where any will do."""

    epoch: int | None
    venue: str
    symbol: str
    signal_seq: int

    def __str__(self) -> str:
        epoch = "" if self.epoch is None else f"{self.epoch}:"
        return f"{epoch}{self.venue}.{self.symbol}/{self.signal_seq}"


def parse_id(text: str) -> SignalId:
    """``sim.ALPHA/1234`` or ``1700000000000000000:sim.ALPHA/1234``.

    Raises
    ------
    InputError
        If it is neither.
    """
    match = _ID.fullmatch(text)
    seq = int(match["seq"]) if match else 0
    if match is None or not 1 <= seq <= _MAX_SEQ:
        raise InputError(
            "not a signal's id",
            where="SIGNAL_ID",
            expected="venue.symbol/signal_seq, such as sim.ALPHA/1234, counted from 1, or the same"
            " behind epoch:",
            found=repr(text),
        )
    epoch = None if match["epoch"] is None else int(match["epoch"])
    return SignalId(epoch, match["venue"], match["symbol"], seq)


def why(
    wanted: str | SignalId,
    path: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    config: str | os.PathLike[str] | None = None,
    watch: Callable[[int], Callable[[int], None]] | None = None,
) -> Story:
    """Replay a tape up to one signal, and tell its story.

    A tape that was cut short, or is still being written, is taken up to its last whole record.

    Parameters
    ----------
    wanted : str or SignalId
    path : path-like
        The tape.
    model, config : path-like, optional
        As `replay.session.replay_tapes` takes them.
    watch : callable, optional
        Told the bytes of the file, then it gives back a callable that is told the bytes read.

    Raises
    ------
    InputError
        For an id that cannot be, another epoch, an instrument that is not on the tape, a signal
        beyond the last, a damaged tape, and a bundle or config that cannot be used.
    """
    signal_id = parse_id(wanted) if isinstance(wanted, str) else wanted
    stream = TapeStream([path], allow_truncated=True)
    meta = stream.metas[0]
    if signal_id.epoch is not None and signal_id.epoch != meta.engine_epoch:
        raise InputError(
            "a signal of another run of the engine",
            where=str(path),
            expected=f"engine epoch {signal_id.epoch}",
            found=str(meta.engine_epoch or "none: no engine recorded this tape"),
            fix="name the tape of that run",
        )
    if watch is not None:
        stream.tick = watch(stream.file_bytes)
    with opened(stream.metas, model=model, config=config) as setting:
        slot = _slot(setting.pipeline, signal_id, path)
        moment, until, by_timer = _replay_to(setting.pipeline, stream, slot, signal_id, path)
    found = search(path, moment.signal, until, by_timer=by_timer)
    return tell(str(path), meta, setting, moment, found)


def _slot(pipeline: Pipeline, wanted: SignalId, path: str | os.PathLike[str]) -> int:
    name = (wanted.venue, wanted.symbol)
    if name in pipeline.names:
        return pipeline.names.index(name)
    known = [".".join(item) for item in pipeline.names]
    near = difflib.get_close_matches(".".join(name), known, n=1)
    raise InputError(
        f"no instrument {'.'.join(name)} on the tape",
        where=str(path),
        expected=f"one of {', '.join(known[:MAX_NAMED])}"
        + (f" and {len(known) - MAX_NAMED} more" if len(known) > MAX_NAMED else ""),
        fix=f"did you mean {near[0]}/{wanted.signal_seq}?" if near else "",
    )


def _replay_to(
    pipeline: Pipeline,
    stream: TapeStream,
    slot: int,
    wanted: SignalId,
    path: str | os.PathLike[str],
) -> tuple[Moment, int, bool]:
    """The moment of the signal, the bytes of records before it, and whether a timer made it due."""
    done = last = 0
    for buf, start, stop in stream.chunks():
        at = start
        while at < stop:
            at = pipeline.advance(buf, at, stop)
            if not pipeline.fired:
                continue
            if pipeline.slot == slot:
                last = pipeline.signal_seq
                if last == wanted.signal_seq:
                    moment = answer(pipeline)
                    # Only a timer makes a book stale, and it stays to be gone on with.
                    by_timer = moment.signal["book_state"] == trust.STALE
                    assert not by_timer or buf[at + 16] == tape.TIMER
                    return moment, done + at - start, bool(by_timer)
            pipeline.answer()
        done += stop - start
    raise InputError(
        f"no signal {wanted.signal_seq} of {wanted.venue}.{wanted.symbol}",
        where=str(path),
        expected=f"1 to {last}" if last else "an instrument with signals",
        found=str(wanted.signal_seq),
        fix="" if last else "the tape has none of it",
    )
