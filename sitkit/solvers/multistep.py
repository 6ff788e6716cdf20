"""Exponential multistep solvers: DPM-Solver++ (2M and its SDE) and UniPC, one network evaluation a step.

With rho = alpha / sigma (log rho is the lambda of the papers) and D the data reading, the SDE with w = tau w_kl is

    dX = (d_sigma / sigma - tau d_rho / rho) X dt + (1 + tau) sigma d_rho D dt + sqrt(w) dW,    w_kl = 2 sigma^2 d_rho / rho,

and tau = 0 is the probability-flow ODE.  Apart from D it is linear in X, so a step from (alpha_0, sigma_0) to
(alpha_1, sigma_1) is exact for a known D: with k = rho_0 / rho_1 = alpha_0 sigma_1 / (sigma_0 alpha_1)

    x_1 = (sigma_1 / sigma_0) k^tau x_0 + alpha_1 (1 - k^(1 + tau)) mean(D) + sigma_1 sqrt(1 - k^(2 tau)) xi,

where mean(D) is the mean over the step with weights d(rho^(1 + tau)).  0 <= k < 1 also at both ends of every interpolant,
where lambda is infinite; at the data end x_1 = alpha_1 mean(D).  A solver is a rule for mean(D) from its newest D: the mean
of the polynomial through them (`mean_weights`).

Sources: Lu et al. 2022 (arXiv 2211.01095), Zhao et al. 2023 (arXiv 2302.04867); derived here for any interpolant.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, final

from sitkit.registry import samplers
from sitkit.runtime.errors import UserError, require_within
from sitkit.solvers.sampler import MOST_INTERVALS, Plan, Problem, Sampler, SolveSpec, evaluations, ode_interval
from sitkit.transport.diffusion import KL, Diffusion
from sitkit.transport.interpolant import Interpolant
from sitkit.transport.timestep import Power, Timestep

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from sitkit.solvers.moments import Moments
    from sitkit.transport.interval import Interval

Variable = Literal["t", "lambda"]
# Nodes of the Gauss-Legendre rule for the moments of a step.
QUADRATURE = 32
# A line through two readings magnifies their difference by the ratio of a step to the step before.
LARGEST_RATIO = 20.0


class Reading(NamedTuple):
    """The data reading (b, ...) of one evaluation, and its time."""

    t: float
    data: Tensor


class Transition(NamedTuple):
    """x_1 = keep x_0 + gain mean(D) + noise xi."""

    keep: float
    gain: float
    noise: float


def values(interpolant: Interpolant, t: float) -> tuple[float, float]:
    """Return alpha and sigma at t, computed in float64."""
    import torch

    c = interpolant.coefficients(torch.tensor([t], dtype=torch.float64))
    return float(c.alpha), float(c.sigma)


def transition(interpolant: Interpolant, t0: float, t1: float, tau: float) -> Transition:
    """Return the exact step from t0 to t1 of the SDE with w = tau w_kl (see the docstring of the module)."""
    (alpha_0, sigma_0), (alpha_1, sigma_1) = values(interpolant, t0), values(interpolant, t1)
    k = alpha_0 * sigma_1 / (sigma_0 * alpha_1)
    return Transition(
        keep=sigma_1 / sigma_0 * k**tau,
        gain=alpha_1 * (1 - k ** (1 + tau)),
        noise=sigma_1 * math.sqrt(1 - k ** (2 * tau)),
    )


def mean_weights(
    interpolant: Interpolant, t1: float, nodes: Sequence[float], *, tau: float = 0.0, variable: Variable = "t"
) -> list[float]:
    """Return the weights of D at the nodes in mean(D) over the step from nodes[0] to t1.  They sum to 1.

    They give the exact mean, with weights d(rho^(1 + tau)), of the polynomial in `variable` through D at the nodes; for
    "lambda" and two nodes the one half of the papers.  The moments follow by integration by parts:
    mean(u^j) = (1 - j int_0^1 (rho / rho_1)^(1 + tau) u^(j-1) du) / (1 - k^(1 + tau)), u in [0, 1] along the step.
    """
    import numpy as np
    import torch

    if len(nodes) == 1:
        return [1.0]
    (alpha_0, sigma_0), (alpha_1, sigma_1) = values(interpolant, nodes[0]), values(interpolant, t1)
    k, power = alpha_0 * sigma_1 / (sigma_0 * alpha_1), 1 + tau
    u, _ = quadrature()
    if variable == "t":
        length = t1 - nodes[0]
        c = interpolant.coefficients(torch.from_numpy(nodes[0] + length * u))
        ratio = (c.alpha * sigma_1 / (c.sigma * alpha_1)).numpy() ** power
        places = [(t - nodes[0]) / length for t in nodes]
        return _fit(places, ratio, k**power)
    if k == 0:
        # lambda is infinite at an end of the step: the trapezoid if D is known at the end, else D at the start.
        first = [0.5, 0.5] if nodes[1] == t1 and alpha_0 == 0 else [1.0]
        return first + [0.0] * (len(nodes) - len(first))
    length = -math.log(k)
    lambdas = [_lambda(interpolant, t) for t in nodes]
    places = [(each - lambdas[0]) / length for each in lambdas if math.isfinite(each)]
    if len(places) < 3:
        weight = 0.5 / places[1] if len(places) == 2 else 0.0
        finite = iter([1 - weight, weight])
    else:
        finite = iter(_fit(places, np.exp(power * length * (u - 1)), k**power))
    return [next(finite) if math.isfinite(each) else 0.0 for each in lambdas]


@functools.cache
def quadrature() -> tuple[np.ndarray, np.ndarray]:
    """Return the points and the weights of the Gauss-Legendre rule on [0, 1]."""
    import numpy as np

    points, weights = np.polynomial.legendre.leggauss(QUADRATURE)
    return (points + 1) / 2, weights / 2


def _lambda(interpolant: Interpolant, t: float) -> float:
    alpha, sigma = values(interpolant, t)
    return math.log(alpha / sigma) if alpha > 0 else -math.inf


def _fit(places: Sequence[float], ratio: np.ndarray, k: float) -> list[float]:
    """Weights at `places` that give the mean over [0, 1] under d(ratio) of each polynomial with as many coefficients."""
    import numpy as np

    u, weights = quadrature()
    integrals = [float(weights @ (ratio * u ** (j - 1))) for j in range(1, len(places))]
    moments = [1.0] + [(1 - j * integral) / (1 - k) for j, integral in enumerate(integrals, 1)]
    return np.linalg.solve(np.vander(places, increasing=True).T, np.array(moments)).tolist()


@dataclass(frozen=True)
class Multistep(Sampler):
    """A sampler with one evaluation per step: mean(D) follows from the newest data readings.

    The network is not evaluated at the last time, so a solve ends at t = 1 for every target.

    Args:
        steps: the number of steps.
        grid: the places of the steps; by default finer near the data, where rho changes fastest.
        variable: the variable of the polynomial through D: "t", in which D is smooth up to both ends of every built-in
            interpolant, so the order holds on the whole of [0, 1]; or "lambda", as in the papers, whose steps are infinite
            at the ends, where the order falls.
    """

    points: ClassVar[int] = 2
    corrects: ClassVar[bool] = False

    steps: int = 50
    grid: Timestep = Power(rho=2.0)
    variable: Variable = "t"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_within(1, MOST_INTERVALS, steps=self.steps)

    def interval(self, spec: SolveSpec) -> Interval:
        """Return where the solve starts and stops.  Raises UserError for a w that the sampler does not integrate."""
        return ode_interval(self, spec)

    def plan(self, spec: SolveSpec) -> Plan:
        from sitkit.solvers.moments import require_moments
        from sitkit.transport import interval

        ends = self.interval(spec)
        ends = ends._replace(t1=1.0 if self.t1 is None else self.t1, why1="")
        times = self.grid.grid(self.steps, ends.t0, ends.t1)
        interval.check_grid(spec.interpolant, spec.target, None, times[:-1])
        growth = times.diff()[1:] / times.diff()[:-1]
        if len(growth) and float(growth.max()) > LARGEST_RATIO:
            step = int(growth.argmax()) + 1
            raise UserError(
                f"sampler {self.name!r} extrapolates over a step from the step before, but step {step} of this grid is "
                f"{float(growth.max()):.3g} times as long (at most {LARGEST_RATIO:g}): use a smoother grid."
            )
        plan = Plan(times, 0.0, evaluations(spec.guidance, times[:-1].tolist()), ends.notes)
        return require_moments(self, spec, plan)

    def moments(self, spec: SolveSpec, plan: Plan) -> Moments | None:
        import numpy as np

        from sitkit.solvers.moments import Moments, diffusion_of, gaussian_readings

        if type(self).integrate is not Multistep.integrate:
            return None
        times, tau = plan.times.tolist(), self.tau(diffusion_of(self, spec))
        # A state is a row of its constant, of the factor of x_0, and of the factor of the noise of each step.
        base = np.zeros(len(times) + 1)
        base[1] = 1.0
        x, known = base, []
        maps = [reading.data for reading in gaussian_readings(spec.interpolant, times[:-1])]

        def move(base: np.ndarray, t1: float, rows: list[tuple[float, np.ndarray]]) -> np.ndarray:
            step = transition(spec.interpolant, rows[0][0], t1, tau)
            weights = mean_weights(spec.interpolant, t1, [t for t, _ in rows], tau=tau, variable=self.variable)
            return step.keep * base + step.gain * sum(w * row for w, (_, row) in zip(weights, rows, strict=True))

        for i, ((t0, t1), data) in enumerate(zip(pairwise(times), maps, strict=True)):
            row = data.factor * x
            row[0] += data.shift
            if self.corrects and known:
                x = move(base, t0, [known[0], (t0, row), *known[1:]])
            known = [(t0, row), *known][: self.points]
            base, x = x, move(x, t1, known)
            x[2 + i] += transition(spec.interpolant, t0, t1, tau).noise if tau else 0.0
        return Moments(float(x[0]), float(np.linalg.norm(x[1:])))

    def integrate(self, problem: Problem) -> Tensor:
        import torch

        from sitkit.solvers.brownian import brownian_increments

        interpolant, times = problem.field.interpolant, problem.plan.times.tolist()
        tau = self.tau(problem.diffusion)
        # The noise of an exact step is int f dW with a deterministic f.  Its law is that of sqrt(int f^2) times the unit normal
        # (W(t1) - W(t0)) / sqrt(t1 - t0).  f varies by O(h) over a step, so a finer grid refines the same solution.
        increments = brownian_increments(problem.keys, problem.x, problem.plan.times)
        x = base = problem.x
        states: list[Tensor] = []
        known: list[Reading] = []

        def move(base: Tensor, t1: float, readings: Sequence[Reading]) -> Tensor:
            step = transition(interpolant, readings[0].t, t1, tau)
            nodes = [reading.t for reading in readings]
            weights = mean_weights(interpolant, t1, nodes, tau=tau, variable=self.variable)
            mean = torch.stack([w * reading.data for w, reading in zip(weights, readings, strict=True)]).sum(0)
            return (step.keep * base + step.gain * mean).to(base.dtype)

        for t0, t1 in pairwise(times):
            time = torch.tensor(t0, dtype=torch.float64)
            new = Reading(t0, problem.field.read(x, time, problem.y).data)
            if self.corrects and known:
                x = move(base, t0, [known[0], new, *known[1:]])
            known = [new, *known][: self.points]
            base = x
            if problem.save_trajectory:
                states.append(x)
            x = move(base, t1, known)
            if tau:
                x = x + transition(interpolant, t0, t1, tau).noise * (next(increments) / math.sqrt(t1 - t0))
        return torch.stack([*states, x]) if problem.save_trajectory else x[None]

    def tau(self, diffusion: Diffusion) -> float:
        """Return w / w_kl of the SDE, 0 for the ODE."""
        return 0.0


@final
@samplers.register("dpm++-2m")
class DPMSolver2M(Multistep):
    """DPM-Solver++(2M): the straight line through the last two data readings.  Order 2, one evaluation a step.

    With variable "lambda", mean(D) = D_0 + h / (2 h_before) (D_0 - D_before), with h the steps of lambda: the
    published formula, of order 1 in the first and the last step.
    Source: Lu et al. 2022 (arXiv 2211.01095), Algorithm 2.
    """

    order = 2


@final
@samplers.register("unipc")
class UniPC(Multistep):
    """UniPC: the step of 2M, corrected with the next data reading.  Order 3, one evaluation a step.

    The evaluation at the predicted state is used twice: the step is repeated with the polynomial through three readings,
    and the next step starts from the result.  The last step has no reading at its end and is not corrected; its error is
    of order (last step)^2, and the default grid makes this step short.
    With variable "lambda" it is the published UniPC-2 with B(h) = e^h - 1, of lower order at the ends of [0, 1].
    Source: Zhao et al. 2023 (arXiv 2302.04867), Algorithms 1 and 2.
    """

    order = 3
    corrects = True


@final
@samplers.register("dpm++-2m-sde")
@dataclass(frozen=True)
class DPMSolver2MSDE(Multistep):
    """DPM-Solver++(2M) for the SDE with w = norm w_kl (diffusion 'kl', which is its default).

    x_1 = (sigma_1 / sigma_0) k^tau x_0 + alpha_1 (1 - k^(1 + tau)) mean(D) + sigma_1 sqrt(1 - k^(2 tau)) xi, tau = norm.
    Norm 1 is that of DPM-Solver++; k-diffusion calls it eta.  No other w has a step in closed form.  If alpha = 0 at the
    start (k = 0) the first step replaces all noise: w_kl is infinite there.  The step is stable at any size, so it starts
    where the ODE starts.  The noise of a long step near the data stays in the samples, hence twice the steps of 2M.
    Source: Lu et al. 2022 (arXiv 2211.01095), section 4.3 (SDE-DPM-Solver++(2M)).
    """

    order: ClassVar[int] = 2
    stochastic: ClassVar[bool] = True

    steps: int = 100

    def interval(self, spec: SolveSpec) -> Interval:
        if not isinstance(spec.diffusion, KL | None):
            raise UserError(
                f"sampler {self.name!r} takes exact steps of the SDE with diffusion 'kl' (any norm), not of diffusion "
                f"{spec.diffusion.name!r}: use diffusion 'kl', or sampler 'euler-maruyama' or 'stochastic-heun'."
            )
        return ode_interval(self, dataclasses.replace(spec, diffusion=None))

    def default_diffusion(self) -> Diffusion:
        return KL()

    def tau(self, diffusion: Diffusion) -> float:
        return diffusion.norm
