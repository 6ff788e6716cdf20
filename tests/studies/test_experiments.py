"""The paper's tables: every file reads, is possible at the digits' size, and carries the paper's own numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import ROOT, published, trainings

from sitkit.runs.config.sources import assemble, read_config, read_yaml
from sitkit.studies.status import study_notes
from sitkit.studies.study import Cell
from sitkit.studies.study_file import read_study

FOLDER = ROOT / "experiments"
TABLES = sorted(FOLDER.glob("table*.yaml"))

# SiT, arXiv 2401.08740 v2, as printed: (interpolant, target, weight, timestep) -> FID-50K of the ODE.
VP, LINEAR, GVP = "vp-sbdm", "linear", "gvp"
DDPM, SCORE, LAMBDA, VELOCITY = [
    (VP, "noise", "noise", "discrete"), (VP, "score", "noise", "uniform"), (VP, "score", "velocity", "uniform"),
    (VP, "velocity", "velocity", "uniform"),
]  # fmt: skip
ON_LINEAR, ON_GVP = ((interp, *VELOCITY[1:]) for interp in (LINEAR, GVP))
ODE_FID: dict[tuple[str, ...], float] = {
    DDPM: 44.2,
    SCORE: 43.6,
    LAMBDA: 39.1,
    VELOCITY: 39.8,
    ON_LINEAR: 34.8,
    ON_GVP: 34.6,
}
SDE_FID = {VELOCITY: 37.8, ON_LINEAR: 33.6, ON_GVP: 32.9}
TABLE6 = {
    (VP, "velocity", "velocity"): (37.8, 38.7, 39.2, 41.1),
    (VP, "score", "velocity"): (35.7, 37.1, 37.7, 38.9),
    (GVP, "velocity", "velocity"): (32.9, 33.4, 33.6, 33.2),
    (GVP, "score", "noise"): (37.8, 33.5, 33.2, 33.3),
    (LINEAR, "velocity", "velocity"): (33.6, 33.5, 33.3, 33.0),
    (LINEAR, "score", "noise"): (41.0, 35.3, 34.4, 34.9),
}


def by_ode(*models: tuple[str, ...]) -> dict[tuple[str, ...], float]:
    return {(*model, "heun", "zero"): ODE_FID[model] for model in models}


# (interpolant, target, weight, timestep, sampler, diffusion) -> FID-50K of each cell.
PRINTED = {
    "table2": by_ode(DDPM, SCORE),
    "table3": by_ode(SCORE, LAMBDA, VELOCITY),
    "table4": by_ode(VELOCITY, ON_LINEAR, ON_GVP),
    "table5": by_ode(*SDE_FID) | {(*model, "euler-maruyama", "kl"): fid for model, fid in SDE_FID.items()},
    "table6": {
        (*model, "uniform", "euler-maruyama", w): fid
        for model, fids in TABLE6.items()
        for w, fid in zip(("kl", "sigma", "increasing-decreasing", "kl-eta"), fids, strict=True)
    },
}
# Read by eye from Figure 5 of version 1: evaluations -> FID-10K.
FIGURE5 = {
    "ODE": {16: 42.2, 32: 38.7, 64: 37.8, 128: 37.55, 256: 37.5, 512: 37.5, 1024: 37.5},
    "SDE, sigma": {64: 39.1, 128: 37.1, 256: 35.7, 512: 36.0, 1024: 35.3},
    "SDE, kl": {128: 38.9, 256: 35.8, 512: 34.5, 1024: 34.8},
    "SDE, sin2": {64: 41.1, 128: 37.2, 256: 35.7, 512: 34.7, 1024: 34.6},
    "SDE, kl-eta": {},
}
SEEDS = {"digits": 3, "imagenet256": 1}
TRAININGS = {"table2": 2, "table3": 3, "table4": 3, "table5": 3, "table6": 6}


def setting(cell: Cell) -> tuple[str, ...]:
    config = cell.config
    parts = (config.interp, config.target, config.weight, config.timestep, config.sampler, config.diffusion)
    return tuple(part.name for part in parts)


def test_the_files_are_the_tables() -> None:
    assert [path.stem for path in TABLES] == sorted(PRINTED)


@pytest.mark.parametrize("base", [None, "digits", "imagenet256"])
@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_cell_is_possible_and_has_the_number_of_the_paper(path: Path, base: str | None) -> None:
    plan = read_study(path, base=base)
    study, cells = plan.study, plan.cells
    seeds = SEEDS[base or "digits"]
    assert {setting(cell): published(cell) for cell in cells} == PRINTED[path.stem]
    assert len(cells) == seeds * len(PRINTED[path.stem]) and len(trainings(cells)) == seeds * TRAININGS[path.stem]
    assert path.stem[-1] in study.title and "SiT Table " + path.stem[-1] in study.source
    metrics = {cell.config.metric for cell in cells}
    features = "inception" if base == "imagenet256" else "run-classifier"
    assert [(m.name, getattr(m, "features", m).name) for (m,) in metrics] == [("frechet", features)]


@pytest.mark.parametrize("path", [*TABLES, FOLDER / "figure5.yaml"], ids=lambda path: path.stem)
def test_the_footnotes_say_how_our_setting_differs_from_that_of_the_paper(path: Path) -> None:
    ours, theirs = study_notes(read_study(path))
    assert "frechet on run-classifier of digits, 1000 samples" in ours
    size = 10_000 if path.stem == "figure5" else 50_000
    for words in ("data digits (theirs ImageNet 256)", "train.steps 1200 (theirs 400000)", "backbone ", "train.batch 64",
                  f"sample.n 1000 (theirs {size})", "features run-classifier (theirs inception)"):  # fmt: skip
        assert words in theirs
    assert "Ours differ" not in study_notes(read_study(path, base="imagenet256"))[1]


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_the_cells_differ_only_in_what_the_table_names(path: Path) -> None:
    cells = read_study(path).cells
    plain = [cell.config.plain() for cell in cells]
    same = ("coupling", "backbone", "autoencoder", "data", "guidance", "sample", "metric", "run")
    assert all(other[key] == plain[0][key] for other in plain for key in same)
    assert all({**other["train"], "seed": 0} == plain[0]["train"] for other in plain)
    assert plain[0]["metric"][0]["name"] == "frechet" and plain[0]["data"]["name"] == "digits"
    assert cells[0].config.train == assemble([read_config("digits")]).train


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_all_samplers_of_a_table_spend_the_same(path: Path) -> None:
    for base, spent in ((None, 50), ("imagenet256", 250)):
        cells = read_study(path, base=base).cells
        for cell in cells:
            # kl-eta's plan needs the losses of a training; its grid is that of the others.
            if cell.config.diffusion.name != "kl-eta":
                plan = cell.config.sampler.plan(cell.config.solve_spec)
                assert plan.nfe == spent, (setting(cell), plan.nfe)


@pytest.mark.parametrize("base", ["digits", "imagenet256"])
def test_figure_5_has_a_curve_for_each_sampler_at_the_evaluations_of_its_columns(base: str) -> None:
    plan = read_study(FOLDER / "figure5.yaml", base=base)
    study, cells = plan.study, plan.cells
    assert "by eye" in study.source and "FID-10K" in study.source
    assert {cell.row for cell in cells} == set(FIGURE5) and len(trainings(cells)) == SEEDS[base]
    columns = {int(cell.column) for cell in cells}
    assert columns == {8, 16, 32, 64, 128} if base == "digits" else columns == {16, 32, 64, 128, 256, 512, 1024}
    for cell in cells:
        config = cell.config
        assert (config.interp.name, config.target.name, config.weight.name) == (LINEAR, "velocity", "velocity")
        assert published(cell) == FIGURE5[cell.row].get(int(cell.column))
        assert config.sampler.stochastic == (cell.row != "ODE")
        if config.diffusion.name != "kl-eta":
            assert config.sampler.plan(config.solve_spec).nfe == int(cell.column)
    assert {cell.config.sample.n for cell in cells} == {1000 if base == "digits" else 10_000}


def test_studies_share_their_trainings() -> None:
    """Eight models make all the tables and the figure."""
    unique: dict[str, object] = {}
    for path in [*TABLES, FOLDER / "figure5.yaml"]:
        unique |= trainings(read_study(path).cells)
    assert len(unique) == 8 * SEEDS["digits"]


def test_the_large_base_has_the_settings_of_the_paper() -> None:
    config = assemble([read_config("imagenet256")])
    train = config.train
    assert (train.steps, train.batch, train.lr, train.weight_decay, train.ema) == (400_000, 256, 1e-4, 0.0, 0.9999)
    assert (train.betas, train.warmup, train.clip, config.sample.n) == ((0.9, 0.999), 0, None, 50_000)
    assert config.backbone == assemble([]).backbone  # sit-b/2
    assert (config.data.name, config.autoencoder.name, config.sample.labels) == ("latents", "sd-vae", "random")


def test_experiments_hold_settings_and_no_code() -> None:
    assert {path.name for path in FOLDER.iterdir() if path.suffix != ".yaml"} == {"RESULTS.md"}
    for path in FOLDER.glob("*.yaml"):
        assert read_yaml(path).values


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_the_results_have_every_cell_beside_the_number_of_the_paper(path: Path) -> None:
    text = (FOLDER / "RESULTS.md").read_text(encoding="utf-8")
    section = text.partition(f"## Table {path.stem[-1]}")[2].partition("\n## ")[0]
    for printed in set(PRINTED[path.stem].values()):
        assert f"[{printed:g}]" in section
    assert section.count("\u00b1") >= 2 * len(PRINTED[path.stem])
