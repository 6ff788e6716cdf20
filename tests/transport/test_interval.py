"""Where solves start and stop: by hand for the built-ins, and finite and stable for any steps and norm."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sitkit.registry import diffusions, interpolants, targets, timesteps, weightings
from sitkit.runtime.errors import UserError
from sitkit.transport import interval
from sitkit.transport.diffusion import Constant
from sitkit.transport.interpolant import Linear
from sitkit.transport.target import Velocity

EVERY = [
    (path, name, w)
    for path in interpolants.names()
    for name in targets.names()
    for w in diffusions.names()
    if w not in diffusions.presets()
]


def diffusion(name: str, norm: float = 1.0):
    return diffusions.create(name, norm=norm, **({"losses": ((0.0, 2.0), (1.0, 2.0))} if name == "kl-eta" else {}))


def test_ode_intervals_by_hand() -> None:
    """alpha = 1e-3 at t = 1e-3 for linear and 2e-3 / pi for gvp; vp-sbdm's alpha never vanishes and its sigma is 1e-3 at
    1 - 1e-5: SiT's own margin."""
    gvp = 2 * math.asin(1e-3) / math.pi
    table = {
        ("linear", "velocity"): (0, 1),
        ("linear", "noise"): (1e-3, 1),
        ("linear", "score"): (1e-3, 1),
        ("linear", "data"): (0, 1 - 1e-3),
        ("gvp", "velocity"): (0, 1),
        ("gvp", "noise"): (gvp, 1),
        ("gvp", "score"): (gvp, 1),
        ("gvp", "data"): (0, 1 - gvp),
        ("vp-sbdm", "velocity"): (0, 1),
        ("vp-sbdm", "data"): (0, 1 - 1e-5),
    }
    for (path, name), expected in table.items():
        derived = interval.derive_interval(interpolants.create(path), targets.create(name), None, steps=1)
        # vp-sbdm: 0.1 s + 9.95 s^2 = 1e-6 at s = 9.99e-6.
        assert (derived.t0, derived.t1) == pytest.approx(expected, abs=2e-8), (path, name)
        assert len(derived.notes) == (derived.t0 > 0) + (derived.t1 < 1)


@settings(max_examples=600)
@given(st.sampled_from(EVERY), st.integers(2, 400), st.floats(-2, 1.5), st.sampled_from([1.0, 0.96, 0.8]))
def test_derived_sde_intervals_are_finite_and_stable(
    cell: tuple[str, str, str], steps: int, power: float, end: float
) -> None:
    path, name, w = cell
    interpolant, target, form = interpolants.create(path), targets.create(name), diffusion(w, 10**power)
    try:
        derived = interval.derive_interval(interpolant, target, form, steps=steps, end=end)
    except UserError as error:
        assert "use " in str(error)
        return
    assert 0 <= derived.t0 < derived.t1 <= end
    for t in (derived.t0, derived.t1):
        assert not interval.singularity(interpolant, target, form, t)
    ends = torch.tensor([derived.t0, derived.t1], dtype=torch.float64)
    stable = interval.stiffness(interpolant, form, ends, 1 / steps)
    # Found by 60 bisections to the last bit; a fixed end of the user's is not the derivation's to move.
    assert float(stable[0]) <= interval.RHO_END * (1 + 1e-9)
    assert float(stable[1]) <= interval.RHO_END * (1 + 1e-9) or end < 1
    assert float(interval.coefficients_at(interpolant, derived.t0).alpha) <= interval.LATEST_START or derived.t0 == 0


def test_what_is_singular_is_said() -> None:
    linear = Linear()
    assert not interval.singularity(linear, Velocity(), None, 1.0)
    assert "velocity cannot be read from a noise prediction at t = 0" in interval.singularity(
        linear, targets.create("noise"), None, 0.0
    )
    assert "velocity cannot be read from a data prediction at t = 1" in interval.singularity(
        linear, targets.create("data"), None, 1.0
    )
    assert "score is not finite at t = 1" in interval.singularity(linear, Velocity(), Constant(), 1.0)
    assert "w of diffusion 'kl' is not finite at t = 0" in interval.singularity(
        linear, Velocity(), diffusion("kl"), 0.0
    )


