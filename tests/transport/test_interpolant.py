"""Interpolants: every law on every registered name, and the formulas by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sitkit.registry import interpolants
from sitkit.runtime.errors import UserError
from sitkit.testing import obey
from sitkit.transport.interpolant import DDPM, VPSBDM, Coefficients, Interpolant, Linear
from sitkit.transport.target import Velocity, determinant

# The laws that need no sampling.
ALGEBRA = "ends", "derivatives", "monotone", "readable", "elementwise"


@pytest.mark.parametrize("name", interpolants.names())
def test_laws(name: str) -> None:
    obey(interpolants.create(name))


# alpha(0) = exp(-(beta_min + beta_max) / 4) is small enough from beta_max = 16 on: exp(-4) = 0.018.
@given(st.floats(0.01, 1.0), st.floats(16.0, 40.0))
def test_vp_laws_for_any_rates(beta_min: float, beta_max: float) -> None:
    obey(VPSBDM(beta_min, beta_max), *ALGEBRA)


# alpha(0)^2 is the product of 1 - beta: below 0.02^2 where the betas' mean times their number is 8 or more.
@given(st.floats(6e-5, 1e-3), st.floats(0.02, 0.1), st.integers(1000, 4000))
def test_ddpm_laws_for_any_betas(beta_min: float, beta_max: float, levels: int) -> None:
    obey(DDPM(beta_min, beta_max, levels), *ALGEBRA)


@given(st.floats(6e-4, 1e-2), st.floats(0.011, 0.1), st.integers(100, 2000))
def test_ddpm_has_the_products_of_its_betas_at_every_level(beta_min: float, beta_max: float, levels: int) -> None:
    betas = torch.linspace(beta_min, beta_max, levels, dtype=torch.float64)
    m = torch.arange(levels + 1, dtype=torch.float64)
    c = DDPM(beta_min, beta_max, levels).coefficients(1 - m / levels)
    log_abar = torch.cat([torch.zeros(1, dtype=torch.float64), (-betas).log1p().cumsum(0)])
    # 1 - m / levels is rounded by 1e-16 of 1, which is levels * 1e-16 of m = 1; a sum of 2,000 adds as much again.
    torch.testing.assert_close(2 * c.alpha.log(), log_abar, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(c.sigma.square(), -log_abar.expm1(), rtol=1e-10, atol=1e-15)


def test_ddpm_lies_near_the_vp_of_its_limit() -> None:
    """beta(t) of vp-sbdm is levels * beta: log abar differ by sum beta^2 / 2, 0.066 of -10.1 at the noise."""
    t = torch.linspace(0, 1, 50, dtype=torch.float64)
    ours, theirs = DDPM().coefficients(t).alpha.log(), VPSBDM().coefficients(t).alpha.log()
    assert float((ours - theirs).abs().max()) < 0.04


def test_ddpm_keeps_its_digits_in_float32() -> None:
    t = 1 - torch.arange(1, 1025, dtype=torch.float64) / 1024  # Exact in float32.
    single, double = (DDPM().coefficients(t.to(dtype)) for dtype in (torch.float32, torch.float64))
    for ours, truth in zip(single, double, strict=True):
        # A dozen roundings of 6e-8, and exp multiplies those of log alpha by 5.
        torch.testing.assert_close(ours.double(), truth, rtol=5e-6, atol=0)


@given(st.floats(0.0, 1.0))
def test_values_by_hand(t: float) -> None:
    def at(name: str) -> list[float]:
        c = interpolants.create(name).coefficients(torch.tensor(t, dtype=torch.float64))
        return [float(value) for value in c]

    assert at("linear") == [t, 1 - t, 1.0, -1.0]
    half = math.pi / 2
    angle = half * t
    # sin(pi (1 - t) / 2) and cos(pi t / 2) differ by the rounding of their arguments, at most 2e-16 each.
    expected = [math.sin(angle), math.cos(angle), half * math.cos(angle), -half * math.sin(angle)]
    assert at("gvp") == pytest.approx(expected, abs=1e-15)
    s = 1 - t
    log_alpha = -s * s * 19.9 / 4 - s * 0.05
    alpha, sigma, d_alpha, d_sigma = at("vp-sbdm")
    assert alpha == pytest.approx(math.exp(log_alpha), rel=1e-14)
    assert alpha**2 + sigma**2 == pytest.approx(1, abs=1e-15)
    assert d_alpha == pytest.approx(alpha * (0.1 + 19.9 * s) / 2, rel=1e-14)
    assert sigma * d_sigma == pytest.approx(-alpha * d_alpha, rel=1e-14)


def test_vp_keeps_its_digits_near_the_data() -> None:
    """sigma^2 = 1 - exp(-x) loses all digits for small x; -expm1(-x) = x - x^2 / 2 + ... loses none."""
    s = torch.tensor([2.0**-40], dtype=torch.float64)
    sigma = VPSBDM().coefficients(1 - s).sigma
    # x = s^2 19.9 / 2 + s 0.1; the next term of the series is x / 2 = 5e-14 of the first.
    expected = (s.square() * 9.95 + s * 0.1).sqrt()
    torch.testing.assert_close(sigma, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", interpolants.names())
def test_the_velocity_is_readable_at_the_very_ends(name: str) -> None:
    t = torch.tensor([0.0, 5e-324, 1e-12, 1 - 1e-12, 1 - 2**-53, 1.0], dtype=torch.float64)
    det = determinant(Velocity(), interpolants.create(name).coefficients(t))
    assert bool((det.isfinite() & (det > 0)).all()), det


def test_at_puts_times_beside_states() -> None:
    x = torch.zeros(4, 3, 2, 2)
    for t, shape in ((torch.rand(4), (4, 1, 1, 1)), (torch.tensor(0.5), (1, 1, 1, 1))):
        for value in Linear().at(t, x):
            assert value.shape == shape
    assert Linear().at(torch.rand(4), torch.zeros(4)).alpha.shape == (4,)


def test_wrong_rates_are_refused() -> None:
    with pytest.raises(UserError, match="beta_min"):
        interpolants.create("vp-sbdm", beta_min=0)
    for wrong in ({"beta_max": 0.2}, {"levels": 10}, {"beta_min": 0.02}):
        with pytest.raises(UserError, match="needs 0 < beta_min < beta_max"):
            interpolants.create("ddpm", **wrong)
    with pytest.raises(UserError, match="above half a step of beta"):
        interpolants.create("ddpm", beta_min=5e-6)
    with pytest.raises(UserError, match=r"no field 'beta_mx'.*Did you mean 'beta_max'"):
        interpolants.create("vp-sbdm", beta_mx=1)


class _Broken(Interpolant):
    """A path that breaks one law."""

    name = "linear"

    def __init__(self, change: str) -> None:
        object.__setattr__(self, "change", change)

    def coefficients(self, t: Tensor) -> Coefficients:
        one = torch.ones_like(t)
        return {
            "rate": Coefficients(t, 1 - t, 1.001 * one, -one),
            "end": Coefficients(t, 1.01 - t, one, -one),
            "start": Coefficients(t / 2 + 0.5, 1 - t, one / 2, -one),
            "det": Coefficients(t.square(), 1 - t.square(), 2 * t, -2 * t),
            "fall": Coefficients((3 * t - 2 * t.square()), 1 - t, 3 - 4 * t, -one),
            "dtype": Coefficients(t.double(), (1 - t).double(), one.double(), -one.double()),
            "shape": Coefficients(t, 1 - t, one.new_ones(()), -one),
        }[self.change]  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("change", "law"),
    [
        ("rate", "d_alpha is the derivative"),
        ("end", r"sigma\(1\) = 0"),
        ("start", r"alpha\(0\) = 0"),
        ("det", "velocity is readable"),
        ("fall", "alpha does not fall"),
        ("dtype", "of t's dtype"),
        ("shape", "of t's shape"),
    ],
)
def test_the_laws_catch_a_break(change: str, law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        obey(_Broken(change), *ALGEBRA)


def test_an_unregistered_component_is_refused_by_the_laws() -> None:
    @dataclass(frozen=True)
    class Stranger(Interpolant):
        """Not registered."""

        def coefficients(self, t: Tensor) -> Coefficients:
            return Linear().coefficients(t)

    with pytest.raises(AssertionError, match="registered"):
        obey(Stranger())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", interpolants.names())
def test_coefficients_of_a_half_precision_time_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    t, x = torch.tensor([0.1, 0.5, 0.99], dtype=dtype), torch.zeros(3, 2, 2, dtype=dtype)
    interpolant = interpolants.create(name)
    for ours, full in zip(interpolant.at(t, x), interpolant.coefficients(t.float().reshape(3, 1, 1)), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, full)
