"""Matplotlib figures as SVG that stands inside an HTML page: the same bytes for the same numbers.

Text stays text, and colours are CSS variables of the page (`models.report.page.PALETTE`): one plot
reads well on light and on dark paper. Nothing in the markup names anything outside of the page.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from models.report.page import PALETTE

WIDTH_INCHES: Final = 9.2

_ROLES: Final = tuple(PALETTE)
# Each role is drawn in a colour that nothing else has, which `_page_colours` turns into a variable.
DRAWN: Final = {role: f"#0000{number + 16:02x}" for number, role in enumerate(_ROLES)}
_DRAWN_COLOUR: Final = re.compile(r"#0000([0-9a-f]{2})\b")
_REFERENCE: Final = re.compile(r"url\(#([^)]+)\)")
_RC: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "octick",
    "text.parse_math": False,
    "font.size": 8.5,
    "axes.titlesize": 8.5,
    "axes.labelcolor": DRAWN["ink"],
    "axes.edgecolor": DRAWN["soft"],
    "axes.titlecolor": DRAWN["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.formatter.use_mathtext": False,
    "grid.color": DRAWN["rule"],
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "text.color": DRAWN["ink"],
    "xtick.color": DRAWN["soft"],
    "ytick.color": DRAWN["soft"],
    "xtick.labelcolor": DRAWN["ink"],
    "ytick.labelcolor": DRAWN["ink"],
}


def colour(precision: str) -> str:
    """What a precision is drawn in."""
    return DRAWN.get(precision.lower(), DRAWN["live"])


@contextmanager
def plot(height_inches: float) -> Iterator[Figure]:
    """A figure under settings that a user's own matplotlibrc has no part in."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_RC)
        figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure


def markup(figure: Figure, name: str, title: str) -> str:
    """The figure as an ``<svg>`` element; ids begin with ``name``, which a page has once."""
    file = io.BytesIO()
    nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with warnings.catch_warnings():
        # The page's fonts draw the text: those at hand here only measure it.
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    root = ElementTree.fromstring(file.getvalue())
    used = {
        target
        for element in root.iter()
        for key, value in element.items()
        for target in ([value[1:]] if key.endswith("href") else _REFERENCE.findall(value))
    }
    for parent in list(root.iter()):
        for child in [item for item in parent if item.tag.endswith("}style")]:
            parent.remove(child)  # it would hold for the whole page
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.items()}
        element.attrib.clear()
        for key, value in attributes.items():
            if key == "id":
                if value in used:
                    element.set("id", f"{name}-{value}")
            elif key == "href":
                element.set("href", f"#{name}-{value[1:]}")
            else:
                value = _REFERENCE.sub(rf"url(#{name}-\1)", value)
                element.set(key, _DRAWN_COLOUR.sub(_page_colour, value))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    heading = ElementTree.Element("title")
    heading.text = title
    root.insert(0, heading)
    return ElementTree.tostring(root, encoding="unicode")


def _page_colour(match: re.Match[str]) -> str:
    return f"var(--{_ROLES[int(match[1], 16) - 16]})"


def plain_ticks(values: Callable[[float], str]) -> FuncFormatter:
    """Labels of an axis, without the markup that matplotlib would put there."""
    return FuncFormatter(lambda value, _: values(value))
