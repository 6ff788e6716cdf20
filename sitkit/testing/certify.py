"""Certificates: every combination of interpolant, target, sampler, w, last step and grid against closed-form truth.

A combination is `right`, `refused` before the solve with a reason, or `wrong`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sitkit.evaluation import plots
from sitkit.registry import diffusions, interpolants, samplers, targets, timesteps
from sitkit.runtime.files import write_json
from sitkit.runtime.progress import Event, Progress
from sitkit.runtime.progress_bar import reporting
from sitkit.solvers.ode import AdaptiveODE
from sitkit.solvers.sampler import Sampler
from sitkit.solvers.sde import SDESampler
from sitkit.testing import ORDER_TOLERANCE
from sitkit.testing.examiner import Combination, CombinationResult, Examiner

# Settings that are refused, or right: a start or an end in the middle of the path, a long last step, a w^KL of small norm.
PARTS_OF_PATH = ({"t0": 0.5}, {"t1": 0.5})
LONG_LAST_STEP = {"last_step_size": 0.5}
SMALL_NORM = {"norm": 0.1}


@dataclass(frozen=True)
class Order:
    """The observed order of convergence of a sampler.

    Args:
        sampler, interpolant, target: names of the components.
        declared: the order that the sampler declares.
        observed: the measured order.
    """

    sampler: str
    interpolant: str
    target: str
    declared: int
    observed: float

    @property
    def right(self) -> bool:
        """Whether the observed order is within a quarter of the declared one."""
        return abs(self.observed - self.declared) <= ORDER_TOLERANCE


@dataclass(frozen=True)
class Certificate:
    """The results of all combinations.

    Args:
        verdicts: the result of each combination.
        orders: the observed order of each sampler on each interpolant.
        seconds: the time that the measurements took.
        folder: the folder with certificate.json and certificate.png.
    """

    verdicts: list[CombinationResult]
    orders: list[Order]
    seconds: float
    folder: Path = field(default_factory=Path)

    def count(self, verdict: str) -> int:
        """Return the number of combinations with a verdict."""
        return sum(v.verdict == verdict for v in self.verdicts)

    @property
    def wrong(self) -> list[str]:
        """A line for each wrong combination and order."""
        cells = [f"{v.cell}: {v.reason}" for v in self.verdicts if v.verdict == "wrong"]
        return cells + [
            f"{o.sampler} on {o.interpolant} {o.target}: declares order {o.declared}, observed {o.observed:.2f}"
            for o in self.orders
            if not o.right
        ]


def cells(chosen: Mapping[str, Sequence[str]]) -> Iterator[Combination]:
    """Yield every combination of the registered names, or of those chosen for an axis.

    Other grids have the default w.  Other settings have the first target.
    """

    def names(axis: str, registry: Any) -> list[str]:
        known = [name for name in registry.names() if name not in registry.presets()]
        for name in chosen.get(axis, ()):
            registry[name]
        return [name for name in known if not chosen.get(axis) or name in chosen[axis]]

    known = names("target", targets)
    for i, t, s in itertools.product(names("interp", interpolants), known, names("sampler", samplers)):
        kind = samplers[s]
        sde = issubclass(kind, SDESampler)
        forms: list[tuple[str, str]] = [("", "")]
        if sde:
            forms = list(itertools.product(names("diffusion", diffusions), ("none", "mean", "euler", "tweedie")))
        for w, last in forms:
            yield Combination(i, t, s, w, last)
        usual = ("sigma", "tweedie") if sde else ("", "")
        if "grid" in {f.name for f in dataclasses.fields(kind)}:
            for grid in names("grid", timesteps):
                if grid != "uniform":
                    yield Combination(i, t, s, *usual, grid)
        if t == known[0]:
            for (w, last), settings in _settings(kind):
                if w in ("", *names("diffusion", diffusions)):
                    yield Combination(i, t, s, w, last, settings=tuple(settings.items()))


def _settings(kind: type[Sampler]) -> Iterator[tuple[tuple[str, str], dict[str, float]]]:
    """Yield (w, last step) and settings of a kind of sampler, each with a fault that samplers had."""
    sde = issubclass(kind, SDESampler)
    for part in PARTS_OF_PATH:
        yield (("sigma", "none") if sde else ("", "")), part
    if sde:
        yield ("sigma", "tweedie"), LONG_LAST_STEP
    if kind.stochastic:
        yield ("kl", "tweedie" if sde else ""), SMALL_NORM


def certify(
    *,
    interp: str | Sequence[str] | None = None,
    target: str | Sequence[str] | None = None,
    sampler: str | Sequence[str] | None = None,
    diffusion: str | Sequence[str] | None = None,
    quick: bool = False,
    out: str | Path = "certificates",
    progress: Progress | None = None,
) -> Certificate:
    """Check combinations of components against closed-form truth; write certificate.json and certificate.png.

    Args:
        interp, target, sampler, diffusion: names to check; all registered ones by default, plugins included.
        quick: use 64 steps and 500 samples instead of the samplers' defaults and 1,000, and measure orders with two targets.
        out: the folder of the certificate.
        progress: a function that receives events; by default a live bar in a terminal or in Jupyter.

    Returns:
        The result of each combination, and the observed order of each sampler.

    Raises:
        UserError: no component has one of the names.
    """
    named = {"interp": interp, "target": target, "sampler": sampler, "diffusion": diffusion}
    chosen = {key: [names] if isinstance(names, str) else list(names) for key, names in named.items() if names}
    with reporting(progress) as report:
        return _certify(chosen, quick, Path(out), report)


def _certify(chosen: Mapping[str, Sequence[str]], quick: bool, folder: Path, progress: Progress) -> Certificate:
    began = time.monotonic()
    examiner = Examiner(500, 64) if quick else Examiner()
    every = list(cells(chosen))
    verdicts = []
    for number, cell in enumerate(every):
        verdicts.append(examiner.examine(cell))
        wrong = sum(v.verdict == "wrong" for v in verdicts)
        progress(Event("certify", number + 1, len(every), {"wrong": wrong}))
    pairs = list(dict.fromkeys((c.sampler, c.interpolant, c.target) for c in every))
    orders = []
    for number, (sampler, interpolant, target) in enumerate(pairs):
        progress(Event("orders", number + 1, len(pairs)))
        if issubclass(samplers[sampler], AdaptiveODE) or (quick and target not in ("velocity", "noise")):
            continue
        observed = examiner.order(samplers.create(sampler), interpolant, target)
        orders.append(Order(sampler, interpolant, target, samplers[sampler].order, observed))
    certificate = Certificate(verdicts, orders, time.monotonic() - began, folder)
    write_json(folder / "certificate.json", certificate_to_plain(certificate))
    draw_certificate(certificate, folder / "certificate.png")
    return certificate


def certificate_to_plain(certificate: Certificate) -> dict[str, Any]:
    """Return the certificate as plain values."""
    return {
        "right": certificate.count("right"),
        "refused": certificate.count("refused"),
        "wrong": certificate.wrong,
        "seconds": certificate.seconds,
        "cells": [dataclasses.asdict(v) for v in certificate.verdicts],
        "orders": [dataclasses.asdict(o) for o in certificate.orders],
    }


def draw_certificate(certificate: Certificate, path: Path) -> None:
    """Draw sliced W2 over its floor as a heat map: a row for each interpolant and w, a column for each sampler and last step."""
    groups: dict[str, dict[str, list[float]]] = {}
    for v in certificate.verdicts:
        if v.cell.grid == "uniform":
            own = "own w" if samplers[v.cell.sampler].stochastic else "ODE"
            row = f"{v.cell.interpolant} {v.cell.diffusion or own}"
            column = " ".join(filter(None, (v.cell.sampler, v.cell.last_step)))
            groups.setdefault(row, {}).setdefault(column, []).append(v.wasserstein / v.wasserstein_floor)
    columns = list(dict.fromkeys(column for row in groups.values() for column in row))
    worst = [[_worst(row[column]) if column in row else None for column in columns] for row in groups.values()]
    title = "sliced W2 to the truth (worst target; dash: refused)"
    plots.heatmap(worst, list(groups), columns, path, title, "1: as far as two samples of the truth")


def _worst(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return max(finite, default=math.nan)
