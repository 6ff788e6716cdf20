"""The UNet2DModel of diffusers as a backbone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from sitkit import Backbone, UserError, backbones

if TYPE_CHECKING:
    from torch import nn


@final
@backbones.register("unet")
@dataclass(frozen=True)
class UNet(Backbone):
    """A convolutional U-Net with self-attention at its lowest level (UNet2DModel of diffusers).

    The embedding of the label is added to the embedding of the time.

    Args:
        widths: the channels of each level; each level has half the resolution of the previous level.
        layers: residual blocks per level.
        attention: whether the lowest level has self-attention.
        groups: the number of groups of each group norm; it must divide every width.
        class_dropout: the probability with which training replaces a label by the null class.
        time_scale: multiplies t before its sinusoidal features.

    Source: Ho et al. 2020 (arXiv 2006.11239), appendix B, in the implementation of diffusers.
    """

    widths: tuple[int, ...] = (32, 64)
    layers: int = 1
    attention: bool = True
    groups: int = 8
    class_dropout: float = 0.1
    time_scale: float = 1000.0

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1 or self.layers < 1:
            raise ValueError(f"widths and layers must be at least 1; got {list(self.widths)} and {self.layers}.")
        if self.groups < 1 or any(width % self.groups for width in self.widths):
            raise ValueError(f"groups must divide every width; got {self.groups} and {list(self.widths)}.")
        if not 0 <= self.class_dropout <= 1:
            raise ValueError(f"class_dropout must be between 0 and 1; got {self.class_dropout}.")

    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        times = 2 ** (len(self.widths) - 1)
        if len(shape) != 3 or shape[1] % times or shape[2] % times:
            raise UserError(
                f"backbone 'unet' with {len(self.widths)} levels takes images whose sides are multiples of {times}, "
                f"not states of shape {'x'.join(map(str, shape))}. Give fewer widths, or use 'mlp' for points."
            )
        from sitkit_unet.network import Labelled

        return Labelled(self, (shape[0], shape[1], shape[2]), num_classes)
