"""Images by Hugging Face `datasets`, from local files, by the library itself."""

from __future__ import annotations

import io
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets as library
import fsspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support import tiny

from sitkit.data.dataset import Examples
from sitkit.data.parquet import Files, Rows, nearly_shuffled
from sitkit.data.stream import batch, indices
from sitkit.registry import datasets
from sitkit.runs.checkpoint import checkpoints
from sitkit.runtime.errors import UserError, WorkFailed
from sitkit.runtime.tensors import load_tensors
from sitkit.training.train import run_training

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


def test_examples_are_read_by_index_from_every_kind_of_local_file(path: Path) -> None:
    examples = datasets.create("hub", path=str(path), size=9).load()
    assert examples.shape == (3, 9, 9) and examples.class_names == ("x", "y", "z")
    order = np.argsort(LABELS, kind="stable") if path.is_dir() and (path / "x").is_dir() else np.arange(12)
    assert examples.labels.tolist() == np.array(LABELS)[order].tolist()
    back = ((examples.read(np.arange(12)) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(back, PIXELS[order])
    again = datasets.create("hub", path=str(path), size=9).load()
    assert again.fingerprint == examples.fingerprint
    for ours, theirs in zip(batch(examples, 1, 5, 8)[:2], batch(again, 1, 5, 8)[:2], strict=True):
        assert torch.equal(ours, theirs)


def test_columns_are_given_or_inferred(tmp_path: Path) -> None:
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


def test_a_missing_split_is_refused(tmp_path: Path) -> None:
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


ROWS = 10


@pytest.fixture
def streamed(tmp_path: Path) -> Path:
    """Four files of six row groups of ten images, whose pixels are the number of the image."""
    (tmp_path / "files").mkdir()
    for part in range(4):
        numbers = range(60 * part, 60 * part + 60)
        made = {"image": [Image.new("L", (8, 8), n) for n in numbers], "label": [n % 3 for n in numbers]}
        features = library.Features({"image": library.Image(), "label": library.ClassLabel(names=["x", "y", "z"])})
        library.Dataset.from_dict(made, features).to_parquet(tmp_path / f"files/train-{part}.parquet", batch_size=ROWS)
    return tmp_path / "files"


def streaming(path: Path, **fields: Any) -> Examples:
    return datasets.create("hub", path=str(path), size=8, channels=1, streaming=True, **fields).load()


def numbers(x: torch.Tensor) -> list[int]:
    return ((x[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def test_a_stream_has_the_examples_of_the_files(streamed: Path) -> None:
    examples = streaming(streamed)
    mapped = datasets.create("hub", path=str(streamed), size=8, channels=1).load()
    assert examples.class_names == mapped.class_names and np.array_equal(examples.labels, mapped.labels)
    index = np.random.default_rng(0).permutation(240)
    assert torch.equal(examples.read(index), mapped.read(index)) and numbers(examples.read(index)) == index.tolist()
    assert (
        streaming(streamed).fingerprint == examples.fingerprint != streaming(streamed / "train-0.parquet").fingerprint
    )
    # 24 row groups of ten: 5 % is one of them, whole.
    assert len(examples.heldout) == ROWS and len(set(examples.heldout // ROWS)) == 1
    assert sorted([*examples.train, *examples.heldout]) == list(range(240))


@given(seed=st.integers(0, 2**31), window=st.integers(1, 30), size=st.integers(1, 50), ranks=st.integers(1, 3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
def test_an_epoch_has_every_example_once_for_every_batch_size(
    streamed: Path, seed: int, window: int, size: int, ranks: int
) -> None:
    examples = streaming(streamed, window=window)
    n = len(examples.train)
    stream = indices(examples, seed, np.arange(2 * n))
    assert sorted(stream[:n]) == sorted(stream[n:]) == examples.train.tolist()
    # A batch depends on seed and step alone, for any number of processes.
    again, step = streaming(streamed, window=window), 3
    if size >= ranks:
        parts = [batch(again, seed, step, size, (rank, ranks)) for rank in range(ranks)]
        assert [number for x, _, _ in parts for number in numbers(x)] == stream[
            np.arange(step * size, (step + 1) * size) % (2 * n)
        ].tolist()
        assert torch.equal(torch.cat([y for _, y, _ in parts]), batch(examples, seed, step, size)[1])


def test_a_row_group_is_fetched_once_per_epoch_and_few_stay_in_memory(streamed: Path) -> None:
    fetched: list[int] = []
    files = Files([str(path) for path in sorted(streamed.iterdir())])
    honest = files.group
    files.group = lambda number, column: (fetched.append(number), honest(number, column))[1]  # pyright: ignore
    window = 3
    rows, train = Rows(files, "image", 2 * window), np.arange(240)
    order = nearly_shuffled(train, files.starts, window)(0, 0)
    for number in order:
        assert rows[int(number)]["bytes"]
        assert rows.group.cache_info().currsize <= 2 * window
    assert sorted(fetched) == list(range(24))
    # It is shuffled: neighbours in the stream are of several row groups, and another epoch has another order.
    assert np.mean(np.diff(order // ROWS) != 0) > 0.5
    assert not np.array_equal(order, nearly_shuffled(train, files.starts, window)(0, 1))


def test_threads_that_need_the_same_row_group_fetch_it_once(streamed: Path) -> None:
    fetched: list[int] = []
    files = Files([str(streamed / "train-0.parquet")])
    honest = files.group

    def slow(number: int, column: str) -> Any:
        fetched.append(number)
        time.sleep(0.05)
        return honest(number, column)

    files.group = slow  # pyright: ignore[reportAttributeAccessIssue]
    rows = Rows(files, "image", 4)
    with ThreadPoolExecutor(8) as pool:
        assert len({len(entry["bytes"]) > 0 for entry in pool.map(rows.__getitem__, [3] * 8)}) == 1
    assert fetched == [0]


def test_a_row_group_whose_fetch_is_interrupted_is_fetched_again(streamed: Path) -> None:
    files = Files([str(streamed / "train-0.parquet")])
    honest = files.group

    def interrupted(number: int, column: str) -> Any:
        files.group = honest
        raise KeyboardInterrupt

    files.group = interrupted  # pyright: ignore[reportAttributeAccessIssue]
    rows = Rows(files, "image", 4)
    with pytest.raises(KeyboardInterrupt):
        _ = rows[3]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(rows.__getitem__, 3).result(timeout=10)["bytes"]


def test_remote_files_are_read_by_fsspec_and_a_missing_file_is_named(streamed: Path) -> None:
    system = fsspec.filesystem("memory")
    for path in sorted(streamed.iterdir()):
        system.pipe(f"/far/{path.name}", path.read_bytes())
    files = Files([f"memory://far/train-{k}.parquet" for k in range(4)])
    rows = Rows(files, "image", 4)
    assert files.count == 240 and Image.open(io.BytesIO(rows[217]["bytes"])).getpixel((0, 0)) == 217
    system.rm("/far/train-1.parquet")
    with pytest.raises(WorkFailed, match="train-1.parquet: cannot be read"):
        rows[70]
    with pytest.raises(UserError, match="train-1.parquet: cannot be read as parquet"):
        Files(["memory://far/train-1.parquet"])


def test_sets_that_cannot_be_streamed_are_refused(tmp_path: Path, streamed: Path) -> None:
    for k, picture in enumerate(PIXELS):
        (tmp_path / "images" / "xyz"[LABELS[k]]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "images" / "xyz"[LABELS[k]] / f"{k:02}.png")
    with pytest.raises(UserError, match="streaming reads parquet files"):
        streaming(tmp_path / "images")
    with pytest.raises(UserError, match="no split 'test'; it has: train"):
        streaming(streamed, split="test")
    (streamed / "train-3.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(UserError, match=r"train-3\.parquet"):
        streaming(streamed)
    with pytest.raises(UserError, match="window must be at least 1"):
        streaming(streamed, window=0)


def test_a_training_from_a_stream_continues_to_the_same_bits(tmp_path: Path, streamed: Path) -> None:
    words = [
        f"data={{name: hub, path: {streamed}, size: 8, channels: 1, streaming: true, window: 2}}", "train.steps=20",
        "run.checkpoint_every=10", "train.batch=16", "run.sample_every=0",
    ]  # fmt: skip
    whole = run_training(tiny(tmp_path / "whole", *words, base="digits"))
    half, _ = checkpoints(whole / "checkpoints")
    begun = tmp_path / "continued" / whole.name / "checkpoints"
    begun.mkdir(parents=True)
    shutil.copy(half, begun)
    continued = run_training(tiny(tmp_path / "continued", *words, base="digits"))
    ends = [load_tensors(checkpoints(run / "checkpoints")[-1])[1] for run in (whole, continued)]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_an_absent_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'sitkit\[hub\]'") as caught:
        datasets.create("hub", path="owner/name", size=4).load()
    assert "\n" not in str(caught.value)
