"""Monotone maps u -> t of [0, 1] onto [0, 1]: as training density (u uniform) and as sampling grid (u = i / steps)."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self, final

from sitkit.registry import Component, timesteps
from sitkit.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from sitkit.registry.measures import Measures


@dataclass(frozen=True)
class Timestep(Component):
    """A non-decreasing map from u to t."""

    @abstractmethod
    def map(self, u: Tensor) -> Tensor:
        """t(u), of u's shape and dtype, with t(0) = 0 and t(1) = 1."""

    def grid(self, steps: int, t0: float, t1: float) -> Tensor:
        """The steps + 1 times t0 + (t1 - t0) t(i / steps), float64, strictly increasing.

        Raises UserError where two neighbouring times coincide.
        """
        import torch

        u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        times = t0 + (t1 - t0) * self.map(u)
        times[0], times[-1] = t0, t1
        return require_increasing(times, self.name)


def require_increasing(times: Tensor, name: str) -> Tensor:
    """The times, if each is above the one before; else UserError."""
    if not bool((times.diff() > 0).all()):
        at = int((times.diff() <= 0).nonzero()[0])
        raise UserError(
            f"grid {name!r} with {len(times) - 1} steps does not increase at step {at} (t = {float(times[at]):g}): "
            "use fewer steps or another grid."
        )
    return times


@final
@timesteps.register("uniform")
@dataclass(frozen=True)
class Uniform(Timestep):
    """t = u."""

    def map(self, u: Tensor) -> Tensor:
        return u


@final
@timesteps.register("logit-normal")
@dataclass(frozen=True)
class LogitNormal(Timestep):
    """logit(t) ~ N(mean, std^2): t = sigmoid(mean + std Phi^{-1}(u)) (Esser et al. 2024, section 3.1)."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"std must be positive; got {self.std}.")

    def map(self, u: Tensor) -> Tensor:
        return (self.mean + self.std * math.sqrt(2) * (2 * u - 1).erfinv()).sigmoid()


@final
@timesteps.register("shift")
@dataclass(frozen=True)
class Shift(Timestep):
    """t = u / (u + shift (1 - u)): shift > 1 spends more on the noisy side (Esser et al. 2024, section 5.3.2)."""

    shift: float = 3.0

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"shift must be positive; got {self.shift}.")

    def map(self, u: Tensor) -> Tensor:
        return u / (u + self.shift * (1 - u))


@final
@timesteps.register("power")
@dataclass(frozen=True)
class Power(Timestep):
    """t = 1 - (1 - u)^rho: rho > 1 spends more near the data (the shape of EDM's grid, Karras et al. 2022, Eq. 5)."""

    rho: float = 2.0

    def __post_init__(self) -> None:
        if not self.rho > 0:
            raise ValueError(f"rho must be positive; got {self.rho}.")

    def map(self, u: Tensor) -> Tensor:
        return 1 - (1 - u) ** self.rho


@final
@timesteps.register("cosine")
@dataclass(frozen=True)
class Cosine(Timestep):
    """t = sin^2(pi u / 2): spends more at both ends."""

    def map(self, u: Tensor) -> Tensor:
        return (math.pi / 2 * u).sin().square()


@final
@timesteps.register("discrete")
@dataclass(frozen=True)
class Discrete(Timestep):
    """t = floor(levels u) / levels: DDPM's discretised time (SiT Table 2, row DDPM, with 1000 levels)."""

    levels: int = 1000

    def __post_init__(self) -> None:
        if self.levels < 1:
            raise ValueError(f"levels must be at least 1; got {self.levels}.")

    def map(self, u: Tensor) -> Tensor:
        import torch

        # i / steps rounds down as often as up: without the nudge 0.57 x 1000 is 569.99..., one level too low.
        nudged = u * (1 + 4 * torch.finfo(u.dtype).eps)
        return (self.levels * nudged).floor() / self.levels


@final
@timesteps.register("explicit")
@dataclass(frozen=True)
class Explicit(Timestep):
    """The very times given, first to last, as a sampling grid; as a map, straight lines through them."""

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
        """The times themselves.  Raises UserError unless they number steps + 1 and lie in the solvable span [t0, t1]."""
        import torch

        if steps != len(self.times) - 1:
            raise UserError(f"grid 'explicit' has {len(self.times) - 1} intervals, but {steps} are to be made.")
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
    """Steps of equal local error on a trained field: density of t proportional to |x''(t)|^(1/2) along the flow.

    An Euler step of length h from x(t) errs by h^2 |x''(t)| / 2, so that equal errors make h proportional to |x''|^(-1/2),
    which also makes their sum least.  A solver of order p errs by the derivative p + 1 instead, which a network's own
    roughness in t drowns, so that this grid serves all: often, not always, it is better than an even one for them too.
    `curvature` holds |x''| as (t, root mean square over dimensions) pairs, each for the stretch of time nearest to its t;
    a run measures them on the network that is sampled (`sitkit.runs.diagnostics`) and fills them in.  No step is longer than
    LONGEST mean ones.  Raises UserError where `curvature` is needed and missing: before training there is none.
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

        knots, shares = (values.to(u) for values in self._distribution())
        # The last share is 1 and belongs to the last stretch.
        stretch = torch.searchsorted(shares, u.contiguous(), right=True).clamp(1, len(shares) - 1)
        before, after = shares[stretch - 1], shares[stretch]
        return torch.lerp(knots[stretch - 1], knots[stretch], (u - before) / (after - before))

    def grid(self, steps: int, t0: float, t1: float) -> Tensor:
        """The steps + 1 times that share the density between t0 and t1 equally.  Raises UserError as `map`."""
        import numpy as np
        import torch

        knots, shares = (values.numpy() for values in self._distribution())
        first, last = (float(np.interp(t, knots, shares)) for t in (t0, t1))
        times = torch.from_numpy(np.interp(np.linspace(first, last, steps + 1), shares, knots))
        times[0], times[-1] = t0, t1
        return require_increasing(times, self.name)

    def _distribution(self) -> tuple[Tensor, Tensor]:
        """Times from 0 to 1, and the share of steps before each; between them both are linear."""
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
        shares = torch.cat((times.new_zeros(1), (lengths * density).cumsum(0)))
        return knots, shares / shares[-1]
