"""Samplers that solve the probability-flow ODE through torchdiffeq."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

from sitkit.registry import samplers
from sitkit.runtime.errors import require_at_least
from sitkit.solvers.sampler import Plan, Problem, Sampler, SolveSpec, evaluations, ode_interval
from sitkit.transport.timestep import Timestep, Uniform

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FixedStepODE(Sampler):
    """An explicit Runge-Kutta method for dx = v dt on a given grid, through torchdiffeq."""

    method: ClassVar[str]
    nodes: ClassVar[tuple[float, ...]]

    steps: int = 250
    grid: Timestep = Uniform()

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, steps=self.steps)

    def plan(self, spec: SolveSpec) -> Plan:
        from sitkit.transport import interval

        ends = ode_interval(self, spec)
        times = self.grid.grid(self.steps, ends.t0, ends.t1)
        interval.check_grid(spec.interpolant, spec.target, None, times)
        starts, sizes = times[:-1].tolist(), times.diff().tolist()
        evaluated = [t + node * h for t, h in zip(starts, sizes, strict=True) for node in self.nodes]
        return Plan(times, 0.0, evaluations(spec.guidance, evaluated), ends.notes)

    def integrate(self, problem: Problem) -> Tensor:
        times = problem.plan.times.to(problem.x)
        options = {"grid_constructor": lambda f, x, t: times}
        return odeint(problem, self.method, times if problem.save_trajectory else times[[0, -1]], options=options)


def odeint(problem: Problem, method: str, times: Tensor, **settings: Any) -> Tensor:
    """torchdiffeq's solution of dx = v dt at `times`, without the initial state unless every state is kept."""
    import torchdiffeq

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        return problem.field.read(x, t, problem.y).velocity

    states: Any = torchdiffeq.odeint(velocity, problem.x, times, method=method, **settings)
    return states if problem.save_trajectory else states[1:]


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
    couples_batch: ClassVar[bool] = True

    rtol: float = 1e-5
    atol: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.rtol > 0 and self.atol > 0):
            raise ValueError(f"rtol and atol must be positive; got {self.rtol:g} and {self.atol:g}.")

    def plan(self, spec: SolveSpec) -> Plan:
        import torch

        from sitkit.transport import interval

        ends = ode_interval(self, spec)
        times = torch.tensor([ends.t0, ends.t1], dtype=torch.float64)
        interval.check_grid(spec.interpolant, spec.target, None, times)
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
