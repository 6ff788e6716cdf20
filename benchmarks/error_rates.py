"""How often a comparison of equal arms finds a difference, and how right the standard errors of the metrics are.

    python benchmarks/error_rates.py [--tiny] [--studies 2000] > error_rates.json

Every arm has the same law, so every difference that is found is wrong, and the level is 0.05.  The comparisons are those of
the tables and of `sitkit diff`: two arms paired over seeds; the mark "not distinguishable" over a column of 24 cells; two
arms with one seed each, by the errors of each metric.  The features of a metric are Gaussian clouds: samples of the
reference's own law, and of a law that is shifted and wider.  `ratio` is the reported standard error relative to the true one,
the root mean square difference of two arms over sqrt(2).  The arms share the reference.  The errors of kid and mmd include
the reference, so their `ratio` is of arms with a reference each.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict

import numpy as np
import torch
from _shared import machine, parser
from torch import Tensor

import sitkit
from sitkit.evaluation.metrics.metric import FeatureMetric
from sitkit.results.statistics import LEVEL, Estimate, SeedPair, paired, rank

# Samples, reference points, dimensions, and the share of the studies; the smallest cost the least.
SIZES = ((128, 200, 16, 0.8), (256, 300, 32, 0.14), (512, 600, 64, 0.04), (1000, 1000, 64, 0.02))
LAWS = {"equal": 0.0, "apart": 0.15}
ROWS = 24
# The errors of these metrics include that of the reference.
OF_BOTH_SETS = ("kid", "mmd")


def metrics(n: int) -> dict[str, FeatureMetric]:
    """Return the metrics for n samples; sfid is the same function as frechet, of other features."""
    settings = {
        "frechet": ("frechet", {}),
        "frechet, extrapolate": ("frechet", {"extrapolate": True}),
        "kid": ("kid", {}),
        "kid, 10 subsets of n / 2": ("kid", {"subsets": 10, "size": n // 2}),
        "mmd": ("mmd", {}),
        "precision": ("precision", {}),
        "recall": ("recall", {}),
        "sliced-wasserstein": ("sliced-wasserstein", {"projections": 64}),
        "inception-score": ("inception-score", {}),
    }
    return {key: sitkit.metrics.create(name, **fields) for key, (name, fields) in settings.items()}


def rate(wrong: int, trials: int) -> dict[str, float]:
    """Return a share of wrong differences with its standard error."""
    share = wrong / trials
    return {"rate": share, "stderr": math.sqrt(share * (1 - share) / trials), "trials": trials}


def cell(values: np.ndarray, stderr: float | None = None) -> dict[SeedPair, Estimate]:
    """Return numbers of training seeds 0, 1, ..."""
    return {(seed, 0): Estimate(float(value), stderr) for seed, value in enumerate(values)}


def of_seeds(rng: np.random.Generator, arms: int, seeds: int) -> dict[str, dict[SeedPair, Estimate]]:
    """Return arms of one law that share the randomness of their seeds, more than their own."""
    shared, known = 3 * rng.normal(size=seeds), 1.0 if seeds == 1 else None
    return {str(arm): cell(shared + rng.normal(size=seeds), known) for arm in range(arms)}


def of_pairs(rng: np.random.Generator, seeds: int, studies: int) -> dict[str, float]:
    """Return how often the paired test finds a difference between two arms."""
    wrong = 0
    for _ in range(studies):
        a, b = of_seeds(rng, 2, seeds).values()
        p = paired(a, b).p
        wrong += p is not None and p <= LEVEL
    return {"seeds": seeds, **rate(wrong, studies)}


def of_columns(rng: np.random.Generator, seeds: int, studies: int) -> dict[str, float]:
    """Return how often a column of ROWS rows has a row that is not marked as close to the best."""
    rankings = [rank(of_seeds(rng, ROWS, seeds), lower_is_better=True) for _ in range(studies)]
    wrong = sum(ranking is not None and len(ranking.close) < ROWS - 1 for ranking in rankings)
    return {"rows": ROWS, "seeds": seeds, **rate(wrong, studies)}


def cloud(n: int, d: int, apart: float, rng: torch.Generator) -> Tensor:
    """Return n Gaussian points with variances 4 / k in d dimensions, shifted and widened by a share of the deviation."""
    scale = 2 * torch.arange(1, d + 1, dtype=torch.float64).rsqrt()
    return scale * ((1 + apart) * torch.randn(n, d, generator=rng, dtype=torch.float64) + apart)


class Tally:
    """The wrong differences of one metric, and the sums that give the ratio of its errors."""

    def __init__(self) -> None:
        self.wrong, self.compared, self.studies = 0, 0, 0
        self.reported, self.true = 0.0, 0.0

    def add(self, a: Estimate, b: Estimate, other: float) -> None:
        """Count a comparison of two arms; `other` is the value of the second one with what its error includes redrawn."""
        p = paired({(0, 0): a}, {(0, 0): b}).p
        self.studies += 1
        self.true += (a.mean - other) ** 2
        if p is not None and a.stderr is not None and b.stderr is not None:
            self.compared += 1
            self.wrong += p <= LEVEL
            self.reported += a.stderr**2 + b.stderr**2

    def __add__(self, other: Tally) -> Tally:
        total = Tally()
        for key in vars(total):
            setattr(total, key, getattr(self, key) + getattr(other, key))
        return total

    def row(self) -> dict[str, float | None]:
        """Return the rate and the ratio, with its error from the number of studies; None if no error is reported."""
        if not self.compared:
            return {"rate": None, "ratio": None, "trials": self.studies}
        ratio = math.sqrt(self.reported / self.true)
        return {**rate(self.wrong, self.compared), "ratio": ratio, "ratio_stderr": ratio / math.sqrt(2 * self.studies)}


def of_metrics(studies: int, tiny: bool) -> list[dict[str, object]]:
    """Return the rates of one-seed comparisons and the ratios of errors, for each metric by law and by size."""
    rng = torch.Generator().manual_seed(0)
    tallies: defaultdict[tuple[str, str, int], Tally] = defaultdict(Tally)
    for n, m, d, share in SIZES[: 1 if tiny else None]:
        for study in range(max(2, round(share * studies))):
            law = list(LAWS)[study % len(LAWS)]
            a, b = (cloud(n, d, LAWS[law], rng) for _ in range(2))
            y, z = (cloud(m, d, 0.0, rng) for _ in range(2))
            for name, metric in metrics(n).items():
                first, second = (metric.compare(x, y, seed=study) for x in (a, b))
                other = metric.value(b, z, seed=study + 1) if metric.name in OF_BOTH_SETS else second.value
                arms = [Estimate(found.value, found.stderr) for found in (first, second)]
                tallies[name, law, n].add(arms[0], arms[1], other)
    rows = []
    for name in dict.fromkeys(key[0] for key in tallies):
        of_name = {key[1:]: tally for key, tally in tallies.items() if key[0] == name}
        row: dict[str, object] = {"metric": name, "all": sum(of_name.values(), Tally()).row()}
        for law in LAWS:
            row[law] = sum((tally for key, tally in of_name.items() if key[0] == law), Tally()).row()
        for n in dict.fromkeys(key[1] for key in of_name):
            row[f"n = {n}"] = sum((tally for key, tally in of_name.items() if key[1] == n), Tally()).row()
        rows.append(row)
    return rows


def main() -> None:
    """Simulate the studies and print JSON."""
    benchmark = parser(__doc__, tiny="a few studies, for a smoke test")
    benchmark.add_argument("--studies", type=int, default=2000)
    options = benchmark.parse_args()
    torch.set_num_threads(1)
    studies, rng = 8 if options.tiny else options.studies, np.random.default_rng(0)
    result = {
        **machine(),
        "level": LEVEL,
        "paired": [of_pairs(rng, seeds, studies) for seeds in (2, 3, 5)],
        "column": [of_columns(rng, seeds, studies) for seeds in (1, 3, 5)],
        "metrics": of_metrics(studies, options.tiny),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
