"""Closed-form truth to measure components against, and a network that counts its calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sitkit.backbones.exact import Exact
from sitkit.field import Field
from sitkit.interpolant import Coefficients, Interpolant
from sitkit.mixture import Posterior
from sitkit.target import Target

MEAN, STD = 0.7, 0.3


@dataclass(frozen=True)
class Gaussian:
    """The law N(mean, std^2 I) of unlabelled data in any dimension."""

    mean: float
    std: float
    num_classes: int = 0

    def posterior(self, c: Coefficients, x: Tensor, y: Tensor) -> Posterior:
        """E[data | x] = mean + alpha std^2 (x - alpha mean) / R, score = -(x - alpha mean) / R, R = alpha^2 std^2 + sigma^2."""
        pull = (x - c.alpha * self.mean) / ((c.alpha * self.std).square() + c.sigma.square())
        return Posterior(self.mean + c.alpha * self.std**2 * pull, -pull)

    def to(self, device: torch.device) -> Gaussian:
        """Itself."""
        return self


def gaussian_network(interpolant: Interpolant, target: Target, mean: float = 0.0, std: float = 1.0) -> Exact:
    """The ideal network for data ~ N(mean, std^2 I): network(x, t, y) = E[a data + b noise | x_t = x], in closed form."""
    return Exact(Gaussian(mean, std), interpolant, target)


def gaussian_field(interpolant: Interpolant, target: Target, mean: float = MEAN, std: float = STD) -> Field:
    """`gaussian_network` as a field."""
    return Field(gaussian_network(interpolant, target, mean, std), interpolant, target)


def gaussian_moments(interpolant: Interpolant, t: float, mean: float = MEAN, std: float = STD) -> tuple[float, float]:
    """Mean and standard deviation of x_t for data ~ N(mean, std^2)."""
    c = interpolant.coefficients(torch.tensor(t, dtype=torch.float64))
    return float(c.alpha) * mean, math.hypot(float(c.alpha) * std, float(c.sigma))


class Calls:
    """A network that counts its evaluations, row by row."""

    def __init__(self, network: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        self.network, self.rows = network, 0

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The network's answer."""
        self.rows += len(x)
        return self.network(x, t, y)
