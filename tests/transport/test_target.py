"""Targets: the laws, the determinants by hand, and the 2 x 2 solve for any numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sitkit.registry import interpolants, targets
from sitkit.testing import inner_times, obey
from sitkit.transport.interpolant import Coefficients
from sitkit.transport.target import data_and_noise, determinant


@pytest.mark.parametrize("name", targets.names())
def test_laws(name: str) -> None:
    obey(targets.create(name))


@pytest.mark.parametrize("path", interpolants.names())
def test_determinants_by_hand(path: str) -> None:
    c = interpolants.create(path).coefficients(inner_times())
    velocity = c.d_alpha * c.sigma - c.alpha * c.d_sigma
    table = {"velocity": velocity, "noise": -c.alpha, "score": c.alpha / c.sigma, "data": c.sigma}
    for name, expected in table.items():
        torch.testing.assert_close(determinant(targets.create(name), c), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("path", interpolants.names())
def test_determinants_at_the_ends(path: str) -> None:
    """Only the velocity is readable at both ends; each other target is singular at an end where alpha or sigma vanishes."""
    ends = interpolants.create(path).coefficients(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert bool((determinant(targets.create("velocity"), ends) > 0).all())
    assert determinant(targets.create("noise"), ends)[0] == -ends.alpha[0]
    assert determinant(targets.create("data"), ends)[1] == 0
    # sigma = 0 is replaced by 1e-30 in the score's weight, so its determinant is finite there: alpha / 1e-30.
    assert float(determinant(targets.create("score"), ends)[1]) == pytest.approx(1e30)


NUMBER = st.floats(-10, 10, allow_nan=False)


@given(NUMBER, NUMBER, st.floats(0.01, 0.99), st.sampled_from(interpolants.names()), st.sampled_from(targets.names()))
def test_solve_finds_data_and_noise(data: float, noise: float, t: float, path: str, name: str) -> None:
    c = interpolants.create(path).coefficients(torch.tensor(t, dtype=torch.float64))
    a, b = targets.create(name).weights(c)
    solved = data_and_noise(targets.create(name), c, a * data + b * noise, c.alpha * data + c.sigma * noise)
    # Rounding 2e-16 of numbers up to 10 x 100, over determinants of at least 0.007: below 4e-11.
    assert [float(v) for v in solved] == pytest.approx([data, noise], abs=1e-10)


@pytest.mark.parametrize("path", interpolants.names())
def test_predictions_convert_into_one_another(path: str) -> None:
    """Reading data and noise from one target and writing them as another and back is the identity."""
    c = interpolants.create(path).coefficients(inner_times())
    x, y = torch.randn(2, *c.alpha.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for first in map(targets.create, targets.names()):
        for second in map(targets.create, targets.names()):
            data, noise = data_and_noise(first, c, y, x)
            a, b = second.weights(c)
            data, noise = data_and_noise(second, c, a * data + b * noise, x)
            a, b = first.weights(c)
            # Two systems whose condition numbers at t = 1e-3 are at most 1e3 and 1e6: 2e-16 x 1e9.
            torch.testing.assert_close(a * data + b * noise, y, rtol=1e-6, atol=1e-6)


def test_default_spaces_of_the_error() -> None:
    spaces = {name: targets[name].weighting for name in ("velocity", "noise", "score", "data")}
    assert spaces == {"velocity": "velocity", "noise": "noise", "score": "noise", "data": "velocity"}


def test_solve_at_the_data_end_keeps_the_limits() -> None:
    """A score prediction at sigma = 0: the noise reads 0 and the data x / alpha."""
    one = torch.ones((), dtype=torch.float64)
    c = Coefficients(one, 0 * one, one, -one)
    data, noise = data_and_noise(targets.create("score"), c, torch.tensor(-3.0), torch.tensor(0.7))
    assert float(data) == pytest.approx(0.7)
    assert abs(float(noise)) < 1e-29
