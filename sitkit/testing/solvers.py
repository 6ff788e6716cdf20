"""The laws of sampling: guidance, solvers, and the marginals that every part of a solve must keep."""

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
from sitkit.testing.every_component import check_component
from sitkit.testing.law import NotShown, close, law, lawful
from sitkit.testing.truth import MEAN, STD, Calls, GaussianAverage, gaussian_field, gaussian_moments
from sitkit.transport.diffusion import Diffusion, Sigma
from sitkit.transport.field import Field
from sitkit.transport.interpolant import Interpolant
from sitkit.transport.target import Target, Velocity
from sitkit.transport.timestep import Timestep

# Where orders are measured: away from the ends, at which coefficients may be singular, and not symmetric, for over the
# whole of [0, 1] the leading error of the midpoint rule on `linear` happens to cancel.
MIDDLE = 0.1, 0.8
# Orders are whole numbers; a quarter of one is the noise of measuring them at a finite step.
ORDER_TOLERANCE = 0.25
ROUNDING_TOLERANCE = 1e-12


@lawful(Guidance)
def branches(guidance: Guidance) -> None:
    """Branches that agree stay as they are, shape and dtype are kept, and `evaluations` says what is spent."""
    try:
        guidance.guide(lambda x, t, y: x, 4)
    except UserError as error:
        raise NotShown(str(error)) from None
    _check_branches(guidance, channels=3, num_classes=4)


def check_guidance(guidance: Guidance, *, channels: int = 3, num_classes: int = 4) -> None:
    """Its weights sum to one, it keeps shape and dtype, and `evaluations` says what it spends."""
    check_component(guidance)
    _check_branches(guidance, channels, num_classes)


