"""Charts as inline SVG, with the colours and the font of the page around them.

A chart is half as wide as a plot on disk, so that 10-point type is readable on a phone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sitkit.evaluation import plots
from sitkit.evaluation.plots import COLOURS, GREY, INK, PAPER, Curve, as_array
from sitkit.results.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sitkit.evaluation.plots import Numbers

FIGURE_SIZE = (5.2, 3.5)
MAX_POINTS = 300


def line_chart(
    series: Sequence[Curve],
    *,
    label: str,
    xlabel: str,
    ylabel: str,
    logx: bool = False,
    logy: bool = False,
    clipped: bool = False,
) -> str:
    """Return curves against x as inline SVG.

    Args:
        series: the curves.
        label: text alternative for screen readers.
        xlabel, ylabel: labels of the axes.
        logx, logy: whether an axis is logarithmic.
        clipped: whether values that diverge at an end leave the view.
    """
    figure, (ax,) = plots.canvas(1, FIGURE_SIZE)
    plots.draw_curves(ax, [thinned(curve) for curve in series], logx=logx, logy=logy)
    if clipped:
        ax.set_ylim(*plots.limits(series))
    plots.label_axes(ax, xlabel, ylabel)
    if len(series) > 1:
        _legend(figure, [curve.label for curve in series])
    return inline(figure, label)


def interval_chart(estimates: Sequence[Estimate], *, label: str, xlabel: str) -> str:
    """Return a dot with its standard error for each estimate, by row and column, as inline SVG."""
    rows = list(dict.fromkeys(estimate.row for estimate in estimates))
    columns = list(dict.fromkeys(estimate.column for estimate in estimates))
    height = 1.1 + 0.16 * len(rows) * (len(columns) + 1)
    figure, (ax,) = plots.canvas(1, (FIGURE_SIZE[0], max(height, 2.0)))
    for i, name in enumerate(columns):
        column = [estimate for estimate in estimates if estimate.column == name]
        values, errors = [e.mean for e in column], [e.stderr or 0.0 for e in column]
        heights = [rows.index(e.row) + (i - (len(columns) - 1) / 2) / (len(columns) + 1) for e in column]
        style: dict[str, Any] = {"fmt": "osD^v*P"[i % 7], "color": COLOURS[i % len(COLOURS)], "markersize": 4.5}
        ax.errorbar(values, heights, xerr=errors, label=name, elinewidth=1.2, capsize=2.5, **style)
    ax.set_yticks(range(len(rows)), [_short(row) for row in rows], parse_math=False)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    for edge in range(1, len(rows)):
        ax.axhline(edge - 0.5, color=GREY, linewidth=0.4)
    plots.label_axes(ax, xlabel, "")
    if len(columns) > 1:
        _legend(figure, columns)
    return inline(figure, label)


def _short(text: str, most: int = 26) -> str:
    return text if len(text) <= most else text[: most - 1] + "\u2026"


def _legend(figure: Figure, names: Sequence[str]) -> None:
    columns = min(len(names), 4, max(1, 66 // (max(map(len, names)) + 8)))
    style: dict[str, Any] = {"fontsize": 9, "frameon": False, "labelcolor": INK, "handlelength": 2.4}
    figure.legend(loc="outside lower center", ncols=columns, **style)


def thinned(curve: Curve) -> Curve:
    """Return a curve of at most `MAX_POINTS` points, each the mean of its neighbours."""
    import numpy as np

    if len(curve.x) <= MAX_POINTS:
        return curve

    def means(column: Numbers) -> np.ndarray:
        return np.array([part.mean() for part in np.array_split(as_array(column), MAX_POINTS)])

    stderr = None if curve.stderr is None else means(curve.stderr)
    return Curve(curve.label, means(curve.x), means(curve.values), stderr)


# The page's variable for each of matplotlib's colours: every colour has a light and a dark shade.
PAGE: Mapping[str, str] = {
    INK.lower(): "currentColor",
    GREY.lower(): "var(--line)",
    PAPER.lower(): "none",
    **{colour.lower(): f"var(--c{i})" for i, colour in enumerate(COLOURS)},
}


def inline(figure: Figure, label: str) -> str:
    """Return a figure as an <svg> element within HTML; `label` is the text for screen readers."""
    from html import escape

    text = plots.vector(figure)
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", text)
    text = re.sub(r"#[0-9a-fA-F]{6}\b", lambda m: PAGE.get(m[0].lower(), m[0]), text)
    head = rf'<svg viewBox="\1" role="img" aria-label="{escape(label)}">'
    return re.sub(r"<svg[^>]*?viewBox=\"([^\"]+)\"[^>]*>", head, text).strip()
