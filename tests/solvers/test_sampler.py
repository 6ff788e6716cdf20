"""Samplers: the laws of every registered name, the cost, a hand-written loop, and every combination of components."""

from __future__ import annotations

import re
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sitkit.registry import diffusions, guidances, interpolants, samplers, targets
from sitkit.runtime import rng as draws
from sitkit.runtime.errors import UserError
from sitkit.runtime.rng import sample_keys
from sitkit.solvers.brownian import BrownianPath
from sitkit.solvers.guidance import ClassifierFree
from sitkit.solvers.sampler import SolveSpec, with_user_ends
from sitkit.testing import (
    MEAN,
    ORDER_TOLERANCE,
    STD,
    gaussian_field,
    gaussian_moments,
    gaussian_network,
    obey,
    observed_order,
)
from sitkit.testing.certify import certify
from sitkit.transport.field import Counted, Field
from sitkit.transport.interval import Interval

SAMPLERS = samplers.names()
ODES = [name for name in SAMPLERS if not samplers[name].stochastic]
SDES = [name for name in SAMPLERS if samplers[name].stochastic]
# The steps of an adaptive solver depend on its batch, within the tolerance that the laws check.
FIXED = [name for name in SAMPLERS if any(f.name == "steps" for f in fields(samplers[name]))]


def start(rows: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def field(path: str = "linear", name: str = "velocity") -> Field:
    return gaussian_field(interpolants.create(path), targets.create(name))


@pytest.mark.parametrize("name", SAMPLERS)
def test_laws(name: str) -> None:
    obey(samplers.create(name), "cost", "ownership", "trajectory", "marginals")


# On `linear` the leading error of the midpoint rule vanishes for a Gaussian (its variance is quadratic in t): order 3.
@pytest.mark.parametrize("path", ["gvp", "vp-sbdm"])
@pytest.mark.parametrize("name", FIXED)
def test_order_of_convergence(name: str, path: str) -> None:
    sampler = samplers.create(name)
    assert observed_order(sampler, field(path)) == pytest.approx(sampler.order, abs=ORDER_TOLERANCE)


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - set(FIXED)))
def test_the_error_of_an_adaptive_sampler_follows_its_tolerance(name: str) -> None:
    obey(samplers.create(name), "order")


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("path", interpolants.names())
def test_laws_of_cost_and_ownership_on_every_interpolant(path: str, name: str) -> None:
    for target in targets.names():
        calls = Counted(field(path, target).network)
        sampler = samplers.create(name)
        planned = sampler.plan(SolveSpec(interpolants.create(path), targets.create(target)))
        result = sampler.sample(field(path, target).through(calls), start(3, 2), seeds=range(3))
        assert calls.rows == 3 * result.nfe and planned.nfe in (None, result.nfe)
        assert bool(result.x.isfinite().all())


LABELLED = 4


def labelled(path: str = "linear") -> Field:
    """The Gaussian field with labels, each of which shifts the prediction."""
    network = gaussian_network(interpolants.create(path), targets.create("velocity"), MEAN, STD)
    shifted = lambda x, t, y: network(x, t, y) + 0.1 * y.reshape(-1, *[1] * (x.ndim - 1))  # noqa: E731
    return Field(shifted, interpolants.create(path), targets.create("velocity"), LABELLED)


@pytest.mark.parametrize(
    ("name", "steps", "expected"),
    [("euler", 250, 250), ("euler-maruyama", 250, 250), ("heun", 125, 250), ("midpoint", 125, 250), ("rk4", 62, 248)],
)
def test_evaluations_as_published(name: str, steps: int, expected: int) -> None:
    sampler: Any = samplers.create(name, steps=steps)
    assert sampler == samplers.create(name), "the defaults are the published 250 evaluations"
    for guidance, times in ((None, 1), (ClassifierFree(), 2), (ClassifierFree(1.0), 1)):
        calls = Counted(labelled().network)
        result = sampler.sample(
            labelled().through(calls), start(2, 1), torch.tensor([0, 3]), guidance=guidance, seeds=[0, 1]
        )
        assert calls.rows / 2 == result.nfe == expected * times


