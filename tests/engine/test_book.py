"""The book against a naive one made of two dictionaries, after every operation."""

from __future__ import annotations

import os

import numpy as np
import pytest
from numba import njit
from sortedcontainers import SortedDict

from engine import book
from feeds import codec, wire

OPERATIONS = int(os.environ.get("OCTICK_BOOK_OPERATIONS", "1000000"))


WORD = (1 << 64) - 1


def fingerprint(price: int, quantity: int) -> int:
    """A 64-bit mix of one level (splitmix64); the sum over a side names its set of levels."""
    z = (price * 0x9E3779B97F4A7C15 + quantity * 0xD1B54A32D192ED03) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


@njit("uint64(int64[:,::1], int64)")
def fingerprint_of(levels, side):  # type: ignore[no-untyped-def]
    """The same over our own levels: 0 where they are not best first, or hold no quantity."""
    total = np.uint64(0)
    sign = 1 if side == 0 else -1
    for i in range(len(levels)):
        price, quantity = levels[i, 0], levels[i, 1]
        if quantity <= 0 or (i > 0 and sign * price >= sign * levels[i - 1, 0]):
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

    def best_first(self, side: int) -> list[tuple[int, int]]:
        items = list(self.sides[side].items())
        return items[::-1] if side == book.BID else items


class OurBook:
    """The arrays of one book."""

    def __init__(self, max_levels: int = 4096) -> None:
        self.window, self.far, self.top, self.depth = (
            arrays[0] for arrays in book.new_books(1, max_levels)
        )

    def set(self, side: int, price: int, quantity: int) -> int:
        before: int = book.set_level(self.window, self.far, side, price, quantity)
        book.refresh_top(self.window, self.far, self.top, self.depth, side)
        return before

    def side(self, side: int) -> list[tuple[int, int]]:
        levels = book.side_levels(self.window, self.far, side)
        return [(price, quantity) for price, quantity in levels.tolist()]

    def side_top(self, side: int) -> list[tuple[int, int]]:
        n = self.depth[side]
        both = self.top[side, :, :n][:, ::-1].T.tolist()
        return [(price, quantity) for price, quantity in both]

    def take(self, message: bytes) -> np.ndarray:
        buf = np.frombuffer(message, dtype=np.uint8).copy()
        assert wire.check(buf, 0, len(buf)) == 0
        flow = np.zeros(book.FLOW_FIELDS, dtype=np.int64)
        arrays = (self.window, self.far, self.top, self.depth)
        if codec.template_id(message) == wire.SNAPSHOT:
            book.apply_snapshot(*arrays, buf, 0)
        else:
            book.apply_levels(*arrays, flow, buf, 0)
        return flow


def delta(bids: list[tuple[int, int]], asks: list[tuple[int, int]]) -> bytes:
    return codec.encode_book(wire.DELTA, 1, 0, 1, 1, 0, 0, bids, asks)


