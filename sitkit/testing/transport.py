"""The laws of the algebra: interpolants, targets, weightings, time maps, couplings and diffusions."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from sitkit.registry import interpolants, targets
from sitkit.runtime.errors import UserError
from sitkit.testing.law import close, law, lawful, not_shown_if_refused
from sitkit.transport.coupling import Coupling
from sitkit.transport.diffusion import Diffusion
from sitkit.transport.interpolant import Coefficients, Interpolant
from sitkit.transport.target import Target, Velocity, data_and_noise, determinant
from sitkit.transport.timestep import Timestep
from sitkit.transport.weighting import Weighting

# At t = 0 a path may keep a little of the data (vp-sbdm: alpha = 0.0066), but a start from N(0, I) must be right.
ALPHA_AT_NOISE = 0.02


@lawful(Interpolant)
def ends(interpolant: Interpolant) -> None:
    """t = 0 is N(0, I) and t = 1 is data, exactly, and every coefficient is finite at both."""
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


@lawful(Interpolant)
def derivatives(interpolant: Interpolant) -> None:
    """d_alpha and d_sigma are the derivatives of alpha and sigma."""
    who = interpolant.name
    inside = torch.linspace(0.005, 0.995, 199, dtype=torch.float64).requires_grad_()
    c = interpolant.coefficients(inside)
    for name, value, rate in (("alpha", c.alpha, c.d_alpha), ("sigma", c.sigma, c.d_sigma)):
        # A coefficient that does not depend on t has no gradient; its derivative is zero.
        grad = torch.autograd.grad(value.sum(), inside, retain_graph=True, allow_unused=True)[0]
        truth = torch.zeros_like(inside) if grad is None else grad
        # Both are a dozen operations in float64 on numbers of order 1 to 100: 1e-10 is 1e5 roundings.
        close(rate.detach(), truth, 1e-10, f"{who}: d_{name} is the derivative of {name}")


@lawful(Interpolant)
def monotone(interpolant: Interpolant) -> None:
    """alpha does not fall, sigma does not rise, and they are never both small."""
    who = interpolant.name
    grid = torch.linspace(0, 1, 401, dtype=torch.float64)
    c = interpolant.coefficients(grid)
    law(c.alpha.diff() >= 0, f"{who}: alpha does not fall")
    law(c.sigma.diff() <= 0, f"{who}: sigma does not rise")
    law(c.alpha.square() + c.sigma.square() > 0.1, f"{who}: alpha^2 + sigma^2 stays away from 0")


@lawful(Interpolant)
def readable(interpolant: Interpolant) -> None:
    """d_alpha sigma - alpha d_sigma > 0 at every t, so that a velocity determines data and noise."""
    who = interpolant.name
    grid = torch.linspace(0, 1, 401, dtype=torch.float64)
    det = determinant(Velocity(), interpolant.coefficients(grid))
    law(
        det.isfinite() & (det > 0),
        f"{who}: d_alpha sigma - alpha d_sigma > 0 at every t, both ends included, so that a velocity is readable; "
        f"it is {float(det.min()):.3g} at t = {float(grid[det.argmin()]):.3g}",
    )


@lawful(Interpolant)
def elementwise(interpolant: Interpolant) -> None:
    """Coefficients have t's shape and dtype, treat each entry of t alone, and agree between float32 and float64."""
    _check_elementwise(f"{interpolant.name}: coefficients", interpolant.coefficients)


def _check_elementwise(who: str, values: Callable[[Tensor], Tensor | Iterable[Tensor]]) -> None:
    """Check a function of t: t's shape and dtype, each entry alone, and agreement between float32 and float64."""

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
                shapes = f"of t's shape {tuple(t.shape)}; value {index} is {tuple(value.shape)}"
                law(value.shape == t.shape, f"{who}: {shapes}")
                law(value.dtype == dtype, f"{who}: of t's dtype {dtype}; value {index} is {value.dtype}")
                truth = whole[index][: t.numel()].reshape(t.shape)
                # Rates are up to 100 per unit of t, and float32 rounds t to 6e-8 of itself.
                close(value.double(), truth, 2e-5, f"{who}: each entry of t alone, in {dtype}, value {index}")


def inner_times() -> Tensor:
    """Return times at which laws are checked.

    Returns:
        23 times inside (0, 1), float64, some of them near the ends.
    """
    ends = torch.tensor([1e-3, 1e-2], dtype=torch.float64)
    return torch.cat((ends, torch.linspace(0.05, 0.95, 19, dtype=torch.float64), 1 - ends.flip(0)))


@lawful(Target)
def invertible(target: Target) -> None:
    """On every registered interpolant the prediction and x determine data and noise."""
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
        solution = data_and_noise(target, c, a * data + b * noise, c.alpha * data + c.sigma * noise)
        # The 2 x 2 system loses the digits of its condition number, |a b alpha sigma| / det, at most 1e4 at t = 1e-3.
        for part, ours, truth in zip(("data", "noise"), solution, (data, noise), strict=True):
            close(ours, truth, 1e-10, f"{who}: the prediction and x determine the {part}")


