"""The laws, for several powers, and the formula by hand."""

from __future__ import annotations

import pytest
import torch

import sitkit
from sitkit.testing import check_interpolant, check_sampler


@pytest.mark.parametrize("power", [1.0, 1.3, 2.0, 3.0, 5.0])
def test_laws(power: float) -> None:
    check_interpolant(sitkit.interpolants.create("poly", power=power))


def test_by_hand() -> None:
    c = sitkit.interpolants.create("poly", power=3).coefficients(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    expected = torch.tensor([[0, 0.875, 1], [1, 0.875, 0], [3, 0.75, 0], [0, -0.75, -3]], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(list(c)), expected, rtol=1e-15, atol=1e-15)


def test_power_one_is_linear() -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    linear = sitkit.interpolants.create("linear").coefficients(t)
    ours = sitkit.interpolants.create("poly", power=1).coefficients(t)
    torch.testing.assert_close(torch.stack(list(ours)), torch.stack(list(linear)), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("name", ["heun", "euler-maruyama"])
def test_it_is_sampled_rightly(name: str) -> None:
    check_sampler(sitkit.samplers.create(name), sitkit.interpolants.create("poly"))


def test_a_power_below_one_is_refused() -> None:
    with pytest.raises(sitkit.UserError, match=r"power must be at least 1; got 0\.5"):
        sitkit.interpolants.create("poly", power=0.5)