def snapshot(bids: list[tuple[int, int]], asks: list[tuple[int, int]]) -> bytes:
    return codec.encode_book(wire.SNAPSHOT, 1, 0, 1, 1, 0, 0, bids, asks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spread", "jump"),
    [(40, 0), (1500, 0), (60_000, 0), (1500, 300_000)],
    ids=["near the top", "deep", "wider than the window", "with jumps beyond the window"],
)
def test_equals_a_naive_book_after_every_one_of_a_million_operations(
    spread: int, jump: int
) -> None:
    rng = np.random.default_rng(7)
    ours, naive = OurBook(1 << 16), NaiveBook()
    operations = OPERATIONS // 4
    sides = rng.integers(0, 2, operations).tolist()
    grid = max(spread // 500, 1)
    offsets = (rng.exponential(spread / grid, operations).astype(int) * grid).tolist()
    quantities = (rng.integers(0, 3, operations) * rng.integers(1, 1000, operations)).tolist()
    steps = rng.integers(-1, 2, operations)
    steps += (rng.random(operations) < 1e-4) * rng.integers(-jump, jump + 1, operations)
    drift = (10_000_000 + np.cumsum(steps)).tolist()
    for i in range(operations):
        side = sides[i]
        price = drift[i] - offsets[i] if side == book.BID else drift[i] + 1 + offsets[i]
        before = naive.set(side, price, quantities[i])
        assert ours.set(side, price, quantities[i]) == before
        # The whole side, each time: as many levels, best first, and the same set of them.
        levels = book.side_levels(ours.window, ours.far, side)
        if (
            len(levels) != len(naive.sides[side])
            or fingerprint_of(levels, side) != naive.fingerprints[side]
        ):
            pytest.fail(f"operation {i} (side {side}, {price}: {quantities[i]}): books differ")
        if i % 20_000 == 0:
            bids, asks = naive.best_first(book.BID), naive.best_first(book.ASK)
            assert (ours.side(book.BID), ours.side(book.ASK)) == (bids, asks)
            assert (ours.side_top(book.BID), ours.side_top(book.ASK)) == (bids[:10], asks[:10])
        if i % 60_000 == 30_000:
            bids, asks = naive.best_first(book.BID)[:1000], naive.best_first(book.ASK)[:1000]
            naive.replace(bids, asks)
            ours.take(snapshot(bids, asks))
            assert (ours.side(book.BID), ours.side(book.ASK)) == (bids, asks)
    for side in (book.BID, book.ASK):
        assert ours.side(side) == naive.best_first(side)


def test_the_top_is_right_after_every_delta() -> None:
    rng = np.random.default_rng(11)
    ours, naive = OurBook(), NaiveBook()
    for _ in range(20_000):
        sides: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
        for _ in range(int(rng.integers(0, 6))):
            side, price = int(rng.integers(0, 2)), int(rng.integers(1, 60))
            quantity = int(rng.integers(0, 3))
            sides[side].append((price, quantity))
            naive.set(side, price, quantity)
        ours.take(delta(*sides))
        for side in (book.BID, book.ASK):
            assert ours.side_top(side) == naive.best_first(side)[: book.TOP_LEVELS]
            assert ours.depth[side] == min(len(naive.sides[side]), book.TOP_LEVELS)


@pytest.mark.parametrize("far", [0, 500_000], ids=["in the window", "beyond it"])
def test_a_full_book_drops_its_worst_level_and_says_so(far: int) -> None:
    ours = OurBook(max_levels=4)
    for price in (10, 11, 12):
        assert ours.set(book.BID, price, 1) == 0
    assert ours.set(book.BID, 13 + far, 1) == 0
    assert ours.set(book.BID, 14 + far, 5) == -1
    assert [price for price, _ in ours.side(book.BID)] == [14 + far, 13 + far, 12, 11]
    assert ours.set(book.BID, 9, 5) == -1, "worse than all: it is dropped"
    assert [price for price, _ in ours.side(book.BID)] == [14 + far, 13 + far, 12, 11]


def test_flow_of_a_delta_counts_lots_added_and_removed() -> None:
    ours = OurBook()
    ours.take(snapshot([(100, 10), (99, 20)], [(101, 5), (102, 6)]))
    flow = ours.take(delta([(100, 4), (98, 7)], [(101, 0), (103, 2)]))
    assert flow.tolist() == [7, 6, 2, 5]
    assert ours.side(book.BID) == [(100, 4), (99, 20), (98, 7)]
    assert ours.side(book.ASK) == [(102, 6), (103, 2)]


def test_a_snapshot_replaces_everything_in_any_order_of_levels() -> None:
    ours = OurBook()
    ours.take(snapshot([(100, 10), (99, 20)], [(101, 5)]))
    ours.take(snapshot([(97, 1), (900_000, 4), (98, 2), (96, 3)], []))
    assert ours.side(book.BID) == [(900_000, 4), (98, 2), (97, 1), (96, 3)]
    assert ours.side(book.ASK) == []
    assert ours.depth.tolist() == [4, 0]


def test_removing_a_level_that_is_not_there_changes_nothing() -> None:
    ours = OurBook()
    ours.take(snapshot([(100, 10)], [(101, 5)]))
    for price in (500, 102, 900_000, 1):
        assert ours.set(book.ASK, price, 0) == 0
        assert ours.set(book.BID, price, 0) == 0
    assert ours.depth.tolist() == [1, 1]


def test_the_window_follows_the_best_level_down_and_takes_the_far_ones_in() -> None:
    ours = OurBook()
    prices = list(range(1_000, 3_000_000, 10_000))
    for price in prices:
        ours.set(book.BID, price, price)
    for price in prices[::-1][:-1]:
        assert ours.set(book.BID, price, 0) == price
        assert ours.side_top(book.BID)[0][0] == price - 10_000
    assert ours.side(book.BID) == [(1_000, 1_000)]


@pytest.mark.parametrize(
    ("bid", "ask", "expected"), [(100, 101, False), (101, 101, True), (102, 101, True)]
)
def test_crossed_and_locked(bid: int, ask: int, expected: bool) -> None:
    ours = OurBook()
    ours.take(snapshot([(bid, 1)], [(ask, 1)]))
    assert book.crossed(ours.top, ours.depth) is expected
    ours.set(book.BID, bid, 0)
    assert book.crossed(ours.top, ours.depth) is False, "a book with an empty side is not crossed"
