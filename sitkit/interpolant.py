"""Paths between noise and data: x_t = alpha_t * data + sigma_t * noise, with t = 0 noise and t = 1 data.

The paper (Ma et al. 2024, section 2.2) runs time the other way; its alpha(t) is alpha(1 - t) here.
Coefficients are computed in the dtype of t.  Rates are written by hand and checked against autograd by
`sitkit.testing.check_interpolant`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, final

from sitkit.registry import Component, interpolants

if TYPE_CHECKING:
    from torch import Tensor

# Below this a sigma in a denominator is replaced by it, so that ratios of singular coefficients keep their limit
# (float32 holds 1 / TINY times any state).  1e-30 is far below any sigma that t < 1 can give in float64.
TINY = 1e-30


class Coefficients(NamedTuple):
    """alpha, sigma and their rates of change in t, each of t's shape and dtype."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


@dataclass(frozen=True)
class Interpolant(Component):
    """A path from noise (t = 0) to data (t = 1)."""

    @abstractmethod
    def coefficients(self, t: Tensor) -> Coefficients:
        """alpha, sigma, d alpha / dt, d sigma / dt at t, each of t's shape and dtype."""

    def at(self, t: Tensor, x: Tensor) -> Coefficients:
        """The coefficients at t, shaped to multiply x: t () or (b,), x (b, ...) -> each (b or 1, 1, ..., 1).

        In t's dtype, but never below float32.
        """
        if t.dtype.itemsize < 4:
            t = t.float()
        return self.coefficients(t.reshape(-1, *[1] * (x.ndim - 1)))


@final
@interpolants.register("linear")
@dataclass(frozen=True)
class Linear(Interpolant):
    """alpha = t, sigma = 1 - t.

    Source: SiT section 2.2 (Linear); rectified flow, flow matching with optimal-transport paths.
    """

    def coefficients(self, t: Tensor) -> Coefficients:
        one = t.new_ones(t.shape)
        return Coefficients(t, 1 - t, one, -one)


@final
@interpolants.register("gvp")
@dataclass(frozen=True)
class GVP(Interpolant):
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2): alpha^2 + sigma^2 = 1 at every t.

    sigma is computed as sin(pi (1 - t) / 2), which is exactly 0 at t = 1.
    Source: SiT section 2.2 (GVP); Nichol and Dhariwal's cosine schedule without its offset.
    """

    def coefficients(self, t: Tensor) -> Coefficients:
        half = math.pi / 2
        alpha, sigma = (half * t).sin(), (half * (1 - t)).sin()
        return Coefficients(alpha, sigma, half * sigma, -half * alpha)


@final
@interpolants.register("vp-sbdm")
@dataclass(frozen=True)
class VPSBDM(Interpolant):
    """alpha = exp(-(1-t)^2 (beta_max - beta_min) / 4 - (1-t) beta_min / 2), sigma = sqrt(1 - alpha^2).

    beta(t) = beta_min + (1-t)(beta_max - beta_min); d_alpha = alpha beta / 2; d_sigma = -alpha^2 beta / (2 sigma),
    which diverges at t = 1.  There sigma is replaced by 1e-30: d_sigma stays finite, and so do all readings of a
    velocity prediction, whose limits are finite.
    Source: SiT section 2.2 (SBDM-VP) with the official code's beta_min 0.1 and beta_max 20.
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
        alpha, sigma = log_alpha.exp(), (-(2 * log_alpha).expm1()).sqrt()
        half_beta = (self.beta_min + s * rise) / 2
        return Coefficients(alpha, sigma, alpha * half_beta, -alpha.square() * half_beta / sigma.clamp_min(TINY))
