"""Every reader of files with made-up and damaged content: only the one-line error may come out, and nothing hangs."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from safetensors.numpy import save
from support import STUDY, call, copied, trained, write_study

import sitkit
from sitkit.data.decoding import FORMATS
from sitkit.results.report.run import read_training, run_page
from sitkit.runs.config.mappings import flat
from sitkit.runs.config.plain_yaml import to_yaml
from sitkit.runs.config.sources import assemble, configure, read_assignments, read_config, read_yaml
from sitkit.runs.one_file import read_run_header
from sitkit.runs.run import initial_network
from sitkit.runtime.errors import LeftOut, UserError, WorkFailed
from sitkit.runtime.tensors import load_tensors
from sitkit.studies.search.space import read_search
from sitkit.studies.study_file import read_study
from sitkit.training.step import forget_rows

pytestmark = pytest.mark.slow
fuzz = settings(
    max_examples=100,
    deadline=60_000,  # milliseconds, on a busy machine: no input may stop a reader
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(
    ["../..", "/etc/passwd", "nan", "1e999", "\x1b[2J", "\u202e", "heun", "a/b", "", 2**64, -1, 0, 1e308, 10**400]
)  # fmt: skip
TREES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes with a few bytes changed, removed, repeated or added, or cut short."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        first = draw(st.integers(0, len(data)))
        last = min(len(data), first + draw(st.integers(0, 40)))
        data[first:last] = draw(st.just(b"") | st.binary(max_size=20) | st.just(bytes(data[first:last]) * 2))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 4)) == 0 else data)


def replaced(value: Any, path: list[int], new: Any) -> Any:
    """Plain values with one of them replaced: `path` chooses an item at each level."""
    if not path or not isinstance(value, dict | list) or not value:
        return new
    if isinstance(value, list):
        number = path[0] % len(value)
        return [replaced(item, path[1:], new) if i == number else item for i, item in enumerate(value)]
    chosen = sorted(value)[path[0] % len(value)]
    return {key: replaced(item, path[1:], new) if key == chosen else item for key, item in value.items()}


@contextlib.contextmanager
def only_named_errors() -> Iterator[None]:
    """Only errors of one line for the user may leave the block."""
    with warnings.catch_warnings(action="ignore"), contextlib.suppress(UserError, WorkFailed):
        yield


@contextlib.contextmanager
def content(path: Path, data: bytes) -> Iterator[None]:
    """Give a file other bytes within the context."""
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        with only_named_errors():
            yield
    finally:
        path.write_bytes(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with samples, a number and a likelihood."""
    run = copied(trained(), tmp_path_factory.mktemp("fuzz") / "runs")
    for words in (
        ("evaluate", "-n", "32", "--steps", "2"),
        ("likelihood", "-n", "4", "--sampler", "heun", "--steps", "2"),
    ):
        result = call(words[0], run, *words[1:])
        assert result.status == 0, result.err
    return run


def look(folder: Path) -> list[Callable[[], Any]]:
    """Everything that reads the files of a run."""
    root = folder.parent
    return [
        lambda: sitkit.list_runs(root),
        lambda: sitkit.load(folder),
        lambda: sitkit.explain(str(folder), runs=root),
        lambda: sitkit.diff(str(folder), str(folder), runs=root),
        lambda: run_page(folder),
    ]


POINTS = read_config("points").values
SETTINGS = sorted(flat(configure("points").plain()))


@fuzz
@given(st.data())
def test_settings(data: st.DataObject) -> None:
    whole = to_yaml(POINTS).encode()
    path = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=3))
    values = st.builds(lambda new: to_yaml(replaced(POINTS, path, new)).encode(), TREES)
    text = data.draw(damaged(whole) | values).decode(errors="replace")
    with only_named_errors():
        assemble([read_yaml("settings.yaml", text)])


@fuzz
@given(st.sampled_from(SETTINGS) | st.text(), TREES.map(json.dumps) | st.text())
def test_assignments(key: str, value: str) -> None:
    with only_named_errors():
        assemble([read_config("points"), read_assignments([f"{key}={value}"])])


@fuzz
@given(st.data())
def test_records(folder: Path, data: st.DataObject) -> None:
    record = data.draw(st.sampled_from(sorted(folder.rglob("*.json"))))
    value, path = json.loads(record.read_text()), data.draw(st.lists(st.integers(0, 20), max_size=5))
    texts = st.builds(lambda new: json.dumps(replaced(value, path, new)).encode(), TREES)
    text, reader = data.draw(damaged(record.read_bytes()) | texts), data.draw(st.sampled_from(look(folder)))
    with content(record, text):
        reader()


@fuzz
@given(st.data())
def test_curves(folder: Path, data: st.DataObject) -> None:
    rows = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    line = json.loads(rows[-1])
    path = data.draw(st.lists(st.integers(0, 20), max_size=2))
    lines = st.builds(lambda new: b"".join(rows) + json.dumps(replaced(line, path, new)).encode() + b"\n", TREES)
    text = data.draw(damaged(b"".join(rows)) | lines)
    with content(folder / "metrics.jsonl", text):
        read_training(folder, LeftOut())
        if data.draw(st.integers(0, 4)) == 0:
            run_page(folder)
        forget_rows(folder / "metrics.jsonl", 20)


