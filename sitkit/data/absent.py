"""Data that are not here: what a network from elsewhere was trained on, known by shape and classes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from sitkit.data.dataset import Dataset, Examples
from sitkit.registry import UserError, datasets

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


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
        import hashlib

        import numpy as np

        none = np.zeros(0, np.int64)
        mark = hashlib.sha256(f"{self.shape} {self.num_classes}".encode()).hexdigest()
        names = tuple(str(label) for label in range(self.num_classes))
        return Examples(self.shape, none, names, mark, none, none, self._refuse)

    def _refuse(self, index: np.ndarray, keys: np.ndarray | None) -> Tensor:
        raise UserError(
            f"The data that this network was trained on ({self.origin or 'unknown'}) are not here, so nothing can be "
            "measured against them or trained on them. Sampling works."
        )
