"""The computation of a training step: its inputs, and the mean loss of the network on them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sitkit.data.dataset import Examples
from sitkit.models.autoencoder import Prepared, modelled
from sitkit.models.loss import Batch
from sitkit.runs.config.schema import Config
from sitkit.runtime import rng
from sitkit.transport import interval


class Inputs(NamedTuple):
    """The part of a step of one process, on its device: data (b, ...), noise (b, ...), t (b,), y (b,), keys (b,)."""

    data: Tensor
    noise: Tensor
    t: Tensor
    y: Tensor
    keys: Tensor

    def split(self, parts: int) -> list[Inputs]:
        """Return the rows in `parts` equal parts."""
        return [Inputs(*rows) for rows in zip(*(value.chunk(parts) for value in self), strict=True)]


class TrainingInputs:
    """Inputs from examples: noise, time and dropped labels depend on the training seed and the position alone.

    rank, size: the part of this process in each batch.  If the coupling needs the whole batch, every process pairs the
    whole batch, so that the pairs are the same for every number of processes.
    """

    def __init__(
        self, config: Config, network: nn.Module, data: Examples, device: torch.device, rank: int = 0, size: int = 1
    ) -> None:
        self.config, self.examples, self.device = config, data, device
        self.interval = interval.trainable_interval(config.interp, config.target, config.weight)
        self.dropout = float(getattr(network, "class_dropout", 0.0))
        self.own = (rank, size)
        self.part = (0, 1) if config.coupling.whole_batch else self.own

    @torch.no_grad()
    def __call__(self, x: Tensor, y: Tensor, positions: np.ndarray) -> Inputs:
        """Return the inputs of this process for x (b, *shape), y (b,) and their positions (b,) in the stream."""
        config = self.config
        keys = rng.sample_keys(config.train.seed, torch.from_numpy(positions)).to(self.device, non_blocking=True)
        x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
        data = modelled(config.autoencoder, self.examples, x, keys)
        noise = config.coupling.pair(data, rng.normal(keys, tuple(data.shape[1:]), rng.TRAINING), y)
        t = self.times(keys)
        y = y.where(rng.uniform(keys, rng.DROPOUT) >= self.dropout, self.examples.num_classes)
        inputs = Inputs(data, noise, t, y, keys)
        return inputs if self.part == self.own else inputs.split(self.own[1])[self.own[0]]

    def times(self, keys: Tensor) -> Tensor:
        """Return the training time of each key, (b,) -> (b,) float32, within the interval where the loss is finite."""
        low, high = self.interval
        times = low + (high - low) * self.config.timestep.map(rng.uniform(keys, rng.TIME))
        return times.clamp(low, high).float()


class Objective(nn.Module):
    """A network and the modules that its loss trains, as one module, which is compiled or passed to DDP.

    (data, noise, t, y, keys) -> (mean loss, loss of each example without gradient).
    """

    def __init__(self, config: Config, network: nn.Module, data: Prepared) -> None:
        super().__init__()
        self.loss, self.path = config.loss.prepare(data.examples), (config.interp, config.target, config.weight)
        self.network, self.parts = network, self.loss.build(network, data.shape, data.num_classes)
        self.bf16 = config.train.precision == "bf16"
        self.hidden: dict[str, Tensor] = {}
        for name in self.loss.hidden:
            network.get_submodule(name).register_forward_hook(functools.partial(_keep, self.hidden, name))

    def forward(self, data: Tensor, noise: Tensor, t: Tensor, y: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(data.device.type, torch.bfloat16, enabled=self.bf16):
            batch = Batch(self.network, *self.path, data, noise, t, y, keys, self.parts, self.hidden)
            losses = self.loss.per_example(batch)
        return losses.mean(), losses.detach()


def objective_of(config: Config, network: nn.Module, data: Prepared) -> Objective:
    """Return the objective of a configuration; the training seed also draws the weights of the modules of the loss."""
    with torch.random.fork_rng(devices=[]):
        # Not the seed itself, because it draws the initial weights of the network.
        torch.manual_seed(int(rng.sample_keys(config.train.seed, torch.zeros(1, dtype=torch.int64))))
        return Objective(config, network, data)


def _keep(hidden: dict[str, Tensor], name: str, module: nn.Module, inputs: object, output: Tensor) -> None:
    hidden[name] = output
