"""Studies are read, crossed and checked: every cell once, in order, with the settings of the file."""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML
from support import BASE, STUDY, call, run_study, trainings, write_study

from sitkit.registry import essence, spec
from sitkit.runs.config.identity import final_step, sampling_identity, slug, training_identity
from sitkit.runs.config.sources import read_assignments
from sitkit.runtime.errors import UserError
from sitkit.runtime.hashing import identity
from sitkit.studies.study import StudyPlan
from sitkit.studies.study_file import read_study
from sitkit.studies.tasks import locations_of

HERE = tempfile.TemporaryDirectory(prefix="sitkit-studies-")


def read(study: dict[str, Any], **more: Any) -> StudyPlan:
    """A study from plain values, on the small base."""
    path = Path(HERE.name) / "study.yaml"
    (path.parent / "base.yaml").write_text(BASE)
    with path.open("w") as file:
        YAML(typ="safe").dump({"base": "base.yaml", **study}, file)
    return read_study(path, **more)


SEEDS = st.lists(st.integers(0, 50), min_size=1, max_size=3, unique=True)
LRS = st.lists(st.sampled_from([1e-4, 2e-4, 1e-3, 0.5]), min_size=1, max_size=3, unique=True)
STEPS = st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True)


@settings(max_examples=20)
@given(LRS, STEPS, SEEDS, SEEDS)
def test_cells_are_rows_by_columns_by_seeds_in_the_order_of_the_file(
    lrs: list[float], steps: list[int], seeds: list[int], sample_seeds: list[int]
) -> None:
    rows = [{"label": f"lr {lr}", "train": {"lr": lr}} for lr in lrs]
    plan = read({"rows": rows, "grid": {"sampler.steps": steps}, "seeds": seeds, "sample_seeds": sample_seeds})
    listed = [(cell.row, cell.column, cell.seed, cell.sample_seed) for cell in plan.cells]
    assert listed == list(itertools.product([f"lr {lr}" for lr in lrs], map(str, steps), seeds, sample_seeds))
    for cell in plan.cells:
        config = cell.config
        assert f"lr {config.train.lr}" == cell.row and config.train.seed == cell.seed
        assert config.sample.seed == cell.sample_seed and str(spec(config.sampler)["steps"]) == cell.column
    # A training for each row and seed; a sampling for each cell.
    assert len(trainings(plan.cells)) == len(lrs) * len(seeds)
    assert len({place.measurement for place in locations_of(c.config for c in plan.cells)}) == len(plan.cells)


@settings(max_examples=15)
@given(LRS, STEPS, SEEDS, SEEDS)
def test_the_locations_of_many_cells_are_those_of_each_cell_alone(
    lrs: list[float], steps: list[int], seeds: list[int], sample_seeds: list[int]
) -> None:
    rows = [{"label": f"lr {lr}", "train": {"lr": lr}, "sampler": {"name": "euler-maruyama"}} for lr in lrs]
    rows.append({"label": "raw", "sample": {"weights": "raw"}, "metric": "mmd"})
    columns = {"a": {"sampler": {"t1": None}}, "b": {"guidance": "none", "sample": {"n": 60}}}
    cells = read({"rows": rows, "columns": columns, "seeds": seeds, "sample_seeds": sample_seeds}).cells
    for cell, place in zip(cells, locations_of(cell.config for cell in cells), strict=True):
        config = cell.config
        samples = sampling_identity(config, final_step(config))
        assert place.training == training_identity(config) and place.run == f"{slug(config)}-{place.training}"
        assert place.samples == samples and place.measurement == identity(samples, essence(config.metric[0]))


@settings(max_examples=20)
@given(st.sets(st.tuples(st.sampled_from("abc"), st.sampled_from(["2", "3", "4"])), min_size=1, max_size=6))
def test_an_exclusion_removes_only_the_cells_that_it_names(out: set[tuple[str, str]]) -> None:
    assume(len(out) < 9)
    study = {
        "rows": [{"label": name, "train": {"lr": lr}} for name, lr in zip("abc", (1e-4, 2e-4, 3e-4), strict=True)],
        "grid": {"sampler.steps": [2, 3, 4]},
        "exclude": [{"row": row, "sampler.steps": int(steps)} for row, steps in sorted(out)],
    }
    left = {(cell.row, cell.column) for cell in read(study).cells}
    assert left == set(itertools.product("abc", "234")) - out


def test_an_exclusion_matches_components_by_name_or_field(tmp_path: Path) -> None:
    text = STUDY + "exclude: [{interp: gvp, sampler: {name: heun, steps: 6}}]\n"
    cells = read_study(write_study(tmp_path, text)).cells
    assert [(cell.row, cell.column) for cell in cells] == [("Linear", "3"), ("Linear", "6"), ("GVP", "3")]
    with pytest.raises(UserError, match=r"study\.yaml:\d+: no cell is \{'interp': 'vp-sbdm'\}"):
        read_study(write_study(tmp_path, STUDY + "exclude: [{interp: vp-sbdm}]\n"))


