"""Tests: the laws of backbones, and properties of the U-Net."""

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


def test_it_is_the_unet_of_diffusers_and_predicts_zero_before_training() -> None:
    network = sitkit.backbones.create("unet").build((1, 8, 8), 10)
    assert type(network.model).__name__ == "UNet2DModel"
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(network(x, torch.rand(2), torch.tensor([0, 10])), torch.zeros_like(x))


def test_impossible_settings_are_errors() -> None:
    with pytest.raises(sitkit.UserError, match="groups must divide every width"):
        sitkit.backbones.create("unet", widths=(12,), groups=8)
    with pytest.raises(sitkit.UserError, match="multiples of 4, not states of shape 1x6x6"):
        sitkit.backbones.create("unet", widths=(8, 8, 8)).build((1, 6, 6), 3)
