"""Latents on disk: they equal those of their autoencoder, and others are refused."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support import autoencoder, call, flipped_bit, tiny

from sitkit.data.dataset import load_examples
from sitkit.data.stream import batch
from sitkit.models.encode import encode
from sitkit.registry import autoencoders, datasets, spec
from sitkit.runs.run import load
from sitkit.runtime.errors import UserError
from sitkit.training.train import run_training


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an autoencoder (vae), its data (set.npz) and their latents (latents)."""
    folder = tmp_path_factory.mktemp("made")
    autoencoder(folder / "vae")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "set.npz", images=pixels, labels=np.arange(50) % 3, label_names=np.array(["a", "b", "c"]))
    data = datasets.create("npz", path=str(folder / "set.npz"), flip=True)
    encode(data, autoencoder=vae(folder), out=folder / "latents", per_shard=16)
    return folder


def vae(folder: Path):
    return autoencoders.create("sd-vae", path=str(folder / "vae"))


def test_a_batch_of_latents_is_the_batch_of_images_encoded(folder: Path) -> None:
    latents = datasets.create("latents", path=str(folder / "latents")).load()
    images = datasets.create("npz", path=str(folder / "set.npz"), flip=True).load()
    assert latents.shape == (2, 4, 4) and latents.class_names == ("a", "b", "c") and latents.num_classes == 3
    assert np.array_equal(latents.train, images.train) and np.array_equal(latents.heldout, images.heldout)
    keyed = dataclasses.replace(images, reader=lambda index, keys: torch.from_numpy(keys))
    for step in (0, 3):
        z, y, _ = batch(latents, 5, step, 13)
        x, same, _ = batch(images, 5, step, 13)
        keys, _, _ = batch(keyed, 5, step, 13)
        # The key determines both the flip and the draw.
        assert torch.equal(z, vae(folder).encode(x, keys)) and torch.equal(y, same)
    everything = np.arange(50)
    assert torch.equal(latents.read(everything), vae(folder).encode(images.read(everything)))


def test_every_read_of_an_example_is_a_new_draw(folder: Path) -> None:
    latents = datasets.create("latents", path=str(folder / "latents")).load()
    index = np.full(2000, 7)
    z = latents.read(index, np.arange(2000) * 2)
    mean, std = vae(folder).posterior(
        load_examples(datasets.create("npz", path=str(folder / "set.npz"))).read(index[:1])
    )
    assert std is not None
    unit = (z - mean) / std
    # 64,000 standard normal draws: four standard errors of the mean and of the variance.
    assert abs(unit.mean()) < 4 / unit.numel() ** 0.5 and abs(unit.var() - 1) < 4 * (2 / unit.numel()) ** 0.5


def test_mirror_images_are_drawn_as_the_source_does_or_as_set(folder: Path) -> None:
    index, keys = np.arange(6), np.ones(6, np.int64)
    straight = datasets.create("latents", path=str(folder / "latents"), flip=False).load().read(index, keys)
    mirrored = datasets.create("latents", path=str(folder / "latents")).load().read(index, keys)
    assert not torch.equal(straight, mirrored)
    assert torch.equal(
        datasets.create("latents", path=str(folder / "latents"), flip=True).load().read(index, keys), mirrored
    )


def test_latents_train_sample_and_are_measured_as_images(folder: Path, tmp_path: Path) -> None:
    settings = [
        f"autoencoder={{name: sd-vae, path: {folder / 'vae'}}}",
        f"data={{name: latents, path: {folder / 'latents'}}}",
        "backbone.patch_size=2",
        "train.steps=3",
        "run.sample_every=3",
    ]
    run = load(run_training(tiny(tmp_path, *settings, base="digits")))
    assert run.shape == (2, 4, 4) and len(list((run.folder / "previews").glob("*.png"))) == 1
    result = call("evaluate", run.folder, "-n", "20", "--steps", "2", "--metric", "mmd", "--runs", tmp_path, "--json")
    assert result.status == 0, result.err
    # The record names the latents and the images that they were made of.
    (record,) = json.loads(result.out)
    source = run.config.data.source()
    assert record["data"] == run.examples.fingerprint != record["reference"]["fingerprint"] == source.load().fingerprint
    assert record["reference"]["data"] == spec(source)
    with np.load(next(run.folder.glob("samples/*/samples.npz"))) as arrays:
        assert arrays["images"].shape == (20, 8, 8, 3)


