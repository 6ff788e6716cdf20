"""The origin in the record of a number: code, packages, plugins, machine, data, seeds, cost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from support import copied, tiny, trained

import sitkit
from sitkit.runs.checkpoint import checkpoints
from sitkit.runs.config.sources import Layer
from sitkit.runs.environment import code_version, continued, environment, git_state
from sitkit.runs.evaluate import measure_run
from sitkit.runs.run import load
from sitkit.runs.run_folder import RunFolder
from sitkit.runtime.files import read_json, to_json, write_json
from sitkit.runtime.tensors import digest_of
from sitkit.training.train import run_training


def git(folder: Path, *words: str) -> str:
    settings = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    return subprocess.run(
        ["git", *settings, *words], cwd=folder, check=True, capture_output=True, text=True, env=clean
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder of code in a repository with one commit."""
    folder = tmp_path / "repository" / "package"
    folder.mkdir(parents=True)
    git(folder, "init", "-q")
    (folder / "code.py").write_text("one = 1\n")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "one")
    return folder


def test_a_clean_checkout_is_its_commit(checkout: Path) -> None:
    assert git_state(checkout) == {"commit": git(checkout, "rev-parse", "HEAD"), "dirty": False, "diff": None}


def test_uncommitted_code_is_recorded_as_a_hash_of_its_content(checkout: Path) -> None:
    clean = git_state(checkout)
    assert clean is not None
    hashes = set()
    for name, text in (
        ("code.py", "one = 2\n"),
        ("code.py", "one = 3\n"),
        ("new.py", "a = 1\n"),
        ("new.py", "a = 2\n"),
    ):
        (checkout / name).write_text(text)
        state = git_state(checkout)
        assert state is not None and state["dirty"] and state["commit"] == clean["commit"]
        hashes.add(state["diff"])
    assert len(hashes) == 4
    # Equal changes have equal hashes, wherever and whenever they are made.
    other = Path(shutil.copytree(checkout.parent, checkout.parent.parent / "other")) / checkout.name
    assert git_state(other) == git_state(checkout)
    (checkout / "new.py").unlink()
    git(checkout, "checkout", "--", ".")
    assert git_state(checkout) == clean


def test_the_hash_does_not_depend_on_the_git_settings_of_a_user(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "old.py").write_text("a = 1\nb = 2\nc = 3\n")
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "two")
    (checkout / "old.py").rename(checkout / "renamed.py")
    git(checkout, "add", ".")
    (checkout / "code.py").write_text("one = 2\n")
    (checkout / "new.py").write_text("a = 1\n")
    plain = git_state(checkout)
    assert plain is not None and plain["dirty"]
    (checkout / "old.py").write_text("")
    assert git_state(checkout) != plain, "a deleted file is not an empty file"
    (checkout / "old.py").unlink()
    settings = tmp_path / "gitconfig"
    settings.write_text(
        "[diff]\nexternal = true\nnoprefix = true\nmnemonicPrefix = true\nrenames = copies\nrelative = false\n"
        "context = 0\nalgorithm = patience\norderFile = /dev/null\n[color]\nui = always\n[core]\nquotePath = false\n"
    )
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", "true")
    assert git_state(checkout) == plain


def test_files_beside_the_code_do_not_make_it_dirty(checkout: Path) -> None:
    (checkout.parent / "notes.txt").write_text("not of the package")
    state = git_state(checkout)
    assert state is not None and not state["dirty"]


def test_a_folder_that_its_repository_does_not_track_has_no_commit(checkout: Path, tmp_path: Path) -> None:
    installed = checkout / ".venv" / "lib"
    installed.mkdir(parents=True)
    (installed / "code.py").write_text("one = 1\n")
    (checkout / ".gitignore").write_text(".venv\n")
    assert git_state(installed) is None and git_state(tmp_path) is None


def test_the_environment_names_everything_that_computes() -> None:
    record = environment(torch.device("cpu"))
    assert record["packages"]["sitkit"] == sitkit.__version__ and record["packages"]["torch"] == torch.__version__
    assert record["device"] == "cpu" and record["threads"] == torch.get_num_threads() and "cuda" not in record
    assert record["cpu"]["name"] and record["cpu"]["instructions"]
    for key in ("python", "platform", "git", "plugins", "plugin_code", "components", "command"):
        assert key in record
    assert json.loads(to_json(record)) == record


def test_the_code_in_a_few_words() -> None:
    packages = {"packages": {"sitkit": "1.2.3"}}
    assert code_version(packages | {"git": None}) == "sitkit 1.2.3"
    clean = {"commit": "ab" * 20, "dirty": False, "diff": None}
    assert code_version(packages | {"git": clean}) == "sitkit 1.2.3, commit abababababab"
    dirty = clean | {"dirty": True, "diff": "cd" * 32}
    assert code_version(packages | {"git": dirty}).endswith("abababababab with uncommitted changes cdcdcdcdcdcd")


def test_a_training_that_continues_elsewhere_keeps_its_earlier_environments() -> None:
    first = {"python": "3.11", "command": ["a"]}
    assert continued(first, first | {"command": ["b"]}, 10) == first | {"command": ["b"]}
    assert continued(first, {"python": "3.12"}, 0) == {"python": "3.12"}, "nothing was done there"
    second = continued(first, {"python": "3.12", "command": ["b"]}, 10)
    assert second == {"python": "3.12", "command": ["b"], "before": [{"until": 10, **first}]}
    third = continued(second, {"python": "3.13", "command": ["c"]}, 20)
    assert [(then["until"], then["python"]) for then in third["before"]] == [(10, "3.11"), (20, "3.12")]


def test_a_finished_training_keeps_the_record_of_its_environment(tmp_path: Path) -> None:
    """A second call with other code or packages trains nothing, so the record must not change."""
    folder = copied(trained(), tmp_path / "runs")
    path = RunFolder(folder).environment
    then = read_json(path) | {"python": "3.1.4"}
    write_json(path, then)
    config = tiny(tmp_path / "runs")
    assert run_training(config) == folder and read_json(path) == then
    for newest in checkpoints(folder / "checkpoints")[-1:]:
        newest.unlink()
    run_training(tiny(tmp_path / "runs"))
    now = read_json(path)
    assert now["python"] != "3.1.4" and now["data"] == then["data"]


def test_the_record_of_a_number_has_all_that_it_depends_on(tmp_path: Path) -> None:
    folder = copied(trained(), tmp_path / "runs")
    run = load(folder)
    (number,) = measure_run(run.with_settings(Layer({"sample": {"n": 20, "seed": 3}})))
    record = read_json(number.path)
    assert record["environment"]["packages"]["torch"] and "git" in record["sampling"]["environment"]
    assert record["trained"] == read_json(RunFolder(folder).environment)
    assert record["data"] == record["reference"]["fingerprint"] == run.examples.fingerprint
    assert record["seeds"] == {"train": 0, "sample": 3, "metric": 0}
    assert record["nfe"] == record["sampling"]["nfe"] > 0 and record["rounding"] == "none"
    weights = digest_of(run.network.state_dict())
    assert record["checkpoint"] == {"step": 40, "weights": "ema", "fingerprint": weights} and record["n"] == 20
    assert record["environment"]["device"] == "cpu" and record["environment"]["threads"] >= 1
