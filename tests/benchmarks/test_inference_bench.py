"""`octick bench inference` and `crossover`: a figure or a reason in each cell, and who crosses."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner, Result

from benchmarks import parts_cli
from benchmarks.crossover import Crossing, WidthTiming, crossings, show_widths, time_widths, told
from benchmarks.inference import ARCHITECTURES, PRECISIONS, RUNTIMES, bench_inference, show
from feeds.errors import InputError

pytest.importorskip("torch", reason="the models extra is not installed")

CELL_KEYS = {
    "architecture",
    "parameters",
    "precision",
    "runtime",
    "p50_us",
    "p99_us",
    "n",
    "reason",
}


@pytest.fixture(autouse=True)
def short_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.inference.JITTER_S", 0.01)
    monkeypatch.setattr("benchmarks.crossover.JITTER_S", 0.01)


@pytest.fixture
def no_compiler() -> Iterator[None]:
    from torch._inductor import config

    with config.patch({"cpp.cxx": (None, "a-compiler-that-is-not-there")}):
        yield


def timings(*rows: tuple[float, float, float]) -> list[WidthTiming]:
    """Of rising size: FP32, then INT8 of two runtimes."""
    return [
        WidthTiming(10**i, fp32, {"a": a, "b": b}, 0.3) for i, (fp32, a, b) in enumerate(rows, 1)
    ]


@pytest.mark.parametrize(
    ("rows", "a", "b"),
    [
        ([(4.0, 5.0, 1.0), (8.0, 7.0, 2.0), (30.0, 9.0, 5.0)], 100, 10),
        ([(4.0, 3.0, 5.0), (8.0, 9.0, 9.0), (30.0, 9.0, 40.0)], 1000, None),
        ([(4.0, 4.0, 4.1), (8.0, 8.0, 7.9), (30.0, 30.0, 29.0)], None, 100),
        ([(4.0, 3.0, 5.0)], 10, None),
    ],
    ids=["stays", "only from where it stays so", "no faster is not faster", "one size"],
)
def test_int8_crosses_where_it_stays_faster(
    rows: list[tuple[float, float, float]], a: int | None, b: int | None
) -> None:
    assert crossings(timings(*rows)) == [Crossing("a", a), Crossing("b", b)]


def test_nothing_measured_crosses_nowhere() -> None:
    assert crossings([]) == []
    assert "not the faster one" in told(Crossing("a", None))
    assert "1,000" in told(Crossing("a", 1000))


def test_both_runtimes_are_timed_at_every_width() -> None:
    small, large = time_widths((16, 64), 2)
    assert small.parameters < large.parameters
    for row in (small, large):
        assert set(row.p50_us_int8) == {"onnxruntime", "compiled"}
        assert min(row.p50_us_fp32, *row.p50_us_int8.values()) > 0
    assert 0 < large.size_ratio < small.size_ratio


def test_the_bars_stand_beside_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    rows = timings((4.0, 8.0, 1.0), (1e6, 1.0, 1e9))
    show_widths(rows, crossings(rows))
    shown = capsys.readouterr().out
    for text in ("0.50", "4.00", "1000000.00", "0.00", "a: INT8 stays faster from 100", "│"):
        assert text in shown


def run(*arguments: str) -> tuple[Result, dict[str, Any]]:
    result = CliRunner().invoke(
        parts_cli.inference, [*arguments, "--runs", "2", "--no-crossover", "--json"]
    )
    return result, json.loads(result.stdout) if result.exit_code == 0 else {}


@pytest.mark.usefixtures("no_compiler")
def test_every_cell_has_a_figure_or_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    result, found = run("--arch", "mlp", "--arch", "attention")
    assert result.exit_code == 0, result.output
    assert {"crossover", "jitter", "machine", "versions", "commit", "date"} <= set(found)
    cells = found["cells"]
    assert [(c["architecture"], c["precision"], c["runtime"]) for c in cells] == [
        (arch, precision, runtime)
        for arch in ("mlp", "attention")
        for precision in PRECISIONS
        for runtime in RUNTIMES
    ]
    for cell in cells:
        assert set(cell) == CELL_KEYS
        assert cell["parameters"] > 1_000
        if cell["reason"]:
            assert cell["p50_us"] is cell["p99_us"] is None
            assert cell["n"] == 0
        else:
            assert 0 < cell["p50_us"] <= cell["p99_us"]
            assert cell["n"] >= 2
    reasons = {(c["architecture"], c["precision"], c["runtime"]): c["reason"] for c in cells}
    for arch in ("mlp", "attention"):
        assert "no C++ compiler" in reasons[arch, "fp32", "torch.compile"]
        assert "FP32" in reasons[arch, "int8", "torch.compile"]
        assert "integers only" in reasons[arch, "fp32", "compiled"]
        for precision in PRECISIONS:
            assert "not installed" in reasons[arch, precision, "openvino"]
            assert reasons[arch, precision, "onnxruntime"] == ""
    assert reasons["mlp", "int8", "compiled"] == ""
    assert "node" in reasons["attention", "int8", "compiled"]
    assert "/" not in reasons["attention", "int8", "compiled"], "no temporary folder"


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
def test_torch_compile_takes_its_turn() -> None:
    _, found = run("--arch", "linear")
    (cell,) = [
        c for c in found["cells"] if (c["runtime"], c["precision"]) == ("torch.compile", "fp32")
    ]
    assert cell["reason"] == ""
    assert cell["p50_us"] > 0


def test_an_architecture_that_is_none_is_wrong_usage_before_any_work() -> None:
    seen: list[str] = []
    with pytest.raises(InputError, match="unknown architecture"):
        bench_inference(["mlp", "gnu"], 1, progress=lambda stage, share: seen.append(stage))
    assert seen == []


def test_all_that_ship_for_use_are_measured_by_default() -> None:
    from models.architectures import ARCHITECTURES as ALL

    assert set(ARCHITECTURES) == set(ALL) - {"linear", "lstm-a", "lstm-b"}


@pytest.mark.usefixtures("no_compiler")
def test_the_table_leaves_no_cell_blank(capsys: pytest.CaptureFixture[str]) -> None:
    shares: list[float] = []
    result = bench_inference(["mlp"], 1, (16,), progress=lambda stage, share: shares.append(share))
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] <= 1
    assert [item.runtime for item in result.crossover] == ["onnxruntime", "compiled"]
    show(result)
    shown = capsys.readouterr().out
    for text in (*RUNTIMES, "no C++ compiler", "integers only", "host jitter", "an empty call"):
        assert text in shown


def test_the_crossover_command_gives_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.crossover.bench_crossover.__defaults__", ((16,), 1))
    result = CliRunner().invoke(parts_cli.crossover, ["--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert len(found["rows"]) == 1
    assert {item["runtime"] for item in found["crossover"]} == {"onnxruntime", "compiled"}
    assert {"machine", "versions", "commit", "date", "jitter"} <= set(found)
