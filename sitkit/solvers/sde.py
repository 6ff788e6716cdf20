"""Samplers that solve the reverse SDE: euler-maruyama through torchsde, stochastic-heun."""

from __future__ import annotations

import bisect
import dataclasses
from abc import abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self, final

from sitkit.registry import samplers
from sitkit.runtime.errors import UserError, require_positive, require_within
from sitkit.solvers.sampler import (
    MOST_INTERVALS,
    Plan,
    Problem,
    Sampler,
    SolveSpec,
    evaluations,
    stage_times,
    with_user_ends,
)
from sitkit.transport.diffusion import Diffusion, Sigma
from sitkit.transport.interpolant import Interpolant
from sitkit.transport.timestep import Timestep, Uniform

if TYPE_CHECKING:
    from torch import Tensor

    from sitkit.registry.measures import Measures
    from sitkit.solvers.moments import Affine, GaussianReadings, Moments

LastStep = Literal["none", "mean", "euler", "tweedie"]
# The largest h w / (2 sigma^2) of a first step, tried in turn where 1 gives wrong moments.  A step with 1 doubles the noise in
# the state, and a w of small norm does not remove it later: w^KL with norm 0.1 and 50 steps gives data of standard deviation
# 0.3 one of 0.34, and 0.306 with 1/2.
LATER_STARTS = (1 / 2, 1 / 4)
# The sizes of a derived last step: of two digits, up to that of SiT Table 10.
LAST_STEPS = [round(k * unit, 6) for unit in (1e-5, 1e-4, 1e-3) for k in range(10, 100) if k * unit <= 0.04]
# The ratio of the sizes that are tried in turn until the steps before the last one are stable.
LONGER = 1.2


class GaussianNode(NamedTuple):
    """The readings of Gaussian data and w at a time of the grid."""

    readings: GaussianReadings
    w: float

    @property
    def drift(self) -> Affine:
        """The drift v + w s / 2."""
        return self.readings.drift(self.w)