@lawful(Weighting)
def positive(weighting: Weighting) -> None:
    """r(t) is positive and finite inside (0, 1), and without a floor an error has the same weight for every target."""
    t, weighting = inner_times(), dataclasses.replace(weighting, floor=0.0)
    for name in interpolants.names():
        c = interpolants.create(name).coefficients(t)
        errors = {}
        for predicted in targets.names():
            target = targets.create(predicted)
            who = f"{weighting.name} on {name} with {predicted}"
            r = weighting.weight(c, target)
            law(r.shape == t.shape, f"{who}: of t's shape")
            law(r.isfinite() & (r > 0), f"{who}: positive and finite inside (0, 1)")
            # For a known x an error of 1 in the noise is an error of det / alpha in this target.
            errors[predicted] = r * (determinant(target, c) / c.alpha).square()
        first = next(iter(errors.values()))
        for predicted, error in errors.items():
            message = f"{weighting.name} on {name}: an error has the same weight for every target, with {predicted}"
            close(error / first, torch.ones_like(first), 1e-9, message)


@lawful(Timestep)
def increasing(timestep: Timestep) -> None:
    """The map is monotone from 0 to 1, of u's shape and dtype; grids increase from t0 to t1, or are refused."""
    who = timestep.name
    for dtype in (torch.float64, torch.float32):
        u = torch.linspace(0, 1, 1001, dtype=dtype)
        t = timestep.map(u)
        law(t.shape == u.shape and t.dtype == dtype, f"{who}: t(u) is of u's shape and dtype")
        ends = f"they are {float(t[0]):.3g} and {float(t[-1]):.3g}"
        law(t[0] == 0 and t[-1] == 1, f"{who}: t(0) = 0 and t(1) = 1; {ends}")
        law(t.diff() >= 0, f"{who}: t(u) does not fall")
        law(timestep.map(u.reshape(7, 11, 13)) == t.reshape(7, 11, 13), f"{who}: each entry of u alone")
    for steps, (t0, t1) in itertools.product((1, 2, 7, 50), ((0.0, 1.0), (0.001, 0.96))):
        try:
            times = timestep.grid(steps, t0, t1)
        except UserError:
            continue
        whole = times.dtype == torch.float64 and times.shape == (steps + 1,)
        law(whole, f"{who}: a grid has steps + 1 times in float64")
        law(times[0] == t0 and times[-1] == t1, f"{who}: a grid runs from t0 to t1")
        law(times.diff() > 0, f"{who}: a grid increases strictly")


@lawful(Coupling)
def pairing(coupling: Coupling) -> None:
    """It reorders the rows of the noise for a batch of any size, and is not random."""
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 2, 17):
        data, noise = torch.randn(2, rows, 3, 2, generator=generator)
        y = torch.arange(rows) % 3
        paired = coupling.pair(data, noise, y)
        same = paired.shape == noise.shape and paired.dtype == noise.dtype
        law(same, f"{coupling.name}: of the noise's shape and dtype")
        before, after = (sorted(x.flatten(1).tolist()) for x in (noise, paired))
        if coupling.permutes:
            law(before == after, f"{coupling.name}: a permutation of the noise, so that its distribution is kept")
        else:
            law(all(row in before for row in after), f"{coupling.name}: each row is one of the noise's rows")
        law(paired == coupling.pair(data, noise, y), f"{coupling.name}: the same batch gives the same pairs")


@lawful(Coupling)
def noise_keeps_its_law(coupling: Coupling) -> None:
    """Over many batches the paired noise has mean 0 and variance 1 for every data."""
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 60, 16, 2, generator=generator, dtype=torch.float64)
    y = torch.arange(16) % 2
    paired = torch.stack([coupling.pair(d, n, y) for d, n in zip(1 + data, noise, strict=True)])
    for moment, values in (("mean is 0", paired), ("variance is 1", paired.square() - 1)):
        batches = values.flatten(1).mean(1)
        # The batches are independent, so their spread gives the standard error of the mean; five of them are a fault.
        off = float(batches.mean() / (batches.std() / len(batches) ** 0.5))
        law(abs(off) < 5, f"{coupling.name}: the noise's {moment}; it is off by {off:.1f} standard errors")


@lawful(Diffusion)
def scaled(diffusion: Diffusion) -> None:
    """w is finite and not negative inside (0, 1), and elementwise; `norm` multiplies the whole of w."""
    t = inner_times()
    for name in interpolants.names():
        interpolant = interpolants.create(name)
        who = f"{diffusion.name} on {name}"
        c = interpolant.coefficients(t)
        with not_shown_if_refused():
            w = diffusion.w(t, c)
        law(w.isfinite() & (w >= 0), f"{who}: w is finite and not negative inside (0, 1)")
        tripled = dataclasses.replace(diffusion, norm=3 * diffusion.norm)
        close(tripled.w(t, c), 3 * w, 1e-12, f"{who}: norm multiplies the whole of w")
        _check_elementwise(f"{who}: w", lambda t, path=interpolant: diffusion.w(t, path.coefficients(t)))
