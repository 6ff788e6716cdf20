"""Loss weights r(t): the space in which the error of a prediction is measured.

For fixed x the predictions are affine in one another, so the squared error of target T measured in the space of S
is r(t) |y_hat - y|^2 with r = (det_S / det_T)^2 and det = a sigma - b alpha (`sitkit.transport.target.determinant`).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from sitkit.registry import Component, weightings
from sitkit.transport import target as spaces
from sitkit.transport.interpolant import Coefficients
from sitkit.transport.target import Target, determinant

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Weighting(Component):
    """A positive weight on the squared error of a target."""

    @abstractmethod
    def weight(self, c: Coefficients, target: Target) -> Tensor:
        """r(t) >= 0, of the coefficients' shape, multiplying |y_hat - y|^2 of `target`."""


def measured_in(space: Target, target: Target, c: Coefficients) -> Tensor:
    """r = (det_S / det_T)^2; exactly 1 where the two are equal, also where both are 0 or infinite."""
    of_space, of_target = determinant(space, c), determinant(target, c)
    return (of_space / of_target).where(of_space != of_target, 1.0).square()


@final
@weightings.register("velocity")
@dataclass(frozen=True)
class VelocitySpace(Weighting):
    """The error of the velocity: r = (det_v / det_T)^2.

    With the score target this is the paper's L_{s_lambda} (SiT Eq. 46-50), with the velocity target its L_v (Eq. 7).
    """

    def weight(self, c: Coefficients, target: Target) -> Tensor:
        return measured_in(spaces.Velocity(), target, c)


@final
@weightings.register("noise")
@dataclass(frozen=True)
class NoiseSpace(Weighting):
    """The error of the noise: r = (alpha / det_T)^2.  With the score target this is the paper's L_s (SiT Eq. 6)."""

    def weight(self, c: Coefficients, target: Target) -> Tensor:
        return measured_in(spaces.Noise(), target, c)


@final
@weightings.register("score")
@dataclass(frozen=True)
class ScoreSpace(Weighting):
    """The error of the score: r = (alpha / (sigma det_T))^2."""

    def weight(self, c: Coefficients, target: Target) -> Tensor:
        return measured_in(spaces.Score(), target, c)


@final
@weightings.register("data")
@dataclass(frozen=True)
class DataSpace(Weighting):
    """The error of the data: r = (sigma / det_T)^2."""

    def weight(self, c: Coefficients, target: Target) -> Tensor:
        return measured_in(spaces.Data(), target, c)


@final
@weightings.register("likelihood")
@dataclass(frozen=True)
class Likelihood(Weighting):
    """lambda / sigma on the error of the noise, lambda = det_v / alpha: the maximum-likelihood weight up to 1/2.

    Singular at both ends.  Source: Song et al. 2021 (likelihood weighting); SiT's `loss_weight="likelihood"`.
    """

    def weight(self, c: Coefficients, target: Target) -> Tensor:
        rate = determinant(spaces.Velocity(), c) / (c.alpha * c.sigma)
        return measured_in(spaces.Noise(), target, c) * rate


@final
@weightings.register("min-snr")
@dataclass(frozen=True)
class MinSNR(Weighting):
    """min(alpha^2 / sigma^2, gamma) on the error of the data (Hang et al. 2023, gamma = 5)."""

    gamma: float = 5.0

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"gamma must be positive; got {self.gamma}.")

    def weight(self, c: Coefficients, target: Target) -> Tensor:
        snr = (c.alpha / c.sigma).square()
        return measured_in(spaces.Data(), target, c) * snr.clamp_max(self.gamma)
