"""Samples on disk, while they are being drawn and after.

samples/<identity>/
    shards/00000.safetensors  features-<fingerprint>/00000.safetensors      while work is going on: whole or absent each
    samples.npz  features-<fingerprint>.safetensors  grid.png  record.json  when it is done; the record is the last

A shard is SHARD samples whatever the batch and the number of processes, so that work divides and resumes the same way.
Images are kept as uint8, rounded once; everything that looks at them, the extractors too, sees the rounded ones.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sitkit.data.dataset import Examples, load_examples
from sitkit.evaluation import plots
from sitkit.evaluation.extractors.extractor import Extraction
from sitkit.evaluation.images import image_grid, to_uint8
from sitkit.evaluation.metrics.metric import FeatureMetric, Metric
from sitkit.runs.config.schema import Config
from sitkit.runtime import archives
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import read_json, write_json
from sitkit.runtime.tensors import load_tensors, read_header, save_tensors

RECORD, ARRAYS, PICTURE = "record.json", "samples.npz", "grid.png"
SHARD = 512
ROW = 10


@dataclass(frozen=True, eq=False)
class SampleSet:
    """Samples that are drawn: x (n, *shape) float32 as the metrics see them (images after rounding), y (n,), the recipe."""

    folder: Path
    data: Examples
    record: dict[str, Any]

    def __repr__(self) -> str:
        return f"SampleSet({self.n} samples of shape {tuple(self.data.shape)}, NFE {self.record['nfe']}, {self.folder})"

    def _repr_png_(self) -> bytes | None:
        path = self.folder / PICTURE
        return path.read_bytes() if path.is_file() else None

    @property
    def n(self) -> int:
        """How many samples were drawn."""
        return int(self.record["recipe"]["sample"]["n"])

    @property
    def kept(self) -> bool:
        """Whether the samples themselves are on disk, not only their features."""
        return bool(self.record["kept"])

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of samples.npz."""
        with archives.opened(self.folder / ARRAYS) as arrays:
            return {name: arrays[name] for name in arrays.files}

    @property
    def x(self) -> Tensor:
        """(n, *shape) float32, images in [-1, 1]."""
        return to_float(torch.from_numpy(self.arrays["images" if self.data.is_image else "points"]))

    @property
    def y(self) -> Tensor:
        """(n,) int64."""
        return torch.from_numpy(self.arrays["labels"])

    def features(self, extraction: Extraction) -> dict[str, Tensor]:
        """Every output of an extractor for the samples: as stored, or computed from the samples."""
        path = features_file(self.folder, extraction)
        return load_tensors(path)[1] if path.is_file() else extraction(self.x)


def to_float(stored: Tensor) -> Tensor:
    """Samples as the metrics see them: uint8 (n, h, w, c) to (n, c, h, w) in [-1, 1]; anything else as it is."""
    return stored.permute(0, 3, 1, 2).float() / 127.5 - 1 if stored.dtype == torch.uint8 else stored


def to_storage(x: Tensor, data: Examples) -> Tensor:
    """Samples as they are kept: images rounded to uint8 (n, h, w, c)."""
    return torch.from_numpy(to_uint8(x)) if data.is_image else x.float().cpu().contiguous()


def features_file(folder: Path, extraction: Extraction) -> Path:
    """Where the features of the samples in a folder are."""
    return folder / f"features-{extraction.fingerprint[:12]}.safetensors"


