"""Means, errors and rankings: intervals cover as often as they say, and noise is called a winner as seldom as they say."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtri

from sitkit.results.statistics import LEVEL, Estimate, Seeds, estimate, paired, rank

TRIALS = 3000


def within(share: float, expected: float, trials: int = TRIALS) -> bool:
    """Whether a share of so many trials is within four standard errors of the expected one (wrong in 6 of 100,000)."""
    return abs(share - expected) <= 4 * math.sqrt(expected * (1 - expected) / trials)


def cell(values: np.ndarray, stderr: float | None = None) -> dict[Seeds, Estimate]:
    """Values of training seeds 0, 1, ..., or (seeds, sampling seeds)."""
    table = values if values.ndim == 2 else values[:, None]
    return {(i, j): Estimate(float(v), stderr) for i, row in enumerate(table) for j, v in enumerate(row)}


def share(trial: Callable[[np.random.Generator], bool], trials: int = TRIALS) -> float:
    rng = np.random.default_rng(0)
    return sum(trial(rng) for _ in range(trials)) / trials


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_student_s_interval_covers_the_mean_as_often_as_it_says(seeds: int) -> None:
    def covers(rng: np.random.Generator) -> bool:
        told = estimate(cell(rng.normal(3.0, 2.0, seeds)))
        return told.low <= 3.0 <= told.high

    assert within(share(covers), 1 - LEVEL)


def test_sampling_seeds_of_one_training_are_not_taken_for_trainings() -> None:
    """With most of the spread between trainings, six numbers of two trainings are two units; taken for six they mislead."""

    def numbers(rng: np.random.Generator) -> np.ndarray:
        return rng.normal(0, 1, (2, 1)) + rng.normal(0, 0.1, (2, 3))

    def covers(rng: np.random.Generator) -> bool:
        told = estimate(cell(numbers(rng)))
        assert told.units == 2 and told.of == "training seeds"
        return told.low <= 0 <= told.high

    def naive(rng: np.random.Generator) -> bool:
        told = estimate(cell(numbers(rng).ravel()))
        return told.low <= 0 <= told.high

    assert within(share(covers), 1 - LEVEL)
    assert share(naive) < 0.8, "what the average over sampling seeds is for"


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_paired_difference_covers_whatever_the_cells_share(seeds: int) -> None:
    def trial(rng: np.random.Generator) -> tuple[bool, bool]:
        shared = rng.normal(0, 10, seeds)
        told = paired(cell(shared + rng.normal(0, 1, seeds) + 0.5), cell(shared + rng.normal(0, 1, seeds)))
        assert told.p is not None
        return told.low <= 0.5 <= told.high, (told.p <= LEVEL) == (not told.low <= 0 <= told.high)

    rng = np.random.default_rng(1)
    covered, agree = zip(*(trial(rng) for _ in range(TRIALS)), strict=True)
    assert within(sum(covered) / TRIALS, 1 - LEVEL)
    assert all(agree), "test and interval say the same"


@pytest.mark.parametrize(("rows", "seeds"), [(2, 3), (6, 3), (4, 5)])
def test_on_noise_a_row_is_bold_or_not_greyed_as_seldom_as_promised(rows: int, seeds: int) -> None:
    """All rows are equal.  Bold is always wrong: it must happen in at most LEVEL of the tables.  That row 0, as good as any,
    is told to be worse than the best takes one of k - 1 others to beat it in a two-sided test at LEVEL / (k - 1): LEVEL / 2.
    """

    def ranked(rng: np.random.Generator):
        common = rng.normal(0, 3, seeds)
        told = rank({str(k): cell(common + rng.normal(0, 1, seeds)) for k in range(rows)}, lower_is_better=True)
        assert told is not None and told.comparisons == rows - 1
        return told

    rng = np.random.default_rng(2)
    every = [ranked(rng) for _ in range(TRIALS)]
    bold = sum(told.significant for told in every) / TRIALS
    worse = sum(told.best != "0" and "0" not in told.close for told in every) / TRIALS
    margin = 4 * math.sqrt(LEVEL * (1 - LEVEL) / TRIALS)
    assert bold <= LEVEL + margin and worse <= LEVEL / 2 + margin
    if rows == 2:
        # One comparison, so the level is met and not only kept: the rule is not merely timid.
        assert within(bold, LEVEL)


def test_a_real_winner_is_found() -> None:
    def wins(rng: np.random.Generator) -> bool:
        common = rng.normal(0, 3, 5)
        rows = {str(k): cell(common + rng.normal(0, 0.1, 5) + (k > 0)) for k in range(4)}
        told = rank(rows, lower_is_better=True)
        return told is not None and told.best == "0" and told.significant and not told.close

    assert share(wins, 500) > 0.99


def test_one_pair_of_seeds_goes_by_the_errors_within_the_cells() -> None:
    """Two independent estimates of known error: the normal test keeps its level."""

    def wrong(rng: np.random.Generator) -> bool:
        a, b = rng.normal(0, (0.3, 0.4))
        told = paired({(0, 0): Estimate(a, 0.3)}, {(0, 0): Estimate(b, 0.4)})
        assert told.stderr == pytest.approx(0.5) and told.of == "samples" and told.p is not None
        return told.p <= LEVEL

    assert within(share(wrong), LEVEL)
    alone = estimate({(0, 0): Estimate(2.0, 0.5)})
    assert (alone.low, alone.high) == pytest.approx((2 - 0.5 * float(ndtri(0.975)), 2 + 0.5 * float(ndtri(0.975))))
    assert paired({(0, 0): Estimate(1.0)}, {(0, 0): Estimate(2.0, 0.1)}).p is None
    assert estimate({(0, 0): Estimate(2.0)}) == Estimate(2.0, None, -math.inf, math.inf, 1, "")


NUMBERS = st.lists(st.integers(-1000, 1000), min_size=2, max_size=6)


@given(NUMBERS, st.lists(st.integers(-1000, 1000), min_size=6, max_size=6), st.integers(-5, 5))
def test_what_seeds_share_cancels_and_the_order_of_the_cells_does_not_matter(
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
def test_higher_is_better_is_lower_of_the_negative(rows: dict[str, list[int]]) -> None:
    cells = {name: cell(np.array(values, float)) for name, values in rows.items()}
    negative = {name: cell(-np.array(values, float)) for name, values in rows.items()}
    assert rank(cells, lower_is_better=True) == rank(negative, lower_is_better=False)
    told = rank(cells, lower_is_better=True)
    assert told is not None and told.best not in told.close and told.significant <= (not told.close)
    assert estimate(cells[told.best]).mean == min(estimate(group).mean for group in cells.values())


def test_equal_seeds_alone_are_compared() -> None:
    a = {(0, 0): Estimate(1.0), (1, 0): Estimate(2.0), (7, 0): Estimate(99.0)}
    b = {(1, 0): Estimate(1.5), (0, 0): Estimate(0.0)}
    assert paired(a, b).difference == pytest.approx(0.75) and paired(a, b).units == 2
    with pytest.raises(ValueError, match="no measurements"):
        paired(a, {(3, 0): Estimate(1.0)})
    told = rank({"a": a, "b": {(3, 0): Estimate(1.0, 0.1)}}, lower_is_better=True)
    assert told is not None and not told.significant and not told.close, "nothing is said of what cannot be compared"
    assert rank({"a": a, "b": {}}, lower_is_better=True) is None


def test_numbers_of_a_run_that_diverged_break_nothing() -> None:
    wild = {(0, 0): Estimate(1.7e308), (1, 0): Estimate(1.6e308)}
    told = estimate(wild)
    assert told.mean == pytest.approx(1.65e308) and told.stderr == pytest.approx(0.05e308)
    calm = {(0, 0): Estimate(1.0), (1, 0): Estimate(1.1)}
    broken = {(0, 0): Estimate(math.inf), (1, 0): Estimate(-math.inf)}
    lost = {(0, 0): Estimate(math.nan), (1, 0): Estimate(1.0)}
    assert math.isnan(estimate(broken).mean) and math.isnan(estimate(lost).mean)
    for order in ("abcd", "dcba"):
        cells = {"a": wild, "b": calm, "c": broken, "d": lost}
        ranking = rank({name: cells[name] for name in order}, lower_is_better=True)
        assert ranking is not None and ranking.best == "b" and ranking.comparisons == 1
