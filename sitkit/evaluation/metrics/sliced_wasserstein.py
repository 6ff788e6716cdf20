"""Sliced Wasserstein: optimal transport along random directions, which is sorting."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from sitkit.evaluation.metrics.metric import FeatureMetric, Measurement, bootstrap_error, generator, require_resamples
from sitkit.registry import metrics
from sitkit.runtime.errors import require_within

# Directions in memory at once, so that memory does not grow with `projections`.
DIRECTIONS_AT_ONCE = 32

if TYPE_CHECKING:
    from torch import Tensor


@final
@metrics.register("sliced-wasserstein")
@dataclass(frozen=True)
class SlicedWasserstein(FeatureMetric):
    """sqrt(mean over unit directions u of W2^2(u.x, u.y)), with random directions drawn from the seed.

    The unit is feature units. The bias for finite sets is positive: compare with `real`.

    Args:
        projections: the number of directions.
        bootstrap: resamples of the samples for the standard error, with directions and reference fixed, which is too large
            (by up to sqrt 3) for samples that are nearly the reference; 0: the delta method, from the Kantorovich
            potential of each sample.

    Source: Rabin et al. 2011; Bonneel et al. 2015, "Sliced and Radon Wasserstein barycenters of measures".
    """

    unit: ClassVar[str] = "feature units"
    projections: int = 256
    bootstrap: int = 0

    def __post_init__(self) -> None:
        require_within(1, 10**6, projections=self.projections)
        require_resamples(self.bootstrap)

    def compare(self, samples: Tensor, reference: Tensor, *, seed: int = 0) -> Measurement:
        u = directions(self.projections, samples.shape[1], seed)
        value = sliced_wasserstein(samples, reference, u)
        if self.bootstrap:
            error = bootstrap_error(lambda x: sliced_wasserstein(x, reference, u), samples, self.bootstrap, seed + 1)
        else:
            error = wasserstein_delta_error(samples, reference, u, value)
        return Measurement(value, error)


def directions(count: int, dimension: int, seed: int) -> Tensor:
    """Return unit vectors (count, dimension), float64, uniform on the sphere."""
    import torch

    u = torch.randn(count, dimension, generator=generator(seed), dtype=torch.float64)
    return u / u.norm(dim=1, keepdim=True)


def projections(samples: Tensor, reference: Tensor, u: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield samples (n, d) and reference (m, d) along blocks of the directions u (k, d)."""
    for block in u.split(DIRECTIONS_AT_ONCE):
        yield samples.double() @ block.T, reference.double() @ block.T


def sliced_wasserstein(samples: Tensor, reference: Tensor, u: Tensor) -> float:
    """Return sqrt(mean_k W2^2(u_k . x, u_k . y)) of samples (n, d) and reference (m, d) along u (k, d)."""
    import torch

    squared = [squared_distance(x, y) for x, y in projections(samples, reference, u)]
    return math.sqrt(float(torch.cat(squared).mean()))


def squared_distance(x: Tensor, y: Tensor) -> Tensor:
    """Return W2^2 between the empirical laws of each column of x (n, k) and y (m, k), (k,).

    Both quantile functions are step functions, with steps at multiples of 1/n and of 1/m. Between two steps their
    difference is constant, so the integral of its square over [0, 1] is a sum of n + m terms, exact for unequal n and m.
    """
    import torch

    n, m = len(x), len(y)
    # Levels in units of 1 / (n m) are integers, so that ties are exact.
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).sort().values
    weights = ends.diff(prepend=ends.new_zeros(1)).to(x.dtype) / (n * m)
    gaps = x.sort(0).values[(ends - 1) // m] - y.sort(0).values[(ends - 1) // n]
    return weights @ gaps.square()


def wasserstein_delta_error(samples: Tensor, reference: Tensor, u: Tensor, value: float) -> float:
    """Return the standard error of `value` = sqrt(mean_k W2^2_k), from the influence of each sample on the mean of W2^2_k.

    The mean square of the influences of n samples is a + b/n, and the variance is (a + b/2n) / n: b is the part of second
    order, which is most of it for samples that are nearly the reference. The mean square in halves gives a + 2b/n.
    The slope of the root is 1 / (2 value); the error of a value of 0 is 0.
    """
    n = len(samples)
    whole = influence_variance(samples, reference, u)
    halves = sum(influence_variance(samples[start::2], reference, u) for start in (0, 1)) / 2 if n > 3 else whole
    variance = (whole - min(max(halves - whole, 0), whole) / 2) / n
    return math.sqrt(variance) / (2 * value) if value > 0 else 0.0


def influence_variance(samples: Tensor, reference: Tensor, u: Tensor) -> float:
    """Return the variance over the samples of their influence on the mean of W2^2 along the directions u."""
    import torch

    total = torch.zeros(len(samples), dtype=torch.float64)
    for x, y in projections(samples, reference, u):
        total += potential(x, y).sum(1).cpu()
    return float((total / len(u)).var())


def potential(x: Tensor, y: Tensor) -> Tensor:
    """Return the influence (n, k) of each point on W2^2 between the columns of x (n, k) and y (m, k), up to a constant.

    The influence is the Kantorovich potential, whose slope is 2 (x - T(x)). Between neighbours x_i < x_{i+1} the value of
    the map T is the quantile of y at level i / n (del Barrio and Loubes 2019, Theorem 4.1).
    """
    import torch

    n, m = len(x), len(y)
    order = x.argsort(0)
    x, y = x.gather(0, order), y.sort(0).values
    level = torch.arange(1, n, device=x.device) * m
    # At a level where the quantile jumps, take the middle of the jump.
    quantile = (y[(level + n - 1) // n - 1] + y[level // n]) / 2
    rises = x[1:].square() - x[:-1].square() - 2 * quantile * x.diff(dim=0)
    heights = torch.cat([torch.zeros_like(x[:1]), rises.cumsum(0)])
    return torch.empty_like(heights).scatter_(0, order, heights)
