"""Couplings: the laws, least total distance against all permutations, and labels kept apart."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sitkit.registry import couplings
from sitkit.testing import obey
from sitkit.transport.coupling import MinibatchOT


@pytest.mark.parametrize("name", couplings.names())
def test_laws(name: str) -> None:
    obey(couplings.create(name))


def test_laws_across_classes() -> None:
    obey(MinibatchOT(by_class=False))


def draw(seed: int, rows: int, *shape: int) -> Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))


def test_independent_is_as_drawn() -> None:
    data, noise = draw(0, 6, 2), draw(1, 6, 2)
    assert couplings.create("independent").pair(data, noise, torch.zeros(6)) is noise


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 3))
def test_least_total_squared_distance(seed: int, rows: int, size: int) -> None:
    data, noise = draw(seed, rows, size), draw(seed + 1, rows, size)
    paired = MinibatchOT(by_class=False).pair(data, noise, torch.zeros(rows))
    totals = [float((data - noise[list(order)]).double().square().sum()) for order in permutations(range(rows))]
    # The float32 differences are squared and summed over at most 18 numbers of order 1: 18 x 1e-7.
    assert float((data - paired).double().square().sum()) == pytest.approx(min(totals), abs=1e-5)


@given(st.integers(0, 10_000), st.integers(2, 24))
def test_by_class_keeps_noise_within_its_label(seed: int, rows: int) -> None:
    data, noise = draw(seed, rows, 2, 2), draw(seed + 1, rows, 2, 2)
    y = torch.randint(0, 3, (rows,), generator=torch.Generator().manual_seed(seed))
    paired = MinibatchOT().pair(data, noise, y)
    for label in y.unique():
        mine, theirs = (sorted(x[y == label].flatten(1).tolist()) for x in (noise, paired))
        assert mine == theirs
        assert (
            float((data - paired)[y == label].square().sum()) <= float((data - noise)[y == label].square().sum()) + 1e-5
        )
