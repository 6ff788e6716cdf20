"""Identities of trainings on data in files: the content of the data counts, not the spelling of a path."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from support import flags, run, tiny

import sitkit
from sitkit.data.dataset import load_examples
from sitkit.runs.config.identity import training_identity
from sitkit.runs.config.schema import Config
from sitkit.runs.run_folder import RunFolder, folder_of, read_config_of
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import read_json, write_json
from sitkit.studies.tasks import location_of
from sitkit.training.train import run_training

SMALL = ("backbone={name: mlp, hidden_size: 8, depth: 1}", "train.steps=4", "run.checkpoint_every=2", "sample.n=4")


def archive(path: Path, seed: int = 0) -> Path:
    """Write 40 images of random pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, images=np.random.default_rng(seed).integers(0, 256, (40, 4, 4, 1), np.uint8))
    return path


def on(path: Path | str, *settings: str) -> Config:
    """Return a small training on the images in a file or a folder, whose runs go to `runs`."""
    name = "npz" if str(path).endswith(".npz") else "image-folder, size: 4, channels: 1"
    return tiny(Path("runs"), *SMALL, f"data={{name: {name}, path: {path}}}", *settings)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with images in data/x.npz, which is the folder of the process."""
    archive(tmp_path / "data" / "x.npz")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_spelling_of_a_path_is_the_same_training(here: Path) -> None:
    (here / "link.npz").symlink_to("data/x.npz")
    shutil.copy(here / "data/x.npz", here / "copy.npz")
    spellings = ["data/x.npz", "./data/x.npz", "data/../data/x.npz", str(here / "data/x.npz"), "link.npz", "copy.npz"]
    assert (
        len({folder_of(on(path)) for path in spellings})
        == len({training_identity(on(path)) for path in spellings})
        == 1
    )
    assert folder_of(on(archive(here / "other.npz", 1))) != folder_of(on("copy.npz"))
    folder = run_training(on(spellings[0]))
    before = {path: path.stat().st_mtime_ns for path in folder.glob("checkpoints/*")}
    for path in spellings[1:]:
        assert run_training(on(path)) == folder and sitkit.load(folder).config.data == on(path).data
    assert {path: path.stat().st_mtime_ns for path in folder.glob("checkpoints/*")} == before
    assert len(list(Path("runs").iterdir())) == 1


def test_a_folder_of_images_with_and_without_a_slash_at_its_end_is_the_same_data(here: Path) -> None:
    from PIL.Image import fromarray

    (here / "pictures").mkdir()
    for number in range(8):
        fromarray(np.full((4, 4), number * 20, np.uint8)).save(here / "pictures" / f"{number}.png")
    spellings = ["pictures", "pictures/", "./pictures", str(here / "pictures")]
    assert len({folder_of(on(path)) for path in spellings}) == 1


def test_moved_data_are_given_anew_and_other_data_are_refused(here: Path) -> None:
    folder = run_training(on("data/x.npz"))
    (number,) = sitkit.evaluate(folder, n=4, metric="sliced-wasserstein")
    (here / "elsewhere").mkdir()
    (here / "data/x.npz").rename(here / "elsewhere/x.npz")
    assert sitkit.load(folder).config.data == on("data/x.npz").data  # sampling needs no data
    load_examples.cache_clear()
    with pytest.raises(UserError, match=r"no such file.* If the data moved: --set data\.path=NEW"):
        sitkit.evaluate(folder, n=5, metric="sliced-wasserstein")
    moved = sitkit.load(folder, settings={"data.path": "elsewhere/x.npz"})
    assert len(moved.examples) == 40
    (again,) = sitkit.evaluate(moved, n=4, metric="sliced-wasserstein")
    assert again.path == number.path
    other = archive(here / "other.npz", 1)
    marks = [
        sitkit.datasets.create("npz", path=path).load().fingerprint[:12] for path in ("elsewhere/x.npz", str(other))
    ]
    message = rf"data\.path.*: .*{folder.name} was trained on data of fingerprint {marks[0]}, .* {marks[1]}"
    with pytest.raises(UserError, match=message):
        sitkit.load(folder, settings={"data.path": "other.npz"})
    with pytest.raises(UserError, match="data was fixed when"):
        sitkit.load(folder, settings={"data.holdout": 0.5})
    assert run_training(on("elsewhere/x.npz")) == folder
    assert len(sitkit.load(folder).examples) == 40  # the run keeps the new path


def test_a_stopped_training_continues_on_moved_data(here: Path) -> None:
    whole = run_training(on("data/x.npz", "run.folder=whole"))
    folder = run_training(on("data/x.npz"))
    (folder / "checkpoints/step-00000004.safetensors").unlink()
    (here / "data/x.npz").rename(here / "y.npz")
    assert run_training(on("y.npz")) == folder
    last = "checkpoints/step-00000004.safetensors"
    assert sitkit.load(folder).step == 4
    first, second = (sitkit.load(path).network.state_dict() for path in (whole.parent / folder.name, folder))
    assert (folder / last).is_file() and all(bool((first[name] == second[name]).all()) for name in first)


def test_data_that_changed_in_place_are_refused_with_both_fingerprints(here: Path) -> None:
    folder = run_training(on("data/x.npz"))
    old = read_json(RunFolder(folder).environment)["data"]
    archive(here / "data" / "x.npz", 1)
    load_examples.cache_clear()
    new = sitkit.datasets.create("npz", path="data/x.npz").load().fingerprint
    with pytest.raises(UserError, match=rf"changed since it was begun \(fingerprint {old[:12]}, now {new[:12]}\)"):
        run_training(on("data/x.npz"))


def test_a_run_is_found_without_its_data(here: Path) -> None:
    folder = run_training(on("data/x.npz"))
    (number,) = sitkit.evaluate(folder, n=4, metric="sliced-wasserstein")
    place = location_of(on("data/x.npz"))
    (here / "data/x.npz").unlink()
    load_examples.cache_clear()
    for path in ("data/x.npz", str(here / "data/x.npz")):
        assert folder_of(on(path)) == folder and location_of(on(path)) == place
    assert folder_of(on("other.npz")) != folder
    assert number.path.is_file()


def of_earlier_release(folder: Path) -> Path:
    """Give a run the name and the record that release 0.1 would have given it; return its folder."""
    older = folder.rename(folder.with_name(re.sub("[0-9a-f]{12}$", written(RunFolder(folder)), folder.name)))
    record = read_json(RunFolder(older).environment)
    for key in ("training", "settings"):
        del record[key]
    write_json(RunFolder(older).environment, record)
    return older


def test_a_training_of_an_earlier_release_is_found_by_its_settings(here: Path) -> None:
    older = of_earlier_release(run_training(on("data/x.npz")))
    assert folder_of(on("data/x.npz")) == older == folder_of(on("./data/x.npz"))
    assert run_training(on("./data/x.npz")) == older and sitkit.load(older).config.data == on("./data/x.npz").data
    assert folder_of(on("data/x.npz")) == older
    # A component whose formula changed since then gives other results: the old run is no run of it.
    target = type(read_config_of(older).target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, "version", 2)
        assert folder_of(on("data/x.npz")) != older


def test_a_training_of_an_earlier_release_with_other_times_is_not_taken_for_one_of_now(here: Path) -> None:
    config = on("data/x.npz", "interp=gvp", "target=score")
    older = of_earlier_release(run_training(config))
    # Release 0.1 moved the times past the last finite one to it; now the times are scaled.
    assert folder_of(config) != older
    assert sitkit.load(older).config.target == config.target


def written(files: RunFolder) -> str:
    """Return the identity that release 0.1 gave a run: that of its settings as they are written."""
    return read_json(files.environment)["settings"]


def test_the_command_line_trains_once_for_two_spellings(here: Path) -> None:
    for path in ("data/x.npz", "./data/x.npz"):
        words = flags(*SMALL, f"data={{name: npz, path: {path}}}")
        done = run("sitkit", "train", "points", *words, site=here, cwd=here)
        assert done.returncode == 0, done.stderr
    assert len(list((here / "runs").glob("*/config.yaml"))) == 1
