"""Samples on disk, while they are drawn and after.

samples/<identity>/
    shards/00000.safetensors  features-<fingerprint>/00000.safetensors      during the work: each whole or absent
    samples.npz  features-<fingerprint>.safetensors  grid.png  record.json  at the end: the record is written last

A shard is SHARD samples for any batch and number of processes, so that work divides and resumes the same way.  Images
are kept as uint8, rounded once; metrics and extractors read the rounded images.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
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
from sitkit.runs.config.records import SamplesRecord
from sitkit.runs.config.schema import Config
from sitkit.runtime import archives
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import exists, read_record, write_json
from sitkit.runtime.tensors import load_tensors, read_header, save_tensors

RECORD, ARRAYS, PICTURE = "record.json", "samples.npz", "grid.png"
SHARD = 512
ROW = 10
# Samples of at most this many bytes together are kept, unless run.keep_samples says otherwise.
KEEP_LIMIT = 2**30


@dataclass(frozen=True, eq=False)
class SampleSet:
    """Samples of a run on disk.

    Args:
        folder: the folder of the samples.
        data: the description of the data that the run was trained on.
        record: the content of record.json: the settings of the samples and their cost.
    """

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
        """The number of samples."""
        return int(self.record["recipe"]["sample"]["n"])

    @property
    def kept(self) -> bool:
        """Whether the samples themselves are on disk, not only their features."""
        return bool(self.record["kept"])

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of samples.npz."""
        with opened_samples(self.folder) as arrays:
            return {name: arrays[name] for name in arrays.files}

    @property
    def x(self) -> Tensor:
        """The samples as metrics read them, (n, *shape) float32; images are rounded and in [-1, 1]."""
        return to_float(torch.from_numpy(self.arrays[_key(self.data)]))

    @property
    def y(self) -> Tensor:
        """The labels, (n,) int64."""
        return torch.from_numpy(self.arrays["labels"])

    def features(self, extraction: Extraction) -> dict[str, Tensor]:
        """Return every output of an extractor for the samples, from disk or computed from the samples."""
        path = features_file(self.folder, extraction)
        return load_tensors(path)[1] if path.is_file() else extraction(self.x)


def read_samples_record(path: Path) -> dict[str, Any]:
    """Return the record of samples.  Raises UserError for a damaged one, with the remedy."""
    remedy = f"Remove the folder {path.parent}, and the same command draws the samples again."
    return read_record(path, SamplesRecord, "the record of samples", remedy)


def opened_samples(folder: Path) -> AbstractContextManager[Any]:
    """Open the arrays of the samples in a folder.  Raises UserError for a damaged file, with the remedy."""
    return archives.opened(
        folder / ARRAYS, f"Remove the folder {folder}, and the same command draws the samples again."
    )


def to_float(stored: Tensor) -> Tensor:
    """Return stored samples as metrics read them: uint8 (n, h, w, c) to (n, c, h, w) in [-1, 1]; others unchanged."""
    return stored.permute(0, 3, 1, 2).float() / 127.5 - 1 if stored.dtype == torch.uint8 else stored


def to_storage(x: Tensor, data: Examples) -> Tensor:
    """Return samples as they are stored: images rounded to uint8 (n, h, w, c)."""
    return torch.from_numpy(to_uint8(x)) if data.is_image else x.float().cpu().contiguous()


def features_file(folder: Path, extraction: Extraction) -> Path:
    """Return the file of the features of the samples in a folder."""
    return folder / f"features-{extraction.fingerprint[:12]}.safetensors"


