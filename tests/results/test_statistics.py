"""Means, errors and rankings: intervals have their coverage, and noise is called a winner at the stated rate."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtri

from sitkit.results.statistics import LEVEL, Estimate, SeedPair, estimate, paired, rank

TRIALS = 3000


def within(fraction: float, expected: float, trials: int = TRIALS) -> bool:
    """Whether a fraction of the trials is within four standard errors of the expected one (false in 6 of 100,000)."""
    return abs(fraction - expected) <= 4 * math.sqrt(expected * (1 - expected) / trials)


def cell(values: np.ndarray, stderr: float | None = None) -> dict[SeedPair, Estimate]:
    """Values of training seeds 0, 1, ..., or (seeds, sampling seeds)."""
    table = values if values.ndim == 2 else values[:, None]
    return {(i, j): Estimate(float(v), stderr) for i, row in enumerate(table) for j, v in enumerate(row)}


def frequency(trial: Callable[[np.random.Generator], bool], trials: int = TRIALS) -> float:
    rng = np.random.default_rng(0)
    return sum(trial(rng) for _ in range(trials)) / trials


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_students_interval_has_its_coverage(seeds: int) -> None:
    def covers(rng: np.random.Generator) -> bool:
        result = estimate(cell(rng.normal(3.0, 2.0, seeds)))
        return result.low <= 3.0 <= result.high

    assert within(frequency(covers), 1 - LEVEL)


def test_sampling_seeds_of_one_training_count_as_one_unit() -> None:
    """If trainings differ most, six numbers of two trainings are two units; six units give a wrong coverage."""

    def numbers(rng: np.random.Generator) -> np.ndarray:
        return rng.normal(0, 1, (2, 1)) + rng.normal(0, 0.1, (2, 3))

    def covers(rng: np.random.Generator) -> bool:
        result = estimate(cell(numbers(rng)))
        assert result.units == 2 and result.of == "training seeds"
        return result.low <= 0 <= result.high

    def naive(rng: np.random.Generator) -> bool:
        result = estimate(cell(numbers(rng).ravel()))
        return result.low <= 0 <= result.high

    assert within(frequency(covers), 1 - LEVEL)
    assert frequency(naive) < 0.8, "without the average over sampling seeds the interval is too narrow"


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_paired_difference_has_its_coverage_for_cells_with_common_randomness(seeds: int) -> None:
    def trial(rng: np.random.Generator) -> tuple[bool, bool]:
        shared = rng.normal(0, 10, seeds)
        result = paired(cell(shared + rng.normal(0, 1, seeds) + 0.5), cell(shared + rng.normal(0, 1, seeds)))
        assert result.p is not None
        return result.low <= 0.5 <= result.high, (result.p <= LEVEL) == (not result.low <= 0 <= result.high)

    rng = np.random.default_rng(1)
    covered, agree = zip(*(trial(rng) for _ in range(TRIALS)), strict=True)
    assert within(sum(covered) / TRIALS, 1 - LEVEL)
    assert all(agree), "test and interval agree"


@pytest.mark.parametrize(("rows", "seeds"), [(2, 3), (6, 3), (12, 5)])
def test_on_noise_a_row_is_called_the_best_or_worse_at_most_at_the_stated_rate(rows: int, seeds: int) -> None:
    """All rows are equal, so "best" is always wrong, and so is any row without ≈: each in at most LEVEL of the tables."""

    def ranked(rng: np.random.Generator):
        common = rng.normal(0, 3, seeds)
        result = rank({str(k): cell(common + rng.normal(0, 1, seeds)) for k in range(rows)}, lower_is_better=True)
        assert result is not None and result.comparisons == rows * (rows - 1) // 2
        return result

    rng = np.random.default_rng(2)
    every = [ranked(rng) for _ in range(TRIALS)]
    bold = sum(result.significant for result in every) / TRIALS
    worse = sum(len(result.close) < rows - 1 for result in every) / TRIALS
    margin = 4 * math.sqrt(LEVEL * (1 - LEVEL) / TRIALS)
    assert bold <= LEVEL + margin and worse <= LEVEL + margin
    if rows == 2:
        # With one comparison the rate equals the level: the rule is not conservative.
        assert within(bold, LEVEL)


def test_a_significantly_better_row_is_the_best() -> None:
    def wins(rng: np.random.Generator) -> bool:
        common = rng.normal(0, 3, 5)
        rows = {str(k): cell(common + rng.normal(0, 0.1, 5) + (k > 0)) for k in range(4)}
        result = rank(rows, lower_is_better=True)
        return result is not None and result.best == "0" and result.significant and not result.close

    assert frequency(wins, 500) > 0.99


def test_one_pair_of_seeds_uses_the_errors_within_the_cells() -> None:
    """Two independent estimates of known error: the normal test keeps its level."""

    def wrong(rng: np.random.Generator) -> bool:
        a, b = rng.normal(0, (0.3, 0.4))
        result = paired({(0, 0): Estimate(a, 0.3)}, {(0, 0): Estimate(b, 0.4)})
        assert result.stderr == pytest.approx(0.5) and result.of == "samples" and result.p is not None
        return result.p <= LEVEL

    assert within(frequency(wrong), LEVEL)
    alone = estimate({(0, 0): Estimate(2.0, 0.5)})
    assert (alone.low, alone.high) == pytest.approx((2 - 0.5 * float(ndtri(0.975)), 2 + 0.5 * float(ndtri(0.975))))
    assert paired({(0, 0): Estimate(1.0)}, {(0, 0): Estimate(2.0, 0.1)}).p is None
    assert estimate({(0, 0): Estimate(2.0)}) == Estimate(2.0, None, -math.inf, math.inf, 1, "")


NUMBERS = st.lists(st.integers(-1000, 1000), min_size=2, max_size=6)


@given(NUMBERS, st.lists(st.integers(-1000, 1000), min_size=6, max_size=6), st.integers(-5, 5))
def test_common_randomness_cancels_and_the_order_of_the_cells_does_not_matter(
    a: list[int], shared: list[int], gap: int
) -> None:
    # Integers, so that the sums are exact.
    values = np.array(a, float)
    other = values[::-1] + gap
    plain = paired(cell(values), cell(other))
    common = np.array(shared[: len(a)], float)
    assert paired(cell(values + common), cell(other + common)) == plain
    turned = paired(cell(other), cell(values))
    assert (turned.difference, turned.p) == (-plain.difference, plain.p)
    assert paired(dict(reversed(cell(values).items())), cell(other)).p == plain.p


@given(st.dictionaries(st.sampled_from("abcdef"), NUMBERS.map(lambda v: (v * 3)[:4]), min_size=2))
def test_the_highest_is_the_lowest_of_the_negative(rows: dict[str, list[int]]) -> None:
    cells = {name: cell(np.array(values, float)) for name, values in rows.items()}
    negative = {name: cell(-np.array(values, float)) for name, values in rows.items()}
    assert rank(cells, lower_is_better=True) == rank(negative, lower_is_better=False)
    result = rank(cells, lower_is_better=True)
    assert result is not None and result.best not in result.close and result.significant <= (not result.close)
    assert estimate(cells[result.best]).mean == min(estimate(group).mean for group in cells.values())


def test_only_equal_seeds_are_compared() -> None:
    a = {(0, 0): Estimate(1.0), (1, 0): Estimate(2.0), (7, 0): Estimate(99.0)}
    b = {(1, 0): Estimate(1.5), (0, 0): Estimate(0.0)}
    assert paired(a, b).difference == pytest.approx(0.75) and paired(a, b).units == 2
    with pytest.raises(ValueError, match="no measurements"):
        paired(a, {(3, 0): Estimate(1.0)})
    result = rank({"a": a, "b": {(3, 0): Estimate(1.0, 0.1)}}, lower_is_better=True)
    assert result is not None and not result.significant and not result.close, (
        "rows without common seeds have no standing"
    )
    assert rank({"a": a, "b": {}}, lower_is_better=True) is None


def test_numbers_of_a_run_that_diverged_raise_no_error() -> None:
    wild = {(0, 0): Estimate(1.7e308), (1, 0): Estimate(1.6e308)}
    result = estimate(wild)
    assert result.mean == pytest.approx(1.65e308) and result.stderr == pytest.approx(0.05e308)
    calm = {(0, 0): Estimate(1.0), (1, 0): Estimate(1.1)}
    broken = {(0, 0): Estimate(math.inf), (1, 0): Estimate(-math.inf)}
    lost = {(0, 0): Estimate(math.nan), (1, 0): Estimate(1.0)}
    assert math.isnan(estimate(broken).mean) and math.isnan(estimate(lost).mean)
    for order in ("abcd", "dcba"):
        cells = {"a": wild, "b": calm, "c": broken, "d": lost}
        ranking = rank({name: cells[name] for name in order}, lower_is_better=True)
        assert ranking is not None and ranking.best == "b" and ranking.comparisons == 1
