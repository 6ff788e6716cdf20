"""The smallest work of every long command, and what it leaves: the files and numbers that must be equal after any fault."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from command import done

SETTINGS = """
data: {name: points, law: moons, size: 200}
backbone: {name: mlp, hidden_size: 8, depth: 1}
train: {steps: 12, batch: 16, lr: 1e-3, ema: 0.9}
sampler: {name: heun, steps: 2}
sample: {n: 600, labels: none}
metric: sliced-wasserstein
run: {track: false, threads: 1, log_every: 3, checkpoint_every: 3, sample_every: 6, device: cpu}
"""
STUDY = """
base: points.yaml
set: {sample: {n: 40}}
rows: [{interp: linear}, {interp: gvp}]
grid: {sampler.steps: [2, 3]}
"""
SEARCH = """
objective: {metric: sliced-wasserstein, against: nfe, nfe: 12}
space:
  sampler: [heun, euler-maruyama]
  nfe: {low: 6, high: 12}
screen: {n: 20, seed: 0}
confirm: {n: 20, seeds: [1, 2], fresh: [3, 4], best: 1}
trials: 3
"""
# Keys of records that say when, where and by which command: they differ between two runs of the same work.
MOMENTARY = {
    "seconds", "time", "environment", "before", "command", "trained", "git", "packages", "at_once", "images_per_second", "mfu",
    "taken over",
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A folder with everything that a command needs, and the words of the command.

    folder: copied for each trial.  words: those of the command; RUN stands for the trained run.
    """

    folder: Path
    words: tuple[str, ...]

    def fresh(self, folder: Path) -> Path:
        """Return a copy of the folder, to work in."""
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(self.folder, folder, symlinks=True))


def written(folder: Path) -> Path:
    """Write the settings, the study, the search and the data to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("points.yaml", SETTINGS), ("study.yaml", STUDY), ("search.yaml", SEARCH)):
        (folder / name).write_text(text)
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images, labels=np.arange(24) % 3)
    return folder


def autoencoder(folder: Path) -> bool:
    """Write a small autoencoder; False without diffusers."""
    try:
        import torch
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    except ImportError:
        return False
    torch.manual_seed(0)
    network = AutoencoderKL(norm_num_groups=4, block_out_channels=(8,), latent_channels=2)
    network.save_pretrained(folder)
    return True


ENCODE = ("encode", "images.npz", "--autoencoder", "sd-vae", "--set", "autoencoder.path=ae", "--per-shard", "4", "--out",
          "latents", "--device", "cpu")  # fmt: skip


def places(root: Path) -> dict[str, Place]:
    """Return the place of each long command."""
    empty, trained = written(root / "empty"), root / "trained"
    shutil.copytree(empty, trained)
    done(("train", "points.yaml"), trained)
    run = next(path.name for path in (trained / "runs").iterdir())
    found = {
        "train": Place(empty, ("train", "points.yaml")),
        "sample": Place(trained, ("sample", run)),
        "evaluate": Place(trained, ("evaluate", run)),
        "likelihood": Place(trained, ("likelihood", run, "-n", "8", "--sampler", "heun", "--steps", "2")),
        "search": Place(trained, ("search", run, "search.yaml")),
        "ablate": Place(empty, ("ablate", "study.yaml")),
    }
    if autoencoder(empty / "ae"):
        found["encode"] = Place(empty, ENCODE)
    return found


def ends(folder: Path) -> dict[str, str]:
    """Return what a command left: a digest of each file by its path, without moments, logs, locks and half-written files."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        skipped = (".lock", ".db", ".log", "-journal", "-wal", "-shm")
        if not path.is_file() or ".tmp" in path.name or path.name.startswith(".") or path.name.endswith(skipped):
            continue
        if path.parent.name == "checkpoints" and path != max(path.parent.glob("step-*.safetensors")):
            # Which older checkpoints are kept depends on where the training was stopped.
            continue
        if "/.claims/" in name or "/shards/" in name or path.name == "environment.json":
            continue
        with contextlib.suppress(FileNotFoundError):
            found[name] = hashlib.sha256(_content(path).encode()).hexdigest()[:16]
    return found


def _content(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix == ".json":
        return json.dumps(lasting(json.loads(data)), sort_keys=True)
    if path.suffix == ".jsonl":
        # A training that a signal stops saves at its step, so the means of the next row are over fewer steps.
        steps = [json.loads(line)["step"] for line in data.splitlines()]
        return f"{steps == sorted(set(steps))} {steps[-1:]}"
    if path.suffix == ".csv" and path.parent.name == "searches":
        rows = [row for row in csv.reader(io.StringIO(data.decode())) if row[1] != "given up"]
        # Without the number of the trial and its seconds.
        return "\n".join(sorted(",".join(row[1:4] + row[5:]) for row in rows))
    if path.suffix == ".safetensors":
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        own = json.loads(header.pop("__metadata__", {}).get("sitkit", "{}"))
        own.pop("digest", None)
        return json.dumps([header, lasting(own)], sort_keys=True) + hashlib.sha256(data[8 + size :]).hexdigest()
    if path.suffix == ".npz":
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return "".join(
                f"{name}{arrays[name].dtype}{hashlib.sha256(arrays[name].tobytes()).hexdigest()}" for name in arrays
            )
    return hashlib.sha256(data).hexdigest()


def lasting(value: Any) -> Any:
    """Return plain values without what differs from run to run."""
    if isinstance(value, dict):
        return {key: lasting(inner) for key, inner in value.items() if key not in MOMENTARY}
    return [lasting(inner) for inner in value] if isinstance(value, list) else value


def differences(left: dict[str, str], right: dict[str, str]) -> list[str]:
    """Return the files in which two ends differ."""
    return [name for name in sorted({*left, *right}) if left.get(name) != right.get(name)]


def results(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder that a command reads again, sorted by path."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith(".") and path.suffix not in (".log", ".lock"):
            yield path
