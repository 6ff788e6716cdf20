"""The maps between images and latents by a small random AutoencoderKL that is saved in a folder."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import autoencoder, tiny

from sitkit.data.dataset import in_memory
from sitkit.models.autoencoder import Autoencoder, modelled, modelled_shape
from sitkit.registry import autoencoders
from sitkit.runs.run import load
from sitkit.runs.run_folder import RunFolder
from sitkit.runtime import rng
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import read_json
from sitkit.training.train import run_training


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def vae(folder: Path) -> Autoencoder:
    return autoencoders.create("sd-vae", path=str(folder), batch=3)


def images(n: int, side: int = 8) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


KEYS = rng.sample_keys(0, torch.arange(7))


def test_it_equals_the_network_of_diffusers(folder: Path, vae: Autoencoder) -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    network = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False)
    x = images(3)
    with torch.no_grad():
        law = network.encode(x).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        z = 0.18215 * law.mean
        back = network.decode(law.mean).sample  # pyright: ignore[reportAttributeAccessIssue]
    mean, std = vae.posterior(x)
    assert std is not None and vae.latent_shape((3, 8, 8)) == mean.shape[1:] == (2, 4, 4)
    # Same batch, same network: only the order of scale and square root differs, within float32's rounding.
    torch.testing.assert_close(mean, z, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(std, 0.18215 * law.std, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(vae.decode(mean), back, rtol=1e-5, atol=1e-5)
    assert not vae.decode(mean).requires_grad and mean.dtype == torch.float32


def test_the_key_determines_the_draw_from_the_posterior(vae: Autoencoder) -> None:
    x = images(1).expand(7, -1, -1, -1)
    mean, std = vae.posterior(x)
    assert std is not None
    assert torch.equal(vae.encode(x), mean)
    latents = vae.encode(x, KEYS)
    assert torch.equal(latents[[5]], vae.encode(x[:1], KEYS[[5]]))
    many = vae.posterior(x[:1])
    keys = rng.sample_keys(1, torch.arange(4000))
    z = (torch.cat([many.draw(key[None]) for key in keys]) - mean[0]) / std[0]
    # 128,000 standard normal draws: four standard errors of the mean and of the variance.
    assert abs(z.mean()) < 4 / z.numel() ** 0.5 and abs(z.var() - 1) < 4 * (2 / z.numel()) ** 0.5


def test_latent_and_image_of_an_example_do_not_depend_on_its_batch(vae: Autoencoder) -> None:
    x = images(7)
    whole = vae.encode(x, KEYS)
    for first, last in ((0, 1), (2, 7), (4, 6), (6, 7)):
        assert torch.equal(vae.encode(x[first:last], KEYS[first:last]), whole[first:last])
        assert torch.equal(vae.decode(whole[first:last]), vae.decode(whole)[first:last])


def test_bfloat16_is_close_and_returns_float32(folder: Path, vae: Autoencoder) -> None:
    low = dataclasses.replace(vae, dtype="bfloat16")
    z, exact = low.encode(images(2)), vae.encode(images(2))
    assert z.dtype == torch.float32 and not torch.equal(z, exact)
    # 8 bits of mantissa through about ten layers: some per cent of the spread.
    assert (z - exact).abs().max() < 0.1 * exact.std()


def test_autocast_around_it_changes_nothing(vae: Autoencoder) -> None:
    truth = vae.encode(images(2))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vae.encode(images(2)), truth)


def test_the_fingerprint_covers_weights_and_scale(folder: Path, tmp_path: Path, vae: Autoencoder) -> None:
    same = autoencoder(tmp_path / "same")
    other = autoencoder(tmp_path / "other", seed=1)
    mark = vae.fingerprint()
    assert len(mark) == 64
    assert autoencoders.create("sd-vae", path=str(same), batch=5, dtype="bfloat16").fingerprint() == mark
    assert autoencoders.create("sd-vae", path=str(other)).fingerprint() != mark
    assert dataclasses.replace(vae, scale=0.2).fingerprint() != mark
    assert autoencoders.create("identity").fingerprint() != mark


def drop_a_weight(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["quant_conv.weight"]
    save_file(tensors, path)


def pickle_the_weights(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), folder / "diffusion_pytorch_model.bin")
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (drop_a_weight, "do not fit config.json: 1 names differ, the first quant_conv.weight"),
        (pickle_the_weights, "cannot be read"),
        (lambda f: (f / "config.json").unlink(), "no autoencoder"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 99), "cannot be read"),
    ],
)
def test_a_damaged_folder_is_named(tmp_path: Path, damage: Callable[[Path], object], reason: str) -> None:
    folder = autoencoder(tmp_path / "vae")
    damage(folder)
    with pytest.raises(UserError, match=reason) as caught:
        autoencoders.create("sd-vae", path=str(folder)).latent_shape((3, 8, 8))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["missing", "./a/b", "/no/where", "a/b/c"])
def test_a_missing_folder_is_refused(path: str) -> None:
    with pytest.raises(UserError, match="no such folder, and a name on the Hugging Face hub is owner/name"):
        autoencoders.create("sd-vae", path=path).fingerprint()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"scale": 0.0}, "scale must be positive"), ({"batch": 0}, "batch must be"), ({"dtype": "int8"}, "dtype")],
)
def test_wrong_fields(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        autoencoders.create("sd-vae", **fields)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 8), (3, 8, 9), (2,)])
def test_examples_without_a_latent_are_refused(vae: Autoencoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(
        UserError, match=r"images of 3 channels whose sides are multiples of 2; the examples are of shape"
    ):
        vae.latent_shape(shape)


def test_an_absent_extra_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "diffusers.py").write_text("raise ImportError('absent')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    words = ["train", "--autoencoder", "sd-vae", "--runs", str(tmp_path / "runs")]
    result = subprocess.run(
        [sys.executable, "-m", "sitkit", *words], env={**os.environ, "PYTHONPATH": path}, text=True, capture_output=True
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "pip install 'sitkit[latents]'" in result.stderr
    assert not (tmp_path / "runs").exists()


def test_latents_are_not_encoded_again_and_only_their_own_autoencoder_fits(vae: Autoencoder) -> None:
    z = vae.encode(images(4))
    plain = in_memory(z.numpy(), None, (), holdout=0.0)
    latents = dataclasses.replace(plain, encoder=vae.fingerprint())
    assert modelled(vae, latents, z, KEYS[:4]) is z
    assert modelled_shape(vae, latents) == (2, 4, 4)
    pictures = in_memory(images(4).numpy(), None, (), holdout=0.0)
    assert torch.equal(modelled(vae, pictures, images(4)), z)
    assert modelled_shape(vae, pictures) == (2, 4, 4)
    for wrong in (autoencoders.create("identity"), dataclasses.replace(vae, scale=0.5)):
        with pytest.raises(UserError, match="latents of the autoencoder with fingerprint"):
            modelled_shape(wrong, latents)


def settings(folder: Path, data: Path) -> list[str]:
    return [
        f"autoencoder={{name: sd-vae, path: {folder}}}",
        f"data={{name: npz, path: {data}}}",
        "backbone.patch_size=2",
        "metric=mmd",
        "train.steps=4",
    ]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "set.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    np.savez(path, images=pixels, labels=np.arange(40) % 3)
    return path


def test_training_through_it_records_it_and_notices_another(tmp_path: Path, archive: Path) -> None:
    vae = autoencoder(tmp_path / "vae")
    config = tiny(tmp_path / "runs", *settings(vae, archive), base="digits")
    run = load(run_training(config))
    assert run.shape == (2, 4, 4) and run.network.x_embedder.proj.weight.shape[1] == 2  # pyright: ignore
    assert read_json(RunFolder(run.folder).environment)["autoencoder"] == config.autoencoder.fingerprint()
    text = RunFolder(run.folder).environment.read_text()
    RunFolder(run.folder).environment.write_text(text.replace(config.autoencoder.fingerprint(), "0" * 64))
    for again in (lambda: run_training(config), lambda: load(run.folder)):
        with pytest.raises(UserError, match=r"The autoencoder of .* changed since it was begun"):
            again()
