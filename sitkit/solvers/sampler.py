"""Samplers: noise to data along the probability-flow ODE (torchdiffeq) or the SDE with the same marginals (torchsde).

`steps` are intervals, not grid points.  The wrapper of the network counts `nfe`.  The interval of a solve is derived
(`sitkit.transport.interval`); ends that the user sets are used or refused.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Self

from sitkit.registry import Component
from sitkit.runtime.errors import UserError
from sitkit.solvers.guidance import Guidance, Unguided, velocity_gains
from sitkit.transport.diffusion import Diffusion, Zero
from sitkit.transport.interpolant import Interpolant
from sitkit.transport.target import Target

if TYPE_CHECKING:
    from torch import Tensor

    from sitkit.solvers.moments import Moments
    from sitkit.transport.field import Field
    from sitkit.transport.interval import Interval


# A bound far above every use; a finer grid is a slip.
MOST_INTERVALS = 10**6


class Sample(NamedTuple):
    """The samples of a solve, and its cost.

    Args:
        x: (b, ...), the end states.
        nfe: network evaluations per sample.
        times: (steps + 1,) float64, the grid.
        trajectory: (steps + 1, b, ...), the states on the grid, and one more after a last step; None unless asked for.
    """

    x: Tensor
    nfe: int
    times: Tensor
    trajectory: Tensor | None = None


class Plan(NamedTuple):
    """The course of a solve, known before it begins.

    Args:
        times: (steps + 1,) float64, the grid.
        last_step: the size of the last step, which follows the grid; 0 if there is none.
        nfe: network evaluations per sample; None for an adaptive method.
        notes: why an end of the interval is not the natural end, and what the last step takes.
        spread_lost: the part of the median standard deviation of the data that the last step takes.
    """

    times: Tensor
    last_step: float
    nfe: int | None
    notes: tuple[str, ...] = ()
    spread_lost: float = 0.0


@dataclass(frozen=True)
class SolveSpec:
    """The problem that a sampler is to solve, without the network.

    Args:
        interpolant: the path.
        target: the quantity that the network predicts.
        diffusion: w(t) of the SDE; None is the sampler's default.
        guidance: the guidance; None is no guidance.
    """

    interpolant: Interpolant
    target: Target
    diffusion: Diffusion | None = None
    guidance: Guidance | None = None


@dataclass(frozen=True)
class Sampler(Component):
    """A way from noise to data.

    A subclass defines `plan` and `integrate`, and sets three class attributes.  `order` is the order of convergence.
    `stochastic` says whether it draws noise along the way.  `couples_batch` says whether a sample depends on the other
    samples of its batch, as with steps that an error estimate over the batch chooses.

    Args:
        t0: where to start; None derives it.
        t1: where to stop; None derives it.
        clip: "paper" takes the margins of SiT Table 10 in place of the derived margins wherever an end is singular: 1e-5
            for an ODE, 1e-3 for the start of an SDE.
        partial: whether a part of the path is wanted, as in editing: the noise is then the state at t0, and the samples are
            the states at t1, which no metric measures.  Otherwise a solve that does not lead from noise to data is refused.
    """

    order: ClassVar[int]
    stochastic: ClassVar[bool] = False
    couples_batch: ClassVar[bool] = False

    t0: float | None = field(default=None, kw_only=True)
    t1: float | None = field(default=None, kw_only=True)
    clip: Literal["derived", "paper"] = field(default="derived", kw_only=True)
    partial: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        low, high = self.t0 if self.t0 is not None else 0.0, self.t1 if self.t1 is not None else 1.0
        if not 0 <= low < high <= 1:
            raise ValueError(f"needs 0 <= t0 < t1 <= 1; got t0 = {low:g} and t1 = {high:g}.")

    @abstractmethod
    def plan(self, spec: SolveSpec) -> Plan:
        """Return the grid and the cost of a solve.  Raises UserError, with the reason, if its samples would be wrong."""

    def moments(self, spec: SolveSpec, plan: Plan) -> Moments | None:
        """Return the mean and the standard deviation that a plan gives N(0.7, 0.3^2); None without a closed form."""
        return None

    def without_derived(self, spec: SolveSpec, std: float | None) -> Self:
        """Return the sampler without the settings that it would derive to the same values.

        Args:
            spec: the problem.
            std: the median standard deviation of the data; None: not known.
        """
        return self

    def default_diffusion(self) -> Diffusion:
        """Return the w of a solve without a given w."""
        return Zero()

    @abstractmethod
    def integrate(self, problem: Problem) -> Tensor:
        """Return the states on the grid (steps + 1, b, ...) if problem.save_trajectory, else the end state (1, b, ...)."""

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
        """Integrate from noise to data.

        Args:
            field: the network with its interpolant and target.
            noise: (b, ...), the states at the start of the interval.  The samples have its dtype; half precision is solved
                in float32.
            y: (b,) int64, the labels; None is the null class.
            diffusion: w(t) of the SDE; by default `default_diffusion()`.
            guidance: the guidance; None is no guidance.
            seeds: (b,) integers, each of a Brownian path that depends neither on the batch nor on the number of steps; by
                default fresh ones from torch's global generator.
            trajectory: whether to keep the states on the grid.

        Returns:
            The samples and their cost.

        Raises:
            UserError: before any evaluation, if `plan` refuses the solve.
            WorkFailed: an adaptive solve cannot go on.

        Source: SiT Algorithms 1 and 2.
        """
        import torch

        from sitkit.transport.field import Counted

        plan = self.plan(SolveSpec(field.interpolant, field.target, diffusion, guidance))
        keys = keys_of(seeds, noise)
        # A state of half precision is solved in float32; the network takes it as before.
        dtype, half = noise.dtype, noise.dtype.itemsize < 4
        noise = noise.float() if half else noise
        counted = Counted(field.network, len(noise), dtype if half else None)
        gains = velocity_gains(field.interpolant, field.target)
        guided = field.through((guidance or Unguided()).guide(counted, field.null_class, gains))
        w = diffusion if diffusion is not None else self.default_diffusion()
        problem = Problem(guided, noise, guided.labels(y, noise), keys, plan, w, trajectory)
        with torch.no_grad():
            states = self.integrate(problem).to(dtype)
        return Sample(states[-1], counted.nfe, plan.times, states if trajectory else None)


class Problem(NamedTuple):
    """The integral that a sampler computes.

    Args:
        field: the guided field.
        x: (b, ...), the states at plan.times[0].
        y: (b,) int64, the labels.
        keys: (b,) int64, each of a Brownian path.
        plan: the plan of the solve.
        diffusion: w(t) of the SDE.
        save_trajectory: whether to return the states on the whole grid.
    """

    field: Field
    x: Tensor
    y: Tensor
    keys: Tensor
    plan: Plan
    diffusion: Diffusion
    save_trajectory: bool


def keys_of(seeds: Tensor | Sequence[int] | None, x: Tensor) -> Tensor:
    """Return the seeds as (b,) int64 on the device of x (b, ...); None is fresh ones from torch's global generator."""
    import torch

    if seeds is None:
        seeds = torch.randint(-(2**62), 2**62, (len(x),))
    return torch.as_tensor(seeds, dtype=torch.int64, device=x.device)


