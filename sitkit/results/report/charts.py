"""Charts for a page: inline SVG that takes its colours and its type from the page that it stands in.

Half as wide as the pictures on disk, so that 10-point type is still 10-point type on a phone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from sitkit.evaluation.plots import (
    COLOURS,
    GREY,
    INK,
    PAPER,
    Curve,
    as_array,
    canvas,
    draw_curves,
    label_axes,
    limits,
    plain_ticks,
    vector,
)

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

SIZE = (5.2, 3.5)
MOST_POINTS = 300


class Interval(NamedTuple):
    """A number of a row and a series, with its standard error if there is one."""

    row: str
    series: str
    value: float
    stderr: float | None = None


def lines(
    series: Sequence[Curve], *, label: str, xlabel: str, ylabel: str, logx: bool = False, logy: bool = False,
    clipped: bool = False,
) -> str:  # fmt: skip
    """Curves against x as inline SVG.  label: what the chart shows, for who cannot see it.

    clipped: values that diverge at an end leave the view there.
    """
    figure, (ax,) = canvas(1, SIZE)
    draw_curves(ax, [thinned(curve) for curve in series])
    if logx:
        ax.set_xscale("log")
        plain_ticks(ax.xaxis)
    if logy:
        ax.set_yscale("log")
        plain_ticks(ax.yaxis)
    if clipped:
        ax.set_ylim(*limits(series))
    label_axes(ax, xlabel, ylabel)
    if len(series) > 1:
        _legend(figure, [curve.label for curve in series])
    return inline(figure, label)


def intervals(values: Sequence[Interval], *, label: str, xlabel: str) -> str:
    """A dot with its standard error for each number: rows down, the series of a row beside one another, as inline SVG."""
    rows = list(dict.fromkeys(value.row for value in values))
    names = list(dict.fromkeys(value.series for value in values))
    height = 1.1 + 0.16 * len(rows) * (len(names) + 1)
    figure, (ax,) = canvas(1, (SIZE[0], max(height, 2.0)))
    for i, name in enumerate(names):
        of_series = [value for value in values if value.series == name]
        places = [rows.index(value.row) + (i - (len(names) - 1) / 2) / (len(names) + 1) for value in of_series]
        ax.errorbar(
            [value.value for value in of_series], places, xerr=[value.stderr or 0.0 for value in of_series],
            label=name, fmt="osD^v*P"[i % 7], color=COLOURS[i % len(COLOURS)], markersize=4.5, elinewidth=1.2, capsize=2.5,
        )  # fmt: skip
    ax.set_yticks(range(len(rows)), [_short(row) for row in rows], parse_math=False)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    for edge in range(1, len(rows)):
        ax.axhline(edge - 0.5, color=GREY, linewidth=0.4)
    label_axes(ax, xlabel, "")
    if len(names) > 1:
        _legend(figure, names)
    return inline(figure, label)


def _short(text: str, most: int = 26) -> str:
    return text if len(text) <= most else text[: most - 1] + "\u2026"


def _legend(figure: Figure, names: Sequence[str]) -> None:
    columns = min(len(names), 4, max(1, 66 // (max(map(len, names)) + 8)))
    figure.legend(
        loc="outside lower center", ncols=columns, fontsize=9, frameon=False, labelcolor=INK, handlelength=2.4
    )


def thinned(curve: Curve) -> Curve:
    """A curve of at most `MOST_POINTS` points, each the mean of its neighbours."""
    import numpy as np

    x, values = as_array(curve.x), as_array(curve.values)
    if len(x) <= MOST_POINTS:
        return curve
    parts = np.array_split(np.arange(len(x)), MOST_POINTS)

    def mean(of: np.ndarray) -> np.ndarray:
        return np.array([of[part].mean() for part in parts])

    return Curve(curve.label, mean(x), mean(values), None if curve.stderr is None else mean(as_array(curve.stderr)))


# matplotlib's colours in the page's terms: ink and grid follow the page, each curve has a shade for light and for dark.
PAGE: Mapping[str, str] = {
    INK.lower(): "currentColor",
    GREY.lower(): "var(--line)",
    PAPER.lower(): "none",
    **{colour.lower(): f"var(--c{i})" for i, colour in enumerate(COLOURS)},
}


def inline(figure: Figure, label: str) -> str:
    """A figure as an <svg> element to stand within HTML, named for who cannot see it."""
    from html import escape

    text = vector(figure)
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", text)
    text = re.sub(r"#[0-9a-fA-F]{6}\b", lambda m: PAGE.get(m[0].lower(), m[0]), text)
    text = re.sub(
        r"<svg[^>]*?viewBox=\"([^\"]+)\"[^>]*>", rf'<svg viewBox="\1" role="img" aria-label="{escape(label)}">', text
    )
    return text.strip()
