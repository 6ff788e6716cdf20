"""The laws of sampling: guidance, samplers, and the marginals that every part of a solve must keep."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from sitkit.registry import interpolants, samplers
from sitkit.runtime.errors import UserError
from sitkit.runtime.rng import sample_keys
from sitkit.solvers.brownian import path_on
from sitkit.solvers.guidance import Guidance
from sitkit.solvers.ode import AdaptiveODE
from sitkit.solvers.sampler import Sampler, SolveSpec
from sitkit.testing.law import NotShown, close, law, lawful, not_shown_if_refused
from sitkit.testing.truth import MEAN, STD, GaussianAverage, gaussian_field, gaussian_moments
from sitkit.transport.diffusion import Diffusion, Sigma
from sitkit.transport.field import Counted, Field
from sitkit.transport.interpolant import Interpolant
from sitkit.transport.target import Target, Velocity
from sitkit.transport.timestep import Timestep

# The interval on which orders are measured.  It keeps away from the ends, where coefficients may be singular, and it is not
# symmetric: over the whole of [0, 1] the leading error of the midpoint rule on `linear` happens to cancel.
MIDDLE = 0.1, 0.8
# Orders are whole numbers; measured at a finite step they are off by up to a quarter.
ORDER_TOLERANCE = 0.25
ROUNDING_TOLERANCE = 1e-12


@lawful(Guidance)
def branches(guidance: Guidance) -> None:
    """Equal branches stay as they are, shape and dtype are kept, and `evaluations` is the number of calls."""
    num_classes = 4
    with not_shown_if_refused():
        guidance.guide(lambda x, t, y: x, num_classes)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 2, 2, generator=generator, dtype=torch.float64)
    same = torch.randn(3, 2, 2, generator=generator, dtype=torch.float64)
    y = torch.arange(5) % num_classes

    def constant(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return same.expand_as(x)

    for time in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        counted = Counted(constant, len(x))
        t = torch.full((5,), time, dtype=torch.float64)
        guided = guidance.guide(counted, num_classes)(x, t, y)
        who = f"{guidance.name} at t = {time:g}"
        law(guided.shape == x.shape and guided.dtype == x.dtype, f"{who}: of x's shape and dtype")
        close(guided, constant(x, t, y), 1e-12, f"{who}: equal branches stay as they are (weights sum to one)")
        planned = guidance.evaluations(time)
        spent = counted.rows / len(x)
        law(spent == planned, f"{who}: {planned} evaluations for each sample, as it says; it spent {spent:g}")


def _field_of(sampler: Sampler, path: str = "linear") -> Field:
    """Return the Gaussian's field, of one time or of the two that the sampler needs; NotShown if it takes neither."""
    interpolant = interpolants.create(path)
    field = gaussian_field(interpolant, Velocity())
    reasons = []
    for known in (field, Field(GaussianAverage(interpolant), interpolant, Velocity())):
        try:
            sampler.sample(known, _noise(1), seeds=[0])
        except UserError as error:
            reasons.append(str(error))
        else:
            return known
    raise NotShown(reasons[0])


@lawful(Sampler)
def cost(sampler: Sampler) -> None:
    """The NFE is the number of evaluations spent and planned; the planned grid is the grid of the solve."""
    field = _field_of(sampler)
    counted = Counted(field.network, 6)
    planned = sampler.plan(SolveSpec(field.interpolant, field.target))
    result = sampler.sample(field.through(counted), _noise(6), seeds=range(6))
    who, spent = sampler.name, counted.rows // 6
    law(counted.rows % 6 == 0, f"{who}: whole batches are evaluated")
    law(result.nfe == spent, f"{who}: NFE is the number of evaluations, {spent}; it says {result.nfe}")
    law(planned.nfe in (None, result.nfe), f"{who}: the plan foretells the NFE; {planned.nfe}, not {result.nfe}")
    law(torch.equal(planned.times, result.times), f"{who}: the planned grid is the grid of the solve")


@lawful(Sampler)
def ownership(sampler: Sampler) -> None:
    """A sample depends on its seed, not on its batch or on torch's generator; it has the noise's shape and dtype."""
    field, who = _field_of(sampler), sampler.name
    noise, keys = _noise(7), sample_keys(0, torch.arange(7))
    state = torch.random.get_rng_state()
    whole = sampler.sample(field, noise, seeds=keys).x
    untouched = torch.equal(state, torch.random.get_rng_state())
    law(untouched, f"{who}: with seeds given, torch's generator is left alone")
    torch.rand(3)
    law(torch.equal(whole, sampler.sample(field, noise, seeds=keys).x), f"{who}: equal seeds, equal samples")
    torch.random.set_rng_state(state)
    # The steps of an adaptive solver are those of the worst sample in the batch, so samples agree within its tolerance;
    # others within a thousand roundings (the processor's vector and scalar functions differ in the last bit).
    adaptive = isinstance(sampler, AdaptiveODE)
    tolerance = 100 * (sampler.rtol + sampler.atol) if adaptive else 1e-12
    for rows in ([3], [6, 0, 3]):
        part = sampler.sample(field, noise[rows], seeds=keys[rows]).x
        close(part, whole[rows], tolerance, f"{who}: a sample does not depend on its batch")
    if sampler.stochastic:
        others = sampler.sample(field, noise, seeds=sample_keys(1, torch.arange(7))).x
        law((others != whole).any(1), f"{who}: other seeds, other samples")
    for shape, dtype in (((2, 3, 4, 5), torch.float32), ((2, 1), torch.float64)):
        x = sampler.sample(field, torch.zeros(shape, dtype=dtype), seeds=[1, 2]).x
        law(x.shape == shape and x.dtype == dtype, f"{who}: samples have the noise's shape and dtype")


