"""The value of real data beside a metric: at the same n, and what is reported if the reference is too small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sitkit.data.dataset import in_memory
from sitkit.evaluation.metrics.kernel import KID
from sitkit.evaluation.metrics.metric import FeatureMetric, Metric
from sitkit.evaluation.reference import Reference
from sitkit.registry import extractors, metrics


def real(folder: Path, count: int, metric: Metric, n: int) -> float | None:
    images = np.random.default_rng(0).integers(0, 255, (count, 1, 4, 4), dtype=np.uint8)
    data = in_memory(images, None, (), holdout=0)
    extraction = extractors.create("pixels").build(data, torch.device("cpu"), folder)
    return Reference(data, folder).real(metric, extraction, False, n)


@pytest.mark.parametrize("name", ["frechet", "kid", "precision", "recall", "mmd", "sliced-wasserstein"])
def test_three_examples_have_no_value_of_real_data(tmp_path: Path, name: str) -> None:
    assert real(tmp_path, 3, metrics.create(name), 8) is None


def test_real_data_are_measured_at_the_n_of_the_samples(tmp_path: Path) -> None:
    """Laws of equal covariance S: the bias of the means alone is tr(S) (1/n + 1/m), here 24.9 times as large at n = 20."""
    few, many, all_of_them = (real(tmp_path, 2000, metrics.create("frechet"), n) for n in (20, 1000, 2000))
    assert few is not None and many is not None and few > 24 * many
    assert all_of_them == many


def test_real_data_are_measured_with_what_a_metric_needs(tmp_path: Path) -> None:
    """KID in subsets is the mean of KID, so smaller sets have a value; three neighbours need four points."""
    assert real(tmp_path, 30, KID(subsets=3, size=20), 30) == real(tmp_path, 30, KID(), 30)
    assert real(tmp_path, 40, KID(subsets=3, size=20), 40) is not None
    for name, n in (("precision", 2), ("recall", 4)):
        metric = metrics.create(name)
        assert isinstance(metric, FeatureMetric)
        assert real(tmp_path, 9, metric, n) is not None
