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

# Rows held at once, as double, where a product has as many rows as there are points.
BOOTSTRAP_ROWS = 4096
# The sizes at which the distance is measured to extrapolate it, from a tenth of the samples to all of them.
SIZES = 15


@dataclass(frozen=True)
class GaussianDistance(FeatureMetric):
    """The Frechet distance of one kind of an extractor's outputs."""

    unit: ClassVar[str] = "squared feature units"
    bootstrap: int = 0
    extrapolate: bool = False
    reference: str | None = None

    def __post_init__(self) -> None:
        require_resamples(self.bootstrap)

    @property
    def has_halves(self) -> bool:
        """A file of statistics cannot be halved."""
        return self.reference is None

    @property
    def reads_data(self) -> bool:
        """A file of statistics stands in for them."""
        return self.reference is None

    def compare(self, samples: Tensor, reference: Tensor, *, seed: int = 0) -> Measurement:
        import torch

        n, d = samples.shape
        seen = self._seen(samples, reference)
        _, roots, axes = torch.linalg.svd(seen.cross(), full_matrices=False)
        kept = roots > rounding(d, (seen.spread() * seen.trace).sqrt())
        value = seen.distance(roots)
        if self.bootstrap:
            error = bootstrap_error(lambda rows: seen.take(rows).distance(), torch.arange(n), self.bootstrap, seed)
        else:
            error = frechet_delta_error(seen, roots[kept], axes[kept])
        sizes = {"samples": n} | ({"reference": len(reference)} if self.reference is None else {})
        notes = rank_notes(sizes, d, int(kept.sum()))
        if self.extrapolate:
            notes.append(f"extrapolated to infinitely many samples; at {n} it is {value:.6g}")
            value = extrapolated(seen, value, seed)
        return Measurement(value, error, tuple(notes))

    def value(self, samples: Tensor, reference: Tensor, *, seed: int = 0) -> float:
        seen = self._seen(samples, reference)
        value = seen.distance()
        return extrapolated(seen, value, seed) if self.extrapolate else value

    def _seen(self, samples: Tensor, reference: Tensor) -> ProjectedSamples:
        return ProjectedSamples.by(
            samples, fit_gaussian(reference) if self.reference is None else self._read(samples.shape[1])
        )

    def _read(self, dimension: int) -> FittedGaussian:
        mean, covariance = read_statistics(Path(self.reference or ""), self.reads)
        if len(mean) != dimension:
            raise UserError(
                f"{self.reference} has statistics of {len(mean)} {self.reads} and {self.features.name} gives {dimension}: "
                "they are of another extractor."
            )
        return FittedGaussian(mean, root(covariance))


