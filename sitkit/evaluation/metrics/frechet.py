"""The Frechet distance between Gaussians fitted to two sets; FID is this with Inception features."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, final

from sitkit.evaluation.extractors.extractor import Extractor
from sitkit.evaluation.extractors.pretrained import Inception
from sitkit.evaluation.metrics.metric import FeatureMetric, Measurement, bootstrap_error, generator, require_resamples
from sitkit.registry import metrics
from sitkit.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# Rows of a product with one row per point that are in memory at once.
BLOCK_ROWS = 4096
# The number of subset sizes for the extrapolation, from a tenth of the samples to all samples.
SIZES = 15
# Relative rounding of the entries of a covariance in a file: some files are of float32.
ENTRY_ROUNDING = 1e-6


@dataclass(frozen=True)
class GaussianDistance(FeatureMetric):
    """Base class: the Frechet distance of one output of an extractor."""

    unit: ClassVar[str] = "squared feature units"
    bootstrap: int = 0
    extrapolate: bool = False
    reference: str | None = None

    def __post_init__(self) -> None:
        require_resamples(self.bootstrap)

    def places(self) -> tuple[str, ...]:
        return ("reference",)

    @property
    def measures_real_data(self) -> bool:
        """Whether there are real examples: a file of statistics has none."""
        return self.reference is None

    @property
    def reads_data(self) -> bool:
        """Whether the data set is needed: a file of statistics replaces it."""
        return self.reference is None

    def compare(self, samples: Tensor, reference: Tensor, *, seed: int = 0) -> Measurement:
        import torch

        n, d = samples.shape
        projected = self._project(samples, reference)
        _, roots, axes = torch.linalg.svd(projected.cross(), full_matrices=False)
        kept = roots > rounding(d, (projected.total_variance() * projected.trace).sqrt())
        value = projected.distance(roots)
        if self.bootstrap:
            spread = bootstrap_error(
                lambda rows: projected.take(rows).distance(), torch.arange(n), self.bootstrap, seed
            )
        else:
            spread = frechet_delta_error(projected, roots[kept], axes[kept])
        # The delta method counts the part of second order twice, and resampling three times.
        counted = 3 if self.bootstrap else 2
        second = min(second_order_variance(roots[kept], n), spread**2 / counted)
        first = spread**2 - counted * second
        sizes = {"samples": n} | ({"reference": len(reference)} if self.reference is None else {})
        notes = rank_notes(sizes, d, int(kept.sum()))
        if self.extrapolate:
            notes.append(f"extrapolated to infinitely many samples; at {n} it is {value:.6g}")
            value, *factors = extrapolated(projected, value, seed)
            first, second = first * factors[0], second * factors[1]
        return Measurement(value, math.sqrt(first + second), tuple(notes))

    def value(self, samples: Tensor, reference: Tensor, *, seed: int = 0) -> float:
        projected = self._project(samples, reference)
        value = projected.distance()
        return extrapolated(projected, value, seed).value if self.extrapolate else value

    def _project(self, samples: Tensor, reference: Tensor) -> ProjectedSamples:
        return ProjectedSamples.by(
            samples, fit_gaussian(reference) if self.reference is None else self._read(samples.shape[1])
        )

    def _read(self, dimension: int) -> FittedGaussian:
        mean, covariance = read_statistics(Path(self.reference or ""), self.reads)
        if len(mean) != dimension:
            raise UserError(
                f"{self.reference} has statistics of {len(mean)} {self.reads}, and {self.features.name} gives {dimension}: "
                "the statistics are of another extractor."
            )
        return FittedGaussian(mean, root(covariance))


@final
@metrics.register("frechet")
@dataclass(frozen=True)
class Frechet(GaussianDistance):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^{1/2}) of the fitted Gaussians; FID with Inception features.

    The unit is squared feature units. The bias is positive and about 1/n: compare equal n only, and compare with `real`.

    Args:
        bootstrap: resamples of the samples for the standard error, with the reference fixed; 0: the delta method, at the
            cost of one more product. Either is less the part of second order that it counts too often.
        extrapolate: use the intercept of a line through the distances of subsets against 1/n.
        reference: an .npz with `mu` and `sigma` (as published by ADM) in place of the data.

    Source: Dowson and Landau 1982; Heusel et al. 2017, arXiv 1706.08500, section "Frechet Inception Distance"; Chong and
    Forsyth 2020, arXiv 1911.07023 (extrapolation).
    """


@final
@metrics.register("sfid")
@dataclass(frozen=True)
class SFID(GaussianDistance):
    """The Frechet distance of spatial features, which depend on positions in the image; fields as in `frechet`.

    Args:
        reference: an .npz with `mu_s` and `sigma_s`.

    Source: Nash et al. 2021, arXiv 2103.03841, section 4.
    """

    reads: ClassVar[str] = "spatial"
    features: Extractor = field(default_factory=Inception)