def test_another_autoencoder_is_refused_before_any_work(folder: Path, tmp_path: Path) -> None:
    other = autoencoder(tmp_path / "other", seed=3)
    for chosen in (
        "identity",
        f"{{name: sd-vae, path: {other}}}",
        f"{{name: sd-vae, path: {folder / 'vae'}, scale: 1}}",
    ):
        config = tiny(
            tmp_path / "runs",
            f"data={{name: latents, path: {folder / 'latents'}}}",
            f"autoencoder={chosen}",
            base="digits",
        )
        with pytest.raises(UserError, match="latents of the autoencoder with fingerprint"):
            run_training(config)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: shutil.rmtree(f), "there are no latents"),
        (lambda f: (f / "index.json").unlink(), "not all is encoded yet"),
        (lambda f: (f / "index.json").write_text("{"), r"index.json:1: not JSON"),
        (lambda f: (f / "index.json").write_bytes(b"\xff"), "index.json is not text in UTF-8"),
        (lambda f: (f / "index.json").write_text("[]"), r"index.json is not the index of latents\. .*encode` again"),
        (lambda f: (f / "shard-00002.safetensors").unlink(), "There is no shard of latents .*shard-00002.safetensors"),
        (
            lambda f: (f / "shard-00001.safetensors").write_bytes(b"\0" * 99),
            "shard-00001.safetensors is damaged or cut short .* the same `sitkit encode` again",
        ),
        (
            lambda f: shutil.copy(f / "shard-00003.safetensors", f / "shard-00001.safetensors"),
            "holds 2 examples, not 16",
        ),
        (
            lambda f: shutil.copy(f / "shard-00000.safetensors", f / "shard-00001.safetensors"),
            "shard-00001.safetensors: holds the latents of shard 0",
        ),
    ],
)
def test_a_damaged_folder_is_named(folder: Path, tmp_path: Path, damage: Callable[[Path], object], reason: str) -> None:
    mine = shutil.copytree(folder / "latents", tmp_path / "latents")
    damage(mine)
    with pytest.raises(UserError, match=reason):
        datasets.create("latents", path=str(mine)).load()


def test_every_flipped_bit_in_latents_is_noticed(folder: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(folder / "latents", tmp_path / "latents")
    draw = random.Random(0)
    for _ in range(20):
        path = draw.choice(sorted(mine.glob("shard-*.safetensors")))
        with flipped_bit(path, draw), pytest.raises(UserError, match=rf"{path} is damaged: .*encode` again"):
            datasets.create("latents", path=str(mine)).load()
    assert len(datasets.create("latents", path=str(mine)).load()) == 50


def test_missing_or_changed_images_are_named(tmp_path: Path, folder: Path) -> None:
    data = Path(shutil.copy(folder / "set.npz", tmp_path / "set.npz"))
    encode(datasets.create("npz", path=str(data)), autoencoder=vae(folder), out=tmp_path / "latents")
    latents = datasets.create("latents", path=str(tmp_path / "latents"))
    assert latents.source() == datasets.create("npz", path=str(data))
    with np.load(data) as arrays:
        np.savez(data, images=255 - arrays["images"], labels=arrays["labels"])
    with pytest.raises(UserError, match="have changed since"):
        latents.source()
    data.unlink()
    with pytest.raises(UserError, match="cannot be read: .*no such file"):
        latents.source()
    assert len(latents.load()) == 50
