"""Turns a matplotlib figure into an SVG that lives inside a page: themed by CSS, described, without outside links."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH_IN = 4.6
"""Figures are drawn at about the width of a phone, so that their text stays readable there; pages scale them up."""

# Stand-ins that no figure uses as real colours: the page's CSS variable of the same name takes their place.
INK, MUTED, RULE, PAPER = "#010203", "#010204", "#010205", "#010206"
MEDUSA, PLAIN, TRANSFORMERS, NGRAM = "#010207", "#010208", "#010209", "#01020a"
_VARIABLES = {
    INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper",
    MEDUSA: "medusa", PLAIN: "plain", TRANSFORMERS: "transformers", NGRAM: "ngram",
}  # fmt: skip
_STYLE = {
    "svg.fonttype": "none", "font.size": 8.5, "axes.labelsize": 8.5, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "axes.edgecolor": RULE, "axes.labelcolor": MUTED, "xtick.color": RULE, "ytick.color": RULE,
    "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED, "text.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "axes.spines.left": False, "axes.grid": True, "axes.grid.axis": "y",
    "grid.color": RULE, "grid.linewidth": 0.6, "axes.axisbelow": True, "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round", "xtick.major.size": 3, "ytick.major.size": 0, "axes.linewidth": 0.8,
    "legend.frameon": False, "legend.fontsize": 8, "legend.labelcolor": INK, "figure.constrained_layout.use": True,
}  # fmt: skip


@contextmanager
def drawing(height_in: float) -> Iterator[tuple[Figure, Axes]]:
    """An empty figure and its axes in the house style, `height_in` inches high; draw and call `embed` inside."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH_IN, height_in), facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        yield figure, axes


def embed(figure: Figure, name: str, title: str, description: str) -> str:
    """The figure as an `<svg>` element.

    Args: name: unique on the page, [a-z-]; prefixes every id. title, description: what a screen reader says.
    Invariant: no declaration, no metadata, no link; colours and font come from CSS variables of the page.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True,
                       metadata={"Date": None, "Creator": None, "Format": None, "Type": None})  # fmt: skip
    body = buffer.getvalue()
    body = body[body.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.S)
    for color, variable in _VARIABLES.items():
        body = body.replace(color, f"var(--{variable})")
    body = re.sub(r"font: ((?:bold )?[\d.]+px) [^;\"]+", r"font: \1 var(--sans)", body)
    body = re.sub(r"font-family: [^;\"]+", "font-family: var(--sans)", body)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = body.replace('xlink:href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    view = re.search(r'viewBox="[^"]+"', body)
    assert view is not None, "matplotlib writes a viewBox"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {view.group()} role="img" '
        f'aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
    )
    return head + body[body.index(">") + 1 :].strip()
