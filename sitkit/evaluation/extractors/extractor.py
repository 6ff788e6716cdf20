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

# An extractor gets blocks of this size, the last one padded: on a CPU the last digits may depend on the block size.
FEATURE_ROWS = 64
# Spatial features are this number of channels, as in ADM's evaluator.
SPATIAL_CHANNELS = 7

Outputs = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class Extraction:
    """A map from images or points to features, with an identity.

    Attributes:
        fingerprint: extractions with the same fingerprint give the same values, up to rounding.
        outputs: the names of the outputs.
        apply: maps x (n, *shape), images in [-1, 1], to {"features": (n, d), ...}; row i depends on x[i] only.
        record: what the record of a number says about the extractor.
    """

    fingerprint: str
    outputs: tuple[str, ...]
    apply: Callable[[Tensor], Outputs]
    record: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """Return every output for x (n, *shape), on the CPU, computed in blocks of FEATURE_ROWS."""
        import torch

        parts: list[Outputs] = []
        with torch.no_grad():
            for block in x.detach().split(FEATURE_ROWS):
                n = len(block)
                if n < FEATURE_ROWS:
                    block = torch.cat([block, block[-1:].expand(FEATURE_ROWS - n, *block.shape[1:])])
                parts.append({name: rows[:n].cpu() for name, rows in self.apply(block).items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@dataclass(frozen=True)
class Extractor(Component):
    """Base class: a component that builds a map from images or points to features.

    Attributes:
        outputs: the outputs: "features" (n, d), "spatial" (n, s) with features at positions, "logits" (n, classes).
        learnt: whether a network computes the values, so that they are stored.
    """

    outputs: ClassVar[tuple[str, ...]] = ("features",)
    learnt: ClassVar[bool] = True

    def require(self, data: Examples | None) -> None:
        """Raise UserError, before any work, for unsuitable data and for a missing package."""

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
    """The pixels or coordinates, flattened: d = c * h * w."""

    learnt: ClassVar[bool] = False

    def build(
        self, data: Examples | None, device: device, cache: Path | None, progress: Progress = silent
    ) -> Extraction:
        return Extraction("pixels", self.outputs, lambda x: {"features": x.flatten(1)})


def colours(x: Tensor) -> Tensor:
    """Return images (n, 1 or 3, h, w) with three channels. Raises UserError for other shapes."""
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise UserError(f"this extractor needs images of 1 or 3 channels; got shape {tuple(x.shape[1:])}.")
    return x.expand(-1, 3, -1, -1)


def network_fingerprint(network: nn.Module, *rest: str) -> str:
    """Return the SHA-256 of the names and values of a network's weights, and of the strings in `rest`."""
    digest = hashlib.sha256(repr(rest).encode())
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