@dataclass(frozen=True, eq=False)
class Shards:
    """The work on one folder of samples: the files that it needs, and those that exist.

    Args:
        folder: the folder of the samples.
        data: the description of the data.
        extractions: the extractors whose features are needed.
        n: the number of samples.
        keep: whether the samples themselves are needed.
    """

    folder: Path
    data: Examples
    extractions: tuple[Extraction, ...]
    n: int
    keep: bool

    @property
    def count(self) -> int:
        """The number of shards."""
        return -(-self.n // SHARD)

    def range(self, i: int) -> tuple[int, int]:
        """Return the first index of shard i and the one after its last."""
        return i * SHARD, min((i + 1) * SHARD, self.n)

    def shard(self, i: int) -> Path:
        """Return the file of shard i's samples."""
        return self.folder / "shards" / f"{i:05d}.safetensors"

    def part(self, i: int, extraction: Extraction) -> Path:
        """Return the file of shard i's features."""
        return features_file(self.folder, extraction).with_suffix("") / f"{i:05d}.safetensors"

    @property
    def record(self) -> dict[str, Any] | None:
        """The record, if the samples were drawn."""
        path = self.folder / RECORD
        return read_samples_record(path) if exists(path) else None

    @property
    def drawn(self) -> bool:
        """Whether the samples are drawn, and kept if that is needed."""
        record = self.record
        return record is not None and (bool(record["kept"]) or not self.keep)

    @property
    def missing(self) -> list[Extraction]:
        """The extractors whose features are not in their final place."""
        return [e for e in self.extractions if not exists(features_file(self.folder, e))]

    @property
    def finished(self) -> bool:
        """Whether every needed file is in its final place."""
        return self.drawn and not self.missing

    def done(self, i: int) -> bool:
        """Whether every needed file of shard i exists."""
        return self.finished or (
            (self.drawn or self.has(i)) and all(self.part(i, extraction).is_file() for extraction in self.missing)
        )

    def has(self, i: int) -> bool:
        """Whether shard i is drawn, and kept if that is needed."""
        try:
            return read_header(self.shard(i))["kept"] or not self.keep
        except UserError:
            # Missing, or joined with the others and removed by another process just now.
            return False

    def read(self, i: int) -> Tensor | None:
        """Return the samples of shard i as they are stored, if they are."""
        record = self.record
        if record is not None and record["kept"]:
            first, last = self.range(i)
            written = (self.folder / RECORD).stat().st_mtime_ns
            return torch.from_numpy(_stored_samples(self.folder.resolve(), _key(self.data), written)[first:last])
        path = self.shard(i)
        if path.is_file() and read_header(path)["kept"]:
            return load_tensors(path)[1]["x"]
        return None

    def finish(self, record: Mapping[str, Any]) -> None:
        """Join the shards, write the record last, then remove the shards.  One process at a time calls this."""
        if not self.finished:
            for extraction in self.missing:
                parts = [load_tensors(self.part(i, extraction))[1] for i in range(self.count)]
                features = {name: torch.cat([part[name] for part in parts]) for name in extraction.outputs}
                header = {"fingerprint": extraction.fingerprint, "n": self.n, **extraction.record}
                save_tensors(features_file(self.folder, extraction), features, header)
            if not self.drawn:
                self._join(record)
        for leftover in (self.folder / "shards", *(self.part(0, e).parent for e in self.extractions)):
            shutil.rmtree(leftover, ignore_errors=True)

    def _join(self, record: Mapping[str, Any]) -> None:
        headers = [read_header(self.shard(i)) for i in range(self.count)]
        kept = all(header["kept"] for header in headers)
        if kept:
            with archives.writing(self.folder / ARRAYS) as archive:
                for name, key in ((_key(self.data), "x"), ("labels", "y")):
                    parts = (load_tensors(self.shard(i))[1][key].numpy() for i in range(self.count))
                    archives.add(archive, name, self.n, parts)
        # A picture of points shows all of them, a picture of images those of the first shard.
        shown = [load_tensors(self.shard(i))[1] for i in range(self.count if kept and self.data.is_plane else 1)]
        x, y = (torch.cat([part[key] for part in shown]) for key in ("x", "y"))
        show(to_float(x), y, self.data, self.folder / PICTURE, shown[0].get("paths"))
        nfe, seconds = max(header["nfe"] for header in headers), sum(header["seconds"] for header in headers)
        write_json(self.folder / RECORD, {**record, "nfe": nfe, "seconds": seconds, "kept": kept})


def _key(data: Examples) -> str:
    return "images" if data.is_image else "points"


@functools.lru_cache(maxsize=1)
def _stored_samples(folder: Path, key: str, written: int) -> np.ndarray:
    """Return the stored samples; `written` is the time of their record, so that new samples are read again."""
    with opened_samples(folder) as arrays:
        return arrays[key]


def show(x: Tensor, y: Tensor | None, data: Examples, path: Path, paths: Tensor | None = None) -> None:
    """Write a picture of samples: a grid of images, with a class per row if there are labels; points over the data."""
    if data.is_plane:
        reference = data.read(np.arange(min(len(data), 2000))) if len(data) else None
        plots.scatter(x.cpu(), reference, path, paths)
    if not data.is_image:
        return
    images, columns, names = x[: ROW * ROW], ROW, None
    if y is not None and data.num_classes and int(y.max()) < data.num_classes:
        labels = y.unique()
        rows = [(y == label).nonzero().flatten()[:ROW] for label in labels[:ROW]]
        shortest = min(len(row) for row in rows)
        if shortest > 1 or len(labels) <= ROW:
            images, columns = x[torch.cat([row[:shortest] for row in rows]).to(x.device)], shortest
            names = [data.class_names[int(label)] for label in labels[:ROW]]
    image_grid(to_uint8(images), path, columns=columns, row_labels=names)


def block_size(shape: tuple[int, ...]) -> int:
    """Return the number of states of a shape in one solve on a CPU, whatever `sample.batch` says: 16, up to 64 of small ones.

    In float32 on a CPU the last digits of a row of a matrix product depend on the number of rows (seen below 16 rows of
    64 to 768 columns, torch 2.13).  Blocks of fixed size and place make a sample a function of its index alone.
    """
    return max(16, min(64, 4096 // math.prod(shape)))


def keeps_samples(config: Config, metrics: Sequence[Metric]) -> bool:
    """Whether the samples themselves are stored, and not only their features."""
    needed, keep = not all(isinstance(metric, FeatureMetric) for metric in metrics), config.run.keep_samples
    if needed or keep is not None:
        return needed or bool(keep)
    data = load_examples(config.data.source())
    return config.sample.n * math.prod(data.shape) * (1 if data.is_image else 4) <= KEEP_LIMIT
