"""The mean and the standard deviation that a plan gives Gaussian data, in closed form, and the rule on them.

For data ~ N(mean, std^2) every reading is affine in the state, so a solve is an affine map of its noise.  A plan whose
samples of N(0.7, 0.3^2) are off by more than 5 % cannot give right samples of data of unit scale.  The rule refuses it if
its span, its last step, its grid or its w is the reason.  The error of few steps is the user's choice and is not refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from sitkit.runtime.errors import UserError
from sitkit.transport.interpolant import TINY, Interpolant
from sitkit.transport.interval import LATEST_START, LEFT_BY_END, coefficients_at

if TYPE_CHECKING:
    from torch import Tensor

    from sitkit.solvers.ode import Tableau
    from sitkit.solvers.sampler import Plan, Sampler, SolveSpec
    from sitkit.transport.diffusion import Diffusion

LAW_MEAN, LAW_STD = 0.7, 0.3
# The largest error of the mean and of the standard deviation, relative to them.
LARGEST_ERROR = 0.05
# A last step that takes more than this part of the standard deviation is noted in the plan.
NOTED_LOSS = 0.02
# The error of a deterministic method with fewer steps than this is taken for the error of few steps, on any grid.
FEW_STEPS = 32


class Affine(NamedTuple):
    """A map x -> factor x + shift."""

    factor: float
    shift: float

    def step(self, h: float) -> Affine:
        """Return the Euler step x -> x + h (factor x + shift)."""
        return Affine(1 + h * self.factor, h * self.shift)

    def after(self, first: Affine) -> Affine:
        """Return the map that applies `first`, then this one."""
        return Affine(self.factor * first.factor, self.factor * first.shift + self.shift)


class Moments(NamedTuple):
    """A mean and a standard deviation."""

    mean: float
    std: float

    @property
    def error(self) -> float:
        """The larger of the errors of both, relative to the data's."""
        return max(abs(self.mean / LAW_MEAN - 1), abs(self.std / LAW_STD - 1))

    def __str__(self) -> str:
        return f"a mean of {self.mean:.3g} and a standard deviation of {self.std:.3g}"


class GaussianReadings(NamedTuple):
    """The readings of Gaussian data at a time, each an affine map of the state, and the law of the state there."""

    velocity: Affine
    score: Affine
    data: Affine
    state: Moments

    def drift(self, w: float) -> Affine:
        """Return v + w s / 2."""
        return Affine(self.velocity.factor + w / 2 * self.score.factor, self.velocity.shift + w / 2 * self.score.shift)


def gaussian_readings(interpolant: Interpolant, times: Sequence[float], std: float = LAW_STD) -> list[GaussianReadings]:
    """Return the readings of N(LAW_MEAN, std^2) at each time, computed in float64.

    With R^2 = alpha^2 std^2 + sigma^2 and y = x - alpha LAW_MEAN they are d_alpha LAW_MEAN + (R' / R) y, -y / R^2 and
    LAW_MEAN + (alpha std^2 / R^2) y.
    """
    c = interpolant.coefficients(torch.tensor(times, dtype=torch.float64))
    sigma = c.sigma.clamp_min(TINY)
    variance = (c.alpha * std).square() + sigma.square()
    rate = (c.alpha * c.d_alpha * std**2 + sigma * c.d_sigma) / variance
    gain = c.alpha * std**2 / variance
    mean = c.alpha * LAW_MEAN
    rows = torch.stack(
        (
            *(rate, c.d_alpha * LAW_MEAN - rate * mean),
            *(-1 / variance, mean / variance),
            *(gain, LAW_MEAN - gain * mean),
            *(mean, variance.sqrt()),
        ),
        1,
    )
    return [
        GaussianReadings(Affine(*row[:2]), Affine(*row[2:4]), Affine(*row[4:6]), Moments(*row[6:]))
        for row in rows.tolist()
    ]


def moments_of_span(sampler: Sampler, spec: SolveSpec, times: Tensor) -> Moments:
    """Return the moments that exact steps over the span of a grid give, as a last step without error would complete them.

    From noise N(0, 1) at t0 the deviation from the law of x_t shrinks by (R_1 / R_0) exp(-1/2 int w / R^2 dt).
    """
    first, last = (reading.state for reading in gaussian_readings(spec.interpolant, times[[0, -1]].tolist()))
    kept = last.std / first.std * math.exp(-_contraction(sampler, spec, times))
    wide = math.sqrt(last.std**2 + kept**2 * (1 - first.std**2)) / last.std
    return Moments(LAW_MEAN - kept * first.mean, LAW_STD * wide)


