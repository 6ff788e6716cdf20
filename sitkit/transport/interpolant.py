"""Paths between noise and data: x_t = alpha_t * data + sigma_t * noise, with t = 0 noise and t = 1 data.

The paper (Ma et al. 2024, section 2.2) runs time the other way; its alpha(t) is alpha(1 - t) here.
Coefficients are computed in the dtype of t.  Rates are written by hand and checked against autograd by
`sitkit.testing.obey`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, final

from sitkit.registry import Component, interpolants
from sitkit.runtime.errors import require_within

if TYPE_CHECKING:
    from torch import Tensor

# Smallest sigma in a denominator, so that ratios of singular coefficients keep their limit (float32 holds 1 / TINY times
# any state).  1e-30 is far below any sigma that t < 1 can give in float64.
TINY = 1e-30


class Coefficients(NamedTuple):
    """The coefficients of x_t = alpha * data + sigma * noise, each of t's shape and dtype.

    Args:
        alpha: the factor of the data: 0 or nearly 0 at t = 0, 1 at t = 1.
        sigma: the factor of the noise: 1 or nearly 1 at t = 0, 0 at t = 1.
        d_alpha: d alpha / dt.
        d_sigma: d sigma / dt.

    Source: SiT section 2.2, with time reversed.
    """

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


@dataclass(frozen=True)
class Interpolant(Component):
    """A path from noise (t = 0) to data (t = 1).

    A subclass defines `coefficients`.  Source: SiT section 2.2, with time reversed.
    """

    @abstractmethod
    def coefficients(self, t: Tensor) -> Coefficients:
        """Return alpha, sigma and their rates of change at t, each of t's shape and dtype."""

    def at(self, t: Tensor, x: Tensor) -> Coefficients:
        """Return the coefficients at t, shaped to multiply x.

        Args:
            t: () or (b,), the times.
            x: (b, ...), the states.

        Returns:
            Coefficients of shape (b or 1, 1, ..., 1), in t's dtype, float32 at least.
        """
        if t.dtype.itemsize < 4:
            t = t.float()
        return self.coefficients(t.reshape(-1, *[1] * (x.ndim - 1)))


@final
@interpolants.register("linear")
class Linear(Interpolant):
    """The straight path: alpha = t, sigma = 1 - t.

    Source: SiT section 2.2 (Linear); the path of rectified flow and of flow matching.
    """

    def coefficients(self, t: Tensor) -> Coefficients:
        one = t.new_ones(t.shape)
        return Coefficients(t, 1 - t, one, -one)


@final
@interpolants.register("gvp")
class GVP(Interpolant):
    """The path that preserves variance: alpha = sin(pi t / 2), sigma = cos(pi t / 2), alpha^2 + sigma^2 = 1 at every t.

    sigma is computed as sin(pi (1 - t) / 2), which is exactly 0 at t = 1.
    Source: SiT section 2.2 (GVP); the cosine schedule of Nichol and Dhariwal without its offset.
    """

    def coefficients(self, t: Tensor) -> Coefficients:
        half = math.pi / 2
        alpha, sigma = (half * t).sin(), (half * (1 - t)).sin()
        return Coefficients(alpha, sigma, half * sigma, -half * alpha)


