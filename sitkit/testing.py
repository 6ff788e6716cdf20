"""The laws that a component must obey, for its author's tests and for ours.

Each `check_...` takes a component and raises AssertionError with the law's name, the place and the numbers where it is
broken.  They need no test framework:

    from sitkit.testing import check_interpolant
    check_interpolant(sitkit.interpolants.create("poly", power=3))
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sitkit.backbones.exact import Exact
from sitkit.coupling import Coupling
from sitkit.diffusion import Diffusion, Sigma
from sitkit.field import Field
from sitkit.guidance import Guidance
from sitkit.interpolant import Coefficients, Interpolant
from sitkit.mixture import Posterior
from sitkit.noise import path_on, sample_keys
from sitkit.registry import Component, UserError, interpolants, registries, spec, targets
from sitkit.sampler import AdaptiveODE, Sampler
from sitkit.target import Target, Velocity, determinant, solve
from sitkit.timestep import Timestep
from sitkit.weighting import Weighting

# At t = 0 a path may keep a little of the data (vp-sbdm: alpha = 0.0066), but starting it from N(0, I) must be right.
ALPHA_AT_NOISE = 0.02
MEAN, STD = 0.7, 0.3
# Where orders are measured: away from the ends, at which coefficients may be singular, and not symmetric, for over the
# whole of [0, 1] the leading error of the midpoint rule on `linear` happens to cancel.
MIDDLE = 0.1, 0.8
# Orders are whole numbers; a quarter of one is the noise of measuring them at a finite step.
ORDER_TOLERANCE = 0.25


def law(holds: bool | Tensor, message: str) -> None:
    """AssertionError with the message unless the law holds."""
    if not bool(torch.as_tensor(holds).all()):
        raise AssertionError(message)


def close(ours: Tensor, truth: Tensor, tolerance: float, message: str) -> None:
    """AssertionError unless |ours - truth| <= tolerance (1 + |truth|) everywhere."""
    off = (ours - truth).abs() / (1 + truth.abs())
    law(off.isfinite() & (off <= tolerance), f"{message}: off by {float(off.max()):.3g}, tolerated {tolerance:.3g}")


@dataclass(frozen=True)
class Gaussian:
    """The law N(mean, std^2 I) of unlabelled data in any dimension."""

    mean: float
    std: float
    num_classes: int = 0

    def posterior(self, c: Coefficients, x: Tensor, y: Tensor) -> Posterior:
        """E[data | x] = mean + alpha std^2 (x - alpha mean) / R, score = -(x - alpha mean) / R, R = alpha^2 std^2 + sigma^2."""
        pull = (x - c.alpha * self.mean) / ((c.alpha * self.std).square() + c.sigma.square())
        return Posterior(self.mean + c.alpha * self.std**2 * pull, -pull)

    def to(self, device: torch.device) -> Gaussian:
        """Itself."""
        return self


def gaussian_network(interpolant: Interpolant, target: Target, mean: float = 0.0, std: float = 1.0) -> Exact:
    """The ideal network for data ~ N(mean, std^2 I): network(x, t, y) = E[a data + b noise | x_t = x], in closed form."""
    return Exact(Gaussian(mean, std), interpolant, target)


def gaussian_field(interpolant: Interpolant, target: Target, mean: float = MEAN, std: float = STD) -> Field:
    """`gaussian_network` as a field."""
    return Field(gaussian_network(interpolant, target, mean, std), interpolant, target)


def gaussian_moments(interpolant: Interpolant, t: float, mean: float = MEAN, std: float = STD) -> tuple[float, float]:
    """Mean and standard deviation of x_t for data ~ N(mean, std^2)."""
    c = interpolant.coefficients(torch.tensor(t, dtype=torch.float64))
    return float(c.alpha) * mean, math.hypot(float(c.alpha) * std, float(c.sigma))


class Calls:
    """A network that counts its evaluations, row by row."""

    def __init__(self, network: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        self.network, self.rows = network, 0

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The network's answer."""
        self.rows += len(x)
        return self.network(x, t, y)


