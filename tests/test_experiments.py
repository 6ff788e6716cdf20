"""The studies that come with sitkit: what they say of the paper, and that every cell of them can be."""

from __future__ import annotations

from pathlib import Path

import pytest

from sitkit.ablate import Cell, read_study, trainings

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
# Ma et al. 2024 (arXiv 2401.08740 v2), Tables 2 to 6, row by row, typed from the paper.
PAPER = {
    "table2": [44.2, 43.6],
    "table3": [43.6, 39.1, 39.8],
    "table4": [39.8, 34.8, 34.6],
    "table5": [39.8, 37.8, 34.8, 33.6, 34.6, 32.9],
    "table6": [
        *(37.8, 38.7, 39.2, 41.1),
        *(35.7, 37.1, 37.7, 38.9),
        *(32.9, 33.4, 33.6, 33.2),
        *(37.8, 33.5, 33.2, 33.3),
        *(33.6, 33.5, 33.3, 33.0),
        *(41.0, 35.3, 34.4, 34.9),
    ],
}
TRAININGS = {"table2": 2, "table3": 3, "table4": 3, "table5": 3, "table6": 6}


def cells_of(name: str, base: str | None = None) -> list[Cell]:
    return read_study(EXPERIMENTS / f"{name}.yaml", base=base)[1]


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("base", [None, "imagenet256"])
def test_rows_and_reference_numbers(name: str, base: str | None) -> None:
    cells = cells_of(name, base)
    assert [cell.paper for cell in cells] == PAPER[name]
    assert len(trainings(cells)) == TRAININGS[name]


def test_every_file_is_known() -> None:
    studies = {path.stem for path in EXPERIMENTS.glob("table*.yaml")}
    assert studies == set(PAPER)


def test_objectives_are_the_papers() -> None:
    """L_s is the noise space of the score, L_s-lambda its velocity space, L_N the noise at 1,000 discrete times."""
    discrete, continuous = cells_of("table2")
    assert (discrete.config.target.name, discrete.config.weight.name) == ("noise", "noise")
    assert discrete.config.timestep.name == "discrete" and continuous.config.timestep.name == "uniform"
    table3 = [(cell.config.target.name, cell.config.weight.name) for cell in cells_of("table3")]
    assert table3 == [("score", "noise"), ("score", "velocity"), ("velocity", "velocity")]
    assert {cell.config.interp.name for cell in cells_of("table3")} == {"vp-sbdm"}
    diffusions = [cell.config.diffusion.name for cell in cells_of("table6")[:4]]
    assert diffusions == ["kl", "sigma", "increasing-decreasing", "kl-eta"]


def test_imagenet_settings_are_the_papers() -> None:
    for cell in cells_of("table6", "imagenet256"):
        train, sampler = cell.config.train, cell.config.sampler
        assert (train.steps, train.batch, train.lr, train.weight_decay, train.ema) == (400_000, 256, 1e-4, 0.0, 0.9999)
        assert cell.config.sample.n == 50_000
        plan = sampler.plan(cell.config.interp, cell.config.target)
        assert plan.nfe == 250 and plan.last_step == 0.04
    for cell in cells_of("table4", "imagenet256"):
        assert cell.config.sampler.plan(cell.config.interp, cell.config.target).nfe == 250
