"""Many bundles side by side, in the terminal and as Markdown; a row without figures says why."""

from __future__ import annotations

import io
import re
from typing import Any

from rich.console import Console

from models.report.table import comparison_markdown, comparison_table

ROWS: list[dict[str, Any]] = [
    {
        "architecture": "tcn",
        "method": "qat",
        "scales": "power-of-two",
        "accuracy_fp32": 0.7615,
        "accuracy_int8": 0.7612,
        "accuracy_loss_points": 0.03,
        "agreement": 0.9912,
        "size_ratio": 0.318,
        "p50_us_fp32": 15.7,
        "p99_us_fp32": 21.0,
        "p50_us_int8": 20.0,
        "p99_us_int8": 29.3,
        "int8_nodes": 14,
        "numerics": "exact-int8",
    },
    {"architecture": "[b]x|y<i>", "method": "dynamic", "why": "scales are chosen\nfor each row"},
]


def printed(rows: list[dict[str, Any]], width: int) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width).print(comparison_table(rows))
    return file.getvalue().splitlines()


def test_bundles_are_compared_in_one_table_for_the_terminal() -> None:
    lines = printed(ROWS, 160)
    row = next(line for line in lines if "tcn" in line)
    for text in ("76.15 %", "76.12 %", "0.03", "99.12 %", "0.318", "20.0 / 29.3", "15.7 / 21.0"):
        assert text in row
    assert any("[b]x|y<i>" in line and "dynamic" in line for line in lines)
    assert lines[-1].strip() == "[b]x|y<i> dynamic : scales are chosen for each row"


def test_a_narrow_terminal_breaks_lines_but_loses_nothing() -> None:
    text = " ".join(" ".join(printed(ROWS, 80)).split())
    for part in (
        "76.15",
        "76.12",
        "0.03",
        "99.12",
        "0.318",
        "20.0",
        "29.3",
        "15.7",
        "21.0",
        "int8",
    ):
        assert f" {part} " in text
    assert "…" not in text


def test_the_markdown_table_has_a_column_for_why_only_where_it_is_needed() -> None:
    lines = comparison_markdown(ROWS).splitlines()
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    assert {len(line) for line in cells} == {13}
    assert cells[0][-1].strip() == "why not"
    assert cells[3][0].strip() == r"\[b\]x\|y&lt;i>"
    assert cells[3][3:5] == [" – ", " – "]
    assert cells[3][-1].strip() == "scales are chosen for each row"
    assert "why not" not in comparison_markdown(ROWS[:1])
