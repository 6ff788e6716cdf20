"""Philox against its published vectors, the distributions of draws, and Brownian paths that a finer grid refines."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sitkit.runtime import rng
from sitkit.runtime.rng import philox, sample_keys
from sitkit.solvers.brownian import BrownianPath, path_on


def block(counter: list[int], key: list[int]) -> str:
    words = philox(
        tuple(torch.tensor(c) for c in counter),  # pyright: ignore[reportArgumentType]
        tuple(torch.tensor(k) for k in key),  # pyright: ignore[reportArgumentType]
    )
    return " ".join(f"{int(word):08x}" for word in words)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    # The known-answer vectors of Salmon et al.'s Random123 for philox4x32-10; the third are digits of pi.
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], expected: str) -> None:
    assert block(counter, key) == expected


def keys(count: int, seed: int = 0) -> torch.Tensor:
    return sample_keys(seed, torch.arange(count))


def test_keys_are_distinct_and_belong_to_seed_and_index() -> None:
    drawn = torch.cat([keys(20_000, seed) for seed in (0, 1, -1, 2**62)])
    # 80,000 keys of 64 bits collide by chance with probability 80,000^2 / 2^65 = 2e-10.
    assert len(drawn.unique()) == len(drawn)
    assert torch.equal(sample_keys(0, torch.tensor([17])), keys(20)[17:18])


@given(
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 8),
    st.integers(1, 9),
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4),
)
def test_words_depend_on_key_node_and_element_alone(key: int, purpose: int, count: int, nodes: list[int]) -> None:
    where = torch.tensor(nodes)
    many = rng.words(torch.tensor([1, key, 2]), where, count, purpose)
    assert many.shape == (3, len(nodes), count)
    assert int(many.min()) >= 0 and int(many.max()) < 2**32
    assert torch.equal(rng.words(torch.tensor([key]), where[-1:], count + 3, purpose)[0, 0, :count], many[1, -1])


@pytest.mark.parametrize(
    ("index", "nodes", "count", "purpose", "expected"),
    [
        (range(5), range(3), 9, rng.BROWNIAN, "5a7946a5d6070a72"),
        (range(500), range(77, 88), 2, rng.BROWNIAN, "4726dd68d5b2d58c"),
        (range(7), [2**16 - 3, 2**31, 2**32 - 1], 4096, rng.TRAINING, "a7cb11549fe54970"),
        ([2**32 - 1, 2**31, 0], [0], 1, rng.LABEL, "87083d222304cb33"),
    ],
)
def test_words_are_the_same_in_every_release(
    index: Sequence[int], nodes: Sequence[int], count: int, purpose: int, expected: str
) -> None:
    """Samples, runs and their records depend on these words."""
    drawn = rng.words(sample_keys(-3, torch.tensor(list(index))), torch.tensor(list(nodes)), count, purpose)
    assert hashlib.sha256(drawn.numpy().astype("<i8").tobytes()).hexdigest()[:16] == expected


def test_nodes_above_32_bits_have_words_of_their_own() -> None:
    """Such nodes occur in a path of depth 40."""
    drawn = rng.words(keys(1), torch.tensor([5, 5 + 2**32, 5 + 2**40]), 4, rng.BROWNIAN)
    assert len(drawn.unique()) == 12


def test_normal_draws_are_box_and_mullers() -> None:
    u = (rng.words(keys(50), torch.arange(3), 5 + 1, rng.DATA).numpy() + 0.5) / 2**32
    radius, angle = np.sqrt(-2 * np.log(u[..., 0::2])), 2 * np.pi * u[..., 1::2]
    expected = np.stack((radius * np.cos(angle), radius * np.sin(angle)), -1).reshape(50, 3, 6)[..., :5]
    drawn = rng.normals(keys(50), torch.arange(3), 5, rng.DATA, torch.float64)
    # Each function is right to a few units in the last place of numbers below 7, and so is its argument.
    assert np.abs(drawn.numpy() - expected).max() < 1e-14


def test_normal_draws_are_normal_and_independent() -> None:
    one = rng.normal(keys(2_000), (5,), rng.INITIAL, torch.float64)
    # Kolmogorov and Smirnov's p-value is uniform under the law: below 1e-3 once in a thousand seeds; this seed is fixed.
    assert stats.kstest(one.flatten().numpy(), "norm").pvalue > 1e-3
    other = rng.normal(keys(2_000), (5,), rng.TRAINING, torch.float64)
    together = np.corrcoef(torch.cat((one, other), 1).numpy().T)
    # 45 correlations of 2,000 pairs, each of standard deviation 1 / sqrt(2,000) = 0.022: the largest is near 2.9 of them.
    assert np.abs(together - np.eye(10)).max() < 0.1
    assert torch.equal(rng.normal(keys(7), (5,), rng.INITIAL), one[:7].float())


def test_uniform_and_labels() -> None:
    u = rng.uniform(keys(10_000), rng.TIME)
    assert u.dtype == torch.float64 and float(u.min()) > 0 and float(u.max()) < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    counts = rng.labels(keys(10_000), 10).bincount(minlength=10)
    assert len(counts) == 10 and stats.chisquare(counts.numpy()).pvalue > 1e-3


def walk(times: list[float], count: int, *, seed: int = 0, size: int = 1, depth: int = 16) -> torch.Tensor:
    """W at the times: (count, size, times)."""
    path = BrownianPath(keys(count, seed), size, torch.float64, depth=depth)
    return torch.stack([path(t) for t in times], 2)


def test_brownian_increments_are_normal_and_independent() -> None:
    """Dyadic, non-dyadic, tiny and uneven steps: independent, centred, of variance h."""
    times = [0.0, 0.0001, 1 / 3, 0.34, 0.5, 0.96, 0.96 + 1e-3, 1.0]
    values = walk(times, 4_000)[:, 0]
    assert not bool(values[:, 0].any())
    scaled = values.diff() / torch.tensor(times, dtype=torch.float64).diff().sqrt()
    for column in scaled.T:
        assert stats.kstest(column.numpy(), "norm").pvalue > 1e-3
    together = np.corrcoef(scaled.numpy().T)
    # 21 correlations of standard deviation 0.016.
    assert np.abs(together - np.eye(len(times) - 1)).max() < 0.06


TIMES = st.lists(st.floats(0, 1), min_size=1, max_size=12, unique=True).map(sorted)


@given(TIMES, TIMES)
def test_a_finer_grid_refines_the_same_path(coarse: list[float], more: list[float]) -> None:
    """W at a time does not depend on the other times, dyadic or not, to the last bit."""
    fine = sorted({*coarse, *more})
    alone, among = walk(coarse, 3, size=2), walk(fine, 3, size=2)
    assert torch.equal(alone, among[:, :, [fine.index(t) for t in coarse]])


@given(TIMES)
def test_a_path_belongs_to_its_key(times: list[float]) -> None:
    alone = torch.stack([BrownianPath(keys(9)[4:5], 2, torch.float64)(t) for t in times[-1:]], 2)
    assert torch.equal(alone, walk(times, 9, size=2)[4:5, :, -1:])


def test_a_deeper_path_is_near_the_same_path() -> None:
    """A grid finer than 2^-16 needs a deeper tree; times within a leaf move by at most a bridge over the leaf."""
    times = [i / 250 for i in range(1, 250)]
    shift = (walk(times, 50, depth=24) - walk(times, 50)).abs().max()
    # A bridge over a leaf has a standard deviation of at most sqrt(2^-16) / 2 = 0.002; both trees' differ: 0.003, and
    # the largest of 12,450 normal numbers is 4 of them.
    assert 0 < float(shift) < 0.003 * 5
    dyadic = [i / 64 for i in range(65)]
    assert torch.equal(walk(dyadic, 5, depth=24), walk(dyadic, 5))


def test_memory_is_the_depth_however_many_times_are_asked_for() -> None:
    path = BrownianPath(keys(2), 3, torch.float64)
    held = 0
    for i in range(1, 1000):
        path(i / 1000)
        held = max(held, len(path._stack))
    assert held <= path.depth + 1


def test_a_path_is_deep_enough_for_its_grid() -> None:
    x = torch.zeros(2, 3)
    assert path_on(keys(2), x, torch.linspace(0, 1, 251)).depth == 16
    shortest = torch.tensor([0.0, 2.0**-20, 0.5, 1.0], dtype=torch.float64)
    assert path_on(keys(2), x, shortest).depth == math.ceil(20)


PURPOSES = (
    rng.KEY, rng.INITIAL, rng.BROWNIAN, rng.LABEL, rng.TIME, rng.TRAINING, rng.DROPOUT, rng.PROBE, rng.DATA, rng.POSTERIOR,
)  # fmt: skip


def test_no_two_purposes_share_a_stream() -> None:
    """The same keys give other numbers for every purpose, for normal and for uniform draws."""
    uniform = torch.stack([rng.uniform(keys(200), purpose) for purpose in PURPOSES])
    normal = torch.stack([rng.normal(keys(200), (1,), purpose, torch.float64)[:, 0] for purpose in PURPOSES])
    for drawn in (uniform, normal):
        # 45 correlations of 200 pairs, each of standard deviation 0.07: the largest of 45 normal numbers is below 4.5 of them.
        together = np.corrcoef(drawn.numpy())
        assert np.abs(together - np.eye(len(PURPOSES))).max() < 4.5 * 0.071


def test_seed_and_node_change_every_draw() -> None:
    """Of 1,000 numbers of 32 bits two sets share one with probability 1000^2 / 2^32 = 2e-4: none here."""
    nodes = rng.normals(keys(1), torch.tensor([0, 1]), 1000, rng.BROWNIAN, torch.float64)[0]
    seeds = [rng.normal(keys(1, seed), (1000,), rng.INITIAL, torch.float64)[0] for seed in (0, 1)]
    for one, other in (nodes, seeds):
        assert len(torch.cat((one, other)).unique()) == 2000
