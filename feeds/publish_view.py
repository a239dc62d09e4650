"""What a person sees of a publisher that runs, and how a signal ends it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from feeds.publisher import Publisher, Totals


@contextmanager
def publish_view(quiet: bool) -> Iterator[Callable[[Totals], None] | None]:
    """A live table on a terminal's stderr, as a function that takes the totals so far."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    def table(totals: Totals) -> Table:
        grid = Table(box=None, pad_edge=False)
        values = {
            "seconds": f"{totals.seconds:,.1f}",
            "messages": f"{totals.messages:,}",
            "messages/s": f"{totals.rate:,.0f}",
            "MB": f"{totals.bytes / 1e6:,.1f}",
            "late max ms": f"{totals.late_max_ms:,.1f}",
            "snapshots": f"{totals.snapshots_served:,}",
            **{kind: f"{count:,}" for kind, count in totals.faults.items()},
        }
        for name in values:
            grid.add_column(name, justify="right")
        grid.add_row(*values.values())
        return grid

    with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as live:
        yield lambda totals: live.update(table(totals), refresh=True)


@contextmanager
def stopped_by_signals(publisher: Publisher) -> Iterator[None]:
    """SIGINT and SIGTERM end the run as its source's end would."""

    def end(number: int, frame: FrameType | None) -> None:
        publisher.totals.interrupted = True
        publisher.stop()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
