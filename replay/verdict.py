"""What holding a rebuilt book against the recording's own statement found."""

from __future__ import annotations

import msgspec


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
