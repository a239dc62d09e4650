"""What ``octick run`` tells its operator on stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from engine.account import Totals
    from engine.daemon import Daemon


class Reporter:
    """Notices while the daemon runs, and the totals at the end; stdout is left alone."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)

    def notice(self, line: str) -> None:
        """One line for the operator."""
        self._console.print(line, markup=False)

    def ready(self, daemon: Daemon) -> None:
        """Say that events are being taken, from whom, and where signals go."""
        totals = daemon.totals()
        names = ", ".join(".".join(name) for name in daemon.pipeline.names)
        self.notice(
            f"READY: {names}; signals on {daemon.publisher.endpoint}; "
            f"model {daemon.bundle.name} {totals.model_hash}; tape {totals.tape or 'none'}"
        )

    def totals(self, totals: Totals) -> None:
        """The session in a few lines."""
        self.notice(
            f"{totals.seconds:.1f} s: {totals.messages:,} messages, {totals.signals:,} signals, "
            f"{totals.tradable:,} tradable; lost {totals.lost}, gaps {totals.gaps}, "
            f"rejected {totals.rejected}"
        )
        self.notice(
            f"received to sent: p50 {totals.latency_p50_us:.1f} µs, "
            f"p99 {totals.latency_p99_us:.1f} µs, max {totals.latency_max_us:.1f} µs; "
            f"longest lag {totals.lag_max_ms:.1f} ms"
        )
        if totals.conflations:
            self.notice(f"conflated {totals.conflations:,} times: messages came too fast")
        if totals.shadow_answers or totals.transitions or totals.swaps:
            self.notice(
                f"{totals.mode}: {totals.transitions:,} moves, {totals.swaps:,} swaps; shadow: "
                f"{totals.shadow_answers:,} answers, {totals.disagreements:,} of another class"
            )
        if totals.tape:
            self.notice(f"tape: {totals.tape}, {totals.tape_records:,} records")
