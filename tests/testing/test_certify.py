"""Certificates: nothing is wrong, and a fault made on purpose is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from support import call
from torch import Tensor

from sitkit.registry import diffusions, interpolants
from sitkit.solvers import torchsde_grid
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
    assert right > 300 * len(paths) and refused <= len(certificate.verdicts) / 6
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
    assert {cell.grid for cell in every} >= {"uniform", "shift", "power", "cosine", "adapted"}
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
    assert broken.status == 1 and "0 right, 0 refused, 8 wrong" in broken.err
    for last, grid in [(last, "uniform") for last in ("none", "mean", "euler", "tweedie")] + [("tweedie", "adapted")]:
        assert f"linear velocity euler-maruyama sigma {last} {grid}: the samples lie too far out" in broken.err
    assert "declares order 1" in broken.err
    sound = call(*words, "--sampler", "stochastic-heun")
    assert sound.status == 0 and "8 right, 0 refused, 0 wrong" in sound.err


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
    verdict = Examiner(50, 64).examine(Combination("vp-sbdm", "velocity", "euler-maruyama", "kl", "mean"))
    assert verdict.verdict == "refused"
    assert "leaves noise" in verdict.reason and "tweedie" in verdict.reason
