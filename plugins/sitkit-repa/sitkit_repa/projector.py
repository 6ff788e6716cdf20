"""What is trained beside the network: a perceptron from hidden tokens to the encoder's space."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from sitkit import Extraction, UserError


class Projector(nn.Module):
    """hidden (b, tokens, d), data (b, ...) -> (b,): the mean over tokens of cos(perceptron(hidden), encoder(data))."""

    def __init__(self, encoder: Extraction, reads: str, tokens: int, d: int, width: int, out: int) -> None:
        super().__init__()
        # Not a submodule: the encoder is frozen, and no part of a checkpoint.
        self.encoder, self.reads, self.tokens = encoder, reads, tokens
        self.layers = nn.Sequential(
            nn.Linear(d, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, out)
        )

    def forward(self, hidden: Tensor, data: Tensor) -> Tensor:
        with torch.no_grad():
            seen = self.encoder.apply(data)[self.reads].float()
        # Spatial features are (channels, places): a token's are those of its place.
        seen = seen.unflatten(1, (-1, self.tokens)).transpose(1, 2)
        ours = hidden if self.tokens > 1 else hidden.mean(1, keepdim=True)
        return cosine_similarity(self.layers(ours).float(), seen, dim=2).mean(1)


def hidden_shape(network: nn.Module, layer: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """(tokens, width) of a layer's output.  Raises UserError for a layer that gives no tokens."""
    found: list[Any] = []

    def keep(module: nn.Module, given: Any, out: Any) -> None:
        found.append(out)

    hook = network.get_submodule(layer).register_forward_hook(keep)
    try:
        parameter = next(network.parameters())
        x = torch.zeros(1, *shape, device=parameter.device)
        with torch.no_grad():
            network(x, x.new_zeros(1), torch.zeros(1, dtype=torch.int64, device=x.device))
    finally:
        hook.remove()
    if not found or not isinstance(found[0], Tensor) or found[0].ndim != 3:
        raise UserError(f"loss 'repa': layer {layer!r} gives no tokens (b, n, d). Choose a block of a SiT.")
    return found[0].shape[1], found[0].shape[2]
