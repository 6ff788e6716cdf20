"""Run folders: their names, how a run is found, its configuration on disk, and the list of runs."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import copied, tiny, trained

import sitkit
from sitkit.runs.checkpoint import checkpoints
from sitkit.runs.config.identity import training_identity
from sitkit.runs.run_folder import RunFolder, find_run, folder_of, run_folders
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import read_json
from sitkit.runtime.tensors import load_tensors, save_tensors
from sitkit.training.train import run_training


def test_the_name_of_a_folder_ends_with_the_identity_of_the_training() -> None:
    run = trained()
    config = tiny(run.parent)
    assert run == folder_of(config) and run.name == f"points-linear-velocity-mlp-{training_identity(config)}"
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "metrics.jsonl", "environment.json", "previews"}
    version = read_json(run / "environment.json")["packages"]["torch"]
    assert version in (torch.__version__, torch.__version__.partition("+")[0])


@pytest.mark.parametrize("name", ["path", "name", "identity", "start", "latest", "name with the root"])
def test_a_run_is_found_by_any_of_its_names(run: Path, name: str) -> None:
    identity = run.name.rpartition("-")[2]
    words = {"path": str(run), "name": run.name, "identity": identity, "start": identity[:4], "latest": "latest",
             "name with the root": str(run.parent / run.name)}  # fmt: skip
    assert find_run(words[name], run.parent) == run


def test_an_error_for_a_missing_run_names_the_nearest_one(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"No run '{run.name[:-1]}x' .*Did you mean '{run.name}'"):
        find_run(run.name[:-1] + "x", run.parent)
    with pytest.raises(UserError, match=r"no runs in .*nowhere.*sitkit train"):
        find_run("latest", tmp_path / "nowhere")
    shutil.copytree(run, run.parent / (run.name[:-1] + "x"))
    with pytest.raises(UserError, match="start of several runs"):
        find_run(run.name.rpartition("-")[2][:5], run.parent)
    assert run_folders(run.parent) == sorted(run.parent.iterdir())


def test_an_error_in_a_configuration_names_file_and_line_and_the_list_goes_on(run: Path) -> None:
    other = copied(trained("digits"), run.parent)
    path = RunFolder(run).config
    text = path.read_text()
    line = text[: text.index("name: mlp")].count("\n") + 1
    path.write_text(text.replace("name: mlp", "name: mpl"))
    message = rf"{path}:{line}: backbone: No backbone named 'mpl'\. Did you mean 'mlp'"
    with pytest.raises(UserError, match=message):
        sitkit.load(run)
    with pytest.warns(UserWarning, match=rf"{run} is left out: {message}"):
        (summary,) = sitkit.list_runs(run.parent)
    assert (summary.folder, summary.step, summary.steps) == (other, 20, 20)
    assert (summary.samplings, summary.evaluations, summary.values) == (0, 0, ())


CHANGES: dict[str, Callable[[str], str]] = {
    "a removed line": lambda text: "".join(line for line in text.splitlines(True) if "clip:" not in line),
    "three removed lines": lambda text: re.sub(r"  (steps|lr|batch): .*\n", "", text),
    "another number": lambda text: text.replace("lr: ", "lr: 1"),
    "another component": lambda text: text.replace("interp:\n  name: linear", "interp:\n  name: gvp"),
    "a group without its settings": lambda text: re.sub(r"backbone:\n  name: mlp\n(  .*\n)+", "backbone: mlp\n", text),
    "an empty file": lambda text: "",
    "a file cut in the middle": lambda text: text[: text.index("sampler:")],
    "a file cut near its end": lambda text: text[: text.index("metric:")],
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("renamed", [False, True])
def test_changed_settings_of_a_training_are_refused(run: Path, name: str, renamed: bool) -> None:
    folder = run.rename(run.parent / "mine") if renamed else run
    path = RunFolder(folder).config
    text = path.read_text()
    changed = CHANGES[name](text)
    assert changed != text
    path.write_text(changed)
    reason = "is empty" if not changed else "(cut short or changed|was changed or removed) by hand"
    with pytest.raises(UserError, match=rf"^{path}.* {reason}"):
        sitkit.load(folder)
    path.write_text(text)
    assert sitkit.load(folder).step == 40


def test_settings_of_samples_may_be_changed_by_hand(run: Path) -> None:
    path = RunFolder(run).config
    path.write_text(path.read_text().replace("\n  n: ", "\n  n: 1"))
    assert sitkit.load(run).config.sample.n >= 10


@pytest.mark.parametrize("forgetful", [False, True])
def test_a_renamed_run_of_other_settings_is_refused(run: Path, forgetful: bool) -> None:
    folder = run.rename(run.parent / "mine")
    if forgetful:
        # Release 0.1 recorded the identity in the folder's name alone; the checkpoint holds the settings too.
        RunFolder(folder).environment.unlink()
    path = RunFolder(folder).config
    path.write_text(re.sub(r"lr: .*", "lr: 0.5", path.read_text()))
    with pytest.raises(UserError, match=r"train\.lr is 0\.5, and .*step-00000040\.safetensors was trained with 0\.001"):
        sitkit.load(folder)


def test_a_checkpoint_of_another_training_is_refused(run: Path, tmp_path: Path) -> None:
    other = run_training(tiny(tmp_path / "other", "train.seed=5"))
    for path in checkpoints(RunFolder(other).checkpoints):
        shutil.copy(path, RunFolder(run).checkpoints)
    with pytest.raises(UserError, match=r"train\.seed is 0, and .*step-00000040\.safetensors was trained with 5"):
        sitkit.load(run)
    config = tiny(run.parent, "run.checkpoint_every=10")
    assert folder_of(config) == run
    with pytest.raises(UserError, match=r"train\.seed is 0, and .* was trained with 5"):
        run_training(config)


def test_a_broken_run_or_record_hides_nothing_else(run: Path) -> None:
    broken = run.parent / "broken-000000000000"
    shutil.copytree(run, broken)
    RunFolder(broken).config.write_text("train: [\n")
    with pytest.warns(UserWarning, match="broken-000000000000 is passed over"):
        assert find_run("latest", run.parent) == run
    records = RunFolder(run).evaluations
    records.mkdir(exist_ok=True)
    for name, text in (("a", '{"metric": {"name": "frechet"}, "value": 2}'), ("b", "[1]"), ("c", "{"), ("d", "null")):
        (records / f"{name}.json").write_text(text)
    with pytest.warns(UserWarning) as caught:
        (summary,) = sitkit.list_runs(run.parent)
    assert (summary.folder, summary.values) == (run, (("frechet", 2.0),))
    messages = [str(warning.message) for warning in caught]
    for name in (
        "broken-000000000000 is left out",
        "b.json is not the record",
        "c.json:1: not JSON",
        "d.json is not the",
    ):
        assert sum(name in message for message in messages) == 1, messages


@pytest.mark.parametrize(
    "header", [{}, {"step": "3"}, {"step": 3, "config": 5}, {"step": -1}, {"step": 2.5}, {"widths": "a"}]
)
def test_a_checkpoint_of_another_form_is_passed_over_for_the_one_before_it(
    run: Path, header: dict[str, object]
) -> None:
    """Its digest is right: it is no damage of a disk."""
    folder = RunFolder(run).checkpoints
    newest = checkpoints(folder)[-1]
    save_tensors(folder / "step-00000999.safetensors", load_tensors(newest)[1], header)
    with pytest.warns(UserWarning, match="step-00000999.* It is passed over"):
        assert sitkit.load(run, device="cpu").step == int(newest.stem[5:])
    with pytest.raises(UserError, match="step-00000999"):
        sitkit.load(run, device="cpu", step=999)
