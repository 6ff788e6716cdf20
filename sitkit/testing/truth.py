"""Closed-form truth to measure components against, and a network that counts its calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sitkit.models.exact import Exact
from sitkit.transport.closed_form import MixturePosterior
from sitkit.transport.field import Field
from sitkit.transport.interpolant import Coefficients, Interpolant
from sitkit.transport.target import Target, Velocity

MEAN, STD = 0.7, 0.3


@dataclass(frozen=True)
class GaussianTruth:
    """The law N(mean, std^2 I) of unlabelled data in any dimension."""

    mean: float
    std: float
    num_classes: int = 0

    def posterior(self, c: Coefficients, x: Tensor, y: Tensor) -> MixturePosterior:
        """E[data | x] = mean + alpha std^2 (x - alpha mean) / R, score = -(x - alpha mean) / R, R = alpha^2 std^2 + sigma^2."""
        pull = (x - c.alpha * self.mean) / ((c.alpha * self.std).square() + c.sigma.square())
        return MixturePosterior(self.mean + c.alpha * self.std**2 * pull, -pull)

    def to(self, device: torch.device) -> GaussianTruth:
        """Itself."""
        return self


def gaussian_network(interpolant: Interpolant, target: Target, mean: float = 0.0, std: float = 1.0) -> Exact:
    """The ideal network for data ~ N(mean, std^2 I): network(x, t, y) = E[a data + b noise | x_t = x], in closed form."""
    return Exact(GaussianTruth(mean, std), interpolant, target)


def gaussian_field(interpolant: Interpolant, target: Target, mean: float = MEAN, std: float = STD) -> Field:
    """`gaussian_network` as a field."""
    return Field(gaussian_network(interpolant, target, mean, std), interpolant, target)


class GaussianAverage:
    """The ideal network of two times for data ~ N(mean, std^2 I): the mean of the velocity over an interval, closed form.

    t: (b, 2), start and end.  The flow keeps (x - alpha mean) / R with R = sqrt(alpha^2 std^2 + sigma^2), so from start t
    to end s it is (alpha_s mean + R_s / R_t (x - alpha_t mean) - x) / (s - t), and the velocity itself where s = t.
    """

    num_classes, times = 0, 2

    def __init__(self, interpolant: Interpolant, mean: float = MEAN, std: float = STD) -> None:
        self.interpolant, self.mean, self.std = interpolant, mean, std
        self.velocity = gaussian_network(interpolant, Velocity(), mean, std)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """u(x, t_0, t_1), of x's shape."""
        (mean, spread), (mean_after, spread_after) = (self._moments(x, time) for time in t.T)
        length = t.diff(dim=1).reshape(-1, *[1] * (x.ndim - 1))
        moved = mean_after + spread_after / spread * (x - mean) - x
        return torch.where(length == 0, self.velocity(x, t[:, 0], y), moved / length.where(length != 0, 1)).to(x.dtype)

    def _moments(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        c = self.interpolant.at(t, x)
        return c.alpha * self.mean, ((c.alpha * self.std).square() + c.sigma.square()).sqrt()


def gaussian_moments(interpolant: Interpolant, t: float, mean: float = MEAN, std: float = STD) -> tuple[float, float]:
    """Mean and standard deviation of x_t for data ~ N(mean, std^2)."""
    c = interpolant.coefficients(torch.tensor(t, dtype=torch.float64))
    return float(c.alpha) * mean, math.hypot(float(c.alpha) * std, float(c.sigma))


class Calls:
    """A network that counts its evaluations, row by row."""

    def __init__(self, network: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        self.network, self.rows = network, 0
        self.times = getattr(network, "times", 1)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The network's answer."""
        self.rows += len(x)
        return self.network(x, t, y)
