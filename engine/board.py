"""A live table of signals: one row an instrument, for a person at a terminal."""

from __future__ import annotations

import time
from collections import deque
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from engine.client import SignalClient
from engine.messages import Alert, EngineState, Message, Signal

RATE_WINDOW_S: Final = 5.0
MAX_RATE_MARKS: Final = 64  # arrival marks kept for each instrument's rate
MAX_ROWS: Final = 64
MAX_ALERTS: Final = 3
MAX_OUTPUTS: Final = 5


class SignalBoard:
    """Keeps the last signal of each instrument, and renders them."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], _Row] = {}
        self._state: EngineState | None = None
        self._alerts: deque[Alert] = deque(maxlen=MAX_ALERTS)

    def update(self, message: Message) -> None:
        """Take over one message of a `SignalClient`."""
        if isinstance(message, Signal):
            key = message.venue, message.symbol
            row = self._rows.get(key)
            if row is None:
                row = self._rows[key] = _Row()
            row.add(message)
        elif isinstance(message, EngineState):
            self._state = message
        else:
            self._alerts.append(message)

    def render(self, client: SignalClient) -> RenderableType:
        """The table as it stands, with the client's totals and the engine's state below it."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title, justify in (
            ("instrument", "left"),
            ("signal", "right"),
            ("class", "right"),
            ("outputs", "left"),
            ("trust", "left"),
            ("lost", "right"),
            ("per s", "right"),
        ):
            table.add_column(title, justify=justify)  # type: ignore[arg-type]
        losses = client.losses()
        now = time.monotonic()
        for key in sorted(self._rows)[:MAX_ROWS]:
            row = self._rows[key]
            signal = row.signal
            assert signal is not None
            lost = losses.get(key, 0)
            table.add_row(
                f"{signal.venue} {signal.symbol}",
                f"{signal.signal_seq:,}",
                "-" if signal.predicted_class is None else str(signal.predicted_class),
                outputs_text(signal),
                trust_text(signal),
                Text(f"{lost:,}", style="bold red" if lost else ""),
                f"{row.rate(now):,.0f}",
            )
        lines: list[RenderableType] = [table]
        if len(self._rows) > MAX_ROWS:
            lines.append(Text(f"... and {len(self._rows) - MAX_ROWS} more instruments"))
        lines.append(Text(totals_text(client), style="dim"))
        if self._state is not None:
            lines.append(Text(state_text(self._state), style="dim"))
        lines.extend(Text(alert_text(alert), style="yellow") for alert in self._alerts)
        return Group(*lines)


class _Row:
    __slots__ = ("marks", "seen", "signal")

    def __init__(self) -> None:
        self.signal: Signal | None = None
        self.seen = 0
        self.marks: deque[tuple[float, int]] = deque(maxlen=MAX_RATE_MARKS)

    def add(self, signal: Signal) -> None:
        self.signal = signal
        self.seen += 1
        now = time.monotonic()
        if not self.marks or now - self.marks[-1][0] > RATE_WINDOW_S / MAX_RATE_MARKS:
            self.marks.append((now, self.seen))

    def rate(self, now: float) -> float:
        """Signals a second over the last `RATE_WINDOW_S`."""
        while len(self.marks) > 1 and now - self.marks[0][0] > RATE_WINDOW_S:
            self.marks.popleft()
        since, before = self.marks[0]
        return (self.seen - before) / max(now - since, 1e-3)


def outputs_text(signal: Signal) -> str:
    """The first outputs, short."""
    if not signal.tradable:
        return "-"
    shown = " ".join(f"{value:+.3f}" for value in signal.outputs[:MAX_OUTPUTS].tolist())
    return shown + (" ..." if len(signal.outputs) > MAX_OUTPUTS else "")


def trust_text(signal: Signal) -> Text:
    """Why a signal cannot be traded on, or what answered if it can."""
    if signal.conflict:
        return Text(f"two engines: {signal.conflict_why}", style="bold red")
    if signal.tradable:
        return Text(f"{signal.precision} {signal.backend}", style="green")
    return Text(" ".join(signal.reasons), style="red")


def totals_text(client: SignalClient) -> str:
    """A client's counters in a line; those that should be 0 only where they are not."""
    parts = [f"{client.received:,} received", f"{client.lost:,} lost"]
    for count, name in (
        (client.duplicates, "seen before"),
        (client.malformed, "malformed"),
        (client.restarts, "engine restarts"),
        (client.conflicts, "conflicts of two engines"),
        (client.refused, "refused of another engine"),
        (client.untracked, "untracked"),
    ):
        if count:
            parts.append(f"{count:,} {name}")
    return ", ".join(parts)


def state_text(state: EngineState) -> str:
    """An engine's state in a line."""
    return (
        f"engine: {state.messages:,} messages, {state.signals:,} signals "
        f"({state.tradable:,} tradable), {state.synced} of {state.instruments} synced, "
        f"{state.gaps:,} gaps, {state.lost:,} lost, "
        f"p50 {state.latency_p50_ns / 1e3:,.1f} µs, p99 {state.latency_p99_ns / 1e3:,.1f} µs"
    )


def alert_text(alert: Alert) -> str:
    """An alert in a line."""
    where = f"{alert.venue} {alert.symbol}".strip()
    return f"{alert.severity}: {where + ': ' if where else ''}{alert.text}"


def line_text(message: Message) -> str:
    """Any message in a line, for output that is no terminal."""
    if isinstance(message, EngineState):
        return state_text(message)
    if isinstance(message, Alert):
        return alert_text(message)
    shown = "-" if message.predicted_class is None else str(message.predicted_class)
    lost = f"  lost {message.lost_before} before" if message.lost_before else ""
    return (
        f"{message.venue} {message.symbol} {message.signal_seq}  class {shown}  "
        f"{outputs_text(message)}  {trust_text(message)}{lost}"
    )
