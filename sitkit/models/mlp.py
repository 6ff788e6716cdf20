"""A residual perceptron for points of any shape."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

HARMONICS = 6


class MLP(nn.Module):
    """The residual perceptron: x (b, *shape), t (b,), y (b,) int64 -> (b, *shape)."""

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int,
        *,
        hidden_size: int,
        depth: int,
        class_dropout: float,
        time_scale: float,
    ) -> None:
        super().__init__()
        self.num_classes, self.class_dropout, self.time_scale = num_classes, class_dropout, time_scale
        self.x_embedder = nn.Linear(math.prod(shape), hidden_size)
        self.t_embedder = nn.Linear(2 * HARMONICS, hidden_size)
        self.y_embedder = nn.Embedding(num_classes + 1, hidden_size)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.SiLU(), nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(hidden_size, math.prod(shape))
        nn.init.zeros_(self.head.weight)  # The initial prediction is 0, as that of SiT.
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        dtype = torch.promote_types(t.dtype, torch.float32)
        frequencies = self.time_scale * math.pi * 2.0 ** torch.arange(HARMONICS, dtype=dtype, device=t.device)
        angles = t.to(dtype)[:, None] * frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.t_embedder.weight.dtype)
        c = self.t_embedder(features) + self.y_embedder(y)
        h = self.x_embedder(x.flatten(1))
        for layer in self.layers:
            h = h + layer(h + c)
        return self.head(silu(h)).view_as(x)
