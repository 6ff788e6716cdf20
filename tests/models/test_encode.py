"""Encoding gives the same bytes after kills and with several processes."""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import autoencoder, call, finish, start

from sitkit.data.dataset import Dataset
from sitkit.models.autoencoder import Autoencoder
from sitkit.models.encode import encode
from sitkit.registry import autoencoders, datasets
from sitkit.runtime.errors import UserError
from sitkit.runtime.tensors import load_tensors


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an autoencoder (vae), data (set.npz) and an uninterrupted encoding (whole), 8 examples a shard."""
    folder = tmp_path_factory.mktemp("made")
    autoencoder(folder / "vae")
    pixels = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "set.npz", images=pixels, labels=np.arange(100) % 3)
    data, vae = parts(folder)
    encode(data, autoencoder=vae, out=folder / "whole", per_shard=8)
    return folder


def parts(folder: Path) -> tuple[Dataset, Autoencoder]:
    """Return the data set and the autoencoder of a folder."""
    data = datasets.create("npz", path=str(folder / "set.npz"))
    return data, autoencoders.create("sd-vae", path=str(folder / "vae"))


def words(folder: Path, out: Path) -> list[str | Path]:
    settings = ["--autoencoder", "sd-vae", "--set", f"autoencoder.path={folder / 'vae'}", "--per-shard", "8"]
    return ["encode", folder / "set.npz", *settings, "--out", out]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_files_hold_index_posteriors_and_labels(made: Path) -> None:
    data, vae = parts(made)
    index = json.loads((made / "whole" / "index.json").read_text())
    assert index["rows"] == [8] * 12 + [4] and index["shape"] == [2, 4, 4] and index["class_names"] == ["0", "1", "2"]
    assert index["autoencoder"]["fingerprint"] == vae.fingerprint()
    assert index["source"]["fingerprint"] == data.load().fingerprint
    x = data.load().read(np.arange(100))
    truth = [vae.posterior(some) for some in (x, x.flip(-1))]
    shards = [load_tensors(made / "whole" / f"shard-{number:05d}.safetensors")[1] for number in range(13)]
    for side, (mean, std) in enumerate(truth):
        assert std is not None
        assert torch.equal(torch.cat([shard["mean"] for shard in shards])[:, side], mean)
        assert torch.equal(torch.cat([shard["std"] for shard in shards])[:, side], std)
    assert torch.cat([shard["labels"] for shard in shards]).tolist() == [k % 3 for k in range(100)]
    mean, std = (torch.cat([law[k] for law in truth]).double().transpose(0, 1).flatten(1) for k in (0, 1))  # pyright: ignore
    assert index["statistics"]["mean"] == pytest.approx(mean.mean(1).tolist(), rel=1e-10)
    spread = (mean.var(1, correction=0) + std.square().mean(1)).sqrt()
    assert index["statistics"]["std"] == pytest.approx(spread.tolist(), rel=1e-10)


def test_a_killed_encoding_continues_to_the_same_bytes(made: Path, tmp_path: Path) -> None:
    killed_encoding(made, tmp_path / "out", kills=1)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a missing shard": lambda f: (f / "shard-00002.safetensors").unlink(),
    "a shard cut short": lambda f: (f / "shard-00002.safetensors").write_bytes(b"\0" * 99),
    "a flipped bit": lambda f: flipped(f / "shard-00002.safetensors"),
    "another shard": lambda f: shutil.copy(f / "shard-00003.safetensors", f / "shard-00002.safetensors"),
    "no index": lambda f: (f / "index.json").unlink(),
    "a damaged index": lambda f: (f / "index.json").write_bytes(b"\xff"),
    "no plan": lambda f: (f / "plan.json").unlink(),
    "a damaged plan": lambda f: (f / "plan.json").write_text("[]"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_is_damaged_or_missing_is_made_again(kind: str, made: Path, tmp_path: Path) -> None:
    out = shutil.copytree(made / "whole", tmp_path / "out")
    DAMAGES[kind](out)
    data, vae = parts(made)
    encode(data, autoencoder=vae, out=out, per_shard=8)
    expected, now = contents(made / "whole"), contents(out)
    if "plan" in kind:
        # The index repeats the plan.
        expected.pop("plan.json")
        now.pop("plan.json", None)
    assert now == expected


def test_a_folder_whose_plan_and_index_are_damaged_is_refused(made: Path, tmp_path: Path) -> None:
    out = shutil.copytree(made / "whole", tmp_path / "out")
    for name in ("plan.json", "index.json"):
        (out / name).write_text("{")
    data, vae = parts(made)
    with pytest.raises(UserError, match="remove the folder and encode again"):
        encode(data, autoencoder=vae, out=out, per_shard=8)


@pytest.mark.slow
def test_ten_kills(made: Path, tmp_path: Path) -> None:
    killed_encoding(made, tmp_path / "out", kills=10)


def killed_encoding(made: Path, out: Path, kills: int) -> None:
    """Kill each process after about one shard; the last process finishes."""
    rng = random.Random(kills)
    for _ in range(kills):
        process = start(*words(made, out), cwd=made)
        before, began = len(list(out.glob("shard-*.safetensors"))), time.monotonic()
        while len(list(out.glob("shard-*.safetensors"))) <= before and process.poll() is None:
            assert time.monotonic() - began < 120
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        process.communicate()
    result = finish(start(*words(made, out), cwd=made))
    assert result.status == 0, result.err
    assert contents(out) == contents(made / "whole")


def test_processes_share_the_shards(made: Path, tmp_path: Path) -> None:
    both = [start(*words(made, tmp_path / "out"), cwd=made) for _ in range(2)]
    for process in both:
        result = finish(process)
        assert result.status == 0, result.err
    assert contents(tmp_path / "out") == contents(made / "whole")


def test_encoding_again_does_nothing(made: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (made / "whole").iterdir()}
    result = call(*words(made, made / "whole"), "--json")
    assert result.status == 0 and json.loads(result.out)["rows"] == [8] * 12 + [4]
    assert {path: path.stat().st_mtime_ns for path in (made / "whole").iterdir()} == before


@pytest.mark.parametrize(("scale", "warned"), [(0.18215, False), (0.5, True)])
def test_a_warning_for_another_scale_than_the_published_one(
    made: Path, tmp_path: Path, scale: float, warned: bool
) -> None:
    """save_pretrained wrote scaling_factor 0.18215, by which diffusers multiplies."""
    messages = []
    data, vae = parts(made)
    coder = replace(vae, scale=scale)
    encode(data, autoencoder=coder, out=tmp_path / "out", progress=lambda event: messages.append(event.message))
    assert any("--set autoencoder.scale=0.18215" in text and "it is 2.7" in text for text in messages) is warned


def test_half_precision_on_disk(made: Path, tmp_path: Path) -> None:
    data, vae = parts(made)
    encode(data, autoencoder=vae, out=tmp_path / "half", per_shard=100, dtype="float16")
    latents = datasets.create("latents", path=str(tmp_path / "half")).load().read(np.arange(100))
    exact = datasets.create("latents", path=str(made / "whole")).load().read(np.arange(100))
    # 11 bits of mantissa, numbers below 2.
    assert latents.dtype == torch.float32 and 0 < (latents - exact).abs().max() <= math.ldexp(1, -11)


def test_a_folder_of_other_files_is_refused_and_unchanged(made: Path, tmp_path: Path) -> None:
    data, vae = parts(made)
    with pytest.raises(UserError, match="other data, another autoencoder, or other shards"):
        encode(data, autoencoder=vae, out=made / "whole", per_shard=9)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other things than latents"):
        encode(data, autoencoder=vae, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_examples_without_latents_are_refused(made: Path, tmp_path: Path) -> None:
    data, vae = parts(made)
    for dataset, coder, reason in (
        (data, autoencoders.create("identity"), "'identity' has no latents"),
        (datasets.create("latents", path=str(made / "whole")), vae, "holds latents already"),
        (datasets.create("digits"), vae, "takes images of 3 channels"),
    ):
        with pytest.raises(UserError, match=reason):
            encode(dataset, autoencoder=coder, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere"], "no such folder, .npz, YAML file or data set"),
        (["digits", "--dtype", "int8"], "--dtype int8"),
        (["digits", "--autoencoder", "identity"], "'identity' has no latents"),
    ],
)
def test_the_command_refuses(arguments: list[str], reason: str) -> None:
    result = call("encode", *arguments)
    assert result.status == 2 and reason in result.err