def check_component(component: Component) -> None:
    """It is frozen, hashable, explained in one line, and its plain form, read again, is the same component."""
    who = f"{type(component).__name__}"
    law(bool(component.name), f"{who}: a component has the name it is registered by")
    law(bool((type(component).__doc__ or "").strip()), f"{who}: the first line of the docstring says what it is")
    for field in dataclasses.fields(component):
        try:
            setattr(component, field.name, getattr(component, field.name))
        except dataclasses.FrozenInstanceError:
            continue
        raise AssertionError(f"{who}: a component is frozen; decorate it with @dataclass(frozen=True)")
    hash(component)
    homes = [r for r in registries.values() if component.name in r and r[component.name] is type(component)]
    law(len(homes) == 1, f"{who}: one registry holds it by its name {component.name!r}; {len(homes)} do")
    again = homes[0].parse(spec(component))
    law(again == component, f"{who}: what is recorded builds the same component; {spec(component)} gives {again}")


def check_interpolant(interpolant: Interpolant) -> None:
    """Ends, rates, monotony, determinant, shape and dtype of alpha and sigma."""
    check_component(interpolant)
    who = interpolant.name

    def at(*times: float) -> Coefficients:
        return interpolant.coefficients(torch.tensor(times, dtype=torch.float64))

    noise, data = at(0.0), at(1.0)
    law(data.sigma == 0, f"{who}: sigma(1) = 0, data without noise; it is {float(data.sigma):.3g}")
    close(data.alpha, torch.ones(1), 1e-12, f"{who}: alpha(1) = 1")
    law(noise.alpha.abs() <= ALPHA_AT_NOISE, f"{who}: alpha(0) = 0, noise without data; it is {float(noise.alpha):.3g}")
    close(noise.sigma, torch.ones(1), ALPHA_AT_NOISE, f"{who}: sigma(0) = 1")
    for name, value in zip(Coefficients._fields, noise, strict=True):
        law(value.isfinite(), f"{who}: {name} is finite at t = 0; it is {float(value):.3g}")
    for name, value in zip(Coefficients._fields, data, strict=True):
        law(value.isfinite(), f"{who}: {name} is finite at t = 1 (a diverging rate is cut off, not infinite)")

    inside = torch.linspace(0.005, 0.995, 199, dtype=torch.float64).requires_grad_()
    c = interpolant.coefficients(inside)
    for name, value, rate in (("alpha", c.alpha, c.d_alpha), ("sigma", c.sigma, c.d_sigma)):
        # A straight line's value may be t itself, or a constant may not depend on t: no gradient is then zero.
        grad = torch.autograd.grad(value.sum(), inside, retain_graph=True, allow_unused=True)[0]
        truth = torch.zeros_like(inside) if grad is None else grad
        # Both are a dozen operations in float64 on numbers of order 1 to 100: 1e-10 is 1e5 roundings.
        close(rate.detach(), truth, 1e-10, f"{who}: d_{name} is the derivative of {name}")

    grid = torch.linspace(0, 1, 401, dtype=torch.float64)
    c = interpolant.coefficients(grid)
    law(c.alpha.diff() >= 0, f"{who}: alpha does not fall")
    law(c.sigma.diff() <= 0, f"{who}: sigma does not rise")
    law(c.alpha.square() + c.sigma.square() > 0.1, f"{who}: alpha^2 + sigma^2 stays away from 0")
    det = determinant(Velocity(), c)
    law(
        det.isfinite() & (det > 0),
        f"{who}: d_alpha sigma - alpha d_sigma > 0 at every t, both ends included, so that a velocity is readable; "
        f"it is {float(det.min()):.3g} at t = {float(grid[det.argmin()]):.3g}",
    )
    check_elementwise(f"{who}: coefficients", lambda t: interpolant.coefficients(t))


