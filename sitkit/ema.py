"""Averages of the weights while training: average <- average + (1 - decay) (theta - average), the first being theta."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from sitkit.registry import UserError


def prefix(decays: Sequence[float], decay: float) -> str:
    """What names of tensors begin with in a checkpoint for one of several averages."""
    return "ema." if decay == decays[0] else f"ema-{decay!r}."


class EMA:
    """Exponential averages of a network's trainable parameters, in their own dtype and device.

    `update` is one fused operation on lists of tensors; parameters sharded over ranks are averaged shard by shard.
    Other entries of the network's state (buffers, frozen parameters) are not averaged: they are the network's own.
    """

    def __init__(self, network: nn.Module, decays: Sequence[float]) -> None:
        self.network = network
        self.names = [name for name, p in network.named_parameters() if p.requires_grad]
        self._decays = {prefix(decays, decay): decay for decay in decays}
        self._averages = {key: [p.detach().clone() for p in self._parameters()] for key in self._decays}

    def _parameters(self) -> list[Tensor]:
        named = dict(self.network.named_parameters())
        return [named[name] for name in self.names]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """The optimiser having taken `step` steps, 1 or more."""
        values = [_local(p) for p in self._parameters()]
        for key, decay in self._decays.items():
            torch._foreach_lerp_([_local(t) for t in self._averages[key]], values, 1.0 if step == 1 else 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def tensors(self) -> dict[str, Tensor]:
        """Every average, named as in a checkpoint, with the whole state of the network."""
        whole = self.network.state_dict()
        found: dict[str, Tensor] = {}
        for key, averages in self._averages.items():
            found |= {f"{key}{name}": tensor for name, tensor in whole.items()}
            found |= {f"{key}{name}": tensor for name, tensor in zip(self.names, averages, strict=True)}
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the averages that `tensors` gave, each whole or sharded as here.  Raises UserError where one is missing."""
        from sitkit.parallel import laid_like

        for key, averages in self._averages.items():
            for name, average in zip(self.names, averages, strict=True):
                if f"{key}{name}" not in tensors:
                    raise UserError(f"The checkpoint holds no {key}{name}, so its average cannot be continued.")
                average.copy_(laid_like(tensors[f"{key}{name}"], average))

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Within it the network has the weights of the first average; afterwards its own again, to the bit."""
        parameters = [_local(p) for p in self._parameters()]
        own = [p.clone() for p in parameters]
        torch._foreach_copy_(parameters, [_local(t) for t in next(iter(self._averages.values()))])  # pyright: ignore[reportPrivateImportUsage]
        try:
            yield
        finally:
            torch._foreach_copy_(parameters, own)  # pyright: ignore[reportPrivateImportUsage]


def _local(tensor: Tensor) -> Tensor:
    return getattr(tensor, "to_local", tensor.detach)()
