"""Whose messages a topic brings: one engine's, those of its restarts, or of two engines at once.

An engine is known by its epoch, the start of its run, and by the hashes of what makes its signals.
A newer epoch after an older one that fell silent is a restart. An epoch that speaks again after
another one did is one of two engines that publish side by side: a conflict.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

Conflicts = Literal["mark", "refuse"]
Hashes = tuple[int, int, int, int]  # as `HASH_NAMES` names them

HASH_NAMES: Final = ("model", "config", "features", "code")
CONFLICT_MEMORY: Final = 256  # messages after which an engine that fell silent is forgotten
MAX_EPOCHS: Final = 4  # engine epochs followed on each topic
NO_EPOCH: Final = -1


class Judged(NamedTuple):
    """What a message is, held against those before it.

    Attributes
    ----------
    verdict : str
        "taken", "duplicate" (was here before) or "refused" (of another engine).
    lost : int
        Messages of its engine that were lost just before it.
    restarted : bool
        The first one that is taken of a newer run.
    noticed : bool
        It shows that another engine, heard just before, publishes beside its own.
    why : str
        What the other engine is, while there is one; else "".
    """

    verdict: Literal["taken", "duplicate", "refused"]
    lost: int = 0
    restarted: bool = False
    noticed: bool = False
    why: str = ""


_PLAIN: Final = Judged("taken")
_DUPLICATE: Final = Judged("duplicate")
_REFUSED: Final = Judged("refused")


class Heard:
    """What was heard on one topic.

    Attributes
    ----------
    epoch : int
        The engine whose message was taken last; `NO_EPOCH` before the first.
    last : dict of int to int
        The last seq of each epoch, at most `MAX_EPOCHS` of them.
    lost : int
        Messages lost, of the engines that were followed.
    """

    __slots__ = (
        "_breaks",
        "_first",
        "_hashes",
        "_left",
        "_other",
        "_silent",
        "_why",
        "epoch",
        "last",
        "lost",
    )

    def __init__(self) -> None:
        self.epoch = NO_EPOCH
        self.last: dict[int, int] = {}
        self.lost = 0
        self._hashes: dict[int, Hashes | None] = {}
        self._left = 0  # messages for which a conflict is still told
        self._why = ""
        # Only where another engine is refused:
        self._first = NO_EPOCH  # the engine that was heard first
        self._silent = 0  # messages of others since that one was heard
        self._other = NO_EPOCH  # the last of those others
        self._breaks = 0  # lost connections when the engine in force was first heard

    def judge(self, epoch: int, seq: int, hashes: Hashes | None) -> Judged:
        """Hold a message against those before it; each engine's are taken."""
        last = self.last.get(epoch)
        if last is not None and seq <= last:
            return _DUPLICATE
        before = self.epoch
        switched = epoch != before != NO_EPOCH
        restarted = switched and last is None and epoch > max(self.last)
        if switched and not restarted:
            self._notice(hashes, before)
        return self._take(epoch, seq, hashes, restarted, switched and not restarted)

    def judge_refusing(self, epoch: int, seq: int, hashes: Hashes | None, breaks: int) -> Judged:
        """Hold a message against those before it; those of one engine are taken.

        That is the one heard first, until it has been silent for `CONFLICT_MEMORY` messages of
        others. A newer one is followed at once where it must be its restart: it has the same
        hashes, or the connection was lost since the one before it was first heard. Should that
        one be heard again after all, it is followed as before.

        Parameters
        ----------
        breaks : int
            How often the connection was lost so far; needed only with another epoch.
        """
        last = self.last.get(epoch)
        if last is not None and seq <= last:
            return _DUPLICATE
        before = self.epoch
        noticed = restarted = False
        if before == NO_EPOCH:
            self._first, self._breaks = epoch, breaks
        elif epoch == self._first:
            noticed = self._silent > 0
            self._silent = 0
            if noticed:
                self._notice(hashes, self._other)
        else:
            self._silent += 1
            self._other = epoch
            newer = epoch > before
            if self._silent > CONFLICT_MEMORY:
                self._first, self._silent, self._left = epoch, 0, 0
                restarted = newer
            elif epoch != before:
                same = hashes == self._hashes.get(before)
                if not (newer and last is None and (same or breaks > self._breaks)):
                    self._remember(epoch, seq, hashes)
                    return _REFUSED
                restarted = True
            if epoch != before:
                self._breaks = breaks
        return self._take(epoch, seq, hashes, restarted, noticed)

    def _take(
        self, epoch: int, seq: int, hashes: Hashes | None, restarted: bool, noticed: bool
    ) -> Judged:
        last = self.last.get(epoch)
        lost = 0
        if last is not None:
            lost = seq - last - 1
        elif restarted:
            lost = seq - 1
        self.epoch = epoch
        self._remember(epoch, seq, hashes)
        self.lost += lost
        if self._left == 0:
            if lost == 0 and not restarted:
                return _PLAIN
            return Judged("taken", lost, restarted, noticed)
        self._left -= 1
        return Judged("taken", lost, restarted, noticed, self._why)

    def _remember(self, epoch: int, seq: int, hashes: Hashes | None) -> None:
        self.last[epoch] = seq
        self._hashes[epoch] = hashes
        if len(self.last) > MAX_EPOCHS:
            kept = (epoch, self.epoch, self._first)
            oldest = min(known for known in self.last if known not in kept)
            del self.last[oldest], self._hashes[oldest]

    def _notice(self, hashes: Hashes | None, other: int) -> None:
        self._left = CONFLICT_MEMORY
        self._why = _another(hashes, self._hashes.get(other))


def _another(mine: Hashes | None, other: Hashes | None) -> str:
    """What is different about the other engine."""
    if mine is None or other is None:
        return "another engine"
    named = zip(HASH_NAMES, mine, other, strict=True)
    differing = [f"{name} {theirs:016x}" for name, ours, theirs in named if ours != theirs]
    if not differing:
        return "another engine with the same model, config, features and code"
    return "another engine with " + ", ".join(differing)