@lawful(Sampler)
def trajectory(sampler: Sampler) -> None:
    """A trajectory is kept on request, starts at the noise and ends at the samples."""
    field, noise, who = _field_of(sampler), _noise(3), sampler.name
    alone = sampler.sample(field, noise, seeds=[1, 2, 3])
    kept = sampler.sample(field, noise, seeds=[1, 2, 3], trajectory=True)
    law(alone.trajectory is None, f"{who}: only the end state is kept without a request for the trajectory")
    states = kept.trajectory
    if states is None:
        raise AssertionError(f"{who}: the trajectory is kept on request")
    last = sampler.plan(SolveSpec(field.interpolant, field.target)).last_step > 0
    law(len(states) == len(kept.times) + last, f"{who}: a state for each time, and one for the last step")
    law(states[0] == noise, f"{who}: a trajectory starts at the noise")
    law(states[-1] == kept.x, f"{who}: a trajectory ends at the samples")
    close(kept.x, alone.x, 1e-12, f"{who}: a kept trajectory changes nothing")


@lawful(Sampler)
def marginals(sampler: Sampler) -> None:
    """With an exact network the samples have the mean and the standard deviation of the data."""
    _check_marginals(sampler, _field_of(sampler))


@lawful(Sampler)
def order(sampler: Sampler) -> None:
    """Halving the step divides the error by 2^order, within a quarter of an order, unless there is no error.

    Adaptive samplers: a smaller tolerance gives a smaller error.  A sampler that is exact at eight steps (to 1e-12, some
    thousand roundings) has no error to divide.  Deterministic samplers: the strong error against the exact flow of the
    Gaussian.  Stochastic samplers: the weak error of the mean and the variance over [0.1, 0.8] without a last step, with
    w = sigma if the sampler takes a w.
    """
    # On `linear` the midpoint rule happens to have order 3 for a Gaussian.
    field, who = _field_of(sampler, "gvp"), sampler.name
    if isinstance(sampler, AdaptiveODE):
        loose, tight = (flow_error(dataclasses.replace(sampler, rtol=r, atol=r), field) for r in (1e-3, 1e-8))
        right = tight < 1e-6 and tight < loose / 100
        law(right, f"{who}: the error follows the tolerance; {loose:.2g}, {tight:.2g}")
        return
    has_steps = any(f.name == "steps" for f in dataclasses.fields(sampler))
    law(has_steps, f"{who}: a sampler of fixed steps has a field `steps`")
    if not sampler.stochastic and flow_error(over_the_middle(sampler, 8), field) < ROUNDING_TOLERANCE:
        return
    observed = observed_order(sampler, field)
    right = abs(observed - sampler.order) <= ORDER_TOLERANCE
    law(right, f"{who}: declares order {sampler.order}, shows {observed:.2f}")


@lawful(Interpolant)
def marginals_along_the_path(interpolant: Interpolant) -> None:
    """With an exact network the samples of an ODE and an SDE on this path have the moments of the data."""
    for name in ("heun", "euler-maruyama"):
        _check_marginals(samplers.create(name, steps=60), gaussian_field(interpolant, Velocity()))


@lawful(Target)
def marginals_of_readings(target: Target) -> None:
    """With an exact network that predicts this target the samples have the moments of the data."""
    field = gaussian_field(interpolants.create("linear"), target)
    for name in ("heun", "euler-maruyama"):
        _check_marginals(samplers.create(name, steps=60), field)


@lawful(Diffusion)
def marginals_under_noise(diffusion: Diffusion) -> None:
    """With an exact network the samples of an SDE with this w have the moments of the data."""
    sampler = samplers.create("euler-maruyama", steps=60, last_step="tweedie")
    _check_marginals(sampler, gaussian_field(interpolants.create("linear"), Velocity()), diffusion)


@lawful(Timestep)
def marginals_on_the_grid(timestep: Timestep) -> None:
    """With an exact network the samples of an ODE on this grid have the moments of the data."""
    with not_shown_if_refused():
        sampler = samplers.create("heun", grid=timestep)
    _check_marginals(sampler, gaussian_field(interpolants.create("linear"), Velocity()))


