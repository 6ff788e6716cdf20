"""Tests: the laws of losses, the value of the alignment, and the errors."""

from __future__ import annotations

import pytest
import torch

import sitkit
from sitkit import Batch
from sitkit.testing import Law, examples_of, parametrize_with_laws

DIGITS = sitkit.datasets.create("digits").load()


@parametrize_with_laws(*examples_of(sitkit.losses["repa"], "loss 'repa'"))
def test_laws(law: Law) -> None:
    law.check()


def loss_of_a_batch(weight: float) -> tuple[torch.Tensor, Batch]:
    repa = sitkit.losses.create("repa", encoder="pixels", reads="features", weight=weight).prepare(DIGITS)
    torch.manual_seed(0)
    network = sitkit.backbones.create("sit-xs/2").build((1, 8, 8), 10)
    parts = repa.build(network, (1, 8, 8), 10)
    hidden: dict[str, torch.Tensor] = {}
    network.get_submodule("blocks.1").register_forward_hook(lambda m, i, out: hidden.update({"blocks.1": out}))
    path = sitkit.interpolants.create("linear"), sitkit.targets.create("velocity"), sitkit.weightings.create("velocity")
    data, noise = torch.randn(2, 5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    batch = Batch(network, *path, data, noise, torch.rand(5), torch.arange(5), torch.arange(5), parts, hidden)
    return repa.per_example(batch), batch


def test_it_is_the_loss_interpolant_minus_the_alignment() -> None:
    torch.manual_seed(3)
    base = sitkit.losses.create("interpolant")
    total, batch = loss_of_a_batch(0.5)
    plain = base.per_example(batch)
    assert batch.parts is not None
    cosine = batch.parts(batch.hidden["blocks.1"], batch.data)
    assert ((cosine >= -1) & (cosine <= 1)).all()
    torch.testing.assert_close(total, plain - 0.5 * cosine)


def test_impossible_settings_are_errors() -> None:
    network = sitkit.backbones.create("sit-xs/2").build((1, 8, 8), 10)
    points = sitkit.datasets.create("points", size=100).load()
    with pytest.raises(sitkit.UserError, match=r"no layer 'blocks\.9'; it has .*blocks\.3"):
        sitkit.losses.create("repa", layer="blocks.9").prepare(DIGITS).build(network, (1, 8, 8), 10)
    with pytest.raises(sitkit.UserError, match="takes examples of shape"):
        sitkit.losses.create("repa", encoder="pixels", reads="features").prepare(points).build(network, (1, 8, 8), 10)
    with pytest.raises(sitkit.UserError, match="needs the data of the run"):
        batch = loss_of_a_batch(0.5)[1]
        sitkit.losses.create("repa").per_example(batch)
    with pytest.raises(sitkit.UserError, match="reads must be an output of the encoder"):
        sitkit.losses.create("repa", encoder="pixels")
