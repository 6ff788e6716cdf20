"""The last step of an SDE: the spread that it takes from narrow data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import sitkit
from sitkit.data.dataset import load_examples
from sitkit.models.autoencoder import median_std
from sitkit.registry import autoencoders, datasets, diffusions, interpolants, samplers, targets
from sitkit.runtime.errors import UserError
from sitkit.runtime.progress import Event
from sitkit.solvers.sampler import SolveSpec
from sitkit.testing import STD, gaussian_moments

PATHS = interpolants.names()


def spec(path: str, diffusion: Any = None) -> SolveSpec:
    return SolveSpec(interpolants.create(path), targets.create("velocity"), diffusion)


NAMES = ["euler-maruyama", "stochastic-heun"]
FORMS = ["sigma", "linear", "decreasing", "increasing-decreasing", "kl"]


@pytest.mark.parametrize("path", PATHS)
def test_a_tweedie_step_takes_what_the_posterior_mean_takes(path: str) -> None:
    """E[data | x] of N(m, s^2) has the standard deviation s alpha s / R, with R that of the state."""
    for size, std in ((0.02, STD), (0.04, 0.54), (0.1, 0.02), (0.3, STD)):
        known = {"last_step": "tweedie", "last_step_size": size, "accept_bias": True, "data_std": std}
        plan = samplers.create("euler-maruyama", **known).plan(spec(path))
        mean, state = gaussian_moments(interpolants.create(path), 1 - size, std=std)
        assert plan.spread_lost == pytest.approx(1 - mean / 0.7 * std / state, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("path", PATHS)
def test_a_last_step_that_takes_too_much_is_refused_unless_accepted(path: str, name: str) -> None:
    for size in (0.3, 0.5, 0.9):
        settings = {"steps": 250, "last_step": "tweedie", "last_step_size": size}
        with pytest.raises(UserError, match="takes .* use a smaller last_step_size, or leave it unset, or accept_bias"):
            samplers.create(name, **settings).plan(spec(path))
        assert any(
            "takes" in note for note in samplers.create(name, **settings, accept_bias=True).plan(spec(path)).notes
        )
    assert samplers.create(name, steps=250, last_step="tweedie", last_step_size=0.01).plan(spec(path)).notes == ()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("path", PATHS)
def test_the_default_size_takes_at_most_2_percent(path: str, name: str) -> None:
    """For the median of the digits, and narrower data: of 0.3 the paper's 0.04 takes 9.6 % on vp-sbdm; of 0.02, 93 %."""
    digits = median_std(autoencoders.create("identity"), load_examples(datasets.create("digits")))
    assert digits == pytest.approx(0.54, abs=0.02)
    for last in ("mean", "euler", "tweedie"):
        for form in FORMS:
            for std in (digits, 0.3, 0.02):
                sampler = samplers.create(name, last_step=last, data_std=std)
                plan = sampler.plan(spec(path, diffusions.create(form)))
                assert 0 < plan.last_step <= 0.04 and abs(plan.spread_lost) <= 0.02, (last, form, std)
                assert not any("takes" in note for note in plan.notes)


def test_the_size_of_the_paper_is_noted_or_refused_by_the_data() -> None:
    """On vp-sbdm `tweedie` takes 3.3 % of 0.54, 9.6 % of 0.3; on linear 0.3 % and 1 %."""
    paper = {"last_step": "tweedie", "last_step_size": 0.04}
    for path, std, said in (("vp-sbdm", 0.54, "takes 3.3% of a standard deviation of 0.54"), ("linear", 0.54, "")):
        plan = samplers.create("euler-maruyama", **paper, data_std=std).plan(spec(path))
        assert said in " ".join(plan.notes) and len(plan.notes) == bool(said)
    with pytest.raises(UserError, match=r"takes 9.6% of a standard deviation of 0.3: use a smaller"):
        samplers.create("euler-maruyama", **paper).plan(spec("vp-sbdm"))


def test_the_default_is_longer_where_short_ones_are_unstable_and_refused_where_that_takes_too_much() -> None:
    """A w of 1 that does not fall to 0: with 125 steps the last step must be long."""
    form = diffusions.create("constant")
    plan = samplers.create("euler-maruyama", steps=100, last_step="euler", data_std=0.3).plan(spec("ddpm", form))
    shorter = samplers.create("euler-maruyama", steps=400, last_step="euler", data_std=0.3).plan(spec("ddpm", form))
    assert plan.last_step >= shorter.last_step
    with pytest.raises(UserError, match="takes .* use more steps, or accept_bias"):
        samplers.create("euler-maruyama", last_step="tweedie", data_std=0.02).plan(spec("linear", form))


def test_samples_of_a_run_keep_the_spread_of_its_data(tmp_path: Path) -> None:
    """The plan of a run has the standard deviation of its data, which its description keeps; `check` says the same."""
    sde: Any = {"sampler": "euler-maruyama", "settings": {"sampler.last_step": "tweedie"}}
    run = sitkit.train("digits", steps=1, settings={"run.folder": str(tmp_path), "interp": "vp-sbdm"})
    recorded = json.loads((run.folder / "data.json").read_text())["std"]
    images = run.examples.read(run.examples.train).flatten(1)
    stds = images.std(0)
    # A random 1,000 of 1,707 images; the medians differ by 2.4 %.
    assert recorded == pytest.approx(float(stds[stds > 0].median()), rel=0.04)
    samples = sitkit.sample(run, n=2, **sde)
    assert 0 < samples.record["spread_lost"] <= 0.02 and samples.record["last_step"] < 0.04
    said: list[Event] = []
    sitkit.sample(
        run,
        n=2,
        sampler=sde["sampler"],
        settings={**sde["settings"], "sampler.last_step_size": 0.04},
        progress=said.append,
    )
    assert [event.message for event in said if "takes 3." in event.message]
    report = sitkit.check(str(run.folder), settings={"sampler": {"name": "euler-maruyama", "last_step": "tweedie"}})
    assert report.cells[0].spread_lost == samples.record["spread_lost"]