def test_refusals_say_what_to_do() -> None:
    with pytest.raises(UserError, match=r"too strong for 10 explicit steps at every t: use at least \d+ steps"):
        interval.derive_interval(Linear(), Velocity(), Constant(1000), steps=10)
    with pytest.raises(UserError, match="use last_step 'tweedie'"):
        interval.derive_interval(Linear(), Velocity(), Constant(), steps=20)
    grid = torch.linspace(0, 0.99, 5, dtype=torch.float64)
    with pytest.raises(UserError, match=r"makes step 3 of this grid unstable"):
        interval.check_grid(Linear(), Velocity(), Constant(), grid)
    with pytest.raises(UserError, match="start or stop elsewhere, or leave t0 and t1 unset"):
        interval.check_grid(Linear(), targets.create("noise"), None, torch.tensor([0.0, 1.0]))


def test_the_number_of_steps_that_is_asked_for_is_enough() -> None:
    with pytest.raises(UserError) as refused:
        interval.derive_interval(Linear(), Velocity(), Constant(100), steps=10, end=0.96)
    steps = int(str(refused.value).split("at least ")[1].split()[0])
    try:
        interval.derive_interval(Linear(), Velocity(), Constant(100), steps=steps, end=0.96)
    except UserError as error:
        # Stable somewhere is what was promised; an end may still ask for more.
        assert "too strong" not in str(error)


@pytest.mark.parametrize("weighting", weightings.names())
def test_training_times_are_finite(weighting: str) -> None:
    for path in interpolants.names():
        for name in targets.names():
            interpolant, target, weight = interpolants.create(path), targets.create(name), weightings.create(weighting)
            t0, t1 = interval.trainable_interval(interpolant, target, weight)
            assert 0 <= t0 <= 0.002 and 0.998 <= t1 <= 1
            c = interval.coefficients_at(interpolant, torch.tensor([t0, t1], dtype=torch.float64))
            for value in (*target.weights(c), weight.weight(c, target)):
                # The steepest is the score's error of a data prediction, (alpha / sigma^2)^2 = 1e12 at the margin.
                assert bool((value.abs() <= 1.001e12).all()), (path, name)


@pytest.mark.parametrize(
    ("target", "weight", "largest", "at"),
    [("velocity", "velocity", 1, None), ("data", "velocity", 16, 0.75), ("noise", "velocity", 1e6, 1e-3)],
)
def test_the_largest_weight_of_a_training(target: str, weight: str, largest: float, at: float | None) -> None:
    path = interpolants.create("linear"), targets.create(target), weightings.create(weight)
    r, t = interval.largest_weight(*path, timesteps.create("uniform"))
    assert r == pytest.approx(largest, rel=1e-9) and (at is None or t == pytest.approx(at, abs=1e-6))
    note = interval.weight_note(r, t)
    assert bool(note) == (largest > 1) and ("weight.floor" in note) == (largest > interval.LARGE_WEIGHT)


def test_training_runs_over_all_of_time_where_it_can() -> None:
    for path in ("linear", "gvp"):
        assert interval.trainable_interval(interpolants.create(path), Velocity(), weightings.create("velocity")) == (
            0.0,
            1.0,
        )
    t0, t1 = interval.trainable_interval(interpolants.create("vp-sbdm"), Velocity(), weightings.create("velocity"))
    # SiT clips the training of vp-sbdm at 1 - 1e-5.
    assert t0 == 0 and t1 == pytest.approx(1 - 1e-5, abs=2e-8)


def test_an_sde_that_would_start_late_is_refused() -> None:
    """w = 8 (1 - t)^2 on gvp with 3 steps: h w / (2 sigma^2) = 1 at t = 1/3, where alpha = sin(pi / 6) = 0.5."""
    with pytest.raises(UserError, match="stable only from t = 0.333 on, where alpha is already 0.5: use more steps"):
        interval.derive_interval(
            interpolants.create("gvp"), Velocity(), diffusion("decreasing", 8.0), steps=3, end=0.96
        )