def check_elementwise(who: str, values: Callable[[Tensor], Tensor | Iterable[Tensor]]) -> None:
    """A function of t keeps t's shape and dtype, treats each entry alone, and agrees between float32 and float64."""

    def each(t: Tensor) -> list[Tensor]:
        result = values(t)
        return [result] if isinstance(result, Tensor) else list(result)

    flat = torch.linspace(0.05, 0.95, 12, dtype=torch.float64)
    whole = each(flat)
    for index, value in enumerate(whole):
        law(value.shape == flat.shape, f"{who}: of t's shape (12,); value {index} is {tuple(value.shape)}")
    for shape in ((), (12,), (3, 4), (12, 1, 1)):
        for dtype in (torch.float64, torch.float32):
            t = flat[:1].reshape(()) if shape == () else flat.reshape(shape)
            for index, value in enumerate(each(t.to(dtype))):
                law(
                    value.shape == t.shape,
                    f"{who}: of t's shape {tuple(t.shape)}; value {index} is {tuple(value.shape)}",
                )
                law(value.dtype == dtype, f"{who}: of t's dtype {dtype}; value {index} is {value.dtype}")
                truth = whole[index][: t.numel()].reshape(t.shape)
                # Rates are up to 100 per unit of t, and float32 rounds t to 6e-8 of itself.
                close(value.double(), truth, 2e-5, f"{who}: each entry of t alone, in {dtype}, value {index}")


def inner_times() -> Tensor:
    """Times inside (0, 1), near both ends too."""
    ends = torch.tensor([1e-3, 1e-2], dtype=torch.float64)
    return torch.cat((ends, torch.linspace(0.05, 0.95, 19, dtype=torch.float64), 1 - ends.flip(0)))


def check_target(target: Target) -> None:
    """For every registered interpolant the weights determine data and noise inside (0, 1), and solving gives them back."""
    check_component(target)
    t = inner_times()
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, len(t), generator=generator, dtype=torch.float64)
    for name in interpolants.names():
        c = interpolants.create(name).coefficients(t)
        who = f"{target.name} on {name}"
        a, b = target.weights(c)
        law(a.shape == t.shape and b.shape == t.shape, f"{who}: both weights are of t's shape")
        law(a.dtype == b.dtype == t.dtype, f"{who}: both weights are of t's dtype")
        det = determinant(target, c)
        law(det.isfinite() & (det != 0), f"{who}: a sigma - b alpha is finite and not 0 inside (0, 1)")
        found = solve(target, c, a * data + b * noise, c.alpha * data + c.sigma * noise)
        # The 2 x 2 system loses the digits of its condition number, |a b alpha sigma| / det, at most 1e4 at t = 1e-3 here.
        for what, ours, truth in (("data", found[0], data), ("noise", found[1], noise)):
            close(ours, truth, 1e-10, f"{who}: {what} is found again from the prediction and x")


def check_weighting(weighting: Weighting) -> None:
    """r(t) is positive and finite inside (0, 1), and measures one error alike whatever target predicts it."""
    check_component(weighting)
    t = inner_times()
    for name in interpolants.names():
        c = interpolants.create(name).coefficients(t)
        errors = {}
        for predicted in targets.names():
            target = targets.create(predicted)
            who = f"{weighting.name} on {name} with {predicted}"
            r = weighting.weight(c, target)
            law(r.shape == t.shape, f"{who}: of t's shape")
            law(r.isfinite() & (r > 0), f"{who}: positive and finite inside (0, 1)")
            # An error of 1 in the noise, x being known, is an error of det / alpha in this target.
            errors[predicted] = r * (determinant(target, c) / c.alpha).square()
        first = next(iter(errors.values()))
        for predicted, error in errors.items():
            ratio = error / first
            close(
                ratio,
                torch.ones_like(ratio),
                1e-9,
                f"{weighting.name} on {name}: one error, one loss, with {predicted}",
            )


