"""Couplings by optimal transport within a batch, computed by POT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

from sitkit import Coupling, couplings

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# The purpose of this plugin's random numbers.  sitkit's own purposes are numbers below 1000.
PAIR = 1701


def content_keys(x: Tensor) -> Tensor:
    """Return an int64 key for each row, computed from its bits alone: (b, ...) -> (b,)."""
    import torch

    bits = x.flatten(1).float().contiguous().view(torch.int32).long()
    odd = torch.arange(bits.shape[1]) * 0x9E3779B97F4A7C15 // 2**32 * 2 + 1
    return (bits * odd).sum(1)


@final
@couplings.register("pot")
@dataclass(frozen=True)
class POT(Coupling):
    """Pairs from a transport plan of least cost within the batch: the exact plan, or one smoothed by entropy.

    The plan "emd" is exact: it is a permutation.  The plan "sinkhorn" minimises cost - reg * mean(cost) * entropy, so a
    small reg is nearly exact and a large reg nearly independent.  The noise of a data point is then drawn from its row
    of the plan.  The random number of this draw is a function of the bits of the noise, so equal batches give equal
    pairs.  A noise may go with two data points or with none.  Every column of the plan sums to one, so each noise is
    used once in expectation and the noise stays N(0, I).  Unbalanced plans would change its distribution, but sampling
    starts from N(0, I); so this class does not offer them.

    Args:
        plan: "emd" or "sinkhorn".
        cost: the distance between data and noise that the plan minimises.
        reg: the weight of the entropy, relative to the mean cost; only "sinkhorn" reads it.
        by_class: pair within each label only.  Without it, the noise of one label is no longer N(0, I) given that
            label, but conditional sampling starts from N(0, I): samples are biased (Cheng and Schwing 2025,
            arXiv 2503.10636).

    Source: Tong et al. 2024 (arXiv 2302.00482); Pooladian et al. 2023 (arXiv 2304.14772).
    """

    whole_batch: ClassVar[bool] = True

    plan: Literal["emd", "sinkhorn"] = "emd"
    cost: Literal["sqeuclidean", "euclidean", "cosine"] = "sqeuclidean"
    reg: float = 0.05
    by_class: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.reg < float("inf"):
            raise ValueError(f"reg must be positive and finite; got {self.reg}.")

    @property
    def permutes(self) -> bool:
        """Whether each noise is used exactly once."""
        return self.plan == "emd"

    def pair(self, data: Tensor, noise: Tensor, y: Tensor) -> Tensor:
        import ot
        import torch

        first, second = (x.flatten(1).double().cpu().numpy() for x in (data, noise))
        order = torch.arange(len(data))
        whole_batch = [torch.arange(len(data))]
        for rows in [(y == label).nonzero()[:, 0].cpu() for label in y.unique()] if self.by_class else whole_batch:
            index = rows.numpy()
            cost: Any = ot.dist(first[index], second[index], metric=self.cost)
            partners = self._choose(cost, noise.cpu()[rows])
            order[rows] = rows[torch.from_numpy(partners)]
        return noise[order.to(noise.device)]

    def _choose(self, cost: np.ndarray, noise: Tensor) -> np.ndarray:
        """Return the index of the noise of each data point: cost (n, n) -> (n,)."""
        import ot
        import torch

        from sitkit import uniform

        if self.plan == "emd":
            return ot.emd([], [], cost).argmax(1)
        reg = self.reg * max(float(cost.mean()), 1e-12)
        plan = torch.from_numpy(ot.sinkhorn([], [], cost, reg, method="sinkhorn_log", numItermax=500, stopThr=1e-4))
        cumulated = plan.cumsum(1)
        draw = uniform(content_keys(noise), PAIR)[:, None] * cumulated[:, -1:]
        return torch.searchsorted(cumulated, draw)[:, 0].clamp_max(len(cost) - 1).numpy()
