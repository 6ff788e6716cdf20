"""Averages of the weights during training: average <- average + (1 - beta) (theta - average); the first is theta.

With the warm-up the decay of step k is min(decay, (1 + k) / (10 + k)), so the average covers the last tenth of a short
training: with a constant decay of 0.9999 thousands of steps still hold the initial weights.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sitkit.runs.averages import FIXED, gamma, power_prefix, prefix, width_of
from sitkit.runs.checkpoint import checkpoint_file
from sitkit.runs.run_folder import RunFolder
from sitkit.runtime.distributed import ProcessGroup
from sitkit.runtime.errors import UserError
from sitkit.runtime.tensors import save_tensors
from sitkit.training.parallel import gathered, shard_like


class EMA:
    """Exponential and power-function averages of a network's trainable parameters, in their own dtype and device.

    `update` runs a few fused operations on lists of tensors; parameters that are sharded over ranks are averaged shard by
    shard.  Buffers and frozen parameters are not averaged: the averages use those of the network.
    """

    def __init__(
        self, network: nn.Module, decays: Sequence[float], widths: Sequence[float] = (), *, warmup: bool = False
    ) -> None:
        self.network, self.warmup = network, warmup
        self.names = [name for name, p in network.named_parameters(remove_duplicate=False) if p.requires_grad]
        self._profiles = {prefix(decays, decay): (decay, None) for decay in decays}
        self._profiles |= {power_prefix(width): (None, gamma(width)) for width in widths}
        self._averages = {key: [p.detach().clone() for p in self._parameters()] for key in self._profiles}

    def _parameters(self) -> list[Tensor]:
        named = dict(self.network.named_parameters(remove_duplicate=False))
        return [named[name] for name in self.names]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Set average <- average + (1 - beta) (theta - average) after step `step` of the optimizer, which begins at 1.

        beta is the decay of the step, or (1 - 1/step)^(gamma + 1); 0 at the first step.
        """
        values = [_local(p) for p in self._parameters()]
        for key, (decay, exponent) in self._profiles.items():
            torch._foreach_lerp_([_local(t) for t in self._averages[key]], values, self._gain(step, decay, exponent))  # pyright: ignore[reportPrivateImportUsage]

    def _gain(self, step: int, decay: float | None, exponent: float | None) -> float:
        """Return 1 - beta."""
        if step == 1:
            return 1.0
        if decay is None:
            return -math.expm1(((exponent or 0.0) + 1) * math.log1p(-1 / step))
        return 1 - (min(decay, (1 + step) / (10 + step)) if self.warmup else decay)

    def tensors(self) -> dict[str, Tensor]:
        """Return every average by its name in a checkpoint; exponential averages with the whole state of the network."""
        whole = self.network.state_dict()
        tensors: dict[str, Tensor] = {}
        for key, averages in self._averages.items():
            if self._profiles[key][1] is None:
                tensors |= {f"{key}{name}": tensor for name, tensor in whole.items()}
            tensors |= {f"{key}{name}": tensor for name, tensor in zip(self.names, averages, strict=True)}
        return tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the averages from the result of `tensors`, whole or sharded in this way.  Raises UserError if one is missing."""
        for key, averages in self._averages.items():
            for name, average in zip(self.names, averages, strict=True):
                if f"{key}{name}" not in tensors:
                    raise UserError(f"The checkpoint holds no {key}{name}, so its average cannot be continued.")
                average.copy_(shard_like(tensors[f"{key}{name}"], average))

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Give the network the weights of the first average within the block, and its own weights after it, to the bit."""
        parameters = [_local(p) for p in self._parameters()]
        own = [p.clone() for p in parameters]
        torch._foreach_copy_(parameters, [_local(t) for t in next(iter(self._averages.values()))])  # pyright: ignore[reportPrivateImportUsage]
        try:
            yield
        finally:
            torch._foreach_copy_(parameters, own)  # pyright: ignore[reportPrivateImportUsage]

    def snapshot(self, folder: Path, step: int, dtype: torch.dtype, group: ProcessGroup) -> None:
        """Write the power-function averages of a step to the run's folder.  Every process calls it; the lead writes."""
        powers = {key: exponent for key, (_, exponent) in self._profiles.items() if exponent is not None}
        shards = {f"{key}{name}": t for key in powers for name, t in zip(self.names, self._averages[key], strict=True)}
        whole = gathered(shards, group)
        fixed = {n: t for n, t in self.network.state_dict().items() if n not in set(self.names)}
        rest = gathered({f"{FIXED}{name}": t for name, t in fixed.items()}, group)
        if group.lead:
            tensors = {name: tensor.to(dtype) for name, tensor in whole.items()} | rest
            header = {"format": 1, "step": step, "widths": [width_of(key) for key in powers]}
            save_tensors(checkpoint_file(RunFolder(folder).snapshots, step), tensors, header)


def _local(tensor: Tensor) -> Tensor:
    return getattr(tensor, "to_local", tensor.detach)()
