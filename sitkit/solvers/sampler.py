"""Samplers: noise to data along the probability-flow ODE (torchdiffeq) or the SDE with the same marginals (torchsde).

`steps` are intervals, never grid points; `nfe` is counted by the network's wrapper, never inferred.  The span of a solve
is derived (`sitkit.transport.interval`); what the user sets is used or refused.  Only the end state is kept unless a trajectory is
asked for.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, final

from sitkit.registry import Component, samplers
from sitkit.runtime.errors import UserError
from sitkit.solvers.guidance import Guidance, Unguided, velocity_gains
from sitkit.transport.diffusion import Diffusion, Sigma, Zero
from sitkit.transport.interpolant import Interpolant
from sitkit.transport.target import Target
from sitkit.transport.timestep import Timestep, Uniform

if TYPE_CHECKING:
    from torch import Tensor

    from sitkit.transport.field import Field
    from sitkit.transport.interval import Span


class Sample(NamedTuple):
    """The end state x (b, ...), the evaluations spent per sample, the grid, and the states on it if asked for."""

    x: Tensor
    nfe: int
    times: Tensor
    trajectory: Tensor | None = None


class Plan(NamedTuple):
    """What a solve will do, known before it: its grid (float64), last step, evaluations (None if adaptive), remarks."""

    times: Tensor
    last_step: float
    nfe: int | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sampler(Component):
    """A way from noise to data.

    t0, t1: where to start and stop; unset, they are derived.  clip "paper" takes the margins of SiT Table 10 instead of
    the derived ones wherever an end is singular: 1e-5 for an ODE, 1e-3 for an SDE's start.
    """

    order: ClassVar[int]
    stochastic: ClassVar[bool] = False

    t0: float | None = field(default=None, kw_only=True)
    t1: float | None = field(default=None, kw_only=True)
    clip: Literal["derived", "paper"] = field(default="derived", kw_only=True)

    def __post_init__(self) -> None:
        low, high = self.t0 if self.t0 is not None else 0.0, self.t1 if self.t1 is not None else 1.0
        if not 0 <= low < high <= 1:
            raise ValueError(f"needs 0 <= t0 < t1 <= 1; got t0 = {low:g} and t1 = {high:g}.")

    @abstractmethod
    def plan(
        self,
        interpolant: Interpolant,
        target: Target,
        diffusion: Diffusion | None = None,
        guidance: Guidance | None = None,
    ) -> Plan:
        """The grid and cost of a solve; UserError, with the reason, where it could not give right samples."""

    def default_diffusion(self) -> Diffusion:
        """The w of a solve for which none is given."""
        return Zero()

    @abstractmethod
    def integrate(self, problem: Problem) -> Tensor:
        """The states on the grid (steps + 1, b, ...) if problem.keep, else the end state alone as (1, b, ...)."""

    def sample(
        self,
        field: Field,
        noise: Tensor,
        y: Tensor | None = None,
        *,
        diffusion: Diffusion | None = None,
        guidance: Guidance | None = None,
        seeds: Tensor | Sequence[int] | None = None,
        trajectory: bool = False,
    ) -> Sample:
        """Integrate from noise (b, ...) at the span's start to data.

        y: (b,) int64 labels, None for the null class.  diffusion: w(t), by default `default_diffusion()`.  seeds: (b,)
        integers, one Brownian path each whatever the batch or the number of steps; by default fresh ones from torch's
        global generator.  Raises UserError before any evaluation where `plan` does.
        """
        import torch

        from sitkit.transport.field import Counted

        plan = self.plan(field.interpolant, field.target, diffusion, guidance)
        if seeds is None:
            seeds = torch.randint(-(2**62), 2**62, (len(noise),))
        keys = torch.as_tensor(seeds, dtype=torch.int64, device=noise.device)
        counted = Counted(field.network, len(noise))
        gains = velocity_gains(field.interpolant, field.target)
        guided = field.through((guidance or Unguided()).guide(counted, field.null_class, gains))
        w = diffusion if diffusion is not None else self.default_diffusion()
        problem = Problem(guided, noise, guided.labels(y, noise), keys, plan, w, trajectory)
        with torch.no_grad():
            states = self.integrate(problem)
        return Sample(states[-1], counted.nfe, plan.times, states if trajectory else None)


class Problem(NamedTuple):
    """What a sampler integrates: the guided field from x at plan.times[0], one Brownian path for each key."""

    field: Field
    x: Tensor
    y: Tensor
    keys: Tensor
    plan: Plan
    diffusion: Diffusion
    keep: bool


def at_least(name: str, value: float, least: float) -> None:
    """ValueError unless value >= least."""
    if not value >= least:
        raise ValueError(f"{name} must be at least {least:g}; got {value:g}.")


def ode_span(sampler: Sampler, interpolant: Interpolant, target: Target, diffusion: Diffusion | None) -> Span:
    """Where an ODE sampler starts and stops; UserError if it is given a w."""
    from sitkit.transport import interval

    if diffusion is not None and not isinstance(diffusion, Zero):
        raise UserError(
            f"sampler {sampler.name!r} solves the ODE, but diffusion {diffusion.name!r} makes an SDE: use sampler "
            "'euler-maruyama' or 'stochastic-heun', or diffusion 'zero'."
        )
    return chosen(sampler, interval.derive(interpolant, target, None, steps=1), paper=1e-5)


def chosen(sampler: Sampler, derived: Span, *, paper: float) -> Span:
    """The user's ends where given, the paper's margin where asked for and the end is singular, else the derived ones."""
    t0, t1, why0, why1 = derived
    if sampler.clip == "paper":
        t0, t1 = (paper if why0 else t0), (1 - paper if why1 and t1 > 1 - 1e-2 else t1)
    return derived._replace(
        t0=t0 if sampler.t0 is None else sampler.t0, t1=t1 if sampler.t1 is None else sampler.t1, why0=why0, why1=why1
    )


@dataclass(frozen=True)
class FixedStepODE(Sampler):
    """An explicit Runge-Kutta method for dx = v dt on a given grid, through torchdiffeq."""

    method: ClassVar[str]
    nodes: ClassVar[tuple[float, ...]]

    steps: int = 250
    grid: Timestep = Uniform()

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("steps", self.steps, 1)

    def plan(
        self,
        interpolant: Interpolant,
        target: Target,
        diffusion: Diffusion | None = None,
        guidance: Guidance | None = None,
    ) -> Plan:
        from sitkit.transport import interval

        ends = ode_span(self, interpolant, target, diffusion)
        times = self.grid.grid(self.steps, ends.t0, ends.t1)
        interval.check_grid(interpolant, target, None, times)
        starts, sizes = times[:-1].tolist(), times.diff().tolist()
        evaluated = [t + node * h for t, h in zip(starts, sizes, strict=True) for node in self.nodes]
        return Plan(times, 0.0, evaluations(guidance, evaluated), ends.notes)

    def integrate(self, problem: Problem) -> Tensor:
        times = problem.plan.times.to(problem.x)
        options = {"grid_constructor": lambda f, x, t: times}
        return odeint(problem, self.method, times if problem.keep else times[[0, -1]], options=options)


def evaluations(guidance: Guidance | None, times: Sequence[float]) -> int:
    """Network evaluations per sample of one guided evaluation at each of the times."""
    return sum((guidance or Unguided()).evaluations(t) for t in times)


def odeint(problem: Problem, method: str, times: Tensor, **settings: Any) -> Tensor:
    """torchdiffeq's solution of dx = v dt at `times`, without the initial state unless every state is kept."""
    import torchdiffeq

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        return problem.field.read(x, t, problem.y).velocity

    states: Any = torchdiffeq.odeint(velocity, problem.x, times, method=method, **settings)
    return states if problem.keep else states[1:]


