"""How good scores are: as classes, as probabilities, as a forecast of the move, and after costs.

Scores are logits, shape (n, classes), in the order of `models.labels.CLASSES`: the first class is
down, the last one up. Shares and figures are plain floats, rounded to six places in `Metrics`.
"""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np

from feeds.errors import InputError

CALIBRATION_BINS: Final = 15
CURVE_POINTS: Final = 500
PLACES: Final = 6
NS_A_DAY: Final = 86_400_000_000_000


class ClassMetrics(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One class against the rest; 0 where there is nothing to divide by.

    Attributes
    ----------
    precision : float
        Share of the rows named so that are so.
    recall : float
        Share of the rows that are so that are named so.
    f1 : float
        Harmonic mean of both.
    support : int
        Rows that are so.
    """

    precision: float
    recall: float
    f1: float
    support: int


class Reliability(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A reliability diagram (Guo et al. 2017, "On Calibration of Modern Neural Networks").

    Attributes
    ----------
    edges : tuple of float
        Of the equal bins of confidence, the greatest probability of a row: above one edge, up to
        the next.
    confidence, accuracy : tuple of float
        Mean confidence and share of right rows in each bin; 0 where there is none.
    count : tuple of int
    """

    edges: tuple[float, ...]
    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    count: tuple[int, ...]


class Following(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What following the signal would have made, see `follow`. Not a backtest.

    Attributes
    ----------
    gross_half_ticks, cost_half_ticks, net_half_ticks : float
        For one unit an instrument; net is gross less cost.
    trades : int
        Rows at which the position changed.
    turnover : int
        Units that changed hands.
    hit_rate : float
        Of the moves of the mid while a position stood, the share that went its way.
    sharpe_a_signal : float
        Mean over standard deviation of the net result of a row; 0 where nothing varies.
    sharpe_a_day : float or None
        That times the root of the rows a day, as if rows were independent; None without times.
    max_drawdown_half_ticks : float
        Deepest fall of the net result below its height so far, which starts at 0.
    equity_half_ticks : tuple of float
        Net result so far, at `CURVE_POINTS` rows at most, evenly spread, the last one included.
    """

    gross_half_ticks: float
    cost_half_ticks: float
    net_half_ticks: float
    trades: int
    turnover: int
    hit_rate: float
    sharpe_a_signal: float
    sharpe_a_day: float | None
    max_drawdown_half_ticks: float
    equity_half_ticks: tuple[float, ...]


class Metrics(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Scores against the truth.

    Attributes
    ----------
    rows : int
    accuracy : float
    balanced_accuracy : float
        Mean recall of the classes that occur.
    macro_f1 : float
        Mean F1 of the classes that occur or are named.
    chance : float
        Accuracy of guessing: one over the number of classes.
    majority : float
        Accuracy of always naming the commonest class.
    log_loss : float
        Mean of -ln of the probability of the true class, nats.
    calibration_error : float
        Expected calibration error over `CALIBRATION_BINS` bins.
    classes : tuple of ClassMetrics
    confusion : tuple of tuple of int
        Rows by true class (outer) and named class (inner).
    reliability : Reliability
    information_coefficient, correlation : float or None
        Rank correlation (Spearman) and correlation (Pearson) of P(up) - P(down) with the move.
    following : Following or None
    """

    rows: int
    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    chance: float
    majority: float
    log_loss: float
    calibration_error: float
    classes: tuple[ClassMetrics, ...]
    confusion: tuple[tuple[int, ...], ...]
    reliability: Reliability
    information_coefficient: float | None = None
    correlation: float | None = None
    following: Following | None = None


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(value), PLACES) for value in values)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(np.shape(whole)), where=whole > 0)


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Logarithms of the class probabilities, float64 of the same shape; never overflows."""
    shifted = np.asarray(scores, dtype=np.float64)
    shifted = shifted - shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def softmax(scores: np.ndarray) -> np.ndarray:
    """Class probabilities, float64 of the same shape; never overflows."""
    return np.exp(log_softmax(scores))


def confusion_matrix(predicted: np.ndarray, truth: np.ndarray, n_classes: int) -> np.ndarray:
    """Rows by true class and predicted class, int64 of shape (n_classes, n_classes)."""
    flat = np.bincount(truth * n_classes + predicted, minlength=n_classes * n_classes)
    return flat.reshape(n_classes, n_classes)


def reliability(probabilities: np.ndarray, truth: np.ndarray) -> tuple[Reliability, float]:
    """Reliability diagram and expected calibration error.

    The error is the mean over the rows of ``|accuracy - confidence|`` of their bin: equation (3)
    of Guo et al. (2017), "On Calibration of Modern Neural Networks".

    Parameters
    ----------
    probabilities : ndarray of float64, shape (n, classes)
    truth : ndarray of int64, shape (n,)
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == truth
    edges = np.linspace(0.0, 1.0, CALIBRATION_BINS + 1)
    bins = np.clip(np.searchsorted(edges, confidence) - 1, 0, CALIBRATION_BINS - 1)
    count = np.bincount(bins, minlength=CALIBRATION_BINS)
    mean = _share(np.bincount(bins, confidence, CALIBRATION_BINS), count)
    accuracy = _share(np.bincount(bins, right, CALIBRATION_BINS), count)
    error = float(np.abs(accuracy - mean) @ count / max(1, len(truth)))
    diagram = Reliability(
        _rounded(edges), _rounded(mean), _rounded(accuracy), tuple(count.tolist())
    )
    return diagram, error


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties at their mean, float64 of shape (n,)."""
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2.0)[group]


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of two samples of shape (n,); 0 where one of them is constant."""
    if not len(a) or (a == a[0]).all() or (b == b[0]).all():
        return 0.0
    x, y = (np.asarray(item, dtype=np.float64) for item in (a, b))
    x, y = x - x.mean(), y - y.mean()
    lengths = float(np.sqrt(x @ x) * np.sqrt(y @ y))
    return float(np.clip(x @ y / lengths, -1.0, 1.0)) if lengths > 0.0 else 0.0


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two samples of shape (n,), ties averaged; 0 where one is constant.

    Between a score and what came of it this is the information coefficient of Grinold and Kahn
    (1999), "Active Portfolio Management", chapter 6, by ranks.
    """
    return pearson(ranks(a), ranks(b))


def agreement(scores: np.ndarray, other: np.ndarray) -> float:
    """Share of rows on which two sets of scores name the same class."""
    assert scores.shape == other.shape
    return float((scores.argmax(axis=1) == other.argmax(axis=1)).mean())


def positions(scores: np.ndarray, threshold: float = 0.0) -> np.ndarray:
    """+1 where up is named, -1 where down is, 0 else and where the confidence is below a threshold.

    Returns
    -------
    ndarray of int64, shape (n,)
    """
    predicted = scores.argmax(axis=1)
    wanted = (predicted == scores.shape[1] - 1).astype(np.int64) - (predicted == 0)
    return np.where(softmax(scores).max(axis=1) >= threshold, wanted, 0)


def follow(
    scores: np.ndarray,
    mid_half_ticks: np.ndarray,
    cost_half_ticks: np.ndarray,
    slot: np.ndarray,
    *,
    time_ns: np.ndarray | None = None,
    threshold: float = 0.0,
) -> Following:
    """Hold what each signal says until the next one, marked at the mid, and pay to change it.

    Every instrument is held in one unit, up, down or not at all, and closed at its last row. This
    is no backtest: every order is filled at once at the touch, in any size, without latency, fees,
    queues or market impact. It tells whether a forecast is worth more than the spread.

    Parameters
    ----------
    scores : ndarray of float, shape (n, classes)
        Rows of each instrument in order of time.
    mid_half_ticks : ndarray of int64, shape (n,)
        Best bid plus best ask in ticks.
    cost_half_ticks : ndarray, shape (n,)
        What one unit costs to buy or sell, away from the mid: half the spread. In half ticks that
        is the number of ticks that the whole spread has, so `Rows.spread_ticks` fits as it is.
    slot : ndarray of int64, shape (n,)
        Instrument; or a number for each unbroken stream, so that nothing is held across a gap.
    time_ns : ndarray of int64, shape (n,), optional
        Puts the rows of all instruments into one order, and the figure for a day into the result.
    threshold : float
        Least probability of the named class at which a position is held.
    """
    assert len(scores) >= 1
    order = np.argsort(slot, kind="stable")
    own = slot[order]
    last = np.append(own[1:] != own[:-1], True)
    held = np.where(last, 0, positions(scores[order], threshold))
    before = np.where(np.append(True, last[:-1]), 0, np.append(0, held[:-1]))
    mids = np.asarray(mid_half_ticks, dtype=np.int64)[order]
    move = np.diff(mids, prepend=mids[:1])  # across instruments nothing is held
    changed = np.abs(held - before)
    gross = (before * move).astype(np.float64)
    cost = changed * np.asarray(cost_half_ticks, dtype=np.float64)[order]
    net = np.empty(len(order))
    net[order] = gross - cost
    if time_ns is not None:
        net = net[np.argsort(time_ns, kind="stable")]
    equity = np.cumsum(net)
    height = np.maximum.accumulate(np.maximum(equity, 0.0))
    deviation = float(net.std())
    sharpe = float(net.mean()) / deviation if deviation > 0.0 else 0.0
    span_ns = 0 if time_ns is None else int(time_ns.max() - time_ns.min())
    moved = (before != 0) & (move != 0)
    points = np.linspace(0, len(net) - 1, min(CURVE_POINTS, len(net))).round().astype(np.int64)
    return Following(
        gross_half_ticks=round(float(gross.sum()), PLACES),
        cost_half_ticks=round(float(cost.sum()), PLACES),
        net_half_ticks=round(float(gross.sum() - cost.sum()), PLACES),
        trades=int(np.count_nonzero(changed)),
        turnover=int(changed.sum()),
        hit_rate=round(float((gross > 0.0).sum() / max(1, moved.sum())), PLACES),
        sharpe_a_signal=round(sharpe, PLACES),
        sharpe_a_day=round(sharpe * float(np.sqrt(len(net) * NS_A_DAY / span_ns)), PLACES)
        if span_ns
        else None,
        max_drawdown_half_ticks=round(float((height - equity).max()), PLACES),
        equity_half_ticks=_rounded(equity[points]),
    )


def evaluate(
    scores: np.ndarray,
    truth: np.ndarray,
    *,
    moves: np.ndarray | None = None,
    mid_half_ticks: np.ndarray | None = None,
    cost_half_ticks: np.ndarray | None = None,
    slot: np.ndarray | None = None,
    time_ns: np.ndarray | None = None,
    threshold: float = 0.0,
) -> Metrics:
    """Everything about scores.

    Parameters
    ----------
    scores : ndarray of float, shape (n, classes)
    truth : ndarray of int64, shape (n,)
        0 … classes - 1.
    moves : ndarray, shape (n,), optional
        What the mid did, in any unit; for the information coefficient.
    mid_half_ticks, cost_half_ticks, slot, time_ns, threshold : optional
        See `follow`, which is called where mids and costs are given; one instrument by default.

    Raises
    ------
    InputError
        If there are no rows, or a score is not finite.
    """
    n, n_classes = scores.shape
    assert truth.shape == (n,)
    if n == 0 or not np.isfinite(scores).all():
        raise InputError(
            "scores that cannot be measured",
            where="metrics",
            expected="at least one row, all finite",
            found=f"{n} rows, {int((~np.isfinite(scores)).sum())} values not finite",
            fix="take longer tapes, or train again",
        )
    assert truth.min() >= 0
    assert truth.max() < n_classes
    logarithms = log_softmax(scores)
    probabilities = np.exp(logarithms)
    confusion = confusion_matrix(scores.argmax(axis=1), truth, n_classes)
    named, support, right = confusion.sum(axis=0), confusion.sum(axis=1), np.diag(confusion)
    precision, recall = _share(right, named), _share(right, support)
    f1 = _share(2.0 * right, named + support)
    diagram, calibration_error = reliability(probabilities, truth)
    rank_correlation = correlation = following = None
    if moves is not None:
        lean = probabilities[:, -1] - probabilities[:, 0]
        rank_correlation = round(spearman(lean, moves), PLACES)
        correlation = round(pearson(lean, moves), PLACES)
    if mid_half_ticks is not None and cost_half_ticks is not None:
        slots = np.zeros(n, dtype=np.int64) if slot is None else slot
        following = follow(
            scores, mid_half_ticks, cost_half_ticks, slots, time_ns=time_ns, threshold=threshold
        )
    return Metrics(
        rows=n,
        accuracy=round(float(right.sum() / n), PLACES),
        balanced_accuracy=round(float(recall[support > 0].mean()), PLACES),
        macro_f1=round(float(f1[named + support > 0].mean()), PLACES),
        chance=round(1.0 / n_classes, PLACES),
        majority=round(float(support.max() / n), PLACES),
        log_loss=round(float(-logarithms[np.arange(n), truth].mean()), PLACES),
        calibration_error=round(calibration_error, PLACES),
        classes=tuple(
            ClassMetrics(*row)
            for row in zip(
                _rounded(precision), _rounded(recall), _rounded(f1), support.tolist(), strict=True
            )
        ),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        reliability=diagram,
        information_coefficient=rank_correlation,
        correlation=correlation,
        following=following,
    )
