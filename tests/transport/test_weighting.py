"""Loss weights: the laws, exactness where space and target agree, and the paper's table."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sitkit.registry import interpolants, targets, weightings
from sitkit.runtime.errors import UserError
from sitkit.testing import inner_times, obey


@pytest.mark.parametrize("name", weightings.names())
def test_laws(name: str) -> None:
    obey(weightings.create(name))


@given(st.floats(0.01, 100))
def test_min_snr_laws_for_any_gamma(gamma: float) -> None:
    obey(weightings.create("min-snr", gamma=gamma))


@pytest.mark.parametrize("path", interpolants.names())
@pytest.mark.parametrize("space", targets.names())
def test_exactly_one_where_space_and_target_agree(space: str, path: str) -> None:
    """Also at the ends, where determinants are 0 or huge."""
    c = interpolants.create(path).coefficients(torch.linspace(0, 1, 101, dtype=torch.float64))
    r = weightings.create(space).weight(c, targets.create(space))
    assert torch.equal(r, torch.ones_like(r))


@pytest.mark.parametrize("path", interpolants.names())
def test_the_papers_losses(path: str) -> None:
    """With lambda = det_v / alpha: L_v is 1; on the score, L_s is sigma^2 and L_s-lambda (lambda sigma)^2."""
    c = interpolants.create(path).coefficients(inner_times())
    det_v = c.d_alpha * c.sigma - c.alpha * c.d_sigma
    rate, one = det_v / c.alpha, torch.ones_like(c.alpha)
    snr = (c.alpha / c.sigma).square()
    table = {
        ("velocity", "velocity"): one,
        ("noise", "score"): c.sigma.square(),
        ("velocity", "score"): (rate * c.sigma).square(),
        ("noise", "noise"): one,
        ("velocity", "noise"): rate.square(),
        ("score", "noise"): 1 / c.sigma.square(),
        ("velocity", "data"): (det_v / c.sigma).square(),
        ("noise", "data"): snr,
        ("likelihood", "noise"): rate / c.sigma,
        ("likelihood", "score"): rate * c.sigma,
        ("min-snr", "data"): snr.clamp_max(5),
        ("min-snr", "noise"): snr.clamp_max(5) / snr,
        ("data", "velocity"): (c.sigma / det_v).square(),
    }
    for (weighting, target), expected in table.items():
        r = weightings.create(weighting, floor=0).weight(c, targets.create(target))
        # The determinants lose the digits of d_alpha sigma - alpha d_sigma, whose terms have one sign: 1e-15 each.
        torch.testing.assert_close(r, expected, rtol=1e-13, atol=0)


def test_likelihood_weight_of_the_vp_sde() -> None:
    """Twice it, on the score error, is g^2 = beta (Song et al. 2021): lambda sigma = beta / 2."""
    t = inner_times()
    c = interpolants.create("vp-sbdm").coefficients(t)
    r = weightings.create("likelihood").weight(c, targets.create("score"))
    torch.testing.assert_close(2 * r, 0.1 + 19.9 * (1 - t), rtol=1e-13, atol=0)


def test_gamma_must_be_positive() -> None:
    with pytest.raises(UserError, match="gamma must be positive; got 0"):
        weightings.create("min-snr", gamma=0)


def test_the_floor_of_the_data_target_bounds_its_weight() -> None:
    """The loss of JiT is that of v = (x - z) / max(1 - t, 0.05); a floor of 0 is none."""
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    c, data = interpolants.create("linear").coefficients(t), targets.create("data")
    for floor, smallest in ((None, 0.25), (0.05, 0.05)):
        r = weightings.create("velocity", floor=floor).weight(c, data)
        torch.testing.assert_close(r, (1 - t).clamp_min(smallest) ** -2, rtol=1e-12, atol=0)
    assert weightings.create("velocity", floor=0).weight(c, data)[-1] == float("inf")
    # The alpha of a noise prediction, which has no floor by default.
    r = weightings.create("velocity", floor=0.1).weight(c, targets.create("noise"))
    torch.testing.assert_close(r, t.clamp_min(0.1) ** -2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("weighting", weightings.names())
def test_a_floor_changes_no_weight_inside_and_is_no_negative_number(weighting: str) -> None:
    t = torch.linspace(0.06, 0.94, 89, dtype=torch.float64)
    c = interpolants.create("linear").coefficients(t)
    for target in map(targets.create, targets.names()):
        free, floored = (weightings.create(weighting, floor=floor).weight(c, target) for floor in (0, 0.05))
        assert torch.equal(free, floored)
    with pytest.raises(UserError, match="floor must be at least 0; got -0.1"):
        weightings.create(weighting, floor=-0.1)
