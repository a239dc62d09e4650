"""Cores kept awake over a whole measurement, for all that is measured alike: engine, echo, sender.

What the kernel does with idle cores is the machine's matter and not one process's, so the benchmark
asks for it itself, and the engine's config leaves it alone. Where it cannot be had, the measurement
goes on and says so. Nor does the kernel gather anybody's memory into huge pages meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final, NamedTuple

from engine.cores import refuse_huge_pages
from engine.wakefulness import DEVICE, Wakefulness, cores_stay_awake
from feeds.errors import InputError

LET_SLEEP: Final = "--let-sleep"
BY_OTHERS: Final = "not by this command"
NOT_KEPT: Final = "the kernel was asked, but 'octick doctor' does not see it kept"


class IdleCores(NamedTuple):
    """Whether idle cores stay awake; ``why`` where they do not, or not by this command."""

    awake: bool
    why: str


@contextmanager
def idle_cores(*, let_sleep: bool) -> Iterator[IdleCores]:
    """Keep every core of the machine awake, where that can be had and is wanted."""
    refuse_huge_pages()
    with ExitStack() as held:
        why = LET_SLEEP if let_sleep else ""
        if not let_sleep:
            try:
                held.enter_context(Wakefulness(0))
            except InputError as error:
                why = f"/{DEVICE}: {error.found}"
        awake = cores_stay_awake()
        if awake and why:
            why = BY_OTHERS
        yield IdleCores(awake, why or ("" if awake else NOT_KEPT))


def describe(awake: bool, why: str) -> str:
    """One line for a person."""
    return ("kept awake" if awake else "let halt") + (f" ({why})" if why else "")
