"""What is learnt from: examples that are read by index, and endless batches of them.

Nothing here remembers anything: a batch is a function of (seed, step, size), so that a run continued at step k sees
what it would have seen.
"""

from __future__ import annotations

import functools
import hashlib
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sitkit.registry import Component
from sitkit.runtime.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# Which examples are held out is a property of the data, the same for every training seed.
SPLIT_SEED = 2401_08740


@dataclass(frozen=True, kw_only=True)
class Dataset(Component):
    """A source of examples.  The fraction `holdout` is never trained on: the loss against t is measured there."""

    holdout: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout must be at least 0 and below 1; got {self.holdout}.")

    @abstractmethod
    def load(self) -> Examples:
        """All examples, checked.  Raises UserError for whatever cannot be read, with the file's name."""

    def source(self) -> Dataset:
        """What decoded samples are compared with: the set itself, or for latents the images that they were made of."""
        return self


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples with labels, of one shape.

    labels: (n,) int64, in [0, num_classes), or all 0 where class_names is empty: the examples are then unlabelled.
    fingerprint: SHA-256 of what the examples are: of values and labels, or, where reading all values would take hours, of
    what the data set's docstring says.  train, heldout: (., ) int64, disjoint, together every index.
    reader: what `read` calls.  order: (seed, epoch) -> `train` in the order of that epoch; None: uniformly at random.
    law: the distribution that the examples were drawn from, where it is known.
    bin_width: the spacing of the levels that values are rounded to, in units of the values; None: not rounded.
    encoder: the fingerprint of the autoencoder whose latents the examples are; None: the examples are data themselves.
    """

    shape: tuple[int, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    fingerprint: str
    train: np.ndarray
    heldout: np.ndarray
    reader: Callable[[np.ndarray, np.ndarray | None], Tensor]
    law: Any = None
    bin_width: float | None = None
    encoder: str | None = None
    order: Callable[[int, int], np.ndarray] | None = None

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 for unlabelled examples."""
        return len(self.class_names)

    @property
    def is_image(self) -> bool:
        """Whether the shape is (channels, height, width) with the channels of a picture, or samples are decoded to one."""
        return len(self.shape) == 3 and (self.shape[0] in (1, 3) or self.encoder is not None)

    @property
    def is_plane(self) -> bool:
        """Whether examples are points of the plane, which a picture shows as they are."""
        return self.shape == (2,)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: np.ndarray, keys: np.ndarray | None = None) -> Tensor:
        """Examples by index: (b,) -> (b, *shape) float32, images in [-1, 1].

        keys (b,) int64, one per example drawn, decide its augmentation; without keys there is none.
        """
        return self.reader(index, keys)


def in_memory(
    values: np.ndarray,
    labels: np.ndarray | None,
    class_names: tuple[str, ...],
    *,
    holdout: float,
    flip: bool = False,
    law: Any = None,
    bin_width: float | None = None,
) -> Examples:
    """Examples from arrays.

    values: (n, *shape), float32 as they are, or uint8 images (n, c, h, w), read as v / 127.5 - 1.
    labels: (n,) int, or None for unlabelled examples.  flip: mirror an image, left to right, where its key is odd.
    bin_width: the spacing of the values' levels; uint8 images have 1 / 127.5 by themselves.
    Raises UserError if nothing would be left to train on, ValueError for arrays that break the contract.
    """
    import numpy as np

    n = len(values)
    labels = np.zeros(n, np.int64) if labels is None else labels.astype(np.int64)
    if labels.shape != (n,):
        raise ValueError(f"{n} examples need labels of shape ({n},); got {labels.shape}.")
    if n and not 0 <= labels.min() <= labels.max() < max(1, len(class_names)):
        raise ValueError(f"labels {labels.min()} to {labels.max()} do not fit {len(class_names)} classes.")
    if values.dtype not in (np.float32, np.uint8):
        raise ValueError(f"values must be float32 or uint8; got {values.dtype}.")
    if not np.isfinite(values).all():
        raise ValueError("values must be finite; got NaN or infinity.")
    values = np.ascontiguousarray(values)
    train, heldout = split_holdout(n, holdout)
    return Examples(
        shape=values.shape[1:],
        labels=labels,
        class_names=class_names,
        fingerprint=fingerprint(f"{values.dtype} {values.shape}", values, labels),
        train=train,
        heldout=heldout,
        reader=functools.partial(_read, values, flip),
        law=law,
        bin_width=1 / 127.5 if values.dtype == np.uint8 else bin_width,
    )


def split_holdout(n: int, holdout: float) -> tuple[np.ndarray, np.ndarray]:
    """(train, heldout): sorted indices; at least one is held out unless holdout = 0.  The same for every run.

    Raises UserError if nothing is left to train on.
    """
    import numpy as np

    held = max(1, round(n * holdout)) if holdout else 0
    if held >= n:
        raise UserError(f"holdout = {holdout} leaves none of {n} examples to train on. Give more data or holdout = 0.")
    order = np.random.default_rng(SPLIT_SEED).permutation(n)
    return np.sort(order[held:]), np.sort(order[:held])


def _read(values: np.ndarray, flip: bool, index: np.ndarray, keys: np.ndarray | None) -> Tensor:
    return to_tensor(values[index], flip, keys)


def to_tensor(values: np.ndarray, flip: bool, keys: np.ndarray | None) -> Tensor:
    """Examples as they are read: uint8 images as v / 127.5 - 1, mirrored where flip is set and the key is odd."""

    import torch

    x = torch.from_numpy(values)
    if x.dtype == torch.uint8:
        x = x.float().div_(127.5).sub_(1)
    if flip and keys is not None:
        odd = torch.from_numpy(keys % 2 == 1)
        x[odd] = x[odd].flip(-1)
    return x


def fingerprint(text: str, *arrays: np.ndarray) -> str:
    """Return the SHA-256 of a text and of the bytes of arrays."""
    digest = hashlib.sha256(text.encode())
    for array in arrays:
        digest.update(array.data)
    return digest.hexdigest()


@functools.lru_cache(maxsize=4)
def load_examples(dataset: Dataset) -> Examples:
    """The examples of a data set, loaded once."""
    return dataset.load()