@dataclass(frozen=True)
class SDESampler(Sampler):
    """A sampler of dX = (v + w s / 2) dt + sqrt(w) dW on a given grid, with a last step without noise.

    Args:
        steps: the number of steps, the last step included.
        grid: the places of the steps; equal steps by default.
        last_step: the step from 1 - last_step_size to 1: `mean` (by the drift), `euler` (by the velocity), `tweedie` (to
            the data reading), or `none`: the solve then goes as far as explicit steps are stable.
        last_step_size: its size; None is the largest size up to 0.04 that takes at most 2 % of `data_std`.
        accept_bias: whether to run a last step that leaves noise of standard deviation above 0.07 in data of scale 1, or that
            takes more than 5 % of `data_std`, as published settings do.  Otherwise such a last step is refused.
        data_std: the standard deviation of the data, the median over pixels or latent channels.  A run measures it; without
            a run it is 0.3.

    Source: SiT Algorithm 2; a last step of 0.04 is the one of SiT Table 10.
    """

    stochastic: ClassVar[bool] = True
    nodes: ClassVar[tuple[float, ...]]

    steps: int = 250
    grid: Timestep = Uniform()
    last_step: LastStep = "mean"
    last_step_size: float | None = None
    accept_bias: bool = False
    data_std: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_within(1 if self.last_step == "none" else 2, MOST_INTERVALS, steps=self.steps)
        if self.last_step_size is not None and not 0 < self.last_step_size < 1:
            raise ValueError(f"last_step_size must lie in (0, 1); got {self.last_step_size:g}.")
        if self.data_std is not None:
            require_positive(data_std=self.data_std)
        if self.t1 is not None and self.last_step != "none":
            raise ValueError("t1 is 1 - last_step_size; set that, or last_step 'none' with t1.")

    def bind(self, run: Measures) -> Self:
        bound = super().bind(run)
        return bound if self.data_std is not None else dataclasses.replace(bound, data_std=run.data_std())

    def without_derived(self, spec: SolveSpec, std: float | None) -> Self:
        unset = dataclasses.replace(self, last_step_size=None, data_std=self.data_std or std)
        with suppress(UserError):
            if self.last_step_size is not None and unset._derived_size(spec) == self.last_step_size:
                return dataclasses.replace(self, last_step_size=None)
        return self

    def default_diffusion(self) -> Diffusion:
        return Sigma()

    def plan(self, spec: SolveSpec) -> Plan:
        from sitkit.solvers.moments import LARGEST_ERROR, require_moments

        plan = self._first_plan(spec)
        if not (self.partial or self.accept_bias):
            for rho in LATER_STARTS:
                moments = self.moments(spec, plan)
                if moments is None or moments.error <= LARGEST_ERROR:
                    break
                # The error of few steps does not depend on the start; then the first start stays.
                with suppress(UserError):
                    later = self._plan(spec, plan.last_step, rho)
                    known = self.moments(spec, later)
                    plan = later if known is not None and known.error <= LARGEST_ERROR else plan
        return require_moments(self, spec, plan if self.partial else self._judge_last_step(spec, plan))

    def _judge_last_step(self, spec: SolveSpec, plan: Plan) -> Plan:
        """Return a plan that says what its last step takes of the spread of data.  Raises UserError if it is too much."""
        from sitkit.solvers.moments import LARGEST_ERROR, NOTED_LOSS

        if not plan.last_step:
            return plan
        loss, median = self.spread_lost(spec, plan.last_step), " (the data's median)" if self.data_std else ""
        takes = f"last_step {self.last_step!r} of {plan.last_step:g} on {spec.interpolant.name!r} "
        takes += f"{'takes' if loss > 0 else 'adds'} {abs(loss):.1%} of a standard deviation of {self._std:.3g}{median}"
        if abs(loss) > LARGEST_ERROR and not self.accept_bias:
            given = self.last_step_size is not None
            remedy = "use a smaller last_step_size, or leave it unset" if given else "use more steps"
            raise UserError(f"{takes}: {remedy}, or accept_bias to run it as published.")
        notes = (*plan.notes, takes) if abs(loss) > NOTED_LOSS else plan.notes
        return plan._replace(notes=notes, spread_lost=loss)

    @property
    def _std(self) -> float:
        from sitkit.solvers.moments import LAW_STD

        return self.data_std or LAW_STD

    def spread_lost(self, spec: SolveSpec, size: float) -> float:
        """Return the part of the standard deviation of Gaussian data that a last step takes from states of the exact law."""
        import torch

        from sitkit.solvers.moments import diffusion_of, gaussian_readings

        end = torch.tensor([1 - size], dtype=torch.float64)
        w = float(diffusion_of(self, spec).w(end, spec.interpolant.coefficients(end)))
        (readings,) = gaussian_readings(spec.interpolant, end.tolist(), self._std)
        step = self.gaussian_last_step(size, GaussianNode(readings, w))
        return 1 - abs(step.factor) * readings.state.std / self._std

    def _first_plan(self, spec: SolveSpec) -> Plan:
        """Return the plan with the given last step, or with the derived one.  Raises UserError as `plan`."""
        from sitkit.transport.interval import RHO_END

        size = 0.0 if self.last_step == "none" else self.last_step_size
        if size is None:
            size, longest = self._derived_size(spec), LAST_STEPS[-1]
            # If the steps are too long to be stable that near the data, the last step is longer.
            while size < longest:
                with suppress(UserError):
                    return self._plan(spec, size, RHO_END)
                size = min(longest, LONGER * size)
        return self._plan(spec, size, RHO_END)

    def _derived_size(self, spec: SolveSpec) -> float:
        """Return the largest size of a last step, to two digits, that takes at most `NOTED_LOSS` of the spread."""
        from sitkit.solvers.moments import NOTED_LOSS

        def takes_more(size: float) -> bool:
            return abs(self.spread_lost(spec, size)) > NOTED_LOSS

        return LAST_STEPS[max(0, bisect.bisect_left(LAST_STEPS, True, key=takes_more) - 1)]

    def _plan(self, spec: SolveSpec, size: float, largest_rho: float) -> Plan:
        """Return the plan whose first step has at most a given h w / (2 sigma^2).  Raises UserError as `plan`."""
        from sitkit.transport import interval

        interpolant, target = spec.interpolant, spec.target
        diffusion = Sigma() if spec.diffusion is None else spec.diffusion
        steps = self.steps - (size > 0)
        end = 1 - size if self.t1 is None else self.t1
        derived = interval.derive_interval(
            interpolant, target, diffusion, steps=steps, end=end, largest_rho=largest_rho
        )
        ends = with_user_ends(self, derived, paper=1e-3)
        times = self.grid.grid(steps, ends.t0, ends.t1)
        interval.check_grid(interpolant, target, diffusion, times)
        if size and not self.accept_bias:
            noise = noise_left(interpolant, diffusion, self.last_step, size)
            if noise > interval.LEFT_BY_LAST_STEP:
                raise UserError(
                    f"last_step {self.last_step!r} of {size:g} with diffusion {diffusion.name!r} on {interpolant.name!r} "
                    f"leaves noise of {noise:.2g} in the samples: use last_step 'tweedie', a smaller last_step_size, or "
                    "accept_bias to run it as published."
                )
        evaluated = stage_times(times, self.nodes) + ([float(times[-1])] if size else [])
        return Plan(times, size, evaluations(spec.guidance, evaluated), ends.notes)

    def moments(self, spec: SolveSpec, plan: Plan) -> Moments | None:
        from sitkit.solvers.moments import diffusion_of, gaussian_readings, moments_of_steps

        diffusion, times = diffusion_of(self, spec), plan.times
        w = diffusion.w(times, spec.interpolant.coefficients(times)).tolist()
        readings = gaussian_readings(spec.interpolant, times.tolist())
        known = [GaussianNode(*pair) for pair in zip(readings, w, strict=True)]
        try:
            steps = [
                self.gaussian_step(h, *ends) for h, ends in zip(times.diff().tolist(), pairwise(known), strict=True)
            ]
        except NotImplementedError:
            return None
        return moments_of_steps([*steps, (self.gaussian_last_step(plan.last_step, known[-1]), 0.0)])

    def gaussian_step(self, h: float, start: GaussianNode, end: GaussianNode) -> tuple[Affine, float]:
        """Return a step of size h for Gaussian data: the map of the state, and the variance of the noise that it adds."""
        raise NotImplementedError

    def gaussian_last_step(self, h: float, node: GaussianNode) -> Affine:
        """Return the last step of size h for Gaussian data."""
        if h and self.last_step == "tweedie":
            return node.readings.data
        return node.readings.drift(node.w if self.last_step == "mean" else 0.0).step(h)

    def integrate(self, problem: Problem) -> Tensor:
        import torch

        states = self.solve(problem)
        size = problem.plan.last_step
        if not size:
            return states
        x, t = states[-1], problem.plan.times[-1].to(problem.x)
        reading = problem.field.read(x, t, problem.y)
        if self.last_step == "tweedie":
            x = reading.data
        elif self.last_step == "euler":
            x = x + size * reading.velocity
        else:
            w = diffusion_at(problem, float(t))
            x = x + size * (reading.velocity + w / 2 * reading.score)
        return torch.cat((states, x[None])) if problem.save_trajectory else x[None]

    @abstractmethod
    def solve(self, problem: Problem) -> Tensor:
        """Return the states at plan.times (steps + 1, b, ...) if problem.save_trajectory, else the last (1, b, ...)."""


