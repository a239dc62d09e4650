"""What ``octick bench replay`` found, and its table."""

from __future__ import annotations

import statistics

import msgspec


class Runs(msgspec.Struct, frozen=True):
    """One measurement of ours: seconds of each run, and what one run did."""

    seconds: list[float]
    messages: int
    levels: int
    feature_vectors: int
    signals: int

    @property
    def median_s(self) -> float:
        """Median of the runs."""
        return statistics.median(self.seconds)


class RivalRuns(msgspec.Struct, frozen=True):
    """The same levels through another book: seconds of each run, and what it is."""

    seconds: list[float]
    levels: int
    levels_per_s: float
    library: str


class ReplayBench(msgspec.Struct, frozen=True):
    """Result of ``octick bench replay``.

    ``levels_per_s`` and ``messages_per_s`` are those of book and all features without inference,
    ``book_…`` those of the book alone, ``signals_per_s`` that of the whole way to the signal; all
    medians. A ratio is the median over rounds of ours over the rival's levels a second in the same
    round, so more than 1 means that ours is faster; None where the rival was left out, which
    ``left_out`` explains. ``hftbacktest`` runs exchange and local side, as its own converters flag
    their events, ``hftbacktest_local`` the local side alone. ``jitter_p99_us`` and
    ``jitter_max_us`` say how long the host took the core away in a loop that does nothing.
    """

    levels_per_s: float
    messages_per_s: float
    signals_per_s: float
    messages_per_s_with_inference: float
    book_levels_per_s: float
    book_messages_per_s: float
    book_over_hftbacktest: float | None
    features_over_hftbacktest: float | None
    book_over_hftbacktest_local: float | None
    features_over_hftbacktest_local: float | None
    book_over_dict: float | None
    tape: str
    source: str
    backend: str
    digest: str
    runs: int
    book: Runs
    features: Runs
    signals: Runs
    hftbacktest: RivalRuns | None
    hftbacktest_local: RivalRuns | None
    dict_book: RivalRuns | None
    left_out: dict[str, str]
    core: int | None
    jitter_p99_us: float
    jitter_max_us: float
    machine: dict[str, str | int]
    versions: dict[str, str]
    commit: str
    date: str


def show(result: ReplayBench) -> None:
    """Print the result as a table."""
    from rich.table import Table

    from feeds.output import wide_console

    table = Table(
        "measured", "median", "fastest", "slowest", title=f"octick bench replay, {result.runs} runs"
    )
    book, features, signals = result.book, result.features, result.signals
    rows: list[tuple[str, list[float], int, str]] = [
        ("book alone", book.seconds, book.levels, "levels/s"),
        ("book alone", book.seconds, book.messages, "messages/s"),
        ("book + all features", features.seconds, features.levels, "levels/s"),
        ("book + all features", features.seconds, features.messages, "messages/s"),
        ("… to the signal", signals.seconds, signals.messages, "messages/s"),
        ("… to the signal", signals.seconds, signals.signals, "signals/s"),
    ]
    for label, rival in (
        ("exchange + local side", result.hftbacktest),
        ("local side alone", result.hftbacktest_local),
        ("", result.dict_book),
    ):
        if rival is not None:
            name = f"{rival.library}, {label}" if label else rival.library
            rows.append((name, rival.seconds, rival.levels, "levels/s"))
    for name, took, amount, unit in rows:
        rates = [amount / seconds for seconds in (statistics.median(took), min(took), max(took))]
        table.add_row(name, f"{rates[0]:,.0f} {unit}", *(f"{rate:,.0f}" for rate in rates[1:]))
    console = wide_console()
    console.print(table)
    for name, ratio in (
        ("book alone over hftbacktest", result.book_over_hftbacktest),
        ("book + all features over hftbacktest", result.features_over_hftbacktest),
        ("book alone over hftbacktest's local side", result.book_over_hftbacktest_local),
        (
            "book + all features over hftbacktest's local side",
            result.features_over_hftbacktest_local,
        ),
        ("book alone over the dict book", result.book_over_dict),
    ):
        if ratio is not None:
            console.print(f"{name}: {ratio:.2f}×")
    for name, why in result.left_out.items():
        console.print(f"[yellow]{name} left out:[/] {why}")
    console.print(
        f"{result.source}: {features.messages:,} messages, {features.levels:,} levels, "
        f"{features.feature_vectors:,} feature vectors, {result.signals.signals:,} signals "
        f"({result.backend})"
    )
    console.print(
        f"host jitter: p99 {result.jitter_p99_us:.1f} µs, max {result.jitter_max_us:.1f} µs; "
        f"{result.machine['cpu']}, core {result.core}; "
        + ", ".join(f"{name} {number}" for name, number in result.versions.items())
    )
    console.print(f"commit {result.commit or 'none'}, {result.date}, digest {result.digest}")
