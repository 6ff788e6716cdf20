"""Feature extractors: the space in which two sets of images or points are compared."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

from sitkit.registry import Component, extractors
from sitkit.runtime.errors import UserError
from sitkit.runtime.progress import Progress, silent

if TYPE_CHECKING:
    from torch import Tensor, device, nn

    from sitkit.data.dataset import Examples

# Rows that an extractor sees at once, the last block filled up: on a CPU the last digits of a row may follow their number.
FEATURE_ROWS = 64

Outputs = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class Extraction:
    """An extractor ready for work: what it computes, and what identifies the values that it gives.

    outputs: what it gives.  apply: x (n, *shape), images in [-1, 1] -> {"features": (n, d), ...}, row i a function of x[i]
    alone.  fingerprint: equal fingerprints, equal values (to rounding).  record: what a reader must know of it.
    """

    fingerprint: str
    outputs: tuple[str, ...]
    apply: Callable[[Tensor], Outputs]
    record: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """Every output for x (n, *shape), on the CPU, in blocks of ROWS."""
        import torch

        parts: list[Outputs] = []
        with torch.no_grad():
            for block in x.detach().split(FEATURE_ROWS):
                n = len(block)
                whole = (
                    block
                    if n == FEATURE_ROWS
                    else torch.cat([block, block[-1:].expand(FEATURE_ROWS - n, *block.shape[1:])])
                )
                parts.append({name: rows[:n].cpu() for name, rows in self.apply(whole).items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@dataclass(frozen=True)
class Extractor(Component):
    """A map from an image or a point to the vectors that stand for it.

    outputs: which there are, of "features" (n, d), "spatial" (n, s), features that know where things are, and "logits"
    (n, classes) of a classifier.  learnt: whether the values take a network to compute, so that they are worth keeping.
    """

    outputs: ClassVar[tuple[str, ...]] = ("features",)
    learnt: ClassVar[bool] = True

    def require(self, data: Examples | None) -> None:
        """Raise UserError, before any work, for data that it cannot see and for a package that is not there."""

    @abstractmethod
    def build(
        self, data: Examples | None, device: device, cache: Path | None, progress: Progress = silent
    ) -> Extraction:
        """Build the map from images or points like those of `data` to features.

        Args:
            data: the examples; None if the extractor needs none.
            device: where the features are computed.
            cache: folder for weights that the extractor trains or downloads; None: nothing is stored.
            progress: receives an `Event` while a long build is in progress.

        Returns:
            An `Extraction`, which maps a batch to the outputs that `outputs` names.

        Raises:
            UserError: the data do not suit the extractor, or its weights or its package are missing.
        """


@final
@extractors.register("pixels")
@dataclass(frozen=True)
class Pixels(Extractor):
    """The values themselves, flattened: d = c * h * w."""

    learnt: ClassVar[bool] = False

    def build(
        self, data: Examples | None, device: device, cache: Path | None, progress: Progress = silent
    ) -> Extraction:
        return Extraction("pixels", self.outputs, lambda x: {"features": x.flatten(1)})


def colours(x: Tensor) -> Tensor:
    """Images (n, 1 or 3, h, w) with three channels.  Raises UserError for other shapes."""
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise UserError(f"this extractor sees images of 1 or 3 channels; these are of shape {tuple(x.shape[1:])}.")
    return x.expand(-1, 3, -1, -1)


def fingerprint(network: nn.Module, *rest: str) -> str:
    """SHA-256 of a network's weights, names and all, and of how its input is prepared."""
    digest = hashlib.sha256(repr(rest).encode())
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
