"""Encode a data set once into files of posteriors, to train on without the autoencoder in the loop.

Several processes may encode into one folder: each takes the next shard that is neither done nor in progress.  A shard is
whole or absent, and depends on data, autoencoder and device alone, so an encoding that was killed and continued has the
same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sitkit.data.dataset import Dataset, Examples, load_examples
from sitkit.data.latents import INDEX, PLAN, read_index, read_shard, shard_path
from sitkit.data.latents_record import PlanRecord
from sitkit.data.stream import read_ahead
from sitkit.models.autoencoder import Autoencoder
from sitkit.registry import autoencoders, datasets, spec
from sitkit.runtime.distributed import ProcessGroup, joined
from sitkit.runtime.errors import Unreadable, UserError, require_within
from sitkit.runtime.files import exists, read_record, write_json
from sitkit.runtime.hashing import hyphenated, identity
from sitkit.runtime.locks import divide_work
from sitkit.runtime.progress import Event, Progress, silent
from sitkit.runtime.progress_bar import reporting
from sitkit.runtime.tensors import read_header, save_tensors

# The number of examples that are read together.
READ = 64
CLAIMS = ".claims"


class Encoded(NamedTuple):
    """The folder of encoded latents and the content of its index.

    Args:
        folder: the folder.
        record: shape of a latent, number of examples, statistics and fingerprints, as in index.json.
    """

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
    """Write the latents of a data set and of its mirror images, to train on; the same call continues the work.

    The files hold the mean and the standard deviation of the posterior of each example, from which training draws.

    Args:
        data: a data set, its name, or a mapping with `name` and fields.
        autoencoder: an autoencoder, its name, or a mapping with `name` and fields.
        out: the folder of the latents; by default latents/<data>-<autoencoder>-<identity>.
        per_shard: the number of examples in one file.
        dtype: the type of mean and standard deviation on disk.
        device: "cpu", "cuda" or "auto".
        progress: a function that receives events; by default a live bar in a terminal or in Jupyter.

    Returns:
        The folder and the content of its index: shape, number of examples, mean and standard deviation by channel.

    Raises:
        UserError: before any work, if the examples have no latents, or if the folder holds other latents.
    """
    require_within(1, 2**24, per_shard=per_shard)
    dataset, coder = datasets.parse(data), autoencoders.parse(autoencoder)
    if not coder.encodes:
        raise UserError(
            f"autoencoder {coder.name!r} has no latents to write: choose another, such as --autoencoder sd-vae."
        )
    examples = load_examples(dataset)
    if examples.encoder is not None:
        raise UserError(f"dataset {dataset.name!r} holds latents already.")
    plan = {
        "format": 1,
        "shape": list(coder.latent_shape(examples.shape)),
        "dtype": dtype,
        "rows": [min(per_shard, len(examples) - first) for first in range(0, len(examples), per_shard)],
        "class_names": list(examples.class_names),
        "autoencoder": {"fingerprint": coder.fingerprint(), "component": _absolute(spec(coder))},
        "source": {"fingerprint": examples.fingerprint, "data": _absolute(spec(dataset))},
    }
    folder = Path(out or f"latents/{hyphenated((dataset.name, coder.name))}-{_identity(plan)}")
    _begin(folder, plan)
    with reporting(progress) as report, joined(device) as group:
        report = report if group.lead else silent
        encoding = _Encoding(folder, examples, coder, plan, group, report)
        if not encoding.finished():
            if group.lead and (caveat := coder.caveat()):
                report(Event("encode", message=caveat))
            encoding.write_all()
            _finish(folder, plan)
    return Encoded(folder, read_index(folder))


def _absolute(component: dict[str, Any]) -> dict[str, Any]:
    """Make the path of a plain component absolute if it exists here: latents are also read from other folders."""
    path = component.get("path")
    if not isinstance(path, str) or not Path(path).expanduser().exists():
        return component
    return component | {"path": str(Path(path).expanduser().resolve())}


def _identity(plan: dict[str, Any]) -> str:
    """Return the identity of what the shards depend on, wherever data and autoencoder lie."""
    marks = {part: plan[part]["fingerprint"] for part in ("autoencoder", "source")}
    network = {key: plan["autoencoder"]["component"].get(key) for key in ("dtype", "batch")}
    return identity({**{key: plan[key] for key in ("format", "shape", "dtype", "rows")}, **marks, "network": network})


def _begin(folder: Path, plan: dict[str, Any]) -> None:
    recorded = _recorded_plan(folder)
    if recorded is not None:
        if _identity(recorded) != _identity(plan):
            raise UserError(
                f"{folder} holds latents of other data, another autoencoder, or other shards: give another folder by --out."
            )
    elif folder.is_dir() and any(not path.name.startswith(PLAN) for path in folder.iterdir()):
        raise UserError(f"{folder} holds other things than latents: give another folder by --out.")
    else:
        write_json(folder / PLAN, plan)


def _recorded_plan(folder: Path) -> dict[str, Any] | None:
    """Return the plan of the latents in a folder, which the index repeats; None if there is neither."""
    paths = [path for path in (folder / PLAN, folder / INDEX) if exists(path)]
    reasons = []
    for path in paths:
        try:
            return read_record(path, PlanRecord, "the plan of latents")
        except UserError as error:
            reasons.append(str(error))
    if reasons:
        raise UserError(f"{reasons[0]} So it is unknown what {folder} holds: remove the folder and encode again.")
    return None


@dataclass
class _Encoding:
    """The work of one process on the shards of a folder; `written` counts the examples that it has encoded."""

    folder: Path
    examples: Examples
    autoencoder: Autoencoder
    plan: dict[str, Any]
    group: ProcessGroup
    progress: Progress
    written: int = 0
    began: float = field(default_factory=time.monotonic)

    def write_all(self) -> None:
        """Return when all processes together have written every shard."""
        count = len(self.plan["rows"])
        first = self.group.rank * count // self.group.size
        divide_work(count, self._whole, self._write, self.folder / CLAIMS, first)
        self.progress(Event("encode", len(self.examples), len(self.examples)))

    def finished(self) -> bool:
        """Return whether the index and every shard are there and undamaged."""
        try:
            read_index(self.folder)
        except Unreadable:
            raise
        except UserError:
            return False
        return all(map(self._whole, range(len(self.plan["rows"]))))

    def _whole(self, number: int) -> bool:
        """Return whether a shard is there and undamaged; its digest is computed once."""
        try:
            read_shard(self.folder, number, self.plan["rows"][number])
        except Unreadable:
            raise
        except UserError:
            return False
        return True

    def _write(self, number: int) -> None:
        rows = self.plan["rows"]
        index = number * rows[0] + np.arange(rows[number])
        parts: list[tuple[Tensor, Tensor]] = []
        chunks = [index[first : first + READ] for first in range(0, len(index), READ)]
        with read_ahead(self.examples.read, chunks, workers=1) as batches:
            for x in batches:
                parts.append(self._posterior(x))
                self.written += len(x)
                there = (shard_path(self.folder, k).is_file() for k in range(len(rows)) if k != number)
                done = sum(itertools.compress(rows[:number] + rows[number + 1 :], there))
                done += sum(len(mean) for mean, _ in parts)
                rate = self.written / (time.monotonic() - self.began)
                self.progress(Event("encode", done, len(self.examples), {"images/s": rate}))
        mean, std = (torch.cat(values) for values in zip(*parts, strict=True))
        tensors = {"mean": mean, "std": std, "labels": torch.from_numpy(self.examples.labels[index])}
        save_tensors(shard_path(self.folder, number), tensors, {"number": number, **_sums(mean, std)})

    def _posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std (k, 2, *shape), on the CPU, of examples and their mirror images."""
        both = torch.stack([x, x.flip(-1)], 1).flatten(0, 1).to(self.group.device)
        mean, std = self.autoencoder.posterior(both)
        std = torch.zeros_like(mean) if std is None else std
        dtype = getattr(torch, self.plan["dtype"])
        return tuple(v.unflatten(0, (-1, 2)).to("cpu", dtype) for v in (mean, std))  # pyright: ignore[reportReturnType]


def _sums(mean: Tensor, std: Tensor) -> dict[str, Any]:
    """Return the SHA-256 of a shard; by channel the number of latents, their sum and the sum of their squares."""
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
    """Write the index: the plan, the statistics of the latents, and a fingerprint of the content of all shards."""
    headers = [read_header(shard_path(folder, number)) for number in range(len(plan["rows"]))]
    count = sum(header["count"] for header in headers)
    mean, squares = (
        [math.fsum(values) / count for values in zip(*(header[key] for header in headers), strict=True)]
        for key in ("sum", "squares")
    )
    digest = hashlib.sha256(_identity(plan).encode())
    for header in headers:
        digest.update(header["sha256"].encode())
    std = [math.sqrt(max(s - m**2, 0.0)) for m, s in zip(mean, squares, strict=True)]
    # Lock files and partial files of killed processes: no process writes shards now.
    for pattern in (f"{CLAIMS}/*", "*.safetensors.tmp-*", f"{PLAN}.tmp-*", ".tmp??????"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        (folder / CLAIMS).rmdir()
    index = plan | {"statistics": {"mean": mean, "std": std}, "fingerprint": digest.hexdigest()}
    write_json(folder / INDEX, index)
