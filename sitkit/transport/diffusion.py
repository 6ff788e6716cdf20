"""Diffusion coefficients w(t) of dX = (v + w s / 2) dt + sqrt(w) dW.

Any w >= 0 keeps the marginals (SiT Eq. 9), so w is chosen after training.  Here w is the paper's.  The official code's
coefficient D is w / 2, so its `sigma` is w = 2 sigma here (norm = 2).
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self, final

from sitkit.registry import Component, diffusions
from sitkit.runtime.errors import UserError
from sitkit.transport.interpolant import TINY, Coefficients
from sitkit.transport.target import Velocity, determinant

if TYPE_CHECKING:
    from torch import Tensor

    from sitkit.registry.measures import Measures


@dataclass(frozen=True)
class Diffusion(Component):
    """A form of the diffusion coefficient w(t).

    A subclass defines `w`.  `stochastic` is False for w = 0 alone, the only form that an ODE sampler takes.

    Args:
        norm: a factor of the whole of w, at least 0.

    Source: SiT Table 6; Eq. 13 and 14 for `kl` and `kl-eta`.
    """

    stochastic: ClassVar[bool] = True

    norm: float = 1.0

    def __post_init__(self) -> None:
        if not (self.norm >= 0 and math.isfinite(self.norm)):
            raise ValueError(f"norm must be finite and not negative; got {self.norm}.")

    @abstractmethod
    def w(self, t: Tensor, c: Coefficients) -> Tensor:
        """Return w(t) >= 0, of t's shape, given the interpolant's coefficients at t."""


@final
@diffusions.register("zero")
class Zero(Diffusion):
    """The probability-flow ODE: w = 0."""

    stochastic = False

    def w(self, t: Tensor, c: Coefficients) -> Tensor:
        return t.new_zeros(t.shape)


@final
@diffusions.register("constant")
class Constant(Diffusion):
    """The same w at every time: w = norm."""

    def w(self, t: Tensor, c: Coefficients) -> Tensor:
        return t.new_full(t.shape, self.norm)


@final
@diffusions.register("sigma")
class Sigma(Diffusion):
    """The w that cancels the score's 1 / sigma: w = norm sigma(t) (SiT Table 6, column sigma_t)."""

    def w(self, t: Tensor, c: Coefficients) -> Tensor:
        return self.norm * c.sigma


@final
@diffusions.register("linear")
class Linear(Diffusion):
    """A w that falls linearly to 0 at the data: w = norm (1 - t)."""

    def w(self, t: Tensor, c: Coefficients) -> Tensor:
        return self.norm * (1 - t)


@final
@diffusions.register("decreasing")
class Decreasing(Diffusion):
    """A w that falls smoothly to 0 at the data: w = norm (cos(pi t) + 1)^2 / 4."""

    def w(self, t: Tensor, c: Coefficients) -> Tensor:
        return self.norm * ((math.pi * t).cos() + 1).square() / 4


@final
@diffusions.register("increasing-decreasing")
class IncreasingDecreasing(Diffusion):
    """A w without noise at either end: w = norm sin^2(pi t) (SiT Table 6, column sin^2(pi t))."""

    def w(self, t: Tensor, c: Coefficients) -> Tensor:
        return self.norm * (math.pi * t).sin().square()


def w_kl(c: Coefficients) -> Tensor:
    """Return 2 sigma det_v / alpha, the w that minimises the bound on the KL divergence (SiT Eq. 13).

    It is infinite at alpha = 0.
    """
    return 2 * c.sigma.clamp_min(TINY) * determinant(Velocity(), c) / c.alpha


@final
@diffusions.register("kl")
class KL(Diffusion):
    """The w that minimises the bound on the KL divergence: w = norm 2 sigma (d_alpha sigma - d_sigma alpha) / alpha.

    It equals beta(t) for vp-sbdm, and is infinite at t = 0 if alpha = 0 there: a solve then starts where its first step
    is stable.
    Source: SiT Eq. 13.
    """

    def w(self, t: Tensor, c: Coefficients) -> Tensor:
        return self.norm * w_kl(c)


@final
@diffusions.register("kl-eta")
@dataclass(frozen=True)
class KLEta(Diffusion):
    """The w of the KL bound with a penalty on w: w = norm w_kl sqrt(L_t / (L_t + 2 eta w_kl^2)).

    It is finite at t = 0, where it is norm sqrt(L_0 / (2 eta)).  L_t is the velocity loss of the trained model at time t,
    summed over dimensions as in the paper (not averaged).

    Args:
        eta: the weight of the penalty.  The paper does not give its value.
        losses: (t, L_t) pairs, interpolated linearly.  A run measures them on held-out data; without a run they are
            required.

    Source: SiT Eq. 14.
    """

    eta: float = 1.0
    losses: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.eta >= 0:
            raise ValueError(f"eta must not be negative; got {self.eta}.")
        times = [t for t, _ in self.losses]
        if times != sorted(set(times)) or any(not loss > 0 for _, loss in self.losses):
            raise ValueError("losses must be (t, L_t) pairs with increasing t and positive L_t.")

    def bind(self, run: Measures) -> Self:
        return self if self.losses else dataclasses.replace(self, losses=run.velocity_losses())

    def w(self, t: Tensor, c: Coefficients) -> Tensor:
        loss = self._loss(t)
        return self.norm * (w_kl(c).square().reciprocal() + 2 * self.eta / loss).rsqrt()

    def _loss(self, t: Tensor) -> Tensor:
        if not self.losses:
            raise UserError(
                "diffusion 'kl-eta' needs the trained model's velocity loss L_t: sample a run, which measures it, "
                "or give losses as (t, L_t) pairs."
            )
        times, values = t.new_tensor(self.losses).T
        gaps = times.diff()
        inside = (t[..., None] - times[:-1]).clamp_min(0).minimum(gaps)
        return values[0] + (inside * values.diff() / gaps).sum(-1)


diffusions.preset("sin2", "increasing-decreasing")
diffusions.preset("sbdm", "kl")
