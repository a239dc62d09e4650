"""The HTML of a report (`models.report.html`): escaping, figures as text, tables, the page.

Everything that reaches the page goes through `escaped`; only `Markup` is taken as it is.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NewType, TypeGuard

Markup = NewType("Markup", str)  # HTML that is safe to put into a page
NOTHING: Final = "–"
FAILS: Final = "FAILS"
LABEL_LETTERS: Final = 26
MAX_LISTED: Final = 8
PERCENT_PLACES: Final = 2
MAX_PERCENT_PLACES: Final = 6

# role → colour on light and on dark paper. INT8 and FP32 differ for every kind of colour vision
# (Okabe and Ito 2008, "Color Universal Design").
PALETTE: Final[Mapping[str, tuple[str, str]]] = {
    "ink": ("#1b1f24", "#e6e9ed"),
    "soft": ("#66707c", "#9aa4b0"),
    "rule": ("#d5dae0", "#3a424c"),
    "int8": ("#c4510a", "#ff9a4d"),
    "fp32": ("#0b67a8", "#62b2f0"),
    "past": ("#8d99a6", "#76828f"),
    "live": ("#0b8a63", "#3fd0a0"),
    "bad": ("#b3261e", "#ff8a80"),
}
_UNPRINTABLE: Final = re.compile(r"[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufdcf\ufdf0-\ufffd]")

_STYLE: Final = """
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem 1.25rem 4rem;max-width:62rem;background:var(--paper);
color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.6rem;line-height:1.2;margin:0 0 .2rem;overflow-wrap:anywhere}
h2{font-size:1.12rem;margin:2.4rem 0 .6rem;padding-top:.7rem;border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:1.2rem 0 .3rem}
p,ul{margin:.4rem 0;max-width:48rem}
ul{padding-left:1.2rem}
.soft,figcaption,.left-out{color:var(--soft);font-size:.9rem}
.left-out{border-left:3px solid var(--rule);padding:.15rem .7rem}
code{font:.86em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.verdict{font-size:1.05rem;font-weight:600;margin:.9rem 0 .3rem}
.good{color:var(--live)}.bad{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.2rem,1fr));gap:.6rem;
margin:1rem 0}
.tiles div{background:var(--panel);border-radius:6px;padding:.55rem .7rem}
.tiles b{display:block;font-size:1.2rem;font-variant-numeric:tabular-nums}
.tiles span{color:var(--soft);font-size:.82rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:.22rem .9rem .22rem 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--rule)}
th{color:var(--soft);font-weight:600}
thead th{white-space:nowrap}
.n{text-align:right;white-space:nowrap}
td.wrap{overflow-wrap:anywhere;min-width:14rem}
details{margin:.7rem 0}
details summary{cursor:pointer;color:var(--soft)}
figure{margin:.8rem 0}
svg{display:block;width:100%;min-width:38rem;height:auto;color:var(--ink)}
svg *{stroke-linejoin:round}
svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif!important}
@media print{body{max-width:none}h2{break-after:avoid}figure,tr{break-inside:avoid}}
"""
_PAPER: Final = (
    "--paper: #ffffff; --panel: #f3f5f8;",
    "--paper: #14181d; --panel: #1e242b;",
)


def variables(dark: bool) -> str:
    """The palette as CSS declarations."""
    return " ".join(f"--{role}: {pair[dark]};" for role, pair in PALETTE.items())


def printable(text: object) -> str:
    """Text without characters that HTML and XML cannot hold."""
    return _UNPRINTABLE.sub("\ufffd", str(text))


def shortened(text: object, letters: int = LABEL_LETTERS) -> str:
    """A label on one line; the middle of a long one goes, for ends tell more."""
    line = " ".join(printable(text).split())
    if len(line) <= letters:
        return line
    head = (letters - 1) // 2
    return line[:head] + "…" + line[len(line) - (letters - 1 - head) :]


def escaped(text: object) -> Markup:
    """Text as HTML, quotation marks included."""
    return Markup(html.escape(printable(text)))


def code(text: object) -> Markup:
    """Text in the typewriter face."""
    return Markup(f"<code>{escaped(text)}</code>")


def joined(parts: Iterable[Markup]) -> Markup:
    """One after the other."""
    return Markup("".join(parts))


def table(head: Sequence[str], rows: Iterable[Sequence[object]], kinds: str) -> Markup:
    """A table of plain text.

    Parameters
    ----------
    head : sequence of str
    rows : iterable of sequence
        Cells; each is escaped.
    kinds : str
        A letter a column: ``l`` text, ``n`` a figure, ``w`` long text that may be broken, ``c``
        code, ``s`` a state, marked where it is `FAILS`.
    """
    classes = {"l": "", "n": "n", "w": "wrap", "c": "wrap", "s": ""}
    top = joined(
        Markup(
            f'<th class="n">{escaped(text)}</th>' if kind == "n" else f"<th>{escaped(text)}</th>"
        )
        for text, kind in zip(head, kinds, strict=True)
    )
    body = joined(
        Markup(
            "<tr>"
            + joined(
                Markup(
                    f'<td class="{"bad" if (kind, text) == ("s", FAILS) else classes[kind]}">'
                    f"{code(text) if kind == 'c' else escaped(text)}</td>"
                )
                for text, kind in zip(row, kinds, strict=True)
            )
            + "</tr>\n"
        )
        for row in rows
    )
    start = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    return Markup(f'<div class="wide"><table>{start}<tbody>\n{body}</tbody></table></div>\n')


def paragraph(text: object, kind: str = "") -> Markup:
    """A paragraph of plain text."""
    return Markup(
        f'<p class="{kind}">{escaped(text)}</p>\n' if kind else f"<p>{escaped(text)}</p>\n"
    )


def bullets(texts: Iterable[object]) -> Markup:
    """A list of plain sentences."""
    return Markup(
        "<ul>" + joined(Markup(f"<li>{escaped(text)}</li>\n") for text in texts) + "</ul>"
    )


def tiles(items: Iterable[tuple[str, str]]) -> Markup:
    """Figures that are seen first: (figure, what it is)."""
    inner = joined(
        Markup(f"<div><b>{escaped(figure)}</b><span>{escaped(label)}</span></div>\n")
        for figure, label in items
    )
    return Markup(f'<div class="tiles">{inner}</div>\n')


def folded(summary: str, inner: Markup, *, is_open: bool) -> Markup:
    """What can be unfolded."""
    start = "<details open>" if is_open else "<details>"
    return Markup(f"{start}<summary>{escaped(summary)}</summary>\n{inner}</details>\n")


def drawing(svg: str, caption: str) -> Markup:
    """A plot of `models.report.plots` above its caption."""
    caption = escaped(caption)
    return Markup(
        f'<figure><div class="wide">{svg}</div><figcaption>{caption}</figcaption></figure>\n'
    )


def left_out(what: str, command: str) -> Markup:
    """The line that stands where a part is missing."""
    return Markup(f'<p class="left-out">{escaped(what)} {code(command)} makes this part.</p>\n')


def section(anchor: str, title: str, *parts: Markup) -> Markup:
    """A heading and what stands under it."""
    return Markup(f'<section id="{anchor}"><h2>{escaped(title)}</h2>\n{joined(parts)}</section>\n')


def page(title: str, body: Markup) -> bytes:
    """The whole file, UTF-8."""
    light, dark = (variables(is_dark) + " " + _PAPER[is_dark] for is_dark in (False, True))
    style = (
        f":root{{color-scheme: light dark; {light}}}\n"
        f"@media (prefers-color-scheme: dark){{:root{{{dark}}}}}{_STYLE}"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{style}</style>\n</head>\n"
        f"<body>\n{body}</body>\n</html>\n"
    ).encode()


def is_figure(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def percent(share: Any, places: int = PERCENT_PLACES) -> str:
    """A share as per cent; what is below 1 never reads as 100 %."""
    if not is_figure(share):
        return NOTHING
    while f"{100.0 * share:.{places}f}".startswith("100") and share < 1.0:
        if places == MAX_PERCENT_PLACES:
            return "above 99.999999 %"
        places += 1
    return f"{100.0 * share:.{places}f} %"


def decimal(value: Any, places: int = 2) -> str:
    """A number with so many places and thousands apart; infinity as its sign."""
    if isinstance(value, float) and math.isinf(value):
        return "∞" if value > 0.0 else "−∞"
    return f"{value:,.{places}f}" if is_figure(value) else NOTHING


def whole(value: Any) -> str:
    """A count, thousands apart."""
    return decimal(value, 0)


def general(value: Any) -> str:
    """Any number in few digits."""
    if is_figure(value) and (abs(value) >= 1e15 or not float(value).is_integer()):
        return f"{value:.4g}"
    return whole(value)


def flattened(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested notes as (dotted key, text); long lists by their length and ends."""
    found: list[tuple[str, str]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found += flattened(value, f"{name}.")
        elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
            found += flattened({str(i): item for i, item in enumerate(value)}, f"{name}.")
        elif isinstance(value, (list, tuple)) and len(value) > MAX_LISTED:
            found.append((name, f"{len(value)} values, {value[0]} … {value[-1]}"))
        elif isinstance(value, (list, tuple)):
            found.append((name, ", ".join(str(item) for item in value) or NOTHING))
        else:
            found.append((name, NOTHING if value in (None, "", {}) else str(value)))
    return found
