"""Plots, with matplotlib's object API (no pyplot state).

Files are written atomically. Every plot is 8 inches wide, so that 10-point type is readable at 800 pixels. The colours
are those of Okabe and Ito (2008), which colour-blind readers can distinguish.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sitkit.runtime.files import replacing

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from torch import Tensor

    from sitkit.transport.interpolant import Interpolant

    Numbers = Sequence[float] | np.ndarray | Tensor
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
GREY, INK, PAPER = "#9A9A9A", "#303030", "#FFFFFF"
DPI = 160
MAX_PATHS = 48


class Curve(NamedTuple):
    """A named line of values against x, with optional standard errors. NaN and infinity are gaps."""

    label: str
    x: Numbers
    values: Numbers
    stderr: Numbers | None = None


def scatter(
    samples: Tensor, reference: Tensor | None, path: Path | str, trajectories: Tensor | None = None, title: str = ""
) -> None:
    """Plot samples (n, 2) over reference points (m, 2), and beside them trajectories (times, n, 2) of some samples.

    The view contains the reference and 98% of the samples; the title has the number of samples outside the view.
    """
    import numpy as np

    points = as_array(samples)
    truth = points if reference is None else as_array(reference)
    views = [window(truth, points)]
    shown = None
    if trajectories is not None:
        paths = as_array(trajectories)
        shown = paths[:, np.linspace(0, paths.shape[1] - 1, min(MAX_PATHS, paths.shape[1])).round().astype(int)]
        views = [square(view) for view in (window(np.concatenate([truth, shown[0]]), shown[-1]), *views)]
    width = 8 / len(views)
    shape = max(float(np.divide(*(high - low)[::-1])) for low, high in views)
    figure, axes = canvas(len(views), (8, min(max(width * shape, 2.5), 8) + 1.1))

    low, high = views[-1]
    outside = int((~((points >= low) & (points <= high)).all(1)).sum())
    if reference is not None:
        dots(axes[-1], truth, GREY, f"data ({len(truth)})")
    dots(axes[-1], points, COLOURS[0], f"samples ({len(points)})")
    heading(axes[-1], f"{outside} of {len(points)} samples outside the view" if outside else "samples")

    if shown is not None:
        ax = axes[0]
        dots(ax, truth, GREY)
        ax.plot(shown[..., 0], shown[..., 1], color=COLOURS[5], linewidth=0.7, alpha=0.8)
        ax.plot(*shown[0].T, "o", color=COLOURS[1], markersize=3.5, label="noise, t = 0")
        ax.plot(*shown[-1].T, "o", color=COLOURS[0], markersize=3.5, label="their samples, t = 1")
        heading(ax, f"{shown.shape[1]} paths")

    for ax, (low, high) in zip(axes, views, strict=True):
        ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
        label_axes(ax, "x1 (data units)", "x2 (data units)")
    figure.legend(loc="outside lower center", ncols=4, fontsize=10, markerscale=2, frameon=False)
    figure.suptitle(title, fontsize=12, color=INK, parse_math=False)
    save(figure, path)


def interpolant(component: Interpolant, path: Path | str, w: Sequence[Curve] = ()) -> None:
    """Plot alpha and sigma, their rates, and optionally curves of diffusion coefficients w, against t.

    Values that diverge at an end leave the view, so that the other values stay visible.
    """
    import torch

    coefficients, rates = path_curves(component, torch.linspace(0, 1, 401, dtype=torch.float64))
    panels = [("coefficients", "", coefficients), ("rates", "per unit time", rates)]
    if w:
        panels.append(("diffusion coefficients w(t)", "w (variance per unit time)", list(w)))
    figure, axes = canvas(len(panels), (8, 2.9 * len(panels)), stacked=True)
    for ax, (name, unit, series) in zip(axes, panels, strict=True):
        draw_curves(ax, series)
        ax.set_xlim(0, 1)
        ax.set_ylim(*limits(series))
        heading(ax, name)
        label_axes(ax, "t (0 noise, 1 data)" if ax is axes[-1] else "", unit)
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=10, frameon=False)
    figure.suptitle(component.name, fontsize=12, color=INK, parse_math=False)
    save(figure, path)


def path_curves(component: Interpolant, t: Tensor) -> tuple[list[Curve], list[Curve]]:
    """Return alpha and sigma of an interpolant at the times t (n,), and their rates."""
    c = component.coefficients(t)
    rates = [Curve("d alpha / dt", t, c.d_alpha), Curve("d sigma / dt", t, c.d_sigma)]
    return [Curve("alpha", t, c.alpha), Curve("sigma", t, c.sigma)], rates


def curves(
    series: Sequence[Curve],
    path: Path | str,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    logx: bool = False,
    logy: bool = False,
    reach: float | None = None,
) -> None:
    """Plot curves with their standard errors: losses, w(t), a metric against NFE. Short curves show their points.

    Args:
        series: the curves, at least one.
        path: the file of the plot.
        title, xlabel, ylabel: its texts.
        logx, logy: whether an axis is logarithmic.
        reach: the view ends at this multiple of the largest 90% quantile of the curves; None: no limit.
    """
    import numpy as np

    if not series:
        raise ValueError("curves needs at least one curve; got none.")
    figure, (ax,) = canvas(1, (8, 5))
    draw_curves(ax, series, logx=logx, logy=logy)
    if reach is not None:
        top = reach * max(float(np.nanquantile(finite(curve.values), 0.9)) for curve in series)
        if 0 < top < ax.get_ylim()[1]:
            ax.set_ylim(-0.04 * top, top)
    heading(ax, title)
    label_axes(ax, xlabel, ylabel)
    if len(series) > 1 or series[0].label:
        ax.legend(fontsize=10, framealpha=0.9, edgecolor="none")
    save(figure, path)


def heatmap(
    values: Numbers | Sequence[Sequence[float | None]],
    row_names: Sequence[str],
    column_names: Sequence[str],
    path: Path | str,
    title: str = "",
    unit: str = "",
) -> None:
    """Plot a coloured table (rows, columns) with numbers; NaN is a dash on grey, None (no such cell) is empty."""
    import numpy as np
    from matplotlib import colormaps

    table = as_array(values)
    rows: Any = values
    absent = [[value is None for value in row] for row in rows]
    if table.shape != (len(row_names), len(column_names)):
        raise ValueError(f"heatmap has {len(row_names)} x {len(column_names)} names for values of shape {table.shape}.")
    figure, (ax,) = canvas(1, (8, 1.8 + 0.42 * len(row_names)))
    image = ax.imshow(np.ma.masked_invalid(table), cmap=colormaps["cividis"], aspect="auto")
    known_values = table[np.isfinite(table)]
    middle = (known_values.min() + known_values.max()) / 2 if known_values.size else 0.0
    few = len(column_names) <= 8
    for (row, column), value in np.ndenumerate(table):
        if absent[row][column]:
            continue
        known = bool(np.isfinite(value))
        if not known:
            ax.fill_between((column - 0.5, column + 0.5), row - 0.5, row + 0.5, color="#E4E4E4", linewidth=0)
        short = f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"
        text = "-" if not known else f"{value:.3g}" if few else short
        colour = PAPER if known and value <= middle else INK
        ax.text(column, row, text, ha="center", va="center", fontsize=10 if few else 8, color=colour)
    slanted: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
    ax.set_xticks(range(len(column_names)), column_names, parse_math=False, **slanted)
    ax.set_yticks(range(len(row_names)), row_names, parse_math=False)
    ax.tick_params(length=0, labelsize=10, labelcolor=INK)
    ax.spines[:].set_visible(False)
    heading(ax, title)
    bar = figure.colorbar(image, ax=ax, fraction=0.04, pad=0.02)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.set_label(unit, fontsize=10, color=INK, parse_math=False)
    save(figure, path)


def canvas(panels: int, size: tuple[float, float], *, stacked: bool = False) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels, side by side or stacked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor=PAPER)
    rows, columns = (panels, 1) if stacked else (1, panels)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set(linewidth=0.6, color=GREY)
        ax.tick_params(width=0.6, labelsize=10, color=GREY, labelcolor=INK)
    return figure, axes


def draw_curves(ax: Axes, series: Sequence[Curve], *, logx: bool = False, logy: bool = False) -> None:
    """Draw curves that differ in colour and in dashes, so that equal curves are visible."""
    for i, curve in enumerate(series):
        x, y = as_array(curve.x), finite(curve.values)
        if x.shape != y.shape:
            raise ValueError(f"curve {curve.label!r} has {x.size} places for {y.size} values.")
        line: dict[str, Any] = {
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": DASHES[i % len(DASHES)],
            "marker": "o" if len(x) <= 32 else "",
            "markersize": 4,
            "linewidth": 1.6 if len(x) <= 1000 else 0.8,
        }
        if curve.stderr is None:
            ax.plot(x, y, label=curve.label, **line)
        else:
            ax.errorbar(x, y, as_array(curve.stderr), label=curve.label, capsize=3, elinewidth=1, **line)
    if logx:
        ax.set_xscale("log")
        plain_ticks(ax.xaxis)
    if logy:
        ax.set_yscale("log")
        plain_ticks(ax.yaxis)


def dots(ax: Axes, points: np.ndarray, colour: str, label: str | None = None) -> None:
    """Draw the points of a scatter plot."""
    ax.plot(*points.T, ".", color=colour, markersize=4, alpha=0.6, markeredgewidth=0, label=label)


def heading(ax: Axes, text: str) -> None:
    """Set the title of a panel."""
    ax.set_title(text, fontsize=11, color=INK, loc="left", parse_math=False)


def label_axes(ax: Axes, x: str, y: str) -> None:
    """Set the labels of the axes."""
    ax.set_xlabel(x, fontsize=10, color=INK, parse_math=False)
    ax.set_ylabel(y, fontsize=10, color=INK, parse_math=False)


def plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with 20 and 0.4, not 2 x 10^1 and 4e-01; a short axis also between powers of ten."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    axis.set_major_formatter(Plain())
    axis.set_minor_formatter(Plain(minor_thresholds=(2, 0.5)))
    axis.set_tick_params(which="minor", labelsize=9, labelcolor=INK, color=GREY)


def window(truth: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the corners of a view with the truth (m, 2) and all but the extreme 2% of the points (n, 2)."""
    import numpy as np

    inside = points[np.isfinite(points).all(1)]
    inner = np.quantile(inside, (0.01, 0.99), axis=0) if len(inside) else truth[:1].repeat(2, axis=0)
    low, high = np.minimum(truth.min(0), inner[0]), np.maximum(truth.max(0), inner[1])
    pad = 0.06 * np.maximum(high - low, 1e-6).max()
    return low - pad, high + pad