def diffusion_at(problem: Problem, t: float) -> float:
    """Return w(t) as a number, computed in float64."""
    import torch

    time = torch.tensor([t], dtype=torch.float64)
    return float(problem.diffusion.w(time, problem.field.interpolant.coefficients(time)))


def noise_left(interpolant: Interpolant, diffusion: Diffusion, last_step: LastStep, h: float) -> float:
    """Return the standard deviation of the noise that a last step of size h leaves in a sample of point-like data.

    At data d the state is alpha d + e with e of size sigma; the step multiplies e by
    1 + h d_sigma / sigma - h w / (2 sigma^2), the last term with `mean` only; `tweedie` removes it.
    """
    import torch

    if last_step == "tweedie":
        return 0.0
    t = torch.tensor([1 - h], dtype=torch.float64)
    c = interpolant.coefficients(t)
    factor = 1 + h * c.d_sigma / c.sigma
    if last_step == "mean":
        factor = factor - h * diffusion.w(t, c) / (2 * c.sigma.square())
    return float(c.sigma * factor.abs())


@final
@samplers.register("euler-maruyama")
class EulerMaruyama(SDESampler):
    """Euler-Maruyama through torchsde: x += h (v + w s / 2) + sqrt(w h) xi.  Weak order 1, one evaluation a step.

    torchsde integrates in step index, s = 0..N with steps of 1, and drift and diffusion are scaled by the spacing of the
    grid, so any grid is exact.  The Brownian increments are those of `sitkit.solvers.brownian.BrownianPath`.
    Source: SiT Algorithm 2.
    """

    order = 1
    nodes = (0.0,)

    def gaussian_step(self, h: float, start: GaussianNode, end: GaussianNode) -> tuple[Affine, float]:
        return start.drift.step(h), h * start.w

    def solve(self, problem: Problem) -> Tensor:
        import torch
        from torchsde import sdeint

        from sitkit.solvers.torchsde_grid import PathIncrements, StepIndexSDE

        steps = len(problem.plan.times) - 1
        ts = torch.arange(steps + 1.0) if problem.save_trajectory else torch.tensor([0.0, float(steps)])
        path = PathIncrements(problem.keys, problem.x, problem.plan.times)
        start = problem.x.flatten(1)
        states: Any = sdeint(StepIndexSDE(problem), start, ts, bm=path, method="euler", dt=1)
        states = states.unflatten(2, problem.x.shape[1:])
        return states if problem.save_trajectory else states[-1:]


