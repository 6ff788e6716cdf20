"""Diffusion coefficients: the laws, the forms by hand, w_kl, and the limits of kl-eta."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sitkit.registry import diffusions, interpolants
from sitkit.runtime.errors import UserError
from sitkit.testing import inner_times, obey
from sitkit.transport.diffusion import KLEta, w_kl

LOSSES = ((0.0, 4.0), (0.5, 1.0), (1.0, 2.0))


def create(name: str, **fields: float) -> object:
    return diffusions.create(name, **({"losses": LOSSES} if name == "kl-eta" else {}), **fields)


@pytest.mark.parametrize("name", diffusions.names())
def test_laws(name: str) -> None:
    for norm in (1.0, 0.3):
        component = create(name, norm=norm)
        obey(component)  # pyright: ignore[reportArgumentType]


@given(st.floats(0, 1), st.sampled_from(interpolants.names()))
def test_forms_by_hand(t: float, path: str) -> None:
    time = torch.tensor(t, dtype=torch.float64)
    c = interpolants.create(path).coefficients(time)
    table = {
        "zero": 0.0,
        "constant": 2.0,
        "sigma": 2 * float(c.sigma),
        "linear": 2 * (1 - t),
        "decreasing": 2 * (math.cos(math.pi * t) + 1) ** 2 / 4,
        "increasing-decreasing": 2 * math.sin(math.pi * t) ** 2,
        "sin2": 2 * math.sin(math.pi * t) ** 2,
    }
    for name, expected in table.items():
        assert float(diffusions.create(name, norm=2).w(time, c)) == pytest.approx(expected, abs=1e-14)


def test_w_kl_by_hand() -> None:
    """beta(t) for vp-sbdm, 2 (1 - t) / t for linear, pi cot(pi t / 2) for gvp."""
    t = inner_times()
    table = {"vp-sbdm": 0.1 + 19.9 * (1 - t), "linear": 2 * (1 - t) / t, "gvp": math.pi / (math.pi / 2 * t).tan()}
    for path, expected in table.items():
        c = interpolants.create(path).coefficients(t)
        for name in ("kl", "sbdm"):
            torch.testing.assert_close(diffusions.create(name).w(t, c), expected, rtol=1e-12, atol=0)


def test_w_kl_of_vp_is_beta_at_the_very_ends() -> None:
    """Also where sigma = 0, and d_sigma is cut off."""
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    w = w_kl(interpolants.create("vp-sbdm").coefficients(ends))
    torch.testing.assert_close(w, torch.tensor([20.0, 0.1], dtype=torch.float64), rtol=1e-12, atol=0)


def test_kl_eta_limits() -> None:
    for path in ("linear", "gvp"):
        interpolant = interpolants.create(path)
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        w = KLEta(norm=3, eta=0.5, losses=LOSSES).w(ends, interpolant.coefficients(ends))
        # w_kl is infinite at t = 0, where 4 is the loss, and 0 at t = 1.
        assert w.tolist() == pytest.approx([3 * math.sqrt(4 / (2 * 0.5)), 0.0])


@given(st.floats(0.01, 1), st.floats(0.1, 5), st.sampled_from(interpolants.names()))
def test_kl_eta_is_the_papers_equation(t: float, eta: float, path: str) -> None:
    time = torch.tensor(t, dtype=torch.float64)
    c = interpolants.create(path).coefficients(time)
    loss = 4 - 6 * t if t <= 0.5 else 2 * t
    kl = float(w_kl(c))
    expected = kl * math.sqrt(loss / (loss + 2 * eta * kl * kl))
    assert float(KLEta(eta=eta, losses=LOSSES).w(time, c)) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_kl_eta_tends_to_kl_as_eta_vanishes() -> None:
    t = inner_times()
    for path in interpolants.names():
        c = interpolants.create(path).coefficients(t)
        kl = diffusions.create("kl").w(t, c)
        assert torch.allclose(KLEta(eta=0, losses=LOSSES).w(t, c), kl, rtol=1e-13, atol=0)
        # sqrt(1 / (1 + 2 eta kl^2 / L)) is 1 - eta kl^2 / L to first order; kl is at most 2,000 here and L at least 1.
        assert torch.allclose(KLEta(eta=1e-12, losses=LOSSES).w(t, c), kl, rtol=4e-6, atol=0)


def test_kl_eta_beyond_the_measured_times_holds_the_last_loss() -> None:
    t = torch.tensor([0.0, 0.1, 0.9, 1.0], dtype=torch.float64)
    c = interpolants.create("vp-sbdm").coefficients(t)
    measured = KLEta(losses=((0.1, 4.0), (0.9, 2.0))).w(t, c)
    flat = torch.stack([KLEta(losses=((0.0, v), (1.0, v))).w(t, c) for v in (4.0, 2.0)])
    assert torch.allclose(measured, torch.cat((flat[0, :2], flat[1, 2:])), rtol=1e-14)


def test_kl_eta_without_losses_says_what_it_needs() -> None:
    t = torch.tensor([0.5])
    with pytest.raises(UserError, match="velocity loss L_t"):
        diffusions.create("kl-eta").w(t, interpolants.create("linear").coefficients(t))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("sigma", {"norm": -1}, "norm must be finite and not negative; got -1"),
        ("sigma", {"norm": math.inf}, "norm must be finite"),
        ("kl-eta", {"eta": -1}, "eta must not be negative"),
        ("kl-eta", {"losses": [(0.5, 1.0), (0.1, 1.0)]}, "increasing t"),
        ("kl-eta", {"losses": [(0.5, 0.0)]}, "positive L_t"),
        ("sigm", {}, "Did you mean 'sigma'"),
    ],
)
def test_impossible_fields(name: str, fields: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        diffusions.create(name, **fields)