@fuzz
@given(st.data())
def test_archives_of_samples(folder: Path, data: st.DataObject) -> None:
    archive = next(folder.glob("samples/*/samples.npz"))
    with content(archive, data.draw(damaged(archive.read_bytes()))):
        samples = sitkit.sample(folder, n=32, steps=2, runs=folder.parent)
        _ = samples.x, samples.y


@fuzz
@given(st.data())
def test_checkpoints(folder: Path, data: st.DataObject) -> None:
    path = sorted(folder.glob("checkpoints/*.safetensors"))[-1]
    size = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    head = damaged(path.read_bytes()[:size]).map(lambda changed: changed + path.read_bytes()[size:])
    with content(path, data.draw(head | damaged(path.read_bytes()))):
        sitkit.load(folder)


@fuzz
@given(st.lists(st.integers(0, 20), max_size=5), TREES, st.sampled_from(["whole", "text"]), st.text())
def test_headers(folder: Path, path: list[int], new: Any, kind: str, text: str) -> None:
    config = configure("points", settings={"backbone.hidden_size": 8, "backbone.depth": 1, "data.size": 40})
    state = {name: tensor.numpy() for name, tensor in initial_network(config).state_dict().items()}
    header = {
        "kind": "run", "format": 1, "step": 3, "weights": "ema", "config": config.plain(),
        "data": {"shape": [2], "class_names": [], "fingerprint": "0"}, "fingerprints": {"autoencoder": "0", "weights": "0"},
    }  # fmt: skip
    made = json.dumps(replaced(header, path, new)) if kind == "whole" else text
    with (folder.parent.parent / "one.safetensors").open("wb") as file:
        file.write(save(state, {"sitkit": made}))
    for reader in (read_run_header, load_tensors, sitkit.load):
        with only_named_errors():
            reader(Path(file.name))


@fuzz
@given(st.data())
def test_archives_of_images(folder: Path, data: st.DataObject) -> None:
    shapes = arrays.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=6)
    kinds = st.just(np.dtype("uint8")) | arrays.scalar_dtypes() | arrays.unicode_string_dtypes()
    names = st.sampled_from(["images", "labels", "label_names", "x"])
    parts = data.draw(st.dictionaries(names, kinds.flatmap(lambda kind: arrays.arrays(kind, shapes)), max_size=3))
    file = io.BytesIO()
    np.savez(file, **{"images": np.zeros((6, 4, 4, 1), np.uint8), **parts})
    path = folder.parent.parent / "images.npz"
    path.write_bytes(data.draw(st.just(file.getvalue()) | damaged(file.getvalue())))
    for size in (None, 8):
        with only_named_errors():
            sitkit.datasets.create("npz", path=str(path), size=size).load()


def written(kind: str) -> bytes:
    """A small image in a format."""
    file = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(file, kind)
    return file.getvalue()


@fuzz
@given(st.data())
def test_images(folder: Path, data: st.DataObject) -> None:
    place = folder.parent.parent / "images" / "a"
    place.mkdir(parents=True, exist_ok=True)
    (place / "whole.png").write_bytes(written("png"))
    whole = data.draw(st.sampled_from(FORMATS).map(written))
    (place / "x.png").write_bytes(data.draw(damaged(whole) | st.binary()))
    with only_named_errors():
        examples = sitkit.datasets.create("image-folder", path=str(place.parent), size=8).load()
        examples.read(np.arange(len(examples)))


@fuzz
@given(st.data())
def test_parquet(folder: Path, data: st.DataObject) -> None:
    library = pytest.importorskip("datasets")
    features = library.Features({"image": library.Image(), "label": library.ClassLabel(names=["x", "y"])})
    table = library.Dataset.from_dict({"image": [{"bytes": written("png")}] * 4, "label": [0, 1, 0, 1]}, features)
    path = folder.parent.parent / "set.parquet"
    table.to_parquet(path)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    with only_named_errors():
        examples = sitkit.datasets.create("hub", path=str(path), size=8, streaming=True).load()
        examples.read(np.arange(len(examples)))


SEARCH = """
objective: {metric: sliced-wasserstein, against: nfe, nfe: 20}
space:
  sampler: [heun, euler-maruyama]
  nfe: {low: 4, high: 20}
screen: {n: 50, seed: 0}
confirm: {n: 50, seeds: [1, 2], fresh: [3, 4], best: 1}
"""


@fuzz
@given(st.data())
def test_studies_and_searches(folder: Path, data: st.DataObject) -> None:
    place = folder.parent.parent
    write_study(place)
    whole, read = data.draw(
        st.sampled_from([(STUDY, read_study), (SEARCH, lambda path: read_search(path, configure("points")))])
    )
    values, path = read_yaml("a file", whole).values, data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=3))
    trees = st.builds(lambda new: to_yaml(replaced(values, path, new)).encode(), TREES)
    (place / "study.yaml").write_bytes(data.draw(damaged(whole.encode()) | trees))
    with only_named_errors():
        read(place / "study.yaml")
