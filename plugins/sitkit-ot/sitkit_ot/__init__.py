"""Couplings by optimal transport within a batch, computed by POT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

from sitkit import couplings
from sitkit.transport.coupling import Coupling

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# Draws of plugins with a sample's key; sitkit's own purposes lie below 1000.
PAIR = 1701


@final
@couplings.register("pot")
@dataclass(frozen=True)
class POT(Coupling):
    """Pairs drawn from a transport plan of least cost within the batch: exact, or smoothed by entropy.

    plan "emd" is exact, a permutation.  "sinkhorn" minimises cost - reg * mean(cost) * entropy: small reg is nearly
    exact, large reg is nearly independent, and in between a data point's noise is drawn from its row of the plan, by
    the noise's own bits, so equal batches give equal pairs.  A noise may then go with two data points or with none;
    since every column of the plan sums to one it is used once in expectation, and the noise keeps its law.  Unbalanced
    plans would not keep it, while sampling starts from N(0, I): there are none here.

    by_class pairs within each label only.  Without it the noise of one label is no longer N(0, I) given that label, but
    conditional sampling starts there from N(0, I): samples are biased (Cheng and Schwing 2025, arXiv 2503.10636).
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
        everyone = [torch.arange(len(data))]
        for rows in [(y == label).nonzero()[:, 0].cpu() for label in y.unique()] if self.by_class else everyone:
            index = rows.numpy()
            cost: Any = ot.dist(first[index], second[index], metric=self.cost)
            chosen = self._choose(cost, noise.cpu()[rows])
            order[rows] = rows[torch.from_numpy(chosen)]
        return noise[order.to(noise.device)]

    def _choose(self, cost: np.ndarray, noise: Tensor) -> np.ndarray:
        """For each data point the place of its noise: cost (n, n) -> (n,)."""
        import ot
        import torch

        from sitkit.runtime.rng import uniform

        if self.plan == "emd":
            return ot.emd([], [], cost).argmax(1)
        reg = self.reg * max(float(cost.mean()), 1e-12)
        plan = torch.from_numpy(ot.sinkhorn([], [], cost, reg, method="sinkhorn_log", numItermax=500, stopThr=1e-4))
        cumulated = plan.cumsum(1)
        draw = uniform(content_keys(noise), PAIR)[:, None] * cumulated[:, -1:]
        return torch.searchsorted(cumulated, draw)[:, 0].clamp_max(len(cost) - 1).numpy()


def content_keys(x: Tensor) -> Tensor:
    """An int64 key for each row, a function of its bits alone: (b, ...) -> (b,)."""
    import torch

    bits = x.flatten(1).float().contiguous().view(torch.int32).long()
    odd = torch.arange(bits.shape[1]) * 0x9E3779B97F4A7C15 // 2**32 * 2 + 1
    return (bits * odd).sum(1)
