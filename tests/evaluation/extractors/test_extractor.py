"""Extractors: every row a function of its own image, equal weights equal features, and what is absent said in a line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import sitkit
from sitkit.data.dataset import Examples, in_memory
from sitkit.evaluation.extractors.classifier import RunClassifier
from sitkit.evaluation.extractors.extractor import FEATURE_ROWS, Extraction
from sitkit.evaluation.extractors.pretrained import Dinov2, Inception
from sitkit.registry import extractors
from sitkit.runtime.errors import UserError
from sitkit.runtime.progress import Event
from sitkit.runtime.tensors import read_header

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> Examples:
    return sitkit.datasets.create("digits").load()


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DINOv2 with random weights, saved as a published one is."""
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dino")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=28)
        Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def built(digits: Examples, dino: Path) -> dict[str, Extraction]:
    parts = (
        extractors.create("pixels"), RunClassifier(steps=150, width=32), Dinov2(model=str(dino), size=28),
    )  # fmt: skip
    return {part.name: part.build(digits, CPU, None) for part in parts}


@pytest.mark.parametrize("name", ["pixels", "run-classifier", "dinov2"])
def test_a_row_is_its_image_s_alone(built: dict[str, Extraction], digits: Examples, name: str) -> None:
    extraction, x = built[name], digits.read(np.arange(FEATURE_ROWS + 9))
    rows = extraction(x.clone().requires_grad_())
    assert set(rows) == set(extraction.outputs)
    for output, values in rows.items():
        assert values.dtype == torch.float32 and values.ndim == 2 and len(values) == FEATURE_ROWS + 9, output
        assert not values.requires_grad
        # Blocks are filled up to one size, so that the same place in a block gives the same bits for any number of rows.
        assert torch.equal(extraction(x[:5])[output], values[:5])
        assert torch.equal(extraction(x[FEATURE_ROWS:])[output], values[FEATURE_ROWS:])
        assert float(values.std()) > 0


def test_the_classifier_knows_the_digits_and_is_the_same_again(digits: Examples, built: dict[str, Extraction]) -> None:
    first, again = built["run-classifier"], RunClassifier(steps=150, width=32).build(digits, CPU, None)
    assert first.fingerprint == again.fingerprint
    assert RunClassifier(steps=1, width=16, seed=1).build(digits, CPU, None).fingerprint != first.fingerprint
    # 90 held-out digits; ten classes, so that chance is 0.1.
    assert first.record["accuracy"] > 0.9 and first.record["heldout"] == 90
    x = digits.read(digits.heldout)
    right = first(x)["logits"].argmax(1).numpy() == digits.labels[digits.heldout]
    assert right.mean() == first.record["accuracy"]
    assert first(x)["features"].shape == (90, 32) and first(x)["spatial"].shape == (90, 7 * 4 * 4)


def test_the_classifier_is_trained_once_for_a_folder_and_says_how_far_it_is(digits: Examples, tmp_path: Path) -> None:
    extractor, told = RunClassifier(steps=3, width=8), list[Event]()
    first = extractor.build(digits, CPU, tmp_path, told.append)
    assert told == [Event("run-classifier", step, 3) for step in (1, 2, 3)]
    (path,) = tmp_path.glob("*.safetensors")
    before = path.stat().st_mtime_ns
    again = extractor.build(digits, CPU, tmp_path, told.append)
    assert len(told) == 3
    assert again.fingerprint == first.fingerprint and path.stat().st_mtime_ns == before
    assert again.record == first.record == {k: read_header(path)[k] for k in ("accuracy", "heldout", "steps")}
    RunClassifier(steps=4, width=8).build(digits, CPU, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_points_have_a_classifier_without_places() -> None:
    values = np.random.default_rng(0).normal(size=(300, 2)).astype(np.float32)
    data = in_memory(values, (values[:, 0] > 0).astype(np.int64), ("left", "right"), holdout=0.1)
    extraction = RunClassifier(steps=60, width=8).build(data, CPU, None)
    assert extraction.outputs == ("features", "logits") and extraction.record["accuracy"] > 0.9
    with pytest.raises(UserError, match="sfid reads spatial"):
        sitkit.metrics.create("sfid", features="run-classifier").require(extraction)


def test_what_cannot_be_classified_is_refused() -> None:
    unlabelled = in_memory(np.zeros((20, 1, 4, 4), np.float32), None, (), holdout=0.1)
    with pytest.raises(UserError, match="needs labels, and the data have none"):
        RunClassifier().build(unlabelled, CPU, None)
    with pytest.raises(UserError, match="needs a data set for training"):
        sitkit.metrics.create("frechet", features="run-classifier").measure(torch.zeros(3, 2), torch.zeros(3, 2))
    for fields, message in (
        ({"width": 12}, "multiple of 8"),
        ({"steps": 0}, "at least 1"),
        ({"seed": -1}, "at least 0"),
    ):
        with pytest.raises(UserError, match=message):
            extractors.create("run-classifier", **fields)


def test_dinov2_reads_the_class_token_of_normalised_images(dino: Path, built: dict[str, Extraction]) -> None:
    from transformers import Dinov2Model

    x = torch.rand(3, 3, 28, 28) * 2 - 1
    # At its own size nothing is resized: what is left is the normalisation.
    mean, deviation = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        network = Dinov2Model.from_pretrained(dino).eval()
        states = network(pixel_values=((x + 1) / 2 - mean) / deviation).last_hidden_state
    # Interpolation to the same size and blocks of another number of rows: 2^-24 of values of size 1, some ten times.
    torch.testing.assert_close(built["dinov2"](x)["features"], states[:, 0], atol=1e-5, rtol=0)
    assert "28" in built["dinov2"].record["preprocessing"]
    grey = x[:, :1]
    assert torch.equal(built["dinov2"](grey)["features"], built["dinov2"](grey.expand(-1, 3, -1, -1))["features"])
    with pytest.raises(UserError, match="needs images of 1 or 3 channels"):
        built["dinov2"](x[:, :2])


def test_other_weights_or_another_size_have_another_fingerprint(dino: Path, built: dict[str, Extraction]) -> None:
    other = Dinov2(model=str(dino), size=42).build(None, CPU, None)
    assert other.fingerprint != built["dinov2"].fingerprint
    with pytest.raises(UserError, match="features 'dinov2' cannot load '/nowhere'"):
        Dinov2(model="/nowhere").build(None, CPU, None)


def test_an_absent_package_is_one_line_that_names_the_extra() -> None:
    if __import__("importlib.util").util.find_spec("torch_fidelity") is not None:
        pytest.skip("torch-fidelity is installed here")
    with pytest.raises(UserError, match=r"pip install 'sitkit\[inception\]'") as refused:
        Inception().build(None, CPU, None)
    assert "\n" not in str(refused.value)
