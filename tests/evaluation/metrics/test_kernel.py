"""The kernel distances: what is reported of subsets."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from sitkit.evaluation.metrics.kernel import KID
from sitkit.evaluation.metrics.metric import generator


def test_the_spread_of_subsets_is_that_of_their_values_and_the_error_that_of_their_mean() -> None:
    """Papers report the population standard deviation of the values; it is largest apart from others at two subsets."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=draw, dtype=torch.float64) * 1.3
    y = torch.randn(50, 4, generator=draw, dtype=torch.float64)
    measured, order = KID(subsets=2, size=20).compare(x, y, seed=7), generator(7)
    values = []
    for _ in range(2):
        first, second = (z[torch.randperm(len(z), generator=order)[:20]] for z in (x, y))
        values.append(KID().compare(first, second).value)
    # Sums of 400 products in float64.
    assert measured.value == pytest.approx(statistics.mean(values), rel=1e-10)
    # Two subsets: the error of their mean, and the error of all pairs.
    choice, data = statistics.stdev(values) / 2**0.5, KID().compare(x, y).stderr
    assert data is not None and measured.stderr == pytest.approx(math.hypot(choice, data), rel=1e-10)
    assert measured.notes == (f"standard deviation over 2 subsets of 20: {statistics.pstdev(values):.6g}",)
