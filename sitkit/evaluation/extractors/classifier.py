"""A small classifier trained on the data set of the run: features for data that no large network was trained on."""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

from sitkit.data.stream import batch
from sitkit.evaluation.extractors.extractor import SPATIAL_CHANNELS, Extraction, Extractor, network_fingerprint
from sitkit.registry import essence, extractors, spec
from sitkit.runtime.errors import UserError, require_within
from sitkit.runtime.hashing import identity
from sitkit.runtime.progress import Event, Progress, silent
from sitkit.runtime.tensors import load_tensors, read_header, save_tensors

if TYPE_CHECKING:
    from torch import Tensor, device, nn

    from sitkit.data.dataset import Examples

CLASSIFIER_BATCH, RATE = 128, 2e-3
# The side of the last map.
SIDE = 4


@final
@extractors.register("run-classifier")
@dataclass(frozen=True)
class RunClassifier(Extractor):
    """A convolutional classifier of the run's own data (a perceptron for points), trained once and stored.

    Its features are the input of the last layer, its spatial features 7 channels of the map before pooling. It is
    trained on the training part of the data, without augmentation beyond the data's own, and the record has its accuracy
    on the held-out part. It needs labels. Numbers in this space can only be compared for runs on one data set.

    Args:
        steps: training steps, each with 128 examples.
        width: the number of features, a multiple of 8.
        seed: seed of the weights and of the order of the examples.
    """

    outputs: ClassVar[tuple[str, ...]] = ("features", "spatial", "logits")
    steps: int = 500
    width: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        require_within(1, 10**9, steps=self.steps)
        require_within(0, 2**63 - 1, seed=self.seed)
        require_within(1, 2**16, width=self.width)
        if self.width < 8 or self.width % 8:
            raise ValueError(f"width must be a multiple of 8; got {self.width}.")

    def require(self, data: Examples | None) -> None:
        if data is None or not data.num_classes:
            need = "a data set for training" if data is None else "labels, and the data have none"
            raise UserError(f"features 'run-classifier' needs {need}. Use other features.")

    def build(
        self, data: Examples | None, device: device, cache: Path | None, progress: Progress = silent
    ) -> Extraction:
        """Train the classifier, or load it from the cache.

        Args:
            data: the examples, with labels.
            device: where the features are computed.
            cache: folder for the trained weights; None: nothing is stored.
            progress: receives an `Event` for each step of the training.

        Returns:
            An `Extraction` with "features" (n, width), "logits" (n, classes) and, for images, "spatial".

        Raises:
            UserError: there are no labels.
        """
        self.require(data)
        assert data is not None
        network, record = self._load(data, device, cache, progress) if cache else self._train(data, device, progress)
        maps, pool, head = (part for _, part in network.to(device).eval().requires_grad_(False).named_children())

        def apply(x: Tensor) -> dict[str, Tensor]:
            activations = maps(x.to(device))
            features = pool(activations)
            spatial = {"spatial": activations[:, :SPATIAL_CHANNELS].flatten(1)} if data.is_image else {}
            return {"features": features, "logits": head(features), **spatial}

        outputs = self.outputs if data.is_image else ("features", "logits")
        return Extraction(network_fingerprint(network), outputs, apply, record)

    def _load(
        self, data: Examples, device: device, cache: Path, progress: Progress
    ) -> tuple[nn.Module, dict[str, Any]]:
        """The network in the folder; one process trains and stores it if it is missing."""
        from filelock import FileLock

        path = self._file(data, cache)
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.is_file():
                trained, record = self._train(data, device, progress)
                save_tensors(path, trained.state_dict(), {"spec": spec(self), "data": data.fingerprint, **record})
        header, tensors = load_tensors(path)
        network = network_for(data.shape, data.num_classes, self.width)
        network.load_state_dict(tensors)
        return network, {key: header[key] for key in ("accuracy", "heldout", "steps")}

    def _file(self, data: Examples, cache: Path) -> Path:
        """Return the file of the network in a folder; that of an earlier release, under another name, if there is one."""
        path = cache / f"run-classifier-{identity(essence(self), data.fingerprint)}.safetensors"
        for other in [] if path.is_file() else sorted(cache.glob("run-classifier-*.safetensors")):
            with contextlib.suppress(UserError):
                header = read_header(other)
                made = essence(extractors.parse(header["spec"]), packages={})
                if made == essence(self) and header["data"] == data.fingerprint:
                    return other
        return path

    def _train(self, data: Examples, device: device, progress: Progress) -> tuple[nn.Module, dict[str, Any]]:
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = network_for(data.shape, data.num_classes, self.width).to(device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=self.steps + 1)
        for step in range(self.steps):
            x, y, *_ = batch(data, self.seed, step, CLASSIFIER_BATCH)
            loss = torch.nn.functional.cross_entropy(network(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress(Event(self.name, step + 1, self.steps))
        return network, {"accuracy": accuracy(network, data), "heldout": len(data.heldout), "steps": self.steps}


def network_for(shape: tuple[int, ...], num_classes: int, width: int) -> nn.Module:
    """Return a classifier (n, *shape) -> (n, num_classes) of three parts: `maps`, `pool` over positions, and `head`.

    Strided convolutions halve images until no side is above twice SIDE; points pass through two linear layers.
    """
    from torch import nn

    def conv(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.GroupNorm(4, outputs), nn.GELU()]

    if len(shape) == 3:
        layers, side = conv(shape[0], width // 2, 1), max(shape[1:])
        channels = width // 2
        while side > 2 * SIDE or channels < width:
            layers += conv(channels, width, 2)
            channels, side = width, math.ceil(side / 2)
        maps, pool = layers + conv(width, width, 1), [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    else:
        d = math.prod(shape)
        maps, pool = [nn.Flatten(), nn.Linear(d, width), nn.GELU(), nn.Linear(width, width), nn.GELU()], []
    head = nn.Linear(width, num_classes)
    return nn.Sequential(OrderedDict(maps=nn.Sequential(*maps), pool=nn.Sequential(*pool), head=head))


def accuracy(network: nn.Module, data: Examples) -> float | None:
    """Return the fraction of held-out examples with the right class; None without held-out examples."""
    import numpy as np
    import torch

    if not len(data.heldout):
        return None
    device = next(network.parameters()).device
    right = 0
    with torch.no_grad():
        for part in np.array_split(data.heldout, math.ceil(len(data.heldout) / CLASSIFIER_BATCH)):
            right += int((network(data.read(part).to(device)).argmax(1).cpu().numpy() == data.labels[part]).sum())
    return right / len(data.heldout)