def _noise(rows: int, columns: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _check_marginals(sampler: Sampler, field: Field, diffusion: Diffusion | None = None) -> None:
    with not_shown_if_refused():
        sampler.plan(SolveSpec(field.interpolant, field.target, diffusion))
    x = sampler.sample(field, _noise(500, 8), diffusion=diffusion, seeds=range(500)).x
    # 4,000 numbers: standard errors 0.3 / 63 = 0.005 of the mean and 0.3 / 89 = 0.003 of the deviation; the rest of the
    # tolerance is for a coarse default.
    for moment, ours, truth in (("mean", x.mean(), MEAN), ("standard deviation", x.std(), STD)):
        message = f"{sampler.name}: samples of N({MEAN}, {STD}^2) have its {moment}; it is {float(ours):.4f}"
        law((ours - truth).abs() <= 0.05, message)


def observed_order(sampler: Sampler, field: Field) -> float:
    """Return log2 of the ratio of the errors at n and 2 n steps.

    If the result is not the declared order, 4 n and 8 n steps decide: an order is a limit, and at few steps the leading
    terms of the error may cancel.

    Args:
        sampler: a sampler of fixed steps.
        field: the field of a Gaussian, as `gaussian_field` makes it.

    Returns:
        The order of the strong error for a deterministic sampler, of the weak error for a stochastic one.
    """
    # A method of high order reaches rounding errors soon; a method of low order shows its order at small steps alone.
    steps = 32 if sampler.stochastic else max(8, 256 >> sampler.order)

    def error(steps: int) -> float:
        if sampler.stochastic:
            return weak_error(sampler, field, steps)
        return flow_error(over_the_middle(sampler, steps), field)

    observed = math.log2(error(steps) / error(2 * steps))
    if abs(observed - sampler.order) > ORDER_TOLERANCE:
        observed = math.log2(error(4 * steps) / error(8 * steps))
    return observed


def over_the_middle(sampler: Sampler, steps: int) -> Sampler:
    """Return the sampler restricted to the interval `MIDDLE`, without a last step.

    Args:
        sampler: a sampler of fixed steps.
        steps: the number of steps over `MIDDLE`.

    Returns:
        A sampler of the same class, `partial`.
    """
    values: dict[str, Any] = {"steps": steps, "t0": MIDDLE[0], "t1": MIDDLE[1], "last_step": "none", "partial": True}
    known = {f.name for f in dataclasses.fields(sampler)}
    return dataclasses.replace(sampler, **{k: v for k, v in values.items() if k in known})


def flow_error(sampler: Sampler, field: Field) -> float:
    """Return the largest error of the end state against the exact flow, along which (x_t - alpha mean) / std(x_t) is constant.

    Args:
        sampler: a deterministic sampler.
        field: the field of a Gaussian, as `gaussian_field` makes it.

    Returns:
        The largest error over 64 starts.
    """
    noise = _noise(64, 1)
    result = sampler.sample(field, noise, seeds=range(64))
    start, end = (gaussian_moments(field.interpolant, float(t)) for t in result.times[[0, -1]])
    truth = end[0] + end[1] * (noise - start[0]) / start[1]
    return float((result.x - truth).abs().max())


def weak_error(sampler: Sampler, field: Field, steps: int) -> float:
    """Return the error of the variance of the end state, without sampling error.

    The field of a Gaussian is affine in x, so the end state is affine in the start and in the increments of the sample's
    own Brownian path: x = b + a x_0 + sum_k c_k (W_{k+1} - W_k).  A few more rows than steps determine a and c, and the
    variance is a^2 var(x_0) + sum_k c_k^2 h_k.

    Args:
        sampler: a stochastic sampler; its w is sigma if it takes one.
        field: the field of a Gaussian, as `gaussian_field` makes it.
        steps: the number of steps over `MIDDLE`.

    Returns:
        |variance - exact variance|.
    """
    rows = steps + 20
    start, end = (gaussian_moments(field.interpolant, t) for t in MIDDLE)
    noise, keys = _noise(rows, 1), sample_keys(0, torch.arange(rows))
    middle, diffusion = over_the_middle(sampler, steps), Sigma()
    try:
        middle.plan(SolveSpec(field.interpolant, field.target, diffusion))
    except UserError:
        diffusion = None
    result = middle.sample(field, noise, diffusion=diffusion, seeds=keys)
    path = path_on(keys, noise, result.times)
    increments = torch.cat([path(t) for t in result.times.tolist()], 1).diff()
    regressors = torch.cat((torch.ones_like(noise), noise, increments), 1)
    weights = torch.linalg.lstsq(regressors, result.x).solution
    message = f"{sampler.name}: the increments of the sample's own path alone move it"
    close(regressors @ weights, result.x, 1e-9, message)
    variance = weights[1].square() * start[1] ** 2 + weights[2:, 0].square() @ result.times.diff()
    return abs(float(variance) - end[1] ** 2)
