"""What a block of threads does between two barriers.

A step is a list of operations, each a loop over items that the block's threads share out. An
operation may follow another without a barrier where no thread reads what another one wrote; all
that may run before the next barrier is one phase, and the small ones of a phase get warps of their
own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

WARP: Final = 32  # threads
MIN_THREADS: Final = 128
MAX_THREADS: Final = 512


@dataclass(frozen=True)
class Read:
    """One value that an operation reads; ``own``: item ``i`` reads element ``i`` and no other."""

    name: str
    own: bool = False


@dataclass(frozen=True)
class Operation:
    """One loop.

    Attributes
    ----------
    note : str
        What it is, for whoever reads the generated source.
    items : int
    body : str
        Statements for item ``i``.
    reads : tuple of Read
    writes : tuple of str
        Values; several operations may write parts of one.
    own : bool
        Whether item ``i`` writes element ``i`` of them and no other.
    before, after : str
        Statements around the loop, once a thread.
    """

    note: str
    items: int
    body: str
    reads: tuple[Read, ...]
    writes: tuple[str, ...]
    own: bool = False
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class Placed:
    """An operation whose item 0 is done by thread ``offset``, modulo the block's threads."""

    operation: Operation
    offset: int


def schedule(operations: list[Operation]) -> list[list[Placed]]:
    """Phases, with a barrier between any two.

    Parameters
    ----------
    operations : list of Operation
        In an order of computing.
    """
    writers: dict[str, set[int]] = {}
    for at, operation in enumerate(operations):
        for name in operation.writes:
            writers.setdefault(name, set()).add(at)
    phases: list[list[Placed]] = []
    settled: set[int] = set()  # done before the last barrier
    remaining = list(range(len(operations)))
    while remaining:
        now: dict[int, int] = {}  # of this phase: operation → offset
        cursor = 0
        for at in remaining:
            operation = operations[at]
            offset = _offset(operation, operations, writers, settled, now, cursor)
            if offset is None:
                continue
            if offset == cursor:
                cursor += -(-operation.items // WARP) * WARP
            now[at] = offset
        assert now, "operations that wait for each other"
        phases.append([Placed(operations[at], offset) for at, offset in now.items()])
        settled |= now.keys()
        remaining = [at for at in remaining if at not in now]
    return phases


def _offset(
    operation: Operation,
    operations: list[Operation],
    writers: dict[str, set[int]],
    settled: set[int],
    now: dict[int, int],
    cursor: int,
) -> int | None:
    """Where it may begin in this phase; None where it must wait for a barrier."""
    offsets = set()
    for read in operation.reads:
        for writer in writers.get(read.name, set()) - settled:
            chained = read.own and writer in now and operations[writer].own
            if not chained:
                return None
            offsets.add(now[writer])
    if len(offsets) > 1:
        return None
    return offsets.pop() if offsets else cursor


def block_threads(phases: list[list[Placed]]) -> int:
    """Threads that have something to do in the busiest phase, within limits; whole warps."""
    busiest = max(placed.offset + placed.operation.items for phase in phases for placed in phase)
    return min(max(-(-busiest // WARP) * WARP, MIN_THREADS), MAX_THREADS)
