"""Certificates: nothing is wrong, and what is broken on purpose is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sitkit import stepindex
from sitkit.certify import Cell, Examiner, cells, certify
from sitkit.diffusion import Diffusion
from sitkit.interpolant import Coefficients
from sitkit.sampler import Problem


def test_nothing_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    certificate = certify(quick=True, folder=tmp_path)
    with capsys.disabled():
        right, refused = certificate.count("right"), certificate.count("refused")
        print(f"\n{right} right, {refused} refused, {len(certificate.wrong)} wrong in {certificate.seconds:.0f} s")
    assert certificate.wrong == []
    assert right > 900
    assert all(v.reason for v in certificate.verdicts if v.verdict == "refused")
    assert (tmp_path / "certificate.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "certificate.json").read_text())["right"] == right


def test_every_axis_is_crossed() -> None:
    every = list(cells({}))
    assert len(every) == len(set(every))
    assert {cell.last_step for cell in every} == {"", "none", "mean", "euler", "tweedie"}
    assert {cell.grid for cell in every} >= {"uniform", "shift", "power", "cosine", "adapted"}
    chosen = list(cells({"interp": ["gvp"], "sampler": ["heun"]}))
    assert {(cell.interpolant, cell.sampler) for cell in chosen} == {("gvp", "heun")}


def test_a_factor_of_two_in_the_drift_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchsde's drift with w s in place of w s / 2 narrows the samples; every w > 0 shows it, w = 0 does not."""
    honest = stepindex.StepIndexSDE.f_and_g

    def doubled(self: stepindex.StepIndexSDE, s: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        drift, diffusion = honest(self, s, x)
        index = int(s)
        problem: Problem = self.problem
        t = problem.plan.times[index]
        h = problem.plan.times[index + 1] - t
        reading = problem.field.read(x.view_as(problem.x), t, problem.y)
        w = problem.diffusion.w(t, problem.field.interpolant.coefficients(t))
        return drift + (h * w / 2 * reading.score).flatten(1), diffusion

    monkeypatch.setattr(stepindex.StepIndexSDE, "f_and_g", doubled)
    examiner = Examiner(500, 64)
    verdicts = {
        w: examiner.examine(Cell("linear", "velocity", "euler-maruyama", w, "tweedie")) for w in ("sin2", "sigma")
    }
    assert {w: v.verdict for w, v in verdicts.items()} == {"sin2": "wrong", "sigma": "wrong"}
    assert "evaluations" not in verdicts["sigma"].reason or verdicts["sigma"].nfe
    assert examiner.examine(Cell("linear", "velocity", "stochastic-heun", "sigma", "tweedie")).verdict == "right"


def test_a_factor_of_two_in_w_alone_keeps_the_law() -> None:
    """Any w keeps the marginals, so a doubled w is right, and is what it says: norm = 2."""

    @dataclasses.dataclass(frozen=True)
    class Twice(Diffusion):
        def w(self, t: Tensor, c: Coefficients) -> Tensor:
            return 2 * c.sigma

    examiner = Examiner(500, 64)
    single = examiner.examine(Cell("gvp", "noise", "euler-maruyama", "sigma", "tweedie"))
    assert single.verdict == "right"
    from sitkit.registry import diffusions, interpolants

    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    c = interpolants.create("gvp").coefficients(t)
    assert torch.equal(Twice().w(t, c), diffusions.create("sigma", norm=2.0).w(t, c))


def test_refusals_come_before_the_solve() -> None:
    verdict = Examiner(50, 64).examine(Cell("vp-sbdm", "velocity", "euler-maruyama", "kl", "mean"))
    assert verdict.verdict == "refused"
    assert "leaves noise" in verdict.reason and "tweedie" in verdict.reason
