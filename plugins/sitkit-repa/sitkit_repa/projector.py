"""The projector: a perceptron from hidden tokens to the space of the encoder, trained together with the network."""

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
        # The encoder is frozen and not part of a checkpoint, so it is not a submodule.
        self.encoder, self.reads, self.tokens = encoder, reads, tokens
        self.layers = nn.Sequential(
            nn.Linear(d, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, out)
        )

    def forward(self, hidden: Tensor, data: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.encoder.apply(data)[self.reads].float()
        # Spatial features are (channels, places); each token is compared with the features at its place.
        features = features.unflatten(1, (-1, self.tokens)).transpose(1, 2)
        tokens = hidden if self.tokens > 1 else hidden.mean(1, keepdim=True)
        return cosine_similarity(self.layers(tokens).float(), features, dim=2).mean(1)


def hidden_shape(network: nn.Module, layer: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return (tokens, width) of the output of a layer.  Raises UserError if the output has no tokens."""
    outputs: list[Any] = []

    def keep(module: nn.Module, inputs: Any, out: Any) -> None:
        outputs.append(out)

    hook = network.get_submodule(layer).register_forward_hook(keep)
    try:
        parameter = next(network.parameters())
        x = torch.zeros(1, *shape, device=parameter.device)
        with torch.no_grad():
            network(x, x.new_zeros(1), torch.zeros(1, dtype=torch.int64, device=x.device))
    finally:
        hook.remove()
    if not outputs or not isinstance(outputs[0], Tensor) or outputs[0].ndim != 3:
        raise UserError(f"loss 'repa': the output of layer {layer!r} is not tokens (b, n, d). Choose a block of a SiT.")
    return outputs[0].shape[1], outputs[0].shape[2]