@final
@samplers.register("stochastic-heun")
@dataclass(frozen=True)
class StochasticHeun(SDESampler):
    """Heun's method for the SDE: an Euler-Maruyama step, then the mean of drifts and of sqrt(w) at both ends.

    Weak order 2, two evaluations a step.

    w depends on t alone, so Ito and Stratonovich agree and Heun's method applies.
    """

    order: ClassVar[int] = 2
    nodes: ClassVar[tuple[float, ...]] = (0.0, 1.0)

    steps: int = 125

    def gaussian_step(self, h: float, start: GaussianNode, end: GaussianNode) -> tuple[Affine, float]:
        first = start.drift.step(h)
        second = end.drift.after(first)
        factor, shift = (1 + h / 2 * (start.drift.factor + second.factor), h / 2 * (start.drift.shift + second.shift))
        noise = h / 2 * end.drift.factor * start.w**0.5 + (start.w**0.5 + end.w**0.5) / 2
        return type(first)(factor, shift), h * noise**2

    def solve(self, problem: Problem) -> Tensor:
        import torch

        from sitkit.solvers.brownian import brownian_increments

        x, times = problem.x, problem.plan.times.tolist()
        increments = brownian_increments(problem.keys, x, problem.plan.times)
        states = [x]

        def drift(x: Tensor, t: float, w: float) -> Tensor:
            reading = problem.field.read(x, torch.tensor(t, dtype=x.dtype), problem.y)
            return reading.velocity + w / 2 * reading.score

        for t, after, step in zip(times[:-1], times[1:], increments, strict=True):
            h = after - t
            w, w_after = diffusion_at(problem, t), diffusion_at(problem, after)
            first = drift(x, t, w)
            second = drift(x + h * first + w**0.5 * step, after, w_after)
            x = x + h / 2 * (first + second) + (w**0.5 + w_after**0.5) / 2 * step
            if problem.save_trajectory:
                states.append(x)
        return torch.stack(states) if problem.save_trajectory else x[None]
