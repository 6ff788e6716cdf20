"""Tests: the laws, and the average velocity of a Gaussian in closed form, which gives exact samples and no error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sitkit
from sitkit import Batch
from sitkit.testing import GaussianAverage, Law, gaussian_moments, parametrize_with_laws

LINEAR, VELOCITY = sitkit.interpolants.create("linear"), sitkit.targets.create("velocity")


@parametrize_with_laws(
    sitkit.backbones.create("two-time"), sitkit.losses.create("meanflow"), sitkit.samplers.create("meanflow")
)
def test_laws(law: Law) -> None:
    law.check()


@pytest.mark.parametrize("steps", [1, 3])
def test_an_exact_network_gives_exact_samples_in_any_number_of_steps(steps: int) -> None:
    noise = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    field = sitkit.Field(GaussianAverage(LINEAR), LINEAR, VELOCITY)
    result = sitkit.samplers.create("meanflow", steps=steps).sample(field, noise, trajectory=True)
    mean, std = gaussian_moments(LINEAR, 1.0)
    torch.testing.assert_close(result.x, mean + std * noise, rtol=1e-10, atol=1e-10)
    assert result.nfe == steps and result.trajectory is not None and len(result.trajectory) == steps + 1


def test_the_identity_holds_for_the_exact_average() -> None:
    """For Gaussians, u - v - (s - t) du/dt = 0 holds with v replaced by its mean over the data given z."""
    network, n = GaussianAverage(LINEAR), 64
    z = torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start, end = torch.full((n,), 0.3, dtype=torch.float64), torch.full((n,), 0.8, dtype=torch.float64)
    v = network(z, torch.stack((start, start), 1), torch.zeros(n, dtype=torch.int64))

    def u(z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return network(z, torch.stack((t, s), 1), torch.zeros(n, dtype=torch.int64))

    directions: Any = (v, torch.ones_like(start), torch.zeros_like(end))
    value, rate, *_ = torch.func.jvp(u, (z, start, end), directions)
    torch.testing.assert_close(value, v + 0.5 * rate, rtol=1e-10, atol=1e-10)


def test_with_equal_times_it_is_the_loss_of_the_velocity() -> None:
    torch.manual_seed(0)
    network = sitkit.backbones.create("two-time").build((1, 8, 8), 10)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    data, noise = torch.randn(2, 5, 1, 8, 8)
    weight = sitkit.weightings.create("velocity")
    batch = Batch(network, LINEAR, VELOCITY, weight, data, noise, torch.rand(5), torch.arange(5), torch.arange(5))
    ours = sitkit.losses.create("meanflow", instant=1.0, power=0.0).per_example(batch)
    torch.testing.assert_close(ours, sitkit.losses.create("interpolant").per_example(batch), rtol=1e-5, atol=1e-5)


def test_intervals_run_forward_and_the_fraction_of_instants_is_right() -> None:
    start, end = sitkit.losses.create("meanflow", instant=0.75).times(torch.rand(4000), torch.arange(4000))
    assert (start <= end).all()
    # Standard error sqrt(0.75 * 0.25 / 4000) = 0.007.
    assert float((start == end).float().mean()) == pytest.approx(0.75, abs=0.035)


def test_impossible_settings_are_errors() -> None:
    plain = sitkit.backbones.create("sit-xs/2").build((1, 8, 8), 10)
    with pytest.raises(sitkit.UserError, match="use --backbone two-time"):
        sitkit.losses.create("meanflow").build(plain, (1, 8, 8), 10)
    sampler = sitkit.samplers.create("meanflow")
    with pytest.raises(sitkit.UserError, match="train with --backbone two-time"):
        sampler.sample(sitkit.Field(plain, LINEAR, VELOCITY), torch.randn(2, 1, 8, 8))
    with pytest.raises(sitkit.UserError, match="takes no guidance"):
        sampler.plan(sitkit.SolveSpec(LINEAR, VELOCITY, None, sitkit.guidances.create("cfg")))
    with pytest.raises(sitkit.UserError, match="use target 'velocity'"):
        sampler.plan(sitkit.SolveSpec(LINEAR, sitkit.targets.create("score")))
    with pytest.raises(sitkit.UserError, match="needs a SiT"):
        sitkit.backbones.create("two-time", of="mlp").build((2,), 0)


def test_a_likelihood_is_refused() -> None:
    field = sitkit.Field(GaussianAverage(LINEAR), LINEAR, VELOCITY)
    with pytest.raises(sitkit.UserError, match="'meanflow' gives no likelihood: use an ODE sampler"):
        sitkit.log_prob(field, torch.zeros(2, 1), sampler=sitkit.samplers.create("meanflow"))