def square(view: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the view widened to a square about its centre, so that panels of different extent have one shape."""
    low, high = view
    centre, half = (low + high) / 2, (high - low).max() / 2
    return centre - half, centre + half


def limits(series: Sequence[Curve]) -> tuple[float, float]:
    """Return limits for y with the inner 96% of each curve, but at most twice the reach of the median curve.

    Values that diverge at an end, and a curve that does (w^KL), leave the view, so that the others stay visible.
    """
    import numpy as np

    ends = np.array([np.nanquantile(finite(curve.values), (0.02, 0.98)) for curve in series])
    reach = 2 * np.median(np.abs(ends).max(1)) or 1.0
    low, high = max(ends[:, 0].min(), -reach), min(ends[:, 1].max(), reach)
    pad = 0.08 * (high - low) or 0.5
    return float(low - pad), float(high + pad)


def finite(x: Any) -> np.ndarray:
    """Return numbers as float64, with NaN, which matplotlib leaves out, in place of infinity."""
    import numpy as np

    values = as_array(x)
    return np.where(np.isfinite(values), values, np.nan)


def as_array(x: Any) -> np.ndarray:
    """Return numbers or a tensor on any device as a float64 array."""
    import numpy as np

    return np.asarray(x.detach().cpu() if hasattr(x, "detach") else x, dtype=np.float64)


def save(figure: Figure, path: Path | str) -> None:
    """Write the figure as a PNG, atomically."""
    with replacing(Path(path)) as fresh:
        figure.savefig(fresh, format="png")


def vector(figure: Figure) -> str:
    """Return the figure as SVG, with text as text; equal figures give equal SVG."""
    import io

    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "sitkit"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()
