# Hot path: `take_agreeing`, a free @njit function.
"""What the shadow's last answers said, and taking one that agrees without Python.

Nearly every answer agrees, and all that it changes are counts. Those stand in arrays, so that a
kernel takes it where it stands on the tape; an answer that may move something is left to
`engine.failover`, which counts in the same arrays.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from engine import recent
from engine.trust import MODE_INT8, SHADOW_AGREEING, SHADOW_OFF
from engine.trust_events import AT_FLAGS, AT_GROUPS, AT_TICKET, SETTLING
from feeds import wire
from feeds.inner import inner
from feeds.rawbytes import load_f32, load_i64, load_u16, load_u32

# Columns of `Tally.numbers`, int64.
SERVING: Final = 0  # what answers: MODE_INT8 or MODE_FP32
SHADOW: Final = 1  # `engine.trust.SHADOW_STATES`
ANSWERS: Final = 2  # so far
AGREEING: Final = 3  # in a row
DIVERGED: Final = 4  # a window: `COUNT`, `SEEN`, `NEXT`
DISAGREED: Final = 7
NUMBERS: Final = 10
# Columns of a window, from its first.
COUNT: Final = 0  # of its answers, how many are marked
SEEN: Final = 1  # answers in it
NEXT: Final = 2  # mark that the next answer overwrites


def _add_mark(window: Any, marks: Any, mark: int) -> None:
    """Take one more answer into a window, whose columns ``window`` begins with."""
    place = window[NEXT]
    if window[SEEN] == len(marks):
        window[COUNT] -= marks[place]
    else:
        window[SEEN] += 1
    marks[place] = mark
    window[COUNT] += mark
    window[NEXT] = place + 1 if place + 1 < len(marks) else 0


_add = inner("none(int64[::1], uint8[::1], int64)")(_add_mark)  # the same for kernels


class Window:
    """How many of the last answers were marked; exact.

    Parameters
    ----------
    numbers : ndarray of int64
        Of a tally.
    at : int
        Where the window's columns begin.
    size : int

    Attributes
    ----------
    marks : ndarray of uint8, shape (size,)
    """

    def __init__(self, numbers: np.ndarray, at: int, size: int) -> None:
        self.marks: Final = np.zeros(size, dtype=np.uint8)
        self._bytes: Final = self.marks.data
        self._of: Final = numbers[at : at + 3].data

    def add(self, mark: bool) -> None:
        """Take one more; the oldest of a full window goes."""
        _add_mark(self._of, self._bytes, mark)

    @property
    def count(self) -> int:
        """How many are marked."""
        return self._of[COUNT]

    @property
    def seen(self) -> int:
        """How many answers are in it."""
        return self._of[SEEN]

    @property
    def full(self) -> bool:
        """Whether the next answer takes the place of the oldest."""
        return self._of[SEEN] == len(self._bytes)

    def clear(self) -> None:
        """Forget every answer."""
        for column in (COUNT, SEEN, NEXT):
            self._of[column] = 0


class Tally:
    """Counts over the shadow's answers.

    Parameters
    ----------
    serving : int
        What answers at first.
    diverged_in, disagreed_in : int
        Answers in each window.

    Attributes
    ----------
    numbers : ndarray of int64, shape (NUMBERS,)
    diverged, disagreed : Window
        Answers whose scores lay too far apart, and those of another class.
    """

    def __init__(self, serving: int, diverged_in: int, disagreed_in: int) -> None:
        self.numbers: Final = np.zeros(NUMBERS, dtype=np.int64)
        self._told: Final = self.numbers.data
        self.diverged: Final = Window(self.numbers, DIVERGED, diverged_in)
        self.disagreed: Final = Window(self.numbers, DISAGREED, disagreed_in)
        self.serving = serving
        self.shadow = SHADOW_OFF

    @property
    def serving(self) -> int:
        """MODE_INT8 or MODE_FP32: which model answers, halted or not."""
        return self._told[SERVING]

    @serving.setter
    def serving(self, mode: int) -> None:
        self._told[SERVING] = mode

    @property
    def shadow(self) -> int:
        """`engine.trust.SHADOW_STATES`."""
        return self._told[SHADOW]

    @shadow.setter
    def shadow(self, state: int) -> None:
        self._told[SHADOW] = state

    @property
    def answers(self) -> int:
        """How many have been taken."""
        return self._told[ANSWERS]

    @answers.setter
    def answers(self, n: int) -> None:
        self._told[ANSWERS] = n

    @property
    def agreeing(self) -> int:
        """Answers in a row that agreed."""
        return self._told[AGREEING]

    @agreeing.setter
    def agreeing(self, n: int) -> None:
        self._told[AGREEING] = n

    def forget(self) -> None:
        """Forget what was said; only the number of answers stays."""
        self.diverged.clear()
        self.disagreed.clear()
        self.agreeing = 0


@inner(
    "boolean(uint8[::1], int64, int64, int64[:,::1], float32[:,::1], float64, int64[::1],"
    " uint8[::1], uint8[::1])"
)
def take_agreeing(  # type: ignore[no-untyped-def]
    buf, start, length, about, outs, limit, numbers, diverged, disagreed
):
    """Take an answer of the shadow that can move nothing.

    Parameters
    ----------
    buf : ndarray of uint8
    start, length : int
        Of an event's payload in it.
    about, outs : ndarray
        The last inferences; see `engine.recent`.
    limit : float
        Scores that lie further apart diverge.
    numbers : ndarray of int64, shape (NUMBERS,)
    diverged, disagreed : ndarray of uint8
        Marks of the windows.

    Returns
    -------
    bool
        False where it is anything else, and then nothing has changed: another event, an answer
        about an inference that is not kept, one that does not agree, one while FP32 answers or the
        shadow is not believed, or one that makes a window full which has marks.
    """
    n = outs.shape[1]
    group = wire.GROUP_HEADER_BYTES + wire.OUTPUT_BYTES * n
    if (
        length < AT_GROUPS + 2 * group
        or load_u16(buf, start) != wire.SHADOW_ANSWER_BLOCK
        or load_u16(buf, start + 2) != wire.SHADOW_ANSWER
    ):
        return False
    at = start + AT_GROUPS
    for _ in range(2):
        if load_u16(buf, at) != wire.OUTPUT_BYTES or load_u16(buf, at + 2) != n:
            return False
        at += group
    ticket = load_i64(buf, start + AT_TICKET)
    if ticket <= 0:
        return False
    row = ticket % len(about)
    if about[row, recent.TICKET] != ticket:
        return False
    if load_u32(buf, start + AT_FLAGS) & SETTLING:
        numbers[ANSWERS] += 1
        return True
    if (
        about[row, recent.MODE] != MODE_INT8
        or numbers[SERVING] != MODE_INT8
        or numbers[SHADOW] != SHADOW_AGREEING
        or (numbers[DISAGREED + COUNT] > 0 and numbers[DISAGREED + SEEN] < len(disagreed))
    ):
        return False
    at = start + AT_GROUPS + wire.GROUP_HEADER_BYTES
    best = other = 0
    best_score = other_score = np.float32(0.0)
    for i in range(n):
        ours, theirs = outs[row, i], load_f32(buf, at + wire.OUTPUT_BYTES * i)
        if not np.float64(abs(ours - theirs)) <= limit:
            return False
        if i == 0 or ours > best_score:
            best, best_score = i, ours
        if i == 0 or theirs > other_score:
            other, other_score = i, theirs
    if best != other:
        return False
    numbers[ANSWERS] += 1
    numbers[AGREEING] += 1
    _add(numbers[DIVERGED:], diverged, np.int64(0))
    _add(numbers[DISAGREED:], disagreed, np.int64(0))
    return True
