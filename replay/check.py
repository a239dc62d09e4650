"""Is a book rebuilt from a raw recording the venue's book? Ask the recording itself.

Each venue's recording holds a second, independent statement of the book, and the engine's own book
is held against it: Binance's bookTicker, LOBSTER's orderbook file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from feeds.conversion import VENUES
from feeds.errors import InputError
from feeds.recording import Recording


class Difference(msgspec.Struct, frozen=True):
    """The first comparison that failed: what the venue states, and what the rebuilt book says."""

    line: int
    expected: dict[str, str]
    found: dict[str, str]


class Verdict(msgspec.Struct, frozen=True):
    """What a check found.

    Attributes
    ----------
    updates : int
        Changes applied to the book after its first snapshot.
    compared, equal : int
        Comparisons with the venue's own statement, and how many agreed in every field.
    crossed : int
        Updates after which the best bid was at or above the best ask.
    gaps : int
        Holes in the venue's update ids.
    not_compared : dict
        Updates that could not be compared, by reason.
    """

    file: str
    venue: str
    symbol: str
    lines: int
    updates: int
    compared: int
    equal: int
    crossed: int
    gaps: int
    not_compared: dict[str, int]
    counts: dict[str, int]
    first_difference: Difference | None

    @property
    def ok(self) -> bool:
        """True where something was compared and nothing was wrong."""
        whole = self.crossed == 0 and self.gaps == 0
        return self.compared > 0 and self.equal == self.compared and whole


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
        One of ``feeds.conversion.VENUES``.
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
        from replay import check_lobster

        return check_lobster.check(recording, symbol)
    from replay import check_binance

    return check_binance.check(recording, venue, symbol)
