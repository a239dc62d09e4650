"""The features once more, in plain Python, from the whole list of events each time.

Nothing here is incremental and nothing is imported from the kernels: every window is a fold over
all events since the beginning, every book is looked at as a list of (price, lots), and the
elementary functions are written again with `math.frexp` and `math.ldexp`. Float operations stand
in the order that the docstrings of `engine` declare, so the results must be equal to the last bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

Level = tuple[int, int]  # price in ticks, lots

TINY = 1e-100
MAX_PRICE, MAX_LOTS, MAX_FLOW, MAX_TIME = 2**40, 2**44, 2**48, 2**62
MISSING = 2**42


class Snapshot(NamedTuple):
    t_ns: int
    bids: Sequence[Level]  # best first
    asks: Sequence[Level]


class Book(NamedTuple):
    t_ns: int
    bids: Sequence[Level]
    asks: Sequence[Level]
    flow: tuple[int, int, int, int]


class Trade(NamedTuple):
    t_ns: int
    price: int
    lots: int
    aggressor: int


Event = Snapshot | Book | Trade


def _poly(w: float, coefficients: list[float]) -> float:
    result = coefficients[-1]
    for c in reversed(coefficients[:-1]):
        result = c + w * result
    return result


def ln(x: float) -> float:
    m, k = math.frexp(x)
    m, k = 2 * m, k - 1
    if m > math.sqrt(2):
        m, k = m / 2, k + 1
    f = m - 1
    s = f / (2 + f)
    z = s * s
    w = z * z
    odd = z * _poly(w, [2 / 3, 2 / 7, 2 / 11, 2 / 15, 2 / 19])
    even = w * _poly(w, [2 / 5, 2 / 9, 2 / 13, 2 / 17, 2 / 21])
    half = 0.5 * f * f
    low = s * (half + (odd + even)) + k * 1.9082149292705877e-10
    return k * float.fromhex("0x1.62e42feep-1") - ((half - low) - f)


def half_power(x: float) -> float:
    x = min(x, 64.0)
    n = math.floor(x + 0.5)
    g = (n - x) * 0.6931471805599453
    w = g * g
    even = w * _poly(w, [1 / math.factorial(i) for i in (2, 4, 6, 8, 10, 12)])
    odd = g * _poly(w, [1 / math.factorial(i) for i in (1, 3, 5, 7, 9, 11, 13)])
    return math.ldexp(1 + (odd + even), -n)


def _bounded(low: int, x: int, high: int) -> int:
    return min(max(x, low), high)


def _clip(x: float, limit: float) -> float:
    return min(max(x, -limit), limit)


def _div(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _folded(terms: Sequence[tuple[float, float]]) -> float:
    """Sum of values, all that came before losing a factor at each: terms are (factor, value)."""
    total = 0.0
    for factor, value in terms:
        total *= factor
        total = (total if abs(total) >= TINY else 0.0) + value
    return total


def _steady(half_life: int, values: Sequence[float]) -> float:
    decay = {
        4: 0.8408964152537145,
        8: 0.9170040432046712,
        16: 0.9576032806985737,
        32: 0.9785720620877001,
        64: 0.9892280131939755,
    }[half_life]
    return _folded([(decay, v) for v in values])


def _running_mean(gain: float, values: Sequence[float]) -> float:
    mean = 0.0
    for v in values:
        mean = mean + gain * (v - mean) if mean > 0 else v
    return mean


GAIN_256, GAIN_32 = 0.0027039439145298736, 0.021427937912299865


@functools.cache
def _slow_decays(dt_ns: int) -> tuple[float, float, float]:
    """What 1 s, 4 s and 16 s half-lives leave after a time: each the fourth power of the next."""
    slow = half_power(dt_ns * (1 / 16e9)) if dt_ns > 0 else 1.0
    middle = slow * slow
    middle = middle * middle
    fast = middle * middle
    fast = fast * fast
    return fast, middle, slow


class Top(NamedTuple):
    """The ten best levels of each side of a book, cleaned."""

    bids: list[Level]
    asks: list[Level]

    def lots(self, side: int, n: int) -> int:
        return sum(lots for _, lots in self[side][:n])

    @property
    def two_sided(self) -> bool:
        return bool(self.bids) and bool(self.asks)

    @property
    def mid2(self) -> int:
        return self.bids[0][0] + self.asks[0][0]

    @property
    def spread(self) -> int:
        return self.asks[0][0] - self.bids[0][0]

    @property
    def imbalance(self) -> float:
        b, a = self.lots(0, 1), self.lots(1, 1)
        return (b - a) / (b + a) if b + a else 0.0

    def level(self, side: int, k: int) -> Level:
        if k < len(self[side]):
            return self[side][k]
        return (-MISSING if side == 0 else MISSING), 0


def _top(event: Snapshot | Book) -> Top:
    return Top(
        *(
            [(_bounded(1, p, MAX_PRICE), _bounded(1, q, MAX_LOTS)) for p, q in side[:10]]
            for side in (event.bids, event.asks)
        )
    )


def _level_flow(before: Top, after: Top, k: int) -> int:
    """e of Cont, Kukanov and Stoikov (2014) at rank k."""
    pb0, qb0 = before.level(0, k)
    pb, qb = after.level(0, k)
    pa0, qa0 = before.level(1, k)
    pa, qa = after.level(1, k)
    e = 0
    if (pb, qb) != (pb0, qb0):
        e += (qb if pb >= pb0 else 0) - (qb0 if pb <= pb0 else 0)
    if (pa, qa) != (pa0, qa0):
        e -= (qa if pa <= pa0 else 0) - (qa0 if pa >= pa0 else 0)
    return e


def batch(events: Sequence[Event], t_ns: int) -> dict[str, float]:
    """All features as of ``t_ns``, by name."""
    out: dict[str, float] = {}

    # Times never step back; a snapshot moves the clock only where it is the first event.
    clock: list[tuple[int, Event]] = []
    now = -1
    first = None
    for event in events:
        t = _bounded(0, event.t_ns, MAX_TIME)
        if first is None:
            first, now = t, t
        if not isinstance(event, Snapshot):
            now = max(now, t)
            clock.append((now, event))
    end = max(_bounded(0, t_ns, MAX_TIME), now)

    # Books: the state before each book event, after it, and the move of twice the mid.
    empty = Top([], [])
    tops: list[Top] = []  # after every book event
    known: list[Top] = []  # the two-sided ones
    flows: dict[int, list[int]] = {1: [], 5: [], 10: []}  # of deltas
    moves: list[int] = []  # of every book event, 0 at snapshots
    deltas: list[int] = []  # of deltas alone
    move_times: list[int] = []
    visits: list[tuple[int, float]] = []  # (number of moves so far, imbalance), -1: forgotten
    clock_at = iter(clock)
    trades: list[tuple[int, int, int, int, int, int]] = []  # t, price, lots, sign, mid2, spread
    adds: list[tuple[int, dict[str, float]]] = []  # what each clock event adds to the clock sums
    moved = 0
    last_size = 0
    for event in events:
        mid2 = known[-1].mid2 if known else 0
        if isinstance(event, Trade):
            t, _ = next(clock_at)
            price, lots = _bounded(1, event.price, MAX_PRICE), _bounded(1, event.lots, MAX_LOTS)
            sign = {1: 1, 2: -1}.get(event.aggressor, 0)
            if sign == 0 and mid2:
                sign = (2 * price > mid2) - (2 * price < mid2)
            trades.append((t, price, lots, sign, mid2, known[-1].spread if known else 0))
            adds.append(
                (
                    t,
                    {
                        "trades": 1.0,
                        "signed": float(sign * lots),
                        "volume": float(lots),
                        "hit_bid": float(lots) if sign < 0 else 0.0,
                        "hit_ask": float(lots) if sign > 0 else 0.0,
                    },
                )
            )
        else:
            before, after = (tops[-1] if tops else empty), _top(event)
            move = after.mid2 - mid2 if known and after.two_sided else 0
            tops.append(after)
            if after.two_sided:
                known.append(after)
            if isinstance(event, Snapshot):
                moves.append(0)
                visits = [(n, q) for n, q in visits if n < moved]
            else:
                t, _ = next(clock_at)
                e = [_level_flow(before, after, k) for k in range(10)]
                for n in (1, 5, 10):
                    flows[n].append(sum(e[:n]))
                moves.append(move)
                deltas.append(move)
                add = {f"ofi_{n}": float(flows[n][-1]) for n in (1, 5, 10)}
                add |= {"quotes": 1.0, "moves": float(move), "squares": float(move) * float(move)}
                add["bipower"] = abs(float(move)) * float(last_size) if move else 0.0
                names = ("added_bid", "removed_bid", "added_ask", "removed_ask")
                add |= {
                    n: float(_bounded(0, x, MAX_FLOW))
                    for n, x in zip(names, event.flow, strict=True)
                }
                adds.append((t, add))
                if move:
                    moved += 1
                    last_size = abs(move)
                    move_times.append(t)
                if after.two_sided:
                    visits.append((moved, after.imbalance))
    big = [m for m in deltas if m]

    top = tops[-1] if tops else empty
    mid2 = known[-1].mid2 if known else 0
    spread = known[-1].spread if known else 0

    # Scales.
    size = _running_mean(
        GAIN_256,
        [
            float(b.lots(0, 10) + b.lots(1, 10)) * (1 / (len(b.bids) + len(b.asks)))
            for b in tops
            if b.bids or b.asks
        ],
    )
    widths = []
    for b in known:
        count = len(b.bids) + len(b.asks)
        reach = sum(2 * p - b.mid2 for p, _ in b.asks) + sum(b.mid2 - 2 * p for p, _ in b.bids)
        widths.append(float(max(reach, count)) * (0.5 * (1 / count)))
    width = _running_mean(GAIN_256, widths)
    usual_spread = _running_mean(GAIN_256, [float(max(b.spread, 1)) for b in known])
    usual_move = _running_mean(GAIN_32, [abs(float(m)) for m in big])
    trade = _running_mean(GAIN_32, [float(q) for _, _, q, _, _, _ in trades])

    # The block.
    per_tick = 0.5 / width if width > 0 else 0.0
    typical = ln(1 + size)
    for k in range(10):
        for side, name, outwards in ((1, "ask", 1), (0, "bid", -1)):
            price, lots = top.level(side, k)
            distance = float(outwards * (2 * price - mid2)) * per_tick
            out[f"{name}_price_{k + 1}"] = _clip(distance, 8.0)
            log_size = ln(1.0 + lots) if lots else -1000.0
            out[f"{name}_size_{k + 1}"] = _clip(log_size - typical, 8.0)

    # Queues and prices.
    for n in (1, 5, 10):
        b, a = float(top.lots(0, n)), float(top.lots(1, n))
        out[f"queue_imbalance_{n}"] = _div(b - a, b + a)
    out["spread_bp"] = _clip(_div(20000.0 * spread, float(mid2)), 1000.0)
    quoted = float(max(spread, 0))
    out["spread_ratio"] = _div(quoted, quoted + usual_spread)
    last_move = float(moves[-1]) if moves else 0.0
    out["mid_move"] = _div(last_move, usual_move + abs(last_move))
    q = top.imbalance
    out["weighted_mid"] = _clip(_div(0.5 * q * spread, usual_spread) if top.two_sided else 0.0, 8.0)
    out["microprice"] = _clip(_microprice(top, q, visits, big, usual_move), 8.0)

    # Order flow and momentum.
    for n in (1, 5, 10):
        values = [float(x) for x in flows[n]]
        for half_life, scale in ((8, 1.0), (64, 4.0)):
            o = _steady(half_life, values)
            name = f"ofi_{n}_{half_life}_updates"
            out[name] = _div(o, size * (n * scale) + abs(o))
        o = _clocked("1s", f"ofi_{n}", adds, end)
        out[f"ofi_{n}_1s"] = _div(o, size * (n * 4.0) + abs(o))
    returns = [float(m) for m in deltas]
    for half_life in (4, 16, 64):
        m = _steady(half_life, returns)
        v = _steady(half_life, [r * r for r in returns])
        out[f"momentum_{half_life}_updates"] = _div(m, math.sqrt(m * m + v))
    for window in ("1s", "4s", "16s"):
        m = _clocked(window, "moves", adds, end)
        v = _clocked(window, "squares", adds, end)
        out[f"momentum_{window}"] = _div(m, math.sqrt(m * m + v))

    # Trade flow.
    signed = [float(s * q) for _, _, q, s, _, _ in trades]
    volumes = [float(q) for _, _, q, _, _, _ in trades]
    out["trade_imbalance_16_trades"] = _div(_steady(16, signed), _steady(16, volumes))
    for window in ("1s", "16s"):
        out[f"trade_imbalance_{window}"] = _div(
            _clocked(window, "signed", adds, end), _clocked(window, "volume", adds, end) + trade
        )

    # Shape.
    for side, name, outwards in ((0, "bid", -1), (1, "ask", 1)):
        xs = [float(outwards * (2 * p - mid2)) if mid2 else 0.0 for p, _ in top[side]]
        cs = [float(top.lots(side, k + 1)) for k in range(len(top[side]))]
        xy = xx = 0.0
        for x, c in zip(xs, cs, strict=True):
            xy += c * x
            xx += x * x
        slope = _div(xy * xs[-1], xx * cs[-1]) if xs and xs[-1] > 0 else 0.0
        out[f"{name}_slope"] = _clip(slope, 10.0)
        for n in (1, 5):
            out[f"{name}_depth_{n}"] = _div(float(top.lots(side, n)), float(top.lots(side, 10)))

    # Magnitudes.
    per_mid = 10000.0 / mid2 if mid2 else 0.0
    bipower = (math.pi / 2) * _clocked("16s", "bipower", adds, end)
    squares = _clocked("16s", "squares", adds, end)
    log2 = 0.6931471805599453
    rate = {"1s": log2, "16s": log2 * 0.0625}
    magnitudes = {
        "spread_ticks": quoted,
        "book_width_bp": 2.0 * width * per_mid,
        "bipower_vol_16s": math.sqrt(bipower * rate["16s"]) * per_mid,
        "time_since_trade": float(end - (trades[-1][0] if trades else first or 0)) * 1e-6,
        "time_since_move": float(end - (move_times[-1] if move_times else first or 0)) * 1e-6,
    }
    if first is None:
        magnitudes["time_since_trade"] = magnitudes["time_since_move"] = 0.0
    for w in ("1s", "16s"):
        v = _clocked(w, "squares", adds, end)
        magnitudes[f"realised_vol_{w}"] = math.sqrt(v * rate[w]) * per_mid
        magnitudes[f"trade_rate_{w}"] = _clocked(w, "trades", adds, end) * rate[w]
        magnitudes[f"quote_rate_{w}"] = _clocked(w, "quotes", adds, end) * rate[w]
    for name, x in magnitudes.items():
        out[name] = _clip(ln(1.0 + x), 20.0)

    # Ratios.
    out["jump_share_16s"] = _clip(_div(squares - bipower, squares), 1.0)
    out["vpin"] = _vpin(trades)
    out |= _impact(trades, trade, usual_move)
    large = []
    for i, v in enumerate(volumes):
        usual = _running_mean(GAIN_32, volumes[:i])
        large.append(v if usual > 0 and v > 4.0 * usual else 0.0)
    out["large_trade_share"] = _div(_steady(32, large), _steady(32, volumes))
    total = {}
    for name in ("added_bid", "removed_bid", "added_ask", "removed_ask", "hit_bid", "hit_ask"):
        # As of the last event: what these ratios share, time cannot change.
        total[name] = _clocked("16s", name, adds, now)
    nets, sums = [], []
    for side in ("bid", "ask"):
        added, removed = total[f"added_{side}"], total[f"removed_{side}"]
        cancelled = max(removed - total[f"hit_{side}"], 0.0)
        out[f"cancel_ratio_{side}"] = _div(cancelled, added + removed)
        nets.append(added - removed)
        sums.append(added + removed)
    out["net_flow_imbalance"] = _clip(_div(nets[0] - nets[1], sums[0] + sums[1]), 1.0)
    out |= _spreads(trades)
    return out


def _clocked(
    window: str, name: str, adds: Sequence[tuple[int, dict[str, float]]], end: int
) -> float:
    """An exponentially weighted sum by the clock, as of ``end``."""
    which = ("1s", "4s", "16s").index(window)
    terms = []
    before = None
    for t, add in adds:
        decay = 1.0 if before is None else _slow_decays(t - before)[which]
        terms.append((decay, add.get(name, 0.0)))
        before = t
    decay = 1.0 if before is None else _slow_decays(end - before)[which]
    return _folded(terms) * decay


def _microprice(
    top: Top, q: float, visits: Sequence[tuple[int, float]], big: Sequence[int], usual: float
) -> float:
    if not top.two_sided:
        return 0.0

    def bin_of(x: float) -> int:
        return min(int(abs(x) * 8), 7)

    own = [(n, x) for n, x in visits if bin_of(x) == bin_of(q)]
    sums, counts = [], []
    for n, move in enumerate(big):
        seen = [x for m, x in own if m == n]
        sums.append(float(sum((x > 0) - (x < 0) for x in seen)) * float(move))
        counts.append(float(len(seen)))
    step = _steady(64, sums) * ((q > 0) - (q < 0))
    return _div(step, (_steady(64, counts) + 16.0) * usual)


Trades = Sequence[tuple[int, int, int, int, int, int]]


def _vpin(trades: Trades) -> float:
    """Volume buckets: (imbalance, lots) of the last 32 full ones, and the one being filled."""
    full: list[tuple[int, int]] = []
    size = filled = signed = 0
    volumes = [float(q) for _, _, q, _, _, _ in trades]
    for i, (_, _, lots, sign, _, _) in enumerate(trades):
        fresh = max(int(16.0 * _running_mean(GAIN_32, volumes[: i + 1])), 1)
        size = size or fresh
        while lots >= size - filled:
            room = size - filled
            full.append((abs(signed + sign * room), size))
            full = full[-32:]
            lots -= room
            filled = signed = 0
            size = fresh
        filled += lots
        signed += sign * lots
    imbalance = sum(x for x, _ in full) + abs(signed)
    return _div(float(imbalance), float(sum(x for _, x in full) + filled))


def _impact(trades: Trades, usual_trade: float, usual_move: float) -> dict[str, float]:
    xy, xx, yy, illiquidity, count = [], [], [], [], []
    product, square, agreement, pairs = [], [], [], []
    before = None
    for _, _, lots, sign, mid2, _ in trades:
        x0 = y = 0.0
        first = before is None or not before[2]
        if not first:
            assert before is not None
            x0 = float(before[0] * before[1])
            y = float(mid2 - before[2])
        xy.append(y * x0)
        xx.append(x0 * x0)
        yy.append(y * y)
        illiquidity.append(0.0 if first else abs(y) / float(before[0]))  # type: ignore[index]
        count.append(0.0 if first else 1.0)
        x = float(sign * lots)
        square.append(x * x)
        product.append(x * float(before[0] * before[1]) if before else 0.0)
        agreement.append(float(sign * before[1]) if before else 0.0)
        pairs.append(1.0 if before else 0.0)
        before = (lots, sign, mid2)
    sxy, sxx, syy = (_steady(32, v) for v in (xy, xx, yy))
    scale = usual_trade if usual_move > 0 else 0.0
    impact = sxy * scale
    amihud = _steady(32, illiquidity) * scale
    return {
        "kyle_lambda": _div(impact, sxx * usual_move + abs(impact)),
        "kyle_correlation": _clip(_div(sxy, math.sqrt(sxx * syy)), 1.0),
        "amihud": _div(amihud, _steady(32, count) * usual_move + amihud),
        "signed_volume_autocorrelation": _clip(
            _div(_steady(32, product), _steady(32, square)), 1.0
        ),
        "trade_sign_autocorrelation": _div(_steady(32, agreement), _steady(32, pairs)),
    }


def _spreads(trades: Trades) -> dict[str, float]:
    effective, quoted, realised, quoted_then = [], [], [], []
    for i, (_, price, _, sign, mid2, spread) in enumerate(trades):
        effective.append(float(sign * (2 * price - mid2)) if mid2 else 0.0)
        quoted.append(float(max(spread, 1)) if sign and mid2 else 0.0)
        rs = qs = 0.0
        if i >= 8:
            _, price0, _, sign0, mid0, spread0 = trades[i - 8]
            if sign0 and mid0:
                rs = float(sign0 * (2 * price0 - mid2))
                qs = float(max(spread0, 1))
        realised.append(rs)
        quoted_then.append(qs)
    es, rs = _steady(32, effective), _steady(32, realised)
    return {
        "effective_spread": _div(es, _steady(32, quoted) + abs(es)),
        "realised_spread": _div(rs, _steady(32, quoted_then) + abs(rs)),
    }
