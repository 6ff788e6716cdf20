"""Log-density under the flow against the Gaussian's own, for every interpolant and target."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

import sitkit
from sitkit.registry import interpolants, samplers, targets
from sitkit.runtime.errors import UserError
from sitkit.solvers.log_density import (
    estimated_divergences,
    exact_divergence,
    integrate_log_density,
    log_prior,
    probe,
)
from sitkit.solvers.sampler import SolveSpec
from sitkit.testing import MEAN, STD, gaussian_field, gaussian_moments, gaussian_network
from sitkit.transport.field import Counted, Field


def draw(rows: int, *shape: int) -> Tensor:
    unit = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return MEAN + STD * unit


def density(data: Tensor, mean: float = MEAN, std: float = STD) -> Tensor:
    """log N(data; mean, std^2 I), float64 throughout."""
    law = Normal(torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64))
    return law.log_prob(data).flatten(1).sum(1)


def sharp() -> Any:
    return samplers.create("dopri5", rtol=1e-9, atol=1e-9)


def test_log_prior() -> None:
    x = draw(5, 3, 2)
    torch.testing.assert_close(log_prior(x), density(x, 0.0, 1.0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", targets.names())
@pytest.mark.parametrize("path", interpolants.names())
def test_closed_form(path: str, name: str) -> None:
    field = gaussian_field(interpolants.create(path), targets.create(name))
    data = draw(6, 2)
    result = integrate_log_density(field, data, sampler=sharp())
    times = sharp().plan(SolveSpec(field.interpolant, field.target)).times
    (m0, s0), (m1, s1) = (gaussian_moments(field.interpolant, float(t)) for t in times)
    # The solve runs over the derived interval, which starts from N(m0, s0^2) rather than N(0, 1) and ends at N(m1, s1^2).
    scaled = (data - m1) / s1
    start = m0 + s0 * scaled
    expected = log_prior(start) - 2 * math.log(s1 / s0)
    # Local errors of 1e-9 over at most a few hundred steps.
    torch.testing.assert_close(result.noise, start, rtol=0, atol=1e-6)
    torch.testing.assert_close(result.log_prob, expected, rtol=0, atol=1e-6)
    exact = density(data)
    # What a margin of 1e-3 at an end, or vp-sbdm's alpha(0) = 0.0066 with mean 0.7, costs: |x| 0.005 and its square.
    torch.testing.assert_close(result.log_prob, exact, rtol=0, atol=0.05)


def test_public_name_gives_the_numbers_alone() -> None:
    field = gaussian_field(interpolants.create("linear"), targets.create("velocity"))
    data = draw(4, 2)
    expected = density(data)
    torch.testing.assert_close(sitkit.log_prob(field, data, sampler=sharp()), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["euler", "midpoint", "heun", "rk4"])
def test_fixed_steps_converge_and_count(name: str) -> None:
    field = gaussian_field(interpolants.create("gvp"), targets.create("velocity"))
    data = draw(4, 2)
    truth = density(data)
    errors = []
    for steps in (32, 64):
        sampler: Any = samplers.create(name, steps=steps)
        result = integrate_log_density(field, data, sampler=sampler)
        assert (
            result.nfe == sampler.plan(SolveSpec(field.interpolant, field.target)).nfe == steps * len(sampler.tableau.c)
        )
        errors.append(float((result.log_prob - truth).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(sampler.order, abs=0.25)


def quadratic(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """A velocity that couples the dimensions: A x with a full A, and a term that is not linear."""
    matrix = torch.tensor([[0.3, -1.0, 0.2], [0.5, 0.1, -0.7], [0.0, 0.4, -0.6]], dtype=x.dtype)
    return x @ matrix.T + 0.1 * x.square()


def test_divergence_exact_and_estimated() -> None:
    x = draw(5, 3).requires_grad_()
    velocity = quadratic(x, torch.zeros(5), torch.zeros(5))
    trace = -0.2 + 0.2 * x.detach().sum(1)
    torch.testing.assert_close(exact_divergence(velocity, x), trace, rtol=1e-12, atol=1e-12)
    for kind in ("rademacher", "gaussian"):
        probes = probe(x.detach(), kind, 4_000, range(5))
        # e . J e has a variance of at most 2 |J|_F^2, about 6 here: a standard error of 0.04 from 4,000 probes.
        torch.testing.assert_close(estimated_divergences(velocity, x, probes).mean(0), trace, rtol=0, atol=0.2)


def test_probes_belong_to_the_examples_and_stay_fixed() -> None:
    """One probe for a whole solve: the estimate is deterministic, the same in any batch, and costs no more steps."""
    linear, velocity = interpolants.create("linear"), targets.create("velocity")
    calls = Counted(gaussian_network(linear, velocity, MEAN, STD))
    field = Field(calls, linear, velocity)
    data = draw(4, 40)
    result = integrate_log_density(field, data, divergence="rademacher", seeds=range(4))
    assert result.probes == 1 and calls.rows == 4 * result.nfe
    heun: Any = samplers.create("heun", steps=8)
    whole = integrate_log_density(field, data, sampler=heun, seeds=range(4)).log_prob
    part = integrate_log_density(field, data[[3, 1]], sampler=heun, seeds=[3, 1]).log_prob
    torch.testing.assert_close(part, whole[[3, 1]], rtol=1e-12, atol=0)
    # The Jacobian is a multiple of the identity, so one Rademacher probe is exact.
    exact = integrate_log_density(field, data, divergence="exact", seeds=range(4)).log_prob
    torch.testing.assert_close(result.log_prob, exact, rtol=1e-4, atol=1e-3)
    plain = samplers.create("dopri5").sample(field, torch.randn(4, 40, dtype=torch.float64), seeds=range(4)).nfe
    assert result.nfe <= 3 * plain


def test_exact_up_to_32_dimensions() -> None:
    field = gaussian_field(interpolants.create("linear"), targets.create("velocity"))
    heun: Any = samplers.create("heun", steps=4)
    assert integrate_log_density(field, draw(2, 4, 8), sampler=heun).probes == 0
    assert integrate_log_density(field, draw(2, 33), sampler=heun, probes=3).probes == 3


def test_refusals() -> None:
    field = gaussian_field(interpolants.create("linear"), targets.create("velocity"))
    stochastic: Any = samplers.create("euler-maruyama")
    with pytest.raises(UserError, match="needs an ODE sampler"):
        integrate_log_density(field, draw(2, 2), sampler=stochastic)
    with pytest.raises(UserError, match="probes must be at least 1; got 0"):
        integrate_log_density(field, draw(2, 2), probes=0)


def test_steps_are_as_small_as_the_divergence_needs() -> None:
    """On the straight path the mean of a Gaussian moves at a constant rate, so x alone would be solved in a few steps.

    Its divergence, (t STD^2 - (1 - t)) / var(x) a dimension, is not constant.
    """
    field = gaussian_field(interpolants.create("linear"), targets.create("velocity"), std=0.02)
    data = torch.full((3, 8), MEAN, dtype=torch.float64)
    result = integrate_log_density(field, data, divergence="exact")
    # dopri5 at its default tolerance of 1e-5 a step, some 100 steps.
    torch.testing.assert_close(result.log_prob, density(data, std=0.02), rtol=0, atol=1e-3)
