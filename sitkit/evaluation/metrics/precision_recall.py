"""Precision and recall: which points of one set lie in the neighbourhoods of the other's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from sitkit.evaluation.metrics.metric import FeatureMetric, Measurement
from sitkit.registry import metrics
from sitkit.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# Rows of a matrix of distances held at once.
DISTANCE_BLOCK = 1024


@dataclass(frozen=True)
class Neighbourhoods(FeatureMetric):
    """A share of one set that lies within the other's manifold: the balls that reach to each point's k-th neighbour."""

    lower_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "share"
    k: int = 3

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1; got {self.k}.")


@final
@metrics.register("precision")
@dataclass(frozen=True)
class Precision(Neighbourhoods):
    """The share of samples that lie within the reference's manifold: how many are realistic.

    Standard error: that of a share of n independent samples, the reference fixed.  Depends on the number of reference
    points: compare at equal sizes only.  Source: Kynkaanniemi et al. 2019, arXiv 1904.06991, Eqs. 1-2 (k = 3).
    """

    def compare(self, samples: Tensor, reference: Tensor, *, seed: int = 0) -> Measurement:
        return fraction_within(samples, reference, self.k, "reference points")


@final
@metrics.register("recall")
@dataclass(frozen=True)
class Recall(Neighbourhoods):
    """The share of the reference that lies within the samples' manifold: how much of the data is covered.

    Standard error: that of a share of m independent reference points, the samples fixed; it leaves out how the manifold
    would change with other samples.  Depends on the number of samples: compare at equal sizes only.
    Source: Kynkaanniemi et al. 2019, arXiv 1904.06991, Eqs. 1-2 (k = 3).
    """

    def compare(self, samples: Tensor, reference: Tensor, *, seed: int = 0) -> Measurement:
        return fraction_within(reference, samples, self.k, "samples")


def fraction_within(points: Tensor, manifold: Tensor, k: int, what: str) -> Measurement:
    """The share of points (n, d) within the balls around manifold (m, d), each as wide as its k-th neighbour is far."""
    if len(manifold) <= k:
        raise UserError(f"k = {k} neighbours need more than {k} {what}; got {len(manifold)}.")
    n, value = len(points), float(within_manifold(points, manifold, radii(manifold, k)).double().mean())
    return Measurement(value, math.sqrt(value * (1 - value) / n))


def radii(x: Tensor, k: int) -> Tensor:
    """The distance of each row of x (m, d) to its k-th nearest other row, (m,)."""
    import torch

    # The nearest of all is the point itself, at 0.
    return torch.cat([torch.cdist(part, x).kthvalue(k + 1).values for part in x.split(DISTANCE_BLOCK)])


def within_manifold(points: Tensor, centres: Tensor, radius: Tensor) -> Tensor:
    """Whether each row of points (n, d) is in any ball around centres (m, d), radius (m,) -> (n,) bool."""
    import torch

    return torch.cat([(torch.cdist(part, centres) <= radius).any(1) for part in points.split(DISTANCE_BLOCK)])
