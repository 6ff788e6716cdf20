"""Samplers that solve the probability-flow ODE through torchdiffeq."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias, final

from sitkit.registry import samplers
from sitkit.runtime.errors import require_at_least
from sitkit.solvers.sampler import Plan, Problem, Sampler, SolveSpec, evaluations, ode_interval
from sitkit.transport.timestep import Timestep, Uniform

if TYPE_CHECKING:
    from torch import Tensor


# A state of several tensors that move together, and its rate of change (t, state) -> d state / dt.
State: TypeAlias = "tuple[Tensor, ...]"
Slope: TypeAlias = "Callable[[Tensor, State], State]"


class Tableau(NamedTuple):
    """The Butcher tableau of an explicit Runge-Kutta method.

    A step of size h evaluates k_i = v(x + h sum_j a_ij k_j, t + c_i h) for each stage i and ends at x + h sum_i b_i k_i.

    Args:
        c: where each stage lies in a step, from 0 (its start) to 1 (its end).  The planned cost follows from it.
        a: for each stage the weights of the stages before it: no weight for the first, one for the second, ...
        b: the weights of the stages in the step.  They sum to 1.
    """

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]

    def steps(self, slope: Slope, state: State, times: Tensor) -> Iterator[State]:
        """Yield the states at the times (n,), of which the first is `state`."""
        yield state
        for t, after in pairwise(times):
            h, slopes = after - t, []
            for c, row in zip(self.c, self.a, strict=True):
                slopes.append(slope(t + c * h, _advance(state, h, row, slopes)))
            state = _advance(state, h, self.b, slopes)
            yield state


def _advance(state: State, h: Tensor, weights: tuple[float, ...], slopes: list[State]) -> State:
    """x + h sum_i weights_i slopes_i for each tensor x of a state."""
    return tuple(
        x + h * sum(w * slope for w, slope in zip(weights, of_x, strict=True))
        for x, *of_x in zip(state, *slopes, strict=True)
    )


@dataclass(frozen=True)
class ODESampler(Sampler):
    """A sampler of dx = v dt, which can integrate other quantities along with x."""

    @abstractmethod
    def solve(self, slope: Slope, start: State, times: Tensor, *, every: bool = False) -> State:
        """The states at the times (n,), each tensor (n, ...); with `every` False the last alone, each (1, ...).

        times: the ends of the solve, or the grid of a fixed-step method; increasing or decreasing.
        """

    def integrate(self, problem: Problem) -> Tensor:
        def slope(t: Tensor, state: State) -> State:
            return (problem.field.read(state[0], t, problem.y).velocity,)

        times = problem.plan.times.to(problem.x)
        return self.solve(slope, (problem.x,), times, every=problem.save_trajectory)[0]


@dataclass(frozen=True)
class FixedStepODE(ODESampler):
    """An explicit Runge-Kutta method for the probability-flow ODE dx = v dt on a given grid.

    A subclass sets `order` and `tableau`.  One that torchdiffeq has too sets `method`, torchdiffeq's name of it, and is
    solved by torchdiffeq; "" is stepped by the tableau.

    Args:
        steps: how many steps the grid has.
        grid: where the steps lie; uniform by default.
    """

    method: ClassVar[str] = ""
    tableau: ClassVar[Tableau]

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
        evaluated = [t + c * h for t, h in zip(starts, sizes, strict=True) for c in self.tableau.c]
        return Plan(times, 0.0, evaluations(spec.guidance, evaluated), ends.notes)

    def solve(self, slope: Slope, start: State, times: Tensor, *, every: bool = False) -> State:
        if self.method:
            return odeint(
                slope, start, times, every, method=self.method, options={"grid_constructor": lambda *_: times}
            )
        import torch

        states = deque(self.tableau.steps(slope, start, times), maxlen=None if every else 1)
        return tuple(torch.stack(values) for values in zip(*states, strict=True))


def odeint(slope: Slope, start: State, times: Tensor, every: bool, **settings: Any) -> State:
    """torchdiffeq's states at every time, or at the last one alone."""
    import torchdiffeq

    states: Any = torchdiffeq.odeint(slope, start, times if every else times[[0, -1]], **settings)
    return states if every else tuple(values[1:] for values in states)


@final
@samplers.register("euler")
@dataclass(frozen=True)
class Euler(FixedStepODE):
    """x += h v(x, t).  Order 1, one evaluation a step."""

    order: ClassVar[int] = 1
    method: ClassVar[str] = "euler"
    tableau: ClassVar[Tableau] = Tableau(c=(0.0,), a=((),), b=(1.0,))


@final
@samplers.register("midpoint")
@dataclass(frozen=True)
class Midpoint(FixedStepODE):
    """x += h v(x + h v / 2, t + h / 2).  Order 2, two evaluations a step."""

    order: ClassVar[int] = 2
    method: ClassVar[str] = "midpoint"
    tableau: ClassVar[Tableau] = Tableau(c=(0.0, 0.5), a=((), (0.5,)), b=(0.0, 1.0))

    steps: int = 125


@final
@samplers.register("heun")
@dataclass(frozen=True)
class Heun(FixedStepODE):
    """The mean of the velocities at both ends of an Euler step.  Order 2, two evaluations a step (SiT's ODE sampler)."""

    order: ClassVar[int] = 2
    method: ClassVar[str] = "heun2"
    tableau: ClassVar[Tableau] = Tableau(c=(0.0, 1.0), a=((), (1.0,)), b=(0.5, 0.5))

    steps: int = 125


@final
@samplers.register("rk4")
@dataclass(frozen=True)
class RK4(FixedStepODE):
    """Kutta's 3/8 rule, as torchdiffeq has it.  Order 4, four evaluations a step."""

    order: ClassVar[int] = 4
    method: ClassVar[str] = "rk4"
    tableau: ClassVar[Tableau] = Tableau(
        c=(0.0, 1 / 3, 2 / 3, 1.0),
        a=((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
        b=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
    )

    steps: int = 62


@dataclass(frozen=True)
class AdaptiveODE(ODESampler):
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

    def solve(self, slope: Slope, start: State, times: Tensor, *, every: bool = False) -> State:
        # Without step_t the last step would overshoot t1, where the field may not exist, and interpolate back.
        options = {"step_t": times, "norm": worst_sample}
        return odeint(slope, start, times, every, method=self.method, rtol=self.rtol, atol=self.atol, options=options)


def worst_sample(state: State) -> Tensor:
    """The largest error over the batch: of (b, ...) the root mean square of each sample, of (b,) the size of each number."""
    errors = [x.flatten(1).square().mean(1).sqrt().max() if x.ndim > 1 else x.abs().max() for x in state]
    return errors[0] if len(errors) == 1 else errors[0].maximum(errors[1])


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
