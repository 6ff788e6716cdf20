"""What a configuration will cost, known before any work: parameters, FLOPs, memory, disk.

Nothing is computed and nothing allocated: the network is built, and run forwards and backwards, on torch's `meta` device,
where tensors have shapes and no values, while what would be in memory at once is added up.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from sitkit.data.dataset import load_examples
from sitkit.evaluation.metrics.metric import FeatureMetric
from sitkit.models.autoencoder import prepare_data
from sitkit.models.backbone import Backbone
from sitkit.runs.averages import snapshot_bytes
from sitkit.runs.config.schema import Config
from sitkit.runs.sample_set import block_size, keeps_samples
from sitkit.runtime.errors import UserError
from sitkit.studies.study import Cell, refused_at

FLOAT = 4


class NetworkCost(NamedTuple):
    """What a backbone costs for states of one shape.

    parameters.  flops: of one evaluation for one sample, a multiply-add counting two.  drawing: bytes of one more sample
    in a batch that is being sampled.  learning: of one more example in a batch that is being trained on.  None: the network
    cannot be run without values.
    """

    parameters: int
    flops: int | None
    drawing: int | None
    learning: int | None


class Cost(NamedTuple):
    """What one cell costs.

    shape: of the states that the network models.  parameters, flops: as in `Network`.
    training_flops, sampling_flops: of all of it, the backward pass counting twice the forward one; None where the network's
    or an adaptive solver's evaluations are not known.
    training_memory: bytes of one process on one device: weights, gradients, AdamW's two moments, each average, and what
    the backward pass needs of its share of a batch.  sampling_memory: bytes of weights and of a batch of samples on their
    way.  Libraries, the data and what an allocator keeps are not in them.
    checkpoints: bytes on disk of a run's checkpoints and snapshots.  samples: bytes of the samples that a cell keeps.
    """

    shape: tuple[int, ...]
    parameters: int
    flops: int | None
    training_flops: int | None
    sampling_flops: int | None
    training_memory: int | None
    sampling_memory: int | None
    checkpoints: int
    samples: int


def cost_of(config: Config, nfe: int | None) -> Cost:
    """The cost of a configuration whose sampler spends `nfe` evaluations a sample (None: not known).

    Raises UserError for data that are not there, and for a backbone or autoencoder that cannot take them.
    """
    examples, shape, num_classes = prepare_data(config.data, config.autoencoder)
    train, sample = config.train, config.sample
    network = network_cost(config.backbone, shape, num_classes)
    averages = len(train.ema_decays) + len(train.posthoc)
    weights = FLOAT * network.parameters
    learns = config.backbone.trainable
    half = 0.5 if train.precision == "bf16" else 1
    share = train.batch // train.accumulate
    at_once = min(sample.n, sample.batch if _accelerated(config) else block_size(shape))
    pixels = math.prod(load_examples(config.data.source()).shape)
    kept = sample.n * (pixels if examples.is_image else FLOAT * pixels)
    if not keeps_samples(config, config.metric):
        kept = 0
    return Cost(
        shape,
        network.parameters,
        network.flops,
        None if network.flops is None or not learns else 3 * network.flops * train.batch * train.steps,
        None if network.flops is None or nfe is None else network.flops * nfe * sample.n,
        None if network.learning is None else weights * (4 + averages) + round(half * share * network.learning),
        None if network.drawing is None else weights + at_once * network.drawing,
        weights * (3 + averages) * config.run.keep + snapshot_bytes(train, network.parameters) if learns else 0,
        kept,
    )


def require(config: Config) -> None:
    """Raises UserError for what cannot be done here: data that are not there, a network or metric that cannot take them."""
    data = prepare_data(config.data, config.autoencoder)
    network_cost(config.backbone, data.shape, data.num_classes)
    for metric in config.metric:
        if isinstance(metric, FeatureMetric):
            metric.features.require(load_examples(config.data.source()))
            if metric.reads not in metric.features.outputs:
                gives = ", ".join(metric.features.outputs)
                raise UserError(f"{metric.name} reads {metric.reads}; features {metric.features.name!r} give {gives}.")
    if config.sample.n < 2:
        raise UserError(f"A metric needs at least 2 samples; got {config.sample.n}. Ask for more.")


def require_cells(cells: Iterable[Cell]) -> None:
    """`require` of each cell, what they share asked once.  Raises UserError with file, line and reason."""
    seen: set[tuple[int, ...]] = set()
    for cell in cells:
        config = cell.config
        parts = tuple(map(id, (config.backbone, config.autoencoder, config.data, config.sample, *config.metric)))
        if parts not in seen:
            seen.add(parts)
            try:
                require(config)
            except UserError as error:
                raise UserError(refused_at(cell.place, cell.row, cell.column, str(error))) from None


def _accelerated(config: Config) -> bool:
    chosen = config.run.device
    return chosen.startswith("cuda") or (chosen == "auto" and torch.cuda.is_available())


@functools.lru_cache(maxsize=64)
def network_cost(backbone: Backbone, shape: tuple[int, ...], num_classes: int) -> NetworkCost:
    """What a backbone costs for states of `shape`.  Raises UserError for a shape that it cannot take."""
    with torch.device("meta"):
        network = backbone.build(shape, num_classes)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    if not backbone.trainable:
        return NetworkCost(parameters, backbone.flops(shape), None, None)
    try:
        counted = FlopCounterMode(display=False)
        with counted, torch.no_grad():
            _evaluate(network, shape, 1)
        drawing = _slope(lambda n: _draw(network, shape, n))
        learning = _slope(lambda n: _learn(network, shape, n))
    except (NotImplementedError, RuntimeError):
        return NetworkCost(parameters, backbone.flops(shape), None, None)
    return NetworkCost(parameters, backbone.flops(shape) or counted.get_total_flops(), drawing, learning)


def _evaluate(network: nn.Module, shape: tuple[int, ...], n: int) -> Tensor:
    with torch.device("meta"):
        return network(torch.empty(n, *shape), torch.empty(n), torch.empty(n, dtype=torch.int64))


def _draw(network: nn.Module, shape: tuple[int, ...], n: int) -> None:
    with torch.no_grad():
        network.eval()
        _evaluate(network, shape, n)


def _learn(network: nn.Module, shape: tuple[int, ...], n: int) -> None:
    network.train()
    _evaluate(network, shape, n).square().mean().backward()
    network.zero_grad(set_to_none=True)


def _slope(work: Callable[[int], object]) -> int:
    """By how many bytes the peak grows for one more in the batch; what does not grow (gradients) falls out."""
    return (peak_bytes(lambda: work(8)) - peak_bytes(lambda: work(4))) // 4


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most bytes that tensors made during `work` take at once, views and what shares memory counted once."""
    with _Counting() as counting:
        work()
    return counting.most


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, made)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.alive:
            self.alive.add(key)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size