def _check_branches(guidance: Guidance, channels: int, num_classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, channels, 2, 2, generator=generator, dtype=torch.float64)
    same = torch.randn(channels, 2, 2, generator=generator, dtype=torch.float64)
    y = torch.arange(5) % num_classes

    def constant(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return same.expand_as(x)

    for time in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        calls = Calls(constant)
        t = torch.full((5,), time, dtype=torch.float64)
        guided = guidance.guide(calls, num_classes)(x, t, y)
        who = f"{guidance.name} at t = {time:g}"
        law(guided.shape == x.shape and guided.dtype == x.dtype, f"{who}: of x's shape and dtype")
        close(guided, constant(x, t, y), 1e-12, f"{who}: branches that agree stay as they are (weights sum to one)")
        said = guidance.evaluations(time)
        law(calls.rows == 5 * said, f"{who}: spends what it says, {said} a sample; it spent {calls.rows / 5:g}")


def check_sampler(
    sampler: Sampler,
    interpolant: Interpolant | None = None,
    target: Target | None = None,
    *,
    order: bool = True,
) -> None:
    """Cost, ownership of randomness, shape, dtype, trajectory, law of the samples, and order of convergence.

    The data are N(0.7, 0.3^2) and the network is exact, so what is wrong is the sampler's.  interpolant, target: linear
    and velocity by default.  order False leaves the order out (for a method whose order this field cannot show).
    """
    check_component(sampler)
    path = interpolant if interpolant is not None else interpolants.create("linear")
    field = gaussian_field(path, target if target is not None else Velocity())
    _check_cost(sampler, field)
    _check_ownership(sampler, field)
    _check_trajectory(sampler, field)
    _check_law(sampler, field)
    if order:
        check_order(sampler, field)


def _standard(sampler: Sampler | None = None, path: str = "linear") -> Field:
    """The Gaussian's field, of one time or of the two that the sampler needs; NotShown where it takes neither."""
    interpolant = interpolants.create(path)
    field = gaussian_field(interpolant, Velocity())
    if sampler is None:
        return field
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
    """NFE is what was spent, and what the plan foretold; the grid that is planned is the grid that is used."""
    _check_cost(sampler, _standard(sampler))


@lawful(Sampler)
def ownership(sampler: Sampler) -> None:
    """A sample belongs to its seed: not to its batch, not to torch's generator; its shape and dtype are the noise's."""
    _check_ownership(sampler, _standard(sampler))


@lawful(Sampler)
def trajectory(sampler: Sampler) -> None:
    """A trajectory is kept where it is asked for, starts at the noise and ends at the samples."""
    _check_trajectory(sampler, _standard(sampler))


@lawful(Sampler)
def marginals(sampler: Sampler) -> None:
    """With an exact network the samples have the mean and the spread of the data."""
    _check_law(sampler, _standard(sampler))


@lawful(Sampler)
def order(sampler: Sampler) -> None:
    """Halving the step divides the error by 2^order, within a quarter of an order, unless there is no error."""
    # On `linear` the midpoint rule happens to have order 3 for a Gaussian.
    check_order(sampler, _standard(sampler, "gvp"))


@lawful(Interpolant)
def marginals_along_the_path(interpolant: Interpolant) -> None:
    """With an exact network an ODE's and an SDE's samples on this path have the mean and the spread of the data."""
    for name in ("heun", "euler-maruyama"):
        _check_law_unless_refused(samplers.create(name, steps=60), gaussian_field(interpolant, Velocity()))


@lawful(Target)
def marginals_of_readings(target: Target) -> None:
    """With an exact network the samples read off this prediction have the mean and the spread of the data."""
    for name in ("heun", "euler-maruyama"):
        _check_law_unless_refused(
            samplers.create(name, steps=60), gaussian_field(interpolants.create("linear"), target)
        )


@lawful(Diffusion)
def marginals_under_noise(diffusion: Diffusion) -> None:
    """With an exact network the samples of an SDE with this w have the mean and the spread of the data."""
    chosen = samplers.create("euler-maruyama", steps=60, last_step="tweedie")
    _check_law_unless_refused(chosen, _standard(), diffusion)


@lawful(Timestep)
def marginals_on_the_grid(timestep: Timestep) -> None:
    """With an exact network the samples of an ODE on this grid have the mean and the spread of the data."""
    try:
        sampler = samplers.create("heun", grid=timestep)
    except UserError as error:
        raise NotShown(str(error)) from None
    _check_law_unless_refused(sampler, _standard())


def _check_law_unless_refused(sampler: Sampler, field: Field, diffusion: Diffusion | None = None) -> None:
    try:
        sampler.plan(SolveSpec(field.interpolant, field.target, diffusion))
    except UserError as error:
        raise NotShown(str(error)) from None
    _check_law(sampler, field, diffusion)


def _noise(rows: int, columns: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _check_cost(sampler: Sampler, field: Field) -> None:
    calls = Calls(field.network)
    planned = sampler.plan(SolveSpec(field.interpolant, field.target))
    result = sampler.sample(field.through(calls), _noise(6), seeds=range(6))
    law(calls.rows % 6 == 0, f"{sampler.name}: whole batches are evaluated")
    law(
        result.nfe == calls.rows // 6, f"{sampler.name}: NFE is what was spent, {calls.rows // 6}; it says {result.nfe}"
    )
    law(
        planned.nfe in (None, result.nfe),
        f"{sampler.name}: the plan foretells the NFE; {planned.nfe}, not {result.nfe}",
    )
    law(torch.equal(planned.times, result.times), f"{sampler.name}: the grid that is planned is the grid that is used")


def _check_ownership(sampler: Sampler, field: Field) -> None:
    noise, keys = _noise(7), sample_keys(0, torch.arange(7))
    state = torch.random.get_rng_state()
    whole = sampler.sample(field, noise, seeds=keys).x
    law(
        torch.equal(state, torch.random.get_rng_state()),
        f"{sampler.name}: with seeds given, torch's generator is left alone",
    )
    torch.rand(3)
    law(torch.equal(whole, sampler.sample(field, noise, seeds=keys).x), f"{sampler.name}: equal seeds, equal samples")
    torch.random.set_rng_state(state)
    # An adaptive solver's steps are those of the worst sample in the batch, so samples agree within its tolerance;
    # others within a thousand roundings (the processor's vector and scalar functions differ in the last bit).
    adaptive = isinstance(sampler, AdaptiveODE)
    tolerance = 100 * (sampler.rtol + sampler.atol) if adaptive else 1e-12
    for rows in ([3], [6, 0, 3]):
        part = sampler.sample(field, noise[rows], seeds=keys[rows]).x
        close(part, whole[rows], tolerance, f"{sampler.name}: a sample does not depend on its batch")
    if sampler.stochastic:
        others = sampler.sample(field, noise, seeds=sample_keys(1, torch.arange(7))).x
        law((others != whole).any(1), f"{sampler.name}: other seeds, other samples")
    for shape, dtype in (((2, 3, 4, 5), torch.float32), ((2, 1), torch.float64)):
        drawn = sampler.sample(field, torch.zeros(shape, dtype=dtype), seeds=[1, 2]).x
        law(
            drawn.shape == shape and drawn.dtype == dtype, f"{sampler.name}: samples are of the noise's shape and dtype"
        )


def _check_trajectory(sampler: Sampler, field: Field) -> None:
    noise = _noise(3)
    alone = sampler.sample(field, noise, seeds=[1, 2, 3])
    kept = sampler.sample(field, noise, seeds=[1, 2, 3], trajectory=True)
    law(alone.trajectory is None, f"{sampler.name}: only the end state is kept unless a trajectory is asked for")
    states = kept.trajectory
    if states is None:
        raise AssertionError(f"{sampler.name}: the trajectory that is asked for is kept")
    last = sampler.plan(SolveSpec(field.interpolant, field.target)).last_step > 0
    law(len(states) == len(kept.times) + last, f"{sampler.name}: a state for each time, and one for the last step")
    law(states[0] == noise, f"{sampler.name}: a trajectory starts at the noise")
    law(states[-1] == kept.x, f"{sampler.name}: a trajectory ends at the samples")
    close(kept.x, alone.x, 1e-12, f"{sampler.name}: keeping the trajectory changes nothing")


def _check_law(sampler: Sampler, field: Field, diffusion: Diffusion | None = None) -> None:
    drawn = sampler.sample(field, _noise(500, 8), diffusion=diffusion, seeds=range(500)).x
    # 4,000 numbers: standard errors 0.3 / 63 = 0.005 of the mean and 0.3 / 89 = 0.003 of the deviation; what remains is
    # room for a coarse default.
    for what, ours, truth in (("mean", drawn.mean(), MEAN), ("standard deviation", drawn.std(), STD)):
        law(
            (ours - truth).abs() <= 0.05,
            f"{sampler.name}: samples of N({MEAN}, {STD}^2) have its {what}; it is {float(ours):.4f}",
        )


def check_order(sampler: Sampler, field: Field) -> None:
    """Halving the step divides the error by 2^order within a quarter of an order; a smaller tolerance lowers the error.

    A sampler that is exact at eight steps (to 1e-12, some thousand roundings) has no error to divide.
    Deterministic samplers: strong error against the exact flow of the Gaussian.  Stochastic ones: weak error of the mean
    and the variance, with w = sigma where the sampler takes a w, over [0.1, 0.8] without a last step.
    """
    if isinstance(sampler, AdaptiveODE):
        loose, tight = (flow_error(dataclasses.replace(sampler, rtol=r, atol=r), field) for r in (1e-3, 1e-8))
        law(
            tight < 1e-6 and tight < loose / 100,
            f"{sampler.name}: the error follows the tolerance; {loose:.2g}, {tight:.2g}",
        )
        return
    if not any(f.name == "steps" for f in dataclasses.fields(sampler)):
        raise AssertionError(f"{sampler.name}: a sampler of fixed steps has a field `steps`")
    if not sampler.stochastic and flow_error(over_the_middle(sampler, 8), field) < ROUNDING_TOLERANCE:
        return
    measured = observed_order(sampler, field)
    law(
        abs(measured - sampler.order) <= ORDER_TOLERANCE,
        f"{sampler.name}: declares order {sampler.order}, shows {measured:.2f}",
    )


def observed_order(sampler: Sampler, field: Field) -> float:
    """log2 of the ratio of the errors at a number of steps and at twice it.

    Where that is not the declared order, four times the steps decide: an order is a limit, and at few steps the error's
    leading terms may cancel.
    """
    # A method of high order reaches rounding soon, one of low order shows its order only with small steps.
    steps = 32 if sampler.stochastic else max(8, 256 >> sampler.order)

    def error(steps: int) -> float:
        if sampler.stochastic:
            return weak_error(sampler, field, steps)
        return flow_error(over_the_middle(sampler, steps), field)

    measured = math.log2(error(steps) / error(2 * steps))
    if abs(measured - sampler.order) > ORDER_TOLERANCE:
        measured = math.log2(error(4 * steps) / error(8 * steps))
    return measured


def over_the_middle(sampler: Sampler, steps: int) -> Sampler:
    """The sampler with so many steps over `MIDDLE` and, where it has one, no last step."""
    values: dict[str, Any] = {"steps": steps, "t0": MIDDLE[0], "t1": MIDDLE[1], "last_step": "none"}
    known = {f.name for f in dataclasses.fields(sampler)}
    return dataclasses.replace(sampler, **{k: v for k, v in values.items() if k in known})


def flow_error(sampler: Sampler, field: Field) -> float:
    """The largest error of the end state against the exact flow: (x_t - alpha mean) / std(x_t) does not change."""
    noise = _noise(64, 1)
    result = sampler.sample(field, noise, seeds=range(64))
    start, end = (gaussian_moments(field.interpolant, float(t)) for t in result.times[[0, -1]])
    truth = end[0] + end[1] * (noise - start[0]) / start[1]
    return float((result.x - truth).abs().max())


def weak_error(sampler: Sampler, field: Field, steps: int) -> float:
    """The error of the end state's variance after `steps` steps over `MIDDLE`, without sampling error.

    A Gaussian's field is affine in x, so the end state is affine in the start and in the increments of the sample's own
    Brownian path: x = b + a x_0 + sum_k c_k (W_{k+1} - W_k).  A few more rows than steps determine a and c, and the
    variance is a^2 var(x_0) + sum_k c_k^2 h_k.
    """
    rows = steps + 20
    start, end = (gaussian_moments(field.interpolant, t) for t in MIDDLE)
    noise, keys = _noise(rows, 1), sample_keys(0, torch.arange(rows))
    chosen, diffusion = over_the_middle(sampler, steps), Sigma()
    try:
        chosen.plan(SolveSpec(field.interpolant, field.target, diffusion))
    except UserError:
        diffusion = None
    result = chosen.sample(field, noise, diffusion=diffusion, seeds=keys)
    path = path_on(keys, noise, result.times)
    walked = torch.cat([path(t) for t in result.times.tolist()], 1).diff()
    known = torch.cat((torch.ones_like(noise), noise, walked), 1)
    weights = torch.linalg.lstsq(known, result.x).solution
    close(
        known @ weights,
        result.x,
        1e-9,
        f"{sampler.name}: moved by the increments of the sample's own path, and no more",
    )
    variance = weights[1].square() * start[1] ** 2 + weights[2:, 0].square() @ result.times.diff()
    return abs(float(variance) - end[1] ** 2)
