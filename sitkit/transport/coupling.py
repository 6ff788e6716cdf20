"""Couplings: the pairs of data and noise within a training batch."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from sitkit.registry import Component, couplings

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Coupling(Component):
    """A rule that reorders the noise of a training batch.

    A subclass defines `pair`.  `whole_batch` says whether the order depends on the other rows, so that no part of a batch
    can be paired by itself.
    """

    whole_batch: ClassVar[bool] = True

    @property
    def permutes(self) -> bool:
        """Whether each noise is used exactly once; if not, it is used once in expectation."""
        return True

    @abstractmethod
    def pair(self, data: Tensor, noise: Tensor, y: Tensor) -> Tensor:
        """Return the noise, reordered so that row i goes with data[i].

        Args:
            data: (b, ...), the batch.
            noise: (b, ...), independent draws of N(0, I).
            y: (b,) int64, the labels of the data.

        Returns:
            (b, ...), the rows of `noise` in another order.  Each row is used once, so the law of the noise is kept.
        """


@final
@couplings.register("independent")
class Independent(Coupling):
    """The noise in its own order: the product of the two laws (SiT section 2)."""

    whole_batch = False

    def pair(self, data: Tensor, noise: Tensor, y: Tensor) -> Tensor:
        return noise


@final
@couplings.register("minibatch-ot")
@dataclass(frozen=True)
class MinibatchOT(Coupling):
    """The permutation with the least total squared distance within the batch (minibatch optimal transport).

    Args:
        by_class: whether to match within each label only.  Without it the noise that goes with a label is not N(0, I)
            given that label, while sampling starts every label from N(0, I), so conditional samples are biased.

    Source: Tong et al. 2024 (arXiv 2302.00482); Pooladian et al. 2023 (arXiv 2304.14772).
    """

    by_class: bool = True

    def pair(self, data: Tensor, noise: Tensor, y: Tensor) -> Tensor:
        import torch
        from scipy.optimize import linear_sum_assignment

        cost = torch.cdist(data.flatten(1).double(), noise.flatten(1).double()).square().cpu()
        order = torch.arange(len(data))
        for rows in [(y == label).nonzero()[:, 0].cpu() for label in y.unique()] if self.by_class else [order.clone()]:
            columns = linear_sum_assignment(cost[rows][:, rows].numpy())[1]
            order[rows] = rows[torch.from_numpy(columns)]
        return noise[order.to(noise.device)]
