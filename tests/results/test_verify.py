"""Numbers of a study of ODE and SDE cells: found by name, explained, computed again and compared."""

from __future__ import annotations

import functools
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import call, copied, run_study, write_study

from sitkit.results.diff import diff, environment_differences
from sitkit.results.explain import explain_number
from sitkit.results.lookup import cells_named, numbers
from sitkit.results.report import report
from sitkit.results.statistics import paired
from sitkit.results.study_results import read_results
from sitkit.results.verify import device_of_record, difference, verify_numbers
from sitkit.runs.checkpoint import checkpoints
from sitkit.runs.environment import environment
from sitkit.runs.run_folder import RunFolder
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import read_json, write_json
from sitkit.runtime.tensors import load_tensors, save_tensors

STUDY = """title: "Two ways"
base: base.yaml
rows:
  - {label: ODE, sampler: {name: heun, steps: 4}}
  - {label: "SDE: eta", sampler: {name: euler-maruyama, steps: 40, last_step: tweedie}, diffusion: kl-eta}
columns: {gvp: {interp: gvp}, linear: {}}
seeds: [0, 1]
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the study above; tests must not write to it."""
    folder = tmp_path_factory.mktemp("verified")
    run_study(write_study(folder, STUDY))
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the folder for one test, as the working directory."""
    shutil.copytree(whole, tmp_path / "own")
    monkeypatch.chdir(tmp_path / "own")
    yield tmp_path / "own"


def test_a_number_is_named_by_file_identity_run_or_study(whole: Path) -> None:
    runs = whole / "runs"
    every = numbers("study", runs)
    assert len(every) == 8 and len({number.path for number in every}) == 8
    assert every == numbers(str(whole / "studies/study"), runs) == numbers(str(whole / "study.yaml"), runs)
    assert numbers("study:", runs) == every and [numbers(f"study:{i + 1}", runs)[0] for i in range(8)] == every
    for number in every:
        # A name has the same meaning for every command.
        assert numbers(number.name, runs) == [number]
        (plain,) = numbers(str(number.path), runs)
        assert plain.record == number.record and numbers(plain.path.stem, runs) == [plain]
        assert numbers(plain.name, runs) == [plain] and plain in numbers(number.folder.name, runs)
        assert plain in numbers(f"{number.folder.name}:sliced-wasserstein", runs)
    assert [n.cell.seed for n in numbers("study:SDE: eta:linear", runs) if n.cell] == [0, 1]
    assert {n.cell.row for n in numbers("study::gvp", runs) if n.cell} == {"ODE", "SDE: eta"}
    assert len(numbers("study:::1", runs)) == 4


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("stud", "Nor is it the name of a study"),
        ("study:ODD", "No row of study is called 'ODD'. Did you mean 'ODE'?"),
        ("study:ODE:gpv", "No column of study is called 'gpv'. Did you mean 'gvp'?"),
        ("study:ODE:gvp:7", "study has no seed 7; it has 0, 1."),
        ("study:ODE:gvp:0:3", "study has no sampling seed 3; it has 0."),
        ("study:9", "study has cells 1 to 8; got 9."),
        ("study:²", "No row of study is called '²'."),
        ("study:ODE:gvp:0:0:1", "'0:0:1' are more"),
        ("latest:frechet", "has no number 'frechet'. It has sliced-wasserstein."),
        ("nothing.json", "There is no file"),
        ("base.yaml", "base.yaml"),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(folder: Path, name: str, words: str) -> None:
    for command in ("explain", "verify"):
        result = call(command, name)
        assert result.status == 2 and words in result.err and "Traceback" not in result.err, result.err


def test_a_file_without_a_record_is_refused(folder: Path) -> None:
    for text, words in (("[1]", "is not the record of a number"), ('{"value": 1}', "is not the record"), ("{", ":1: ")):
        (folder / "some.json").write_text(text)
        result = call("verify", "some.json")
        assert result.status == 2 and words in result.err


@pytest.mark.parametrize("lost", ["command", "seeds", "sampling.at_once", "sampling.recipe"])
def test_an_incomplete_record_is_named_with_the_command_that_replaces_it(lost: str, folder: Path) -> None:
    path = sorted(folder.glob("runs/*/evaluations/*.json"))[0]
    record = read_json(path)
    part, _, key = lost.rpartition(".")
    del (record[part] if part else record)[key]
    write_json(path, record)
    run = path.parent.parent
    named = f"{path.relative_to(folder).as_posix()} lacks {lost}: it is of an older sitkit, or damaged."
    for words in (("explain", run), ("verify", run), ("explain", "study")):
        result = call(*words)
        assert result.status == 2 and result.err.count("error:") == 1, (words, result.err)
        assert named in result.err, (words, result.err)
    # A page goes on without the number and names it.
    for target, page in ((run, run / "report.html"), ("study", folder / "studies/study/report.html")):
        with pytest.warns(UserWarning, match=re.escape(named)):
            report(target)
        assert f"lacks {lost}" in page.read_text()
    path.unlink()
    assert call("report", run).status == 0


def test_a_record_with_a_part_of_another_type_is_named(folder: Path) -> None:
    path = sorted(folder.glob("runs/*/evaluations/*.json"))[0]
    write_json(path, read_json(path) | {"sampling": "gone"})
    result = call("explain", path)
    assert result.status == 2 and result.err.count("error:") == 1
    assert "has a wrong value: sampling: Input should be a valid dictionary" in result.err


@pytest.mark.parametrize("place", ["run", "samples", "sampling.recipe.guidance.run"])
@pytest.mark.parametrize("name", ["/etc", "../other", "a/b", "..", "a\\b", "a\x1b[2Jb", ""])
def test_a_record_names_nothing_outside_its_folder(place: str, name: str, folder: Path, tmp_path: Path) -> None:
    path = sorted(folder.glob("runs/*/evaluations/*.json"))[0]
    record = read_json(path)
    *parts, key = place.split(".")
    functools.reduce(lambda value, part: value[part], parts, record)[key] = name
    write_json(path, record)
    before = sorted(folder.rglob("*"))
    for command in ("explain", "verify"):
        result = call(command, path)
        assert result.status == 2 and "a plain name is needed" in result.err and "\x1b" not in result.err, result.err
    assert sorted(folder.rglob("*")) == before


def test_links_out_of_a_run_are_not_followed(folder: Path, tmp_path: Path) -> None:
    """A number, and the samples of a number, that a record names: a link within its run is followed, another is not."""
    outside = tmp_path / "outside"
    cell = next(cell for cell in read_results(Path("studies/study")).cells if cell.state == "done")
    for name in (f"{cell.run}/samples/{cell.samples}", str(cell.evaluation)):
        path = Path("runs") / name
        path.rename(path.with_name("moved"))
        path.symlink_to("moved")
        assert call("verify", "study:1").status == 0
        path.unlink()
        outside.mkdir(exist_ok=True)
        shutil.move(path.with_name("moved"), outside / path.name)
        path.symlink_to(outside / path.name)
        result = call("verify", "study:1")
        assert result.status != 0 and "a record names files of its folder alone" in result.out + result.err
        with pytest.warns(UserWarning, match="a record names files of its folder alone"):
            report("study")
        path.unlink()
        shutil.move(outside / path.name, path)


def test_an_explanation_has_the_commands_that_compute_the_number(folder: Path) -> None:
    (number,) = numbers("study:SDE: eta:linear:1", Path("runs"))
    result = explain_number(number)
    assert result.value == number.record["value"] and result.seeds == {"train": 1, "sample": 0, "metric": 0}
    assert result.settings["diffusion"]["name"] == "kl-eta" and result.settings["sampler"]["steps"] == 40
    assert all(stage["packages"]["torch"] == torch.__version__ for stage in result.stages.values())
    # The printed commands compute the number from a checkpoint without numbers.
    said = call("explain", number.name).out
    for command in result.commands.values():
        assert command in said
    for part in ("evaluations", "samples"):
        shutil.rmtree(number.folder / part)
    words = shlex.split(result.commands["number"])[1:]
    (record,) = json.loads(call(*words, "--json").out)
    assert (record["value"], record["stderr"], record["nfe"]) == tuple(
        number.record[key] for key in ("value", "stderr", "nfe")
    )
    plain = json.loads(call("explain", number.name, "--json").out)
    assert plain[0]["commands"] == result.commands and plain[0]["checkpoint"] == number.record["checkpoint"]


def test_every_number_of_a_study_is_the_same_to_the_last_digit(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    result = call("verify", "study", "--json")
    verdicts = json.loads(result.out)
    assert result.status == 0 and len(verdicts) == 8
    for verdict in verdicts:
        assert verdict["verdict"] == "same" and verdict["now"] == verdict["was"] and verdict["samples"] is True
        assert verdict["gap"] == 0 and verdict["differences"] == []
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before, "nothing is written to the folder"


def test_a_number_changed_by_hand_differs(folder: Path) -> None:
    (number,) = numbers("study:ODE:gvp:0", Path("runs"))
    value = number.record["value"]
    write_json(number.path, number.record | {"value": value * (1 + 1e-15)})
    (changed,) = numbers(number.name, Path("runs"))
    assert changed.record["value"] != value
    (verdict,) = verify_numbers([changed])
    assert verdict.verdict == "differs" and verdict.samples is True and 0 < (difference(verdict) or 0) < 1e-14
    result = call("verify", "study:ODE")
    assert result.status == 1 and "3 of 4 numbers are the same" in result.out
    assert "its samples are the same to the bit" in result.err and "nothing that is recorded" in result.err


def test_stored_samples_and_caches_give_no_answer(folder: Path) -> None:
    (number,) = numbers("study:ODE:gvp:0", Path("runs"))
    stored = number.folder / "samples" / number.record["samples"]
    for path in (*stored.glob("*.npz"), *stored.glob("*.safetensors"), *Path("runs/references").glob("*")):
        path.write_bytes(b"nothing")
    (verdict,) = verify_numbers([replace(number, record=number.record | {"samples": "0" * 12})])
    assert verdict.verdict == "same" and verdict.samples is None


def test_changed_weights_or_code_are_named(folder: Path) -> None:
    (number,) = numbers("study:ODE:gvp:0", Path("runs"))
    newest = checkpoints(number.folder / "checkpoints")[-1]
    header, tensors = load_tensors(newest)
    # The last digit of one weight of each average.
    moved = {name: torch.nextafter(t, t + 1) if t.is_floating_point() else t for name, t in tensors.items()}
    save_tensors(newest, moved, header)
    git = {"commit": "0" * 40, "dirty": False, "diff": None}
    write_json(
        number.path, number.record | {"environment": number.record["environment"] | {"git": git, "python": "3.1.4"}}
    )
    (verdict,) = verify_numbers(numbers(number.name, Path("runs")))
    assert verdict.verdict == "differs" and verdict.samples is False
    result = {difference.key: difference for difference in verdict.differences}
    assert result["checkpoint.fingerprint"].affects == "sampling"
    assert result["evaluation: code"].affects == "evaluation" and "000000000000" in result["evaluation: code"].a
    assert result["evaluation: python"].rounding


def test_a_number_that_cannot_be_computed_has_a_reason_and_does_not_stop_the_others(folder: Path) -> None:
    first, second, *_ = numbers("study:ODE", Path("runs"))
    shutil.rmtree(first.folder / "checkpoints")
    data = read_json(second.path) | {"data": "0" * 64}
    write_json(second.path, data)
    result = call("verify", "study:ODE", "--json")
    verdicts = json.loads(result.out)
    assert result.status == 1 and [v["verdict"] for v in verdicts] == ["impossible", "impossible", "same", "same"]
    assert "checkpoint" in verdicts[0]["reason"] and "changed since the number was measured" in verdicts[1]["reason"]
    assert f"{first.name}: " in result.err


def test_a_device_has_the_name_of_torch() -> None:
    record = environment(torch.device("cpu"))
    assert device_of_record(record) == "cpu"
    assert device_of_record(record | {"device": "mps"}) == "mps"
    assert (
        device_of_record(record | {"device": "NVIDIA H100 80GB HBM3", "cuda": {"runtime": "12.8", "cudnn": 9}})
        == "cuda"
    )


def test_cells_differ_in_the_settings_of_the_study(folder: Path) -> None:
    result = diff("study:ODE:gvp", "study:SDE: eta:gvp")
    assert {(d.key, d.affects) for d in result.differences} == {("sampler", "sampling"), ("diffusion", "sampling")}
    groups = [{n.seeds: n.estimate for n in numbers(name)} for name in (result.a, result.b)]
    assert result.comparison == paired(*groups) and "The differences in sampling can explain it." in result.verdict
    result = diff("study:ODE:gvp", "study:ODE:linear")
    assert [(d.key, d.a, d.b, d.affects) for d in result.differences] == [("interp", "gvp", "linear", "training")]
    result = diff("study:ODE:gvp:0", "study:ODE:gvp:1")
    assert [(d.key, d.a, d.b) for d in result.differences] == [("train.seed", "0", "1")]
    same = diff("study:ODE:gvp", "study:ODE:gvp")
    assert not same.differences and same.verdict == "Their values are equal to the last digit."
    plain = json.loads(call("diff", "study:ODE:gvp:0", "study:ODE:linear:0", "--json").out)
    assert plain["differences"][0]["affects"] == "training" and plain["comparison"]["units"] == 1


def test_runs_differ_in_training_and_copies_do_not_differ(folder: Path, tmp_path: Path) -> None:
    by_seed = {n.record["seeds"]["train"]: n.folder for n in numbers("study:ODE:gvp")}
    result = diff(str(by_seed[0]), by_seed[1].name)
    assert [(d.key, d.affects) for d in result.differences] == [("train.seed", "training")]
    assert result.verdict == "Their weights differ. The differences in training can explain it."
    copy = copied(by_seed[0], tmp_path / "elsewhere")
    assert diff(str(by_seed[0]), str(copy)).verdict == "Their weights are equal to the bit."
    made = read_json(RunFolder(copy).environment)
    write_json(RunFolder(copy).environment, made | {"threads": 64})
    newest = checkpoints(copy / "checkpoints")[-1]
    newest.unlink()
    result = diff(str(by_seed[0]), str(copy))
    assert [(d.key, d.affects, d.rounding) for d in result.differences] == [("training: threads", "training", True)]
    assert "Only properties that change rounding differ" in result.verdict


REFUSED = {
    "study study": "means 8 numbers of 4 kinds",
    "latest study:1": "Give two runs or two numbers",
    "study:1 nothing": "No run 'nothing'",
    "latest nothing": "No run 'nothing'",
    "nothing latest": "No run 'nothing'",
}


@pytest.mark.parametrize("names", REFUSED)
def test_names_that_cannot_be_compared_are_refused(folder: Path, names: str) -> None:
    result = call("diff", *names.split())
    assert result.status == 2 and REFUSED[names] in result.err


def test_each_difference_of_environments_has_the_stage_that_it_affects() -> None:
    now = {
        "packages": {"sitkit": "1", "torch": "2.13", "mlflow": "3"}, "python": "3.12", "threads": 2,
        "git": {"commit": "a" * 40, "dirty": True, "diff": "b" * 64},
        "plugins": {"poly": "sitkit-poly 1", "ot": "sitkit-ot 1"}, "plugin_code": {},
        "components": {"interpolant poly": "sitkit-poly 1", "coupling emd": "sitkit-ot 1"},
    }  # fmt: skip
    then = {
        **now, "packages": {"sitkit": "1", "torch": "2.12", "mlflow": "2"}, "threads": 1,
        "git": {"commit": "a" * 40, "dirty": True, "diff": "c" * 64},
        "plugins": {"poly": "sitkit-poly 2", "ot": "sitkit-ot 2"},
        "components": {"interpolant poly": "sitkit-poly 2", "coupling emd": "sitkit-ot 2"},
    }  # fmt: skip
    assert not list(environment_differences(now, now, "training"))
    result = {d.key: (d.affects, d.rounding) for d in environment_differences(now, then, "training", {"poly"})}
    assert result == {
        "training: code": ("training", False),  # The same commit with other uncommitted changes.
        "training: torch": ("training", False),
        "training: mlflow": ("nothing", False),
        "training: plugin poly": ("training", False),
        "training: plugin ot": ("nothing", False),  # Installed but not used.
        "training: threads": ("training", True),
    }


def test_a_cell_without_a_number_names_the_command_that_computes_it(folder: Path) -> None:
    results = read_results(folder / "studies/study")
    cells = tuple(c.model_copy(update={"state": "todo", "evaluation": None}) for c in results.cells)
    write_json(folder / "studies/study/results.json", results.model_copy(update={"cells": cells}).model_dump())
    with pytest.raises(
        UserError, match=r"has no number yet \(todo\): sitkit ablate .*study\.yaml --runs .*runs continues"
    ):
        numbers("study:ODE")
    assert len(cells_named(results, "ODE:gvp", "study")) == 2


def test_guided_numbers_and_numbers_of_a_run_in_one_file_are_the_same_too(folder: Path) -> None:
    by_seed = {n.record["seeds"]["train"]: n.folder.name for n in numbers("study:ODE:gvp")}
    guide = ("--guidance", "autoguidance", "--set", f"guidance.run={by_seed[1]}", "--set", "guidance.step=30")
    few = ("-n", "20", "--metric", "mmd")
    assert call("evaluate", by_seed[0], *few, *guide).status == 0
    assert call("convert", by_seed[0], "--to", "one.safetensors").status == 0
    result = call("evaluate", "one.safetensors", *few, "--json")
    (record,) = json.loads(result.out)
    for name in (f"{by_seed[0]}:mmd", record["path"]):
        (verdict,) = verify_numbers(numbers(name))
        assert verdict.verdict == "same" and verdict.samples is True, verdict.reason
    result = explain_number(numbers(record["path"])[0])
    assert "training" not in result.commands and "one.safetensors" in result.commands["number"]
    # Without the guiding run the guided number cannot be computed, and the reason names that run.
    shutil.rmtree(folder / "runs" / by_seed[1])
    (verdict,) = verify_numbers(numbers(f"{by_seed[0]}:mmd"))
    assert verdict.verdict == "impossible" and by_seed[1] in verdict.reason
