"""The book against a naive one made of two dictionaries, after every operation."""

from __future__ import annotations

import os

import numpy as np
import pytest
from numba import njit
from sortedcontainers import SortedDict

from engine import book
from feeds import wire

OPERATIONS = int(os.environ.get("OCTICK_BOOK_OPERATIONS", "1000000"))


WORD = (1 << 64) - 1


def fingerprint(price: int, quantity: int) -> int:
    """A 64-bit mix of one level (splitmix64); the sum over a side names its set of levels."""
    z = (price * 0x9E3779B97F4A7C15 + quantity * 0xD1B54A32D192ED03) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


@njit("uint64(int64[:,:,::1], int64[::1], int64)")
def fingerprint_of(levels, depth, side):  # type: ignore[no-untyped-def]
    """The same over our own arrays: 0 where they are not sorted best last, or hold no quantity."""
    total = np.uint64(0)
    sign = 1 if side == 0 else -1
    for i in range(depth[side]):
        price, quantity = levels[side, 0, i], levels[side, 1, i]
        if quantity <= 0 or (i > 0 and sign * price <= sign * levels[side, 0, i - 1]):
            return np.uint64(0)
        z = np.uint64(price) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64(quantity) * np.uint64(0xD1B54A32D192ED03)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        total += z ^ (z >> np.uint64(31))
    return total


class NaiveBook:
    """Level II as anybody would write it: a sorted dictionary a side, and its fingerprint."""

    def __init__(self) -> None:
        self.sides = (SortedDict(), SortedDict())
        self.fingerprints = [0, 0]

    def set(self, side: int, price: int, quantity: int) -> int:
        before = self.sides[side].pop(price, 0)
        change = 0
        if before:
            change -= fingerprint(price, before)
        if quantity:
            self.sides[side][price] = quantity
            change += fingerprint(price, quantity)
        self.fingerprints[side] = (self.fingerprints[side] + change) & WORD
        return before

    def replace(self, bids: list[tuple[int, int]], asks: list[tuple[int, int]]) -> None:
        self.sides = (SortedDict(bids), SortedDict(asks))
        self.fingerprints = [
            sum(fingerprint(*level) for level in levels) & WORD for levels in (bids, asks)
        ]

    def best_last(self, side: int) -> list[tuple[int, int]]:
        items = list(self.sides[side].items())
        return items if side == book.BID else items[::-1]


def new_book(capacity: int = 4096) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((2, 2, capacity), dtype=np.int64), np.zeros(2, dtype=np.int64)


def side_of(levels: np.ndarray, depth: np.ndarray, side: int) -> list[tuple[int, int]]:
    n = depth[side]
    return list(zip(levels[side, 0, :n].tolist(), levels[side, 1, :n].tolist(), strict=True))


def apply(levels: np.ndarray, depth: np.ndarray, message: bytes) -> np.ndarray:
    buf = np.frombuffer(message, dtype=np.uint8).copy()
    assert wire.check(buf, 0, len(buf)) == 0
    flow = np.zeros(book.FLOW_FIELDS, dtype=np.int64)
    if wire.template_id(message) == wire.SNAPSHOT:
        book.apply_snapshot(levels, depth, buf, 0)
    else:
        book.apply_levels(levels, depth, flow, buf, 0)
    return flow


def delta(bids: list[tuple[int, int]], asks: list[tuple[int, int]]) -> bytes:
    return wire.encode_book(wire.DELTA, 1, 0, 1, 1, 0, 0, bids, asks)


def snapshot(bids: list[tuple[int, int]], asks: list[tuple[int, int]]) -> bytes:
    return wire.encode_book(wire.SNAPSHOT, 1, 0, 1, 1, 0, 0, bids, asks)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [40, 1500], ids=["near the top", "deep"])