def test_stochastic_heun_spends_two_a_step_and_one_last() -> None:
    assert samplers.create("stochastic-heun").sample(field(), start(2, 1), seeds=[0, 1]).nfe == 124 * 2 + 1
    assert (
        samplers.create("stochastic-heun", last_step="none").plan(SolveSpec(*PLAIN, diffusions.create("sigma"))).nfe
        == 125 * 2
    )


PLAIN = interpolants.create("linear"), targets.create("velocity")


@pytest.mark.parametrize("guidance", guidances.names())
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_and_guidance_counts_what_it_spends(name: str, guidance: str) -> None:
    form: Any
    for interval in ({}, {"interval": (0.31, 0.69)}):
        try:
            form = guidances.create(guidance, **interval)
            form.guide(labelled().network, LABELLED)
        except UserError:
            assert guidance not in ("none", "cfg") or interval
            continue
        sampler = samplers.create(name)
        calls = Counted(labelled().network)
        result = sampler.sample(
            labelled().through(calls), start(2, 1), torch.tensor([0, 3]), guidance=form, seeds=[0, 1]
        )
        assert calls.rows / 2 == result.nfe
        assert sampler.plan(SolveSpec(*PLAIN, guidance=form)).nfe in (None, result.nfe)


def test_guidance_within_an_interval_by_hand() -> None:
    """Of the times 0, 0.1, ..., 0.9 four lie in [0.25, 0.65]: 14 evaluations; heun's second node makes it 8 of 20."""
    form = ClassifierFree(1.5, interval=(0.25, 0.65))
    for name, expected in (("euler", 10 + 4), ("heun", 20 + 8)):
        sampler = samplers.create(name, steps=10)
        assert sampler.sample(labelled(), start(2, 1), torch.tensor([0, 3]), guidance=form).nfe == expected


