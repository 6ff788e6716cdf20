"""The cost of a configuration before any work: parameters, FLOPs, memory, disk.

Nothing is computed and nothing is allocated: the network is built, and run forwards and backwards, on torch's `meta`
device, where tensors have shapes and no values, and the bytes that would be in memory are counted.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from sitkit.data.dataset import Dataset, load_examples
from sitkit.evaluation.metrics.metric import FeatureMetric, Metric
from sitkit.models.autoencoder import Autoencoder, prepare_data
from sitkit.models.backbone import Backbone
from sitkit.runs.averages import snapshot_bytes
from sitkit.runs.config.schema import Config
from sitkit.runs.evaluate import require_measurable
from sitkit.runs.sample_set import block_size, keeps_samples
from sitkit.runtime.errors import UserError
from sitkit.solvers.sampler import Sampler
from sitkit.studies.study import Cell

FLOAT = 4


class NetworkCost(NamedTuple):
    """The cost of a backbone for states of one shape.

    parameters: their number.  flops: of one evaluation for one sample; a multiply-add counts two.  drawing: bytes for one
    more sample in a batch that is sampled.  learning: bytes for one more example in a batch of the training.  None: the
    network cannot run without values.
    """

    parameters: int
    flops: int | None
    drawing: int | None
    learning: int | None


class Cost(NamedTuple):
    """The cost of one cell.

    shape: of the states that the network models.  parameters, flops: as in `NetworkCost`.
    training_flops, sampling_flops: of all of the work; the backward pass counts twice the forward pass.  None if the
    evaluations of the network or of an adaptive solver are not known.
    training_memory: bytes of one process on one device: weights, gradients, AdamW's two moments, each average, and the
    activations of its part of a batch.  sampling_memory: bytes of the weights and of a batch of samples.  Libraries, the
    data and the reserve of an allocator are not counted.
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
    """Return the cost of a configuration whose sampler spends `nfe` evaluations a sample (None: not known).

    Raises UserError for data that do not exist, and for a backbone or an autoencoder that cannot take them.
    """
    examples, shape, num_classes = prepare_data(config.data, config.autoencoder)
    train, sample = config.train, config.sample
    network = network_cost(config.backbone, shape, num_classes)
    averages = len(train.ema_decays) + len(train.posthoc)
    weights = FLOAT * network.parameters
    learns = config.backbone.trainable
    half = 0.5 if train.precision == "bf16" else 1
    activations = round(half * (train.batch // train.accumulate) * (network.learning or 0))
    batch = min(sample.n, sample.batch if _on_gpu(config.run.device) else block_size(shape))
    pixels = math.prod(load_examples(config.data.source()).shape) * (1 if examples.is_image else FLOAT)
    return Cost(
        shape,
        network.parameters,
        network.flops,
        None if network.flops is None or not learns else 3 * network.flops * train.batch * train.steps,
        None if network.flops is None or nfe is None else network.flops * nfe * sample.n,
        None if network.learning is None else weights * (4 + averages) + activations,
        None if network.drawing is None else weights + batch * network.drawing,
        weights * (3 + averages) * config.run.keep + snapshot_bytes(train, network.parameters) if learns else 0,
        sample.n * pixels if keeps_samples(config, config.metric) else 0,
    )


def obstacles(cells: Iterable[Cell]) -> Iterator[str]:
    """Yield for each cell why it cannot be done on this machine, or ""."""
    # Cells share their parts.  The cache is of this call alone: missing data may be there at the next one.
    obstacle = functools.cache(_obstacle)
    for cell in cells:
        config = cell.config
        samples = config.sample.n, config.sampler
        yield obstacle(config.backbone, config.autoencoder, config.data, config.metric, *samples)


def _obstacle(
    backbone: Backbone,
    autoencoder: Autoencoder,
    dataset: Dataset,
    metrics: tuple[Metric, ...],
    n: int,
    sampler: Sampler,
) -> str:
    try:
        data = prepare_data(dataset, autoencoder)
        network_cost(backbone, data.shape, data.num_classes)
        for metric in metrics:
            if isinstance(metric, FeatureMetric):
                metric.features.require(load_examples(dataset.source()))
                if metric.reads not in metric.features.outputs:
                    outputs = ", ".join(metric.features.outputs)
                    return f"{metric.name} reads {metric.reads}; features {metric.features.name!r} give {outputs}."
        require_measurable(n, sampler)
    except UserError as error:
        return str(error)
    return ""


def require_cells(cells: Sequence[Cell]) -> None:
    """Raise UserError with file, line and reason for the first cell that cannot be done on this machine."""
    for cell, reason in zip(cells, obstacles(cells), strict=True):
        if reason:
            raise UserError(cell.refused(reason).reason)


def _on_gpu(device: str) -> bool:
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


@functools.lru_cache(maxsize=64)
def network_cost(backbone: Backbone, shape: tuple[int, ...], num_classes: int) -> NetworkCost:
    """Return the cost of a backbone for states of `shape`.  Raises UserError for a shape that it cannot take."""
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
    """Return the bytes that one more example in a batch adds to the peak; constant parts (gradients) cancel."""
    return (peak_bytes(lambda: work(8)) - peak_bytes(lambda: work(4))) // 4


def peak_bytes(work: Callable[[], Any]) -> int:
    """Return the largest number of bytes that tensors made during `work` take together; shared memory counts once."""
    with _Counting() as counting:
        work()
    return counting.most


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, result)
        return result

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
