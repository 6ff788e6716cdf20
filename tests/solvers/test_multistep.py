"""Multistep solvers: exact steps, exact weights, orders on an exact mixture, and the published formulas by hand."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sitkit.models.exact import Exact
from sitkit.registry import interpolants, samplers, targets
from sitkit.runtime.errors import UserError
from sitkit.runtime.rng import INITIAL, normal, sample_keys
from sitkit.solvers.brownian import path_on
from sitkit.solvers.guidance import ClassifierFree
from sitkit.solvers.multistep import DPMSolver2M, DPMSolver2MSDE, Multistep, UniPC, mean_weights, transition, values
from sitkit.solvers.ode import Dopri8
from sitkit.solvers.sampler import SolveSpec
from sitkit.testing import gaussian_field, weak_error
from sitkit.transport import closed_form
from sitkit.transport.diffusion import KL, Sigma, Zero
from sitkit.transport.field import Counted, Field
from sitkit.transport.timestep import Cosine, Explicit, Uniform

NAMES = ("dpm++-2m", "dpm++-2m-sde", "unipc")
PATHS, PREDICTIONS = interpolants.names(), targets.names()
ODES: tuple[Multistep, ...] = (DPMSolver2M(), UniPC())


def ideal(path: str, target: str = "velocity") -> Field:
    """The exact field of three Gaussians in the plane."""
    interpolant, predicted = interpolants.create(path), targets.create(target)
    return Field(Exact(closed_form.three_gaussians(), interpolant, predicted), interpolant, predicted)


def start(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    keys = sample_keys(seed, torch.arange(n))
    return normal(keys, (2,), INITIAL, torch.float64), keys


@cache
def flow(path: str, t0: float, t1: float) -> Tensor:
    """The end of the exact flow from t0: an error near 1e-11, below every error measured against it."""
    sampler = Dopri8(rtol=1e-12, atol=1e-12, t0=t0, t1=t1, partial=True)
    return sampler.sample(ideal(path), start(40)[0]).x


def error(sampler: Multistep, field: Field, path: str) -> float:
    result = dataclasses.replace(sampler, partial=True).sample(field, start(40)[0])
    truth = flow(path, float(result.times[0]), float(result.times[-1]))
    return float((result.x - truth).square().mean().sqrt())


def test_the_names_are_registered() -> None:
    assert {name: samplers[name].order for name in NAMES} == {"dpm++-2m": 2, "dpm++-2m-sde": 2, "unipc": 3}


@pytest.mark.parametrize("target", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sampler", ODES, ids=lambda s: s.name)
def test_order_over_the_whole_interval(sampler: Multistep, path: str, target: str) -> None:
    """From noise to sigma = 0 on the default grid.

    Measured from 32 to 64 steps, the same for every target: 2m 2.07, 2.06, 2.09 on linear, gvp, vp-sbdm; unipc 3.03,
    2.98, 3.08.  (In lambda on the uniform grid 2m shows 1.2, 1.9, 1.8 and then 1.4, 0.9, 2.2.)
    """
    field = ideal(path, target)
    errors = [error(dataclasses.replace(sampler, steps=n), field, path) for n in (32, 64)]
    assert errors[-1] < 1e-3
    assert math.log2(errors[0] / errors[1]) == pytest.approx(sampler.order, abs=0.25)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sampler", ODES, ids=lambda s: s.name)
def test_order_in_lambda_away_from_the_ends(sampler: Multistep, path: str) -> None:
    """Measured: 2m 2.07, 2.09, 2.07 on linear, gvp, vp-sbdm; unipc 2.93, 2.94, 3.10 (32 to 64)."""
    chosen = dataclasses.replace(sampler, variable="lambda", grid=Cosine(), t0=0.05, t1=0.95)
    errors = [error(dataclasses.replace(chosen, steps=n), ideal(path), path) for n in (32, 64)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(sampler.order, abs=0.25)


@pytest.mark.parametrize("variable", ["t", "lambda"])
@pytest.mark.parametrize("target", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_weak_order_of_the_sde(path: str, target: str, variable: str) -> None:
    """The variance of a Gaussian, without sampling error.  Measured: 1.95 to 2.02."""
    sampler = samplers.create("dpm++-2m-sde", variable=variable)
    field = gaussian_field(interpolants.create(path), targets.create(target))
    coarse, fine = (weak_error(sampler, field, n) for n in (32, 64))
    assert math.log2(coarse / fine) == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", NAMES)
def test_samples_have_the_law_of_the_data(name: str, path: str) -> None:
    noise, keys = start(2000)
    x = samplers.create(name).sample(ideal(path), noise, seeds=keys).x
    mean, covariance = closed_form.moments(closed_form.three_gaussians())
    # Largest variance 0.4: four standard errors are 4 sqrt(0.4 / 2000) = 0.057 of a mean and 4 sqrt(2 / 2000) 0.4 = 0.05.
    assert (x.mean(0) - mean).abs().max() < 0.057
    assert (x.T.cov() - covariance).abs().max() < 0.05


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("path", PATHS)
def test_a_step_is_exact_for_known_data(path: str, tau: float) -> None:
    """alpha_0 d + sigma_0 z becomes alpha_1 d + sigma_1 z' in law, and two steps equal a single step, both ends included."""
    interpolant = interpolants.create(path)
    times = (0.0, 0.3, 0.9, 1.0)
    for t0, t1 in pairwise(times):
        (a0, s0), (a1, s1) = values(interpolant, t0), values(interpolant, t1)
        step = transition(interpolant, t0, t1, tau)
        # A handful of roundings of numbers at most 1.
        assert step.keep * a0 + step.gain == pytest.approx(a1, abs=1e-14)
        assert (step.keep * s0) ** 2 + step.noise**2 == pytest.approx(s1**2, abs=1e-14)
    first, second, both = (transition(interpolant, *ends, tau) for ends in ((0.0, 0.3), (0.3, 0.9), (0.0, 0.9)))
    assert second.keep * first.keep == pytest.approx(both.keep, abs=1e-14)
    assert second.keep * first.gain + second.gain == pytest.approx(both.gain, abs=1e-14)
    assert (second.keep * first.noise) ** 2 + second.noise**2 == pytest.approx(both.noise**2, abs=1e-14)


