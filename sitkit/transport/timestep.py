"""Monotone maps u -> t of [0, 1] onto [0, 1]: training densities (u uniform) and sampling grids (u = i / steps)."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self, final

from sitkit.registry import Component, timesteps
from sitkit.runtime.errors import UserError, require_positive, require_within

if TYPE_CHECKING:
    from torch import Tensor

    from sitkit.registry.measures import Measures


@dataclass(frozen=True)
class Timestep(Component):
    """A non-decreasing map from u to t, used as a training density and as a sampling grid.

    A subclass defines `map`.
    """

    @abstractmethod
    def map(self, u: Tensor) -> Tensor:
        """Return t(u), of u's shape and dtype, with t(0) = 0 and t(1) = 1."""

    def grid(self, steps: int, t0: float, t1: float) -> Tensor:
        """Return the grid t0 + (t1 - t0) t(i / steps), i = 0, ..., steps.

        Args:
            steps: the number of intervals.
            t0: the first time.
            t1: the last time.

        Returns:
            (steps + 1,) float64, strictly increasing.

        Raises:
            UserError: if two neighbouring times coincide.
        """
        import torch

        u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        times = t0 + (t1 - t0) * self.map(u)
        times[0], times[-1] = t0, t1
        require_increasing(times, self.name)
        return times


@final
@timesteps.register("uniform")
class Uniform(Timestep):
    """Equal steps: t = u (SiT: t ~ U[0, 1])."""

    def map(self, u: Tensor) -> Tensor:
        return u


def require_increasing(times: Tensor, name: str) -> None:
    """Raise UserError unless each time is above the time before it."""
    if not bool((times.diff() > 0).all()):
        step = int((times.diff() <= 0).nonzero()[0])
        raise UserError(
            f"grid {name!r} with {len(times) - 1} steps does not increase at step {step} (t = {float(times[step]):g}): "
            "use fewer steps or another grid."
        )


