"""Loss weights r(t): the space in which the error of a prediction is measured.

For fixed x the predictions are affine in one another, so the squared error of target T measured in the space of S
is r(t) |y_hat - y|^2 with r = (det_S / det_T)^2 and det = a sigma - b alpha (`sitkit.transport.target.determinant`).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, final

from sitkit.registry import Component, weightings
from sitkit.runtime.errors import require_positive, require_within
from sitkit.transport import target as spaces
from sitkit.transport.interpolant import Coefficients
from sitkit.transport.target import Target, determinant

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Weighting(Component):
    """A positive weight r(t) on the squared error of a prediction.

    A subclass defines `weight`, and divides by the coefficients of `floored` alone.

    Args:
        floor: the smallest alpha and sigma that r divides by; 0 is none, and None the floor of the target, which is 0.25 for
            the data and 0 for others.  Without it r of a singular target is unbounded at an end of the path.
    """

    floor: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.floor is not None:
            require_within(0, 1, floor=self.floor)

    def floored(self, c: Coefficients, target: Target) -> Coefficients:
        """Return the coefficients with alpha and sigma of at least the floor."""
        floor = target.floor if self.floor is None else self.floor
        return c._replace(alpha=c.alpha.clamp_min(floor), sigma=c.sigma.clamp_min(floor)) if floor else c

    @abstractmethod
    def weight(self, c: Coefficients, target: Target) -> Tensor:
        """Return r(t) >= 0, of the coefficients' shape, which multiplies |y_hat - y|^2 of `target`."""


def measured_in(space: Target, target: Target, c: Coefficients, floored: Coefficients | None = None) -> Tensor:
    """Return r with which the squared error of one target becomes that of another.

    Args:
        space: the target S whose error is to be measured.
        target: the target T that the network predicts.
        c: the interpolant's coefficients at the times of the examples.
        floored: those that the divisor det_T is made of, by default c; a weighting gives its `floored`.

    Returns:
        r = (det_S / det_T)^2, of the coefficients' shape; exactly 1 where the determinants are equal, also where both are
        0 or infinite.

    With S the velocity and T the score r = lambda^2 sigma^2, the weight of SiT Eq. 46-50.
    """
    of_space = determinant(space, c)
    of_target = determinant(target, c if floored is None else floored)
    return (of_space / of_target).where(of_space != determinant(target, c), 1.0).square()


@dataclass(frozen=True)
class InSpace(Weighting):
    """The error of one reading, whatever the network predicts: r = (det_S / det_T)^2 with S the target of that reading."""

    space: ClassVar[Target]

    def weight(self, c: Coefficients, target: Target) -> Tensor:
        return measured_in(self.space, target, c, self.floored(c, target))


@final
@weightings.register("velocity")
class VelocitySpace(InSpace):
    """The error of the velocity: r = (det_v / det_T)^2.

    With the score target this is the paper's L_{s_lambda} (SiT Eq. 46-50), with the velocity target its L_v (Eq. 7).
    """

    space = spaces.Velocity()


@final
@weightings.register("noise")
class NoiseSpace(InSpace):
    """The error of the noise: r = (alpha / det_T)^2.  With the score target this is the paper's L_s (SiT Eq. 6)."""

    space = spaces.Noise()


@final
@weightings.register("score")
class ScoreSpace(InSpace):
    """The error of the score: r = (alpha / (sigma det_T))^2."""

    space = spaces.Score()


@final
@weightings.register("data")
class DataSpace(InSpace):
    """The error of the data: r = (sigma / det_T)^2."""

    space = spaces.Data()


@final
@weightings.register("likelihood")
class Likelihood(Weighting):
    """The maximum-likelihood weight up to 1/2: lambda / sigma on the error of the noise, lambda = det_v / alpha.

    Singular at both ends.
    Source: Song et al. 2021 (likelihood weighting); the official code's `loss_weight="likelihood"`.
    """

    def weight(self, c: Coefficients, target: Target) -> Tensor:
        floored = self.floored(c, target)
        rate = determinant(spaces.Velocity(), c) / (floored.alpha * floored.sigma)
        return measured_in(spaces.Noise(), target, c, floored) * rate


@final
@weightings.register("min-snr")
@dataclass(frozen=True)
class MinSNR(Weighting):
    """The weight min(alpha^2 / sigma^2, gamma) on the error of the data.

    Args:
        gamma: largest signal-to-noise ratio that counts; 5 in the paper.

    Source: Hang et al. 2023 (arXiv 2303.09556).
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(gamma=self.gamma)

    def weight(self, c: Coefficients, target: Target) -> Tensor:
        floored = self.floored(c, target)
        snr = (c.alpha / floored.sigma).square()
        return measured_in(spaces.Data(), target, c, floored) * snr.clamp_max(self.gamma)