@final
@samplers.register("euler")
@dataclass(frozen=True)
class Euler(FixedStepODE):
    """x += h v(x, t).  Order 1, one evaluation a step."""

    order: ClassVar[int] = 1
    method: ClassVar[str] = "euler"
    nodes: ClassVar[tuple[float, ...]] = (0.0,)


@final
@samplers.register("midpoint")
@dataclass(frozen=True)
class Midpoint(FixedStepODE):
    """x += h v(x + h v / 2, t + h / 2).  Order 2, two evaluations a step."""

    order: ClassVar[int] = 2
    method: ClassVar[str] = "midpoint"
    nodes: ClassVar[tuple[float, ...]] = (0.0, 0.5)

    steps: int = 125


@final
@samplers.register("heun")
@dataclass(frozen=True)
class Heun(FixedStepODE):
    """The mean of the velocities at both ends of an Euler step.  Order 2, two evaluations a step (SiT's ODE sampler)."""

    order: ClassVar[int] = 2
    method: ClassVar[str] = "heun2"
    nodes: ClassVar[tuple[float, ...]] = (0.0, 1.0)

    steps: int = 125


@final
@samplers.register("rk4")
@dataclass(frozen=True)
class RK4(FixedStepODE):
    """Kutta's 3/8 rule, as torchdiffeq has it.  Order 4, four evaluations a step."""

    order: ClassVar[int] = 4
    method: ClassVar[str] = "rk4"
    nodes: ClassVar[tuple[float, ...]] = (0.0, 1 / 3, 2 / 3, 1.0)

    steps: int = 62


