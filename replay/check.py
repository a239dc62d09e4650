"""Is a book rebuilt from a raw recording the venue's book? Ask the recording itself.

Each venue's recording holds a second, independent statement of the book, and the engine's own book
is held against it: Binance's bookTicker, LOBSTER's orderbook file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from feeds.errors import InputError
from feeds.venues.conversion import VENUES
from feeds.venues.recording import Recording
from replay import check_binance, check_lobster
from replay.verdict import Verdict


def check(
    file: str | os.PathLike[str],
    venue: str,
    *,
    symbol: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> Verdict:
    """Rebuild the book from a raw recording and hold it against the recording's own statement.

    Parameters
    ----------
    file : path-like
        The recording; for LOBSTER the message file.
    venue : str
        One of ``feeds.venues.conversion.VENUES``.
    symbol : str, optional
        The instrument wanted, where the recording holds several.

    Raises
    ------
    InputError
        If the recording cannot be used.
    """
    if venue not in VENUES:
        raise InputError(
            "unknown venue", where="--venue", expected=", ".join(VENUES), found=repr(venue)
        )
    recording = Recording(Path(file), progress=progress)
    if venue == "lobster":
        return check_lobster.check(recording, symbol)
    return check_binance.check(recording, venue, symbol)
