"""Studies: every cell is checked first, and nothing is done twice or lost, even if the work is stopped."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import statistics
import time
import warnings
from pathlib import Path

import pytest
from support import BASE, STUDY, call, finish, published, read_csv, run_study, start, trainings, wait, write_study

import sitkit
from sitkit.results.table import format_estimate
from sitkit.runs.checkpoint import checkpoints
from sitkit.runs.config.sources import read_assignments
from sitkit.runs.run import load
from sitkit.runs.run_folder import run_folders
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import read_json, write_json
from sitkit.runtime.tensors import digest_of
from sitkit.solvers.sampler import SolveSpec
from sitkit.studies.study_file import read_study
from sitkit.studies.tasks import trained


def stamps(folder: Path) -> dict[Path, int]:
    """Return the time of the last change of each file of the runs."""
    return {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that was done without interruption; read only."""
    folder = tmp_path_factory.mktemp("whole")
    run_study(write_study(folder))
    return folder


def test_there_is_one_training_for_each_model_and_one_sampling_for_each_cell(whole: Path) -> None:
    rows = read_csv(whole)
    assert [(row["row"], row["column"], row["reference"]) for row in rows] == [
        ("Linear", "3", "1.5"), ("Linear", "6", "2"), ("GVP", "3", ""), ("GVP", "6", ""),
    ]  # fmt: skip
    assert len({row["run"] for row in rows}) == 2 and len({row["samples"] for row in rows}) == 4
    assert [folder.name for folder in run_folders(whole / "runs")] == sorted({row["run"] for row in rows})
    assert [row["nfe"] for row in rows] == ["6", "12", "6", "12"]
    for row in rows:
        records = [read_json(path) for path in (whole / "runs" / row["run"] / "evaluations").iterdir()]
        (record,) = [record for record in records if record["samples"] == row["samples"]]
        assert float(row["value"]) == record["value"] and float(row["real"]) == record["real"]
        assert row["metric"] == "sliced-wasserstein" and row["n"] == "50" and row["failure"] == ""


def test_the_table_has_the_published_number_beside_ours(whole: Path) -> None:
    text = (whole / "studies/study/table.md").read_text()
    means = {
        (row["row"], row["column"]): format_estimate(float(row["value"]), float(row["stderr"]))
        for row in read_csv(whole)
    }
    assert "# Two by two" in text and "| | 3 | 6 |" in text
    (linear,) = [line for line in text.splitlines() if line.startswith("| Linear |")]
    (gvp,) = [line for line in text.splitlines() if line.startswith("| GVP |")]
    assert means["Linear", "3"] in linear and " [1.5] |" in linear and linear.endswith(" [2] |")
    assert means["GVP", "3"] in gvp and means["GVP", "6"] in gvp and "[" not in gvp
    assert "50 samples; " in text and "30 steps of 16" in text and "Nobody, 1900" in text


def test_a_second_run_does_no_work(whole: Path, tmp_path: Path) -> None:
    study = write_study(tmp_path)
    first = run_study(study)
    before, table = stamps(tmp_path), (tmp_path / "studies/study/table.csv").read_bytes()
    second = run_study(study)
    assert stamps(tmp_path) == before
    assert second.results == first.results
    # The numbers are those of the other folder, to the last digit.
    assert (
        (tmp_path / "studies/study/table.csv").read_bytes() == table == (whole / "studies/study/table.csv").read_bytes()
    )


