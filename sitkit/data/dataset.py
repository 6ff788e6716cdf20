"""The contract of data sets: a `Dataset` is the configuration, `Examples` are its data, read by index."""

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

# The held-out examples depend on the data alone: they are the same for every training seed.
SPLIT_SEED = 2401_08740
# Bounds far above every use: the side of an image in pixels, the points of a toy set, the numbers of one example.
LARGEST_IMAGE, MOST_POINTS, LARGEST_EXAMPLE = 2**16, 2**28, 2**32


@dataclass(frozen=True, kw_only=True)
class Dataset(Component):
    """A source of examples.

    Args:
        holdout: the fraction of the examples that training never reads, in [0, 1); the curve of the loss against t is
            measured on them.
    """

    holdout: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout must be at least 0 and below 1; got {self.holdout}.")

    @abstractmethod
    def load(self) -> Examples:
        """Return all examples, checked.  Raises UserError, with the name of the file, if something cannot be read."""

    def content(self) -> str:
        return load_examples(self).fingerprint

    def source(self) -> Dataset:
        """Return the data that decoded samples are compared with: this set, or the images that latents are made from."""
        return self


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples of one shape, with labels.

    Args:
        shape: the shape of one example; (channels, height, width) for an image.
        labels: (n,) int64 in [0, num_classes); all 0 if class_names is empty, that is, if there are no labels.
        class_names: the name of each class.
        fingerprint: SHA-256 of values and labels, or, if reading all values would take hours, of the properties that the
            docstring of the data set lists.
        train: indices of the examples to train on, int64; train and heldout are disjoint and together all indices.
        heldout: indices of the held-out examples, int64.
        reader: (indices, keys or None) -> examples; `read` calls it.
        law: the distribution that the examples are drawn from, if it is known.
        bin_width: the distance of the levels that values are rounded to, in units of the values; None: not rounded.
        encoder: the fingerprint of the autoencoder if the examples are latents; None: they are not latents.
        order: (seed, epoch) -> `train` in the order of that epoch; None: an order drawn uniformly at random.
        counts: the number of examples of each class, of data that are only described; None: not known.
        std: the median standard deviation of the pixels or latent channels that a network models, of data that are only
            described; None: not known.
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
    counts: tuple[int, ...] | None = None
    std: float | None = None

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 for unlabelled examples."""
        return len(self.class_names)

    @functools.cached_property
    def class_counts(self) -> tuple[int, ...] | None:
        """The number of examples of each class; None: not known."""
        import numpy as np

        if not len(self.labels):
            return self.counts
        return tuple(np.bincount(self.labels, minlength=self.num_classes)[: self.num_classes].tolist())

    @property
    def present_classes(self) -> list[int]:
        """The classes that have examples; all classes if the counts are not known."""
        counts = self.class_counts
        return [label for label in range(self.num_classes) if counts is None or counts[label]]

    @property
    def is_image(self) -> bool:
        """Whether an example is an image of 1 or 3 channels, or a latent that is decoded to an image."""
        return len(self.shape) == 3 and (self.shape[0] in (1, 3) or self.encoder is not None)

    @property
    def is_plane(self) -> bool:
        """Whether the examples are points of the plane, which can be plotted directly."""
        return self.shape == (2,)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: np.ndarray, keys: np.ndarray | None = None) -> Tensor:
        """Return examples by index: (b,) -> (b, *shape) float32, images in [-1, 1].

        keys: (b,) int64, one per example, determine the augmentation; None: no augmentation.
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
    """Return examples that are held in memory as arrays.

    Args:
        values: (n, *shape) float32, read without a change, or uint8 images (n, c, h, w), read as v / 127.5 - 1.
        labels: (n,) int, or None for examples without labels.
        class_names: the name of each class; empty without labels.
        holdout: the fraction of the examples to hold out, in [0, 1).
        flip: mirror an image, left to right, if its key is odd.
        law: the distribution that the examples are drawn from, if it is known.
        bin_width: the distance of the levels that values are rounded to; uint8 images always have 1 / 127.5.

    Returns:
        The examples; their fingerprint is SHA-256 of values and labels.

    Raises:
        UserError: if no example remains to train on.
        ValueError: for arrays of another form.
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
    """Return (train, heldout), sorted indices, the same for every run; at least one is held out unless holdout = 0.

    Raises UserError if no example remains to train on.
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
    """Return values as float32: uint8 images as v / 127.5 - 1, mirrored if `flip` is set and the key is odd."""
    import torch

    x = torch.from_numpy(values)
    if x.dtype == torch.uint8:
        x = x.float().div_(127.5).sub_(1)
    if flip and keys is not None:
        odd = torch.from_numpy(keys % 2 == 1)
        x[odd] = x[odd].flip(-1)
    return x


def fingerprint(text: str, *arrays: np.ndarray) -> str:
    """Return the SHA-256 of a text and of the bytes of arrays; a name that is not UTF-8 counts by its bytes."""
    digest = hashlib.sha256(text.encode(errors="surrogateescape"))
    for array in arrays:
        digest.update(array.data)
    return digest.hexdigest()


@functools.lru_cache(maxsize=4)
def load_examples(dataset: Dataset) -> Examples:
    """Return the examples of a data set, loaded once."""
    return dataset.load()