def test_equals_a_naive_book_after_every_one_of_a_million_operations(spread: int) -> None:
    rng = np.random.default_rng(7)
    levels, depth = new_book(1 << 14)
    naive = NaiveBook()
    operations = OPERATIONS // 2
    sides = rng.integers(0, 2, operations).tolist()
    offsets = rng.exponential(spread, operations).astype(int).tolist()
    quantities = (rng.integers(0, 3, operations) * rng.integers(1, 1000, operations)).tolist()
    drift = np.cumsum(rng.integers(-1, 2, operations)).tolist()
    for i in range(operations):
        side = sides[i]
        middle = 1_000_000 + drift[i]
        price = middle - offsets[i] if side == book.BID else middle + 1 + offsets[i]
        before = naive.set(side, price, quantities[i])
        assert book.set_level(levels, depth, side, price, quantities[i]) == before
        # The whole side, each time: as many levels, sorted, and the same set of them.
        if depth[side] != len(naive.sides[side]) or (
            fingerprint_of(levels, depth, side) != naive.fingerprints[side]
        ):
            pytest.fail(f"operation {i} (side {side}, {price}: {quantities[i]}): books differ")
        if i % 20_000 == 0:
            for each in (book.BID, book.ASK):
                assert side_of(levels, depth, each) == naive.best_last(each), f"operation {i}"
            if i % 100_000 == 0:
                bids = naive.best_last(book.BID)[::-1][:1000]
                asks = naive.best_last(book.ASK)[::-1][:1000]
                naive.replace(bids, asks)
                apply(levels, depth, snapshot(bids, asks))
                for each in (book.BID, book.ASK):
                    assert side_of(levels, depth, each) == naive.best_last(each)
    for each in (book.BID, book.ASK):
        assert side_of(levels, depth, each) == naive.best_last(each)


@njit("boolean(int64[:,:,::1], int64[::1])")
def is_sorted(levels, depth):  # type: ignore[no-untyped-def]
    for side in range(2):
        sign = 1 if side == 0 else -1
        for i in range(1, depth[side]):
            if sign * levels[side, 0, i] <= sign * levels[side, 0, i - 1]:
                return False
        for i in range(depth[side]):
            if levels[side, 1, i] <= 0:
                return False
    return True


def test_stays_sorted_and_positive_whatever_comes() -> None:
    rng = np.random.default_rng(11)
    levels, depth = new_book(64)
    for _ in range(20_000):
        side, price = int(rng.integers(0, 2)), int(rng.integers(1, 200))
        book.set_level(levels, depth, side, price, int(rng.integers(0, 5)))
        assert is_sorted(levels, depth)
        assert depth.max() <= 64


def test_a_full_side_drops_its_worst_level_and_says_so() -> None:
    levels, depth = new_book(4)
    for price in (10, 11, 12, 13):
        assert book.set_level(levels, depth, book.BID, price, 1) == 0
    assert book.set_level(levels, depth, book.BID, 14, 5) == -1
    assert [price for price, _ in side_of(levels, depth, book.BID)] == [11, 12, 13, 14]
    assert book.set_level(levels, depth, book.BID, 9, 5) == -1, "worse than all: it is dropped"
    assert [price for price, _ in side_of(levels, depth, book.BID)] == [11, 12, 13, 14]


def test_flow_of_a_delta_counts_lots_added_and_removed() -> None:
    levels, depth = new_book()
    apply(levels, depth, snapshot([(100, 10), (99, 20)], [(101, 5), (102, 6)]))
    flow = apply(levels, depth, delta([(100, 4), (98, 7)], [(101, 0), (103, 2)]))
    assert flow.tolist() == [7, 6, 2, 5]
    assert side_of(levels, depth, book.BID) == [(98, 7), (99, 20), (100, 4)]
    assert side_of(levels, depth, book.ASK) == [(103, 2), (102, 6)]


def test_a_snapshot_replaces_everything_in_any_order_of_levels() -> None:
    levels, depth = new_book()
    apply(levels, depth, snapshot([(100, 10), (99, 20)], [(101, 5)]))
    apply(levels, depth, snapshot([(97, 1), (98, 2), (96, 3)], []))
    assert side_of(levels, depth, book.BID) == [(96, 3), (97, 1), (98, 2)]
    assert depth.tolist() == [3, 0]


def test_removing_a_level_that_is_not_there_changes_nothing() -> None:
    levels, depth = new_book()
    apply(levels, depth, snapshot([(100, 10)], [(101, 5)]))
    assert book.set_level(levels, depth, book.ASK, 500, 0) == 0
    assert depth.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("bid", "ask", "expected"), [(100, 101, False), (101, 101, True), (102, 101, True)]
)
def test_crossed_and_locked(bid: int, ask: int, expected: bool) -> None:
    levels, depth = new_book()
    apply(levels, depth, snapshot([(bid, 1)], [(ask, 1)]))
    assert book.crossed(levels, depth) is expected
    book.set_level(levels, depth, book.BID, bid, 0)
    assert book.crossed(levels, depth) is False, "a book with an empty side is not crossed"
