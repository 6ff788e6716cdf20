"""Certificates: nothing is wrong, and a fault made on purpose is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from support import call
from torch import Tensor

from sitkit.registry import diffusions, interpolants, timesteps
from sitkit.solvers import moments, sde, torchsde_grid
from sitkit.testing.certify import cells, certify
from sitkit.testing.examiner import Combination, Examiner
from sitkit.transport.diffusion import Diffusion
from sitkit.transport.interpolant import Coefficients


# The log alpha of ddpm lies within 0.033 of vp-sbdm's everywhere, so its cells are among the slow tests.
@pytest.mark.parametrize("paths", [("linear", "gvp", "vp-sbdm"), pytest.param(("ddpm",), marks=pytest.mark.slow)])
def test_nothing_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str], paths: tuple[str, ...]) -> None:
    certificate = certify(interp=paths, quick=True, out=tmp_path)
    with capsys.disabled():
        right, refused = certificate.count("right"), certificate.count("refused")
        print(f"\n{right} right, {refused} refused, {len(certificate.wrong)} wrong in {certificate.seconds:.0f} s")
    assert certificate.wrong == []
    # A certificate of refusals alone would have nothing wrong either.
    usual = [v.verdict for v in certificate.verdicts if not v.cell.settings]
    assert right > 300 * len(paths) and usual.count("refused") <= len(usual) / 6
    # A refusal says what to do instead.
    reasons = [v.reason for v in certificate.verdicts if v.verdict == "refused"]
    assert [reason for reason in reasons if "use " not in reason and "needs " not in reason] == []
    assert (tmp_path / "certificate.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "certificate.json").read_text())["right"] == right


@pytest.mark.slow
def test_nothing_is_wrong_with_the_default_steps(tmp_path: Path) -> None:
    assert certify(interp="gvp", target="velocity", out=tmp_path).wrong == []


def test_every_axis_is_crossed() -> None:
    every = list(cells({}))
    assert len(every) == len(set(every))
    assert {cell.last_step for cell in every} == {"", "none", "mean", "euler", "tweedie"}
    assert {cell.grid for cell in every} == set(timesteps.names())
    chosen = list(cells({"interp": ["gvp"], "sampler": ["heun"]}))
    assert {(cell.interpolant, cell.sampler) for cell in chosen} == {("gvp", "heun")}


def test_noise_of_twice_the_w_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Noise of 2 w with the drift of w widens the samples: every cell of torchsde's sampler is named, and no other's."""
    honest = torchsde_grid.StepIndexSDE.f_and_g

    def doubled(self: torchsde_grid.StepIndexSDE, s: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        drift, diffusion = honest(self, s, x)
        return drift, 2**0.5 * diffusion

    monkeypatch.setattr(torchsde_grid.StepIndexSDE, "f_and_g", doubled)
    axes = ("--interp", "linear", "--target", "velocity", "--diffusion", "sigma")
    words = ("certify", "--quick", "--out", tmp_path, *axes)
    broken = call(*words, "--sampler", "euler-maruyama")
    assert broken.status == 1 and "0 right, 4 refused, 10 wrong" in broken.err
    for last, grid in [(last, "uniform") for last in ("none", "mean", "euler", "tweedie")] + [("tweedie", "adapted")]:
        assert f"linear velocity euler-maruyama sigma {last} {grid}: the samples lie too far out" in broken.err
    assert "declares order 1" in broken.err
    sound = call(*words, "--sampler", "stochastic-heun")
    assert sound.status == 0 and " 0 wrong" in sound.err


def test_twice_the_w_keeps_the_marginals() -> None:
    """Every w keeps the marginals, and a doubled w equals the same w with norm = 2."""

    @dataclasses.dataclass(frozen=True)
    class Twice(Diffusion):
        def w(self, t: Tensor, c: Coefficients) -> Tensor:
            return 2 * c.sigma

    examiner = Examiner(500, 64)
    single = examiner.examine(Combination("gvp", "noise", "euler-maruyama", "sigma", "tweedie"))
    assert single.verdict == "right"
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    c = interpolants.create("gvp").coefficients(t)
    assert torch.equal(Twice().w(t, c), diffusions.create("sigma", norm=2.0).w(t, c))


def test_refusals_come_before_the_solve() -> None:
    verdict = Examiner(50, 250).examine(Combination("linear", "velocity", "euler-maruyama", "constant", "mean"))
    assert verdict.verdict == "refused"
    assert "leaves noise" in verdict.reason and "tweedie" in verdict.reason


def verdicts(*combinations: Combination) -> set[str]:
    """The verdicts of a new examiner, which has no plan of before."""
    examiner = Examiner(200, 64)
    return {examiner.examine(combination).verdict for combination in combinations}


def test_a_span_of_a_part_of_the_path_is_refused_and_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """From t = 0.5 the standard deviation of N(0.7, 0.3^2) is 0.57; an end at t = 0.5 is half noise."""
    parts = [
        Combination("linear", "velocity", name, *form, settings=part)
        for name, form in (("heun", ()), ("unipc", ()), ("dopri5", ()), ("euler-maruyama", ("sigma", "none")))
        for part in ((("t0", 0.5),), (("t1", 0.5),))
    ]
    assert set(parts) <= set(cells({}))
    assert verdicts(*parts) == {"refused"}
    monkeypatch.setattr(moments, "_require_span", lambda *_: None)
    assert verdicts(*parts) == {"wrong"}


def test_a_last_step_that_takes_spread_is_refused_and_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `tweedie` 0.04 takes 9.6 % of 0.3 on vp-sbdm, and 0.5 more on every path."""
    usual = [Combination("vp-sbdm", "velocity", "euler-maruyama", "sigma", "tweedie")]
    long = [dataclasses.replace(cell, settings=(("last_step_size", 0.5),)) for cell in usual]
    assert {*usual, *long} <= set(cells({}))
    assert verdicts(*usual) == {"right"} and verdicts(*long) == {"refused"}
    monkeypatch.setattr(sde.SDESampler, "_judge_last_step", lambda self, spec, plan: plan)
    assert verdicts(*long) == {"wrong"}
    monkeypatch.setattr(sde, "LAST_STEPS", [0.04])
    assert verdicts(*usual) == {"wrong"}


def test_a_grid_that_leaves_noise_is_refused_and_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """On `logit-normal` the long last step of the multistep SDE leaves its noise: a standard deviation of 0.34 to 0.49."""
    grids = [Combination(path, "velocity", "dpm++-2m-sde", grid="logit-normal") for path in ("linear", "vp-sbdm")]
    assert set(grids) <= set(cells({}))
    assert verdicts(*grids) == {"refused"}
    monkeypatch.setattr(moments, "_require_grid", lambda *_: None)
    assert verdicts(*grids) == {"wrong"}


def test_a_small_norm_of_the_kl_diffusion_is_right_and_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first step with h w / (2 sigma^2) = 1 widens the samples by 12 to 24 %."""
    norms = [
        Combination(path, "velocity", "euler-maruyama", "kl", "tweedie", settings=(("norm", 0.1),))
        for path in ("linear", "gvp")
    ]
    assert set(norms) <= set(cells({}))
    assert verdicts(*norms) == {"right"}
    monkeypatch.setattr(sde, "LATER_STARTS", ())
    assert verdicts(*norms) == {"wrong"}


def test_the_paths_of_a_sampler_are_compared_with_its_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that is 10 % too large widens the samples by a few percent."""
    honest = torchsde_grid.StepIndexSDE.f_and_g

    def wider(self: torchsde_grid.StepIndexSDE, s: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        drift, diffusion = honest(self, s, x)
        return drift, 1.1 * diffusion

    cell = Combination("linear", "velocity", "euler-maruyama", "sigma", "tweedie")
    assert verdicts(cell) == {"right"}
    monkeypatch.setattr(torchsde_grid.StepIndexSDE, "f_and_g", wider)
    result = Examiner(200, 64).examine(cell)
    assert result.verdict == "wrong" and "the standard deviation of a Gaussian is" in result.reason
