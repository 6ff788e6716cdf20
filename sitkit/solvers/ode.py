"""Samplers that solve the probability-flow ODE through torchdiffeq."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias, final

from sitkit.registry import samplers
from sitkit.runtime.errors import WorkFailed, require_positive, require_within
from sitkit.solvers.sampler import (
    MOST_INTERVALS,
    Plan,
    Problem,
    Sampler,
    SolveSpec,
    evaluations,
    ode_interval,
    stage_times,
)
from sitkit.transport.timestep import Timestep, Uniform

if TYPE_CHECKING:
    from torch import Tensor

    from sitkit.solvers.moments import Moments


# A state of several tensors that move together, and its rate of change (t, state) -> d state / dt.
State: TypeAlias = "tuple[Tensor, ...]"
Slope: TypeAlias = "Callable[[Tensor, State], State]"


class Tableau(NamedTuple):
    """The Butcher tableau of an explicit Runge-Kutta method.

    A step of size h evaluates k_i = v(x + h sum_j a_ij k_j, t + c_i h) for each stage i and ends at x + h sum_i b_i k_i.

    Args:
        c: the place of each stage in a step, from 0 (its start) to 1 (its end).  The planned cost follows from it.
        a: for each stage the weights of the stages before it: none for the first stage, one for the second, and so on.
        b: the weights of the stages in the step.  They sum to 1.

    Source: Butcher 1964; Hairer, Norsett and Wanner 1993, section II.1.
    """

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]

    def steps(self, slope: Slope, state: State, times: Tensor) -> Iterator[State]:
        """Step over a grid.

        Args:
            slope: the rate of change (t, state) -> d state / dt.
            state: the state at the first time.
            times: (n,), increasing or decreasing.

        Yields:
            The state at each of the times, the first included.
        """
        yield state
        for t, after in pairwise(times):
            h, slopes = after - t, []
            for c, row in zip(self.c, self.a, strict=True):
                slopes.append(slope(t + c * h, _advance(state, h, row, slopes)))
            state = _advance(state, h, self.b, slopes)
            yield state


def _advance(state: State, h: Tensor, weights: tuple[float, ...], slopes: list[State]) -> State:
    """Return x + h sum_i weights_i slopes_i for each tensor x of a state."""
    return tuple(
        x + h * sum(w * slope for w, slope in zip(weights, of_x, strict=True))
        for x, *of_x in zip(state, *slopes, strict=True)
    )


@dataclass(frozen=True)
class ODESampler(Sampler):
    """A sampler of dx = v dt, which can integrate other quantities beside x."""

    @abstractmethod
    def solve(self, slope: Slope, start: State, times: Tensor, *, every: bool = False) -> State:
        """Integrate a state over a grid.

        Args:
            slope: the rate of change (t, state) -> d state / dt.
            start: the state at the first time.
            times: (n,), the ends of the solve, or the grid of a fixed-step method; increasing or decreasing.
            every: whether to return the states at all times.

        Returns:
            The states, each tensor (n, ...) at all times, or (1, ...) at the last time.
        """

    def integrate(self, problem: Problem) -> Tensor:
        def slope(t: Tensor, state: State) -> State:
            return (problem.field.read(state[0], t, problem.y).velocity,)

        times = problem.plan.times.to(problem.x)
        return self.solve(slope, (problem.x,), times, every=problem.save_trajectory)[0]


@dataclass(frozen=True)
class FixedStepODE(ODESampler):
    """An explicit Runge-Kutta method for the probability-flow ODE dx = v dt on a given grid.

    A subclass sets `order` and `tableau`, and with them its steps.  The built-in methods also set `method`, torchdiffeq's
    name of the method: torchdiffeq then makes the steps, and a test holds both to the same result.

    Args:
        steps: the number of steps; by default 250 divided by the evaluations per step.
        grid: the places of the steps; equal steps by default.

    Source: SiT Algorithm 1, for Heun's method.
    """

    method: ClassVar[str] = ""
    tableau: ClassVar[Tableau]

    steps: int = 250
    grid: Timestep = Uniform()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not hasattr(self, "tableau"):
            raise ValueError(f"{type(self).__name__} sets no tableau: give its Butcher tableau, a sitkit.Tableau.")
        require_within(1, MOST_INTERVALS, steps=self.steps)

    def plan(self, spec: SolveSpec) -> Plan:
        from sitkit.solvers.moments import require_moments
        from sitkit.transport import interval

        ends = ode_interval(self, spec)
        times = self.grid.grid(self.steps, ends.t0, ends.t1)
        interval.check_grid(spec.interpolant, spec.target, None, times)
        nfe = evaluations(spec.guidance, stage_times(times, self.tableau.c))
        return require_moments(self, spec, Plan(times, 0.0, nfe, ends.notes))

    def moments(self, spec: SolveSpec, plan: Plan) -> Moments | None:
        from sitkit.solvers.moments import moments_of_tableau

        # A subclass may make other steps than its tableau's.
        own = type(self).integrate is not ODESampler.integrate or type(self).solve is not FixedStepODE.solve
        return None if own else moments_of_tableau(self.tableau, spec.interpolant, plan.times)

    def solve(self, slope: Slope, start: State, times: Tensor, *, every: bool = False) -> State:
        """Integrate a state over a grid, by torchdiffeq's `method` if there is one, else by the tableau.

        Args:
            slope: the rate of change (t, state) -> d state / dt.
            start: the state at the first time.
            times: (n,), the grid; increasing or decreasing.
            every: whether to return the states at all times.

        Returns:
            The states, each tensor (n, ...) at all times, or (1, ...) at the last time.
        """
        if self.method:
            return odeint(
                slope, start, times, every, method=self.method, options={"grid_constructor": lambda *_: times}
            )
        import torch

        states = deque(self.tableau.steps(slope, start, times), maxlen=None if every else 1)
        return tuple(torch.stack(values) for values in zip(*states, strict=True))


def odeint(slope: Slope, start: State, times: Tensor, every: bool, **settings: Any) -> State:
    """Return torchdiffeq's states at every time, or at the last time alone."""
    import torchdiffeq

    states: Any = torchdiffeq.odeint(slope, start, times if every else times[[0, -1]], **settings)
    return states if every else tuple(values[1:] for values in states)


