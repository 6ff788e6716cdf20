"""The sliced Wasserstein distance: the influence of a sample where the map of transport jumps."""

from __future__ import annotations

import pytest
import torch

from sitkit.evaluation.metrics.sliced_wasserstein import potential, squared_distance


@pytest.mark.parametrize("m", [6, 12, 24])
def test_at_a_jump_of_the_map_the_influence_is_the_mean_of_both_sides(m: int) -> None:
    """6 samples and a multiple of them: each level i / 6 is a jump, where a larger and a smaller weight differ in slope."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(6, 1, generator=draw, dtype=torch.float64)
    y = torch.randn(m, 1, generator=draw, dtype=torch.float64) + 0.3
    slopes, still = potential(x, y).flatten(), float(squared_distance(x, y))
    for i in range(6):
        sides = []
        for sign in (1, -1):
            counts = torch.full((6,), 2000)
            counts[i] += sign
            moved = float(squared_distance(x.repeat_interleave(counts, 0), y))
            sides.append((moved - still) * (12_000 + sign) * sign)
        # Second-order terms are of order 1 / 12,000 of the slopes, which are of size 1 to 10.
        assert sum(sides) / 2 == pytest.approx(float(slopes[i] - slopes.mean()), abs=5e-3)
