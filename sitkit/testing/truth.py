"""Closed-form truth: laws of data for which the ideal network is a formula."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sitkit.models.exact import Exact
from sitkit.solvers.moments import LAW_MEAN, LAW_STD
from sitkit.transport.closed_form import MixturePosterior
from sitkit.transport.field import Field
from sitkit.transport.interpolant import Coefficients, Interpolant
from sitkit.transport.target import Target, Velocity

MEAN, STD = LAW_MEAN, LAW_STD


@dataclass(frozen=True)
class GaussianTruth:
    """The law N(mean, std^2 I) of unlabelled data in any dimension.

    Args:
        mean: the mean of every coordinate.
        std: the standard deviation of every coordinate.
        num_classes: the number of classes, 0.
    """

    mean: float
    std: float
    num_classes: int = 0

    def posterior(self, c: Coefficients, x: Tensor, y: Tensor) -> MixturePosterior:
        """Return E[data | x] and the score.

        With R = alpha^2 std^2 + sigma^2 they are mean + alpha std^2 (x - alpha mean) / R and -(x - alpha mean) / R.
        """
        pull = (x - c.alpha * self.mean) / ((c.alpha * self.std).square() + c.sigma.square())
        return MixturePosterior(self.mean + c.alpha * self.std**2 * pull, -pull)

    def to(self, device: torch.device) -> GaussianTruth:
        """Return the law itself: it holds no tensor."""
        return self


def gaussian_network(interpolant: Interpolant, target: Target, mean: float = 0.0, std: float = 1.0) -> Exact:
    """Return the ideal network for data ~ N(mean, std^2 I).

    Args:
        interpolant: the path between noise and data.
        target: the quantity a data + b noise that the network predicts.
        mean: the mean of every coordinate of the data, 0 by default.
        std: the standard deviation of every coordinate, 1 by default.

    Returns:
        A network with network(x, t, y) = E[a data + b noise | x_t = x], in closed form.
    """
    return Exact(GaussianTruth(mean, std), interpolant, target)


def gaussian_field(interpolant: Interpolant, target: Target, mean: float = MEAN, std: float = STD) -> Field:
    """Return the field of the ideal network for data ~ N(mean, std^2 I).

    Args:
        interpolant: the path between noise and data.
        target: the quantity that the network predicts.
        mean: the mean of every coordinate of the data, 0.7 by default.
        std: the standard deviation of every coordinate, 0.3 by default.

    Returns:
        The field of `gaussian_network`.
    """
    return Field(gaussian_network(interpolant, target, mean, std), interpolant, target)


class GaussianAverage:
    """The ideal network of two times for data ~ N(mean, std^2 I): the mean of the velocity over an interval.

    The flow keeps (x - alpha mean) / R with R = sqrt(alpha^2 std^2 + sigma^2), so the mean velocity from start t to end s
    is (alpha_s mean + R_s / R_t (x - alpha_t mean) - x) / (s - t), and the velocity itself for s = t.

    Args:
        interpolant: the path between noise and data.
        mean: the mean of every coordinate of the data, 0.7 by default.
        std: the standard deviation of every coordinate, 0.3 by default.
    """

    num_classes, times = 0, 2

    def __init__(self, interpolant: Interpolant, mean: float = MEAN, std: float = STD) -> None:
        self.interpolant, self.mean, self.std = interpolant, mean, std
        self.velocity = gaussian_network(interpolant, Velocity(), mean, std)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the mean velocity, of x's shape; t has the shape (b, 2): start and end."""
        (mean, spread), (mean_after, spread_after) = (self._moments(x, time) for time in t.T)
        length = t.diff(dim=1).reshape(-1, *[1] * (x.ndim - 1))
        moved = mean_after + spread_after / spread * (x - mean) - x
        return torch.where(length == 0, self.velocity(x, t[:, 0], y), moved / length.where(length != 0, 1)).to(x.dtype)

    def _moments(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        c = self.interpolant.at(t, x)
        return c.alpha * self.mean, ((c.alpha * self.std).square() + c.sigma.square()).sqrt()


def gaussian_moments(interpolant: Interpolant, t: float, mean: float = MEAN, std: float = STD) -> tuple[float, float]:
    """Return the moments of x_t for data ~ N(mean, std^2).

    Args:
        interpolant: the path between noise and data.
        t: the time, 0 at noise and 1 at data.
        mean: the mean of the data, 0.7 by default.
        std: the standard deviation of the data, 0.3 by default.

    Returns:
        The mean and the standard deviation of each coordinate of x_t.
    """
    c = interpolant.coefficients(torch.tensor(t, dtype=torch.float64))
    return float(c.alpha) * mean, math.hypot(float(c.alpha) * std, float(c.sigma))