def test_only_a_changed_cell_runs_again(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    run_study(study)
    before, old = stamps(tmp_path), read_csv(tmp_path)
    write_study(tmp_path, STUDY.replace("[3, 6]", "[3, 7]").replace('"6": 2', '"7": 2'))
    run_study(study)
    after = stamps(tmp_path)
    new = {path for path in after if path not in before}
    assert {path: after[path] for path in before} == before
    # One sampling and one number for each row, no training.
    assert {path.parent.parent.name for path in new if path.name == "record.json"} == {"samples"}
    assert len([path for path in new if path.name == "record.json"]) == 2
    assert len([path for path in new if path.parent.name == "evaluations"]) == 2
    assert not [path for path in new if path.parent.name == "checkpoints"]
    assert read_csv(tmp_path)[0] == old[0] and read_csv(tmp_path)[2] == old[2]
    write_study(tmp_path, STUDY.replace("interp: gvp", "interp: gvp\n    train: {lr: 2e-3}"))
    run_study(study)
    assert {path: stamp for path, stamp in stamps(tmp_path).items() if path in after} == after
    assert len(run_folders(tmp_path / "runs")) == 3
    assert read_csv(tmp_path)[:2] == old[:2] and read_csv(tmp_path)[2]["run"] != old[2]["run"]


def check_kills(whole: Path, folder: Path, kills: int) -> None:
    write_study(folder)
    files = len(stamps(whole))
    draw = random.Random(11)
    statuses = []

    def written() -> int:
        # Temporary files count too, but at most one for each checkpoint.
        return len([path for path in (folder / "runs").rglob("*") if path.is_file()])

    for number in range(kills):
        goal = written() + draw.randint(1, max(1, 2 * (files - written()) // (kills - number + 1)))
        process = start("ablate", "study.yaml", cwd=folder)
        wait(process, lambda goal=goal: written() >= min(goal, files - 2))
        time.sleep(draw.uniform(0, 0.02))
        process.kill()
        process.communicate()
        statuses.append(process.returncode)
    assert statuses.count(-9) >= kills - 1, statuses
    result = finish(start("ablate", "study.yaml", cwd=folder))
    assert result.status == 0, result.err
    assert (folder / "studies/study/table.csv").read_bytes() == (whole / "studies/study/table.csv").read_bytes()
    assert {path.name for path in (folder / "runs").iterdir()} == {path.name for path in (whole / "runs").iterdir()}


def test_killed_at_random_and_continued_the_table_is_the_same(whole: Path, tmp_path: Path) -> None:
    check_kills(whole, tmp_path / "killed", kills=2)


@pytest.mark.slow
def test_killed_twenty_times_the_table_is_the_same(whole: Path, tmp_path: Path) -> None:
    check_kills(whole, tmp_path / "killed", kills=20)


# A change of the study, the line of the mistake, words of the message.
IMPOSSIBLE = [
    ("label: GVP", "label: GVP\n    diffusion: kl", 7, "row 'GVP', 3: sampler 'heun' solves the ODE"),
    ("interp: gvp", "interp: gpv", 8, "Did you mean 'gvp'"),
    ("interp: gvp", "interq: gvp", 8, "unknown key 'interq'. Did you mean 'interp'"),
    ("[3, 6]", "[3, 6, 0]", 10, "steps must be at least 1"),
    ("sampler.steps", "sampler.stepz", 10, "no field 'stepz'"),
    ('"6": 2', '"8": 2', 6, "number for '8'"),
    ('{"3": 1.5, "6": 2}', "best", 6, "paper is a number"),
    ("label: GVP", 'label: GVP\n    columns: {"9": {sampler: euler}}', 7, "the row has settings for '9'"),
    ("label: GVP", 'label: GVP\n    columns: {"6": 9}', 7, "columns of a row are settings for each column"),
    ("label: GVP", 'label: GVP\n    columns: {"6": {sampler: {stepz: 9}}}', 8, "no field 'stepz'"),
    ("sampler: heun", "sampler: huen", 4, "'heun'"),
    ("title:", "titel:", 1, "unknown key 'titel'. Did you mean 'title'"),
    ("label: GVP", "label: Linear", 7, "two rows are called 'Linear'"),
    ("base: base.yaml", "base: dgits", 3, "Did you mean 'digits'"),
    ("grid:", "seeds: [-1]\ngrid:", 9, "seeds.0: should be greater than or equal to 0"),
    ("grid:", "seeds: [2, 3, 2]\ngrid:", 9, "each seed once"),
]


@pytest.mark.parametrize(("old", "new", "line", "words"), IMPOSSIBLE, ids=[i[1] for i in IMPOSSIBLE])
def test_an_impossible_cell_is_refused_before_work_with_its_line(
    tmp_path: Path, old: str, new: str, line: int, words: str
) -> None:
    assert STUDY.count(old) == 1
    study = write_study(tmp_path, STUDY.replace(old, new))
    with pytest.raises(UserError) as caught:
        run_study(study)
    assert str(caught.value).startswith(f"{study}:{line}: ") and words in str(caught.value), caught.value
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.yaml", "study.yaml"]


def test_a_mistake_in_the_base_names_the_base(tmp_path: Path) -> None:
    study = write_study(tmp_path, base=BASE.replace("batch: 16", "batch: 0"))
    with pytest.raises(UserError, match=r"base\.yaml:4: train\.batch"):
        run_study(study)


def test_a_cell_that_fails_is_a_failed_row_and_the_others_complete(tmp_path: Path) -> None:
    study = write_study(tmp_path, STUDY.replace("label: GVP", "label: GVP\n    train: {lr: 1e30}"))
    result = call("ablate", study, "--runs", tmp_path / "runs")
    assert result.status == 1 and "Traceback" not in result.err
    rows = read_csv(tmp_path)
    assert [row["failure"] == "" for row in rows] == [True, True, False, False]
    assert all("The loss became" in row["failure"] and row["value"] == "" for row in rows[2:])
    assert all(float(row["value"]) > 0 for row in rows[:2])
    assert "| GVP | failed | failed |" in (tmp_path / "studies/study/table.md").read_text()
    assert result.err.count("error: GVP, ") == 2 and "error: Linear" not in result.err
    # The log in the message has the start and the reason of the end.
    (log,) = set(re.findall(r"Log: (\S+)", result.err))
    began, ended = (tmp_path / log).read_text().splitlines()
    assert began.endswith(" start") and "failed: The loss became" in ended
    # With a learning rate that works, only that row runs again.
    before = stamps(tmp_path / "runs" / rows[0]["run"])
    write_study(tmp_path)
    assert call("ablate", study, "--runs", tmp_path / "runs").status == 0
    assert stamps(tmp_path / "runs" / rows[0]["run"]) == before
    assert all(row["failure"] == "" for row in read_csv(tmp_path))


def test_a_study_goes_on_past_a_broken_number_and_a_broken_run_and_names_them(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "own"))
    before = read_csv(folder)
    number = next(
        path for path in folder.glob("runs/*/evaluations/*.json") if path.parent.parent.name == before[0]["run"]
    )
    number.write_bytes(b'{"value": \xff}')
    (folder / "runs" / before[2]["run"] / "environment.json").write_text("[1]")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = call("ablate", folder / "study.yaml", "--runs", folder / "runs")
    after = read_csv(folder)
    assert result.status == 1 and "Traceback" not in result.err, result.err
    assert sorted(row["value"] != "" for row in after[:2]) == [False, True]
    assert [row["value"] for row in after[2:]] == ["", ""]
    assert f"{number} is not text in UTF-8" in result.err and "environment.json is not the record" in result.err
    number.unlink()
    (folder / "runs" / before[2]["run"] / "environment.json").write_bytes(
        (whole / "runs" / before[2]["run"] / "environment.json").read_bytes()
    )
    assert call("ablate", folder / "study.yaml", "--runs", folder / "runs").status == 0
    assert read_csv(folder) == before


def test_the_table_says_that_the_classes_are_not_those_of_the_data(whole: Path, tmp_path: Path) -> None:
    folder, note = tmp_path / "again", "labels: the samples are of classes cat alone"
    shutil.copytree(whole, folder)
    for path in folder.glob("runs/*/evaluations/*.json"):
        write_json(path, read_json(path) | {"notes": [note, "kernel scale 2"]})
    assert run_study(folder / "study.yaml").results.notes[-1] == note
    assert (folder / "studies/study/table.md").read_text().count(note) == 1


def test_a_dry_run_prints_cells_and_trainings_and_does_nothing(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    words = ("ablate", study, "--runs", tmp_path / "runs", "--dry-run")
    result = call(*words)
    assert result.status == 0 and "4 cells from 2 trainings" in result.out
    assert result.out.count("points-linear-velocity-mlp-") == 2 and result.out.count("points-gvp-velocity-mlp-") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.yaml", "study.yaml"]
    cells = json.loads(call(*words, "--json").out)
    assert [(cell["cell"], cell["row"], cell["column"]) for cell in cells] == [
        (1, "Linear", "3"), (2, "Linear", "6"), (3, "GVP", "3"), (4, "GVP", "6"),
    ]  # fmt: skip
    assert len({cell["run"] for cell in cells}) == 2 and {cell["state"] for cell in cells} == {""}


def test_a_dry_run_says_which_cells_are_measured(whole: Path) -> None:
    result = call("ablate", whole / "study.yaml", "--runs", whole / "runs", "--dry-run", "--json")
    assert {cell["state"] for cell in json.loads(result.out)} == {"measured"}


def test_a_dry_run_in_python_has_the_results_on_disk_and_does_nothing(whole: Path, tmp_path: Path) -> None:
    outcome = sitkit.ablate(whole / "study.yaml", dry_run=True, runs=whole / "runs")
    assert [str(cell.value) for cell in outcome.results.cells] == [row["value"] for row in read_csv(whole)]
    outcome = sitkit.ablate(write_study(tmp_path), dry_run=True, runs=tmp_path / "runs")
    assert {cell.state for cell in outcome.results.cells} == {"todo"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.yaml", "study.yaml"]
    with pytest.raises(UserError, match="ablate has no argument 'sedes'. Did you mean 'seeds'"):
        sitkit.ablate(whole / "study.yaml", sedes=[0])  # pyright: ignore[reportCallIssue]


def test_seeds_give_a_mean_and_its_error(tmp_path: Path) -> None:
    study = write_study(
        tmp_path, STUDY.replace("grid:", "seeds: [0, 1, 2]\ngrid:").replace("[3, 6]", "[3]").replace(', "6": 2', "")
    )
    table = run_study(study)
    assert len(table.results.cells) == 6 and len({cell.run for cell in table.results.cells}) == 6
    values = [float(row["value"]) for row in read_csv(tmp_path) if row["row"] == "Linear"]
    assert [row["seed"] for row in read_csv(tmp_path)] == ["0", "1", "2"] * 2
    assert len(set(values)) == 3
    error = statistics.stdev(values) / math.sqrt(3)
    assert f"{format_estimate(statistics.fmean(values), error)} [1.5]" in (table.folder / "table.md").read_text()


def test_named_columns_cross_with_the_grid(tmp_path: Path) -> None:
    text = STUDY.replace('paper: {"3": 1.5, "6": 2}', 'paper: {"SDE, 6": 2}')
    text += "columns:\n  ODE: {sampler: heun}\n  SDE: {sampler: euler-maruyama, diffusion: sigma}\n"
    cells = read_study(write_study(tmp_path, text)).cells
    assert [cell.column for cell in cells[:4]] == ["ODE, 3", "ODE, 6", "SDE, 3", "SDE, 6"] and len(cells) == 8
    assert [published(cell) for cell in cells[:4]] == [None, None, None, 2]
    assert [c.config.sampler.name for c in cells[:4]] == ["heun"] * 2 + ["euler-maruyama"] * 2
    assert [cell.config.diffusion.name for cell in cells[:4]] == ["zero"] * 2 + ["sigma"] * 2
    assert len(trainings(cells)) == 2


def test_a_row_may_differ_in_one_column(tmp_path: Path) -> None:
    """At equal evaluations: what costs two a step takes half the steps."""
    text = STUDY.replace("label: GVP", 'label: GVP\n    columns: {"6": {sampler: {steps: 5}}}')
    cells = read_study(write_study(tmp_path, text)).cells
    steps = {(cell.row, cell.column): cell.config.plain()["sampler"]["steps"] for cell in cells}
    assert steps == {("Linear", "3"): 3, ("Linear", "6"): 6, ("GVP", "3"): 3, ("GVP", "6"): 5}
    assert {cell.config.sampler.name for cell in cells} == {"heun"}


def test_a_base_may_change_the_study(tmp_path: Path) -> None:
    text = (
        STUDY
        + "bases:\n  other.yaml: {set: {train: {steps: 31}}, grid: {sampler.steps: [6, 9]}, rows: [{interp: vp-sbdm}]}\n"
    )
    study = write_study(tmp_path, text)
    (tmp_path / "other.yaml").write_text(BASE.replace("size: 400", "size: 500"))
    cells = read_study(study, base="other.yaml").cells
    assert [(cell.row, cell.column, cell.config.train.steps) for cell in cells] == [
        ("vp-sbdm", "6", 31),
        ("vp-sbdm", "9", 31),
    ]
    assert "size=500" in repr(cells[0].config.data)
    assert [cell.config.train.steps for cell in read_study(study).cells] == [30] * 4
    (tmp_path / "study.yaml").write_text(text.replace("steps: 31", "stepz: 31"))
    with pytest.raises(UserError, match=r"study\.yaml:12: unknown key 'train\.stepz'"):
        read_study(study, base="other.yaml")


def test_a_cell_goes_before_the_command_line(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    cells = read_study(study, settings=read_assignments(["train.lr=5e-4", "sampler.steps=99"])).cells
    assert {cell.config.train.lr for cell in cells} == {5e-4}
    assert [cell.config.sampler.plan(SolveSpec(cell.config.interp, cell.config.target)).nfe for cell in cells] == [
        6,
        12,
        6,
        12,
    ]


def test_weights_may_be_an_axis(tmp_path: Path) -> None:
    study = write_study(tmp_path, STUDY.replace("  sampler.steps: [3, 6]", "  sample.weights: [ema, raw]").replace(
        'paper: {"3": 1.5, "6": 2}', "paper: 3"))  # fmt: skip
    run_study(study)
    values = [float(row["value"]) for row in read_csv(tmp_path)]
    assert len(set(values)) == 4 and len({row["run"] for row in read_csv(tmp_path)}) == 2


def test_a_training_that_is_not_finished_is_not_trained(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    cells = read_study(study, settings=read_assignments([f"run.folder={tmp_path / 'runs'}"])).cells
    config = cells[0].config
    assert not trained(config)
    run_study(study)
    assert trained(config)
    newest = checkpoints(tmp_path / "runs" / read_csv(tmp_path)[0]["run"] / "checkpoints")[-1]
    kept = newest.read_bytes()
    newest.write_bytes(kept[:-1])
    assert not trained(config)
    newest.unlink()
    assert not trained(config)
    # Its numbers still exist, so the study trains only after one of them is removed.
    run_study(study)
    assert not newest.exists()
    shutil.rmtree(newest.parent.parent / "evaluations")
    shutil.rmtree(newest.parent.parent / "samples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        run_study(study)
    assert trained(config) and newest.read_bytes() == kept


def test_each_cell_is_measured_with_the_average_that_it_names(tmp_path: Path) -> None:
    study = write_study(
        tmp_path,
        """title: averages
base: base.yaml
set: {train: {ema: [0.5, 0.999]}}
rows: [{label: one, interp: linear}]
columns: {fast: {sample: {ema: 0.5}}, slow: {sample: {ema: 0.999}}}
""",
    )
    cells = run_study(study).results.cells
    for cell, ema in zip(cells, (0.5, 0.999), strict=True):
        record = read_json(tmp_path / "runs" / str(cell.evaluation))
        run = load(str(cell.run), settings=read_assignments([f"sample.ema={ema}"]), root=tmp_path / "runs")
        weights = record["checkpoint"]
        assert (weights["weights"], weights["fingerprint"]) == (
            run.weights_name,
            digest_of(run.network.state_dict()),
        )
    assert cells[0].value != cells[1].value
