"""What the network sees of an image: the pixels themselves, or an autoencoder's latents."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from sitkit.registry import Component, autoencoders

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Autoencoder(Component):
    """A fixed pair of maps between images in [-1, 1] and what is modelled."""

    @abstractmethod
    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the latent of an example of this shape."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """(b, *shape) -> (b, *latent_shape)."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """(b, *latent_shape) -> (b, *shape)."""


@final
@autoencoders.register("identity")
@dataclass(frozen=True)
class Identity(Autoencoder):
    """The example itself."""

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, z: Tensor) -> Tensor:
        return z
