"""The interpolant loss: values by hand, the losses of the paper, and the minimum that the exact network reaches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sitkit.models.loss import interpolant_loss
from sitkit.registry import interpolants, targets, weightings
from sitkit.testing import MEAN, STD, gaussian_network
from sitkit.transport.field import Counted
from sitkit.transport.target import determinant


def constant(value: float):
    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.full_like(x, value)

    return network


def loss(target: str, weighting: str, prediction: float, t: float = 0.25) -> float:
    """On linear, with data 2 and noise -1 in each of four dimensions."""
    data, noise = torch.full((1, 1, 2, 2), 2.0), torch.full((1, 1, 2, 2), -1.0)
    pieces = interpolants.create("linear"), targets.create(target), weightings.create(weighting)
    values = interpolant_loss(constant(prediction), *pieces, data, noise, torch.tensor([t]), torch.tensor([0]))
    assert values.shape == (1,)
    return float(values)


def test_by_hand() -> None:
    """At t = 1/4: alpha 1/4, sigma 3/4, velocity 3, score 4/3, lambda = det_v / alpha = 4."""
    table = {
        ("velocity", "velocity", 5.0): (5 - 3) ** 2,
        ("noise", "noise", 0.0): 1.0,
        ("data", "data", 5.0): 9.0,
        ("data", "velocity", 5.0): 9 / 0.75**2,
        ("score", "score", 0.0): (4 / 3) ** 2,
        ("score", "noise", 0.0): (4 / 3) ** 2 * 0.75**2,
        ("score", "velocity", 0.0): (4 / 3) ** 2 * (4 * 0.75) ** 2,
        ("noise", "likelihood", 0.0): 4 / 0.75,
        ("data", "min-snr", 5.0): 9 / 9,
    }
    for (target, weighting, prediction), expected in table.items():
        # float32: a dozen roundings of 6e-8.
        assert loss(target, weighting, prediction) == pytest.approx(expected, rel=1e-6), (target, weighting)


def test_it_is_the_mean_over_dimensions_of_one_evaluation_at_x() -> None:
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 5, 3, 4, 4, generator=generator)
    t, y = torch.rand(5, generator=generator), torch.arange(5)
    arguments: list[tuple[Tensor, Tensor, Tensor]] = []

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        arguments.append((x, t, y))
        return 0.5 * x

    calls = Counted(network)
    pieces = interpolants.create("linear"), targets.create("velocity"), weightings.create("velocity")
    values = interpolant_loss(calls, *pieces, data, noise, t, y)
    wide = t[:, None, None, None]
    x = wide * data + (1 - wide) * noise
    assert calls.rows == 5 and torch.equal(arguments[0][0], x) and arguments[0][1] is t and arguments[0][2] is y
    torch.testing.assert_close(values, (0.5 * x - (data - noise)).square().mean((1, 2, 3)))


def test_it_is_computed_in_float32_under_half_precision() -> None:
    """A network in bfloat16: the error is squared and averaged in float32."""
    data, noise = torch.full((2, 1000), 1.0), torch.zeros(2, 1000)

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.full_like(x, 1 + 2**-7, dtype=torch.bfloat16)

    pieces = interpolants.create("linear"), targets.create("data"), weightings.create("data")
    values = interpolant_loss(
        network, *pieces, data, noise, torch.tensor([0.3, 0.6]), torch.zeros(2, dtype=torch.int64)
    )
    assert values.dtype == torch.float32
    assert values.tolist() == [2.0**-14] * 2


@pytest.mark.parametrize("name", targets.names())
@pytest.mark.parametrize("path", interpolants.names())
def test_a_perfect_network_has_the_least_loss(path: str, name: str) -> None:
    """var(y | x) = (det / sigma)^2 var(data | x) = det^2 s^2 / (alpha^2 s^2 + sigma^2), in every space of measurement."""
    interpolant, target = interpolants.create(path), targets.create(name)
    network = gaussian_network(interpolant, target, MEAN, STD)
    n = 20_000
    generator = torch.Generator().manual_seed(0)
    unit = torch.randn(2, 1, n, generator=generator, dtype=torch.float64)
    data, noise = MEAN + STD * unit[0], unit[1]
    for time in (0.1, 0.5, 0.9):
        t = torch.tensor([time], dtype=torch.float64)
        c = interpolant.coefficients(t)
        variance = (c.alpha * STD).square() + c.sigma.square()
        for weighting in ("velocity", "noise", "score", "data"):
            value = interpolant_loss(
                network, interpolant, target, weightings.create(weighting, floor=0), data, noise, t, torch.tensor([0])
            )
            expected = determinant(targets.create(weighting), c).square() * STD**2 / variance
            # The mean square of n normal numbers has a relative standard error of sqrt(2 / n) = 1%.
            assert float(value) == pytest.approx(float(expected), rel=0.05), (weighting, time)
