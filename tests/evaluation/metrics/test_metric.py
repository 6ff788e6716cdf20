"""Metrics against closed forms, brute force and the laws that every registered metric obeys."""

from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sitkit.evaluation.extractors.extractor import Pixels
from sitkit.evaluation.metrics.frechet import SFID, Frechet, ProjectedSamples, fit_gaussian, frechet, root
from sitkit.evaluation.metrics.inception_score import InceptionScore, inception_score
from sitkit.evaluation.metrics.kernel import KID, MMD, discrepancy, gaussians, rms_distance
from sitkit.evaluation.metrics.metric import FeatureMetric, Metric, divided
from sitkit.evaluation.metrics.precision_recall import Precision, Recall, fraction_within, radii
from sitkit.evaluation.metrics.sliced_wasserstein import (
    SlicedWasserstein,
    directions,
    potential,
    sliced_wasserstein,
    squared_distance,
)
from sitkit.registry import metrics, spec
from sitkit.runtime.errors import UserError, WorkFailed

# What the laws can be tried on: metrics of features of any kind.  Those of spatial features and of logits are tried below.
NAMES = [name for name in metrics.names() if getattr(metrics[name], "reads", "features") == "features"]


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=dtype)


def orthogonal(d: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(d, d, seed=seed)).Q


def positive(d: int, seed: int) -> Tensor:
    """A full symmetric matrix with eigenvalues between 0.3 and 3."""
    q = orthogonal(d, seed)
    return q @ torch.diag(torch.linspace(0.3, 3, d, dtype=torch.float64)) @ q.T


def with_moments(n: int, mean: Tensor, covariance: Tensor, seed: int) -> Tensor:
    """n points whose sample mean and unbiased covariance, of a rank below n, are these to rounding."""
    rows = root(covariance)
    x = normal(n, len(rows), seed=seed)
    white = torch.linalg.qr(x - x.mean(0)).Q * math.sqrt(n - 1)
    return mean + white @ rows


# Laws of every registered metric ------------------------------------------------------------------------------------


@pytest.fixture(params=NAMES)
def metric(request: pytest.FixtureRequest) -> Metric:
    return metrics.create(request.param)


def images(n: int, seed: int, shift: float = 0.0) -> Tensor:
    return (normal(n, 1, 3, 3, seed=seed, dtype=torch.float32) * 0.4 + shift).clamp(-1, 1)


def test_another_law_is_worse_than_the_same(metric: Metric) -> None:
    # A shift of half a standard deviation in 9 dimensions is 1.5 standard deviations in all; with 300 points the mean
    # is known to 0.06 a dimension, so that the two cases are some 8 standard errors apart.
    reference = images(300, 0)
    same, other = (metric.measure(images(300, 1, shift), reference).value for shift in (0.0, 0.2))
    assert (other > 2 * max(same, 0)) if metric.lower_is_better else (other < same - 0.05)


def test_the_order_of_the_samples_is_nothing(metric: Metric) -> None:
    x, y = images(60, 0), images(50, 1, 0.1)
    ordered = metric.measure(x, y)
    shuffled = metric.measure(x[torch.randperm(60, generator=rng(2))], y[torch.randperm(50, generator=rng(3))])
    # Sums of 60 terms of order 1 in another order differ by some 60 * 1e-16, a distance's root by the root's slope.
    assert shuffled.value == pytest.approx(ordered.value, rel=1e-9, abs=1e-12)
    assert shuffled.notes == ordered.notes


def test_equal_arguments_give_equal_results_and_no_side_effects(metric: Metric) -> None:
    x, y = images(60, 0), images(50, 1, 0.1)
    before, state = (x.clone(), y.clone()), torch.random.get_rng_state()
    assert metric.measure(x, y, seed=5) == metric.measure(x, y, seed=5)
    assert metric.real(x, 20, seed=5) == metric.real(x, 20, seed=5)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_points_of_one_and_two_dimensions(metric: Metric) -> None:
    for d in (1, 2):
        assert math.isfinite(metric.measure(normal(40, d, seed=0).float(), normal(30, d, seed=1).float()).value)


def test_a_copy_of_itself_is_read_back_from_its_record(metric: Metric) -> None:
    assert metrics.parse(spec(metric)) == metric


def test_sets_that_cannot_be_compared_are_refused(metric: Metric) -> None:
    x = images(20, 0)
    with pytest.raises(UserError, match=r"\(1, 3, 3\) and the reference of \(1, 2, 2\)"):
        metric.measure(x, x[..., :2, :2])
    with pytest.raises(UserError, match="at least 2 samples; got 1"):
        metric.measure(x[:1], x)
    with pytest.raises(UserError, match="at least 2 reference points; got 1"):
        metric.measure(x, x[:1])
    broken = x.clone()
    broken[7, 0, 0, 0], broken[9, 0, 1, 1] = math.nan, math.inf
    with pytest.raises(WorkFailed, match="2 of 20 samples hold NaN or Inf, the first at index 7"):
        metric.measure(broken, x)


