"""The network of two times as a torch module.  Only this file imports torch when it is loaded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sitkit import SiT, TimestepEmbedder, UserError


class TwoTimes(nn.Module):
    """The sum of the embeddings of the start and of the length: (b, 2) or (b,) -> (b, d).  A single time has length 0."""

    def __init__(self, start: TimestepEmbedder) -> None:
        super().__init__()
        first = start.mlp[0]
        assert isinstance(first, nn.Linear)
        self.start, self.length = start, TimestepEmbedder(first.out_features, start.time_scale)
        for module in self.length.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, t: Tensor) -> Tensor:
        pair = t if t.ndim == 2 else torch.stack((t, t), 1)
        return self.start(pair[:, 0]) + self.length(pair[:, 1] - pair[:, 0])


def with_two_times(network: nn.Module) -> nn.Module:
    """Replace the time embedder of a SiT, and return the SiT.  Raises UserError for another network."""
    if not isinstance(network, SiT):
        raise UserError("backbone 'two-time' needs a SiT: set backbone.of to a SiT.")
    network.t_embedder = TwoTimes(network.t_embedder)  # pyright: ignore[reportAttributeAccessIssue]
    network.times = 2  # pyright: ignore[reportArgumentType]
    return network
