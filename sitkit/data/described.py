"""Data that are not here, known by shape and classes alone: what sampling must know of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, final

from sitkit.data.dataset import Dataset, Examples, fingerprint
from sitkit.registry import datasets
from sitkit.runtime.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np


@final
@datasets.register("absent")
@dataclass(frozen=True, kw_only=True)
class Absent(Dataset):
    """No examples, only what sampling must know of them: their shape (c, h, w) and the number of classes.

    origin: where the weights come from, so that two networks of one shape are two runs.
    """

    shape: tuple[int, ...]
    num_classes: int = 0
    origin: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.shape or min(self.shape) < 1 or self.num_classes < 0:
            raise ValueError(f"shape must be positive, num_classes 0 or more; got {self.shape} and {self.num_classes}.")

    def load(self) -> Examples:
        mark = fingerprint(f"{self.shape} {self.num_classes}")
        names = tuple(str(label) for label in range(self.num_classes))
        return from_description({"shape": self.shape, "class_names": names, "fingerprint": mark}, self.origin)


KNOWN = ("shape", "class_names", "fingerprint", "bin_width", "encoder")


def description(data: Examples) -> dict[str, Any]:
    """What sampling must know of data, as plain values."""
    told = {key: getattr(data, key) for key in KNOWN}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in told.items()}


def from_description(told: Mapping[str, Any], origin: str) -> Examples:
    """Data of a `description`, none of which can be read.  origin: what they are, for people."""
    import numpy as np

    def refuse(index: np.ndarray, keys: np.ndarray | None) -> NoReturn:
        raise UserError(
            f"The data that this network was trained on ({origin or 'unknown'}) are not here, so nothing can be "
            "measured against them or trained on them. Sampling works, and so does a metric against statistics in a file: "
            "--set 'metric={name: frechet, reference: FILE.npz}'."
        )

    none = np.zeros(0, np.int64)
    known: dict[str, Any] = {key: tuple(v) if isinstance(v, (list, tuple)) else v for key, v in told.items()}
    return Examples(**known, labels=none, train=none, heldout=none, reader=refuse)
