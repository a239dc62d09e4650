"""Progress bars on a terminal's stderr, for jobs that last longer than two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

SHOWN_AFTER_S: Final = 2.0
REFRESH_S: Final = 0.1


@contextmanager
def progress(label: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Give a function that takes how many bytes are done; cheap to call often.

    Nothing is drawn where stderr is no terminal, nor in the first `SHOWN_AFTER_S`.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.progress import DownloadColumn, TransferSpeedColumn

    with _bar(DownloadColumn(), TransferSpeedColumn()) as show:
        yield lambda done: show(label, done, total_bytes)


@contextmanager
def stages() -> Iterator[Callable[[str, float], None]]:
    """Give a function that takes the stage a job is in and its share done, 0 to 1.

    Nothing is drawn where stderr is no terminal, nor in the first `SHOWN_AFTER_S`.
    """
    if not sys.stderr.isatty():
        yield lambda stage, share: None
        return
    from rich.progress import TaskProgressColumn

    with _bar(TaskProgressColumn()) as show:
        yield lambda stage, share: show(stage, share, 1.0)


@contextmanager
def _bar(*columns: ProgressColumn) -> Iterator[Callable[[str, float, float], None]]:
    """A bar that appears late and is drawn anew seldom: label, done, total."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task("", total=1.0)
    due = time.monotonic() + SHOWN_AFTER_S
    shown = False

    def show(label: str, done: float, total: float) -> None:
        nonlocal due, shown
        now = time.monotonic()
        if now < due:
            return
        due = now + REFRESH_S
        if not shown:
            bar.start()
            shown = True
        bar.update(task, description=label, completed=done, total=total)

    try:
        yield show
    finally:
        if shown:
            bar.stop()