@pytest.mark.parametrize(("t0", "t1"), [(0.0, 0.2), (0.3, 0.35), (0.9, 0.96), (0.98, 0.99)])
def test_weights_of_a_line_in_closed_form(t0: float, t1: float) -> None:
    """On `linear` rho = t / (1 - t), so int t d rho = [1 / (1 - t) + log(1 - t)]; D = t has the mean that the weights give."""
    integral = 1 / (1 - t1) + math.log(1 - t1) - 1 / (1 - t0) - math.log(1 - t0)
    mean = integral / (t1 / (1 - t1) - t0 / (1 - t0))
    nodes = [t0, t0 - 0.07]
    weights = mean_weights(interpolants.create("linear"), t1, nodes)
    assert sum(weights) == pytest.approx(1, abs=1e-14)
    # Roundings of 1e-16 divided by the step's 1 - k, at least 0.2.
    assert sum(w * t for w, t in zip(weights, nodes, strict=True)) == pytest.approx(mean, abs=1e-13)


@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize("path", PATHS)
def test_weights_are_exact_for_every_polynomial(path: str, tau: float) -> None:
    """Against the trapezoid with 200,001 times: its error h^2 / 12 f'' is below 1e-10."""
    interpolant, t0, t1 = interpolants.create(path), 0.5, 0.6
    t = torch.linspace(t0, t1, 200_001, dtype=torch.float64)
    c = interpolant.coefficients(t)
    measure = (c.alpha / c.sigma) ** (1 + tau)
    nodes = [t0, t1, 0.41]
    weights = mean_weights(interpolant, t1, nodes, tau=tau)
    for degree in range(3):
        truth = float(torch.trapezoid(t**degree, measure) / (measure[-1] - measure[0]))
        mean = sum(w * node**degree for w, node in zip(weights, nodes, strict=True))
        assert mean == pytest.approx(truth, abs=1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_at_the_data_end_all_the_weight_is_at_the_end(path: str) -> None:
    """rho is infinite at sigma = 0: mean(D) is D there, extrapolated in t, the newest reading in lambda."""
    interpolant = interpolants.create(path)
    assert mean_weights(interpolant, 1.0, [0.9, 0.8]) == pytest.approx([2.0, -1.0], abs=1e-12)
    assert mean_weights(interpolant, 1.0, [0.9, 0.8], variable="lambda") == [1.0, 0.0]


def lambdas(field: Field, times: Tensor) -> tuple[list[float], list[float], list[float]]:
    pairs = [values(field.interpolant, t) for t in times.tolist()]
    alphas, sigmas = (list(each) for each in zip(*pairs, strict=True))
    return alphas, sigmas, [math.log(a / s) if s > 0 else math.inf for a, s in pairs]


def denoiser(field: Field, x: Tensor, t: Tensor) -> Tensor:
    return field.read(x, t).data


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_2m_in_lambda_is_the_published_solver(eta: float) -> None:
    """The formulas of Lu et al. in h and exp, first and last step of first order; vp-sbdm's lambda is finite at t = 0."""
    field, (x, keys) = ideal("vp-sbdm"), start(20)
    # With 12 steps the samples are off, and a plan without `partial` is refused.
    sampler = DPMSolver2MSDE(steps=12, variable="lambda", grid=Uniform(), partial=True)
    result = sampler.sample(field, x, diffusion=KL(eta), seeds=keys)
    alphas, sigmas, lams = lambdas(field, result.times)
    path = path_on(keys, x, result.times)
    walked = [path(t) for t in result.times.tolist()]
    old = None
    for i in range(12):
        data = denoiser(field, x, result.times[i])
        h = lams[i + 1] - lams[i]
        if i == 11:
            x = data
            break
        shrink = 1 - math.exp(-h - eta * h)
        moved = sigmas[i + 1] / sigmas[i] * math.exp(-eta * h) * x + alphas[i + 1] * shrink * data
        if old is not None:
            moved = moved + alphas[i + 1] * shrink * h / (2 * (lams[i] - lams[i - 1])) * (data - old)
        xi = (walked[i + 1] - walked[i]) / (result.times[i + 1] - result.times[i]).sqrt()
        x, old = moved + sigmas[i + 1] * math.sqrt(1 - math.exp(-2 * eta * h)) * xi, data
    # 12 steps of a handful of roundings each, magnified by the flow's own sensitivity.
    torch.testing.assert_close(result.x, x, rtol=0, atol=1e-12)


def test_unipc_in_lambda_is_the_published_solver() -> None:
    """UniPC-2 with B(h) = e^h - 1 for data prediction (hh = -h), one half for a single unknown, as in Zhao et al."""
    field, (x, _) = ideal("vp-sbdm"), start(20)
    result = UniPC(steps=12, variable="lambda", grid=Uniform()).sample(field, x)
    alphas, sigmas, lams = lambdas(field, result.times)
    data: list[Tensor] = []
    base = x

    def residual(i: int, base: Tensor, extra: list[tuple[float, Tensor]]) -> Tensor:
        """The step from i to i + 1 with the differences (D_r - D_i) / r at r of the step, by the paper's linear system."""
        hh = -(lams[i + 1] - lams[i])
        b_h = math.expm1(hh)
        phi_1 = math.expm1(hh) / hh
        phi_2 = (phi_1 - 1) / hh
        phi_3 = (phi_2 - 0.5) / hh
        if len(extra) == 1:
            rhos = [0.5]
        else:
            r = torch.tensor([[1.0, 1.0], [extra[0][0], extra[1][0]]], dtype=torch.float64)
            b = torch.tensor([phi_2 * hh / b_h, 2 * phi_3 * hh / b_h], dtype=torch.float64)
            rhos = torch.linalg.solve(r, b).tolist()
        plain = sigmas[i + 1] / sigmas[i] * base - alphas[i + 1] * b_h * data[i]
        return plain - alphas[i + 1] * b_h * sum(
            (rho * (d - data[i]) / r for rho, (r, d) in zip(rhos, extra, strict=True)), torch.zeros_like(base)
        )

    for i in range(12):
        now = denoiser(field, x, result.times[i])
        if i > 0:
            behind = [((lams[i - 2] - lams[i - 1]) / (lams[i] - lams[i - 1]), data[i - 2])] if i > 1 else []
            x = residual(i - 1, base, [*behind, (1.0, now)])
        data.append(now)
        base = x
        if i == 11:
            x = now
        else:
            behind = [((lams[i - 1] - lams[i]) / (lams[i + 1] - lams[i]), data[i - 1])] if i > 0 else []
            x = (
                residual(i, base, behind)
                if behind
                else sigmas[i + 1] / sigmas[i] * base + alphas[i + 1] * (1 - math.exp(lams[i] - lams[i + 1])) * now
            )
    # phi_3 loses 1e-16 / h^3 with h near 1/2 and above, so ten roundings a step.
    torch.testing.assert_close(result.x, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("variable", ["t", "lambda"])
def test_no_diffusion_is_the_ode(path: str, variable: str) -> None:
    noise, keys = start(5)
    sde, ode = (samplers.create(name, variable=variable, steps=7) for name in ("dpm++-2m-sde", "dpm++-2m"))
    ours = sde.sample(ideal(path), noise, diffusion=KL(0.0), seeds=keys).x
    assert torch.equal(ours, ode.sample(ideal(path), noise).x)


@pytest.mark.parametrize("path", PATHS)
def test_a_finer_grid_refines_the_same_path(path: str) -> None:
    """Strong order 1: the distance to the grid of half the step halves; another seed's end is far away."""
    noise, keys = start(100)
    field = gaussian_field(interpolants.create(path), targets.create("velocity"))

    def end(steps: int, keys: Tensor) -> Tensor:
        return samplers.create("dpm++-2m-sde", steps=steps).sample(field, noise, seeds=keys).x

    ends = [end(n, keys) for n in (16, 32, 64, 128)]
    gaps = [float((a - b).square().mean().sqrt()) for a, b in pairwise(ends)]
    # Measured: 2.1e-2, 8.8e-3, 3.9e-3 (linear); 2.5e-2, 8.8e-3, 3.9e-3 (gvp); 4.0e-2, 1.4e-2, 6.0e-3 (vp-sbdm).
    assert all(near < 0.6 * far for far, near in pairwise(gaps))
    assert gaps[-1] < 0.05 * (end(128, sample_keys(1, torch.arange(100))) - ends[-1]).square().mean().sqrt()


@pytest.mark.parametrize("name", NAMES)
def test_the_target_does_not_matter(name: str) -> None:
    """Readings of one field agree, and so do the solves from where every target can be read."""
    for path in PATHS:
        noise, keys = start(6)
        ends = [
            samplers.create(name, t0=0.01, steps=20).sample(ideal(path, target), noise, seeds=keys).x
            for target in PREDICTIONS
        ]
        for end in ends[1:]:
            # Readings lose 1 / alpha = 100 of their digits at t0, and 1 / sigma = 400 before the last step.
            torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_one_evaluation_a_step_and_none_at_the_end(name: str) -> None:
    for target in PREDICTIONS:
        field = ideal("linear", target)
        calls = Counted(field.network)
        sampler = samplers.create(name, steps=9)
        noise, keys = start(4)
        result = sampler.sample(field.through(calls), noise, seeds=keys)
        assert calls.rows == 4 * 9
        assert result.nfe == sampler.plan(SolveSpec(field.interpolant, field.target)).nfe == 9
        assert float(result.times[-1]) == 1.0


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.25, 0.75), (0.5, 0.5), (0.15, 0.55), (0.7, 0.9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_guided_evaluations_are_those_planned(name: str, dtype: torch.dtype, interval: tuple[float, float]) -> None:
    """Also where an end of the interval is a time of the grid, for every precision of the state."""
    field = ideal("gvp")
    guidance = ClassifierFree(2.0, interval)
    sampler = samplers.create(name, steps=20, grid=Uniform(), partial=True)

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return field.network(x, t, torch.zeros_like(y))

    calls = Counted(network)
    noise = start(3)[0].to(dtype)
    result = sampler.sample(field.through(calls), noise, 0, guidance=guidance, seeds=range(3))
    inside = sum(interval[0] - 1e-9 <= i / 20 <= interval[1] + 1e-9 for i in range(20))
    assert calls.rows == 3 * (20 + inside)
    assert result.nfe == sampler.plan(SolveSpec(field.interpolant, field.target, None, guidance)).nfe == 20 + inside


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    noise, keys = start(9)
    whole = samplers.create(name, steps=6).sample(ideal("linear"), noise, seeds=keys).x
    part = samplers.create(name, steps=6).sample(ideal("linear"), noise[[7, 2]], seeds=keys[[7, 2]]).x
    # Vector and scalar functions of the processor differ in the last bit.
    torch.testing.assert_close(part, whole[[7, 2]], rtol=0, atol=1e-13)


def test_what_cannot_be_integrated_is_refused() -> None:
    linear, velocity = interpolants.create("linear"), targets.create("velocity")
    for w in (Sigma(), Zero()):
        with pytest.raises(UserError, match=rf"'dpm\+\+-2m-sde' takes exact steps .* not of diffusion '{w.name}'"):
            DPMSolver2MSDE().plan(SolveSpec(linear, velocity, w))
    for sampler in ODES:
        with pytest.raises(UserError, match="solves the ODE"):
            sampler.plan(SolveSpec(linear, velocity, KL()))
        with pytest.raises(UserError, match="cannot be read from a noise prediction at t = 0"):
            dataclasses.replace(sampler, t0=0.0).plan(SolveSpec(linear, targets.create("noise")))
        with pytest.raises(UserError, match="step 1 of this grid is 98 times as long"):
            dataclasses.replace(sampler, steps=2, grid=Explicit((0.0, 0.01, 0.99))).plan(SolveSpec(linear, velocity))
    with pytest.raises(UserError, match="at least 1"):
        samplers.create("unipc", steps=0)
    with pytest.raises(UserError, match="variable"):
        samplers.create("unipc", variable="sigma")


@pytest.mark.parametrize("name", NAMES)
def test_coarse_and_uneven_grids_stay_finite(name: str) -> None:
    """One step, a step 19 times as long as the step before, and every interpolant and target, in both variables."""
    noise, keys = start(3)
    times = (0.02, 0.06, 0.82, 0.999999, 1.0)
    for path in PATHS:
        for target in PREDICTIONS:
            for fields in ({"steps": 1}, {"steps": 4, "grid": Explicit(times)}):
                for variable in ("t", "lambda"):
                    sampler = samplers.create(name, variable=variable, **fields)
                    assert sampler.sample(ideal(path, target), noise, seeds=keys).x.abs().max() < 10