def test_a_metric_takes_its_extractor_by_name_mapping_or_object() -> None:
    for features in ("pixels", {"name": "pixels"}, Pixels()):
        assert metrics.create("frechet", features=features) == Frechet(features=Pixels())
    with pytest.raises(UserError, match="Did you mean 'pixels'"):
        metrics.create("frechet", features="pixel")


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("frechet", {"bootstrap": 1}, "bootstrap must be 0 .off. or at least 2 resamples; got 1"),
        ("sliced-wasserstein", {"projections": 0}, "projections must be at least 1; got 0"),
        ("sliced-wasserstein", {"bootstrap": -2}, "got -2"),
        ("precision", {"k": 0}, "k must be at least 1; got 0"),
        ("inception-score", {"split": 1}, "split must be at least 2"),
        ("kid", {"size": 1}, "size must be at least 2; got 1"),
        ("kid", {"subsets": -1}, "subsets must be at least 0"),
        ("mmd", {"scale": -1.0}, "scale must be positive and finite; got -1.0"),
        ("mmd", {"widths": ()}, "widths must be positive"),
        ("mmd", {"block": 0}, "block must be at least 1; got 0"),
        ("mmd", {"blocks": 3}, "Did you mean 'block'"),
    ],
)
def test_a_wrong_field_is_named(name: str, fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        metrics.create(name, **fields)


def test_the_modules_import_no_heavy_library() -> None:
    code = "import sys, sitkit; sitkit.metrics.names(); import sitkit.evaluation.plots; print([m for m in HEAVY if m in sys.modules])"
    heavy = ("torch", "numpy", "scipy", "sklearn", "PIL", "matplotlib", "pydantic")
    code = code.replace("HEAVY", repr(heavy))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_real_examples_and_the_others_are_disjoint_and_depend_on_the_seed() -> None:
    x = torch.arange(11.0)[:, None]
    first, second = divided(x, 3, seed=3)
    assert len(first) == 3 and len(second) == 8
    assert len({*first.flatten().tolist(), *second.flatten().tolist()}) == 11
    assert not torch.equal(first, divided(x, 3, seed=4)[0])


# Frechet ------------------------------------------------------------------------------------------------------------


def by_eigenvalues(mu1: Tensor, s1: Tensor, mu2: Tensor, s2: Tensor, rank: int) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2) - 2 sum sqrt(eig(S1 S2)), as it is written: by the product of the covariances (d, d).

    rank: of the product, for the root of an eigenvalue that is nothing but rounding is 1e-8.
    """
    eigenvalues = np.sort(np.linalg.eigvals((s1 @ s2).numpy()).real)[len(s1) - rank :]
    return float((mu1 - mu2).square().sum() + s1.trace() + s2.trace() - 2 * np.sqrt(eigenvalues).sum())


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and unbiased covariance (d, d) of points (n, d)."""
    return x.mean(0), torch.atleast_2d(torch.cov(x.T))


@settings(deadline=None)
@given(st.integers(2, 24), st.integers(2, 24), st.integers(1, 16), st.integers(0, 2**31))
@example(8, 8, 8, 0)  # n = d and m = d
@example(9, 9, 8, 0)  # as few as make a covariance regular
@example(24, 3, 16, 0)
@example(3, 24, 16, 0)
def test_frechet_is_the_formula_for_any_numbers_of_points_and_dimensions(n: int, m: int, d: int, seed: int) -> None:
    x, y = normal(n, d, seed=seed) @ positive(d, 1) + 1, normal(m, d, seed=seed + 1)
    measured = Frechet().compare(x, y)
    expected = by_eigenvalues(*moments(x), *moments(y), min(n - 1, m - 1, d))
    scale = float(x.var(0).sum() + y.var(0).sum())
    # The formula knows an eigenvalue to 1e-16 of the largest, and its root to 1e-16 / (2 root): 1e-11 for a root of 1e-5,
    # as small as there are.
    assert measured.value == pytest.approx(expected, abs=1e-10 * scale)
    assert measured.value == pytest.approx(frechet(y, x), abs=1e-12 * scale)
    # A resample's products are taken from those of all: the same number as from its points alone.
    rows = torch.randint(n, (n,), generator=rng(0))
    resample = ProjectedSamples.by(x, fit_gaussian(y)).take(rows).distance()
    assert resample == pytest.approx(frechet(x[rows], y), abs=1e-12 * scale)


def test_frechet_of_gaussians_on_the_line() -> None:
    # (mu1 - mu2)^2 + (sigma1 - sigma2)^2
    one = torch.ones(1, dtype=torch.float64)
    for sigma1, sigma2 in ((1.5, 0.25), (2.0, 0.0), (0.0, 0.0)):
        x, y = (with_moments(3, mu * one, sigma**2 * one[None], 0) for mu, sigma in ((3, sigma1), (1, sigma2)))
        assert frechet(x, y) == pytest.approx(4 + (sigma1 - sigma2) ** 2, rel=1e-14)


