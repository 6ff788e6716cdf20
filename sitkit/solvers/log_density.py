"""Log-density of data under the probability-flow ODE, by the instantaneous change of variables (Chen et al. 2018).

log p(x_1) = log N(x_0; 0, I) - integral over [t0, t1] of div v(x_t, t) dt along the flow from x_1 back to x_0.
The divergence is exact in low dimensions, else estimated with probes that are drawn once and kept for the whole solve:
an adaptive solver would chase the noise of fresh ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sitkit.runtime import rng
from sitkit.runtime.errors import UserError
from sitkit.solvers.ode import Dopri5, ODESampler, State
from sitkit.solvers.sampler import SolveSpec
from sitkit.transport.field import Counted, Field

EXACT_BELOW = 33


class LogDensity(NamedTuple):
    """log p (b,) in nats, the noise (b, ...) that the data flow to, network evaluations per example, probes (0: exact).

    each: log p by each probe alone, (probes, b), whose mean log p is; (1, b) where it is exact.
    """

    log_prob: Tensor
    noise: Tensor
    nfe: int
    probes: int
    each: Tensor


def log_prior(x: Tensor) -> Tensor:
    """log N(x; 0, I) = -(d log 2 pi + |x|^2) / 2: (b, ...) -> (b,), in nats."""
    return -0.5 * (x[0].numel() * math.log(2 * math.pi) + x.square().flatten(1).sum(1))


def log_prob(
    field: Field,
    data: Tensor,
    y: Tensor | None = None,
    *,
    sampler: ODESampler = Dopri5(),
    divergence: Literal["auto", "exact", "rademacher", "gaussian"] = "auto",
    probes: int = 1,
    seeds: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """log p(data | y) in nats: data (b, ...) -> (b,).  See `likelihood`, which also says what it cost."""
    return integrate_log_density(
        field, data, y, sampler=sampler, divergence=divergence, probes=probes, seeds=seeds
    ).log_prob


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
    """The log-density of data and the noise it flows to.

    divergence: "exact" (one backward pass a dimension), "rademacher" or "gaussian" (one a probe); "auto" is exact up to
    32 dimensions, else rademacher.  seeds: (b,) integers that own the probes.  Raises UserError for a sampler that is no
    ODE solver, or whose plan is refused.
    """
    if not isinstance(sampler, ODESampler):
        raise UserError("a likelihood needs an ODE sampler, such as 'dopri5' or 'heun'.")
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

    # One number for each probe and example, so that the error of an adaptive solver is the largest of an example's.
    start = (data, data.new_zeros((1 if basis is None else probes) * len(data)))
    with torch.no_grad():
        ends = sampler.solve(slope, start, times)
    x, change = ends[0][-1], ends[1][-1].view(-1, len(data))
    # Integrated backwards, from t1 to t0, `change` is minus the integral of the divergence.
    each = log_prior(x) + change
    return LogDensity(each.mean(0), x, counted.nfe, 0 if basis is None else probes, each)


def probe(data: Tensor, kind: str, count: int, seeds: Tensor | Sequence[int] | None) -> Tensor:
    """Probes (count, b, ...) with zero mean and unit covariance, owned by the examples' seeds."""
    if seeds is None:
        seeds = torch.randint(-(2**62), 2**62, (len(data),))
    keys = torch.as_tensor(seeds, dtype=torch.int64, device=data.device)
    drawn = rng.normal(keys, (count, *data.shape[1:]), rng.PROBE, data.dtype).transpose(0, 1)
    return drawn.sign() if kind == "rademacher" else drawn


def exact_divergence(velocity: Tensor, x: Tensor) -> Tensor:
    """sum_i d v_i / d x_i: (b, ...) -> (b,)."""
    flat = velocity.flatten(1)
    parts = [
        torch.autograd.grad(flat[:, i].sum(), x, retain_graph=True)[0].flatten(1)[:, i] for i in range(flat.shape[1])
    ]
    return torch.stack(parts).sum(0)


def estimated_divergences(velocity: Tensor, x: Tensor, probes: Tensor) -> Tensor:
    """e . (dv/dx) e for each probe e: (b, ...) -> (probes, b).  Its expectation is the divergence (Hutchinson 1990)."""
    parts = [(torch.autograd.grad((velocity * e).sum(), x, retain_graph=True)[0] * e).flatten(1).sum(1) for e in probes]
    return torch.stack(parts)
