"""The charts that the pages of a run and of a study share: metrics against cost, losses, interpolants and diffusions."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sitkit.evaluation.plots import Curve, path_curves
from sitkit.registry import diffusions, spec
from sitkit.registry.measures import UNTRAINED, Pairs, Untrained
from sitkit.results.report.charts import line_chart
from sitkit.results.report.page import Chart
from sitkit.runs.config import identity
from sitkit.runs.config.schema import Config
from sitkit.runs.diagnostics import read_pairs
from sitkit.runtime.errors import LeftOut

CostPoint = tuple[int, float, float | None]


def cost_chart(
    curves: Mapping[str, Iterable[CostPoint]], metric: str, title: str = "", caption: str = "", *, better: str = ""
) -> Chart:
    """Return a chart of a metric against network evaluations per sample.

    Args:
        curves: for each name the points (evaluations, value, standard error).
        metric: the name of the metric.
        title, caption: texts around the chart; by default they name the metric and the bars.
        better: "Lower" or "Higher" for the default caption.
    """
    series = []
    for name, points in curves.items():
        nfe, values, errors = zip(*sorted(points, key=lambda point: point[:2]), strict=True)
        series.append(Curve(name, nfe, values, None if None in errors else errors))
    label, xlabel = f"{metric} against evaluations", "evaluations a sample (NFE)"
    logy = _needs_log_axis(series)
    svg = line_chart(series, label=label, xlabel=xlabel, ylabel=metric, logx=True, logy=logy)
    return Chart(svg, title or label, caption or f"{better} is better; bars are standard errors.")


def training_curve(name: str, rows: Sequence[Mapping[str, Any]], key: str) -> Curve:
    """Return a logged value against the training step."""
    points = [(row["step"], row[key]) for row in rows if is_finite_number(row.get(key))]
    return Curve(name, [step for step, _ in points], [value for _, value in points])


def training_charts(curves: Iterable[Curve], title: str, caption: str = "") -> list[Chart]:
    """Return a chart of curves against the training step; none if no curve has two points."""
    series = [curve for curve in curves if len(curve.x) > 1]
    if not series:
        return []
    label, logy = f"{title} against training steps", _needs_log_axis(series)
    return [Chart(line_chart(series, label=label, xlabel="training step", ylabel=title, logy=logy), title, caption)]


def _needs_log_axis(series: Sequence[Curve]) -> bool:
    """Return whether the values are positive and differ by more than a factor of ten."""
    values = [float(value) for curve in series for value in curve.values]
    return min(values) > 0 and max(values) > 10 * min(values)


def is_finite_number(value: Any) -> bool:
    """Return whether a plain value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class StoredMeasures(Untrained):
    """The velocity loss that is stored in a run's folder; no pairs if none was measured."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def velocity_losses(self) -> Pairs:
        """Return the (t, L_t) pairs of the latest checkpoint for which they were measured."""
        files = sorted(self.folder.glob("velocity-loss-*.json"))
        return read_pairs(files[-1], "smoothed") if files else ()


def path_charts(folder: Path, config: Config, records: Sequence[Mapping[str, Any]], broken: LeftOut) -> list[Chart]:
    """Return charts of the interpolant of a run, and of the diffusions of its evaluations, against time.

    `broken` receives a diffusion that cannot be shown.
    """
    texts = dict.fromkeys(json.dumps(record["sampling"]["recipe"]["diffusion"]) for record in records)
    bound = []
    for plain in map(json.loads, texts or [json.dumps(spec(config.diffusion))]):
        with broken.noting():
            bound.append(diffusions.parse(plain).bind(StoredMeasures(folder)))
    name, t = identity.label(config.interp), torch.linspace(0, 1, 201, dtype=torch.float64)
    coefficients, rates = path_curves(config.interp, t)
    c = config.interp.coefficients(t)
    w = [Curve(form.name, t, form.w(t, c)) for form in bound if form.stochastic and form.bind(UNTRAINED) is form]
    panels = [
        (coefficients, f"alpha and sigma of {name}", "", f"{name}: coefficients", ""),
        (rates, f"rates of {name}", "per unit time", f"{name}: rates", ""),
        (
            w,
            f"w(t) on {name}",
            "w",
            f"{name}: diffusion coefficient w",
            "Values that diverge at an end leave the view.",
        ),
    ]
    charts = []
    for series, text, ylabel, title, caption in panels:
        if series:
            clipped = series is not coefficients
            svg = line_chart(series, label=text, xlabel="t (0 noise, 1 data)", ylabel=ylabel, clipped=clipped)
            charts.append(Chart(svg, title, caption))
    return charts
