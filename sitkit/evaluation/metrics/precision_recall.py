"""Precision and recall: the fraction of one set within the neighbourhoods of the other set."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from sitkit.evaluation.metrics.metric import FeatureMetric, Measurement
from sitkit.registry import metrics
from sitkit.runtime.errors import UserError, require_within

if TYPE_CHECKING:
    from torch import Tensor

# Rows of a matrix of distances that are in memory at once.
DISTANCE_BLOCK = 1024


@dataclass(frozen=True)
class Neighbourhoods(FeatureMetric):
    """Base class: the fraction of one set within the manifold of the other: balls up to the k-th neighbour of each point."""

    lower_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "share"
    k: int = 3

    def __post_init__(self) -> None:
        require_within(1, 10**6, k=self.k)


@final
@metrics.register("precision")
@dataclass(frozen=True)
class Precision(Neighbourhoods):
    """The fraction of samples within the manifold of the reference: how many samples are realistic.

    The standard error is that of a fraction of n independent samples, with the reference fixed. The value depends on the
    number of reference points: compare equal sizes only.
    Source: Kynkaanniemi et al. 2019, arXiv 1904.06991, Eqs. 1-2 (k = 3).
    """

    def compare(self, samples: Tensor, reference: Tensor, *, seed: int = 0) -> Measurement:
        return fraction_within(samples, reference, self.k, "reference points")


@final
@metrics.register("recall")
@dataclass(frozen=True)
class Recall(Neighbourhoods):
    """The fraction of the reference within the manifold of the samples: how much of the data is covered.

    There is no standard error, because other samples give another manifold; a note has the part of the reference points,
    which is a lower bound. The value depends on the number of samples: compare equal sizes, and repeat the seeds.
    Source: Kynkaanniemi et al. 2019, arXiv 1904.06991, Eqs. 1-2 (k = 3).
    """

    version: ClassVar[int] = 2

    def compare(self, samples: Tensor, reference: Tensor, *, seed: int = 0) -> Measurement:
        value, bound, _ = fraction_within(reference, samples, self.k, "samples")
        return Measurement(value, None, (f"the standard error of recall is at least {bound:.2g}",))


def fraction_within(points: Tensor, manifold: Tensor, k: int, name: str) -> Measurement:
    """Return the fraction of points (n, d) within the balls around manifold (m, d) up to their k-th neighbours."""
    if len(manifold) <= k:
        raise UserError(f"k = {k} neighbours need more than {k} {name}; got {len(manifold)}.")
    n, value = len(points), float(within_manifold(points, manifold, radii(manifold, k)).double().mean())
    return Measurement(value, math.sqrt(value * (1 - value) / n))


def radii(x: Tensor, k: int) -> Tensor:
    """Return the distance of each row of x (m, d) to its k-th nearest other row, (m,)."""
    import torch

    # The nearest row is the point itself, at distance 0.
    return torch.cat([torch.cdist(part, x).kthvalue(k + 1).values for part in x.split(DISTANCE_BLOCK)])


def within_manifold(points: Tensor, centres: Tensor, radius: Tensor) -> Tensor:
    """Return whether each row of points (n, d) is in a ball around centres (m, d) with radius (m,), as (n,) bool."""
    import torch

    return torch.cat([(torch.cdist(part, centres) <= radius).any(1) for part in points.split(DISTANCE_BLOCK)])
