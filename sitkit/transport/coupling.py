"""Which noise goes with which data within a training batch."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from sitkit.registry import Component, couplings

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Coupling(Component):
    """A rule that reorders the noise of a batch.

    whole_batch: whether the order depends on the other rows, so that no part of a batch can be paired by itself.
    """

    whole_batch: ClassVar[bool] = True

    @property
    def permutes(self) -> bool:
        """Whether each noise is used once; where not, it is used once in expectation."""
        return True

    @abstractmethod
    def pair(self, data: Tensor, noise: Tensor, y: Tensor) -> Tensor:
        """The noise (b, ...) reordered so that row i goes with data[i], each row used once, so that its law is kept."""


@final
@couplings.register("independent")
@dataclass(frozen=True)
class Independent(Coupling):
    """Noise as drawn: the product of the two laws (SiT section 2)."""

    whole_batch: ClassVar[bool] = False

    def pair(self, data: Tensor, noise: Tensor, y: Tensor) -> Tensor:
        return noise


@final
@couplings.register("minibatch-ot")
@dataclass(frozen=True)
class MinibatchOT(Coupling):
    """The permutation of least total squared distance within the batch (Tong et al. 2024; Pooladian et al. 2023).

    `by_class` matches within each label only.  Without it the noise that goes with a label is no longer N(0, I) given
    that label, while sampling starts every label from N(0, I): conditional samples are then biased.
    """

    by_class: bool = True

    def pair(self, data: Tensor, noise: Tensor, y: Tensor) -> Tensor:
        import torch
        from scipy.optimize import linear_sum_assignment

        cost = torch.cdist(data.flatten(1).double(), noise.flatten(1).double()).square().cpu()
        everyone = torch.arange(len(data))
        order = everyone.clone()
        for rows in [(y == label).nonzero()[:, 0].cpu() for label in y.unique()] if self.by_class else [everyone]:
            chosen = linear_sum_assignment(cost[rows][:, rows].numpy())[1]
            order[rows] = rows[torch.from_numpy(chosen)]
        return noise[order.to(noise.device)]
