"""Handwritten digits from scikit-learn: the default data set, which needs no download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from sitkit.data.dataset import Dataset, Examples, in_memory
from sitkit.registry import datasets


@final
@datasets.register("digits")
@dataclass(frozen=True)
class Digits(Dataset):
    """1,797 handwritten digits of 8x8 pixels in ten classes: x = value / 8 - 1 for values 0 to 16.

    Source: Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits (UCI), test set, from scikit-learn.
    """

    def load(self) -> Examples:
        import numpy as np
        from sklearn.datasets import load_digits

        pixels, labels = map(np.asarray, load_digits(return_X_y=True))
        values = (pixels / 8 - 1).astype(np.float32).reshape(-1, 1, 8, 8)
        return in_memory(values, labels, tuple("0123456789"), holdout=self.holdout, bin_width=1 / 8)
