"""How commands print: one JSON object, or tables as wide as they need in a pipe."""

from __future__ import annotations

import json
from typing import Any, Final

import click

PIPE_COLUMNS: Final = 200
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def print_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    click.echo(json.dumps(value, separators=(", ", ": ")))


def wide_console() -> Any:
    """A console for tables: where stdout is no terminal no column is cut to its 80 characters."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=PIPE_COLUMNS)