def check_timestep(timestep: Timestep) -> None:
    """The map is monotone from 0 to 1, of u's shape and dtype; grids run from t0 to t1 and increase, or are refused."""
    check_component(timestep)
    who = timestep.name
    for dtype in (torch.float64, torch.float32):
        u = torch.linspace(0, 1, 1001, dtype=dtype)
        t = timestep.map(u)
        law(t.shape == u.shape and t.dtype == dtype, f"{who}: t(u) is of u's shape and dtype")
        law(
            t[0] == 0 and t[-1] == 1, f"{who}: t(0) = 0 and t(1) = 1; they are {float(t[0]):.3g} and {float(t[-1]):.3g}"
        )
        law(t.diff() >= 0, f"{who}: t(u) does not fall")
        law(timestep.map(u.reshape(7, 11, 13)) == t.reshape(7, 11, 13), f"{who}: each entry of u alone")
    for steps, (t0, t1) in itertools.product((1, 2, 7, 50), ((0.0, 1.0), (0.001, 0.96))):
        try:
            times = timestep.grid(steps, t0, t1)
        except UserError:
            continue
        law(
            times.dtype == torch.float64 and times.shape == (steps + 1,), f"{who}: a grid is steps + 1 times in float64"
        )
        law(times[0] == t0 and times[-1] == t1, f"{who}: a grid runs from t0 to t1")
        law(times.diff() > 0, f"{who}: a grid increases strictly")


def check_coupling(coupling: Coupling) -> None:
    """It permutes the rows of the noise, whatever the batch, and is not random."""
    check_component(coupling)
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 2, 17):
        data, noise = torch.randn(2, rows, 3, 2, generator=generator)
        y = torch.arange(rows) % 3
        paired = coupling.pair(data, noise, y)
        law(
            paired.shape == noise.shape and paired.dtype == noise.dtype,
            f"{coupling.name}: of the noise's shape and dtype",
        )
        before, after = (sorted(x.flatten(1).tolist()) for x in (noise, paired))
        law(before == after, f"{coupling.name}: a permutation of the noise, so that its law is kept")
        law(paired == coupling.pair(data, noise, y), f"{coupling.name}: the same batch is paired alike")


def check_diffusion(diffusion: Diffusion) -> None:
    """w >= 0, finite inside (0, 1), elementwise; `norm` multiplies the whole form."""
    check_component(diffusion)
    t = inner_times()
    for name in interpolants.names():
        interpolant = interpolants.create(name)
        who = f"{diffusion.name} on {name}"
        c = interpolant.coefficients(t)
        w = diffusion.w(t, c)
        law(w.isfinite() & (w >= 0), f"{who}: w is finite and not negative inside (0, 1)")
        tripled = dataclasses.replace(diffusion, norm=3 * diffusion.norm)
        close(tripled.w(t, c), 3 * w, 1e-12, f"{who}: norm multiplies the whole of w")
        check_elementwise(f"{who}: w", lambda t, path=interpolant: diffusion.w(t, path.coefficients(t)))


def check_guidance(guidance: Guidance, *, channels: int = 3, num_classes: int = 4) -> None:
    """Its weights sum to one, it keeps shape and dtype, and `evaluations` says what it spends."""
    check_component(guidance)
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


def _noise(rows: int, columns: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _check_cost(sampler: Sampler, field: Field) -> None:
    calls = Calls(field.network)
    planned = sampler.plan(field.interpolant, field.target)
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
    last = sampler.plan(field.interpolant, field.target).last_step > 0
    law(len(states) == len(kept.times) + last, f"{sampler.name}: a state for each time, and one for the last step")
    law(states[0] == noise, f"{sampler.name}: a trajectory starts at the noise")
    law(states[-1] == kept.x, f"{sampler.name}: a trajectory ends at the samples")
    close(kept.x, alone.x, 1e-12, f"{sampler.name}: keeping the trajectory changes nothing")


def _check_law(sampler: Sampler, field: Field) -> None:
    drawn = sampler.sample(field, _noise(500, 8), seeds=range(500)).x
    # 4,000 numbers: standard errors 0.3 / 63 = 0.005 of the mean and 0.3 / 89 = 0.003 of the deviation; what remains is
    # room for a coarse default.
    for what, ours, truth in (("mean", drawn.mean(), MEAN), ("standard deviation", drawn.std(), STD)):
        law(
            (ours - truth).abs() <= 0.05,
            f"{sampler.name}: samples of N({MEAN}, {STD}^2) have its {what}; it is {float(ours):.4f}",
        )


def check_order(sampler: Sampler, field: Field) -> None:
    """Halving the step divides the error by 2^order within a quarter of an order; a smaller tolerance lowers the error.

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
        chosen.plan(field.interpolant, field.target, diffusion)
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
