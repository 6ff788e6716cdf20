"""The U-Net as a torch module.  Only this file imports torch and diffusers when it is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sitkit import UserError

if TYPE_CHECKING:
    from sitkit_unet import UNet


class Labelled(nn.Module):
    """x (b, c, h, w), t (b,), y (b,) int64 -> (b, c, h, w)."""

    def __init__(self, backbone: UNet, shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        try:
            from diffusers.models.unets.unet_2d import UNet2DModel
        except ImportError as error:
            raise UserError(f"backbone 'unet' needs diffusers: pip install 'diffusers>=0.36' ({error}).") from None
        self.num_classes, self.class_dropout = num_classes, backbone.class_dropout
        self.time_scale = backbone.time_scale
        plain = len(backbone.widths) - 1
        lowest = "Attn" if backbone.attention else ""
        model: Any = UNet2DModel(
            sample_size=shape[1:],
            in_channels=shape[0],
            out_channels=shape[0],
            block_out_channels=backbone.widths,
            layers_per_block=backbone.layers,
            norm_num_groups=backbone.groups,
            down_block_types=("DownBlock2D",) * plain + (f"{lowest}DownBlock2D",),
            up_block_types=(f"{lowest}UpBlock2D",) + ("UpBlock2D",) * plain,
            add_attention=backbone.attention,
            attention_head_dim=backbone.groups,
            num_class_embeds=num_classes + 1,
        )
        # The prediction is 0 before training, as in SiT.
        nn.init.zeros_(model.conv_out.weight)
        nn.init.zeros_(model.conv_out.bias)
        self.model = model

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.model(x, self.time_scale * t, class_labels=y).sample