@final
@timesteps.register("logit-normal")
@dataclass(frozen=True)
class LogitNormal(Timestep):
    """The law logit(t) ~ N(mean, std^2): t = sigmoid(mean + std Phi^{-1}(u)).

    Args:
        mean: of logit(t); above 0 moves times towards the data.
        std: of logit(t), positive.

    Source: Esser et al. 2024 (arXiv 2403.03206), section 3.1.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        require_positive(std=self.std)

    def map(self, u: Tensor) -> Tensor:
        return (self.mean + self.std * math.sqrt(2) * (2 * u - 1).erfinv()).sigmoid()


@final
@timesteps.register("shift")
@dataclass(frozen=True)
class Shift(Timestep):
    """A grid that is finer on the noisy side: t = u / (u + shift (1 - u)).

    Args:
        shift: positive; 1 is the uniform grid, below 1 the data side is finer.

    Source: Esser et al. 2024 (arXiv 2403.03206), section 5.3.2.
    """

    shift: float = 3.0

    def __post_init__(self) -> None:
        require_positive(shift=self.shift)

    def map(self, u: Tensor) -> Tensor:
        return u / (u + self.shift * (1 - u))


@final
@timesteps.register("power")
@dataclass(frozen=True)
class Power(Timestep):
    """A grid that is finer near the data: t = 1 - (1 - u)^rho.

    Args:
        rho: exponent, above 0; with 1 the grid is uniform, with less it is finer near the noise.

    Source: the shape of EDM's grid, Karras et al. 2022 (arXiv 2206.00364), Eq. 5.
    """

    rho: float = 2.0

    def __post_init__(self) -> None:
        require_positive(rho=self.rho)

    def map(self, u: Tensor) -> Tensor:
        return 1 - (1 - u) ** self.rho


@final
@timesteps.register("cosine")
class Cosine(Timestep):
    """A grid that is finer at both ends: t = sin^2(pi u / 2)."""

    def map(self, u: Tensor) -> Tensor:
        return (math.pi / 2 * u).sin().square()


@final
@timesteps.register("discrete")
@dataclass(frozen=True)
class Discrete(Timestep):
    """The discrete times of DDPM: t = floor(levels u) / levels (SiT Table 2, row DDPM, with 1000 levels).

    Args:
        levels: the number of times, at least 1.
    """

    levels: int = 1000

    def __post_init__(self) -> None:
        require_within(1, 10**9, levels=self.levels)

    def map(self, u: Tensor) -> Tensor:
        import torch

        # i / steps rounds down as often as up: without this factor 0.57 x 1000 is 569.99..., a level too low.
        return (self.levels * (u * (1 + 4 * torch.finfo(u.dtype).eps))).floor() / self.levels


@final
@timesteps.register("explicit")
@dataclass(frozen=True)
class Explicit(Timestep):
    """The given times as a sampling grid; as a map, straight lines through them.

    Args:
        times: at least two times in [0, 1], increasing.
    """

    times: tuple[float, ...] = (0.0, 1.0)

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.times, self.times[1:], strict=False))
        if len(self.times) < 2 or not ascending or self.times[0] < 0 or self.times[-1] > 1:
            raise ValueError(f"times must be at least two, increasing, within [0, 1]; got {list(self.times)}.")

    def map(self, u: Tensor) -> Tensor:
        times = u.new_tensor(self.times)
        place = u * (len(self.times) - 1)
        left = place.floor().long().clamp(0, len(self.times) - 2)
        return times[left] + (place - left) * (times[left + 1] - times[left])

    def grid(self, steps: int, t0: float, t1: float) -> Tensor:
        """Return the times.  Raises UserError unless they number steps + 1 and lie in the solvable interval [t0, t1]."""
        import torch

        if steps != len(self.times) - 1:
            raise UserError(f"grid 'explicit' has {len(self.times) - 1} intervals, but {steps} steps are wanted.")
        if self.times[0] < t0 or self.times[-1] > t1:
            raise UserError(
                f"grid 'explicit' runs over [{self.times[0]:g}, {self.times[-1]:g}], "
                f"but this solve is finite only within [{t0:g}, {t1:g}]: keep the times inside."
            )
        return torch.tensor(self.times, dtype=torch.float64)


@final
@timesteps.register("adapted")
@dataclass(frozen=True)
class Adapted(Timestep):
    """Steps of equal local error on a trained field: the density of t is proportional to |x''(t)|^(1/2) along the flow.

    The error of an Euler step of length h from x(t) is h^2 |x''(t)| / 2.  The errors are equal, and their sum is least, if
    h is proportional to |x''|^(-1/2).  The error of a solver of order p depends on the derivative p + 1 instead, which the
    roughness of a network in t hides, so all solvers use this grid; often, not always, it is better than equal steps for
    them too.  No step is longer than LONGEST times the mean step.

    Args:
        curvature: (t, |x''|) pairs, |x''| as a root mean square over dimensions, each for the times nearest to its t.  A
            run measures them on the network that is sampled (`sitkit.runs.diagnostics`); without a run they are required.
    """

    LONGEST: ClassVar[float] = 10.0

    curvature: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        times = [t for t, _ in self.curvature]
        if times != sorted(set(times)) or any(not (0 <= t <= 1 and 0 <= c < math.inf) for t, c in self.curvature):
            raise ValueError("curvature must be (t, |x''|) pairs with increasing t in [0, 1] and |x''| not below 0.")

    def bind(self, run: Measures) -> Self:
        return self if self.curvature else dataclasses.replace(self, curvature=run.path_curvature())

    def map(self, u: Tensor) -> Tensor:
        import torch

        knots, fractions = (values.to(u) for values in self._distribution())
        # The last fraction is 1 and belongs to the last segment.
        segment = torch.searchsorted(fractions, u.contiguous(), right=True).clamp(1, len(fractions) - 1)
        before, after = fractions[segment - 1], fractions[segment]
        return torch.lerp(knots[segment - 1], knots[segment], (u - before) / (after - before))

    def grid(self, steps: int, t0: float, t1: float) -> Tensor:
        """Return the steps + 1 times between which the density has equal integrals.  Raises UserError as `map`."""
        import numpy as np
        import torch

        knots, fractions = (values.numpy() for values in self._distribution())
        first, last = (float(np.interp(t, knots, fractions)) for t in (t0, t1))
        times = torch.from_numpy(np.interp(np.linspace(first, last, steps + 1), fractions, knots))
        times[0], times[-1] = t0, t1
        require_increasing(times, self.name)
        return times

    def _distribution(self) -> tuple[Tensor, Tensor]:
        """Return times from 0 to 1 and the fraction of the steps before each; between them both are linear."""
        import torch

        if not self.curvature:
            raise UserError(
                "grid 'adapted' needs the curvature of a trained field's paths: sample a run, which measures it, "
                "or give curvature as (t, |x''|) pairs."
            )
        times, values = torch.tensor(self.curvature, dtype=torch.float64).T
        knots = torch.cat((times.new_zeros(1), (times[1:] + times[:-1]) / 2, times.new_ones(1)))
        lengths, density = knots.diff(), values.sqrt()
        mean = (lengths * density).sum()
        density = (density / mean).clamp_min(1 / self.LONGEST) if mean > 0 else torch.ones_like(density)
        fractions = torch.cat((times.new_zeros(1), (lengths * density).cumsum(0)))
        return knots, fractions / fractions[-1]
