"""Images by Hugging Face `datasets`, from local files, by the library itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import datasets as library
import numpy as np
import pytest
import torch
from PIL import Image

from sitkit.data.dataset import batch
from sitkit.registry import UserError, datasets

PIXELS = np.random.default_rng(2).integers(0, 256, (12, 9, 9, 3), dtype=np.uint8)
LABELS = [k % 3 for k in range(12)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "library")


def table() -> library.Dataset:
    made = {"image": [Image.fromarray(picture) for picture in PIXELS], "label": LABELS}
    features = library.Features({"image": library.Image(), "label": library.ClassLabel(names=["x", "y", "z"])})
    return library.Dataset.from_dict(made, features)


@pytest.fixture(params=["disk", "splits", "parquet", "parquet folder", "imagefolder"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    place = tmp_path / "set"
    if request.param == "disk":
        table().save_to_disk(place)
    elif request.param == "splits":
        library.DatasetDict({"train": table(), "test": table().select(range(3))}).save_to_disk(place)
    elif request.param == "parquet":
        place = tmp_path / "set.parquet"
        table().to_parquet(place)
    elif request.param == "parquet folder":
        place.mkdir()
        table().to_parquet(place / "train.parquet")
    else:
        for k, picture in enumerate(PIXELS):
            (place / "xyz"[LABELS[k]]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(place / "xyz"[LABELS[k]] / f"{k:02}.png")
    return place


def test_it_is_read_by_index_from_every_kind_of_local_file(path: Path) -> None:
    examples = datasets.create("hub", path=str(path), size=9).load()
    assert examples.shape == (3, 9, 9) and examples.class_names == ("x", "y", "z")
    order = np.argsort(LABELS, kind="stable") if path.is_dir() and (path / "x").is_dir() else np.arange(12)
    assert examples.labels.tolist() == np.array(LABELS)[order].tolist()
    back = ((examples.read(np.arange(12)) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(back, PIXELS[order])
    again = datasets.create("hub", path=str(path), size=9).load()
    assert again.fingerprint == examples.fingerprint
    for one, two in zip(batch(examples, 1, 5, 8)[:2], batch(again, 1, 5, 8)[:2], strict=True):
        assert torch.equal(one, two)


def test_columns_are_named_or_found(tmp_path: Path) -> None:
    made = table().add_column("kind", [f"k{k % 2}" for k in range(12)]).add_column("number", [k % 4 for k in range(12)])  # pyright: ignore
    made = made.add_column("negative", [k - 1 for k in range(12)]).add_column("real", [k / 2 for k in range(12)])  # pyright: ignore
    made.save_to_disk(tmp_path / "set")

    def classes(**fields: Any) -> tuple[str, ...]:
        return datasets.create("hub", path=str(tmp_path / "set"), size=4, **fields).load().class_names

    assert classes() == classes(label="label", image="image") == ("x", "y", "z")
    assert classes(label="kind") == ("k0", "k1") and classes(label="number") == ("0", "1", "2", "3")
    assert classes(label="") == ()
    for fields, reason in (
        ({"label": "lable"}, "no column 'lable'.* Did you mean 'label'"),
        ({"image": "label"}, "column 'label' holds no images"),
        ({"label": "negative"}, "column 'negative' has -1 at example 0"),
        ({"label": "real"}, "holds no classes"),
    ):
        with pytest.raises(UserError, match=reason):
            classes(**fields)
    made.remove_columns("label").save_to_disk(tmp_path / "none")
    with pytest.raises(UserError, match="which column is the label"):
        datasets.create("hub", path=str(tmp_path / "none"), size=4).load()
    made.add_column("second", LABELS).cast_column("second", library.ClassLabel(3)).save_to_disk(tmp_path / "two")  # pyright: ignore
    with pytest.raises(UserError, match="which column is the label. It has label, second"):
        datasets.create("hub", path=str(tmp_path / "two"), size=4).load()


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    library.DatasetDict({"train": table()}).save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match="no split 'test'; it has: train"):
        datasets.create("hub", path=str(tmp_path / "set"), size=4, split="test").load()
    with pytest.raises(UserError, match="no such folder or file"):
        datasets.create("hub", path=str(tmp_path / "missing"), size=4).load()


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    made = {"image": [{"bytes": b"no image", "path": "odd.png"}], "label": [0]}
    features = library.Features({"image": library.Image(), "label": library.ClassLabel(1)})
    library.Dataset.from_dict(made, features).save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match=r"example 0 \(odd\.png\): cannot identify"):
        datasets.create("hub", path=str(tmp_path / "set"), size=4, holdout=0.0).load()


def test_an_absent_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'sitkit\[hub\]'") as caught:
        datasets.create("hub", path="owner/name", size=4).load()
    assert "\n" not in str(caught.value)