def test_a_later_layer_wins() -> None:
    """Base, then set, then row, then column, then the row's own settings of the column."""
    row = {"label": "r", "sampler": {"steps": 5}, "columns": {"own": {"sampler": {"steps": 9}}}}
    study = {
        "set": {"sampler": {"name": "heun", "steps": 4}, "train": {"lr": 0.5}},
        "rows": [{"label": "plain"}, row],
        "columns": {"none": {}, "seven": {"sampler": {"steps": 7}}, "own": {"sampler": {"steps": 8}}},
    }
    cells = read(study).cells
    steps = {(cell.row, cell.column): spec(cell.config.sampler)["steps"] for cell in cells}
    assert steps == {
        ("plain", "none"): 4, ("plain", "seven"): 7, ("plain", "own"): 8,
        ("r", "none"): 5, ("r", "seven"): 7, ("r", "own"): 9,
    }  # fmt: skip
    assert {cell.config.train.lr for cell in cells} == {0.5}


def test_seeds_of_the_command_line_replace_those_of_the_file() -> None:
    plan = read({"seeds": [0, 1, 2], "sample_seeds": [5]}, seeds=(7,), sample_seeds=(8, 9))
    assert [(cell.seed, cell.sample_seed) for cell in plan.cells] == [(7, 8), (7, 9)]


def test_a_reference_number_has_its_source_and_setting() -> None:
    rows = [
        {"label": "a", "interp": "linear", "paper": 1.5},
        {"label": "b", "interp": "gvp", "paper": {"value": 2, "source": "Them", "setting": {"sample.n": 10}}},
        {"label": "c", "interp": "vp-sbdm"},
    ]
    study = {"rows": rows, "source": "Us", "setting": {"data": "ImageNet", "sample.n": 50_000}}
    a, b, c = (cell.reference for cell in read(study).cells)
    assert a is not None and b is not None and c is None
    assert (a.number, a.source, a.setting) == (1.5, "Us", {"data": "ImageNet", "sample.n": 50_000})
    assert (b.number, b.source, b.setting) == (2.0, "Them", {"data": "ImageNet", "sample.n": 10})


# A mistake in a study, and words of the refusal.
WRONG = [
    ({"show": ["nfee"]}, "show names 'nfee'.*Did you mean 'nfe'"),
    ({"seeds": [0], "set": {}, "rows": [{"train": {"seed": 3}}]}, "train.seed is set here and by the study's seeds"),
    ({"seeds": []}, "seeds"),
    ({"rows": []}, "rows"),
    ({"grid": {"sampler.steps": []}}, r"study\.yaml:\d+: grid\.sampler\.steps"),
    ({"rows": [{"label": "x"}], "exclude": [{"row": "x"}]}, "every cell of the study is excluded"),
    ({"base": "nothing.yaml"}, "nothing.yaml"),
    ({"rows": [{"paper": {"nowhere": 3}}], "columns": {"here": {}}}, "paper has a number for 'nowhere'"),
]


@pytest.mark.parametrize(("study", "words"), WRONG, ids=[words for _, words in WRONG])
def test_a_mistake_in_a_study_is_named(study: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read(study)


@pytest.mark.parametrize("text", ["", "# Nothing.\n", "title: Nothing\nshow: [nfe]\n"])
def test_a_file_with_nothing_to_compare_is_no_study(text: str, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(UserError, match=r"study\.yaml: there is nothing to compare: a study has rows"):
        read_study(tmp_path / "study.yaml")
    (tmp_path / "study.yaml").write_text(f"{text}base: points\n")
    assert len(read_study(tmp_path / "study.yaml").cells) == 1


def test_an_impossible_cell_leaves_the_others_possible() -> None:
    plan = read({"rows": [{"label": "ok"}, {"label": "bad", "diffusion": "kl"}], "seeds": [0, 1]})
    assert [cell.row for cell in plan.cells] == ["ok", "ok"] and [cell.row for cell in plan.refused] == ["bad"]
    with pytest.raises(UserError, match=r"study\.yaml:\d+: row 'bad': sampler 'heun' solves the ODE"):
        plan.require()


def test_a_study_may_measure_in_the_features_of_a_classifier(tmp_path: Path) -> None:
    """The classifier is trained once for all cells, and its accuracy is in every record."""
    study = STUDY.replace("[3, 6]", "[3]").replace(', "6": 2', "")
    base = BASE.replace("sliced-wasserstein", "{name: frechet, features: {name: run-classifier, steps: 5, width: 8}}")
    outcome = run_study(write_study(tmp_path, study, base))
    assert {cell.state for cell in outcome.results.cells} == {"done"}
    assert len(list((tmp_path / "runs/extractors").glob("*.safetensors"))) == 1
    assert "frechet on run-classifier of points" in (outcome.folder / "table.md").read_text()


def test_the_command_of_a_study_gives_its_cells_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has everything that replaces a setting of the file: seeds, settings of every type, the folder of runs."""
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path, STUDY)
    over = read_assignments(
        ["train.lr=2.5e-4", "sampler={name: heun, steps: 3}", "sample.labels=none", "run.folder=a b"]
    )
    plan = read_study("study.yaml", settings=over, seeds=(4, 5), sample_seeds=(7,))
    assert plan.command[:3] == ("sitkit", "ablate", "study.yaml")
    again = [
        call(*plan.command[1:], "--dry-run", "--json").out,
        call("ablate", "study.yaml", "--dry-run", "--json").out,
    ]
    listed = [[(c["seed"], c["sample_seed"], c["run"]) for c in json.loads(text)] for text in again]
    meant = [
        (cell.seed, cell.sample_seed, place.run)
        for cell, place in zip(plan.cells, locations_of(c.config for c in plan.cells), strict=True)
    ]
    assert listed[0] == meant != listed[1]
    assert read_study("study.yaml").command == ("sitkit", "ablate", "study.yaml")
