"""The laws, for several powers, and the formula by hand."""

from __future__ import annotations

import pytest
import torch

import sitkit
from sitkit.testing import ORDER_TOLERANCE, Law, gaussian_field, observed_order, parametrize_with_laws


@parametrize_with_laws(*(sitkit.interpolants.create("poly", power=power) for power in (1.0, 1.3, 2.0, 3.0, 5.0)))
def test_laws(law: Law) -> None:
    law.check()


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
def test_samplers_have_their_order_on_it(name: str) -> None:
    sampler = sitkit.samplers.create(name)
    field = gaussian_field(sitkit.interpolants.create("poly"), sitkit.targets.create("velocity"))
    assert observed_order(sampler, field) == pytest.approx(sampler.order, abs=ORDER_TOLERANCE)


def test_a_power_below_one_is_refused() -> None:
    with pytest.raises(sitkit.UserError, match=r"power must be at least 1; got 0\.5"):
        sitkit.interpolants.create("poly", power=0.5)
