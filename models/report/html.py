"""The report of a bundle: one HTML file that needs nothing beside it, and runs nothing.

`html_report` takes plain values only (`ReportFacts`), gathered by `models.report.bundle_report`;
the same facts give the same bytes. A part without facts is left out, with the command that makes
them. Twins stand side by side everywhere: what quantisation cost, and what it bought.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from models.report import plots
from models.report.page import (
    FAILS,
    Markup,
    bullets,
    code,
    decimal,
    drawing,
    escaped,
    flattened,
    folded,
    general,
    is_figure,
    joined,
    left_out,
    page,
    paragraph,
    percent,
    section,
    table,
    tiles,
    whole,
)
from models.report.verdict import sentences, verdict

QUANTIZE: Final = "octick model quantize RUN"
VERIFY: Final = "octick model verify BUNDLE"
TUNE: Final = "octick model tune RUN"
WORST_FEATURES: Final = 10
FOLD_ABOVE: Final = 12  # checks of a level that all hold
STABLE_PSI: Final = 0.1
SHIFTED_PSI: Final = 0.25


@dataclass(frozen=True)
class RangeFacts:
    """The range of a quantisation point, and what came by there.

    Attributes
    ----------
    point : str
    low, high : float
        The calibrated range.
    edges : sequence of float
        Of the bins of both histograms, one more than there are bins.
    calibration_counts, live_counts : sequence of int
    saturated_live : float
        Share of the live values outside the range.
    """

    point: str
    low: float
    high: float
    edges: Sequence[float]
    calibration_counts: Sequence[int]
    live_counts: Sequence[int]
    saturated_live: float

    def __post_init__(self) -> None:
        assert len(self.edges) == len(self.calibration_counts) + 1 >= 2, self.point
        assert len(self.live_counts) == len(self.calibration_counts), self.point
        assert self.low <= self.high, self.point


@dataclass(frozen=True)
class ReportFacts:
    """What a report is made of: plain values, as JSON would hold them.

    Attributes
    ----------
    name : str
        Of the bundle.
    manifest : dict
        Anything to be listed: hash, schema, classes, training notes, options, versions. ``classes``
        (or ``output.classes``) names rows; ``model_hash`` and ``numerics`` stand in the head.
    comparison : dict
        Fields of `models.comparison.Comparison`; may be empty.
    baselines : dict of str to dict or float
        Fields of `models.metrics.Metrics`, as many as there are, or an accuracy.
    verification : dict or None
        Fields of `models.verify.Verification`.
    ranges : sequence of RangeFacts
    coverage : dict
        ``features``: share of each feature's live values within what calibration saw; ``overall``
        (and ``rows``): share of all values (of the rows that have nothing outside); ``psi``:
        population stability index of each feature. All optional.
    latency_us : dict of str to sequence of float
        Samples of one step, by precision.
    reliability : dict of str to dict
        Fields of `models.metrics.Reliability`, by precision.
    front : sequence of dict or None
        ``label``, ``disagreement``, ``p99_us``, ``on_front`` of each candidate of a search.
    curve : dict of str to sequence of float
        Equity in half ticks, by precision, evenly spread over the rows.
    """

    name: str
    manifest: Mapping[str, Any]
    comparison: Mapping[str, Any] = field(default_factory=dict)
    baselines: Mapping[str, Any] = field(default_factory=dict)
    verification: Mapping[str, Any] | None = None
    ranges: Sequence[RangeFacts] = ()
    coverage: Mapping[str, Any] = field(default_factory=dict)
    latency_us: Mapping[str, Sequence[float]] = field(default_factory=dict)
    reliability: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    front: Sequence[Mapping[str, Any]] | None = None
    curve: Mapping[str, Sequence[float]] = field(default_factory=dict)


_ONE, _FOUR = (partial(decimal, places=places) for places in (1, 4))
CLASSES: Final = "classes"  # one row for each class stands here
# field of the metrics, what it is called, how it is written
METRICS: Final[tuple[tuple[str, str, Callable[[Any], str]], ...]] = (
    ("rows", "rows", whole),
    ("accuracy", "accuracy", percent),
    ("balanced_accuracy", "balanced accuracy", percent),
    ("macro_f1", "macro F1", percent),
    (CLASSES, "F1 of", percent),
    ("log_loss", "log loss, nats", _FOUR),
    ("calibration_error", "expected calibration error", percent),
    ("information_coefficient", "information coefficient (ranks)", _FOUR),
    ("correlation", "correlation with the move", _FOUR),
    ("following.net_half_ticks", "following it, net, half ticks", _ONE),
    ("following.gross_half_ticks", "… gross", _ONE),
    ("following.cost_half_ticks", "… cost", _ONE),
    ("following.max_drawdown_half_ticks", "… deepest fall", _ONE),
    ("following.trades", "… changes of position", whole),
    ("following.hit_rate", "… moves that went its way", percent),
    ("following.sharpe_a_day", "… Sharpe ratio a day", decimal),
)


def html_report(facts: ReportFacts) -> bytes:
    """The report as one HTML file, UTF-8.

    Parameters
    ----------
    facts : ReportFacts
    """
    sections = (
        _figures(facts),
        _blocks(facts),
        _ranges(facts),
        _coverage(facts),
        _latency(facts),
        _reliability(facts),
        _curve(facts),
        _front(facts),
        _checks(facts),
        _manifest(facts),
    )
    return page(f"{facts.name}: INT8 beside FP32", joined((_summary(facts), *sections)))


def _summary(facts: ReportFacts) -> Markup:
    words, ok = verdict(facts.verification)
    kind = {True: " good", False: " bad", None: ""}[ok]
    comparison = facts.comparison
    points: Any = comparison.get("accuracy_loss_points")
    gained = is_figure(points) and points < 0.0
    shown = [
        (percent(comparison.get("agreement")), "same class as FP32"),
        (
            decimal(-points if gained else points),
            f"points of accuracy {'gained' if gained else 'lost'}",
        ),
        (decimal(comparison.get("size_ratio")), "size, INT8 to FP32"),
        (decimal(comparison.get("p50_us_int8")), "µs p50, INT8"),
        (decimal(comparison.get("p99_us_int8")), "µs p99, INT8"),
    ]
    told = bullets(sentences(comparison, facts.baselines))
    head = [
        f"{name} {code(facts.manifest[key])}"
        for key, name in (("model_hash", "model"), ("numerics", "numerics"))
        if key in facts.manifest
    ]
    return joined(
        (
            Markup(f"<header><h1>{escaped(facts.name)}</h1>\n"),
            Markup(f'<p class="soft">{" · ".join(head)}</p>\n' if head else ""),
            Markup(f'<p class="verdict{kind}">{escaped(words)}</p></header>\n'),
            left_out("No verification was given.", VERIFY) if ok is None else Markup(""),
            tiles(shown) if comparison else Markup(""),
            told if comparison else left_out("No comparison with FP32 was given.", QUANTIZE),
        )
    )


def _at(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _figures(facts: ReportFacts) -> Markup:
    """INT8, FP32 and the baselines."""
    title, comparison = "INT8, FP32 and baselines", facts.comparison
    twins = ("int8", "fp32") if comparison else ()
    names = [*(name.upper() for name in twins), *facts.baselines]
    if not names:
        return section("figures", title, left_out("No figures were given.", QUANTIZE))
    columns = [comparison.get(name) or {} for name in twins]
    columns += [
        value if isinstance(value, Mapping) else {"accuracy": value}
        for value in facts.baselines.values()
    ]
    rows: list[tuple[str, list[Any], Callable[[Any], str]]] = []
    for path, label, form in METRICS:
        if path == CLASSES:
            rows += [
                (f"{label} {name}", [_f1(column, i) for column in columns], form)
                for i, name in enumerate(_class_names(facts.manifest))
            ]
        else:
            rows.append((label, [_at(column, path) for column in columns], form))
    nothing = [None] * len(facts.baselines)
    for key, label, form in (
        ("bytes", "size, bytes", whole),
        ("p50_us", "p50 of a step, µs", decimal),
        ("p99_us", "p99 of a step, µs", decimal),
    ):
        rows.append((label, [*(comparison.get(f"{key}_{name}") for name in twins), *nothing], form))
    cells = [
        [label, *map(form, values)]
        for label, values, form in rows
        if any(is_figure(value) for value in values)
    ]
    found = table(["", *names], cells, "l" + "n" * len(names))
    more = Markup("") if facts.baselines else left_out("No baselines were given.", QUANTIZE)
    return section("figures", title, found, more)


def _class_names(manifest: Mapping[str, Any]) -> Sequence[str]:
    return manifest.get("classes") or _at(manifest, "output.classes") or ()


def _f1(metrics: Mapping[str, Any], number: int) -> Any:
    classes = metrics.get("classes") or ()
    return classes[number].get("f1") if number < len(classes) else None


def _blocks(facts: ReportFacts) -> Markup:
    title, found = "Error of each block", facts.verification or {}
    given = found.get("sqnr_db") or {}
    ratios = {name: value for name, value in given.items() if is_figure(value)}
    if not ratios:
        return section("blocks", title, left_out("No block was measured.", VERIFY))
    limits = {(check["level"], check["name"]): check["limit"] for check in found["checks"]}
    limit = limits.get(("subgraph", "scores"))
    caption = "INT8 against FP32, in the order of the network; 10 dB more is a tenth of the noise."
    if limit is not None:
        caption += f" The scores must reach {limit:g} dB (dashed)."
    return section("blocks", title, drawing(plots.sqnr_plot(ratios, limit), caption))


def _ranges(facts: ReportFacts) -> Markup:
    title = "Calibrated ranges against the live distribution"
    if not facts.ranges:
        return section("ranges", title, left_out("No live values were given.", QUANTIZE))
    worst = sorted(facts.ranges, key=lambda item: -item.saturated_live)[: plots.MAX_PANELS]
    caption = (
        f"{len(worst)} of {len(facts.ranges)} quantisation points, the most saturated first."
        " Shares on a logarithmic axis; what lies in the shaded part is cut off."
    )
    return section("ranges", title, drawing(plots.ranges_plot(worst), caption))


def _coverage(facts: ReportFacts) -> Markup:
    title, features = "Coverage of the calibration set", facts.coverage.get("features") or {}
    overall = facts.coverage.get("overall")
    if not features and overall is None:
        return section("coverage", title, left_out("No live rows were given.", QUANTIZE))
    psi = facts.coverage.get("psi") or {}
    parts = [paragraph(f"{percent(overall)} of all live values lie within what calibration saw.")]
    if facts.coverage.get("rows") is not None:
        parts.append(paragraph(f"{percent(facts.coverage['rows'])} of the rows do in full."))
    worst = sorted(features.items(), key=lambda item: (item[1], -(psi.get(item[0]) or 0.0)))
    rows = [
        [name, percent(share), decimal(psi.get(name), 3), _stability(psi.get(name))]
        for name, share in worst[:WORST_FEATURES]
    ]
    if rows:
        parts.append(table(["worst features", "within calibration", "PSI", ""], rows, "lnnl"))
    shifted = sorted(
        name for name, value in psi.items() if is_figure(value) and value > SHIFTED_PSI
    )
    if psi:
        text = f"{len(shifted)} of {len(psi)} features shifted (PSI above {SHIFTED_PSI})"
        parts.append(paragraph(text + (f": {', '.join(shifted)}." if shifted else "."), "soft"))
    return section("coverage", title, *parts)


def _stability(psi: Any) -> str:
    if not is_figure(psi):
        return ""
    return "stable" if psi < STABLE_PSI else "drifting" if psi <= SHIFTED_PSI else "shifted"


def _latency(facts: ReportFacts) -> Markup:
    samples = {
        name: values
        for name, values in facts.latency_us.items()
        if any(value > 0.0 for value in values)
    }
    if not samples:
        return section("latency", "Latency", left_out("No samples were given.", QUANTIZE))
    counts = ", ".join(
        f"{whole(len(values))} of {name.upper()}" for name, values in samples.items()
    )
    caption = f"One step in ONNX Runtime, batch 1; samples: {counts}. Dots mark p50 and p99."
    return section("latency", "Latency", drawing(plots.latency_plot(samples), caption))


def _reliability(facts: ReportFacts) -> Markup:
    title = "Reliability"
    found = {name: item for name, item in facts.reliability.items() if any(item["count"])}
    if not found:
        return section("reliability", title, left_out("No probabilities were given.", QUANTIZE))
    caption = (
        "On the dashed line the model is right as often as it says; below the line it is too sure."
        " On the right, how many rows stand behind each point."
    )
    return section("reliability", title, drawing(plots.reliability_plot(found), caption))


def _curve(facts: ReportFacts) -> Markup:
    title = "Following the signal"
    found = {name: values for name, values in facts.curve.items() if len(values)}
    if not found:
        return section("curve", title, left_out("No equity curve was given.", QUANTIZE))
    caption = (
        "One unit an instrument, held as the last signal says, half the spread paid at each change."
        " No backtest: no latency, fees, queues or market impact."
    )
    return section("curve", title, drawing(plots.curve_plot(found), caption))


def _front(facts: ReportFacts) -> Markup:
    title = "Pareto front of the search"
    if not facts.front:
        return section("front", title, left_out("No search was given.", TUNE))
    caption = "Lower and further left is better; nothing is better than the front in both."
    rows = [
        [number + 1, point["label"], percent(point["disagreement"], 3), decimal(point["p99_us"])]
        for number, point in enumerate(plots.front_points(facts.front))
    ]
    head = ["", "on the front", "differs from FP32", "p99, µs"]
    drawn = drawing(plots.front_plot(facts.front), caption)
    return section("front", title, drawn, table(head, rows, "nlnn"))


def _checks(facts: ReportFacts) -> Markup:
    title, found = "Verification", facts.verification
    if found is None or not found["checks"]:
        return section("verification", title, left_out("No checks were given.", VERIFY))
    parts = []
    for level in dict.fromkeys(check["level"] for check in found["checks"]):
        checks = [check for check in found["checks"] if check["level"] == level]
        failed = sum(not check["ok"] for check in checks)
        rows = [
            [
                "holds" if check["ok"] else FAILS,
                check["name"],
                general(check["value"]),
                general(check["limit"]),
                check["detail"],
            ]
            for check in sorted(checks, key=lambda check: bool(check["ok"]))
        ]
        inner = table(["", "check", "value", "limit", "what it is"], rows, "swnnw")
        words = f"{level}: {len(checks) - failed} of {len(checks)} hold"
        parts.append(folded(words, inner, is_open=bool(failed) or len(checks) <= FOLD_ABOVE))
    system = found.get("system") or {}
    if system:
        parts.append(folded("over the tape", _notes(system), is_open=True))
    return section("verification", title, *parts)


def _manifest(facts: ReportFacts) -> Markup:
    missing = left_out("No manifest was given.", QUANTIZE)
    return section("manifest", "Manifest", _notes(facts.manifest) if facts.manifest else missing)


def _notes(notes: Mapping[str, Any]) -> Markup:
    return table(["", ""], flattened(notes), "lc")
