"""Fixed-step ODE samplers: a method's tableau steps as torchdiffeq does, forwards, backwards and for a log-density."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from sitkit.registry import interpolants, samplers, targets
from sitkit.runtime.errors import WorkFailed
from sitkit.solvers.log_density import log_prob
from sitkit.solvers.ode import FixedStepODE, Tableau, worst_sample
from sitkit.testing import gaussian_field
from sitkit.transport.field import Field, Network

FIELD = gaussian_field(interpolants.create("gvp"), targets.create("velocity"))
NOISE = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@dataclass(frozen=True)
class Ralston(FixedStepODE):
    """A method that torchdiffeq lacks."""

    order: ClassVar[int] = 2
    tableau: ClassVar[Tableau] = Tableau(c=(0.0, 2 / 3), a=((), (2 / 3,)), b=(1 / 4, 3 / 4))


@pytest.mark.parametrize("name", ["euler", "midpoint", "heun", "rk4"])
def test_the_tableau_of_a_method_is_the_one_of_torchdiffeq(name: str) -> None:
    sampler: Any = samplers.create(name)
    c, a, b = sampler.tableau
    # The conditions of consistency; rounding of a sum of three numbers.
    assert sum(b) == pytest.approx(1) and [sum(row) for row in a] == pytest.approx(list(c))

    def slope(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return state[0] * t - state[1].sum(), state[0].sum(1).sin() + t

    start = NOISE, NOISE[:, 0]
    for times in (
        torch.linspace(0, 1, 6, dtype=torch.float64) ** 2,
        torch.tensor([1.0, 0.7, 0.1], dtype=torch.float64),
    ):
        theirs = sampler.solve(slope, start, times, every=True)
        ours = [torch.stack(values) for values in zip(*sampler.tableau.steps(slope, start, times), strict=True)]
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_tableau_alone_makes_a_sampler(steps: int) -> None:
    def slope(x: Tensor, t: float) -> Tensor:
        return FIELD.read(x, torch.tensor(t, dtype=x.dtype)).velocity

    x, h = NOISE, 1 / steps
    for t in [i / steps for i in range(steps)]:
        first = slope(x, t)
        x = x + h / 4 * (first + 3 * slope(x + 2 / 3 * h * first, t + 2 / 3 * h))
    result = Ralston(steps=steps).sample(FIELD, NOISE, trajectory=True)
    torch.testing.assert_close(result.x, x, rtol=1e-13, atol=1e-13)
    assert result.nfe == 2 * steps and result.trajectory is not None and len(result.trajectory) == steps + 1


def test_a_tableau_alone_gives_a_log_density() -> None:
    truth = log_prob(FIELD, NOISE)
    few, more = (float((log_prob(FIELD, NOISE, sampler=Ralston(steps=n)) - truth).abs().max()) for n in (50, 100))
    # Order 2: half the step, a quarter of the error.
    assert more < 0.01 and few / more == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("name", ["dopri5", "dopri8"])
def test_an_adaptive_solve_that_cannot_go_on_ends_with_one_line(name: str) -> None:
    """Weights of NaN, an explosion, and a field that oscillates too fast: t, step size and evaluations are said."""
    linear, velocity, noise = interpolants.create("linear"), targets.create("velocity"), torch.ones(2, 3)
    fields: dict[str, Network] = {
        "states are not finite": lambda x, t, y: x * float("nan"),
        "step size fell to 0|max_nfe": lambda x, t, y: x.square() * 1e6,
        "max_nfe": lambda x, t, y: (1e6 * t[:, None]).cos() * x * 1e3,
    }
    for reason, network in fields.items():
        with pytest.raises(WorkFailed, match=rf"go on at t = \d\S* \(step size \S+, \d+ evaluations\): .*({reason})"):
            samplers.create(name, max_nfe=500).sample(Field(network, linear, velocity), noise, seeds=[0, 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", samplers.names())
def test_half_precision_is_solved_in_float32(name: str, dtype: torch.dtype) -> None:
    """The samples have the noise's dtype, the network gets it, and a solve of float32 differs by the network's rounding.

    Roundings of states by 2^-9 at 250 evaluations of a mean slope below 1.5 give up to 0.01; off by 0.37 before.
    """
    exact, noise = gaussian_field(interpolants.create("linear"), targets.create("velocity")), torch.randn(8, 4)
    seen: set[torch.dtype] = set()

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.update((x.dtype, t.dtype))
        return exact.network(x, t, y)

    half = samplers.create(name).sample(exact.through(network), noise.to(dtype), seeds=range(8))
    assert half.x.dtype == dtype and seen == {dtype}
    full = samplers.create(name).sample(exact, noise.to(dtype).float(), seeds=range(8))
    assert float((half.x.float() - full.x).abs().max()) < 0.05


def test_a_number_for_a_time_is_read_in_the_precision_of_the_state() -> None:
    x = torch.ones(2, 1, dtype=torch.float64)
    field = gaussian_field(interpolants.create("gvp"), targets.create("noise"))
    assert torch.equal(field.read(x, 0.3).score, field.read(x, torch.tensor(0.3, dtype=torch.float64)).score)


def test_the_error_of_an_adaptive_step_is_that_of_the_worst_sample() -> None:
    """Samples that are easy do not hide one that is hard: it takes the steps that it takes alone."""
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert float(worst_sample((x,))) == pytest.approx(12.5**0.5)
    hard, easy = torch.full((1, 2), 50.0, dtype=torch.float64), torch.full((999, 2), 0.0, dtype=torch.float64)
    for name in ("dopri5", "dopri8"):
        alone = samplers.create(name).sample(FIELD, hard)
        among = samplers.create(name).sample(FIELD, torch.cat((hard, easy)))
        assert among.nfe == alone.nfe != samplers.create(name).sample(FIELD, easy).nfe
        # The first step depends on the batch, and every step errs by at most the tolerance.
        torch.testing.assert_close(among.x[:1], alone.x, rtol=1e-5, atol=0)


def test_a_method_without_a_tableau_is_refused() -> None:
    @dataclass(frozen=True)
    class Nodes(FixedStepODE):
        order: ClassVar[int] = 1

    with pytest.raises(ValueError, match=r"Nodes sets no tableau: give its Butcher tableau, a sitkit\.Tableau\."):
        Nodes()


def test_the_norm_of_an_error_is_the_largest_over_all_tensors_of_a_state() -> None:
    parts = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([-1.0, 2.0]), torch.tensor([-9.0])
    assert [float(worst_sample(parts[:n])) for n in (1, 2, 3)] == pytest.approx([12.5**0.5, 12.5**0.5, 9.0])