@dataclass(frozen=True)
class AdaptiveODE(Sampler):
    """An embedded Runge-Kutta pair for dx = v dt, through torchdiffeq.

    The error is the largest over the batch of each sample's root mean square, so steps are as small as the hardest
    sample needs, and a sample depends slightly (within the tolerance) on its batch.
    """

    method: ClassVar[str]

    rtol: float = 1e-5
    atol: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.rtol > 0 and self.atol > 0):
            raise ValueError(f"rtol and atol must be positive; got {self.rtol:g} and {self.atol:g}.")

    def plan(
        self,
        interpolant: Interpolant,
        target: Target,
        diffusion: Diffusion | None = None,
        guidance: Guidance | None = None,
    ) -> Plan:
        import torch

        from sitkit.transport import interval

        ends = ode_span(self, interpolant, target, diffusion)
        times = torch.tensor([ends.t0, ends.t1], dtype=torch.float64)
        interval.check_grid(interpolant, target, None, times)
        return Plan(times, 0.0, None, ends.notes)

    def integrate(self, problem: Problem) -> Tensor:
        times = problem.plan.times.to(problem.x)
        # Without step_t the last step would overshoot t1, where the field may not exist, and interpolate back.
        options = {"step_t": times, "norm": worst_sample}
        return odeint(problem, self.method, times, rtol=self.rtol, atol=self.atol, options=options)


def worst_sample(x: Tensor) -> Tensor:
    """The largest root mean square over the samples of (b, ...)."""
    return x.flatten(1).square().mean(1).sqrt().max() if x.ndim > 1 else x.abs().max()


@final
@samplers.register("dopri5")
@dataclass(frozen=True)
class Dopri5(AdaptiveODE):
    """Dormand and Prince's pair of orders 5 and 4, adaptive."""

    order: ClassVar[int] = 5
    method: ClassVar[str] = "dopri5"


@final
@samplers.register("dopri8")
@dataclass(frozen=True)
class Dopri8(AdaptiveODE):
    """Dormand and Prince's pair of orders 8 and 7, adaptive."""

    order: ClassVar[int] = 8
    method: ClassVar[str] = "dopri8"


LastStep = Literal["none", "mean", "euler", "tweedie"]


@dataclass(frozen=True)
class SDESampler(Sampler):
    """dX = (v + w s / 2) dt + sqrt(w) dW on a given grid, then one last step without noise (SiT Algorithm 2).

    The solve stops at 1 - last_step_size and one more evaluation there ends it: `mean` (the drift), `euler` (the
    velocity), `tweedie` (the data reading), or `none`, which goes as far as explicit steps are stable.  The last step is
    one of `steps`.  A last step that would leave noise of standard deviation above 0.07 in data of scale 1 is refused,
    unless `accept_bias` says that the published setting is wanted as it is.
    """

    stochastic: ClassVar[bool] = True
    nodes: ClassVar[tuple[float, ...]]

    steps: int = 250
    grid: Timestep = Uniform()
    last_step: LastStep = "mean"
    last_step_size: float = 0.04
    accept_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("steps", self.steps, 1 if self.last_step == "none" else 2)
        if not 0 < self.last_step_size < 1:
            raise ValueError(f"last_step_size must lie in (0, 1); got {self.last_step_size:g}.")
        if self.t1 is not None and self.last_step != "none":
            raise ValueError("t1 is 1 - last_step_size; set that, or last_step 'none' with t1.")

    def default_diffusion(self) -> Diffusion:
        return Sigma()

    def plan(
        self,
        interpolant: Interpolant,
        target: Target,
        diffusion: Diffusion | None = None,
        guidance: Guidance | None = None,
    ) -> Plan:
        from sitkit.transport import interval

        diffusion = Sigma() if diffusion is None else diffusion
        size = 0.0 if self.last_step == "none" else self.last_step_size
        steps = self.steps - (size > 0)
        end = 1 - size if self.t1 is None else self.t1
        ends = chosen(self, interval.derive(interpolant, target, diffusion, steps=steps, end=end), paper=1e-3)
        times = self.grid.grid(steps, ends.t0, ends.t1)
        interval.check_grid(interpolant, target, diffusion, times)
        if size and not self.accept_bias:
            left = noise_left(interpolant, diffusion, self.last_step, size)
            if left > interval.LEFT_BY_LAST_STEP:
                raise UserError(
                    f"last_step {self.last_step!r} of {size:g} with diffusion {diffusion.name!r} on {interpolant.name!r} "
                    f"leaves noise of {left:.2g} in the samples: use last_step 'tweedie', a smaller last_step_size, or "
                    "accept_bias to run it as published."
                )
        starts, sizes = times[:-1].tolist(), times.diff().tolist()
        evaluated = [t + node * h for t, h in zip(starts, sizes, strict=True) for node in self.nodes]
        evaluated += [float(times[-1])] if size else []
        return Plan(times, size, evaluations(guidance, evaluated), ends.notes)

    def integrate(self, problem: Problem) -> Tensor:
        import torch

        states = self.walk(problem)
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
        return torch.cat((states, x[None])) if problem.keep else x[None]

    @abstractmethod
    def walk(self, problem: Problem) -> Tensor:
        """The states at plan.times (steps + 1, b, ...) if problem.keep, else the last as (1, b, ...)."""


