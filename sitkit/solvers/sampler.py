"""Samplers: noise to data along the probability-flow ODE (torchdiffeq) or the SDE with the same marginals (torchsde).

`steps` are intervals, never grid points; `nfe` is counted by the network's wrapper, never inferred.  The span of a solve
is derived (`sitkit.transport.interval`); what the user sets is used or refused.  Only the end state is kept unless a trajectory is
asked for.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from sitkit.registry import Component
from sitkit.runtime.errors import UserError
from sitkit.solvers.guidance import Guidance, Unguided, velocity_gains
from sitkit.transport.diffusion import Diffusion, Zero
from sitkit.transport.interpolant import Interpolant
from sitkit.transport.target import Target

if TYPE_CHECKING:
    from torch import Tensor

    from sitkit.transport.field import Field
    from sitkit.transport.interval import Interval


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
class SolveSpec:
    """What is solved: the path, how the network is read, w (None: the sampler's default) and the guidance (None: none)."""

    interpolant: Interpolant
    target: Target
    diffusion: Diffusion | None = None
    guidance: Guidance | None = None


@dataclass(frozen=True)
class Sampler(Component):
    """A way from noise to data.

    t0, t1: where to start and stop; unset, they are derived.  clip "paper" takes the margins of SiT Table 10 instead of
    the derived ones wherever an end is singular: 1e-5 for an ODE, 1e-3 for an SDE's start.

    order: of convergence.  stochastic: whether it draws noise along the way.  couples_batch: whether a sample depends on
    the others of its batch, as with steps that an error estimate over the batch chooses.
    """

    order: ClassVar[int]
    stochastic: ClassVar[bool] = False
    couples_batch: ClassVar[bool] = False

    t0: float | None = field(default=None, kw_only=True)
    t1: float | None = field(default=None, kw_only=True)
    clip: Literal["derived", "paper"] = field(default="derived", kw_only=True)

    def __post_init__(self) -> None:
        low, high = self.t0 if self.t0 is not None else 0.0, self.t1 if self.t1 is not None else 1.0
        if not 0 <= low < high <= 1:
            raise ValueError(f"needs 0 <= t0 < t1 <= 1; got t0 = {low:g} and t1 = {high:g}.")

    @abstractmethod
    def plan(self, spec: SolveSpec) -> Plan:
        """The grid and cost of a solve; UserError, with the reason, where it could not give right samples."""

    def default_diffusion(self) -> Diffusion:
        """The w of a solve for which none is given."""
        return Zero()

    @abstractmethod
    def integrate(self, problem: Problem) -> Tensor:
        """The states on the grid (steps + 1, b, ...) if problem.save_trajectory, else the end state alone as (1, b, ...)."""

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

        plan = self.plan(SolveSpec(field.interpolant, field.target, diffusion, guidance))
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
    save_trajectory: bool


def ode_interval(sampler: Sampler, spec: SolveSpec) -> Interval:
    """Where an ODE sampler starts and stops; UserError if it is given a w."""
    from sitkit.transport import interval

    if spec.diffusion is not None and spec.diffusion.stochastic:
        raise UserError(
            f"sampler {sampler.name!r} solves the ODE, but diffusion {spec.diffusion.name!r} makes an SDE: use sampler "
            "'euler-maruyama' or 'stochastic-heun', or diffusion 'zero'."
        )
    return with_user_ends(sampler, interval.derive_interval(spec.interpolant, spec.target, None, steps=1), paper=1e-5)


def with_user_ends(sampler: Sampler, derived: Interval, *, paper: float) -> Interval:
    """The user's ends where given, the paper's margin where asked for and the end is singular, else the derived ones."""
    t0, t1, why0, why1 = derived
    if sampler.clip == "paper":
        t0, t1 = (paper if why0 else t0), (1 - paper if why1 and t1 > 1 - 1e-2 else t1)
    return derived._replace(
        t0=t0 if sampler.t0 is None else sampler.t0, t1=t1 if sampler.t1 is None else sampler.t1, why0=why0, why1=why1
    )


def evaluations(guidance: Guidance | None, times: Sequence[float]) -> int:
    """Network evaluations per sample of one guided evaluation at each of the times."""
    return sum((guidance or Unguided()).evaluations(t) for t in times)
