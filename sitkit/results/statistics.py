"""Numbers with their uncertainty: a mean over seeds, a paired difference, and the best of several.

Cells that share seeds share their random numbers (data order, noise, labels, Brownian paths), so two of them are
compared by their differences, seed by seed, which cancels what the seeds have in common.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scipy.special import ndtri, stdtr, stdtrit

LEVEL = 0.05


class CellValue(NamedTuple):
    """A number with the seeds of its training and sampling, and its standard error within the cell if known."""

    seed: int
    sample_seed: int
    value: float
    stderr: float | None = None


class Estimate(NamedTuple):
    """A mean, its standard error, its interval at 1 - LEVEL, and over how many of what the error was taken.

    of: "training seeds"; with one of them "sampling seeds"; with one of each "samples", the error within the cell (by
    bootstrap or the delta method, as the metric says); "" where there is none.
    """

    mean: float
    stderr: float | None
    low: float
    high: float
    units: int
    of: str


class Comparison(NamedTuple):
    """a - b with its standard error, interval and two-sided p-value; None where one cell each has no error to go by."""

    difference: float
    stderr: float | None
    low: float
    high: float
    p: float | None
    units: int
    of: str


class Ranking(NamedTuple):
    """The best of several by its mean, and what may be said of it.

    significant: it is better than every other.  close: those it is not distinguishable from.  comparisons: with how
    many others it was compared, each at LEVEL / comparisons.
    """

    best: str
    significant: bool
    close: frozenset[str]
    comparisons: int


def estimate(measured: Sequence[CellValue]) -> Estimate:
    """The mean over training seeds of the mean over sampling seeds, with Student's interval.

    The training seed is the unit that is repeated: sampling seeds of one training are not independent of one another, so
    they are averaged first.  Raises ValueError for nothing.
    """
    values, of = _units(measured, [m.value for m in measured])
    mean = _mean(values)
    if len(values) > 1:
        error = _error_of_mean(values, mean)
        return Estimate(mean, error, *_interval(mean, error, len(values) - 1), len(values), of)
    error = measured[0].stderr
    if error is None:
        return Estimate(mean, None, -math.inf, math.inf, 1, "")
    return Estimate(mean, error, *_interval(mean, error, None), 1, "samples")


def paired(a: Sequence[CellValue], b: Sequence[CellValue]) -> Comparison:
    """The mean of a - b over the seeds that both have, with Student's interval and test.

    With one pair of seeds the errors within the two cells are added in quadrature and the test is normal: that leaves out
    what the cells have in common, so it errs on the careful side.  Raises ValueError where no seeds are shared.
    """
    others = {(m.seed, m.sample_seed): m for m in b}
    both = [(m, others[m.seed, m.sample_seed]) for m in a if (m.seed, m.sample_seed) in others]
    differences, of = _units([m for m, _ in both], [m.value - other.value for m, other in both])
    mean = _mean(differences)
    if len(differences) > 1:
        error, df = _error_of_mean(differences, mean), len(differences) - 1
        return Comparison(mean, error, *_interval(mean, error, df), _p(mean, error, df), len(differences), of)
    first, second = both[0]
    if first.stderr is None or second.stderr is None:
        return Comparison(mean, None, -math.inf, math.inf, None, 1, "")
    error = math.hypot(first.stderr, second.stderr)
    return Comparison(mean, error, *_interval(mean, error, None), _p(mean, error, None), 1, "samples")


def _units(measured: Sequence[CellValue], values: Sequence[float]) -> tuple[list[float], str]:
    """The values by the unit that is repeated: training seeds, or the sampling seeds of the only training."""
    by_seed: dict[int, list[float]] = {}
    for m, value in zip(measured, values, strict=True):
        by_seed.setdefault(m.seed, []).append(value)
    if not by_seed:
        raise ValueError("no measurements to estimate from.")
    if len(by_seed) == 1:
        return list(values), "sampling seeds"
    return [_mean(group) for group in by_seed.values()], "training seeds"


def _mean(values: Sequence[float]) -> float:
    try:
        return math.fsum(values) / len(values)
    except OverflowError:
        return math.fsum(v / len(values) for v in values)
    except ValueError:  # Infinities of both signs.
        return math.nan


def _error_of_mean(values: Sequence[float], mean: float) -> float:
    # No square of its own to overflow: a run that diverged is a number like any other.
    return math.hypot(*(v - mean for v in values)) / math.sqrt((len(values) - 1) * len(values))


def _interval(mean: float, error: float, df: int | None) -> tuple[float, float]:
    """The two-sided interval at 1 - LEVEL: Student's with df degrees of freedom, normal for None."""
    quantile = float(ndtri(1 - LEVEL / 2) if df is None else stdtrit(df, 1 - LEVEL / 2))
    return mean - quantile * error, mean + quantile * error


def _p(mean: float, error: float, df: int | None) -> float:
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    t = -abs(mean) / error
    return float(2 * stdtr(math.inf if df is None else df, t))


def rank(cells: Mapping[str, Sequence[CellValue]], lower_is_better: bool) -> Ranking | None:
    """Which of several is best, and whether it is more than luck; None where there is nothing to compare.

    Those whose mean is not finite are left out.

    The best by its mean is compared with each of the k - 1 others at LEVEL / (k - 1).  That keeps the chance of calling
    a wrong one the best below LEVEL although the best was picked by its look: to be wrong, it must beat the true best,
    one of k - 1 comparisons (Bonferroni).
    """
    means = {name: estimate(measured).mean for name, measured in cells.items() if measured}
    means = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    if len(means) < 2:
        return None
    best = (min if lower_is_better else max)(means, key=lambda name: means[name])
    others = [name for name in means if name != best]
    ps = {}
    for name in others:
        try:
            ps[name] = paired(cells[best], cells[name]).p
        except ValueError:  # No seeds in common.
            ps[name] = None
    clear = {name for name, p in ps.items() if p is not None and p <= LEVEL / len(others)}
    close = frozenset(name for name, p in ps.items() if p is not None and name not in clear)
    return Ranking(best, len(clear) == len(others), close, len(others))


def as_dict(told: Estimate | Comparison) -> dict[str, Any]:
    """A record of an estimate for JSON."""
    return told._asdict()
