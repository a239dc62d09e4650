"""Event streams for the feature tests, and the kernels driven over them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from engine import features
from tests.engine.feature_reference import Book, Event, Level, Snapshot, Trade

CAPACITY = 64


def market(
    seed: int, n: int, *, levels: int = 14, middle: int = 1_000_000, trades: float = 0.3
) -> list[Event]:
    """A lively market: sizes change, levels come and go, trades take, the mid wanders."""
    rng = random.Random(seed)
    bids = {middle - 1 - k: 1 + int(rng.expovariate(1 / 40)) for k in range(levels)}
    asks = {middle + 1 + k: 1 + int(rng.expovariate(1 / 40)) for k in range(levels)}
    t = 1_700_000_000_000_000_000
    events: list[Event] = [Snapshot(t, *_sides(bids, asks))]
    while len(events) < n:
        t += rng.choice([0, 0, 1_000, int(rng.expovariate(1 / 30_000_000))])
        if rng.random() < 0.01:
            t += 5_000_000_000
        flow = [0, 0, 0, 0]
        for _ in range(rng.randint(1, 3)):
            side = rng.randrange(2)
            book, other = (bids, asks) if side == 0 else (asks, bids)
            outwards = -1 if side == 0 else 1
            ranked = sorted(book, reverse=side == 0)
            kind = rng.random()
            if kind < trades and ranked:
                lots = rng.randint(1, 2 * book[ranked[0]])
                aggressor = rng.choice([0, 2 - side, 2 - side]) if side else rng.choice([0, 2, 2])
                events.append(Trade(t, ranked[0], lots, aggressor))
                taken = min(lots, book[ranked[0]])
                book[ranked[0]] -= taken
                flow[2 * side + 1] += taken
                if not book[ranked[0]]:
                    del book[ranked[0]]
            elif kind < 0.8 and ranked:
                price = rng.choice(ranked[:12])
                lots = 1 + int(rng.expovariate(1 / 40))
                change = lots - book[price]
                flow[2 * side + (change < 0)] += abs(change)
                book[price] = lots
            elif kind < 0.88 and len(ranked) > 2:
                price = rng.choice(ranked[:8])
                flow[2 * side + 1] += book.pop(price)
            else:
                touch = sorted(other, reverse=side == 1)[0] if other else middle
                best = ranked[0] if ranked else touch + outwards
                price = best + outwards * rng.choice([-2, -1, -1, 0, 1, 2, 3, 6])
                if outwards * (price - touch) > 0:
                    lots = 1 + int(rng.expovariate(1 / 40))
                    flow[2 * side] += lots
                    book[price] = book.get(price, 0) + lots
        events.append(Book(t, *_sides(bids, asks), tuple(flow)))  # type: ignore[arg-type]
        if rng.random() < 0.005:
            events.append(Snapshot(t, *_sides(bids, asks)))
    return events[:n]


def hostile(seed: int, n: int) -> list[Event]:
    """Anything that a broken feed could send: empty sides, huge numbers, time going backwards."""
    rng = random.Random(seed)
    numbers = [1, 2, 3, 10**6, 10**9, 10**12, 2**44, 2**62, 2**63 - 1]

    def price() -> int:
        return rng.choice([*numbers, 500, 501, 502, 503])

    def side() -> list[Level]:
        many = rng.choice([0, 0, 1, 1, 2, 9, 10, 11, 30])
        return [(price(), rng.choice(numbers)) for _ in range(many)]

    times = [-(2**63), -1, 0, 1, 10**9, 10**18, 10**18 + 1, 2**62, 2**63 - 1]
    events: list[Event] = []
    while len(events) < n:
        t = rng.choice([rng.randint(0, 10**12), *times])
        kind = rng.random()
        if kind < 0.1:
            events.append(Snapshot(t, side(), side()))
        elif kind < 0.6:
            flow = tuple(rng.choice([0, *numbers]) for _ in range(4))
            events.append(Book(t, side(), side(), flow))  # type: ignore[arg-type]
        else:
            events.append(Trade(t, price(), rng.choice(numbers), rng.randint(0, 3)))
    return events


def _sides(bids: dict[int, int], asks: dict[int, int]) -> tuple[list[Level], list[Level]]:
    return sorted(bids.items(), reverse=True), sorted(asks.items())


def mirrored(events: Iterable[Event], about: int) -> Iterator[Event]:
    """Bid and ask swapped, each price p at ``about - p``."""

    def turned(levels: Sequence[Level]) -> list[Level]:
        return [(about - price, lots) for price, lots in levels]

    for event in events:
        if isinstance(event, Trade):
            aggressor = {1: 2, 2: 1}.get(event.aggressor, event.aggressor)
            yield event._replace(price=about - event.price, aggressor=aggressor)
        else:
            event = event._replace(bids=turned(event.asks), asks=turned(event.bids))
            if isinstance(event, Book):
                event = event._replace(flow=event.flow[2:] + event.flow[:2])
            yield event


class Instrument:
    """The state rows of one instrument and the book that the kernels look at."""

    def __init__(self) -> None:
        self.fi = np.full(features.STATE_I, -7, dtype=np.int64)
        self.ff = np.full(features.STATE_F, np.nan)
        self.levels = np.zeros((2, 2, CAPACITY), dtype=np.int64)
        self.depth = np.zeros(2, dtype=np.int64)
        self.now_ns = 0
        features.reset(self.fi, self.ff)

    def take(self, event: Event) -> None:
        self.now_ns = event.t_ns
        if isinstance(event, Trade):
            features.on_trade(
                self.fi,
                self.ff,
                self.levels,
                self.depth,
                event.price,
                event.lots,
                event.aggressor,
                event.t_ns,
            )
            return
        for side, levels in enumerate((event.bids, event.asks)):
            n = self.depth[side] = len(levels)
            for k, (price, lots) in enumerate(levels):
                self.levels[side, :, n - 1 - k] = price, lots
        if isinstance(event, Snapshot):
            features.on_snapshot(self.fi, self.ff, self.levels, self.depth, event.t_ns)
        else:
            flow = np.array(event.flow, dtype=np.int64)
            features.on_book(self.fi, self.ff, self.levels, self.depth, flow, event.t_ns)

    def values(self, t_ns: int | None = None) -> np.ndarray:
        out = np.full(features.N_FEATURES, np.nan)
        t_ns = self.now_ns if t_ns is None else t_ns
        features.compute(self.fi, self.ff, self.levels, self.depth, t_ns, out)
        return out


def trace(events: Iterable[Event], later_ns: Sequence[int] = (0,)) -> np.ndarray:
    """The feature vectors after every event, as of so many nanoseconds later: (events, N)."""
    instrument = Instrument()
    rows = []
    for i, event in enumerate(events):
        instrument.take(event)
        rows.append(instrument.values(event.t_ns + later_ns[i % len(later_ns)]))
    return np.array(rows)


def digest() -> str:
    """SHA-256 over all vectors of one lively and one hostile stream."""
    rows = [trace(market(5, 2_000)), trace(hostile(5, 500))]
    return hashlib.sha256(b"".join(r.tobytes() for r in rows)).hexdigest()
