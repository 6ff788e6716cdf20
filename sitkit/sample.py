"""Sampling a run: pictures, an .npz in the layout of the `npz` data set, and the recipe that made them."""

from __future__ import annotations

import io
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sitkit import checkpoint, noise, picture
from sitkit.config import Config, identity, training_identity
from sitkit.curvature import fitted
from sitkit.data.dataset import Examples
from sitkit.field import Field
from sitkit.guidance import Guidance, Weights
from sitkit.progress import Event, Progress, silent
from sitkit.registry import UserError, WorkFailed, spec
from sitkit.run import Run, environment, load
from sitkit.sampler import AdaptiveODE

RECORD, ARRAYS, PICTURE = "record.json", "samples.npz", "grid.png"
ROW = 10


class Drawn(NamedTuple):
    """Samples on disk: x (n, *shape) float32 as the metrics see them (images after rounding), y (n,), the recipe."""

    folder: Path
    x: Tensor
    y: Tensor
    record: dict[str, Any]


def sampling_identity(config: Config, step: int) -> str:
    """What determines the samples: the training, the checkpoint's step, sampler, w, guidance, weights, seed, n, labels."""
    return identity(training_identity(config), sampling_recipe(config, step))


def sampling_recipe(config: Config, step: int) -> dict[str, Any]:
    """Everything beyond the training that a sample depends on, as plain values."""
    settings = config.sample.model_dump(mode="json")
    if not isinstance(config.sampler, AdaptiveODE):
        # Only an adaptive solver's steps depend on what else is in the batch.
        del settings["batch"]
    return {
        "step": step,
        "sampler": spec(config.sampler),
        "diffusion": spec(config.diffusion),
        "guidance": spec(config.guidance),
        "sample": settings,
    }


def labels_of(config: Config, index: Tensor, keys: Tensor, num_classes: int) -> Tensor:
    """The label of each sample, a function of its index and seed; num_classes stands for none."""
    rule = config.sample.labels
    if rule == "none" or num_classes == 0:
        return torch.full_like(index, num_classes)
    if rule == "balanced":
        return index % num_classes
    if rule == "random":
        return noise.labels(keys, num_classes)
    chosen = torch.tensor(rule)
    if len(chosen) == 0 or not 0 <= int(chosen.min()) <= int(chosen.max()) < num_classes:
        raise UserError(f"sample.labels must be classes from 0 to {num_classes - 1}; got {list(rule)}.")
    return chosen[index % len(chosen)]


