"""Feature extractors: the space in which two sets of images or points are compared."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from sitkit.registry import Component, extractors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Extractor(Component):
    """A map from an image or a point to the vector that stands for it."""

    @abstractmethod
    def extract(self, x: Tensor) -> Tensor:
        """x (n, *shape), images in [-1, 1] -> (n, d), float64 on the CPU; row i depends on x[i] alone."""


@final
@extractors.register("pixels")
@dataclass(frozen=True)
class Pixels(Extractor):
    """The values themselves, flattened: d = c * h * w."""

    def extract(self, x: Tensor) -> Tensor:
        import torch

        return x.detach().flatten(1).to("cpu", torch.float64)