def known_pair(d: int, rank: int) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], float]:
    """Two Gaussians of full or deficient rank in R^d and their distance.

    The optimal map of N(mu1, S) to N(mu2, A S A) with A symmetric positive is x -> mu2 + A (x - mu1), so that the
    distance is |mu1 - mu2|^2 + tr(S) + tr(A S A) - 2 tr(A S): no root of a matrix in it.  S and A do not commute.
    """
    a, basis = positive(d, 1), orthogonal(d, 2)[:, :rank]
    s = basis @ torch.diag(torch.linspace(0.2, 5, rank, dtype=torch.float64)) @ basis.T
    mu1, mu2 = normal(d, seed=3), normal(d, seed=4)
    truth = (mu1 - mu2).square().sum() + s.trace() + (a @ s @ a).trace() - 2 * (a @ s).trace()
    return (mu1, s, mu2, a @ s @ a), float(truth)


@pytest.mark.parametrize(("n", "m"), [(40, 30), (16, 17), (5, 40), (40, 5), (4, 4)])
@pytest.mark.parametrize("rank", [16, 15, 3, 1, 0])
def test_frechet_of_covariances_of_any_rank(rank: int, n: int, m: int) -> None:
    """Whether the points are more or fewer than the 16 dimensions, as long as they have the rank."""
    (mu1, s1, mu2, s2), truth = known_pair(16, rank)
    x, y = with_moments(max(n, rank + 1), mu1, s1, 5), with_moments(max(m, rank + 1), mu2, s2, 6)
    # Condition 25 * 100 at eps 2e-16: some 1e-12.  Roots of rounding noise, if kept, would cost 13 * 1e-8.
    assert frechet(x, y) == pytest.approx(truth, rel=1e-12)
    assert frechet(y, x) == pytest.approx(truth, rel=1e-12)