@final
@samplers.register("euler")
class Euler(FixedStepODE):
    """Euler's method: x += h v(x, t).  Order 1, one evaluation a step."""

    order = 1
    method = "euler"
    tableau = Tableau(c=(0.0,), a=((),), b=(1.0,))


@dataclass(frozen=True)
class TwoStages(FixedStepODE):
    """A method of order 2 with two evaluations a step: by default half as many steps."""

    order: ClassVar[int] = 2

    steps: int = 125


@final
@samplers.register("midpoint")
class Midpoint(TwoStages):
    """The midpoint rule: x += h v(x + h v / 2, t + h / 2).  Order 2, two evaluations a step."""

    method = "midpoint"
    tableau = Tableau(c=(0.0, 1 / 2), a=((), (1 / 2,)), b=(0.0, 1.0))


@final
@samplers.register("heun")
class Heun(TwoStages):
    """The mean of the velocities at both ends of an Euler step.  Order 2, two evaluations a step (SiT's ODE sampler)."""

    method = "heun2"
    tableau = Tableau(c=(0.0, 1.0), a=((), (1.0,)), b=(1 / 2, 1 / 2))


@final
@samplers.register("rk4")
@dataclass(frozen=True)
class RK4(FixedStepODE):
    """Kutta's 3/8 rule, which is torchdiffeq's `rk4`.  Order 4, four evaluations a step."""

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
    """An embedded Runge-Kutta pair for dx = v dt with adaptive steps, through torchdiffeq.

    The error is the largest over the batch of each sample's root mean square, so steps are as small as the hardest
    sample needs, and a sample depends slightly (within the tolerance) on its batch.

    Args:
        rtol: the relative tolerance of a step's error.
        atol: the absolute tolerance.
        max_nfe: the largest number of evaluations of the velocity, a guided one counted once.  A trained network takes some
            hundreds at the default tolerances.
    """

    method: ClassVar[str]
    couples_batch: ClassVar[bool] = True

    rtol: float = 1e-5
    atol: float = 1e-5
    max_nfe: int = 20_000

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(rtol=self.rtol, atol=self.atol)
        require_within(1, 10**12, max_nfe=self.max_nfe)

    def plan(self, spec: SolveSpec) -> Plan:
        import torch

        from sitkit.solvers.moments import require_moments
        from sitkit.transport import interval

        ends = ode_interval(self, spec)
        times = torch.tensor([ends.t0, ends.t1], dtype=torch.float64)
        interval.check_grid(spec.interpolant, spec.target, None, times)
        return require_moments(self, spec, Plan(times, 0.0, None, ends.notes))

    def solve(self, slope: Slope, start: State, times: Tensor, *, every: bool = False) -> State:
        # Without step_t the last step would overshoot t1, where the field may not exist, and interpolate back.
        options = {"step_t": times, "norm": worst_sample}
        # Tensors, so that a device is not waited for.
        spent: list[Tensor] = []

        def counted(t: Tensor, state: State) -> State:
            if len(spent) == self.max_nfe:
                raise self._failed(spent, "that is max_nfe, so the field is too stiff or the tolerances are too small")
            spent.append(t)
            return slope(t, state)

        try:
            return odeint(
                counted, start, times, every, method=self.method, rtol=self.rtol, atol=self.atol, options=options
            )
        except AssertionError as error:
            # torchdiffeq's own words on a step of size 0 and on a state that is not finite.  A first velocity that is not
            # finite makes the size of the first step NaN.
            unbounded = "finite" in str(error) or not bool(spent[-1].isfinite())
            raise self._failed(
                spent, f"its {'states are not finite' if unbounded else 'step size fell to 0'}"
            ) from None

    def _failed(self, spent: list[Tensor], reason: str) -> WorkFailed:
        # The newest evaluations are the stages of one step.
        newest = [t for t in map(float, spent[-self.order :]) if math.isfinite(t)]
        return WorkFailed(
            f"sampler {self.name!r} cannot go on at t = {newest[-1]:.6g} (step size {max(newest) - min(newest):.3g}, "
            f"{len(spent)} evaluations): {reason}. Use a sampler of fixed steps, as 'heun', or other weights."
        )


def worst_sample(state: State) -> Tensor:
    """Return the largest error over a batch: root mean squares of (b, ...) per sample, absolute values of (n,)."""
    import torch

    errors = [x.flatten(1).square().mean(1).sqrt().max() if x.ndim > 1 else x.abs().max() for x in state]
    return functools.reduce(torch.maximum, errors)


@final
@samplers.register("dopri5")
class Dopri5(AdaptiveODE):
    """Dormand and Prince's pair of orders 5 and 4, adaptive."""

    order = 5
    method = "dopri5"


@final
@samplers.register("dopri8")
class Dopri8(AdaptiveODE):
    """Dormand and Prince's pair of orders 8 and 7, adaptive."""

    order = 8
    method = "dopri8"
