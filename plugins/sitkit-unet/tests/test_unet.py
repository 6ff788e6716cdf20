"""The laws of backbones, and what the U-Net is made of."""

from __future__ import annotations

import pytest
import torch

import sitkit
from sitkit.testing import Law, parametrize_with_laws


@parametrize_with_laws(
    sitkit.backbones.create("unet", widths=(16, 16)), sitkit.backbones.create("unet", widths=(16,), attention=False)
)
def test_laws(law: Law) -> None:
    law.check()


def test_it_is_diffusers_unet_and_predicts_nothing_at_first() -> None:
    network = sitkit.backbones.create("unet").build((1, 8, 8), 10)
    assert type(network.model).__name__ == "UNet2DModel"
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(network(x, torch.rand(2), torch.tensor([0, 10])), torch.zeros_like(x))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(sitkit.UserError, match="groups must divide every width"):
        sitkit.backbones.create("unet", widths=(12,), groups=8)
    with pytest.raises(sitkit.UserError, match="multiples of 4, not states of shape 1x6x6"):
        sitkit.backbones.create("unet", widths=(8, 8, 8)).build((1, 6, 6), 3)
