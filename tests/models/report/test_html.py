"""The report: one file that needs nothing beside it, says what is missing, and escapes all else."""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from html.parser import HTMLParser
from typing import Any

import matplotlib as mpl
import msgspec
import numpy as np
import pytest

from models.metrics import evaluate
from models.report.html import QUANTIZE, TUNE, VERIFY, RangeFacts, ReportFacts, html_report
from models.report.page import flattened, general, percent, printable, shortened
from models.report.plots import MAX_PANELS, front_points, rebinned
from models.report.verdict import sentences, verdict

PLOTS = ("sqnr", "ranges", "latency", "reliability", "curve", "front")
SECTIONS = ["figures", "blocks", "ranges", "coverage", "latency"]
SECTIONS += ["reliability", "curve", "front", "verification", "manifest"]
VOID = {"meta"}
PLANTED = '<b>&"bold"</b>'


class Page(HTMLParser):
    """What a browser would make of the file; fails where tags do not match."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(data.decode())
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text.append(data)

    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def values(self, name: str) -> list[str]:
        return [value for _, key, value in self.attributes if key == name]


def metrics(noise: float) -> dict[str, Any]:
    rng = np.random.default_rng(7)
    truth = rng.integers(0, 3, 900)
    scores = rng.standard_normal((900, 3))
    scores[np.arange(900), truth] += 2.0
    scores += noise * rng.standard_normal((900, 3))
    mids = 2_000 + np.cumsum(truth - 1)
    return msgspec.to_builtins(
        evaluate(
            scores,
            truth,
            moves=truth - 1,
            mid_half_ticks=mids,
            cost_half_ticks=np.full(900, 0.1),
            time_ns=np.arange(900) * 10**9,
        )
    )


def check(level: str, name: str, ok: bool = True, **more: Any) -> dict[str, Any]:
    return {"level": level, "name": name, "ok": ok, "value": 0.5, "limit": 1.0, "detail": ""} | more


def point_range(point: str, saturated: float) -> RangeFacts:
    counts = np.exp2(-np.abs(np.linspace(-12.0, 12.0, 256))) * 1e6
    return RangeFacts(
        point=point,
        low=-6.0,
        high=6.0,
        edges=np.linspace(-12.0, 12.0, 257).tolist(),
        calibration_counts=counts.astype(int).tolist(),
        live_counts=counts[::-1].astype(int).tolist(),
        saturated_live=saturated,
    )


def full_facts(name: str = "tcn", block: str = "block") -> ReportFacts:
    """Facts for every part; ``name`` and ``block`` stand wherever a name can."""
    fp32, int8 = metrics(0.0), metrics(0.1)
    comparison = {
        "rows": 900,
        "fp32": fp32,
        "int8": int8,
        "agreement": 0.98,
        "accuracy_loss_points": 100.0 * (fp32["accuracy"] - int8["accuracy"]),
        "bytes_fp32": 40_000,
        "bytes_int8": 12_000,
        "size_ratio": 0.3,
        "p50_us_fp32": 10.0,
        "p99_us_fp32": 20.0,
        "p50_us_int8": 15.0,
        "p99_us_int8": 16.0,
        "int8_nodes": 5,
    }
    checks = [
        check("operator", f"{block} operator", detail=f"at {block}"),
        check("subgraph", block, value=float("inf")),
        check("subgraph", "scores", value=30.0, limit=10.0),
    ]
    candidates = [
        {"label": f"{name} {i}", "disagreement": d, "p99_us": p, "on_front": on}
        for i, (d, p, on) in enumerate([(0.0, 30.0, True), (0.02, 12.0, True), (0.03, 31.0, False)])
    ]
    return ReportFacts(
        name=name,
        manifest={
            "model_hash": "00ff00ff00ff00ff",
            "numerics": "exact-int8",
            "classes": ["down", "flat", name],
            "training": {"label": {"kind": name, "horizon": 100}, "note": None},
            "mean": list(range(60)),
        },
        comparison=comparison,
        baselines={f"logistic {name}": metrics(3.0), "majority": 0.35, "optimum": {"accuracy": 1}},
        verification={
            "ok": True,
            "checks": checks,
            "sqnr_db": {"scores": 30.0, block: 41.0},
            "system": {"digest": name, "signals": 900},
        },
        ranges=[point_range(f"{block}.{i}", i / 1_000.0) for i in range(2)],
        coverage={
            "overall": 0.999,
            "rows": 0.93,
            "features": {f"{name} {i}": 1.0 - i / 100.0 for i in range(14)},
            "psi": {f"{name} {i}": i / 40.0 for i in range(14)},
        },
        latency_us={"int8": [15.0, 16.0, 15.5, 90.0], "fp32": [10.0, 11.0, 10.5, 9.0]},
        reliability={"int8": int8["reliability"], "fp32": fp32["reliability"]},
        front=candidates,
        curve={
            "int8": int8["following"]["equity_half_ticks"],
            "fp32": fp32["following"]["equity_half_ticks"],
        },
    )


@pytest.fixture(scope="module")
def data() -> bytes:
    return html_report(full_facts())


@pytest.fixture(scope="module")
def full(data: bytes) -> Page:
    return Page(data)


def test_the_same_facts_give_the_same_bytes_whatever_matplotlib_is_set_to(data: bytes) -> None:
    with mpl.rc_context({"font.size": 30.0, "svg.hashsalt": None, "axes.grid": False}):
        assert html_report(copy.deepcopy(full_facts())) == data
        assert mpl.rcParams["font.size"] == 30.0


def test_the_file_needs_nothing_beside_it_and_runs_nothing(data: bytes, full: Page) -> None:
    assert b"://" not in data
    assert not re.search(rb"@import|url\((?!#)", data)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(full.tags)
    assert not [key for _, key, _ in full.attributes if key in ("src", "srcset") or key[:2] == "on"]
    assert all(value.startswith("#") for value in full.values("href"))


def test_every_part_is_there_and_every_plot_is_an_svg(data: bytes, full: Page) -> None:
    assert [
        value for tag, key, value in full.attributes if (tag, key) == ("section", "id")
    ] == SECTIONS
    assert full.tags.count("svg") == len(PLOTS)
    for name in PLOTS:
        assert f'id="{name}-'.encode() in data
    assert "left-out" not in full.values("class")


def test_ids_are_used_once_and_references_lead_somewhere(data: bytes, full: Page) -> None:
    ids = full.values("id")
    assert len(ids) == len(set(ids))
    used = re.findall(rb'(?:href="|url\()#([^")]+)', data)
    assert used
    assert {item.decode() for item in used} <= set(ids)


def test_plots_take_their_colours_from_the_page_which_has_two_papers(data: bytes) -> None:
    svgs = b"".join(re.findall(rb"<svg.*?</svg>", data, re.S))
    assert not re.search(rb"#[0-9a-f]{6}\b(?!-)", re.sub(rb'(?:href="|url\()#[^")]+', b"", svgs))
    used = set(re.findall(rb"var\(--([a-z0-9]+)\)", svgs))
    style = data[: data.index(b"</style>")]
    assert {b"ink", b"int8", b"fp32", b"live"} <= used
    for name in used:
        assert style.count(b"--" + name + b": #") == 2  # light and dark
    assert b"prefers-color-scheme: dark" in style


def test_names_are_escaped_wherever_they_stand() -> None:
    data = html_report(full_facts(PLANTED, PLANTED))
    page = Page(data)
    assert b"<b>&" not in data
    assert "b" in page.tags  # the tiles
    plain = Page(html_report(full_facts()))
    assert page.tags == plain.tags
    assert page.words().count(PLANTED) > 20


def test_control_characters_and_other_scripts_do_no_harm() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = Page(html_report(full_facts("a\x00b\ud800 $x_1$ 市场", "市场\x1b[0m $\\alpha$")))
    assert "a\ufffdb\ufffd $x_1$ 市场" in page.words()


def test_without_facts_each_part_says_what_would_make_it() -> None:
    page = Page(html_report(ReportFacts("empty", {})))
    assert "svg" not in page.tags
    assert page.values("id") == SECTIONS
    assert page.values("class").count("left-out") == len(SECTIONS) + 2
    for command in (QUANTIZE, VERIFY, TUNE):
        assert command in page.words()
    assert "Not verified yet" in page.words()


@pytest.mark.parametrize(
    "missing",
    [
        {"comparison": {}},
        {"baselines": {}},
        {"verification": None},
        {"verification": {"ok": True, "checks": [], "sqnr_db": {}, "system": {}}},
        {"ranges": ()},
        {"coverage": {}},
        {"latency_us": {"int8": []}},
        {"reliability": {}},
        {"front": None},
        {"curve": {"int8": []}},
        {"manifest": {}},
    ],
    ids=lambda missing: next(iter(missing)),
)
def test_any_part_may_be_missing(missing: dict[str, Any]) -> None:
    page = Page(html_report(dataclasses.replace(full_facts(), **missing)))
    assert "left-out" in page.values("class")
    assert page.values("id")[0] == "figures"


def test_the_least_that_can_be_drawn_is_drawn_without_a_warning() -> None:
    facts = ReportFacts(
        "least",
        {},
        comparison={"agreement": 1.0},
        verification={"ok": False, "checks": [check("subgraph", "scores", ok=False, value=None)]}
        | {"sqnr_db": {"scores": -3.0}},
        ranges=[RangeFacts("nothing", 0.0, 0.0, [-1.0, 1.0], [0], [0], 0.0)],
        coverage={"overall": 1.0},
        latency_us={"int8": [12.0]},
        reliability={
            "int8": {"edges": [0.0, 1.0], "confidence": [0.4], "accuracy": [0.0], "count": [1]}
        },
        front=[{"label": "one", "disagreement": 0.0, "p99_us": 9.0, "on_front": True}],
        curve={"int8": [0.0]},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = Page(html_report(facts))
    assert page.tags.count("svg") == len(PLOTS)


def test_the_most_saturated_ranges_come_first_and_no_more_than_can_be_seen() -> None:
    ranges = [point_range(f"block.{i}", i / 1_000.0) for i in range(MAX_PANELS + 3)]
    words = Page(html_report(ReportFacts("many", {}, ranges=ranges))).words()
    assert "24 of 27 quantisation points" in words
    assert words.index("block.26") < words.index("block.3")
    assert "block.2 " not in words


def test_the_ten_worst_features_are_told_and_how_many_shifted(full: Page) -> None:
    words = full.words()
    assert words.index("tcn 13") < words.index("tcn 4 ") < words.index("3 of 14 features shifted")
    assert "tcn 3 " not in words


def test_every_check_is_listed_and_those_that_fail_stand_open_and_first() -> None:
    checks = [check("subgraph", f"block {i}") for i in range(20)]
    for failing, is_open in ((0, False), (1, True)):
        found = checks + [check("subgraph", "last", ok=False)] * failing
        verification = {"ok": not failing, "checks": found}
        page = Page(html_report(ReportFacts("checked", {}, verification=verification)))
        assert (("details", "open", "") in page.attributes) == is_open
        assert f"subgraph: 20 of {20 + failing} hold" in page.words()
    words = page.words()
    assert words.index("FAILS last") < words.index("holds block 0")


def test_the_verdict_is_one_of_three() -> None:
    good, bad = check("operator", "golden vectors"), check("system", "agreement", ok=False)
    assert verdict(None)[1] is None
    assert verdict({"ok": True, "checks": []})[1] is None
    assert verdict({"ok": True, "checks": [good]}) == ("Verified: 1 of 1 checks hold.", True)
    words, ok = verdict({"ok": False, "checks": [good, bad]})
    assert not ok
    assert words == "Not verified: 1 of 2 checks fail: agreement."
    assert verdict({"ok": False, "checks": [bad] * 9})[0].endswith("; 4 more.")
    assert verdict({"ok": False, "checks": [good]})[1] is False


@pytest.mark.parametrize(
    ("int8", "fp32", "words"),
    [(15.0, 10.0, "slower"), (10.0, 15.0, "faster"), (10.0, 10.1, "as fast as")],
)
def test_the_summary_says_plainly_which_one_is_slower(int8: float, fp32: float, words: str) -> None:
    (text,) = sentences({"p50_us_int8": int8, "p50_us_fp32": fp32}, {})
    assert f"INT8 is {words}" in text


@pytest.mark.parametrize(
    ("points", "words"),
    [
        (1.25, "loses 1.25"),
        (-0.5, "gains 0.50"),
        (0.004, "loses less than 0.01"),
        (0.0, "the same"),
    ],
)
def test_the_summary_says_what_became_of_the_accuracy(points: float, words: str) -> None:
    (text,) = sentences({"accuracy_loss_points": points, "int8": {"accuracy": 0.7}}, {})
    assert words in text


def test_the_summary_names_agreement_size_baselines_and_integer_nodes(full: Page) -> None:
    words = full.words()
    assert "agrees with FP32 on the class of 98.00 % of 900 rows" in words
    assert "0.30 times the size, 12,000 bytes against 40,000" in words
    assert "majority 35.00 %, optimum 100.00 %" in words
    assert "5 nodes compute in integers" in words
    (text,) = sentences({"int8_nodes": 0}, {})
    assert "INT8 saves size, not arithmetic" in text


def test_a_share_below_one_never_reads_as_all() -> None:
    assert percent(1.0) == "100.00 %"
    assert percent(0.99999) == "99.999 %"
    assert percent(1.0 - 1e-12).startswith("above")
    assert percent(None) == percent(float("nan")) == "–"


def test_figures_of_any_size_stay_short() -> None:
    found = [general(value) for value in (0, 3.4e-7, 16_777_215.0, float("inf"), None, 1e300)]
    assert found == ["0", "3.4e-07", "16,777,215", "∞", "–", "1e+300"]


def test_notes_are_flattened_and_long_lists_told_by_their_ends() -> None:
    notes = {"a": {"b": [1, 2], "c": {}}, "long": list(range(60)), "of": [{"x": 1}]}
    assert flattened(notes) == [
        ("a.b", "1, 2"),
        ("a.c", "–"),
        ("long", "60 values, 0 … 59"),
        ("of.0.x", "1"),
    ]


def test_labels_are_one_line_of_bounded_length() -> None:
    assert shortened("a\nb") == "a b"
    assert len(shortened("x" * 99)) == 26
    assert shortened("first." + "x" * 40 + ".last").endswith(".last")
    assert printable("a\x07\u2028") == "a\ufffd\u2028"


def test_rebinning_counts_everything_and_drops_empty_ends() -> None:
    counts = [0] * 100 + list(range(1, 200)) + [0] * 50
    edges = np.linspace(-1.0, 1.0, len(counts) + 1).tolist()
    kept, (shares, none) = rebinned(edges, counts, [0] * len(counts))
    assert (kept[0], kept[-1]) == (edges[100], edges[299])
    assert len(kept) == len(shares) + 1 <= 65
    assert shares.sum() == pytest.approx(1.0)
    assert not none.any()


def test_the_front_is_told_fastest_first() -> None:
    facts = full_facts()
    assert facts.front is not None
    assert [item["p99_us"] for item in front_points(facts.front)] == [12.0, 30.0]
