"""Mean flows: a network of two times predicts the average velocity between them, so one step can draw a sample.

Let u(z, t, s) be the mean of the velocity along the path of z from t to s > t.  Then (s - t) u is the displacement, and
its derivative along the path gives

    u = v + (s - t) du/dt,    du/dt = v . grad_z u + d u / d t.

The loss is the error of this equation, with no gradient through its right side.  u(z, t, t) is the velocity, so a network
of two times that is called with one time predicts the velocity, and every other sampler works too.
Source: Geng et al. 2025 (arXiv 2505.13447), Eq. 6 to 11, here with t = 0 for noise and t = 1 for data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, final

from sitkit import (
    Backbone,
    Batch,
    FixedStepODE,
    LogitNormal,
    Loss,
    Plan,
    Problem,
    Sample,
    SolveSpec,
    Tableau,
    Timestep,
    Unguided,
    UserError,
    backbones,
    losses,
    samplers,
)  # fmt: skip

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sitkit import Examples, Field, Interpolant, Target

# The purposes of this plugin's random numbers.  sitkit's own purposes are numbers below 1000.
SECOND, INSTANT = 1801, 1802


def _small() -> Backbone:
    return backbones.create("sit-xs/2", time_scale=10)


@final
@backbones.register("two-time")
@dataclass(frozen=True)
class TwoTime(Backbone):
    """A SiT that also takes pairs of times, t (b, 2): y = u(x, t_0, t_1).  One time t (b,) means the pair (t, t).

    The length of the interval has its own embedder; its output is added to the embedding of the start.

    Args:
        of: the SiT.
    """

    of: Backbone = field(default_factory=_small)

    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        from sitkit_meanflow.network import with_two_times

        return with_two_times(self.of.build(shape, num_classes))

    def prepare(self, network: nn.Module, *, interpolant: Interpolant, target: Target, examples: Examples) -> nn.Module:
        if target.name != "velocity":
            raise UserError(f"backbone 'two-time' predicts velocities: use target 'velocity', not {target.name!r}.")
        return network


@final
@losses.register("meanflow")
@dataclass(frozen=True)
class MeanFlow(Loss):
    """|u(z, t, s) - v - (s - t) du/dt|^2 / (|.|^2 + 1e-3)^power, with no gradient through the divisor and the target.

    The loss needs the backbone `two-time` and ignores `--weight`.

    Args:
        instant: the fraction of examples with s = t, for which this is the squared error of the velocity.
        power: the exponent of the divisor; 0 is the plain squared error.
        second: the distribution of the second time; the two times are ordered afterwards.
    """

    instant: float = 0.75
    power: float = 1.0
    second: Timestep = field(default_factory=LogitNormal)

    def __post_init__(self) -> None:
        if not 0 <= self.instant <= 1:
            raise ValueError(f"instant must lie in [0, 1]; got {self.instant}.")
        if self.power < 0:
            raise ValueError(f"power must be at least 0; got {self.power}.")

    def build(self, network: nn.Module, shape: tuple[int, ...], num_classes: int) -> None:
        if getattr(network, "times", 1) != 2:
            raise UserError("loss 'meanflow' needs a network of two times: use --backbone two-time.")

    def times(self, t: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return (start, end) of the interval of each example, start <= end: t (b,), keys (b,) -> (b,), (b,)."""
        import torch

        from sitkit import uniform

        other = self.second.map(uniform(keys, SECOND)).to(t.dtype)
        other = torch.where(uniform(keys, INSTANT) < self.instant, t, other)
        return torch.minimum(t, other), torch.maximum(t, other)

    def per_example(self, batch: Batch) -> Tensor:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        start, end = self.times(batch.t, batch.keys)
        c = batch.interpolant.at(start, batch.data)
        z = c.alpha * batch.data + c.sigma * batch.noise
        velocity = c.d_alpha * batch.data + c.d_sigma * batch.noise

        def mean_velocity(z: Tensor, start: Tensor, end: Tensor) -> Tensor:
            return batch.network(z, torch.stack((start, end), 1), batch.y)

        along: Any = (velocity, torch.ones_like(start), torch.zeros_like(end))
        # Only the plain implementation of attention has a forward derivative.
        with sdpa_kernel(SDPBackend.MATH):
            u, rate, *_ = torch.func.jvp(mean_velocity, (z, start, end), along)
        length = (end - start).reshape(-1, *[1] * (z.ndim - 1))
        error = (u - (velocity + length * rate).detach()).float().square().flatten(1).mean(1)
        return error / (error.detach() + 1e-3) ** self.power


@final
@samplers.register("meanflow")
@dataclass(frozen=True)
class MeanFlowSampler(FixedStepODE):
    """x += (s - t) u(x, t, s): one evaluation per step, and one step by default.

    With an exact u, the samples are exact for any number of steps.  The sampler needs a network of two times (backbone
    `two-time`) and accepts no guidance.
    """

    order: ClassVar[int] = 1
    # The tableau of Euler's method: one evaluation at the start of a step.
    tableau: ClassVar[Tableau] = Tableau(c=(0.0,), a=((),), b=(1.0,))

    steps: int = 1

    def plan(self, spec: SolveSpec) -> Plan:
        if spec.target.name != "velocity":
            raise UserError(f"sampler 'meanflow' needs a velocity: use target 'velocity', not {spec.target.name!r}.")
        if spec.guidance is not None and not isinstance(spec.guidance, Unguided):
            raise UserError(f"sampler 'meanflow' takes no guidance: use guidance 'none', not {spec.guidance.name!r}.")
        return super().plan(spec)

    def sample(self, field: Field, noise: Tensor, y: Tensor | None = None, **settings: Any) -> Sample:
        if getattr(field.network, "times", 1) != 2:
            raise UserError("sampler 'meanflow' needs a network of two times: train with --backbone two-time.")
        return super().sample(field, noise, y, **settings)

    def solve(self, *args: Any, **settings: Any) -> Any:
        # A likelihood integrates the velocity, but a step of this sampler is the average velocity times its length.
        raise UserError("sampler 'meanflow' gives no likelihood: use an ODE sampler such as 'dopri5' or 'heun'.")

    def integrate(self, problem: Problem) -> Tensor:
        import torch

        x, times = problem.x, problem.plan.times.to(problem.x)
        states = [x]
        for t, s in pairwise(times):
            x = x + (s - t) * problem.field.network(x, torch.stack((t, s)).expand(len(x), 2), problem.y)
            states.append(x)
        return torch.stack(states) if problem.save_trajectory else x[None]
