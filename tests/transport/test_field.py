"""A network read as a field: four readings from one evaluation, each equal to the truth."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import sitkit
from sitkit.registry import interpolants, targets
from sitkit.runtime.errors import UserError
from sitkit.testing import MEAN, STD, gaussian_field, gaussian_network
from sitkit.transport.field import Counted, Field
from sitkit.transport.interpolant import Interpolant
from sitkit.transport.target import determinant

INTERPOLANTS, TARGETS = interpolants.names(), targets.names()


class Truth(NamedTuple):
    """The readings of data ~ N(MEAN, STD^2), by Gaussian conditioning."""

    velocity: Tensor
    score: Tensor
    data: Tensor
    noise: Tensor


def truth(interpolant: Interpolant, t: Tensor, x: Tensor) -> Truth:
    """cov(data, x) = alpha STD^2, cov(noise, x) = sigma, var(x) = alpha^2 STD^2 + sigma^2."""
    c = interpolant.at(t, x)
    away = (x - c.alpha * MEAN) / (c.alpha**2 * STD**2 + c.sigma**2)
    data, noise = MEAN + c.alpha * STD**2 * away, c.sigma * away
    # d_sigma sigma has a limit where sigma vanishes, also where d_sigma diverges.
    return Truth(c.d_alpha * data + c.d_sigma * c.sigma.clamp_min(1e-30) * away, -away, data, noise)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("path", INTERPOLANTS)
def test_readings_are_the_truth_wherever_the_algebra_is_finite(path: str, name: str) -> None:
    interpolant, target = interpolants.create(path), targets.create(name)
    t = torch.linspace(0, 1, 201, dtype=torch.float64)
    x = torch.randn(201, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    det = determinant(target, interpolant.coefficients(t))
    finite = det.isfinite() & (det.abs() > 1e-9)
    # All but at most one end; the velocity target is readable at both.
    assert int(finite.sum()) >= 200 and (name != "velocity" or bool(finite.all()))
    t, x = t[finite], x[finite]
    readings, expected = gaussian_field(interpolant, target).read(x, t), truth(interpolant, t, x)
    scored = interpolant.coefficients(t).sigma > 0
    for reading in ("velocity", "data", "noise", "score"):
        rows = scored if reading == "score" else torch.ones_like(scored)
        value, wanted = getattr(readings, reading)[rows], getattr(expected, reading)[rows]
        # Cancellation costs eps |x| / det, and the score another 1 / sigma: 2e-16 x 3 / 0.005^2 = 3e-11 at t = 0.995.
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-10, msg=f"{path} {name} {reading}")


def test_one_reading_is_one_evaluation_whatever_the_shape_of_t() -> None:
    interpolant, target = interpolants.create("gvp"), targets.create("velocity")
    calls = Counted(gaussian_network(interpolant, target))
    field = Field(calls, interpolant, target)
    x = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    readings = [field.read(x, t) for t in (0.3, torch.tensor(0.3), torch.full((4,), 0.3))]
    assert calls.rows == 12
    for reading in readings:
        for ours, first in zip(reading, readings[0], strict=True):
            assert ours.shape == x.shape and ours.dtype == torch.float32
            assert torch.equal(ours, first)


def test_coefficients_are_never_computed_in_half_precision() -> None:
    """At t = 0.99 bfloat16 would round t to 0.9922 and sigma to 0.0078."""
    interpolant, target = interpolants.create("linear"), targets.create("data")
    dtypes: list[torch.dtype] = []

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        dtypes.extend((x.dtype, t.dtype))
        return torch.zeros_like(x)

    x = torch.ones(2, 3, dtype=torch.bfloat16)
    reading = Field(network, interpolant, target).read(x, 0.99)
    assert dtypes == [torch.bfloat16, torch.bfloat16]
    assert reading.noise.dtype == torch.float32
    # noise = x / sigma = 100 to float32's rounding of 1 - 0.99: 6e-8 / 0.01.
    torch.testing.assert_close(reading.noise, torch.full((2, 3), 100.0), rtol=1e-5, atol=0)


def test_labels() -> None:
    network = gaussian_network(interpolants.create("linear"), targets.create("velocity"))
    field = Field(network, interpolants.create("linear"), targets.create("velocity"), num_classes=10)
    x = torch.zeros(3, 2)
    assert field.null_class == 10
    assert field.labels(None, x).tolist() == [10, 10, 10]
    assert field.labels(4, x).tolist() == [4, 4, 4]
    assert field.labels(torch.tensor([0, 9, 10], dtype=torch.int32), x).dtype == torch.int64
    for wrong in (11, -1, torch.tensor([0, 1, 12])):
        with pytest.raises(UserError, match="the network knows 0 to 9 and the null class 10"):
            field.labels(wrong, x)


def test_num_classes_is_the_networks_unless_said() -> None:
    network = gaussian_network(interpolants.create("linear"), targets.create("velocity"))
    assert Field(network, interpolants.create("linear"), targets.create("velocity")).null_class == 0
    through = sitkit.Field(network, interpolants.create("linear"), targets.create("velocity"), 7).through(
        Counted(network, 1)
    )
    assert through.null_class == 7


def test_counting_is_per_sample() -> None:
    counted = Counted(lambda x, t, y: x, 4)
    for rows in (4, 8, 4):
        counted(torch.zeros(rows, 1), torch.zeros(rows), torch.zeros(rows))
    assert counted.nfe == 4


@pytest.mark.parametrize("name", TARGETS)
def test_readings_of_a_half_precision_network_are_computed_in_float32(name: str) -> None:
    """The state and the prediction are rounded to bfloat16; what is made of them is not."""

    def half(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return (x / 3).bfloat16()

    target, path = targets.create(name), interpolants.create("gvp")
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    low = Field(half, path, target).read(x, 0.3)
    full = Field(lambda x, t, y: half(x, t, y).float(), path, target).read(x.float(), 0.3)
    for ours, theirs in zip(low, full, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