def test_frechet_of_covariances_with_no_common_direction() -> None:
    # (S1 S2)^{1/2} = 0, so that the distance is the sum of the traces.
    q = orthogonal(12, 0)
    s1, s2 = q[:, :5] @ q[:, :5].T * 2, q[:, 5:] @ q[:, 5:].T * 3
    zero = torch.zeros(12, dtype=torch.float64)
    assert frechet(with_moments(20, zero, s1, 1), with_moments(30, zero, s2, 2)) == pytest.approx(
        5 * 2 + 7 * 3, rel=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_frechet_of_point_sets_with_known_moments(dtype: torch.dtype) -> None:
    (mu1, s1, mu2, s2), truth = known_pair(16, 16)
    x, y = with_moments(200, mu1, s1, 5).to(dtype), with_moments(300, mu2, s2, 6).to(dtype)
    # Rounding the points to float32 moves each by 6e-8 of its size of up to 10; the arithmetic stays in float64.
    rel = 1e-10 if dtype == torch.float64 else 1e-6
    assert frechet(x, y) == pytest.approx(truth, rel=rel)
    assert Frechet().measure(x, y).value == pytest.approx(truth, rel=rel)


def test_frechet_uses_the_unbiased_covariance() -> None:
    # Two points a, b have variance (a - b)^2 / 2: {0, 2} has sigma sqrt 2, {0, 0} has 0; means 1 and 0.
    assert frechet(torch.tensor([[0.0], [2.0]]), torch.zeros(2, 1)) == pytest.approx(1 + 2, rel=1e-14)


def test_frechet_invariances() -> None:
    x, y = normal(80, 6, seed=0) @ positive(6, 1), normal(90, 6, seed=2) + 0.5
    value, q, shift = frechet(x, y), orthogonal(6, 3), normal(6, seed=4)
    assert frechet(y, x) == pytest.approx(value, rel=1e-12)
    assert frechet(x @ q + shift, y @ q + shift) == pytest.approx(value, rel=1e-12)
    assert frechet(3 * x, 3 * y) == pytest.approx(9 * value, rel=1e-12)
    # What cancels is of the size of the traces, about 30, and the roots' relative error is about 1e-15.
    assert frechet(x, x) == pytest.approx(0, abs=1e-12)
    few = x[:4]
    assert frechet(few, few) == pytest.approx(0, abs=1e-12)


def test_frechet_says_when_a_covariance_is_singular() -> None:
    x = normal(5, 8, seed=0)
    note = "the covariance of the samples has rank at most 4 of 8: 5 points in 8 dimensions, 9 are needed"
    assert Frechet().measure(x, normal(60, 8, seed=1)).notes == (note,)
    full, flat = normal(60, 8, seed=1), normal(60, 8, seed=2)
    flat[:, 2] = -1
    note = "the covariances of samples and reference have rank 7 of 8 together"
    for pair in ((flat, flat), (flat, full), (full, flat)):
        assert Frechet().measure(*pair).notes == (note,)
    assert Frechet().measure(full, full + 1).notes == ()


def test_frechet_of_real_data_agrees_with_the_metric() -> None:
    x = normal(100, 5, seed=0)
    # Equal laws: E = tr(S) (1/50 + 1/50) from the means and about as much again from the covariances.
    assert 0 < frechet(*divided(x, 50, 1)) < 1
    for metric in (Frechet(bootstrap=10), Frechet(extrapolate=True)):
        halved = metric.compare(*divided(x, 50, 1), seed=1)
        assert metric.real(x, 50, seed=1) == pytest.approx(halved.value, rel=1e-12)
    assert Frechet().real(x, 50, seed=1) != Frechet().real(x, 50, seed=2)


def test_frechet_bootstrap_matches_the_spread_of_repeated_draws() -> None:
    reference = normal(400, 3, seed=0)
    draws = [normal(200, 3, seed=10 + k) * 1.3 + 0.5 for k in range(120)]
    spread = torch.tensor([frechet(x, reference) for x in draws]).std().item()
    errors = [Frechet(bootstrap=60).measure(x, reference, seed=1).stderr for x in draws[:4]]
    # Spread and bootstrap are known to 1 / sqrt(2 * 120) = 6% and 1 / sqrt(2 * 60 * 4) = 5%, the bootstrap's own law
    # varies by some 10% between draws of 200: 30% is more than twice their sum in quadrature.
    assert sum(e for e in errors if e is not None) / 4 == pytest.approx(spread, rel=0.3)
    delta = [Frechet().measure(x, reference).stderr for x in draws]
    # The spread is known to 6%; the mean of 120 errors by the delta method, to second order in 1/sqrt(200), to as much.
    assert sum(e for e in delta if e is not None) / 120 == pytest.approx(spread, rel=0.2)


# MMD ----------------------------------------------------------------------------------------------------------------


def brute_force_mmd2(x: Tensor, y: Tensor, scale: float, widths: tuple[float, ...]) -> float:
    def k(a: Tensor, b: Tensor) -> float:
        squared = float((a - b).square().sum())
        return sum(math.exp(-squared / (2 * (width * scale) ** 2)) for width in widths) / len(widths)

    xx = [k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    yy = [k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j]
    xy = [k(a, b) for a in x for b in y]
    return sum(xx) / len(xx) + sum(yy) / len(yy) - 2 * sum(xy) / len(xy)


@pytest.mark.parametrize("block", [1, 4, 9, 1000])
def test_mmd_equals_the_double_sum_for_any_block(block: int) -> None:
    # |x|^2 is 3e8 so far from the origin: products of uncentred points would be wrong by 3e8 * 2e-16 = 6e-8.
    x, y = normal(11, 3, seed=0) + 1e4, normal(9, 3, seed=1) + 1e4 + 1
    mmd = MMD(scale=1.5, block=block)
    assert mmd.measure(x, y).value == pytest.approx(brute_force_mmd2(x, y, 1.5, mmd.widths), abs=1e-13)


def test_the_error_of_mmd_is_the_jackknife_less_the_part_of_pairs() -> None:
    x, y = normal(8, 2, seed=0), normal(7, 2, seed=1) + 1
    widths = (1.0,)
    variance = 0.0
    for own, other in ((x, y), (y, x)):
        n = len(own)
        left = [brute_force_mmd2(own[[j for j in range(n) if j != i]], other, 1.0, widths) for i in range(n)]
        mean = sum(left) / n
        variance += (n - 1) / n * sum((value - mean) ** 2 for value in left)
    for own, other, factor in ((x, x, 2), (y, y, 2), (x, y, 4)):
        kernel = torch.exp(-torch.cdist(own, other).square() / 2)
        pairs = ~torch.eye(len(own), dtype=torch.bool) if own is other else torch.ones_like(kernel, dtype=torch.bool)
        centred = (pairs * kernel**2).sum() / pairs.sum() - ((pairs * kernel).sum() / pairs.sum()) ** 2
        for axis in (0, 1):
            means = (pairs * kernel).sum(axis) / pairs.sum(axis)
            centred -= means.var(correction=0)
        variance -= factor * float(centred) / int(pairs.sum())
    stderr = MMD(scale=1.0, widths=widths).measure(x, y).stderr
    assert stderr == pytest.approx(math.sqrt(variance), rel=1e-9)


@pytest.mark.parametrize(("shift", "high"), [(0.0, 1.33), (1.0, 1.15)])
def test_mmd_is_unbiased_and_its_error_is_right(shift: float, high: float) -> None:
    """Mean over repeats against E k = (s^2 / (s^2 + 2))^{d/2} exp(-|shift|^2 / (2 (s^2 + 2))) of Gaussians."""
    n, m, d, repeats = 40, 30, 2, 600
    scale = 1.0
    overlap = (scale**2 / (scale**2 + 2)) ** (d / 2)
    truth = 2 * overlap * (1 - math.exp(-(shift**2) / (2 * (scale**2 + 2))))
    kernel = gaussians(scale, (1.0,))
    offset = torch.tensor([shift, 0.0])
    results = [
        discrepancy(kernel, normal(n, d, seed=2 * k) + offset, normal(m, d, seed=2 * k + 1), 64) for k in range(repeats)
    ]
    values = torch.tensor([r.value for r in results], dtype=torch.float64)
    error = values.std().item() / math.sqrt(repeats)
    # The biased estimator lies (1 - 1/3)(1/40 + 1/30) = 0.039 above, some 40 of these errors.
    assert abs(values.mean().item() - truth) < 4 * error < 0.01
    # The spread of 600 is known to 1 / sqrt(1200) = 3 %.  For equal laws the jackknife alone is sqrt 2 too large, and the
    # floor of half of it adds 23 % here: it varies much in 2 dimensions.
    ratio = math.sqrt(sum(r.stderr**2 for r in results if r.stderr is not None) / repeats) / values.std().item()
    assert 0.85 < ratio < high


def test_mmd_invariances_and_its_scale() -> None:
    x, y, q = normal(40, 4, seed=0), normal(30, 4, seed=1) * 2, orthogonal(4, 2)
    value = MMD().measure(x, y).value
    # The scale follows the reference, so that units cancel.
    assert MMD().measure(7 * x @ q + 3, 7 * y @ q + 3).value == pytest.approx(value, abs=1e-13)
    fixed = MMD(scale=2.0)
    assert fixed.measure(x, y).value == pytest.approx(fixed.measure(y, x).value, abs=1e-14)
    pairs = torch.pdist(y).square().mean().sqrt().item()
    assert rms_distance(y) == pytest.approx(pairs, rel=1e-12)
    assert MMD().measure(x, y).notes == (f"kernel scale {pairs:.6g} feature units",)
    with pytest.raises(UserError, match="Set mmd's 'scale'"):
        MMD().measure(x, torch.ones(5, 4))


# Sliced Wasserstein -------------------------------------------------------------------------------------------------


def test_sliced_wasserstein_of_a_shift() -> None:
    """W2^2 along u is (u . s)^2, with mean |s|^2 / d and variance 2 (d - 1) / (d^2 (d + 2)) |s|^4 over the sphere."""
    d, projections = 7, 2000
    x, s = normal(50, d, seed=0), normal(d, seed=1)
    u = directions(projections, d, 3)
    # Exact for these directions...
    assert sliced_wasserstein(x + s, x, u) ** 2 == pytest.approx(float((u @ s).square().mean()), rel=1e-12)
    # ...and within 4 standard errors of the mean over all.
    relative = math.sqrt(2 * (d - 1) / (d + 2) / projections)
    value = SlicedWasserstein(projections=projections).measure(x + s, x, seed=3).value
    assert value**2 == pytest.approx(float(s.square().sum()) / d, rel=4 * relative)


def test_sliced_wasserstein_on_the_line_is_wasserstein() -> None:
    x = normal(30, 1, seed=0)
    metric = SlicedWasserstein(projections=5)
    assert metric.measure(x + 2.5, x).value == pytest.approx(2.5, rel=1e-12)
    # Between x and 3 x the optimal map is the scaling: W2^2 = 4 mean x^2.
    assert metric.measure(3 * x, x).value == pytest.approx(2 * float(x.square().mean().sqrt()), rel=1e-12)


def test_unequal_sets_are_compared_exactly() -> None:
    """Against both sets repeated to a common size, where W2^2 is the mean squared gap of the sorted values."""
    x, y = torch.tensor([[1.0], [0.0], [2.0]]), torch.tensor([[3.0], [0.0]])
    assert float(squared_distance(x, y)) == pytest.approx(float(Fraction(7, 6)), rel=1e-6)
    for n, m in ((3, 2), (12, 8), (5, 7), (9, 3), (1, 4)):
        a, b = normal(n, 4, seed=n), normal(m, 4, seed=m + 50)
        long = a.repeat_interleave(m, 0).sort(0).values - b.repeat_interleave(n, 0).sort(0).values
        torch.testing.assert_close(squared_distance(a, b), long.square().mean(0), rtol=1e-13, atol=0)
    doubled = normal(20, 3, seed=0)
    u = directions(16, 3, 0)
    assert sliced_wasserstein(doubled.repeat(2, 1), doubled, u) < 1e-15


def test_sliced_wasserstein_invariances() -> None:
    x, y, s, q = normal(40, 5, seed=0), normal(30, 5, seed=1) * 2, normal(5, seed=2), orthogonal(5, 3)
    u = directions(64, 5, 4)
    value = sliced_wasserstein(x, y, u)
    assert sliced_wasserstein(y, x, u) == pytest.approx(value, rel=1e-13)
    assert sliced_wasserstein(3 * x + s, 3 * y + s, u) == pytest.approx(3 * value, rel=1e-12)
    assert sliced_wasserstein(x @ q.T, y @ q.T, u @ q.T) == pytest.approx(value, rel=1e-12)
    assert sliced_wasserstein(x, x, u) == 0
    assert torch.allclose(u.norm(dim=1), torch.ones(64, dtype=torch.float64), atol=1e-15)
    seeds = [SlicedWasserstein(projections=8).measure(x, y, seed=k).value for k in (0, 1)]
    assert seeds[0] != seeds[1]


def test_sliced_wasserstein_bootstrap_matches_the_spread_of_repeated_draws() -> None:
    reference = normal(400, 3, seed=0)
    metric = SlicedWasserstein(projections=32, bootstrap=60)
    u = directions(32, 3, 1)
    draws = [normal(200, 3, seed=10 + k) + 0.7 for k in range(120)]
    spread = torch.tensor([sliced_wasserstein(x, reference, u) for x in draws]).std().item()
    errors = [metric.measure(x, reference, seed=1).stderr for x in draws[:4]]
    # As for the Frechet distance: 30% is more than twice the error of either side, 20% three times the spread's own.
    assert sum(e for e in errors if e is not None) / 4 == pytest.approx(spread, rel=0.3)
    delta = [SlicedWasserstein(projections=32).measure(x, reference, seed=1).stderr for x in draws]
    assert sum(e for e in delta if e is not None) / 120 == pytest.approx(spread, rel=0.2)


# Standard errors, extrapolation and files of statistics -------------------------------------------------------------


def test_the_influence_of_a_point_is_the_derivative_by_its_weight() -> None:
    """The distance of a law with a little more weight on one point, against the delta method's influence."""
    x, y = normal(30, 3, seed=0) @ positive(3, 1), normal(400, 3, seed=2) + 0.5
    target = moments(y)

    def distance(weights: Tensor) -> float:
        mean = weights @ x
        centred = x - mean
        return by_eigenvalues(mean, centred.T @ (weights[:, None] * centred), *target, rank=3)

    even, step = torch.full((30,), 1 / 30, dtype=torch.float64), 1e-6
    slopes = []
    for i in range(30):
        towards = torch.nn.functional.one_hot(torch.tensor(i), 30) - even
        slopes.append((distance(even + step * towards) - distance(even - step * towards)) / (2 * step))
    # Central differences err by step^2 and by rounding, 1e-15 * 10 / step: 1e-8 of slopes of size 10.  The unbiased
    # covariance is 30 / 29 of the weighted one, which moves the influence by some 3%.
    error = math.sqrt(sum(slope**2 for slope in slopes) / (30 * 29))
    assert Frechet().measure(x, y).stderr == pytest.approx(error, rel=0.05)


def test_a_potential_is_the_derivative_of_the_squared_distance() -> None:
    # 12 and 31 have no common factor: no quantile of the one jumps at a level of the other.
    x, y = normal(12, 1, seed=0), normal(31, 1, seed=1) + 0.3
    slopes = potential(x, y).flatten()
    for i in range(12):
        for sign in (1, -1):
            # A copy of everything 500 times, and one point once more or less: a change of weight of 1 / 6000.
            counts = torch.full((12,), 500)
            counts[i] += sign
            moved = float(squared_distance(x.repeat_interleave(counts, 0), y))
            change = (moved - float(squared_distance(x, y))) * (6000 + sign) * sign
            # Second-order terms are of order 1 / 6000 of the slopes, which are of size 1 to 10.
            assert change == pytest.approx(float(slopes[i] - slopes.mean()), abs=5e-3)


def test_extrapolation_takes_the_bias_of_few_samples_away() -> None:
    """N(0, 1.1^2 I) against N(0, I) in 10 dimensions: the distance is 10 * 0.1^2 = 0.1, and 300 samples say 0.24."""
    d, n, draws = 10, 300, 60
    y = with_moments(500, torch.zeros(d, dtype=torch.float64), torch.eye(d, dtype=torch.float64), 1)
    both = [
        [Frechet(extrapolate=e).compare(1.1 * normal(n, d, seed=k), y).value for k in range(draws)]
        for e in (False, True)
    ]
    plain, infinite = torch.tensor(both[0]), torch.tensor(both[1])
    bias, left = float(plain.mean()) - 0.1, float(infinite.mean()) - 0.1
    error = float(infinite.std()) / math.sqrt(draws)
    # To first order in 1/n: tr(S) / n from the mean, and 2 * 1.1 * E tr(E^2) / 8 = 2.2 * d (d + 1) / (8 n) from the root of
    # S = 1.21 (I + E).  The next order is (d / n) of it.
    expected = 1.21 * d / n + 2.2 * d * (d + 1) / (8 * n)
    assert bias == pytest.approx(expected, abs=3 * error + expected * d / n) and bias > 8 * error
    assert abs(left) < 3 * error
    noted = Frechet(extrapolate=True).compare(normal(50, 2, seed=0), normal(50, 2, seed=1))
    assert noted.notes[-1].startswith("extrapolated to infinitely many samples; at 50 it is")


def test_statistics_in_a_file_take_the_place_of_the_reference(tmp_path: Path) -> None:
    x, y = normal(60, 4, seed=0), normal(80, 4, seed=1) + 1
    mean, covariance = (m.numpy() for m in moments(y))
    np.savez(tmp_path / "adm.npz", mu=mean, sigma=covariance, mu_s=mean, sigma_s=covariance)
    metric = Frechet(reference=str(tmp_path / "adm.npz"))
    by_file, by_points = metric.compare(x, x), Frechet().compare(x, y)
    # The root of the file's covariance is another than the points: equal to rounding.
    assert by_file[:2] == pytest.approx(by_points[:2], rel=1e-12) and by_file.notes == by_points.notes == ()
    assert not metric.measures_real_data
    np.savez(tmp_path / "part.npz", mu=mean)
    np.savez(tmp_path / "wrong.npz", mu=mean, sigma=covariance[:2])
    np.savez(tmp_path / "objects.npz", mu=np.array([{}]), sigma=covariance)
    for name, message in (
        ("none.npz", "no such file"), ("part.npz", "has no sigma; it has mu"), ("wrong.npz", "are not mean and covariance"),
        ("objects.npz", "holds Python objects, which are refused"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            Frechet(reference=str(tmp_path / name)).compare(x, x)
    with pytest.raises(UserError, match="statistics of 4 features, and pixels gives 3"):
        metric.compare(x[:, :3], x[:, :3])


# Precision and recall -----------------------------------------------------------------------------------------------


def test_precision_and_recall_by_hand() -> None:
    """On the line with k = 1: reference 0, 1, 3 has radii 1, 1, 2 and covers [-1, 5]; samples 2 and 10 have radii 8."""
    reference, samples = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[2.0], [10.0]])
    assert radii(reference, 1).tolist() == [1, 1, 2]
    precision, recall = Precision(k=1).compare(samples, reference), Recall(k=1).compare(samples, reference)
    assert precision.value == 0.5 and precision.stderr == pytest.approx(math.sqrt(0.25 / 2))
    assert recall.value == 1 and recall.stderr is None and "at least 0" in recall.notes[0]
    with pytest.raises(UserError, match="k = 3 neighbours need more than 3 reference points; got 3"):
        Precision().compare(samples, reference)


def test_precision_and_recall_tell_fidelity_from_variety() -> None:
    whole = torch.cat([normal(200, 2, seed=0), normal(200, 2, seed=1) + 20])
    half, wide = normal(200, 2, seed=2), torch.cat([whole + 0.01, normal(400, 2, seed=3) - 50])
    assert Precision().compare(half, whole).value > 0.9 and Recall().compare(half, whole).value < 0.55
    assert Precision().compare(wide, whole).value == pytest.approx(0.5, abs=0.05)
    assert Recall().compare(wide, whole).value > 0.9


def test_precision_and_recall_equal_those_of_prdc(capsys: pytest.CaptureFixture[str]) -> None:
    prdc = pytest.importorskip("prdc")
    x, y = normal(1500, 6, seed=0) * 1.3 + 0.4, normal(1100, 6, seed=1)
    other = prdc.compute_prdc(real_features=y.numpy(), fake_features=x.numpy(), nearest_k=3)
    # More than one block of rows; a share is a count, so that it is equal or off by 1 / 1500.
    assert Precision().compare(x, y).value == pytest.approx(other["precision"], abs=1e-12)
    assert Recall().compare(x, y).value == pytest.approx(other["recall"], abs=1e-12)
    assert 0.2 < other["precision"] < 0.99 and fraction_within(x, y, 3, "").value == pytest.approx(other["precision"])


# Parity with other libraries on the same features -------------------------------------------------------------------


def features(n: int, seed: int) -> Tensor:
    """Features as a network's: correlated, positive, heavy-tailed."""
    return (normal(n, 16, seed=seed) @ positive(16, 7)).relu() ** 1.5


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_numbers_equal_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore as TheirScore
    from torchmetrics.image.kid import KernelInceptionDistance

    class Same(torch.nn.Module):
        """Their metrics call a network on images; ours have features."""

        num_features = 16

        def forward(self, x: Tensor) -> Tensor:
            return x.double()

    x, y = features(700, 0) * 1.1, features(500, 1)
    fid = FrechetInceptionDistance(Same(), input_img_size=(1, 1, 1)).set_dtype(torch.float64)
    # All 500 in one subset, so that nothing is left to chance.
    kid = KernelInceptionDistance(Same(), subsets=1, subset_size=500)
    for metric in (fid, kid):
        metric.update(y, real=True)
        metric.update(x if metric is fid else x[:500], real=False)
    score = TheirScore(Same(), splits=1)
    score.update(x)
    assert Frechet().compare(x, y).value == pytest.approx(float(fid.compute()), rel=1e-4)
    assert KID().compare(x[:500], y).value == pytest.approx(float(kid.compute()[0]), rel=1e-4)
    assert KID(subsets=1, size=500).compare(x[:500], y).value == pytest.approx(float(kid.compute()[0]), rel=1e-4)
    assert InceptionScore().compare(x, y).value == pytest.approx(float(score.compute()[0]), rel=1e-4)


# The inception score and KID ----------------------------------------------------------------------------------------


def test_inception_score_of_known_laws() -> None:
    sure = 50 * torch.nn.functional.one_hot(torch.arange(60) % 6).double()
    # Certain predictions of all classes equally often: the number of classes. One class, or uniform predictions: 1.
    assert inception_score(sure) == (pytest.approx(6, rel=1e-12), pytest.approx(0, abs=1e-9))
    assert inception_score(sure[:1].expand(60, -1))[0] == pytest.approx(1, rel=1e-12)
    assert inception_score(torch.zeros(60, 6))[0] == pytest.approx(1, rel=1e-12)


def test_inception_score_is_taken_in_parts() -> None:
    logits = 3 * normal(25, 4, seed=0)
    parts = [inception_score(part)[0] for part in (logits[:10], logits[10:20], logits[20:])]
    assert InceptionScore(split=10).compare(logits, logits).value == pytest.approx(sum(parts) / 3, rel=1e-12)


def test_inception_score_error_matches_the_spread_of_repeated_draws() -> None:
    draws = [InceptionScore().compare(2 * normal(300, 5, seed=k), normal(2, 5, seed=0)) for k in range(200)]
    spread = torch.tensor([draw.value for draw in draws]).std().item()
    # The spread of 200 is known to 1 / sqrt(400) = 5%.
    assert sum(draw.stderr or 0 for draw in draws) / 200 == pytest.approx(spread, rel=0.15)


# Metrics whose standard error is that of both sets; the others take the reference as it is.
OF_BOTH_SETS = ("kid", "mmd")


@pytest.mark.parametrize("scale", [1.0, 1.3])
@pytest.mark.parametrize(
    "metric",
    [
        Frechet(), Frechet(extrapolate=True), KID(), KID(subsets=5, size=90), SlicedWasserstein(projections=32),
        Precision(),
    ],
    ids=["frechet", "extrapolated", "kid", "subsets", "sliced", "precision"],
)  # fmt: skip
def test_a_standard_error_is_the_spread_over_redraws(metric: FeatureMetric, scale: float) -> None:
    """For the reference's own law and for another, within 15 %: the delta method alone is up to sqrt 2 too large.

    200 pairs give the spread, and with it the ratio, to 5 % (1 / sqrt(400)); 15 % is three of these errors.
    """
    variance, squares = 0.0, 0.0
    for k in range(200):
        x, z = (scale * normal(120, 4, seed=3 * k + i) for i in (0, 1))
        y = normal(200, 4, seed=3 * k + 2)
        a = metric.compare(x, y, seed=k)
        # Another seed: subsets are another choice.
        b = metric.compare(z, normal(200, 4, seed=-k - 1) if metric.name in OF_BOTH_SETS else y, seed=k + 1)
        assert a.stderr is not None and b.stderr is not None
        squares += (a.value - b.value) ** 2 / 2
        variance += (a.stderr**2 + b.stderr**2) / 2
    assert math.sqrt(variance / squares) == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize(
    ("covariance", "message"),
    [([[1.0, 0.5], [0.1, 1.0]], "not symmetric"), ([[1.0, 2.0], [2.0, 1.0]], "negative eigenvalue -1")],
)
def test_statistics_whose_covariance_is_none_are_refused(
    tmp_path: Path, covariance: list[list[float]], message: str
) -> None:
    np.savez(tmp_path / "given.npz", mu=np.zeros(2), sigma=np.array(covariance))
    with pytest.raises(UserError, match=message):
        Frechet(reference=str(tmp_path / "given.npz")).compare(normal(9, 2, seed=0), normal(9, 2, seed=0))


def test_kid_in_subsets_agrees_with_all_pairs() -> None:
    x, y = features(400, 0) * 1.2, features(400, 1)
    whole, parts = KID().compare(x, y), KID(subsets=60, size=100).compare(x, y)
    assert whole.stderr is not None and parts.stderr is not None
    # The mean over subsets estimates the same; its own noise is stderr, as the subsets are nearly independent.
    assert parts.value == pytest.approx(whole.value, abs=4 * parts.stderr)
    assert parts.notes[0].startswith("standard deviation over 60 subsets of 100: 9.7")
    with pytest.raises(UserError, match="subsets of 1000 need as many samples and reference points; got 400 and 400"):
        KID(subsets=2).compare(x, y)


def test_spatial_metrics_refuse_an_extractor_without_places() -> None:
    with pytest.raises(UserError, match="sfid reads spatial; features 'pixels' give features"):
        SFID(features=Pixels()).measure(images(20, 0), images(20, 1))
    x, y = normal(50, 3, seed=0), normal(50, 3, seed=1)
    assert SFID().compare(x, y).value == Frechet().compare(x, y).value


def test_numbers_equal_those_that_torch_fidelity_gave() -> None:
    """torch-fidelity 0.4.0 on these features (its metric functions alone, for it needs torchvision), once, float32."""
    theirs = {
        "frechet": 2.2335952113755013, "inception-score": 5.516656047313674, "kid": 1.7046890258789062,
        "precision": 0.854285717010498, "recall": 0.921999990940094,
    }  # fmt: skip
    x, y = features(700, 0) * 1.1, features(500, 1)
    for name, value in theirs.items():
        first = x[:500] if name == "kid" else x
        assert metrics.create(name).compare(first, y).value == pytest.approx(value, rel=1e-4), name