@final
@metrics.register("frechet")
@dataclass(frozen=True)
class Frechet(GaussianDistance):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^{1/2}) of the fitted Gaussians; FID with Inception features.

    In squared feature units.  Biased upwards by about 1/n: compare equal n only, and read it beside `halves`.
    bootstrap: resamples of the samples (the reference stays fixed) for the standard error; 0: by the delta method, at the
    cost of one more product.  extrapolate: the intercept of a line through the distances of subsets against 1/n.
    reference: an .npz with `mu` and `sigma` (as ADM publishes them) in place of the data.
    Source: Dowson and Landau 1982; Heusel et al. 2017, arXiv 1706.08500, section "Frechet Inception Distance"; Chong and
    Forsyth 2020, arXiv 1911.07023 (extrapolation).
    """


@final
@metrics.register("sfid")
@dataclass(frozen=True)
class SFID(GaussianDistance):
    """The Frechet distance of spatial features, which sees where things are; fields as `frechet`'s.

    reference: an .npz with `mu_s` and `sigma_s`.  Source: Nash et al. 2021, arXiv 2103.03841, section 4.
    """

    reads: ClassVar[str] = "spatial"
    features: Extractor = field(default_factory=Inception)


def frechet(samples: Tensor, reference: Tensor) -> float:
    """The Frechet distance between sets of features (n, d) and (m, d), in float64."""
    return ProjectedSamples.by(samples, fit_gaussian(reference)).distance()


class FittedGaussian(NamedTuple):
    """A mean (d,), and rows (k, d) of any number whose rows^T rows is the covariance."""

    mean: Tensor
    rows: Tensor


def fit_gaussian(x: Tensor) -> FittedGaussian:
    """The Gaussian with the mean and the unbiased covariance of x (n, d), in float64."""
    x = x.double()
    mean = x.mean(0)
    return FittedGaussian(mean, (x - mean).div_(math.sqrt(len(x) - 1)))


def root(covariance: Tensor) -> Tensor:
    """Rows (rank, d) whose rows^T rows is the covariance (d, d), of any rank.

    The root of rounding noise, 1e-16, is 1e-8: noise must go before the root is taken.
    """
    import torch

    values, vectors = torch.linalg.eigh(covariance)
    kept = values > rounding(len(values), values.max())
    return (vectors[:, kept] * values[kept].sqrt()).T


def fewer(rows: Tensor) -> Tensor:
    """As few rows as there are columns, with the same rows^T rows."""
    import torch

    return rows if len(rows) <= rows.shape[1] else torch.linalg.qr(rows, mode="r").R


class ProjectedSamples(NamedTuple):
    """Samples and all that their distance to one Gaussian, or any subset's, takes of it; S1, S2 are the covariances.

    tr (S1 S2)^{1/2} is the sum of the singular values of F1 F2^T, S = F^T F.  F1 may be the samples less their mean and
    F2 the reference's, so that what is decomposed has as many rows and columns as there are points, where these are
    fewer than dimensions, and neither covariance is made.  Nothing is squared whose root is taken: no rounding to cut.

    x: (n, d).  products: (n, k), k <= n, d, with products products^T = x S2 x^T, x less a constant.
    mean, trace: mean (d,) and trace of the covariance of the Gaussian.
    """

    x: Tensor
    products: Tensor
    mean: Tensor
    trace: Tensor

    @classmethod
    def by(cls, x: Tensor, target: FittedGaussian) -> ProjectedSamples:
        """Samples x (n, d) beside the Gaussian, in float64."""
        x = x.double()
        # m rows cost m d^2 to make fewer and save n d (m - d) of the product: worth it from n = d.
        rows = target.rows if len(x) < x.shape[1] else fewer(target.rows)
        return cls(x, fewer(rows @ (x - x.mean(0)).T).T, target.mean, target.rows.norm() ** 2)

    def take(self, rows: Tensor) -> ProjectedSamples:
        """The samples of these indices (any number, repeated or not)."""
        return self._replace(x=self.x[rows], products=self.products[rows])

    def spread(self) -> Tensor:
        """tr S1, unbiased."""
        return self.x.var(0).sum()

    def cross(self) -> Tensor:
        """(min(n, k), k), with the singular values of F1 F2^T."""
        return fewer((self.products - self.products.mean(0)) / math.sqrt(len(self.x) - 1))

    def distance(self, roots: Tensor | None = None) -> float:
        """|mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^{1/2}.  roots: the singular values of `cross`, where they are known."""
        import torch

        roots = torch.linalg.svdvals(self.cross()) if roots is None else roots
        gap = (self.x.mean(0) - self.mean).square().sum()
        return max(float(gap + self.spread() + self.trace - 2 * roots.sum()), 0.0)


def frechet_delta_error(seen: ProjectedSamples, roots: Tensor, axes: Tensor) -> float:
    """Standard error of the distance over the samples, from each one's influence on their mean and covariance.

    influence = 2 (mu1 - mu2).c + |c|^2 - c^T T c - tr S1 + tr (S1 S2)^{1/2}, c = x - mu1: the derivative by mu1 is
    2 (mu1 - mu2) and by S1 it is I - T, with T the optimal map between the covariances.
    roots (r,), axes (r, k): the singular values of `cross` that are not rounding, and the right vectors to them, with
    which c^T T c = sum_k (p.axis_k)^2 / root_k, p the product that belongs to c.
    The bootstrap's limit for many resamples, to first order in 1/sqrt(n); it knows nothing of the bias.
    """
    n, mean, middle = len(seen.x), seen.x.mean(0), seen.products.mean(0)
    slope, level = 2 * (mean - seen.mean), seen.spread() - roots.sum()
    scaled = (axes / roots.sqrt()[:, None]).T
    total = 0.0
    for x, products in zip(seen.x.split(BOOTSTRAP_ROWS), seen.products.split(BOOTSTRAP_ROWS), strict=True):
        c = x - mean
        influence = c @ slope + c.square().sum(1) - ((products - middle) @ scaled).square().sum(1) - level
        total += float(influence.square().sum())
    return math.sqrt(total / (n * (n - 1)))


def extrapolated(seen: ProjectedSamples, whole: float, seed: int) -> float:
    """The distance at infinitely many samples: the bias is of order 1/n, so a line against 1/n shows its limit at 0.

    The distance of random subsets of SIZES sizes from n / 10 to n, least squares.  whole: that of all.
    """
    import torch

    n = len(seen.x)
    rng = generator(seed)
    sizes = torch.linspace(max(2, n // 10), n, SIZES, dtype=torch.float64).round().long().tolist()
    values = [seen.take(torch.randperm(n, generator=rng)[:size]).distance() for size in sizes[:-1]]
    inverse = 1 / torch.tensor(sizes, dtype=torch.float64)
    y = torch.tensor([*values, whole], dtype=torch.float64)
    centred = inverse - inverse.mean()
    slope = (centred @ y) / centred.square().sum()
    return float(y.mean() - slope * inverse.mean())


def read_statistics(path: Path, reads: str) -> tuple[Tensor, Tensor]:
    """Mean and covariance in an .npz as ADM's evaluator publishes them: mu, sigma; mu_s, sigma_s of spatial features.

    Raises UserError if the file is missing or has other arrays.  Nothing is unpickled.
    """
    import numpy as np
    import torch

    keys = ("mu_s", "sigma_s") if reads == "spatial" else ("mu", "sigma")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file of reference statistics.")
    try:
        with np.load(path, allow_pickle=False) as file:
            lacks = [key for key in keys if key not in file.files]
            if lacks:
                raise UserError(f"{path} has no {' and no '.join(lacks)}; it has {', '.join(file.files) or 'nothing'}.")
            mean, covariance = (torch.from_numpy(np.asarray(file[key], np.float64)) for key in keys)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} is not an .npz of plain arrays: {str(error).splitlines()[0]}") from None
    d = len(mean) if mean.ndim == 1 else -1
    if covariance.shape != (d, d) or not bool(mean.isfinite().all() and covariance.isfinite().all()):
        raise UserError(
            f"{path}: {keys[0]} {tuple(mean.shape)} and {keys[1]} {tuple(covariance.shape)} are no Gaussian."
        )
    return mean, covariance


def rounding(d: int, norm: Tensor) -> Tensor:
    """The size below which an eigen- or singular value of products over d terms of this norm is rounding: d * eps * norm."""
    import torch

    return d * torch.finfo(norm.dtype).eps * norm


def rank_notes(sizes: Mapping[str, int], d: int, rank: int) -> list[str]:
    """Caveats where a covariance is singular: of sets of these sizes in d dimensions, whose product has this rank."""
    few = [
        f"the covariance of the {what} has rank at most {n - 1} of {d}: {n} points in {d} dimensions, {d + 1} are needed"
        for what, n in sizes.items()
        if n <= d
    ]
    if few or rank == d:
        return few
    return [f"the covariances of samples and reference have rank {rank} of {d} together"]