def ode_interval(sampler: Sampler, spec: SolveSpec) -> Interval:
    """Return where an ODE sampler starts and stops.  Raises UserError for a w other than 0."""
    from sitkit.transport import interval

    if spec.diffusion is not None and spec.diffusion.stochastic:
        raise UserError(
            f"sampler {sampler.name!r} solves the ODE, but diffusion {spec.diffusion.name!r} makes an SDE: use sampler "
            "'euler-maruyama' or 'stochastic-heun', or diffusion 'zero'."
        )
    return with_user_ends(sampler, interval.derive_interval(spec.interpolant, spec.target, None, steps=1), paper=1e-5)


def with_user_ends(sampler: Sampler, derived: Interval, *, paper: float) -> Interval:
    """Return the user's ends if given; else, for clip "paper", the margin `paper` at a singular end; else the derived ends."""
    t0, t1, why0, why1 = derived
    if sampler.clip == "paper":
        t0, t1 = (paper if why0 else t0), (1 - paper if why1 and t1 > 1 - 1e-2 else t1)
    return derived._replace(t0=t0 if sampler.t0 is None else sampler.t0, t1=t1 if sampler.t1 is None else sampler.t1)


def evaluations(guidance: Guidance | None, times: Sequence[float]) -> int:
    """Return the network evaluations per sample of one guided evaluation at each of the times."""
    return sum((guidance or Unguided()).evaluations(t) for t in times)


def stage_times(times: Tensor, nodes: Sequence[float]) -> list[float]:
    """Return the times of all evaluations on a grid, with evaluations at the nodes (0: start, 1: end) of each step."""
    starts, sizes = times[:-1].tolist(), times.diff().tolist()
    return [t + node * h for t, h in zip(starts, sizes, strict=True) for node in nodes]
