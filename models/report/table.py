"""Many bundles in one table: for the terminal, and as Markdown.

A row is a mapping of the keys that `COLUMNS` names; a cell that cannot be filled stays empty. A
bundle that could not be made has ``why`` instead of figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich import box
from rich.table import Table
from rich.text import Text

from models.report.page import NOTHING, decimal, percent, printable, whole

# heading, keys of the row, kind of figure ("" is text)
Column = tuple[str, tuple[str, ...], str]
COLUMNS: Final[tuple[Column, ...]] = (
    ("architecture", ("architecture",), ""),
    ("method", ("method",), ""),
    ("scales", ("scales",), ""),
    ("accuracy FP32", ("accuracy_fp32",), "share"),
    ("accuracy INT8", ("accuracy_int8",), "share"),
    ("loss, points", ("accuracy_loss_points",), "points"),
    ("agreement", ("agreement",), "share"),
    ("size ratio", ("size_ratio",), "ratio"),
    ("p50/p99 INT8, µs", ("p50_us_int8", "p99_us_int8"), "us"),
    ("p50/p99 FP32, µs", ("p50_us_fp32", "p99_us_fp32"), "us"),
    ("INT8 nodes", ("int8_nodes",), "count"),
    ("numerics", ("numerics",), ""),
)


def _text(value: Any, kind: str) -> str:
    if kind == "share":
        return percent(value)
    if kind == "points":
        return decimal(value, 2)
    if kind == "ratio":
        return decimal(value, 3)
    if kind == "us":
        return decimal(value, 1)
    if kind == "count":
        return whole(value)
    return NOTHING if value in (None, "") else " ".join(printable(value).split())


def _cell(row: Mapping[str, Any], column: Column) -> str:
    _, keys, kind = column
    parts = [_text(row.get(key), kind) for key in keys]
    return NOTHING if set(parts) == {NOTHING} else " / ".join(parts)


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows for a terminal, 80 letters wide or more; why a row has no figures stands below.

    Parameters
    ----------
    rows : sequence of mapping
        See `COLUMNS`.
    """
    whys = [
        " ".join(printable(row.get(key) or "") for key in ("architecture", "method", "scales"))
        + f": {row['why']}"
        for row in rows
        if row.get("why")
    ]
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
        caption=Text("\n".join(" ".join(why.split()) for why in whys)) if whys else None,
        caption_justify="left",
    )
    for heading, _, kind in COLUMNS:
        # In a narrow terminal a figure must not lose its end.
        table.add_column(heading, justify="right" if kind else "left", overflow="fold")
    for row in rows:
        # Not strings: a name in square brackets is no style.
        table.add_row(*(Text(_cell(row, column)) for column in COLUMNS))
    return table


def comparison_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table, a last column for why where a row needs one.

    Parameters
    ----------
    rows : sequence of mapping
        See `COLUMNS`.
    """
    with_why = any(row.get("why") for row in rows)
    lines = [
        [heading for heading, _, _ in COLUMNS] + ["why not"] * with_why,
        ["---:" if kind else "---" for _, _, kind in COLUMNS] + ["---"] * with_why,
    ]
    for row in rows:
        cells = [_cell(row, column) for column in COLUMNS]
        cells += [" ".join(printable(row.get("why") or "").split())] * with_why
        lines.append([_literal(cell) for cell in cells])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _literal(cell: str) -> str:
    """Text that Markdown takes as it is."""
    for mark in "\\|*_`[]":
        cell = cell.replace(mark, f"\\{mark}")
    return cell.replace("&", "&amp;").replace("<", "&lt;")