def frechet(samples: Tensor, reference: Tensor) -> float:
    """Return the Frechet distance between sets of features (n, d) and (m, d), in float64."""
    return ProjectedSamples.by(samples, fit_gaussian(reference)).distance()


class FittedGaussian(NamedTuple):
    """A mean (d,), and any number of rows (k, d) such that rows^T rows is the covariance."""

    mean: Tensor
    rows: Tensor


def fit_gaussian(x: Tensor) -> FittedGaussian:
    """Return the Gaussian with the mean and the unbiased covariance of x (n, d), in float64."""
    x = x.double()
    mean = x.mean(0)
    return FittedGaussian(mean, (x - mean).div_(math.sqrt(len(x) - 1)))


def root(covariance: Tensor) -> Tensor:
    """Return rows (rank, d) such that rows^T rows is the covariance (d, d), of any rank.

    Rounding noise of 1e-16 has the root 1e-8, so noise is removed before the root.
    """
    import torch

    values, vectors = torch.linalg.eigh(covariance)
    kept = values > rounding(len(values), values.max())
    return (vectors[:, kept] * values[kept].sqrt()).T


def fewer(rows: Tensor) -> Tensor:
    """Return at most as many rows as columns, with the same rows^T rows."""
    import torch

    return rows if len(rows) <= rows.shape[1] else torch.linalg.qr(rows, mode="r").R


class ProjectedSamples(NamedTuple):
    """Samples with the products that give their distance, and the distance of any subset, to one Gaussian.

    S1 and S2 are the covariances. tr (S1 S2)^{1/2} is the sum of the singular values of F1 F2^T for any factors with
    S = F^T F. F1 can be the centred samples and F2 the centred reference. For fewer points than dimensions the decomposed
    matrix then has the size of the sets, and no covariance is computed. No value is squared before a root, so rounding
    needs no cut.

    Attributes:
        x: (n, d).
        products: (n, k) with k <= min(n, d) and products products^T = x S2 x^T, for x less a constant.
        mean, trace: mean (d,) of the Gaussian, and the trace of its covariance.
    """

    x: Tensor
    products: Tensor
    mean: Tensor
    trace: Tensor

    @classmethod
    def by(cls, x: Tensor, target: FittedGaussian) -> ProjectedSamples:
        """Return the products of samples x (n, d) with a Gaussian, in float64."""
        x = x.double()
        # Reducing m rows costs m d^2 and saves n d (m - d) of the product: an advantage from n = d.
        rows = target.rows if len(x) < x.shape[1] else fewer(target.rows)
        return cls(x, fewer(rows @ (x - x.mean(0)).T).T, target.mean, target.rows.norm() ** 2)

    def take(self, rows: Tensor) -> ProjectedSamples:
        """Return the samples with these indices, which may repeat."""
        return self._replace(x=self.x[rows], products=self.products[rows])

    def total_variance(self) -> Tensor:
        """Return tr S1, unbiased."""
        return self.x.var(0).sum()

    def cross(self) -> Tensor:
        """Return a matrix (min(n, k), k) with the singular values of F1 F2^T."""
        return fewer((self.products - self.products.mean(0)) / math.sqrt(len(self.x) - 1))

    def distance(self, roots: Tensor | None = None) -> float:
        """Return |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^{1/2}; `roots` are the singular values of `cross` if known."""
        import torch

        roots = torch.linalg.svdvals(self.cross()) if roots is None else roots
        gap = (self.x.mean(0) - self.mean).square().sum()
        return max(float(gap + self.total_variance() + self.trace - 2 * roots.sum()), 0.0)


def frechet_delta_error(samples: ProjectedSamples, roots: Tensor, axes: Tensor) -> float:
    """Return the standard error of the distance, from the influence of each sample on mean and covariance.

    influence = 2 (mu1 - mu2).c + |c|^2 - c^T T c - tr S1 + tr (S1 S2)^{1/2}, c = x - mu1: the derivative by mu1 is
    2 (mu1 - mu2) and by S1 it is I - T, with T the optimal map between the covariances.
    roots (r,) and axes (r, k) are the singular values of `cross` above rounding and their right singular vectors. With
    them c^T T c = sum_k (p.axis_k)^2 / root_k for the product p of c.
    It does not include the bias.
    """
    n, mean, middle = len(samples.x), samples.x.mean(0), samples.products.mean(0)
    slope, level = 2 * (mean - samples.mean), samples.total_variance() - roots.sum()
    scaled = (axes / roots.sqrt()[:, None]).T
    total = 0.0
    for x, products in zip(samples.x.split(BLOCK_ROWS), samples.products.split(BLOCK_ROWS), strict=True):
        c = x - mean
        influence = c @ slope + c.square().sum(1) - ((products - middle) @ scaled).square().sum(1) - level
        total += float(influence.square().sum())
    return math.sqrt(total / (n * (n - 1)))


