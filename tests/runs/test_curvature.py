"""The curvature of a field's paths against the closed form of a Gaussian, and the grid of equal local errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sitkit.registry import interpolants, samplers, targets
from sitkit.runs.diagnostics import INTERVALS, path_curvature
from sitkit.testing import MEAN, STD, gaussian_field, gaussian_moments
from sitkit.transport.timestep import Adapted, Timestep, Uniform

LINEAR = interpolants.create("linear")


def start() -> Tensor:
    return torch.randn(500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", targets.names())
def test_the_curvature_of_gaussian_paths_is_that_of_their_standard_deviation(name: str) -> None:
    """x_t = m t + z r with r^2 = q = s^2 t^2 + (1 - t)^2, so x'' = z (2 q q'' - q'^2) / (4 q^(3/2))."""
    curve = torch.tensor(path_curvature(gaussian_field(LINEAR, targets.create(name)), start()), dtype=torch.float64)
    t, bend = curve.T
    assert len(t) == INTERVALS - 1 and bool((t.diff() > 0).all())
    q, d, dd = STD**2 * t**2 + (1 - t) ** 2, 2 * STD**2 * t - 2 * (1 - t), 2 * STD**2 + 2
    expected = (2 * q * dd - d**2) / (4 * q**1.5) * start().square().mean().sqrt()
    # A second difference errs by h^2 / 12 of the fourth derivative of r, at most 60 times r'' where the path turns: 1 / 64^2
    # / 12 * 60 = 0.12 %; heun's own error over 64 steps, h^2 / 6 of the third, is ten times that.
    assert float((bend / expected - 1).abs().max()) < 0.01


def local_errors(grid: Timestep, steps: int) -> Tensor:
    """The error of each Euler step from the exact state at its start, root mean square over the noise."""
    field, z = gaussian_field(LINEAR, targets.create("velocity")), start()
    times = grid.grid(steps, 0.0, 1.0).tolist()
    errors = []
    for t, after in zip(times, times[1:], strict=False):
        (mean, std), (mean_after, std_after) = (gaussian_moments(LINEAR, at) for at in (t, after))
        x = mean + std * z
        step = x + (after - t) * field.read(x, t).velocity
        errors.append(float((step - (mean_after + std_after * z)).square().mean().sqrt()))
    return torch.tensor(errors)


def test_an_adapted_grid_makes_local_errors_equal_and_their_sum_smaller() -> None:
    adapted = Adapted(path_curvature(gaussian_field(LINEAR, targets.create("velocity")), start()))
    ours, even = local_errors(adapted, 20), local_errors(Uniform(), 20)
    # |x''| changes by up to a third within a step here, and with it the error by as much.
    assert float(ours.max() / ours.min()) < 2
    # The uniform grid's spread is that of |x''| itself, 1 / 0.3^3 to 1 / q^(3/2) around t = 0.9: tens.
    assert float(even.max() / even.min()) > 10
    assert float(ours.sum()) < 0.8 * float(even.sum())


@pytest.mark.parametrize("name", ["euler", "dpm++-2m"])
def test_an_adapted_grid_ends_nearer_to_the_flow(name: str) -> None:
    field, z = gaussian_field(LINEAR, targets.create("velocity")), start()
    adapted = Adapted(path_curvature(field, z))

    def error(grid: Timestep) -> float:
        x = samplers.create(name, steps=8, grid=grid).sample(field, z).x
        return float((x - (MEAN + STD * z)).square().mean().sqrt())

    assert math.isfinite(error(adapted)) and error(adapted) < error(Uniform())