@dataclass(frozen=True, eq=False)
class Shards:
    """The work on one folder of samples: which files there must be, and which are there.

    keep: whether the samples themselves are asked for.  extractions: whose features are asked for.
    """

    folder: Path
    data: Examples
    n: int
    keep: bool
    extractions: tuple[Extraction, ...] = ()

    @property
    def count(self) -> int:
        """How many shards n samples make."""
        return -(-self.n // SHARD)

    def range(self, i: int) -> tuple[int, int]:
        """The first index of shard i and the one after its last."""
        return i * SHARD, min((i + 1) * SHARD, self.n)

    def shard(self, i: int) -> Path:
        """The file of shard i's samples."""
        return self.folder / "shards" / f"{i:05d}.safetensors"

    def part(self, i: int, extraction: Extraction) -> Path:
        """The file of shard i's features."""
        return features_file(self.folder, extraction).with_suffix("") / f"{i:05d}.safetensors"

    @property
    def record(self) -> dict[str, Any] | None:
        """The record, if the samples were drawn."""
        path = self.folder / RECORD
        return read_json(path) if path.is_file() else None

    @property
    def drawn(self) -> bool:
        """Whether the samples are drawn, and kept if that is asked for."""
        record = self.record
        return record is not None and (bool(record["kept"]) or not self.keep)

    @property
    def finished(self) -> bool:
        """Whether everything that is asked for is in its final place."""
        return self.drawn and all(features_file(self.folder, e).is_file() for e in self.extractions)

    def done(self, i: int) -> bool:
        """Whether everything that is asked for of shard i is there."""
        return self.finished or (
            (self.drawn or self.has(i)) and all(self.part(i, e).is_file() for e in self.missing(self.extractions))
        )

    def has(self, i: int) -> bool:
        """Whether shard i is drawn, and kept if that is asked for."""
        try:
            return read_header(self.shard(i))["kept"] or not self.keep
        except UserError:
            # Not there, or put together with the rest and removed by another process just now.
            return False

    def missing(self, extractions: tuple[Extraction, ...]) -> list[Extraction]:
        """Those whose features are not in their final place."""
        return [e for e in extractions if not features_file(self.folder, e).is_file()]

    def read(self, i: int) -> Tensor | None:
        """The samples of shard i as they are kept, if they are."""
        record = self.record
        if record is not None and record["kept"]:
            first, last = self.range(i)
            return torch.from_numpy(_loaded(self.folder, self.data)[first:last])
        path = self.shard(i)
        if path.is_file() and read_header(path)["kept"]:
            return load_tensors(path)[1]["x"]
        return None

    def finish(self, record: Mapping[str, Any]) -> None:
        """Put the parts together, the record last; then the parts go.  One process at a time."""
        if not self.finished:
            for extraction in self.missing(self.extractions):
                parts = [load_tensors(self.part(i, extraction))[1] for i in range(self.count)]
                joined = {name: torch.cat([part[name] for part in parts]) for name in extraction.outputs}
                header = {"fingerprint": extraction.fingerprint, "n": self.n, **extraction.record}
                save_tensors(features_file(self.folder, extraction), joined, header)
            if not self.drawn:
                self._join(record)
        for leftover in (self.folder / "shards", *(self.part(0, e).parent for e in self.extractions)):
            shutil.rmtree(leftover, ignore_errors=True)

    def _join(self, record: Mapping[str, Any]) -> None:
        headers = [read_header(self.shard(i)) for i in range(self.count)]
        kept = all(header["kept"] for header in headers)
        if kept:
            with archives.writing(self.folder / ARRAYS) as archive:
                for name, key in (("images" if self.data.is_image else "points", "x"), ("labels", "y")):
                    parts = (load_tensors(self.shard(i))[1][key].numpy() for i in range(self.count))
                    archives.add(archive, name, self.n, parts)
        # A picture of points shows them all, one of images those of the first shard.
        shown = [load_tensors(self.shard(i))[1] for i in range(self.count if kept and self.data.is_plane else 1)]
        x, y = (torch.cat([part[key] for part in shown]) for key in ("x", "y"))
        show(to_float(x), y, self.data, self.folder / PICTURE, shown[0].get("paths"))
        spent = {
            "nfe": max(header["nfe"] for header in headers),
            "seconds": sum(header["seconds"] for header in headers),
            "kept": kept,
        }
        write_json(self.folder / RECORD, {**record, **spent})


@functools.lru_cache(maxsize=1)
def _loaded(folder: Path, data: Examples) -> np.ndarray:
    with archives.opened(folder / ARRAYS) as arrays:
        return arrays["images" if data.is_image else "points"]


def show(x: Tensor, y: Tensor | None, data: Examples, path: Path, paths: Tensor | None = None) -> None:
    """A picture of samples: images in a grid, one class a row where there are labels; points over the data."""
    if not data.is_image:
        if data.is_plane:
            reference = data.read(np.arange(min(len(data), 2000))) if len(data) else None
            plots.scatter(x.cpu(), reference, path, paths)
        return
    if y is None or data.num_classes == 0 or int(y.max()) >= data.num_classes:
        shown = x[: ROW * ROW]
        image_grid(to_uint8(shown), path, columns=ROW)
        return
    rows = [(y == label).nonzero().flatten()[:ROW] for label in y.unique()[:ROW]]
    columns = min(len(row) for row in rows)
    if columns < 2 and len(y.unique()) > ROW:
        image_grid(to_uint8(x[: ROW * ROW]), path, columns=ROW)
        return
    order = torch.cat([row[:columns] for row in rows]).to(x.device)
    names = [data.class_names[int(label)] for label in y.unique()[:ROW]]
    image_grid(to_uint8(x[order]), path, columns=columns, row_labels=names)


def block_size(shape: tuple[int, ...]) -> int:
    """How many states of a shape a CPU takes at once, whatever `sample.batch` says: 16, and up to 64 of small ones.

    In float32 on a CPU the last digits of a row of a matrix product depend on how many rows there are (seen below 16
    rows of 64 to 768 columns, torch 2.13).  Blocks of fixed size and place make a sample a function of its index alone.
    """
    return max(16, min(64, 4096 // math.prod(shape)))


# Samples of at most this many bytes together are kept, unless run.keep_samples says otherwise.
KEEP_LIMIT = 2**30


def keeps_samples(config: Config, wanted: Sequence[Metric]) -> bool:
    """Whether the samples themselves are stored, and not only their features."""
    asked = config.run.keep_samples
    if asked is not None and (asked or all(isinstance(metric, FeatureMetric) for metric in wanted)):
        return asked
    data = load_examples(config.data.source())
    size = math.prod(data.shape) * (1 if data.is_image else 4)
    return config.sample.n * size <= KEEP_LIMIT or not all(isinstance(metric, FeatureMetric) for metric in wanted)
