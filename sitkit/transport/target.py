"""What the network predicts: y = a * data + b * noise.

With x = alpha * data + sigma * noise known, two linear equations give data and noise, and from them every other
reading (`data_and_noise`).  N targets cost N pairs of weights, not N^2 conversions.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from sitkit.registry import Component, targets
from sitkit.transport.interpolant import TINY, Coefficients

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Target(Component):
    """A pair of weights (a, b): the network predicts y = a * data + b * noise.

    A subclass defines `weights`.  It may name in `weighting` the weighting that is used when the user gives none, and in
    `floor` the smallest alpha and sigma that enter a weighting without a floor of its own.
    """

    weighting: ClassVar[str] = "velocity"
    floor: ClassVar[float] = 0.0

    @abstractmethod
    def weights(self, c: Coefficients) -> tuple[Tensor, Tensor]:
        """Return (a, b), each of the coefficients' shape."""


@final
@targets.register("velocity")
class Velocity(Target):
    """The velocity y = d_alpha * data + d_sigma * noise (SiT Eq. 7).

    Its determinant is positive, so every reading but the score is finite at both ends.
    """

    def weights(self, c: Coefficients) -> tuple[Tensor, Tensor]:
        return c.d_alpha, c.d_sigma


@final
@targets.register("score")
class Score(Target):
    """The score y = -noise / sigma, the gradient of log p_t (SiT Eq. 6).  Singular where alpha = 0.

    At sigma = 0 the weight is -1e30 instead of infinite: noise then reads 0 and data reads x / alpha, their limits.
    """

    weighting = "noise"

    def weights(self, c: Coefficients) -> tuple[Tensor, Tensor]:
        return c.alpha.new_zeros(c.alpha.shape), -1 / c.sigma.clamp_min(TINY)


@final
@targets.register("noise")
class Noise(Target):
    """The noise y = noise (DDPM's epsilon).  Singular where alpha = 0."""

    weighting = "noise"

    def weights(self, c: Coefficients) -> tuple[Tensor, Tensor]:
        return c.alpha.new_zeros(c.alpha.shape), c.alpha.new_ones(c.alpha.shape)


@final
@targets.register("data")
class Data(Target):
    """The data y = data (a denoiser).  Singular where sigma = 0.

    The weight of the velocity's error grows as 1 / sigma^2, up to 16 with the floor 0.25.  With times uniform in [0, 1] a floor
    f gives a mean weight of 2 / f - 1, here 7.  Li and He 2025 (JiT, arXiv 2511.13720) have 0.05 with times near the noise.
    """

    version = 2
    floor = 0.25

    def weights(self, c: Coefficients) -> tuple[Tensor, Tensor]:
        return c.alpha.new_ones(c.alpha.shape), c.alpha.new_zeros(c.alpha.shape)


def determinant(target: Target, c: Coefficients) -> Tensor:
    """Return det = a * sigma - b * alpha, the determinant of (x, y) as a function of (data, noise)."""
    a, b = target.weights(c)
    return a * c.sigma - b * c.alpha


def data_and_noise(target: Target, c: Coefficients, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (data, noise) that follow from a prediction y of `target` at x.  Singular where det = 0."""
    a, b = target.weights(c)
    det = a * c.sigma - b * c.alpha
    return (c.sigma * y - b * x) / det, (a * x - c.alpha * y) / det
