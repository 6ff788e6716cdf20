"""Tests: the laws of couplings, the exact plan against scipy, and the smoothed plan between exact and independent."""

from __future__ import annotations

import pytest
import torch

import sitkit
from sitkit.testing import Law, parametrize_with_laws


@parametrize_with_laws(
    sitkit.couplings.create("pot"),
    sitkit.couplings.create("pot", by_class=False, cost="euclidean"),
    sitkit.couplings.create("pot", plan="sinkhorn"),
)
def test_laws(law: Law) -> None:
    law.check()


def batch(rows: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    data, noise = torch.randn(2, rows, 2, generator=torch.Generator().manual_seed(0))
    return data, noise, torch.arange(rows) % 3


def length(coupling: sitkit.Coupling) -> float:
    data, noise, y = batch()
    return float((data - coupling.pair(data, noise, y)).square().sum(1).mean())


@pytest.mark.parametrize("by_class", [True, False])
def test_the_exact_plan_equals_that_of_scipy(by_class: bool) -> None:
    ours = sitkit.couplings.create("pot", by_class=by_class)
    assert length(ours) == pytest.approx(length(sitkit.couplings.create("minibatch-ot", by_class=by_class)), rel=1e-6)


def test_the_smoothed_plan_lies_between_exact_and_independent() -> None:
    exact, independent = length(sitkit.couplings.create("pot")), length(sitkit.couplings.create("independent"))
    smoothed = [length(sitkit.couplings.create("pot", plan="sinkhorn", reg=reg)) for reg in (0.01, 0.3, 100)]
    assert exact <= smoothed[0] < smoothed[1] < smoothed[2]
    assert smoothed[0] < 1.2 * exact and smoothed[2] > 0.7 * independent


def test_pairs_stay_within_a_class() -> None:
    data, noise, y = batch()
    paired = sitkit.couplings.create("pot", plan="sinkhorn").pair(data, noise, y)
    for label in range(3):
        assert {tuple(row) for row in paired[y == label].tolist()} <= {tuple(row) for row in noise[y == label].tolist()}


def test_a_reg_of_zero_is_an_error() -> None:
    with pytest.raises(sitkit.UserError, match="reg must be positive"):
        sitkit.couplings.create("pot", reg=0)
