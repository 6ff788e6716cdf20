"""The examiner: it measures one combination of components against closed-form truth.

The data are a Gaussian mixture and the network is the ideal one, so every error of the samples is the sampler's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sitkit.evaluation.metrics.sliced_wasserstein import directions, sliced_wasserstein
from sitkit.models.exact import Exact
from sitkit.registry import diffusions, interpolants, samplers, targets, timesteps
from sitkit.registry.measures import Pairs, Untrained
from sitkit.runs.diagnostics import path_curvature
from sitkit.runtime import rng
from sitkit.runtime.errors import UserError
from sitkit.solvers.moments import Moments
from sitkit.solvers.ode import Dopri8
from sitkit.solvers.sampler import Plan, Sampler, SolveSpec
from sitkit.testing import MEAN, MIDDLE, STD, gaussian_field, observed_order, over_the_middle
from sitkit.transport import closed_form
from sitkit.transport.diffusion import Diffusion
from sitkit.transport.field import Counted, Field
from sitkit.transport.interpolant import Coefficients

# The largest error of the mean and of the standard deviation, as a part of the law's own standard deviation.
TOLERANCE = 0.05
# Tolerated sliced W2 beyond that of two samples of the truth, for data of scale 1: the cost of a fixed number of steps.
DISTANCE = 0.05
SIGMAS = 4.0
# Paths and numbers for each path.  Of 20,000 numbers the standard error of the standard deviation is 0.5 % of it, and that of
# the mean 0.71 %.  Compared with a closed form within four standard errors, a standard deviation that is off by 5 % passes with
# probability 1e-9, and a mean that is off by 5 % of it with 0.001.  Without a closed form the bound is three standard errors
# below 5 %: what is off by 5 % passes with probability 0.001.
PATHS, NUMBERS = 1000, 20
# The mean of -log p over samples minus that over data, in nats.  It is too high if the samples lie too far out, by 0.4 to 0.9
# if an SDE's noise is that of 2 w, and too low if they lie too far in.
SURPRISE_TOO_HIGH, SURPRISE_TOO_LOW = 0.2, 0.25
# The largest difference between readings of one field by different targets in float64 (condition of the algebra: 1 / MARGIN).
READING_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Combination:
    """One combination of components.

    Args:
        interpolant, target, sampler: names of components.
        diffusion: the name of w; "" for an ODE.
        last_step: the last step of an SDE; "" for an ODE.
        grid: the name of the grid, "uniform" by default.
        settings: other settings of the sampler, and `norm` of w: (name, value) pairs.
    """

    interpolant: str
    target: str
    sampler: str
    diffusion: str = ""
    last_step: str = ""
    grid: str = "uniform"
    settings: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        names = self.interpolant, self.target, self.sampler, self.diffusion, self.last_step, self.grid
        return " ".join([*filter(None, names), *(f"{name}={value:g}" for name, value in self.settings)])


@dataclass(frozen=True)
class CombinationResult:
    """The verdict on a combination, and its measurements (NaN if none was made).

    Args:
        cell: the combination.
        verdict: "right", "refused" or "wrong".
        reason: the reason for "refused" and "wrong".
        mean: the error of the mean of samples of a Gaussian, as a part of its standard deviation.
        std: the relative error of their standard deviation.
        wasserstein: sliced W2 to an independent sample of the truth.
        wasserstein_floor: sliced W2 between two independent samples of the truth.
        surprise: the mean of -log p over the samples minus that over the truth, in nats.
        nfe: evaluations of the network for each sample.
    """

    cell: Combination
    verdict: str
    reason: str = ""
    mean: float = math.nan
    std: float = math.nan
    wasserstein: float = math.nan
    wasserstein_floor: float = math.nan
    surprise: float = math.nan
    nfe: int = 0


@dataclass(eq=False)
class Examiner:
    """Measures combinations; combinations with the same solve share one set of samples."""

    n: int = 1000
    steps: int | None = None
    law: closed_form.Mixture = field(default_factory=closed_form.three_gaussians)
    _solutions: dict[Any, tuple[Tensor, int, str]] = field(default_factory=dict)
    _moments: dict[Any, tuple[Moments, str]] = field(default_factory=dict)
    _paths: dict[Any, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keys = rng.sample_keys(0, torch.arange(self.n))
        noise = rng.normal(keys, (2,), rng.INITIAL, torch.float64)
        # The mean and covariance of the noise are made exact: the remaining error is the path's.
        centred = noise - noise.mean(0)
        root = torch.linalg.cholesky(centred.T @ centred / self.n)
        self.keys, self.noise = keys, torch.linalg.solve_triangular(root, centred.T, upper=False).T
        first, second = (closed_form.sample_law(self.law, self.n, seed)[0].double() for seed in (1, 2))
        self.reference = first
        self.directions = directions(64, 2, 0)
        self.wasserstein_floor = sliced_wasserstein(first, second, self.directions)
        # 20,000 draws: a standard error of 0.007 nats.
        surprises = self.surprises(closed_form.sample_law(self.law, 20_000, 3)[0].double())
        self.entropy, self.surprise_floor = float(surprises.mean()), SIGMAS * float(surprises.std()) / math.sqrt(self.n)
        self.field, self.flow = functools.cache(self._field), functools.cache(self._flow)
        self.curvature, self.misread = functools.cache(self._curvature), functools.cache(self._misread)

    def surprises(self, x: Tensor) -> Tensor:
        """Return -log p of points (b, 2) under the mixture, in nats: (b,)."""
        data = Coefficients(*(torch.tensor(value, dtype=torch.float64) for value in (1.0, 0.0, 1.0, -1.0)))
        return -closed_form.log_density(self.law, data, x)

    def sampler(self, cell: Combination) -> Sampler:
        """Return the sampler of a combination, with this examiner's steps or its own default."""
        names = {f.name for f in dataclasses.fields(samplers[cell.sampler])}
        fields: dict[str, Any] = {"last_step": cell.last_step} if cell.last_step else {}
        fields |= {name: value for name, value in cell.settings if name in names}
        if self.steps is not None and "steps" in names:
            fields["steps"] = self.steps
        if "grid" in names:
            fields["grid"] = self.grid(cell, fields)
        return samplers.create(cell.sampler, **fields).bind(IdealMeasures(self, cell.interpolant))

    def grid(self, cell: Combination, fields: Mapping[str, Any]) -> Any:
        """Return the grid of a combination; if it has no times of its own, those of the sampler's usual grid.

        Raises UserError as `plan`.
        """
        if "times" not in {f.name for f in dataclasses.fields(timesteps[cell.grid])}:
            return cell.grid
        usual = samplers.create(cell.sampler, **fields).bind(IdealMeasures(self, cell.interpolant))
        components = interpolants.create(cell.interpolant), targets.create(cell.target)
        times = usual.plan(SolveSpec(*components, self.diffusion(cell))).times
        return timesteps.create(cell.grid, times=times.tolist())

    def diffusion(self, cell: Combination) -> Diffusion | None:
        """Return the w of a combination, or None for an ODE."""
        norm = {name: value for name, value in cell.settings if name == "norm"}
        if not cell.diffusion:
            return None
        return diffusions.create(cell.diffusion, **norm).bind(IdealMeasures(self, cell.interpolant))

    def examine(self, cell: Combination) -> CombinationResult:
        """Return the result of one combination."""
        ideal = self.field(cell.interpolant, cell.target)
        try:
            sampler, w = self.sampler(cell), self.diffusion(cell)
            plan = sampler.plan(SolveSpec(ideal.interpolant, ideal.target, w))
        except UserError as error:
            return CombinationResult(cell, "refused", str(error))
        times = tuple(plan.times.tolist())
        # With equal plans the solves of different targets differ by rounding alone, once their readings agree.
        solve = cell.interpolant, sampler, w, times
        if solve not in self._solutions:
            self._solutions[solve] = self._solve(ideal, sampler, w, plan.nfe)
        x, nfe, miscount = self._solutions[solve]
        if not bool(x.isfinite().all()):
            return CombinationResult(cell, "wrong", "samples are not finite", nfe=nfe)
        if solve not in self._moments:
            self._moments[solve] = self._gaussian(sampler, SolveSpec(ideal.interpolant, ideal.target, w), plan)
        gaussian, unlike = self._moments[solve]
        distance, floor = sliced_wasserstein(x, self.reference, self.directions), self.wasserstein_floor
        surprise = float(self.surprises(x).mean()) - self.entropy
        misread, where = self.misread(cell.interpolant, cell.target, times), "out" if surprise > 0 else "in"
        unsurprising = -SURPRISE_TOO_LOW - self.surprise_floor <= surprise <= SURPRISE_TOO_HIGH + self.surprise_floor
        faults = (
            (misread, misread),
            (miscount, miscount),
            (not unsurprising, f"the samples lie too far {where}: -log p is {surprise:+.2f} nats off"),
            (unlike, unlike),
            (
                distance > DISTANCE + 2 * floor,
                f"sliced W2 is {distance:.3f}, {floor:.3f} between two samples of the truth",
            ),
        )
        fault = next((message for wrong, message in faults if wrong), "")
        measured = (gaussian.mean - MEAN) / STD, gaussian.std / STD - 1, distance, floor, surprise, nfe
        return CombinationResult(cell, "wrong" if fault else "right", fault, *measured)

    def _gaussian(self, sampler: Sampler, spec: SolveSpec, plan: Plan) -> tuple[Moments, str]:
        """Return the moments that a plan gives N(MEAN, STD^2), and what is wrong with them or "".

        A deterministic sampler maps the noise by an affine function, which two solutions determine.  Of an SDE they are
        known in closed form, and the paths of the sampler's first plan on an interpolant must agree with it; without a
        closed form they are those of paths.
        """
        if not sampler.stochastic:
            ends = self._ends(sampler, spec, torch.tensor([[-1.0], [1.0]], dtype=torch.float64))
            moments = Moments(float(ends.mean()), float(ends.diff(dim=0).abs()) / 2)
            return moments, _differing(moments, Moments(MEAN, STD), TOLERANCE, TOLERANCE)
        noise = rng.normal(rng.sample_keys(0, torch.arange(PATHS)), (NUMBERS,), rng.INITIAL, torch.float64)
        mean_error, std_error = 1 / math.sqrt(noise.numel()), 1 / math.sqrt(2 * noise.numel())
        known = sampler.moments(spec, plan)
        if known is None:
            ends = self._ends(sampler, spec, noise)
            moments = Moments(float(ends.mean()), float(ends.std()))
            bounds = TOLERANCE - 3 * mean_error, TOLERANCE - 3 * std_error
            return moments, _differing(moments, Moments(MEAN, STD), *bounds)
        pair = sampler.name, spec.interpolant
        if pair not in self._paths:
            ends = self._ends(sampler, spec, noise)
            moments, bounds = Moments(float(ends.mean()), float(ends.std())), (SIGMAS * mean_error, SIGMAS * std_error)
            self._paths[pair] = _differing(moments, known, *bounds)
        return known, _differing(known, Moments(MEAN, STD), TOLERANCE, TOLERANCE) or self._paths[pair]

    def _ends(self, sampler: Sampler, spec: SolveSpec, noise: Tensor) -> Tensor:
        """Return the samples of N(MEAN, STD^2) from noise (b, d)."""
        ideal = gaussian_field(spec.interpolant, spec.target)
        keys = rng.sample_keys(0, torch.arange(len(noise)))
        return sampler.sample(ideal, noise, diffusion=spec.diffusion, seeds=keys).x

    def order(self, sampler: Sampler, interpolant: str, target: str) -> float:
        """Return the observed order of a sampler.

        For an SDE sampler it is the weak order on a Gaussian, without sampling error.  For an ODE sampler it is the order
        of the mixture's flow: on `linear` the midpoint rule happens to have order 3 for a Gaussian.
        """
        ideal, start = self.field(interpolant, target), self.noise[:100]
        if sampler.stochastic:
            return observed_order(sampler, gaussian_field(ideal.interpolant, ideal.target))
        steps = max(16, 512 >> sampler.order)

        def error(steps: int) -> float:
            end = over_the_middle(sampler, steps).sample(ideal, start, seeds=self.keys[:100]).x
            return float((end - self.flow(interpolant)).square().mean().sqrt())

        return math.log2(error(steps) / error(2 * steps))

    def _field(self, interpolant: str, target: str) -> Field:
        """Return the ideal field of the mixture."""
        components = interpolants.create(interpolant), targets.create(target)
        return Field(Exact(self.law, *components), *components)

    def _curvature(self, interpolant: str) -> Pairs:
        """Return the curvature of the ideal field's paths on an interpolant, the same for every target."""
        return path_curvature(self.field(interpolant, "velocity"), self.noise[:64])

    def _flow(self, interpolant: str) -> Tensor:
        """Return the ends of the flow over `MIDDLE` on an interpolant, the same for every target."""
        exact = Dopri8(rtol=1e-12, atol=1e-12, t0=MIDDLE[0], t1=MIDDLE[1], partial=True)
        return exact.sample(self.field(interpolant, "velocity"), self.noise[:100]).x

    def _solve(
        self, ideal: Field, sampler: Sampler, w: Diffusion | None, planned: int | None
    ) -> tuple[Tensor, int, str]:
        """Return samples, their NFE, and the fault if it is not the number of evaluations spent and planned."""
        counted = Counted(ideal.network, self.n)
        sample = sampler.sample(ideal.through(counted), self.noise, diffusion=w, seeds=self.keys)
        right = sample.nfe == counted.nfe and planned in (None, sample.nfe)
        miscount = f"reports {sample.nfe} evaluations, planned {planned}, spent {counted.nfe}"
        return sample.x, sample.nfe, "" if right else miscount

    def _misread(self, interpolant: str, target: str, times: tuple[float, ...]) -> str:
        """Return how a reading of the ideal field differs from the truth at times of a grid, "" if none does."""
        ideal, inside = self.field(interpolant, target), [t for t in times if 0 < t < 1]
        for t in inside[:: max(1, len(inside) // 5)]:
            time = torch.tensor(t, dtype=torch.float64)
            c = ideal.interpolant.coefficients(time)
            x = float(c.alpha) * self.reference[:50] + float(c.sigma) * self.noise[:50]
            readings = ideal.read(x, time)
            exact = closed_form.readings(self.law, ideal.interpolant.at(time, x), x)
            for name, ours, theirs in zip(readings._fields, readings, exact, strict=True):
                off = float(((ours - theirs).abs() / (1 + theirs.abs())).max())
                if not off <= READING_TOLERANCE:
                    return f"the {name} reading at t = {t:.4g} is off by {off:.2g}"
        return ""


def _differing(ours: Moments, theirs: Moments, mean: float, std: float) -> str:
    """Return how moments differ from others by more than the tolerances, in parts of the standard deviation, or ""."""
    if not abs(ours.std / theirs.std - 1) <= std:
        return f"the standard deviation of a Gaussian is {ours.std:.4g} for {theirs.std:.4g}"
    if not abs(ours.mean - theirs.mean) <= mean * theirs.std:
        return f"the mean of a Gaussian is {ours.mean:.4g} for {theirs.mean:.4g}, with a standard deviation of {theirs.std:.4g}"
    return ""


@dataclass(frozen=True)
class IdealMeasures(Untrained):
    """The measurements on a run, for the ideal field of the mixture; velocity losses of the size that the mixture has."""

    examiner: Examiner
    interpolant: str

    def velocity_losses(self) -> Pairs:
        return ((0.0, 1.0), (1.0, 2.0))

    def path_curvature(self) -> Pairs:
        return self.examiner.curvature(self.interpolant)
