"""The interval of a solve, derived from where its algebra is singular and where its explicit steps are unstable.

At an end where the readings, the score (for an SDE) or w is not finite, the interval stops where the coefficient that
vanishes is `MARGIN`: alpha = 1e-3 at the noise end, sigma = 1e-3 at the data end (for vp-sbdm t = 1 - 1e-5, the margin of
SiT Table 10).  The interval of an SDE shrinks further until its explicit step is stable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sitkit.runtime.errors import UserError
from sitkit.transport.diffusion import Diffusion
from sitkit.transport.interpolant import Coefficients, Interpolant
from sitkit.transport.target import Target, Velocity, determinant
from sitkit.transport.timestep import Timestep
from sitkit.transport.weighting import Weighting

MARGIN = 1e-3
INFINITE = 1e9
# An explicit step multiplies the noise in the state by 1 - rho, rho = h w / (2 sigma^2), and inflates its stationary
# variance by 1 / (1 - rho / 2): at most twofold at a derived end (rho <= 1), at most fourfold on a given grid (1.5).
RHO_END, RHO_GRID = 1.0, 1.5
# Largest noise in the samples, as a standard deviation for data of scale 1: after a truncated end; after a last step.  On
# linear a truncated end with noise of 0.02 has alpha = 0.98, which moves a mean of 0.7 by 5 % of a standard deviation of 0.3.
LEFT_BY_END, LEFT_BY_LAST_STEP = 0.02, 0.07
# Largest alpha at the start of an SDE: with a larger one pure noise is not a sample of p_t.
LATEST_START = 0.25
# A loss weight above this leaves the gradient to a few examples.
LARGE_WEIGHT = 1000.0


class Interval(NamedTuple):
    """The times of a solve, and the reason for each end ("" where it is the natural end).

    Args:
        t0: where the solve starts.
        t1: where the solve stops.
        why0: the reason if t0 is later than 0.
        why1: the reason if t1 is earlier than the wanted end.
    """

    t0: float
    t1: float
    why0: str = ""
    why1: str = ""

    @property
    def notes(self) -> tuple[str, ...]:
        """The reasons that apply."""
        return tuple(why for why in (self.why0, self.why1) if why)


def coefficients_at(interpolant: Interpolant, t: float | Tensor) -> Coefficients:
    """Return the coefficients at t in float64."""
    return interpolant.coefficients(torch.as_tensor(t, dtype=torch.float64))


def singularity(interpolant: Interpolant, target: Target, diffusion: Diffusion | None, t: float) -> str:
    """Return why a solve cannot evaluate its right-hand side at t, or "".

    An ODE (diffusion None) needs a finite velocity; an SDE needs a finite score and w too.
    """
    time = torch.tensor(t, dtype=torch.float64)
    c = interpolant.coefficients(time)
    det = determinant(target, c)
    gain = determinant(Velocity(), c) / det
    if not float(gain.abs()) < INFINITE:
        return (
            f"the velocity cannot be read from a {target.name} prediction at t = {t:g} (determinant {float(det):.3g})"
        )
    if diffusion is None:
        return ""
    if not float((c.alpha / (c.sigma * det)).abs()) < INFINITE or float(c.sigma) == 0:
        return f"the score is not finite at t = {t:g} (sigma = {float(c.sigma):.3g})"
    w = float(diffusion.w(time, c))
    if not abs(w) < INFINITE:
        return f"w of diffusion {diffusion.name!r} is not finite at t = {t:g}"
    return ""


def stiffness(interpolant: Interpolant, diffusion: Diffusion, t: Tensor, h: Tensor | float) -> Tensor:
    """Return rho = h w / (2 sigma^2): an explicit step of size h at t multiplies the noise in the state by 1 - rho."""
    c = coefficients_at(interpolant, t)
    return h * diffusion.w(t, c) / (2 * c.sigma.square())


def derive_interval(
    interpolant: Interpolant,
    target: Target,
    diffusion: Diffusion | None,
    *,
    steps: int,
    end: float = 1.0,
    largest_rho: float = RHO_END,
) -> Interval:
    """Return the widest interval within [0, end] on which the right-hand side is finite and explicit steps are stable.

    Args:
        interpolant: the path.
        target: the quantity that the network predicts.
        diffusion: the w of an SDE; None for an ODE.
        steps: the number of steps of the solve.
        end: the latest time; below 1 for a solver that ends with a last step.
        largest_rho: the largest h w / (2 sigma^2) of a step at a derived end.

    Raises:
        UserError: if no interval is wide enough for the samples to be right.
    """

    def singular(t: float) -> str:
        return singularity(interpolant, target, diffusion, t)

    why0, why1 = singular(0.0), singular(end)
    t0 = _start_past_singularity(interpolant) if why0 else 0.0
    t1 = _end_before_singularity(interpolant, end) if why1 else end
    derived = Interval(t0, t1, why0, why1)
    return derived if diffusion is None else _stable_interval(interpolant, diffusion, derived, steps, end, largest_rho)


def _start_past_singularity(interpolant: Interpolant) -> float:
    """The earliest time of a solve that is singular at the noise: alpha is `MARGIN` there."""
    return _crossing(lambda t: float(coefficients_at(interpolant, t).alpha) >= MARGIN, 0.0, 1.0)


def _end_before_singularity(interpolant: Interpolant, end: float = 1.0) -> float:
    """The latest time of a solve that is singular at the data: sigma is `MARGIN` there."""
    return _crossing(lambda t: float(coefficients_at(interpolant, t).sigma) >= MARGIN, end, 0.0)


def _stable_interval(
    interpolant: Interpolant, diffusion: Diffusion, derived: Interval, steps: int, end: float, largest_rho: float
) -> Interval:
    """The part of an interval on which explicit steps of size 1 / steps are stable; UserError where it is too short."""
    t0, t1, why0, why1 = derived

    def rho(t: float, h: float = 1 / steps) -> float:
        return float(stiffness(interpolant, diffusion, torch.tensor(t, dtype=torch.float64), h))

    def stable(t: float) -> bool:
        return rho(t) <= largest_rho

    middle = _most_stable(interpolant, diffusion)
    if not stable(middle):
        raise UserError(
            f"diffusion {diffusion.name!r} is too strong for {steps} explicit steps at every t: "
            f"use at least {round(rho(middle, 1.0) / largest_rho) + 1} steps or a smaller norm."
        )
    if not stable(t0):
        t0 = _crossing(stable, t0, middle)
        why0 = why0 or f"w of diffusion {diffusion.name!r} makes a step of {1 / steps:.3g} unstable before t = {t0:.3g}"
        alpha = float(coefficients_at(interpolant, t0).alpha)
        if alpha > LATEST_START:
            raise UserError(
                f"with diffusion {diffusion.name!r} and {steps} steps an explicit step is stable only from t = {t0:.3g} on, "
                f"where alpha is already {alpha:.3g}: use more steps or a smaller norm."
            )
    if end == 1 and not stable(t1):
        t1 = _crossing(stable, t1, middle)
        why1 = f"the score's 1 / sigma makes a step of {1 / steps:.3g} unstable after t = {t1:.4g}"
        sigma = float(coefficients_at(interpolant, t1).sigma)
        if sigma > LEFT_BY_END:
            raise UserError(
                f"without a last step, diffusion {diffusion.name!r} with {steps} steps is stable only up to t = {t1:.3g} "
                f"and leaves noise of {sigma:.2g} in the samples: use last_step 'tweedie', more steps, "
                "or a w that vanishes with sigma."
            )
    return Interval(t0, t1, why0, why1)


def _most_stable(interpolant: Interpolant, diffusion: Diffusion) -> float:
    """The time, to 0.01, at which the largest explicit step is stable."""
    times = torch.linspace(0.02, 0.9, 89, dtype=torch.float64)
    return float(times[stiffness(interpolant, diffusion, times, 1.0).nan_to_num(nan=float("inf")).argmin()])


def _crossing(holds: Callable[[float], bool], outside: float, inside: float) -> float:
    """The time nearest to `outside` at which a monotone condition holds; it holds at `inside`."""
    for _ in range(60):
        middle = (outside + inside) / 2
        outside, inside = (outside, middle) if holds(middle) else (middle, inside)
    return inside


def check_grid(interpolant: Interpolant, target: Target, diffusion: Diffusion | None, times: Tensor) -> None:
    """Raise UserError if a solve is singular at an end of the grid or, for an SDE, if a step is unstable."""
    for t in (float(times[0]), float(times[-1])):
        if why := singularity(interpolant, target, diffusion, t):
            raise UserError(f"{why}: start or stop elsewhere, or leave t0 and t1 unset so that they are derived.")
    if diffusion is None:
        return
    step = stiffness(interpolant, diffusion, times[:-1], times.diff())
    worst = int(step.argmax())
    if not float(step[worst]) <= RHO_GRID:
        raise UserError(
            f"diffusion {diffusion.name!r} makes step {worst} of this grid unstable (t = {float(times[worst]):.4g}, "
            f"h w / (2 sigma^2) = {float(step[worst]):.3g} > {RHO_GRID}): use more steps there, a smaller norm, "
            "or a longer last step."
        )


def finite_ends(interpolant: Interpolant, target: Target, weighting: Weighting) -> tuple[bool, bool]:
    """Return whether the target and its weight are finite at t = 0, and whether they are at t = 1."""

    def finite(t: float) -> bool:
        c = coefficients_at(interpolant, t)
        values = (*target.weights(c), weighting.weight(c, target))
        return all(float(value.abs()) < INFINITE for value in values)

    return finite(0.0), finite(1.0)


def trainable_interval(interpolant: Interpolant, target: Target, weighting: Weighting) -> tuple[float, float]:
    """Return the times (t0, t1) between which the target and its weight are finite.

    They are 0 and 1, less a `MARGIN` at each end where they are not finite.  SiT clips the training of vp-sbdm in the same
    way, at t = 1 - 1e-5, where sigma is 1e-3.
    """
    start, end = finite_ends(interpolant, target, weighting)
    return (
        0.0 if start else _start_past_singularity(interpolant),
        1.0 if end else _end_before_singularity(interpolant),
    )


def largest_weight(
    interpolant: Interpolant, target: Target, weighting: Weighting, timestep: Timestep
) -> tuple[float, float]:
    """Return the largest loss weight r(t) at 1,001 quantiles of the training times, and its time."""
    t0, t1 = trainable_interval(interpolant, target, weighting)
    times = t0 + (t1 - t0) * timestep.map(torch.linspace(0, 1, 1001, dtype=torch.float64))
    r = weighting.weight(coefficients_at(interpolant, times), target)
    # The first of equal weights, which differ by roundings.
    worst = int((r >= r.max() * (1 - 1e-9)).nonzero()[0])
    return float(r[worst]), float(times[worst])


def weight_note(weight: float, t: float) -> str:
    """Return a sentence on the largest loss weight, or "" if it is 1 at most; a large one has advice."""
    if weight <= 1 + 1e-9:
        return ""
    advice = "; few examples decide the gradient: set weight.floor, as 0.25, or use another weight"
    return f"largest loss weight {weight:.4g}, at t = {t:.4g}{advice if weight > LARGE_WEIGHT else ''}."
