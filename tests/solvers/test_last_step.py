"""The last step of an SDE: the spread that it takes from narrow data."""

from __future__ import annotations

from typing import Any

import pytest

from sitkit.registry import interpolants, samplers, targets
from sitkit.runtime.errors import UserError
from sitkit.solvers.sampler import SolveSpec
from sitkit.testing import STD, gaussian_moments

PATHS = interpolants.names()


def spec(path: str) -> SolveSpec:
    return SolveSpec(interpolants.create(path), targets.create("velocity"))


@pytest.mark.parametrize("path", PATHS)
def test_a_tweedie_step_takes_what_the_posterior_mean_takes(path: str) -> None:
    """E[data | x] of N(m, s^2) has the standard deviation s alpha s / R, with R that of the state."""
    for size in (0.02, 0.04, 0.1, 0.3):
        sampler: Any = samplers.create("euler-maruyama", last_step="tweedie", last_step_size=size, accept_bias=True)
        plan = sampler.plan(spec(path))
        mean, state = gaussian_moments(interpolants.create(path), 1 - size)
        assert sampler.spread_lost(spec(path), plan) == pytest.approx(1 - mean / 0.7 * STD / state, abs=1e-12)


@pytest.mark.parametrize("name", ["euler-maruyama", "stochastic-heun"])
@pytest.mark.parametrize("path", PATHS)
def test_a_last_step_that_takes_too_much_is_refused_unless_accepted(path: str, name: str) -> None:
    for size in (0.3, 0.5, 0.9):
        settings = {"steps": 250, "last_step": "tweedie", "last_step_size": size}
        with pytest.raises(UserError, match="takes .* use a smaller last_step_size, or accept_bias"):
            samplers.create(name, **settings).plan(spec(path))
        assert any(
            "takes" in note for note in samplers.create(name, **settings, accept_bias=True).plan(spec(path)).notes
        )
    assert samplers.create(name, steps=250, last_step="tweedie", last_step_size=0.01).plan(spec(path)).notes == ()


def test_the_default_size_is_run_and_said() -> None:
    """0.04 takes 9.6 % with `tweedie` on vp-sbdm and 1 % on linear."""
    for path, said in (("vp-sbdm", "takes 9.6%"), ("linear", "")):
        notes = samplers.create("euler-maruyama", last_step="tweedie").plan(spec(path)).notes
        assert said in " ".join(notes) and len(notes) == bool(said)