def test_torchsde_agrees_with_a_hand_written_loop() -> None:
    """The same Brownian paths, w, grid and last step, twelve lines of arithmetic."""
    n, h = 50, 0.96 / 49
    keys, x = sample_keys(3, torch.arange(5)), start(5, 2, 3)
    form = diffusions.create("increasing-decreasing", norm=2.0)
    sampler = samplers.create("euler-maruyama", steps=n, last_step_size=0.04)
    result = sampler.sample(field("gvp"), x, diffusion=form, seeds=keys)
    path, interpolant = BrownianPath(keys, 6, torch.float64), interpolants.create("gvp")
    before = path(0.0)
    for k in range(n - 1):
        t = torch.tensor(k * h, dtype=torch.float64)
        w = float(form.w(t, interpolant.coefficients(t)))
        reading = field("gvp").read(x, t)
        after = path((k + 1) * h)
        x = x + h * (reading.velocity + w / 2 * reading.score) + w**0.5 * (after - before).view(5, 2, 3)
        before = after
    t = torch.tensor(0.96, dtype=torch.float64)
    w = float(form.w(t, interpolant.coefficients(t)))
    reading = field("gvp").read(x, t)
    x = x + 0.04 * (reading.velocity + w / 2 * reading.score)
    # k h and the times of the grid differ by one rounding; 50 steps of a dozen roundings each: 1e-14 measured.
    torch.testing.assert_close(result.x, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", FIXED)
def test_a_sample_is_the_same_in_batches_of_1_7_and_64(name: str) -> None:
    """With several classes, in float64 and float32: labels, noise and path belong to the sample."""
    sampler = samplers.create(name, steps=8)
    keys, y = sample_keys(0, torch.arange(64)), torch.arange(64) % LABELLED
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        x = draws.normal(keys, (2, 3), draws.INITIAL, dtype)
        samples = [
            torch.cat([
                sampler.sample(labelled(), x[i : i + b], y[i : i + b], guidance=ClassifierFree(1.3), seeds=keys[i : i + b]).x
                for i in range(0, 64, b)
            ])
            for b in (64, 7, 1)
        ]  # fmt: skip
        # All arithmetic is elementwise: only the rounding of vector and scalar instructions may differ.
        for other in samples[1:]:
            torch.testing.assert_close(other, samples[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SDES)
def test_a_finer_grid_refines_the_same_sample(name: str) -> None:
    """Strong convergence: halving the step moves a sample by a fraction of what another path moves it."""
    keys, x = sample_keys(0, torch.arange(200)), start(200, 1)
    coarse, fine = (
        samplers.create(name, steps=steps).sample(field("gvp"), x, seeds=keys).x for steps in (51, 101)
    )  # fmt: skip
    other = samplers.create(name, steps=101).sample(field("gvp"), x, seeds=sample_keys(1, torch.arange(200))).x
    moved, elsewhere = ((fine - against).square().mean().sqrt() for against in (coarse, other))
    assert float(moved) < 0.1 * float(elsewhere)


def test_explicit_grids_are_used_as_they_are() -> None:
    times = [0.0, 0.1, 0.15, 0.6, 0.8, 1.0]
    grid = {"name": "explicit", "times": times}
    for name in ("euler", "heun"):
        result = samplers.create(name, steps=5, grid=grid).sample(field(), start(2, 1), trajectory=True)
        assert result.times.tolist() == times and result.trajectory is not None and len(result.trajectory) == 6
    inside = {"name": "explicit", "times": [0.0, 0.1, 0.15, 0.6, 0.8, 0.96]}
    result = samplers.create("euler-maruyama", steps=6, grid=inside).sample(field(), start(2, 1))
    assert result.times.tolist() == inside["times"] and result.nfe == 6
    with pytest.raises(UserError, match=r"runs over \[0, 1\].*finite only within \[0, 0.96\]"):
        samplers.create("euler-maruyama", steps=6, grid=grid | {"times": [0.0, 0.1, 0.15, 0.6, 0.8, 1.0]}).plan(
            SolveSpec(*PLAIN)
        )


def test_uneven_grids_keep_the_law() -> None:
    for grid, name in product(("shift", "cosine", "logit-normal"), ("euler-maruyama", "stochastic-heun", "rk4")):
        sampler = samplers.create(name, steps=200, grid=grid)
        samples = sampler.sample(field(), start(300, 8), seeds=range(300)).x
        assert (float(samples.mean()), float(samples.std())) == pytest.approx((MEAN, STD), abs=0.05), (grid, name)


@pytest.mark.parametrize("name", SAMPLERS)
def test_given_ends_are_used_or_refused(name: str) -> None:
    given: dict[str, Any] = {"t0": 0.2, "t1": 0.7, "partial": True}
    if "last_step" in {f.name for f in fields(samplers[name])}:
        given["last_step"] = "none"
    sampler = samplers.create(name, **given)
    begin = gaussian_moments(PLAIN[0], 0.2)
    result = sampler.sample(field(), begin[0] + begin[1] * start(300, 8), seeds=range(300))
    assert (float(result.times[0]), float(result.times[-1])) == (0.2, 0.7)
    # 2,400 numbers of standard deviation 0.37: standard errors 0.008 and 0.005, and as much again for the steps.
    assert (float(result.x.mean()), float(result.x.std())) == pytest.approx(gaussian_moments(PLAIN[0], 0.7), abs=0.03)
    singular = samplers.create(name, t0=0.0)
    with pytest.raises(UserError, match="noise prediction at t = 0"):
        singular.plan(SolveSpec(interpolants.create("linear"), targets.create("noise")))


def test_impossible_ends_and_steps() -> None:
    for wrong, message in (
        ({"t0": 0.7, "t1": 0.2}, "needs 0 <= t0 < t1 <= 1"),
        ({"t1": 1.5}, "needs 0 <= t0 < t1 <= 1"),
        ({"steps": -3}, "steps must be at least 1; got -3"),
        ({"stepz": 3}, "Did you mean 'steps'"),
    ):
        with pytest.raises(UserError, match=message):
            samplers.create("heun", **wrong)
    for wrong, message in (
        ({"t1": 0.9}, "t1 is 1 - last_step_size"),
        ({"last_step_size": 1.0}, r"last_step_size must lie in \(0, 1\)"),
        ({"steps": 1}, "steps must be at least 2"),
        ({"last_step": "twedie"}, "last_step"),
    ):
        with pytest.raises(UserError, match=message):
            samplers.create("euler-maruyama", **wrong)
    for wrong in ({"rtol": 0}, {"atol": -1}):
        with pytest.raises(UserError, match="must be positive"):
            samplers.create("dopri5", **wrong)


@pytest.mark.parametrize("name", ODES)
def test_an_ode_solver_refuses_a_w(name: str) -> None:
    with pytest.raises(UserError, match=f"'{re.escape(name)}' solves the ODE, but diffusion 'sigma' makes an SDE"):
        samplers.create(name).plan(SolveSpec(*PLAIN, diffusions.create("sigma")))
    assert samplers.create(name).plan(SolveSpec(*PLAIN, diffusions.create("zero"))).times[-1] == 1


def test_the_papers_margins_by_name() -> None:
    linear, noise = interpolants.create("linear"), targets.create("noise")
    assert samplers.create("heun", clip="paper").plan(SolveSpec(linear, noise)).times[0] == 1e-5
    assert samplers.create("heun", clip="paper").plan(SolveSpec(*PLAIN)).times.tolist()[::125] == [0.0, 1.0]
    assert samplers.create("euler-maruyama", clip="paper").plan(SolveSpec(linear, noise)).times[0] == 1e-3


def test_a_last_step_that_leaves_noise_is_refused_unless_accepted() -> None:
    """On linear the drift multiplies noise of size h by 1 - h / h - w / (2 h): w / 2 remains, for every h."""
    form = diffusions.create("constant", norm=0.8)
    with pytest.raises(UserError, match=r"last_step 'mean' of 0.1.*leaves noise of 0.4 .*accept_bias"):
        samplers.create("euler-maruyama", last_step_size=0.1).plan(SolveSpec(*PLAIN, form))
    accepted = samplers.create("euler-maruyama", last_step_size=0.1, accept_bias=True)
    assert accepted.plan(SolveSpec(*PLAIN, form)).last_step == 0.1


def test_presets_are_their_components() -> None:
    for name, preset in diffusions.presets().items():
        assert diffusions.create(name) == diffusions.create(preset.of, **preset.fields)


@pytest.mark.slow
def test_every_combination_is_right_or_refused_with_its_default_steps(tmp_path: Path) -> None:
    """`test_certify` has the combinations with 64 steps."""
    certificate = certify(interp=[path for path in interpolants.names() if path != "ddpm"], out=tmp_path)
    assert certificate.wrong == []
    assert certificate.count("refused") < len(certificate.verdicts) / 6


def test_the_papers_margin_does_not_pass_a_stable_end() -> None:
    """An explicit step is stable only up to the derived end, so the margin of the paper moves a singular end alone."""
    sampler = samplers.create("euler-maruyama", clip="paper")
    unstable = Interval(0.0, 0.96, "", "a step is unstable after t = 0.96")
    assert with_user_ends(sampler, unstable, paper=1e-3)[:2] == (0.0, 0.96)
    singular = Interval(1e-5, 0.9999, "singular", "singular")
    assert with_user_ends(sampler, singular, paper=1e-3)[:2] == (1e-3, 1 - 1e-3)
