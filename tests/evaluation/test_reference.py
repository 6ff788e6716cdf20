"""The reference set: what is reported if its halves are too small for a metric."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sitkit.data.dataset import in_memory
from sitkit.evaluation.metrics.kernel import KID
from sitkit.evaluation.reference import Reference
from sitkit.registry import extractors, metrics


def halves(folder: Path, count: int, metric: object) -> float | None:
    images = np.random.default_rng(0).integers(0, 255, (count, 1, 4, 4), dtype=np.uint8)
    data = in_memory(images, None, (), holdout=0)
    extraction = extractors.create("pixels").build(data, torch.device("cpu"), folder)
    return Reference(data, folder).halves(metric, extraction, False)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["frechet", "kid", "precision", "recall", "mmd", "sliced-wasserstein"])
def test_three_examples_have_no_halves(tmp_path: Path, name: str) -> None:
    assert halves(tmp_path, 3, metrics.create(name)) is None


def test_a_subset_larger_than_a_half_leaves_the_halves_out(tmp_path: Path) -> None:
    assert halves(tmp_path, 30, KID(subsets=3, size=20)) is None
    assert halves(tmp_path, 40, KID(subsets=3, size=20)) is not None