def second_order_variance(roots: Tensor, n: int) -> float:
    """Return the part of the distance's variance that falls as 1/n^2: most of it for samples that are nearly the reference.

    To second order the distance is |m|^2 + sum_ij K_ij^2 / (2 r_i r_j (r_i + r_j)), with the roots r, the error m of the
    mean and the error K of S2^{1/2} S1 S2^{1/2} in its eigenvectors. The moments of m and K are those of Gaussian samples.
    """
    pairs = (roots[:, None] * roots / (roots[:, None] + roots)).triu()
    return 2 / n**2 * float(roots.square().sum() + pairs.square().sum())


class ExtrapolatedDistance(NamedTuple):
    """The distance for infinitely many samples; `first`, `second`: factors of the parts of the variance of all samples."""

    value: float
    first: float
    second: float


def extrapolated(samples: ProjectedSamples, whole: float, seed: int) -> ExtrapolatedDistance:
    """Return the distance for infinitely many samples: the limit at 0 of a line against 1/n, the order of the bias.

    The line is a least-squares fit to the distances of random subsets of SIZES sizes from n / 10 to n. `whole` is the
    distance of all samples. The intercept is a weighted sum of the distances. To first order a distance is a mean over
    its points, and to second order a mean over its pairs of points, so the variances of both follow from the numbers of
    points that two subsets share.
    """
    import torch

    n = len(samples.x)
    rng = generator(seed)
    sizes = torch.linspace(max(2, n // 10), n, SIZES, dtype=torch.float64).round()
    subsets = [torch.randperm(n, generator=rng)[:size] for size in sizes[:-1].long().tolist()]
    y = torch.tensor([*(samples.take(rows).distance() for rows in subsets), whole], dtype=torch.float64)
    inverse = 1 / sizes
    centred = inverse - inverse.mean()
    weights = 1 / SIZES - inverse.mean() * centred / centred.square().sum()
    members = torch.ones(SIZES, n, dtype=torch.float64)
    for row, rows in zip(members, subsets, strict=False):
        row.fill_(0)[rows] = 1
    common, points, pairs = members @ members.T, weights / sizes, weights / sizes.square()
    first, second = n * points @ common @ points, n**2 * pairs @ common.square() @ pairs
    return ExtrapolatedDistance(float(weights @ y), float(first), float(second))


def read_statistics(path: Path, reads: str) -> tuple[Tensor, Tensor]:
    """Return mean and covariance from an .npz of ADM's evaluator: mu, sigma; mu_s, sigma_s for spatial features.

    Raises UserError if the file is missing or has other arrays. Pickled arrays are refused.
    """
    import numpy as np
    import torch

    from sitkit.runtime import archives

    keys = ("mu_s", "sigma_s") if reads == "spatial" else ("mu", "sigma")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file of reference statistics.")
    with archives.opened(path) as file:
        missing = [key for key in keys if key not in file.files]
        if missing:
            raise UserError(f"{path} has no {' and no '.join(missing)}; it has {', '.join(file.files) or 'nothing'}.")
        mean, covariance = (torch.from_numpy(np.asarray(file[key], np.float64)) for key in keys)
    d = len(mean) if mean.ndim == 1 else -1
    if covariance.shape != (d, d) or not bool(mean.isfinite().all() and covariance.isfinite().all()):
        shapes = f"{keys[0]} {tuple(mean.shape)} and {keys[1]} {tuple(covariance.shape)}"
        raise UserError(f"{path}: {shapes} are not mean and covariance of a Gaussian.")
    _require_covariance(covariance, f"{path}: {keys[1]}")
    return mean, covariance


def _require_covariance(covariance: Tensor, name: str) -> None:
    """Raise UserError for a matrix that is not symmetric, or has a negative eigenvalue beyond the rounding of float32."""
    import torch

    tolerance = ENTRY_ROUNDING * float(covariance.abs().max())
    skew = float((covariance - covariance.T).abs().max())
    if skew > tolerance:
        raise UserError(f"{name} is not symmetric (entries differ by up to {skew:.3g}), so it is no covariance.")
    least = float(torch.linalg.eigvalsh(covariance)[0])
    if least < -len(covariance) * tolerance:
        raise UserError(f"{name} has the negative eigenvalue {least:.3g}, so it is no covariance.")


def rounding(d: int, norm: Tensor) -> Tensor:
    """Return d * eps * norm: smaller eigenvalues and singular values of products over d terms are rounding."""
    import torch

    return d * torch.finfo(norm.dtype).eps * norm


def rank_notes(sizes: Mapping[str, int], d: int, rank: int) -> list[str]:
    """Return caveats for a singular covariance: sets of these sizes in d dimensions, with a product of this rank."""
    few = [
        f"the covariance of the {what} has rank at most {n - 1} of {d}: {n} points in {d} dimensions, {d + 1} are needed"
        for what, n in sizes.items()
        if n <= d
    ]
    if few or rank == d:
        return few
    return [f"the covariances of samples and reference have rank {rank} of {d} together"]
