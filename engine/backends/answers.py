"""Answers that wait to be taken, for backends that answer at once."""

from __future__ import annotations

from typing import Final

import numpy as np

MAX_IN_FLIGHT: Final = 256


class AnswerQueue:
    """A ring of answers and their tickets.

    Parameters
    ----------
    n_outputs : int
    """

    def __init__(self, n_outputs: int) -> None:
        self._slots = list(np.zeros((MAX_IN_FLIGHT, n_outputs), dtype=np.float32))
        self._tickets = np.zeros(MAX_IN_FLIGHT, dtype=np.int64)
        self._put = 0
        self._taken = 0

    def next_slot(self) -> np.ndarray | None:
        """Where the next answer goes, float32 (outputs,); None where `MAX_IN_FLIGHT` wait."""
        full = self._put - self._taken == MAX_IN_FLIGHT
        return None if full else self._slots[self._put % MAX_IN_FLIGHT]

    def put(self, ticket: int) -> None:
        """The next slot holds the answer of a ticket."""
        assert self._put - self._taken < MAX_IN_FLIGHT
        self._tickets[self._put % MAX_IN_FLIGHT] = ticket
        self._put += 1

    def take(self, out: np.ndarray) -> int:
        """Copy the oldest answer into ``out`` and return its ticket; -1 where there is none."""
        if self._taken == self._put:
            return -1
        slot = self._taken % MAX_IN_FLIGHT
        out[:] = self._slots[slot]
        self._taken += 1
        return int(self._tickets[slot])
