"""Plots of a report (`models.report.html`), each an ``<svg>`` element; see `models.report.svg`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

from models.report.page import shortened
from models.report.svg import DRAWN, colour, markup, plain_ticks, plot

MAX_PANELS: Final = 24
PANEL_COLUMNS: Final = 4
MAX_PANEL_BINS: Final = 64
MAX_FRONT_LABELS: Final = 12
QUANTILES: Final = np.unique(
    np.concatenate([np.linspace(0.0, 1.0, 401), 1.0 - np.logspace(-4.0, -2.0, 21)])
)


def sqnr_plot(sqnr_db: Mapping[str, float], limit: float | None) -> str:
    """Bars of signal to quantisation noise of each block, in the order of the network.

    Parameters
    ----------
    sqnr_db : mapping of str to float
        At least one, all finite.
    limit : float or None
        What the scores must reach.
    """
    names, values = list(sqnr_db), np.array(list(sqnr_db.values()))
    with plot(0.75 + 0.2 * len(names)) as figure:
        axes = figure.subplots()
        at = np.arange(len(names))
        low = -np.inf if limit is None else limit
        colours = [
            DRAWN["bad"] if value < (low if name == "scores" else 0.0) else DRAWN["int8"]
            for name, value in sqnr_db.items()
        ]
        axes.barh(at, values, height=0.66, color=colours, alpha=0.85)
        for row, value in zip(at, values, strict=True):
            axes.annotate(
                f"{value:.1f}",
                (max(value, 0.0), row),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
            )
        if limit is not None:
            axes.axvline(limit, color=DRAWN["bad"], linestyle=(0, (4, 3)), linewidth=1.0)
        axes.set_yticks(at, [shortened(name) for name in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(min(0.0, 1.15 * values.min()), max(1.08 * values.max(), limit or 0.0, 1.0))
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("signal to quantisation noise, dB")
        return markup(figure, "sqnr", "Signal to quantisation noise of each block")


def rebinned(
    edges: Sequence[float], *counts: Sequence[int], most: int = MAX_PANEL_BINS
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Histograms in fewer bins, and without the empty ones at both ends.

    Returns
    -------
    edges : ndarray of float64, shape (bins + 1,)
    shares : list of ndarray of float64, shape (bins,)
        Of each histogram, of its own total.
    """
    columns = [np.asarray(item, dtype=np.float64) for item in counts]
    full = np.flatnonzero(np.sum(columns, axis=0))
    first, last = (int(full[0]), int(full[-1])) if len(full) else (0, 0)
    stride = -(-(last + 1 - first) // most)
    starts = np.arange(first, last + 1, stride)
    kept = np.asarray(edges, dtype=np.float64)[np.append(starts, last + 1)]
    shares = [
        np.add.reduceat(item[: last + 1], starts) / max(1.0, float(item.sum())) for item in columns
    ]
    return kept, shares


def ranges_plot(ranges: Sequence[Any]) -> str:
    """Calibration against live values at quantisation points, the range between two lines.

    Parameters
    ----------
    ranges : sequence of models.report.html.RangeFacts
        1 to `MAX_PANELS`, in the order of the panels.
    """
    assert 1 <= len(ranges) <= MAX_PANELS
    columns = min(PANEL_COLUMNS, len(ranges))
    rows = -(-len(ranges) // columns)
    with plot(0.45 + 1.35 * rows) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in panels[len(ranges) :]:
            axes.set_axis_off()
        for axes, facts in zip(panels, ranges, strict=False):
            _range_panel(axes, facts)
        panels[0].plot([], [], color=DRAWN["past"], linewidth=5, alpha=0.6, label="calibration")
        panels[0].plot([], [], color=DRAWN["live"], linewidth=1.4, label="live")
        panels[0].plot([], [], color=DRAWN["bad"], linewidth=1.0, label="calibrated range")
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, fontsize=8.5
        )
        return markup(figure, "ranges", "Calibrated ranges against the live distribution")


def _range_panel(axes: Axes, facts: Any) -> None:
    edges, (past, live) = rebinned(facts.edges, facts.calibration_counts, facts.live_counts)
    both = np.concatenate([past, live])
    floor = float(both[both > 0.0].min(initial=1.0)) / 2.0
    axes.stairs(
        np.maximum(past, floor),
        edges,
        baseline=floor,
        fill=True,
        color=DRAWN["past"],
        alpha=0.5,
        linewidth=0,
    )
    axes.stairs(np.maximum(live, floor), edges, baseline=floor, color=DRAWN["live"], linewidth=1.0)
    left, right = min(edges[0], facts.low), max(edges[-1], facts.high)
    margin = 0.04 * (right - left) or 1.0
    left, right = left - margin, right + margin
    for start, stop, line in ((left, facts.low, facts.low), (facts.high, right, facts.high)):
        axes.axvspan(start, stop, color=DRAWN["bad"], alpha=0.09, linewidth=0)
        axes.axvline(line, color=DRAWN["bad"], linewidth=0.9)
    axes.set_yscale("log")
    axes.set_ylim(floor, 1.0)
    axes.set_xlim(left, right)
    axes.yaxis.set_major_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.xaxis.set_major_formatter(plain_ticks(lambda value: f"{value:.4g}"))
    axes.tick_params(labelsize=7.5)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_title(
        f"{shortened(facts.point, 22)}\n{100.0 * facts.saturated_live:.3g} % outside",
        loc="left",
        fontsize=8,
        color=DRAWN["ink"],
    )


def latency_plot(latency_us: Mapping[str, Sequence[float]]) -> str:
    """Empirical distribution of one step's latency, p50 and p99 marked.

    Parameters
    ----------
    latency_us : mapping of str to sequence of float
        At least one precision, each with at least one value above 0.
    """
    with plot(3.2) as figure:
        axes = figure.subplots()
        least, most = math.inf, 0.0
        for precision, samples in latency_us.items():
            values = np.asarray(samples, dtype=np.float64)
            values = values[values > 0.0]
            curve = np.quantile(values, QUANTILES, method="inverted_cdf")
            p50, p99 = np.quantile(values, (0.5, 0.99), method="inverted_cdf")
            least, most = min(least, curve[0]), max(most, curve[-1])
            axes.step(
                curve,
                100.0 * QUANTILES,
                where="post",
                color=colour(precision),
                label=f"{shortened(precision.upper())}: p50 {p50:.2f} µs, p99 {p99:.2f} µs",
            )
            axes.plot(
                [p50, p99],
                [50, 99],
                linestyle="none",
                marker="o",
                markersize=5,
                color=colour(precision),
            )
        middle, half = math.sqrt(least * most), max(1.06 * math.sqrt(most / least), math.sqrt(6.0))
        axes.set_xscale("log")
        axes.set_xlim(middle / half, middle * half)
        decades = math.log10(most / least)
        subs = (1.0, 2.0, 5.0) if decades < 4.0 else (1.0,)
        axes.xaxis.set_major_locator(LogLocator(subs=subs))
        axes.xaxis.set_major_formatter(plain_ticks(lambda value: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_yticks([0, 25, 50, 75, 99])
        axes.set_ylim(0, 103)
        axes.set_xlabel("one step, µs (logarithmic)")
        axes.set_ylabel("samples at or below, %")
        axes.legend(loc="lower right")
        return markup(figure, "latency", "Empirical distribution of latency")


def _line(precision: str) -> dict[str, Any]:
    """FP32 beneath and wider: twins that agree lie on each other."""
    wide = precision.lower() == "fp32"
    return {
        "color": colour(precision),
        "linewidth": 2.8 if wide else 1.2,
        "alpha": 0.55 if wide else 1.0,
        "label": shortened(precision.upper()),
    }


def reliability_plot(reliability: Mapping[str, Mapping[str, Sequence[Any]]]) -> str:
    """Accuracy against confidence, and how many rows stand behind each point.

    Parameters
    ----------
    reliability : mapping of str to mapping
        The fields of `models.metrics.Reliability`, by precision; each with at least one row.
    """
    with plot(3.3) as figure:
        left, right = figure.subplots(1, 2)
        lowest = 1.0
        for precision, diagram in sorted(reliability.items()):
            count = np.asarray(diagram["count"], dtype=np.float64)
            there = np.flatnonzero(count)
            confidence, accuracy = (
                np.asarray(diagram[key], dtype=np.float64)[there]
                for key in ("confidence", "accuracy")
            )
            edges = np.asarray(diagram["edges"], dtype=np.float64)
            lowest = min(lowest, confidence.min(), accuracy.min(), edges[there[0]])
            style = _line(precision)
            left.plot(100.0 * confidence, 100.0 * accuracy, marker="o", markersize=4.0, **style)
            right.stairs(100.0 * count / count.sum(), 100.0 * edges, **style)
        low = math.floor(10.0 * lowest) * 10.0
        left.plot([low, 100], [low, 100], color=DRAWN["soft"], linestyle=(0, (4, 3)), linewidth=1)
        left.set(xlim=(low, 101), ylim=(low, 101))
        left.set(xlabel="confidence, %", ylabel="rows that are right, %")
        right.set(xlim=(low, 101), xlabel="confidence, %", ylabel="share of the rows, %")
        left.legend(loc="upper left")
        return markup(figure, "reliability", "Reliability diagram")


def curve_plot(curves: Mapping[str, Sequence[float]]) -> str:
    """What following the signal would have made so far, by precision.

    Parameters
    ----------
    curves : mapping of str to sequence of float
        Half ticks, evenly spread over the rows; at least one, none empty.
    """
    with plot(2.9) as figure:
        axes = figure.subplots()
        for precision, values in sorted(curves.items()):
            axes.plot(np.linspace(0.0, 100.0, len(values)), values, **_line(precision))
        axes.axhline(0.0, color=DRAWN["soft"], linewidth=0.8)
        axes.yaxis.set_major_formatter(plain_ticks(lambda value: f"{value:,.10g}"))
        axes.set(xlim=(0, 100), xlabel="rows of the test part so far, %")
        axes.set_ylabel("net result, half ticks")
        axes.legend(loc="best")
        return markup(figure, "curve", "Equity curve of following the signal")


def front_plot(points: Sequence[Mapping[str, Any]]) -> str:
    """Candidates of a search; those on the Pareto front are joined and numbered.

    Parameters
    ----------
    points : sequence of mapping
        ``label``, ``disagreement`` (a share), ``p99_us``, ``on_front``; the front's numbers are
        their order by latency.
    """
    with plot(3.6) as figure:
        axes = figure.subplots()
        front = front_points(points)
        others = [point for point in points if not point["on_front"]]
        for group, role, label in (
            (others, "past", "candidates"),
            (front, "int8", "Pareto front"),
        ):
            if not group:
                continue
            axes.plot(
                [100.0 * point["disagreement"] for point in group],
                [point["p99_us"] for point in group],
                linestyle="none",
                marker="o",
                markersize=5 if role == "int8" else 4,
                color=DRAWN[role],
                label=label,
            )
        x, y = (
            np.array([scale * point[key] for point in front])
            for scale, key in ((100.0, "disagreement"), (1.0, "p99_us"))
        )
        axes.step(x, y, where="pre", color=DRAWN["int8"], linewidth=1.0, alpha=0.7)
        for number in range(min(len(front), MAX_FRONT_LABELS)):
            axes.annotate(
                str(number + 1),
                (x[number], y[number]),
                xytext=(4, 4),
                textcoords="offset points",
                fontweight="bold",
            )
        every = np.array([100.0 * point["disagreement"] for point in points])
        _spread_shares(axes, every)
        axes.margins(y=0.12)
        axes.set_xlabel("class differs from FP32, % of the rows")
        axes.set_ylabel("p99 of one step, µs")
        axes.legend(loc="upper right")
        return markup(figure, "front", "Pareto front of disagreement and latency")


def front_points(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those on the front, fastest first."""
    found = [point for point in points if point["on_front"]]
    return sorted(found, key=lambda point: (point["p99_us"], point["disagreement"]))


def _spread_shares(axes: Axes, values: np.ndarray) -> None:
    """A logarithmic axis where shares differ by magnitudes; zero keeps a place on it."""
    above = values[values > 0.0]
    if len(above) < 2 or above.max() < 30.0 * above.min():
        axes.margins(x=0.05)
        return
    least = 10.0 ** math.floor(math.log10(above.min()))
    axes.set_xscale("symlog", linthresh=least, linscale=0.5)
    exponents = range(round(math.log10(least)), math.ceil(math.log10(above.max())) + 1)
    axes.xaxis.set_major_locator(FixedLocator([0.0, *(10.0**exponent for exponent in exponents)]))
    axes.xaxis.set_major_formatter(plain_ticks(lambda value: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(-0.3 * least, 1.5 * above.max())
