"""Maps u -> t: the laws, quantiles by hand, and grids that are exact or refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sitkit.registry import timesteps
from sitkit.runtime.errors import UserError
from sitkit.testing import obey

CURVATURE = ((0.1, 1.0), (0.4, 9.0), (0.9, 4.0))


@pytest.mark.parametrize("name", timesteps.names())
def test_laws(name: str) -> None:
    obey(timesteps.create(name, **({"curvature": CURVATURE} if name == "adapted" else {})))


POSITIVE = st.floats(0.05, 20)


@given(st.floats(-2, 2), st.floats(0.2, 3), POSITIVE, st.floats(0.2, 5), st.integers(1, 2000))
def test_laws_for_any_fields(mean: float, std: float, shift: float, rho: float, levels: int) -> None:
    obey(timesteps.create("logit-normal", mean=mean, std=std), "increasing")
    obey(timesteps.create("shift", shift=shift), "increasing")
    obey(timesteps.create("power", rho=rho), "increasing")
    obey(timesteps.create("discrete", levels=levels), "increasing")


@given(st.dictionaries(st.integers(0, 1000), st.floats(0, 1e6), min_size=1, max_size=20))
def test_laws_for_any_curvature(bends: dict[int, float]) -> None:
    pairs = [(i / 1000, bend) for i, bend in sorted(bends.items())]
    adapted = timesteps.create("adapted", curvature=pairs)
    obey(adapted, "increasing")
    # No step is longer than ten mean ones, but for the mass that the shortest steps give up.
    assert float(adapted.grid(100, 0.0, 1.0).diff().max()) <= 10 / 100 * 2


@given(st.lists(st.integers(1, 999), min_size=1, max_size=20, unique=True))
def test_laws_for_any_explicit_times(inner: list[int]) -> None:
    obey(timesteps.create("explicit", times=[0.0, *(i / 1000 for i in sorted(inner)), 1.0]), "increasing")


def test_maps_by_hand() -> None:
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    table = {
        ("uniform", ()): u,
        ("shift", (("shift", 3.0),)): u / (3 - 2 * u),
        ("power", (("rho", 3.0),)): 1 - (1 - u) ** 3,
        ("cosine", ()): (1 - (torch.pi * u).cos()) / 2,
    }
    for (name, fields), expected in table.items():
        torch.testing.assert_close(timesteps.create(name, **dict(fields)).map(u), expected, rtol=1e-13, atol=1e-15)


def test_logit_normal_has_its_law() -> None:
    """Its quantiles are the logistic of the normal's: an independent inverse of the normal distribution function."""
    u = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    t = timesteps.create("logit-normal", mean=-0.4, std=1.3).map(u)
    expected = torch.sigmoid(torch.from_numpy(stats.norm.ppf(u.numpy(), loc=-0.4, scale=1.3)))
    # torch's erfinv is good to about 1e-15 of its argument, which is within 0.002 of its pole here.
    torch.testing.assert_close(t, expected, rtol=1e-11, atol=0)


def test_discrete_grid_hits_its_levels() -> None:
    """250 steps over 1,000 levels are every fourth level, whatever i / 250 rounds to."""
    times = timesteps.create("discrete").grid(250, 0.0, 1.0)
    assert torch.equal(times, torch.arange(0, 1001, 4, dtype=torch.float64) / 1000)
    u = torch.rand(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert timesteps.create("discrete", levels=10).map(u).unique().tolist() == [i / 10 for i in range(10)]


def test_a_grid_that_does_not_increase_is_refused() -> None:
    with pytest.raises(UserError, match="does not increase at step 0.*fewer steps"):
        timesteps.create("discrete", levels=10).grid(11, 0.0, 1.0)


def test_an_adapted_grid_by_hand() -> None:
    """Stretches [0, 0.25], [0.25, 0.65], [0.65, 1] of densities 1, 3, 2: shares 0.25, 1.2 and 0.7 of 2.15."""
    adapted = timesteps.create("adapted", curvature=CURVATURE)
    u = torch.tensor([0.1, 0.25, 1.0, 1.45, 2.0], dtype=torch.float64) / 2.15
    expected = [0.1, 0.25, 0.25 + 0.75 / 3, 0.65, 0.65 + 0.55 / 2]
    assert adapted.map(u).tolist() == pytest.approx(expected, abs=1e-12)
    # Over a part of the time the same density is shared: 0.3 to 0.5 lies in one stretch.
    assert adapted.grid(4, 0.3, 0.5).tolist() == pytest.approx([0.3, 0.35, 0.4, 0.45, 0.5], abs=1e-12)
    with pytest.raises(UserError, match=r"'adapted' needs the curvature .*sample a run"):
        timesteps.create("adapted").grid(4, 0.0, 1.0)
    for wrong in ([(0.5, 1.0), (0.4, 1.0)], [(0.5, -1.0)], [(1.5, 1.0)], [(0.5, float("inf"))]):
        with pytest.raises(UserError, match="curvature must be"):
            timesteps.create("adapted", curvature=wrong)


def test_explicit_times_are_used_or_refused() -> None:
    times = (0.1, 0.15, 0.4, 0.9)
    grid = timesteps.create("explicit", times=times)
    assert grid.grid(3, 0.0, 1.0).tolist() == list(times)
    with pytest.raises(UserError, match="3 intervals, but 4"):
        grid.grid(4, 0.0, 1.0)
    with pytest.raises(UserError, match=r"runs over \[0.1, 0.9\].*finite only within \[0.2, 1\]"):
        grid.grid(3, 0.2, 1.0)


@pytest.mark.parametrize("times", [(0.5,), (0.5, 0.5), (0.9, 0.1), (-0.1, 1.0), (0.0, 1.1), (0.0, float("nan"), 1.0)])
def test_impossible_explicit_times(times: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match=r"increasing, within \[0, 1\]"):
        timesteps.create("explicit", times=times)


@pytest.mark.parametrize(
    ("name", "fields"),
    [("logit-normal", {"std": 0}), ("shift", {"shift": -1}), ("power", {"rho": 0}), ("discrete", {"levels": 0})],
)
def test_impossible_fields(name: str, fields: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"timestep '{name}'.*must be"):
        timesteps.create(name, **fields)