def _contraction(sampler: Sampler, spec: SolveSpec, times: Tensor) -> float:
    """Return 1/2 int w / R^2 dt over the grid, by the Gauss-Legendre rule in each step; 0 for an ODE."""
    import numpy as np

    form = diffusion_of(sampler, spec)
    # w^KL can be infinite at the first time, and from there it removes every deviation.
    if not form.stochastic:
        return 0.0
    points, weights = np.polynomial.legendre.leggauss(8)
    nodes = times[:-1, None] + times.diff()[:, None] * torch.from_numpy((points + 1) / 2)
    c = spec.interpolant.coefficients(nodes)
    rate = form.w(nodes, c) / ((c.alpha * LAW_STD).square() + c.sigma.square())
    return float((rate @ torch.from_numpy(weights / 2) * times.diff()).sum()) / 2


def diffusion_of(sampler: Sampler, spec: SolveSpec) -> Diffusion:
    """Return the w of a solve: the given one, or the sampler's default."""
    return sampler.default_diffusion() if spec.diffusion is None else spec.diffusion


def moments_of_steps(steps: Iterable[tuple[Affine, float]]) -> Moments:
    """Return the moments after steps x -> factor x + shift + N(0, variance) from N(0, 1)."""
    mean, variance = 0.0, 1.0
    for (factor, shift), noise in steps:
        mean, variance = factor * mean + shift, factor**2 * variance + noise
    return Moments(mean, math.sqrt(variance))


def moments_of_tableau(tableau: Tableau, interpolant: Interpolant, times: Tensor) -> Moments:
    """Return the moments after the steps of a Runge-Kutta method over a grid."""
    stages = times[:-1, None] + times.diff()[:, None] * torch.tensor(tableau.c, dtype=torch.float64)
    readings = iter(gaussian_readings(interpolant, stages.flatten().tolist()))
    steps = [(_tableau_step(tableau, h, readings), 0.0) for h in times.diff().tolist()]
    return moments_of_steps(steps)


def _tableau_step(tableau: Tableau, h: float, readings: Iterator[GaussianReadings]) -> Affine:
    slopes: list[Affine] = []

    def advanced(weights: Sequence[float]) -> Affine:
        pairs = list(zip(weights, slopes, strict=True))
        return Affine(1 + h * sum(w * k.factor for w, k in pairs), h * sum(w * k.shift for w, k in pairs))

    for row in tableau.a:
        slopes.append(next(readings).velocity.after(advanced(row)))
    return advanced(tableau.b)


def require_moments(sampler: Sampler, spec: SolveSpec, plan: Plan) -> Plan:
    """Return a plan.  Raises UserError, with the reason, if its samples cannot keep the moments of data."""
    if not sampler.partial:
        _require_span(sampler, spec, plan)
        _require_grid(sampler, spec, plan)
    return plan


def _require_span(sampler: Sampler, spec: SolveSpec, plan: Plan) -> None:
    start, end = float(plan.times[0]), min(1.0, float(plan.times[-1]) + plan.last_step)
    c = coefficients_at(spec.interpolant, torch.tensor([start, end], dtype=torch.float64))
    data, noise = float(c.alpha[0]), float(c.sigma[1])
    # Derived ends reach these bounds to the last bits.
    if data > LATEST_START * (1 + 1e-9):
        fault = f"pure noise is not a state at its start, where alpha is {data:.2g}"
    elif noise > LEFT_BY_END * (1 + 1e-9):
        fault = f"it leaves noise of {noise:.2g} in the samples"
    elif (span := moments_of_span(sampler, spec, plan.times)).error > LARGEST_ERROR:
        fault = f"with exact steps it gives N({LAW_MEAN}, {LAW_STD}^2) {span}"
    else:
        return
    raise UserError(
        f"a solve from t = {start:.4g} to {end:.4g} on {spec.interpolant.name!r} does not lead from noise to data: {fault}. "
        "Leave t0 and t1 unset, or use times over the whole of [0, 1]; sampler.partial=true solves a part of the path."
    )


def _require_grid(sampler: Sampler, spec: SolveSpec, plan: Plan) -> None:
    grid, usual = getattr(sampler, "grid", None), getattr(type(sampler), "grid", None)
    few = not sampler.stochastic and len(plan.times) <= FEW_STEPS
    if grid == usual or grid is None or usual is None or few:
        return
    ours = sampler.moments(spec, plan)
    if ours is None or ours.error <= LARGEST_ERROR:
        return
    other = dataclasses.replace(sampler, grid=usual)
    try:
        theirs = other.moments(spec, other.plan(spec))
    except UserError:
        return
    if theirs is not None and theirs.error <= LARGEST_ERROR:
        raise UserError(
            f"sampler {sampler.name!r} with {len(plan.times) - 1} steps on grid {grid.name!r} gives N({LAW_MEAN}, {LAW_STD}^2) "
            f"{ours}; on grid {usual.name!r} it gives {theirs}: use that grid or more steps."
        )
