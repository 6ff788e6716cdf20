"""Numbers with their uncertainty: means over seeds, paired differences, and the best of several.

Cells that share seeds share their random numbers (data order, noise, labels, Brownian paths). Two of them are compared
by their differences, seed by seed, which cancels the randomness that they share.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from scipy.special import ndtri, stdtr, stdtrit

LEVEL = 0.05
SeedPair = tuple[int, int]
Standing = Literal["best", "close", "lead", ""]


@dataclass(frozen=True)
class Estimate:
    """A number with its uncertainty: one measurement, or a mean over seeds.

    Attributes:
        row, column: the place in the table of a study; "" outside a study.
        mean: the value.
        stderr: the standard error of the mean; None if it is not known.
        low, high: the interval of the mean at confidence 1 - LEVEL; infinite if the standard error is not known.
        units, of: the number of repetitions, and what was repeated: "training seeds"; for a single training "sampling
            seeds"; for a single cell "samples", where the error is the metric's own; "" without an error.
        standing: "best" (significantly better than every other row of the column), "close" (not distinguishable from
            the best), "lead" (the best by its mean alone), or "".
    """

    row: str = field(default="", kw_only=True)
    column: str = field(default="", kw_only=True)
    mean: float
    stderr: float | None = None
    low: float = -math.inf
    high: float = math.inf
    units: int = 1
    of: str = ""
    standing: Standing = ""


class Comparison(NamedTuple):
    """The mean of a - b over seeds: its standard error, interval and two-sided p-value.

    Without an error the interval is infinite and p is None. `units` and `of` are as in `Estimate`.
    """

    difference: float
    stderr: float | None
    low: float
    high: float
    p: float | None
    units: int
    of: str


class Ranking(NamedTuple):
    """The best of several groups by its mean, and whether the difference is significant.

    Attributes:
        best: the group with the best mean.
        significant: whether it is significantly better than every other group.
        close: the groups that are not distinguishable from the best.
        comparisons: the number of pairs of groups.
    """

    best: str
    significant: bool
    close: frozenset[str]
    comparisons: int

    def standing(self, name: str) -> Standing:
        """Return the standing of a group."""
        if name == self.best:
            return "best" if self.significant else "lead"
        return "close" if name in self.close else ""


def estimate(numbers: Mapping[SeedPair, Estimate]) -> Estimate:
    """Return the mean over training seeds of the mean over sampling seeds, with Student's interval.

    The training seed is the unit that is repeated. Sampling seeds of one training are not independent, so they are
    averaged first.

    Args:
        numbers: one estimate for each (training seed, sampling seed).

    Raises:
        ValueError: `numbers` is empty.
    """
    by_training: defaultdict[int, list[float]] = defaultdict(list)
    for (seed, _), number in numbers.items():
        by_training[seed].append(number.mean)
    if not by_training:
        raise ValueError("no measurements to estimate from.")
    groups = list(by_training.values())
    values, of = ([_mean(g) for g in groups], "training seeds") if len(groups) > 1 else (groups[0], "sampling seeds")
    mean, df = _mean(values), len(values) - 1
    if df:
        # hypot does not overflow where the sum of squares would: a run that diverged has huge values.
        error = math.hypot(*(v - mean for v in values)) / math.sqrt(df * len(values))
    else:
        (error,), of = (number.stderr for number in numbers.values()), "samples"
        if error is None:
            return Estimate(mean)
    margin = error * float(stdtrit(df, 1 - LEVEL / 2) if df else ndtri(1 - LEVEL / 2))
    return Estimate(mean, error, mean - margin, mean + margin, len(values), of)


def paired(a: Mapping[SeedPair, Estimate], b: Mapping[SeedPair, Estimate]) -> Comparison:
    """Compare a and b by the mean of a - b over their common seeds, with Student's interval and test.

    With one common pair of seeds the standard errors of the two cells are added in quadrature and the test is normal.
    This ignores the randomness that the cells share, so the test is conservative.

    Raises:
        ValueError: a and b have no seeds in common.
    """
    test = estimate({seeds: _difference(a[seeds], b[seeds]) for seeds in a if seeds in b})
    return Comparison(test.mean, test.stderr, test.low, test.high, _p_value(test), test.units, test.of)


def _difference(a: Estimate, b: Estimate) -> Estimate:
    error = None if a.stderr is None or b.stderr is None else math.hypot(a.stderr, b.stderr)
    return Estimate(a.mean - b.mean, error)


def _mean(values: Sequence[float]) -> float:
    try:
        return math.fsum(values) / len(values)
    except OverflowError:
        return math.fsum(v / len(values) for v in values)
    except ValueError:  # Infinities of both signs.
        return math.nan


def _p_value(test: Estimate) -> float | None:
    """Return the two-sided p-value of the mean being zero; None without a standard error."""
    if test.stderr is None:
        return None
    if test.stderr == 0:
        return 1.0 if test.mean == 0 else 0.0
    df = test.units - 1 if test.units > 1 else math.inf
    return float(2 * stdtr(df, -abs(test.mean) / test.stderr))


def rank(groups: Mapping[str, Mapping[SeedPair, Estimate]], lower_is_better: bool) -> Ranking | None:
    """Return which group is best and whether that is significant; None with fewer than two groups to compare.

    Groups whose mean is not finite are left out. The best is selected by its mean, so every pair of groups may be the one
    that is looked at. All k (k - 1) / 2 pairs are compared, and Holm's procedure keeps the probability of any wrong
    difference among them below LEVEL: the i-th smallest p-value counts at LEVEL / (pairs - i), up to the first that fails.
    """
    means = {name: estimate(numbers).mean for name, numbers in groups.items() if numbers}
    means = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    if len(means) < 2:
        return None
    best = (min if lower_is_better else max)(means, key=lambda name: means[name])
    others = [name for name in means if name != best]
    pairs = [(a, b) for a, b in itertools.combinations(means, 2) if groups[a].keys() & groups[b].keys()]
    p_values = {frozenset(pair): p for pair in pairs if (p := paired(*(groups[name] for name in pair)).p) is not None}
    comparisons, different = len(means) * (len(means) - 1) // 2, set[frozenset[str]]()
    for pair, p in sorted(p_values.items(), key=lambda item: item[1]):
        if p > LEVEL / (comparisons - len(different)):
            break
        different.add(pair)
    tested = {name for name in others if frozenset((best, name)) in p_values}
    close = frozenset(name for name in tested if frozenset((best, name)) not in different)
    return Ranking(best, len(tested) == len(others) and not close, close, comparisons)
