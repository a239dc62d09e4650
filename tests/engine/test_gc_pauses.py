"""The pause counter sees every collection between `watch` and `close`, and no other."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator

import pytest

from engine.gc_pauses import GcPauses

SLOW_S = 0.02


class Node:
    def __init__(self) -> None:
        self.itself = self


def slow_to_die() -> None:
    """Garbage that only a collection finds, and whose end takes `SLOW_S` of it."""
    node = Node()
    weakref.finalize(node, time.sleep, SLOW_S)


@pytest.fixture
def pauses() -> Iterator[GcPauses]:
    counted = GcPauses()
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()  # so that only the test collects
    counted.watch()
    yield counted
    counted.close()
    if enabled:
        gc.enable()


def test_it_counts_collections_of_every_generation(pauses: GcPauses) -> None:
    for generation in range(3):
        gc.collect(generation)
    assert pauses.collections == 3
    assert 0 < pauses.longest_ns <= pauses.total_ns


def test_the_longest_pause_is_that_of_the_slow_collection(pauses: GcPauses) -> None:
    slow_to_die()
    gc.collect()
    longest_ns = pauses.longest_ns
    assert longest_ns >= SLOW_S * 1e9
    gc.collect(0)
    assert pauses.longest_ns == longest_ns
    assert pauses.total_ns > longest_ns


def test_after_close_nothing_counts(pauses: GcPauses) -> None:
    gc.collect(0)
    pauses.close()
    pauses.close()
    gc.collect(0)
    assert pauses.collections == 1
