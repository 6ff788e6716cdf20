"""Log-density of data under the probability-flow ODE, by the instantaneous change of variables (Chen et al. 2018).

log p(x_1) = log N(x_0; 0, I) - integral over [t0, t1] of div v(x_t, t) dt along the flow from x_1 back to x_0.
The divergence is exact in low dimensions, else estimated with probes that are the same for the whole solve: with fresh
probes an adaptive solver would shorten its steps because of their noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from sitkit.runtime import rng
from sitkit.runtime.errors import UserError
from sitkit.solvers.ode import Dopri5, ODESampler, State
from sitkit.solvers.sampler import SolveSpec, keys_of
from sitkit.transport.field import Counted, Field

EXACT_BELOW = 33


class LogDensity(NamedTuple):
    """The log-density of data under the probability-flow ODE, and its cost.

    Args:
        log_prob: (b,), in nats: the mean of `each` over probes.
        noise: (b, ...), the noise that the data flow to.
        nfe: network evaluations per example.
        probes: the number of probes of the divergence; 0 if it is exact.
        each: (probes, b), log p by each probe alone; (1, b) if the divergence is exact.
    """

    log_prob: Tensor
    noise: Tensor
    nfe: int
    probes: int
    each: Tensor


class DensitySettings(TypedDict, total=False):
    """Settings of `integrate_log_density`, each with a default."""

    sampler: ODESampler
    divergence: Literal["auto", "exact", "rademacher", "gaussian"]
    probes: int
    seeds: Tensor | Sequence[int] | None


def log_prior(x: Tensor) -> Tensor:
    """Return log N(x; 0, I) = -(d log 2 pi + |x|^2) / 2: (b, ...) -> (b,), in nats."""
    return -0.5 * (x[0].numel() * math.log(2 * math.pi) + x.square().flatten(1).sum(1))


def log_prob(field: Field, data: Tensor, y: Tensor | None = None, **settings: Unpack[DensitySettings]) -> Tensor:
    """Return log p(data | y) under the probability-flow ODE of a field.

    Args:
        field: the network with its interpolant and target.
        data: (b, ...), the examples.
        y: (b,) int64, the labels; None is the null class.
        sampler: the ODE sampler, `dopri5` by default.
        divergence: "exact" (one backward pass per dimension), "rademacher" or "gaussian" (one per probe); "auto", the
            default, is exact up to 32 dimensions, else rademacher.
        probes: the number of random probes of the divergence, 1 by default.
        seeds: (b,) integers, to which the probes belong; by default fresh ones from torch's global generator.

    Returns:
        (b,), in nats.

    Raises:
        UserError: for a sampler that does not solve an ODE, or a solve that its plan refuses.

    Source: Chen et al. 2018 (arXiv 1806.07366), Eq. 8; Hutchinson's estimate as in FFJORD (arXiv 1810.01367).
    """
    return integrate_log_density(field, data, y, **settings).log_prob


def integrate_log_density(
    field: Field,
    data: Tensor,
    y: Tensor | None = None,
    *,
    sampler: ODESampler = Dopri5(),
    divergence: Literal["auto", "exact", "rademacher", "gaussian"] = "auto",
    probes: int = 1,
    seeds: Tensor | Sequence[int] | None = None,
) -> LogDensity:
    """Return the log-density of data, the noise that they flow to, and the cost.  Parameters as in `log_prob`."""
    if not isinstance(sampler, ODESampler):
        raise UserError("a likelihood needs an ODE sampler, such as 'dopri5' or 'heun'.")
    if sampler.partial:
        raise UserError("a likelihood needs the whole path from data to noise: leave sampler.partial unset.")
    if probes < 1:
        raise UserError(f"probes must be at least 1; got {probes}.")

    size = data[0].numel()
    exact = divergence == "exact" or (divergence == "auto" and size < EXACT_BELOW)
    basis = None if exact else probe(data, "rademacher" if divergence == "auto" else divergence, probes, seeds)
    times = sampler.plan(SolveSpec(field.interpolant, field.target)).times.to(data).flip(0)
    counted = Counted(field.network, len(data))
    counting = field.through(counted)
    labels = counting.labels(y, data)

    def slope(t: Tensor, state: State) -> State:
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            velocity = counting.read(x, t, labels).velocity
            div = exact_divergence(velocity, x)[None] if basis is None else estimated_divergences(velocity, x, basis)
        return velocity.detach(), div.flatten()

    # One number for each probe and example: the error of an adaptive solver is the largest over them.
    start = (data, data.new_zeros((1 if basis is None else probes) * len(data)))
    with torch.no_grad():
        ends = sampler.solve(slope, start, times)
    x, change = ends[0][-1], ends[1][-1].view(-1, len(data))
    # Integrated backwards, from t1 to t0, `change` is minus the integral of the divergence.
    each = log_prior(x) + change
    return LogDensity(each.mean(0), x, counted.nfe, 0 if basis is None else probes, each)


def probe(data: Tensor, kind: str, count: int, seeds: Tensor | Sequence[int] | None) -> Tensor:
    """Return probes (count, b, ...) of zero mean and unit covariance.  The probes of an example belong to its seed."""
    normal = rng.normal(keys_of(seeds, data), (count, *data.shape[1:]), rng.PROBE, data.dtype).transpose(0, 1)
    return normal.sign() if kind == "rademacher" else normal


def exact_divergence(velocity: Tensor, x: Tensor) -> Tensor:
    """Return sum_i d v_i / d x_i: (b, ...) -> (b,)."""
    flat = velocity.flatten(1)
    parts = [
        torch.autograd.grad(flat[:, i].sum(), x, retain_graph=True)[0].flatten(1)[:, i] for i in range(flat.shape[1])
    ]
    return torch.stack(parts).sum(0)


def estimated_divergences(velocity: Tensor, x: Tensor, probes: Tensor) -> Tensor:
    """Return e . (dv/dx) e for each probe e: (b, ...) -> (probes, b); the mean is the divergence (Hutchinson 1990)."""
    parts = [(torch.autograd.grad((velocity * e).sum(), x, retain_graph=True)[0] * e).flatten(1).sum(1) for e in probes]
    return torch.stack(parts)
