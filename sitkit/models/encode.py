"""Encoding a data set once: shards of its latents' posteriors, to train on without the autoencoder in the loop.

Any number of processes may encode one folder: each takes the next shard that is neither done nor being done.  A shard is
whole or absent, and a function of data, autoencoder and device alone, so that an encoding that was killed and run again
is the same to the byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sitkit.data.dataset import Dataset, Examples, load_examples
from sitkit.data.latents import INDEX, PLAN, shard_path
from sitkit.data.stream import read_ahead
from sitkit.models.autoencoder import Autoencoder
from sitkit.registry import autoencoders, datasets, spec
from sitkit.runtime.distributed import ProcessGroup, joined
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import read_json, write_json
from sitkit.runtime.hashing import hyphenated, identity
from sitkit.runtime.locks import divide_work
from sitkit.runtime.progress import Event, Progress, silent
from sitkit.runtime.progress_bar import reporting
from sitkit.runtime.tensors import read_header, save_tensors

# How many examples are read at once.
READ = 64
CLAIMS = ".claims"


class Encoded(NamedTuple):
    """A folder of latents and what its index says."""

    folder: Path
    record: dict[str, Any]


def encode(
    data: Dataset | str | Mapping[str, Any],
    *,
    autoencoder: Autoencoder | str | Mapping[str, Any] = "sd-vae",
    out: str | Path | None = None,
    per_shard: int = 1024,
    dtype: Literal["float32", "float16"] = "float32",
    device: str = "auto",
    progress: Progress | None = None,
) -> Encoded:
    """Write the latents of a data set and of its mirror images, to train on; the same call continues it.

    Args:
        data: a data set, its name, or a mapping with `name` and fields.
        autoencoder: an autoencoder, its name, or a mapping with `name` and fields.
        out: the folder of the latents; by default latents/<data>-<autoencoder>-<identity>.
        per_shard: examples in one file.
        dtype: type of mean and std on disk.
        device: "cpu", "cuda", "auto".
        progress: a function that receives events; by default a live bar in a terminal or in Jupyter.

    Raises:
        UserError: before any work, for examples without latents, and for a folder of other latents.
    """
    dataset, coder = datasets.parse(data), autoencoders.parse(autoencoder)
    with reporting(progress) as report:
        return encode_dataset(
            dataset,
            coder,
            None if out is None else Path(out),
            per_shard=per_shard,
            dtype=dtype,
            device=device,
            progress=report,
        )


def encode_dataset(
    dataset: Dataset,
    autoencoder: Autoencoder,
    folder: Path | None = None,
    *,
    per_shard: int = 1024,
    dtype: Literal["float32", "float16"] = "float32",
    device: str = "auto",
    progress: Progress = silent,
) -> Encoded:
    """Write the posteriors of all examples and their mirror images; what is done already is not done again.

    folder: by default latents/<data>-<autoencoder>-<identity>.  per_shard: examples a file.  dtype: of mean and std on
    disk.  Raises UserError before any work for examples without latents, and for a folder of other latents.
    """
    if per_shard < 1:
        raise ValueError(f"per_shard must be at least 1; got {per_shard}.")
    if not autoencoder.encodes:
        raise UserError(
            f"autoencoder {autoencoder.name!r} has no latents to write: choose another, as --autoencoder sd-vae."
        )
    data = load_examples(dataset)
    if data.encoder is not None:
        raise UserError(f"dataset {dataset.name!r} holds latents already.")
    plan = {
        "format": 1,
        "shape": list(autoencoder.latent_shape(data.shape)),
        "dtype": dtype,
        "rows": [min(per_shard, len(data) - first) for first in range(0, len(data), per_shard)],
        "class_names": list(data.class_names),
        "autoencoder": {"fingerprint": autoencoder.fingerprint(), "component": _absolute(spec(autoencoder))},
        "source": {"fingerprint": data.fingerprint, "data": _absolute(spec(dataset))},
    }
    if folder is None:
        folder = Path("latents") / f"{hyphenated((dataset.name, autoencoder.name))}-{_identity(plan)}"
    _begin(folder, plan)
    with joined(device) as world:
        if not (folder / INDEX).is_file():
            if world.lead and (caveat := autoencoder.caveat()):
                progress(Event("encode", message=caveat))
            work = _Work(folder, data, autoencoder, plan, world, progress if world.lead else silent)
            work.all_shards()
            _finish(folder, plan)
    return Encoded(folder, read_json(folder / INDEX))


def _absolute(component: dict[str, Any]) -> dict[str, Any]:
    """The plain component with the path of what is on this machine in full: latents are read from other folders too."""
    path = component.get("path")
    if not isinstance(path, str) or not Path(path).expanduser().exists():
        return component
    return component | {"path": str(Path(path).expanduser().resolve())}


def _identity(plan: dict[str, Any]) -> str:
    """What the shards are a function of, wherever data and autoencoder lie."""
    marks = {part: plan[part]["fingerprint"] for part in ("autoencoder", "source")}
    network = {key: plan["autoencoder"]["component"].get(key) for key in ("dtype", "batch")}
    return identity({**{key: plan[key] for key in ("format", "shape", "dtype", "rows")}, **marks, "network": network})


def _begin(folder: Path, plan: dict[str, Any]) -> None:
    if (folder / PLAN).is_file():
        if _identity(read_json(folder / PLAN)) != _identity(plan):
            raise UserError(
                f"{folder} holds latents of other data, another autoencoder, or other shards: give another folder by --out."
            )
    elif folder.is_dir() and any(not path.name.startswith(PLAN) for path in folder.iterdir()):
        raise UserError(f"{folder} holds other things than latents: give another folder by --out.")
    else:
        write_json(folder / PLAN, plan)


class _Work(NamedTuple):
    folder: Path
    data: Examples
    autoencoder: Autoencoder
    plan: dict[str, Any]
    world: ProcessGroup
    progress: Progress

    def all_shards(self) -> None:
        """Return when every shard is there, whoever wrote it."""
        count, began, written = len(self.plan["rows"]), time.monotonic(), 0

        def make(number: int) -> None:
            nonlocal written
            written = self._shard(number, began, written)

        first = self.world.rank * count // self.world.size
        divide_work(count, lambda number: shard_path(self.folder, number).is_file(), make, self.folder / CLAIMS, first)
        self.progress(Event("encode", len(self.data), len(self.data)))

    def _shard(self, number: int, began: float, written: int) -> int:
        """Write a shard; how many examples this process has written with it."""
        path = shard_path(self.folder, number)
        rows = self.plan["rows"]
        start = number * rows[0]
        index = np.arange(start, start + rows[number])
        parts: list[tuple[Tensor, Tensor]] = []
        chunks = [index[first : first + READ] for first in range(0, len(index), READ)]
        with read_ahead(self.data.read, chunks, workers=1) as pictures:
            for x in pictures:
                parts.append(self._posterior(x))
                written += len(x)
                rate = written / (time.monotonic() - began)
                self.progress(
                    Event("encode", self._done() + sum(len(m) for m, _ in parts), len(self.data), {"images/s": rate})
                )
        mean, std = (torch.cat(some) for some in zip(*parts, strict=True))
        labels = torch.from_numpy(self.data.labels[index])
        save_tensors(path, {"mean": mean, "std": std, "labels": labels}, {"number": number, **_sums(mean, std)})
        return written

    def _posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """mean and std (k, 2, *shape) on the CPU, of examples and their mirror images."""
        both = torch.stack([x, x.flip(-1)], 1).flatten(0, 1).to(self.world.device)
        mean, std = self.autoencoder.posterior(both)
        std = torch.zeros_like(mean) if std is None else std
        kept = torch.float16 if self.plan["dtype"] == "float16" else torch.float32
        return tuple(v.unflatten(0, (-1, 2)).to("cpu", kept) for v in (mean, std))  # pyright: ignore[reportReturnType]

    def _done(self) -> int:
        return sum(rows for number, rows in enumerate(self.plan["rows"]) if shard_path(self.folder, number).is_file())


def _sums(mean: Tensor, std: Tensor) -> dict[str, Any]:
    """Of what is written: its SHA-256; by channel, how many latents, their sum and that of their squares."""
    digest = hashlib.sha256(mean.numpy().data)
    digest.update(std.numpy().data)
    mean, std = (v.double().movedim(2, 0).flatten(1) for v in (mean, std))
    return {
        "sha256": digest.hexdigest(),
        "count": mean.shape[1],
        "sum": mean.sum(1).tolist(),
        "squares": (mean.square() + std.square()).sum(1).tolist(),
    }


def _finish(folder: Path, plan: dict[str, Any]) -> None:
    """The index: the plan, the statistics of the latents, and a fingerprint of all that the shards hold."""
    headers = [read_header(shard_path(folder, number)) for number in range(len(plan["rows"]))]
    count = sum(header["count"] for header in headers)
    mean, squares = (
        [math.fsum(values) / count for values in zip(*(header[key] for header in headers), strict=True)]
        for key in ("sum", "squares")
    )
    digest = hashlib.sha256(_identity(plan).encode())
    for header in headers:
        digest.update(header["sha256"].encode())
    statistics = {
        "mean": mean,
        "std": [math.sqrt(max(s - m**2, 0.0)) for m, s in zip(mean, squares, strict=True)],
    }
    for rubbish in _leftovers(folder):
        rubbish.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        (folder / CLAIMS).rmdir()
    write_json(folder / INDEX, plan | {"statistics": statistics, "fingerprint": digest.hexdigest()})


def _leftovers(folder: Path) -> Iterator[Path]:
    """Claims, and what kills left half-written; nobody writes shards any more."""
    for pattern in (f"{CLAIMS}/*", "*.safetensors.tmp-*", f"{PLAN}.tmp-*", ".tmp??????"):
        yield from folder.glob(pattern)