def block(shape: tuple[int, ...]) -> int:
    """How many states of a shape a CPU takes at once, whatever `sample.batch` says: 16, and up to 64 of small ones.

    In float32 on a CPU the last digits of a row of a matrix product depend on how many rows there are (seen below 16
    rows of 64 to 768 columns, torch 2.13).  Blocks of fixed size and place make a sample a function of its index alone.
    """
    return max(16, min(64, 4096 // math.prod(shape)))


def bound(guidance: Guidance, run: Run) -> Guidance:
    """The guidance with what it needs of other runs, which lie beside this one."""

    def load_field(name: str, step: int, weights: Weights) -> Field:
        parameter = next(iter(run.network.parameters()), torch.empty(0))
        other = load(name, step=step, weights=weights, device=str(parameter.device), root=run.folder.parent)
        if other.folder.name != Path(name).name:
            # A short name could mean another run tomorrow, and the samples' identity would not change with it.
            raise UserError(f"guidance.run must name the run in full: {other.folder.name}, not {name!r}.")
        if other.shape != run.shape:
            raise UserError(f"guidance.run {name!r} models states of shape {other.shape}, this run {run.shape}.")
        return other.field

    return guidance.bind(run.field, load_field)


def sample(run: Run, progress: Progress = silent) -> Drawn:
    """Draw config.sample.n samples of a run into samples/<identity>/, or return those that are there already.

    Raises UserError before any evaluation for a setting that cannot give right samples; WorkFailed for samples that
    are not finite.
    """
    config, data = run.config, run.examples
    folder = run.folder / "samples" / sampling_identity(config, run.step)
    if (folder / RECORD).is_file():
        return _read(folder, data)
    device = next(iter(run.network.parameters()), torch.empty(0)).device
    guidance = bound(config.guidance, run)
    sampler, diffusion = fitted(config.sampler, run), fitted(config.diffusion, run)
    plan = sampler.plan(config.interp, config.target, diffusion, guidance)
    n, shape = config.sample.n, run.shape
    size = block(shape) if device.type == "cpu" else config.sample.batch
    parts: list[Tensor] = []
    labels: list[Tensor] = []
    began, nfe, paths = time.monotonic(), 0, None
    for first in range(0, n, size):
        wanted = min(size, n - first)
        # The block is always whole: the sum's order in a product of matrices may depend on the number of rows.
        index = torch.arange(first, first + (size if device.type == "cpu" else wanted))
        keys = noise.sample_keys(config.sample.seed, index)
        y = labels_of(config, index, keys, data.num_classes)
        keys = keys.to(device)
        drawn = sampler.sample(
            run.field,
            noise.normal(keys, shape, noise.INITIAL),
            y.to(device),
            diffusion=diffusion,
            guidance=guidance,
            seeds=keys,
            trajectory=not data.is_image and first == 0,
        )
        if drawn.trajectory is not None:
            paths = drawn.trajectory[:, : min(100, wanted)].cpu()
        nfe = max(nfe, drawn.nfe)
        parts.append(config.autoencoder.decode(drawn.x).cpu()[:wanted])
        labels.append(y[:wanted])
        done = first + wanted
        progress(Event("sample", done, n, {"images/s": done / (time.monotonic() - began)}))
    x, y = torch.cat(parts), torch.cat(labels)
    bad = int((~x.isfinite().flatten(1).all(1)).sum())
    if bad:
        raise WorkFailed(f"{bad} of {n} samples are not finite: {config.sampler.name} on a network at step {run.step}.")
    record = {
        "recipe": sampling_recipe(config, run.step),
        "training": run.identity,
        "nfe": nfe,
        "times": plan.times.tolist(),
        "intervals": len(plan.times) - 1,
        "last_step": plan.last_step,
        "notes": list(plan.notes),
        "rounding": picture.ROUNDING if data.is_image else "none",
        "seconds": time.monotonic() - began,
        "environment": environment(device),
    }
    _write(folder, x, y, data, record, paths)
    return _read(folder, data)


def _write(folder: Path, x: Tensor, y: Tensor, data: Examples, record: dict[str, Any], paths: Tensor | None) -> None:
    buffer = io.BytesIO()
    values = {"images": picture.to_uint8(x)} if data.is_image else {"points": x.numpy()}
    np.savez_compressed(buffer, allow_pickle=False, **values, labels=y.numpy())
    checkpoint.write(folder / ARRAYS, buffer.getvalue())
    show(x, y, data, folder / PICTURE, paths)
    checkpoint.write_json(folder / RECORD, record)


def _read(folder: Path, data: Examples) -> Drawn:
    with np.load(folder / ARRAYS, allow_pickle=False) as arrays:
        y = torch.from_numpy(arrays["labels"])
        if data.is_image:
            x = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).float() / 127.5 - 1
        else:
            x = torch.from_numpy(arrays["points"])
    return Drawn(folder, x, y, checkpoint.read_json(folder / RECORD))


def show(x: Tensor, y: Tensor | None, data: Examples, path: Path, paths: Tensor | None = None) -> None:
    """A picture of samples: images in a grid, one class a row where there are labels; points over the data."""
    if not data.is_image:
        if data.shape == (2,):
            reference = data.read(np.arange(min(len(data), 2000)))
            picture.scatter(x.cpu(), reference, path, paths)
        return
    if y is None or data.num_classes == 0 or int(y.max()) >= data.num_classes:
        shown = x[: ROW * ROW]
        picture.grid(picture.to_uint8(shown), path, columns=ROW)
        return
    rows = [(y == label).nonzero().flatten()[:ROW] for label in y.unique()[:ROW]]
    columns = min(len(row) for row in rows)
    order = torch.cat([row[:columns] for row in rows]).to(x.device)
    names = [data.class_names[int(label)] for label in y.unique()[:ROW]]
    picture.grid(picture.to_uint8(x[order]), path, columns=columns, row_labels=names)