def diffusion_at(problem: Problem, t: float) -> float:
    """w(t) as a number, computed in float64."""
    import torch

    time = torch.tensor([t], dtype=torch.float64)
    return float(problem.diffusion.w(time, problem.field.interpolant.coefficients(time)))


def noise_left(interpolant: Interpolant, diffusion: Diffusion, last_step: LastStep, h: float) -> float:
    """Standard deviation of the noise that a last step of size h leaves in a sample of point-like data.

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
@dataclass(frozen=True)
class EulerMaruyama(SDESampler):
    """x += h (v + w s / 2) + sqrt(w h) xi, through torchsde.  Weak order 1, one evaluation a step (SiT Algorithm 2).

    torchsde integrates in step index, s = 0..N with steps of 1 and drift and diffusion scaled by the grid's spacing, so
    that any grid is exact; the Brownian increments are those of `sitkit.runtime.rng.BrownianPath`.
    """

    order: ClassVar[int] = 1
    nodes: ClassVar[tuple[float, ...]] = (0.0,)

    def walk(self, problem: Problem) -> Tensor:
        import torch
        from torchsde import sdeint

        from sitkit.solvers.torchsde_grid import PathIncrements, StepIndexSDE

        steps = len(problem.plan.times) - 1
        ts = torch.arange(steps + 1.0) if problem.keep else torch.tensor([0.0, float(steps)])
        path = PathIncrements(problem.keys, problem.x, problem.plan.times)
        start = problem.x.flatten(1)
        states: Any = sdeint(StepIndexSDE(problem), start, ts, bm=path, method="euler", dt=1)
        states = states.unflatten(2, problem.x.shape[1:])
        return states if problem.keep else states[-1:]


@final
@samplers.register("stochastic-heun")
@dataclass(frozen=True)
class StochasticHeun(SDESampler):
    """Euler-Maruyama's step, then the mean of drifts and of sqrt(w) at both ends.  Weak order 2, two evaluations a step.

    w depends on t alone, so Ito and Stratonovich agree and Heun's method applies.
    """

    order: ClassVar[int] = 2
    nodes: ClassVar[tuple[float, ...]] = (0.0, 1.0)

    steps: int = 125

    def walk(self, problem: Problem) -> Tensor:
        import torch

        from sitkit.runtime.rng import path_on

        x, times = problem.x, problem.plan.times.tolist()
        path = path_on(problem.keys, x.flatten(1), problem.plan.times)
        states, before = [x], path(times[0])

        def drift(x: Tensor, t: float, w: float) -> Tensor:
            reading = problem.field.read(x, torch.tensor(t, dtype=x.dtype), problem.y)
            return reading.velocity + w / 2 * reading.score

        for t, after in zip(times[:-1], times[1:], strict=True):
            h, value = after - t, path(after)
            w, w_after = diffusion_at(problem, t), diffusion_at(problem, after)
            step, before = (value - before).view_as(x), value
            first = drift(x, t, w)
            second = drift(x + h * first + w**0.5 * step, after, w_after)
            x = x + h / 2 * (first + second) + (w**0.5 + w_after**0.5) / 2 * step
            if problem.keep:
                states.append(x)
        return torch.stack(states) if problem.keep else x[None]
