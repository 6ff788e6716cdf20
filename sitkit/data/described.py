"""Data that this machine does not have: their description (shape, classes), which sampling needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, final

from sitkit.data.dataset import LARGEST_EXAMPLE, Dataset, Examples, fingerprint
from sitkit.registry import datasets
from sitkit.runtime.errors import UserError, require_within

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np


@final
@datasets.register("absent")
@dataclass(frozen=True, kw_only=True)
class Absent(Dataset):
    """No examples, only their description for sampling: shape (c, h, w) and number of classes.

    origin: the source of the weights, so that two networks of one shape belong to two runs.
    """

    shape: tuple[int, ...]
    num_classes: int = 0
    origin: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.shape or min(self.shape) < 1 or self.num_classes < 0:
            raise ValueError(f"shape must be positive, num_classes 0 or more; got {self.shape} and {self.num_classes}.")
        require_within(0, 10**6, num_classes=self.num_classes)
        if math.prod(self.shape) > LARGEST_EXAMPLE:
            raise ValueError(f"shape has at most {LARGEST_EXAMPLE:,} numbers; got {self.shape}.")

    def load(self) -> Examples:
        mark = fingerprint(f"{self.shape} {self.num_classes}")
        names = tuple(str(label) for label in range(self.num_classes))
        return from_description({"shape": self.shape, "class_names": names, "fingerprint": mark}, self.origin)


KNOWN = ("shape", "class_names", "fingerprint", "bin_width", "encoder", "std")


def description(data: Examples) -> dict[str, Any]:
    """Return the properties of data that sampling needs, as plain values."""
    fields = {key: getattr(data, key) for key in KNOWN} | {"counts": data.class_counts}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}


def from_description(fields: Mapping[str, Any], origin: str) -> Examples:
    """Return examples with the fields of a `description`; they cannot be read.  origin: their name in messages."""
    import numpy as np

    def refuse(index: np.ndarray, keys: np.ndarray | None) -> NoReturn:
        raise UserError(
            f"The data that this network was trained on ({origin or 'unknown'}) are not on this machine, so no metric can "
            "compare with them and no training can read them. Sampling works, and a metric can use the statistics in a file: "
            "--set 'metric={name: frechet, reference: FILE.npz}'."
        )

    none = np.zeros(0, np.int64)
    known: dict[str, Any] = {key: tuple(v) if isinstance(v, (list, tuple)) else v for key, v in fields.items()}
    return Examples(**known, labels=none, train=none, heldout=none, reader=refuse)
