"""Latents that `sitkit encode` wrote, read from memory-mapped files; every read draws from their posteriors.

index.json                    their source, number and statistics; written last
shard-00000.safetensors ...   mean and std (k, 2, *shape) of examples and their mirror images; labels (k,)
"""

from __future__ import annotations

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

from sitkit.data.dataset import Dataset, Examples, split_holdout
from sitkit.registry import datasets
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import exists, read_record
from sitkit.runtime.tensors import load_tensors

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


INDEX, PLAN = "index.json", "plan.json"
ENCODE_AGAIN = "Run the same `sitkit encode` again: it makes what is damaged or missing."


def shard_path(folder: Path, number: int) -> Path:
    """Return the path of a shard."""
    return folder / f"shard-{number:05d}.safetensors"


@final
@datasets.register("latents")
@dataclass(frozen=True)
class Latents(Dataset):
    """Latents that `sitkit encode` wrote to the folder `path`, for training with the same autoencoder.

    A read gives mean + std * noise.  The key determines the noise and the choice between an example and its mirror image;
    without keys a read gives the mean.  Mean and std include the scale of the autoencoder.  flip: draw the mirror image
    half of the time; by default as the source data do.
    """

    path: str
    flip: bool | None = None

    def places(self) -> tuple[str, ...]:
        return ("path",)

    def load(self) -> Examples:
        import torch

        folder = Path(self.path).expanduser()
        index = self._index()
        # hashlib and the disk work without Python's lock, so the digests of several shards are checked at the same time.
        with ThreadPoolExecutor(8) as pool:
            shards = list(pool.map(functools.partial(read_shard, folder), itertools.count(), index["rows"]))
        labels = torch.cat([shard["labels"] for shard in shards]).numpy()
        train, heldout = split_holdout(len(labels), self.holdout)
        flip = bool(index["source"]["data"].get("flip", False)) if self.flip is None else self.flip
        return Examples(
            shape=tuple(index["shape"]),
            labels=labels,
            class_names=tuple(index["class_names"]),
            fingerprint=index["fingerprint"],
            train=train,
            heldout=heldout,
            reader=Reader([(shard["mean"], shard["std"]) for shard in shards], index["rows"][0], flip),
            encoder=index["autoencoder"]["fingerprint"],
        )

    def source(self) -> Dataset:
        """Return the images that were encoded.  Raises UserError if they are missing or have changed."""
        source = self._index()["source"]
        images = f"{self.path}: the images that these latents were made of, which decoded samples are compared with,"
        try:
            dataset = datasets.parse(source["data"])
            fingerprint = dataset.load().fingerprint
        except UserError as error:
            raise UserError(f"{images} cannot be read: {error}") from None
        if fingerprint != source["fingerprint"]:
            raise UserError(f"{images} have changed since: {source['data']}. Restore the old ones, or encode again.")
        return dataset

    def _index(self) -> dict[str, Any]:
        folder = Path(self.path).expanduser()
        if exists(folder / INDEX):
            return read_index(folder)
        if exists(folder / PLAN):
            raise UserError(f"{folder}: not all is encoded yet; run the same `sitkit encode` again.")
        raise UserError(f"{folder}: there are no latents; `sitkit encode` writes them.")


def read_index(folder: Path) -> dict[str, Any]:
    """Return the content of index.json.  Raises UserError for a damaged one."""
    from sitkit.data.latents_record import IndexRecord

    return read_record(folder / INDEX, IndexRecord, "the index of latents", ENCODE_AGAIN)


def read_shard(folder: Path, number: int, rows: int) -> dict[str, Tensor]:
    """Return the tensors of a shard.  Raises UserError if it is missing, damaged, or not the one that belongs there."""
    path = shard_path(folder, number)
    # The file is memory-mapped: means and standard deviations are read when a batch needs them.
    header, tensors = load_tensors(path, "shard of latents", ENCODE_AGAIN)
    if not {"mean", "std", "labels"} <= tensors.keys() or "sha256" not in header:
        raise UserError(f"{path}: holds no latents. {ENCODE_AGAIN}")
    if tensors["labels"].shape != (rows,):
        raise UserError(f"{path}: holds {len(tensors['labels'])} examples, not {rows}. {ENCODE_AGAIN}")
    if header.get("number") != number:
        raise UserError(f"{path}: holds the latents of shard {header.get('number')}. {ENCODE_AGAIN}")
    return tensors


@dataclass(frozen=True, eq=False)
class Reader:
    """The reader of memory-mapped shards of (mean, std), each (k, 2, *shape); all but the last have k = per_shard."""

    shards: list[tuple[Tensor, Tensor]]
    per_shard: int
    flip: bool

    def __call__(self, index: np.ndarray, keys: np.ndarray | None) -> Tensor:
        import numpy as np
        import torch

        mirrored = keys % 2 if self.flip and keys is not None else np.zeros_like(index)
        number, row = np.divmod(index, self.per_shard)
        mean = torch.empty(len(index), *self.shards[0][0].shape[2:])
        std = torch.empty_like(mean)
        for k in np.unique(number):
            places = np.flatnonzero(number == k)
            rows, sides = torch.from_numpy(row[places]), torch.from_numpy(mirrored[places])
            for out, values in zip((mean, std), self.shards[k], strict=True):
                out[places] = values[rows, sides].float()
        return Posterior(mean, std).draw(None if keys is None else torch.from_numpy(keys))


class Posterior(NamedTuple):
    """The Gaussian distribution of the latent of an example, given the example.

    Args:
        mean: (b, *latent_shape).
        std: standard deviations, (b, *latent_shape); None if the encoder is deterministic.
    """

    mean: Tensor
    std: Tensor | None = None

    def draw(self, keys: Tensor | None) -> Tensor:
        """Return mean + std * noise, where the keys (b,) determine the standard normal noise; the mean without keys."""
        from sitkit.runtime import rng

        if self.std is None or keys is None:
            return self.mean
        return self.mean + self.std * rng.normal(keys, tuple(self.mean.shape[1:]), rng.POSTERIOR)
