"""A signal's story as tables, for a person at a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable
from decimal import Decimal
from typing import Any, Final

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from replay.story import Input, Story

INPUT_COLUMNS: Final = 52  # that one block of the inputs needs
MAX_INPUT_BLOCKS: Final = 3
_WRONG: Final = {"not finite", "beyond its bound"}
_STYLES: Final = {"passed": "green", "failed": "bold red", "off": "dim", "not reached": "dim"}
_PLAIN_FIELDS: Final = frozenset({"message", "outputs", "reasons", "value_check_names"})


def show(story: Story, console: Console) -> None:
    """Print a story."""
    signal = story.signal
    verdict = "tradable" if signal["tradable"] else "suppressed: " + " ".join(signal["reasons"])
    style = "bold green" if signal["tradable"] else "bold red"
    console.print(Text.assemble((story.id, "bold"), "  ", (verdict, style)))
    for title, part in (
        ("signal", _pairs(_signal(story))),
        ("rules", _rules(story)),
        ("inputs", _inputs(story.inputs, console.width)),
        ("book", _book(story)),
        ("messages", _pairs(_messages(story))),
        ("times", _pairs(_times(story))),
        ("model", _pairs(_model(story))),
        ("config", _pairs(_config(story))),
        ("engine", _pairs(_engine(story))),
        ("moves before", _rows(story.moves, ("at_ns", "from", "to", "rule", "detail", "by"))),
        ("moves it led to", _rows(story.caused, ("at_ns", "from", "to", "rule", "detail", "by"))),
        ("events before", _rows(story.events, ("at_ns", "event", "by", "text"))),
    ):
        if part is not None:
            console.print(Text(f"\n{title}", style="bold underline"))
            console.print(part)


def _pairs(pairs: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in pairs:
        table.add_row(Text(name, style="bold"), Text(value))
    return table


def _rows(found: list[dict[str, Any]], names: tuple[str, ...]) -> Table | None:
    if not found:
        return None
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in names:
        table.add_column("time" if name == "at_ns" else name)
    for row in found:
        cells = (_time(row[name]) if name == "at_ns" else str(row[name]) for name in names)
        table.add_row(*(escape(cell) for cell in cells))
    return table


def _time(at_ns: int) -> str:
    """UTC with all nine digits of the second."""
    seconds, ns = divmod(at_ns, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(seconds))}.{ns:09d}"


def _signal(story: Story) -> Iterable[tuple[str, str]]:
    signal, recorded = story.signal, story.recorded
    for name, value in signal.items():
        if name not in _PLAIN_FIELDS and not name.endswith("_ns"):
            yield name, "-" if value is None else str(value)
    yield "reasons", " ".join(signal["reasons"]) or "none"
    yield "value check", "; ".join(signal["value_check_names"]) or "clean"
    yield "outputs", _numbers(signal["outputs"])
    if story.scores is not None:
        scores = story.scores.items()
        yield "the model said", "  ".join(f"{name} {score:+.6g}" for name, score in scores)
    said = story.shadow_answer
    if said is not None:
        yield "the shadow said", f"fp32 {_numbers(said['fp32'])}, int8 {_numbers(said['int8'])}"
    if not recorded["found"]:
        yield "recorded", "not on the tape"
    elif recorded["equal"]:
        yield "recorded", "the same bytes"
    else:
        yield "recorded", "other bytes"
        for pair in recorded["fields"]:
            yield f"  {pair['field']}", f"{pair['recorded']} recorded, {pair['replayed']} replayed"


def _numbers(values: list[float | None]) -> str:
    return " ".join("none" if value is None else f"{value:+.6g}" for value in values)


def _rules(story: Story) -> Table:
    table = Table.grid(padding=(0, 2))
    for rule in story.rules:
        table.add_row(
            Text(rule.name), Text(rule.outcome, style=_STYLES[rule.outcome]), Text(rule.saw)
        )
    return table


def _inputs(inputs: list[Input], width: int) -> RenderableType:
    """All inputs in blocks side by side, as many as the width takes."""
    if not inputs:
        return Text("none: suppressed before any feature was computed", style="dim")
    blocks = max(1, min(MAX_INPUT_BLOCKS, width // INPUT_COLUMNS))
    height = -(-len(inputs) // blocks)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for _ in range(blocks):
        table.add_column("feature")
        table.add_column("raw", justify="right")
        table.add_column("input", justify="right")
    for row in range(height):
        cells: list[Text] = []
        for item in inputs[row::height]:
            style = "bold red" if _WRONG & set(item.marks) else "yellow" if item.marks else ""
            sign = "*" if "most extreme" in item.marks else ""
            cells += (
                Text(item.name, style=style),
                Text(f"{item.raw:.6g}", style=style),
                Text(f"{sign}{item.model_input:+.4f}", style=style),
            )
        table.add_row(*cells)
    marked = [
        f"{item.name}: {', '.join(item.marks)} (normalised {item.normalised:+.6g})"
        for item in inputs
        if item.marks
    ]
    return Group(table, Text("\n".join(marked), style="yellow"))


def _book(story: Story) -> RenderableType:
    book = story.book
    tick, lot = (Decimal(book[name]) if book[name] else Decimal(1) for name in ("tick", "lot"))
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("lots", "bid", "ask", "lots"):
        table.add_column(title, justify="right")
    bids, asks = book["bids"], book["asks"]
    for i in range(max(len(bids), len(asks))):
        cells = []
        for side, order in ((bids, (1, 0)), (asks, (0, 1))):
            level = side[i] if i < len(side) else None
            for place in order:
                step = tick if place == 0 else lot
                cells.append("" if level is None else f"{level[place] * step}")
        table.add_row(*cells)
    below = (
        f"{book['state']}, {book['bid_levels']:,} bid and {book['ask_levels']:,} ask levels, "
        f"tick {book['tick'] or 'unknown'}, lot {book['lot'] or 'unknown'}"
    )
    return Group(table, Text(below, style="dim"))


def _messages(story: Story) -> Iterable[tuple[str, str]]:
    found = story.messages
    yield "sequence", f"{found['first_seq']:,} to {found['last_seq']:,} of epoch {found['epoch']}"
    kinds = ", ".join(f"{count:,} {name}" for name, count in found["kinds"].items())
    yield "messages", kinds or "none on the tape"
    yield "last", _described(found["last"])
    same = found["made_due"] == found["last"]
    yield "made due by", "the same" if same else _described(found["made_due"])


def _described(message: dict[str, Any]) -> str:
    return "  ".join(f"{name} {value}" for name, value in message.items()) or "not on the tape"


def _times(story: Story) -> Iterable[tuple[str, str]]:
    times = story.times
    before = None
    for name in ("exchange", "source", "received", "emitted"):
        at_ns = times[f"{name}_ns"]
        if at_ns is None:
            yield name, "not recorded"
            continue
        after = "" if before is None else f"  {(at_ns - before) / 1e3:+,.3f} µs"
        yield name, _time(at_ns) + after
        before = at_ns


def _model(story: Story) -> Iterable[tuple[str, str]]:
    if story.model is None:
        return
    for name, value in story.model.items():
        if name == "value_check_layers":
            shown = ", ".join(f"bit {item['bit']} {item['layer']}" for item in value) or "none"
        else:
            shown = ", ".join(value) if isinstance(value, list) else value
        yield name.replace("_", " "), shown


def _config(story: Story) -> Iterable[tuple[str, str]]:
    config = story.config
    yield "hash", config["hash"]
    if config["used_is_recorded"] is None:
        yield "recorded", "none on the tape: this one was used"
    elif not config["used_is_recorded"]:
        yield "recorded", "another one: the tape was replayed with this one"
    for section, values in config["used"].items():
        if isinstance(values, list):
            yield section, f"{len(values):,}"
        else:
            yield section, "  ".join(f"{key} {value}" for key, value in values.items())


def _engine(story: Story) -> Iterable[tuple[str, str]]:
    engine = story.engine
    halted = f": {engine['halted_why']}" if engine["halted_why"] else ""
    yield "mode", f"{engine['mode']}{halted}"
    yield "answers", engine["answers"]
    yield "shadow", engine["shadow_state"]
    if engine["trust_events"] == "not followed":
        yield "trust events", "not followed: those of the tape belong to another model or config"
    else:
        yield "trust events", engine["trust_events"]
