"""Certificates: every combination of interpolant, target, sampler, w, last step and grid against closed-form truth.

The data are a Gaussian mixture, the network the ideal one, so whatever is off in the samples is the sampler's doing.  A cell
is `right`, `refused` with the reason that is known before the solve, or `wrong`.
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

import torch
from torch import Tensor

from sitkit.evaluation import plots
from sitkit.evaluation.metrics.sliced_wasserstein import directions, sliced_wasserstein
from sitkit.models.exact import Exact
from sitkit.registry import diffusions, interpolants, samplers, targets, timesteps
from sitkit.registry.measures import Untrained
from sitkit.runs.diagnostics import path_curvature
from sitkit.runtime import rng
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import write_json
from sitkit.runtime.progress import Event, Progress
from sitkit.runtime.progress_bar import reporting
from sitkit.solvers.ode import AdaptiveODE, Dopri8
from sitkit.solvers.sampler import Sampler, SolveSpec
from sitkit.solvers.sde import SDESampler
from sitkit.testing import MIDDLE, ORDER_TOLERANCE, gaussian_field, observed_order, over_the_middle
from sitkit.transport import closed_form
from sitkit.transport.diffusion import Diffusion
from sitkit.transport.field import Counted, Field
from sitkit.transport.interpolant import Coefficients, Interpolant
from sitkit.transport.target import Target, Velocity

# Bias tolerated beyond four standard errors, for data of scale 1: what a fixed number of steps and a last step of 0.04 cost.
TOLERANCE = 0.05
SIGMAS = 4.0
# The mean of -log p over samples, less that over data, in nats: too high where they lie too far out, by 0.4 to 0.9 if an SDE's
# noise is that of 2 w; too low where they lie too far in.  What a fixed number of steps costs, measured at 64: 0.33 with
# dpm++-2m-sde on a grid that is coarse near the data, and -0.23 with a last step of 0.04 without noise, both on vp-sbdm.
SURPRISE_TOO_HIGH, SURPRISE_TOO_LOW = 0.2, 0.25
# How far readings of one field may differ between targets in float64 (condition of the algebra: 1 / MARGIN).
READING_TOLERANCE = 1e-9
GRIDS = ("shift", "power", "cosine", "adapted")


@dataclass(frozen=True)
class Combination:
    """One combination.  grid is a name; diffusion and last_step are "" for an ODE."""

    interpolant: str
    target: str
    sampler: str
    diffusion: str = ""
    last_step: str = ""
    grid: str = "uniform"

    def __str__(self) -> str:
        return " ".join(filter(None, dataclasses.astuple(self)))


@dataclass(frozen=True)
class CombinationResult:
    """What was found: right, refused or wrong, why, and the measurements (NaN where none was made).

    mean, covariance: largest entry of the bias, less nothing; floor: four standard errors of the two.  wasserstein: sliced W2
    to an independent sample of the truth; its floor: that of two independent samples of the truth.  surprise: the mean of
    -log p over the samples less that over the truth, in nats.
    """

    cell: Combination
    verdict: str
    reason: str = ""
    mean: float = math.nan
    covariance: float = math.nan
    floor: float = math.nan
    wasserstein: float = math.nan
    wasserstein_floor: float = math.nan
    surprise: float = math.nan
    nfe: int = 0


@dataclass(frozen=True)
class Order:
    """The observed order of convergence of a sampler on an interpolant, with the target it was measured with."""

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
    """All verdicts and orders."""

    verdicts: list[CombinationResult]
    orders: list[Order]
    seconds: float
    folder: Path = field(default_factory=Path)

    def count(self, verdict: str) -> int:
        """How many cells have this verdict."""
        return sum(v.verdict == verdict for v in self.verdicts)

    @property
    def wrong(self) -> list[str]:
        """Every wrong cell and order, in words."""
        cells = [f"{v.cell}: {v.reason}" for v in self.verdicts if v.verdict == "wrong"]
        return cells + [
            f"{o.sampler} on {o.interpolant} {o.target}: declares order {o.declared}, observed {o.observed:.2f}"
            for o in self.orders
            if not o.right
        ]


@dataclass
class Examiner:
    """Measures cells; samples of equal solves are drawn once."""

    n: int = 1000
    steps: int | None = None
    law: closed_form.Mixture = field(default_factory=closed_form.three_gaussians)
    _drawn: dict[Any, tuple[Tensor, int]] = field(default_factory=dict)
    _read: dict[Any, str] = field(default_factory=dict)
    _flow: dict[Any, Tensor] = field(default_factory=dict)
    _curvature: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keys = rng.sample_keys(0, torch.arange(self.n))
        drawn = rng.normal(keys, (2,), rng.INITIAL, torch.float64)
        # The noise's own mean and covariance are made exact: what is left of the error is the path's.
        centred = drawn - drawn.mean(0)
        root = torch.linalg.cholesky(centred.T @ centred / self.n)
        self.keys, self.noise = keys, torch.linalg.solve_triangular(root, centred.T, upper=False).T
        first, second = (closed_form.sample_law(self.law, self.n, seed)[0].double() for seed in (1, 2))
        self.reference = first
        self.directions = directions(64, 2, 0)
        self.mean, self.covariance = closed_form.moments(self.law)
        self.wasserstein_floor = sliced_wasserstein(first, second, self.directions)
        # 20,000 draws: a standard error of 0.007 nats.
        surprises = self.surprises(closed_form.sample_law(self.law, 20_000, 3)[0].double())
        self.entropy, self.surprise_floor = float(surprises.mean()), SIGMAS * float(surprises.std()) / math.sqrt(self.n)
        spread = float(self.covariance.diagonal().max())
        self.floor = SIGMAS * max(math.sqrt(spread / self.n), spread * math.sqrt(2 / self.n))

    def surprises(self, x: Tensor) -> Tensor:
        """-log p of points (b, 2) under the mixture itself: (b,)."""
        data = Coefficients(*(torch.tensor(value, dtype=torch.float64) for value in (1.0, 0.0, 1.0, -1.0)))
        return -closed_form.log_density(self.law, data, x)

    def field(self, interpolant: Interpolant, target: Target) -> Field:
        """The ideal field of the mixture."""
        return Field(Exact(self.law, interpolant, target), interpolant, target)

    def sampler(self, cell: Combination) -> Sampler:
        """The cell's sampler, with its default steps unless fewer are to do."""
        kind = samplers[cell.sampler]
        names = {f.name for f in dataclasses.fields(kind)}
        fields: dict[str, Any] = {"last_step": cell.last_step} if cell.last_step else {}
        if "grid" in names:
            fields["grid"] = cell.grid
        if self.steps is not None and "steps" in names:
            fields["steps"] = self.steps
        return samplers.create(cell.sampler, **fields).bind(IdealMeasures(self, cell.interpolant))

    def curvature(self, interpolant: str) -> tuple[tuple[float, float], ...]:
        """Return the curvature of the ideal field's paths on an interpolant, the same for every target."""
        if interpolant not in self._curvature:
            ideal = self.field(interpolants.create(interpolant), Velocity())
            self._curvature[interpolant] = path_curvature(ideal, self.noise[:64])
        return self._curvature[interpolant]

    def diffusion(self, cell: Combination) -> Diffusion | None:
        """Return the cell's w, or None for an ODE."""
        return diffusions.create(cell.diffusion).bind(IdealMeasures(self, cell.interpolant)) if cell.diffusion else None

    def examine(self, cell: Combination) -> CombinationResult:
        """The verdict on one cell."""
        interpolant, target = interpolants.create(cell.interpolant), targets.create(cell.target)
        try:
            sampler, w = self.sampler(cell), self.diffusion(cell)
            plan = sampler.plan(SolveSpec(interpolant, target, w))
        except UserError as error:
            return CombinationResult(cell, "refused", str(error))
        ideal = self.field(interpolant, target)
        solved = cell.interpolant, cell.target, tuple(plan.times.tolist())
        if solved not in self._read:
            self._read[solved] = self._misread(ideal, plan.times)
        wrong = self._read[solved]
        # With equal plans the solves of different targets differ by rounding alone, once their readings agree.
        solve = (cell.interpolant, sampler, w, tuple(plan.times.tolist()))
        if solve not in self._drawn:
            counted = Counted(ideal.network, self.n)
            drawn = sampler.sample(ideal.through(counted), self.noise, diffusion=w, seeds=self.keys)
            if drawn.nfe != counted.nfe or (plan.nfe is not None and drawn.nfe != plan.nfe):
                wrong = wrong or f"reports {drawn.nfe} evaluations, planned {plan.nfe}, spent {counted.nfe}"
            self._drawn[solve] = drawn.x, drawn.nfe
        x, nfe = self._drawn[solve]
        if not bool(x.isfinite().all()):
            return CombinationResult(cell, "wrong", "samples are not finite", nfe=nfe)
        mean = float((x.mean(0) - self.mean).abs().max())
        covariance = float((x.T.cov() - self.covariance).abs().max())
        distance = sliced_wasserstein(x, self.reference, self.directions)
        surprise = float(self.surprises(x).mean()) - self.entropy
        if not -SURPRISE_TOO_LOW - self.surprise_floor <= surprise <= SURPRISE_TOO_HIGH + self.surprise_floor:
            where = "out" if surprise > 0 else "in"
            wrong = wrong or f"the samples lie too far {where}: -log p is {surprise:+.2f} nats off"
        if mean > TOLERANCE + self.floor:
            wrong = wrong or f"the mean is off by {mean:.3f}"
        if covariance > TOLERANCE + self.floor:
            wrong = wrong or f"the covariance is off by {covariance:.3f}"
        if distance > 2 * self.wasserstein_floor + TOLERANCE:
            wrong = (
                wrong or f"sliced W2 is {distance:.3f}, {self.wasserstein_floor:.3f} between two samples of the truth"
            )
        return CombinationResult(
            cell,
            "wrong" if wrong else "right",
            wrong,
            mean,
            covariance,
            self.floor,
            distance,
            self.wasserstein_floor,
            surprise,
            nfe,
        )

    def order(self, sampler: Sampler, interpolant: Interpolant, target: Target) -> float:
        """The observed order: the weak one of an SDE sampler on a Gaussian, without sampling error; else that of the flow.

        The flow is the mixture's: on `linear` the midpoint rule happens to have order 3 for a Gaussian.
        """
        if sampler.stochastic:
            return observed_order(sampler, gaussian_field(interpolant, target))
        ideal, start = self.field(interpolant, target), self.noise[:100]
        if interpolant not in self._flow:
            exact = Dopri8(rtol=1e-12, atol=1e-12, t0=MIDDLE[0], t1=MIDDLE[1])
            self._flow[interpolant] = exact.sample(ideal, start).x
        steps = max(16, 512 >> sampler.order)

        def error(steps: int) -> float:
            reached = over_the_middle(sampler, steps).sample(ideal, start, seeds=self.keys[:100]).x
            return float((reached - self._flow[interpolant]).square().mean().sqrt())

        return math.log2(error(steps) / error(2 * steps))

    def _misread(self, ideal: Field, times: Tensor) -> str:
        """Why the field's readings are not the truth's at times of the grid, or nothing."""
        inside = times[(times > 0) & (times < 1)]
        for t in inside[:: max(1, len(inside) // 5)].tolist():
            c = ideal.interpolant.coefficients(torch.tensor(t, dtype=torch.float64))
            x = float(c.alpha) * self.reference[:50] + float(c.sigma) * self.noise[:50]
            read = ideal.read(x, torch.tensor(t, dtype=torch.float64))
            exact = closed_form.readings(self.law, ideal.interpolant.at(torch.tensor(t, dtype=torch.float64), x), x)
            for name, ours, theirs in zip(read._fields, read, exact, strict=True):
                off = float(((ours - theirs).abs() / (1 + theirs.abs())).max())
                if not off <= READING_TOLERANCE:
                    return f"the {name} reading at t = {t:.4g} is off by {off:.2g}"
        return ""


@dataclass(frozen=True)
class IdealMeasures(Untrained):
    """What components measure on a run, for the ideal field of the mixture; losses of the size that the mixture has."""

    examiner: Examiner
    interpolant: str

    def velocity_losses(self) -> tuple[tuple[float, float], ...]:
        return ((0.0, 1.0), (1.0, 2.0))

    def path_curvature(self) -> tuple[tuple[float, float], ...]:
        return self.examiner.curvature(self.interpolant)


def cells(chosen: Mapping[str, Sequence[str]]) -> Iterator[Combination]:
    """Every combination of the registered names, or of those chosen for an axis; other grids with the default w."""

    def names(axis: str, registry: Any) -> list[str]:
        known = [name for name in registry.names() if name not in registry.presets()]
        for name in chosen.get(axis, ()):
            registry[name]
        return [name for name in known if not chosen.get(axis) or name in chosen[axis]]

    for i, t, s in itertools.product(
        names("interp", interpolants), names("target", targets), names("sampler", samplers)
    ):
        kind = samplers[s]
        forms: list[tuple[str, str]] = [("", "")]
        if issubclass(kind, SDESampler) and takes_diffusion(kind):
            forms = list(itertools.product(names("diffusion", diffusions), ("none", "mean", "euler", "tweedie")))
        for w, last in forms:
            yield Combination(i, t, s, w, last)
        if not issubclass(kind, AdaptiveODE) and "grid" in {f.name for f in dataclasses.fields(kind)}:
            plugged = [name for name in timesteps.names() if not timesteps.origin(name).startswith("sitkit.")]
            for grid in (*GRIDS, *plugged):
                yield Combination(i, t, s, "sigma" if forms[0][0] else "", "tweedie" if forms[0][0] else "", grid)


def takes_diffusion(kind: type[Sampler]) -> bool:
    """Whether a sampler integrates the w that it is given."""
    return kind.stochastic and "last_step" in {f.name for f in dataclasses.fields(kind)}


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
        interp, target, sampler, diffusion: names to check, all registered ones by default, plugins included.
        quick: 64 steps and 500 samples in place of the samplers' defaults and 1,000, and orders with two targets.
        out: the folder of the certificate.
        progress: a function that receives events; by default a live bar in a terminal or in Jupyter.

    Returns:
        The result of each combination, and the observed order of each sampler.
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
        observed = examiner.order(samplers.create(sampler), interpolants.create(interpolant), targets.create(target))
        orders.append(Order(sampler, interpolant, target, samplers[sampler].order, observed))
    done = Certificate(verdicts, orders, time.monotonic() - began, folder)
    write_json(folder / "certificate.json", certificate_to_plain(done))
    draw_certificate(done, folder / "certificate.png")
    return done


def certificate_to_plain(certificate: Certificate) -> dict[str, Any]:
    """The certificate as plain values."""
    return {
        "right": certificate.count("right"),
        "refused": certificate.count("refused"),
        "wrong": certificate.wrong,
        "seconds": certificate.seconds,
        "cells": [dataclasses.asdict(v) for v in certificate.verdicts],
        "orders": [dataclasses.asdict(o) for o in certificate.orders],
    }


def draw_certificate(certificate: Certificate, path: Path) -> None:
    """A heat map of sliced W2 over its floor: a row for each interpolant and w, a column for each sampler and last step."""
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