@final
@interpolants.register("vp-sbdm")
@dataclass(frozen=True)
class VPSBDM(Interpolant):
    """The path of VP diffusion: alpha = exp(-(1-t)^2 (beta_max - beta_min) / 4 - (1-t) beta_min / 2).

    sigma = sqrt(1 - alpha^2); beta(t) = beta_min + (1-t)(beta_max - beta_min); d_alpha = alpha beta / 2;
    d_sigma = -alpha^2 beta / (2 sigma), which diverges at t = 1.  There sigma is replaced by 1e-30: d_sigma stays finite,
    and so do all readings of a velocity prediction, whose limits are finite.

    Args:
        beta_min: beta at the data end; the official code's 0.1 by default.
        beta_max: beta at the noise end; the official code's 20 by default.

    Source: SiT section 2.2 (SBDM-VP).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max:
            raise ValueError(f"needs 0 < beta_min <= beta_max; got {self.beta_min} and {self.beta_max}.")

    def coefficients(self, t: Tensor) -> Coefficients:
        s = 1 - t
        rise = self.beta_max - self.beta_min
        log_alpha = -s.square() * (rise / 4) - s * (self.beta_min / 2)
        return _variance_preserving(log_alpha, (self.beta_min + s * rise) / 2)


@final
@interpolants.register("ddpm")
@dataclass(frozen=True)
class DDPM(Interpolant):
    """The path of DDPM and DiT: alpha = sqrt(abar(m)), sigma = sqrt(1 - abar(m)) after m = levels (1 - t) steps.

    At whole m abar is the product of 1 - beta_i over i < m, with beta linear from beta_min to beta_max.  Between them the
    gamma function G interpolates: abar(m) = delta^m G(c + 1) / G(c + 1 - m), delta = (beta_max - beta_min) / (levels - 1),
    c = (1 - beta_min) / delta.  DiT's timestep n is t = 1 - (n + 1) / levels.  d_sigma at t = 1 is as in vp-sbdm.

    Args:
        beta_min: beta of the first step from the data.
        beta_max: beta of the last step.
        levels: how many steps DDPM has.

    Source: Ho et al. 2020 (DDPM, arXiv 2006.11239), section 4; Peebles and Xie 2022 (DiT, arXiv 2212.09748).
    """

    beta_min: float = 1e-4
    beta_max: float = 0.02
    levels: int = 1000

    def __post_init__(self) -> None:
        # Within these bounds the series below are right to 1e-11 of log abar.
        if not (0 < self.beta_min < self.beta_max <= 0.1 and self.levels >= 100):
            raise ValueError(
                "needs 0 < beta_min < beta_max <= 0.1 and at least 100 levels; "
                f"got {self.beta_min}, {self.beta_max} and {self.levels}."
            )
        require_within(100, 10**6, levels=self.levels)
        # Between levels beta is that of half a step before: below this bound abar would rise at the data end.
        if 2 * self.beta_min * (self.levels - 1) <= self.beta_max - self.beta_min:
            raise ValueError(
                f"beta_min = {self.beta_min} must be above half a step of beta, "
                f"{(self.beta_max - self.beta_min) / (self.levels - 1) / 2:.3g}."
            )

    def coefficients(self, t: Tensor) -> Coefficients:
        m = self.levels * (1 - t)
        delta = (self.beta_max - self.beta_min) / (self.levels - 1)
        # Stirling's log G(z) = (z - 1/2) log z - z + log(2 pi) / 2 + 1 / (12 z) at z = c + 1 > 900 and z - m, and its
        # derivative.  All terms have the same sign, so float32 keeps its digits; the logarithms of G would cancel.
        z = (1 - self.beta_min) / delta + 1
        u, log_step = m / z, math.log(delta * z)
        log_abar = m * log_step + z * _entropy(u) + (-u).log1p() / 2 - u / (12 * z * (1 - u))
        fall = log_step + (-u).log1p() - 1 / (2 * z * (1 - u)) - 1 / (12 * (z * (1 - u)).square())
        return _variance_preserving(log_abar / 2, -self.levels / 2 * fall)


def _entropy(u: Tensor) -> Tensor:
    """-u - (1 - u) log(1 - u) = -(u^2 / 2 + u^3 / 6 + u^4 / 12 + ...), for 0 <= u <= 0.1."""
    total = u.new_zeros(u.shape)
    for k in range(14, 1, -1):
        total = u * total + 1 / (k * (k - 1))
    return -u.square() * total


def _variance_preserving(log_alpha: Tensor, half_beta: Tensor) -> Coefficients:
    """Return the coefficients with alpha^2 + sigma^2 = 1 and d log alpha / dt = half_beta, also at t = 1."""
    alpha, sigma = log_alpha.exp(), (-(2 * log_alpha).expm1()).sqrt()
    return Coefficients(alpha, sigma, alpha * half_beta, -alpha.square() * half_beta / sigma.clamp_min(TINY))
