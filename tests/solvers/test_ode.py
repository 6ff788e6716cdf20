"""Fixed-step ODE samplers: a method's tableau steps as torchdiffeq does, forwards, backwards and for a log-density."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from sitkit.registry import interpolants, samplers, targets
from sitkit.solvers.log_density import log_prob
from sitkit.solvers.ode import FixedStepODE, Tableau, worst_sample
from sitkit.testing import gaussian_field

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


def test_a_method_without_a_tableau_is_refused() -> None:
    @dataclass(frozen=True)
    class Nodes(FixedStepODE):
        order: ClassVar[int] = 1

    with pytest.raises(ValueError, match=r"Nodes sets no tableau: give its Butcher tableau, a sitkit\.Tableau\."):
        Nodes()


def test_the_norm_of_an_error_is_the_largest_over_all_tensors_of_a_state() -> None:
    parts = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([-1.0, 2.0]), torch.tensor([-9.0])
    assert [float(worst_sample(parts[:n])) for n in (1, 2, 3)] == pytest.approx([12.5**0.5, 12.5**0.5, 9.0])
