# Hot path: `remember`, a free @njit function.
"""The last inferences: what went in, what came out, whose it was.

A ring of fixed size. The shadow's answers are held against it, evidence quotes it, a model that
takes over catches up from it, and a candidate is judged on it.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numba import njit

MIN_ROWS: Final = 4_096
ROWS_AN_INSTRUMENT: Final = 64
MAX_ROWS: Final = 1 << 16

# Columns of `about`, int64.
TICKET: Final = 0  # counts inferences from 1; 0 = an empty row
SLOT: Final = 1
SIGNAL_SEQ: Final = 2
MODE: Final = 3  # what answered: MODE_INT8 or MODE_FP32
FRESH: Final = 4  # 1 = the model's stream started anew with it
ABOUT: Final = 5


class Row(NamedTuple):
    """One inference; arrays are views that the ring will overwrite.

    Attributes
    ----------
    ticket, slot, signal_seq, mode : int
    vector : ndarray of float64, shape (n_features,)
        Raw features.
    outputs : ndarray of float32, shape (n_outputs,)
    """

    ticket: int
    slot: int
    signal_seq: int
    mode: int
    vector: np.ndarray
    outputs: np.ndarray


@njit(
    "void(int64[:,::1], float64[:,::1], float32[:,::1], int64, int64, int64, int64, int64,"
    " float64[::1], float32[::1])",
    cache=True,
)
def remember(about, vectors, outs, ticket, slot, seq, mode, fresh, vector, outputs):  # type: ignore[no-untyped-def]
    """Write one inference over the oldest."""
    at = ticket % len(about)
    about[at, TICKET] = ticket
    about[at, SLOT] = slot
    about[at, SIGNAL_SEQ] = seq
    about[at, MODE] = mode
    about[at, FRESH] = fresh
    for i in range(len(vector)):
        vectors[at, i] = vector[i]
    for i in range(len(outputs)):
        outs[at, i] = outputs[i]


class Recent:
    """The ring.

    Parameters
    ----------
    n_instruments, n_features, n_outputs : int
    """

    def __init__(self, n_instruments: int, n_features: int, n_outputs: int) -> None:
        rows = min(max(MIN_ROWS, ROWS_AN_INSTRUMENT * n_instruments), MAX_ROWS)
        # Filled, and not just asked for: the system gives a page when it is first written to, which
        # takes as long as three inferences.
        self.about = np.full((rows, ABOUT), 0, dtype=np.int64)
        self.vectors = np.full((rows, n_features), 0.0)
        self.outputs = np.full((rows, n_outputs), 0.0, dtype=np.float32)

    def find(self, ticket: int) -> Row | None:
        """An inference by its ticket; None where it is not kept any more."""
        at = ticket % len(self.about)
        found, slot, seq, mode, _ = self.about[at].tolist()
        if found != ticket or ticket == 0:
            return None
        return Row(ticket, slot, seq, mode, self.vectors[at], self.outputs[at])

    def stretch(self, slot: int, before: int, most: int) -> np.ndarray:
        """Raw features of an instrument's last inferences, oldest first.

        Parameters
        ----------
        slot : int
        before : int
            Only tickets below this one.
        most : int
            Rows at most; fewer where the stream started anew since.

        Returns
        -------
        ndarray of float64, shape (rows, n_features)
        """
        about = self.about
        rows = np.flatnonzero(
            (about[:, SLOT] == slot) & (about[:, TICKET] > 0) & (about[:, TICKET] < before)
        )
        rows = rows[np.argsort(about[rows, TICKET])][-most:]
        starts = np.flatnonzero(about[rows, FRESH])
        if len(starts):
            rows = rows[starts[-1] :]
        return self.vectors[rows]

    def kept(self) -> tuple[np.ndarray, np.ndarray]:
        """Everything that is finite, oldest first.

        Returns
        -------
        vectors : ndarray of float64, shape (rows, n_features)
        slots : ndarray of int64, shape (rows,)
        """
        rows = np.flatnonzero((self.about[:, TICKET] > 0) & np.isfinite(self.vectors).all(axis=1))
        rows = rows[np.argsort(self.about[rows, TICKET])]
        return self.vectors[rows], self.about[rows, SLOT]
