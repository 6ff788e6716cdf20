"""The Frechet distance between Gaussians fitted to two sets; FID is this with Inception features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from sitkit.metrics.metric import FeatureMetric, Measurement, bootstrap_error, require_resamples, split
from sitkit.registry import metrics

if TYPE_CHECKING:
    from torch import Tensor


@final
@metrics.register("frechet")
@dataclass(frozen=True)
class Frechet(FeatureMetric):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^{1/2}) of the fitted Gaussians; FID with Inception features.

    In squared feature units.  Biased upwards by about 1/n: compare equal n only, and read it beside `halves`.
    bootstrap: resamples of the samples (the reference stays fixed) for the standard error; 0: none.
    Source: Dowson and Landau 1982; Heusel et al. 2017, arXiv 1706.08500, section "Frechet Inception Distance".
    """

    unit: ClassVar[str] = "squared feature units"
    bootstrap: int = 0

    def __post_init__(self) -> None:
        require_resamples(self.bootstrap)

    def compare(self, samples: Tensor, reference: Tensor, *, seed: int = 0) -> Measurement:
        fit, target = moments(samples), moments(reference)
        notes = (rank_note("samples", len(samples), fit[1]), rank_note("reference", len(reference), target[1]))
        return Measurement(
            frechet_distance(*fit, *target),
            bootstrap_error(lambda x: frechet_distance(*moments(x), *target), samples, self.bootstrap, seed),
            tuple(filter(None, notes)),
        )


def frechet(samples: Tensor, reference: Tensor) -> float:
    """The Frechet distance between sets of features (n, d) and (m, d), in float64."""
    return frechet_distance(*moments(samples), *moments(reference))


def halves(reference: Tensor, seed: int) -> float:
    """`frechet` between two random halves of the features (m, d)."""
    return frechet(*split(reference, seed))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and unbiased covariance (d, d) of x (n, d), in float64."""
    x = x.double()
    mean = x.mean(0)
    centred = x - mean
    return mean, centred.T @ centred / (len(x) - 1)


def frechet_distance(mu1: Tensor, s1: Tensor, mu2: Tensor, s2: Tensor) -> float:
    """|mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 sum sqrt(eig(S1^{1/2} S2 S1^{1/2})).  mu (d,), S (d, d), rank as it may be.

    With S1 = A A^T the product's non-zero eigenvalues are those of A^T S2 A, which has only rank(S1) rows and stays
    symmetric: no complex root, no eps added to a singular covariance.
    """
    import torch

    mu1, s1, mu2, s2 = (m.double() for m in (mu1, s1, mu2, s2))
    values, vectors = torch.linalg.eigh(s1)
    kept = values > rounding(len(s1), values.max())
    a = vectors[:, kept] * values[kept].sqrt()
    product = torch.linalg.eigvalsh(a.T @ s2 @ a)
    # The root of rounding noise, 1e-16, is 1e-8: noise must go before the root is taken.  Its size follows the factors,
    # not the product, which is nothing but noise where the two ranges are orthogonal.
    noise = rounding(len(s1), values.max() * torch.linalg.matrix_norm(s2, 2))
    root = product[product > noise].sqrt().sum()
    distance = (mu1 - mu2).square().sum() + s1.trace() + s2.trace() - 2 * root
    return max(float(distance), 0.0)


def rounding(d: int, norm: Tensor) -> Tensor:
    """The size below which an eigenvalue of a (d, d) matrix of this norm is rounding: d * eps * norm."""
    import torch

    return d * torch.finfo(norm.dtype).eps * norm


def rank_note(what: str, n: int, covariance: Tensor) -> str:
    """A caveat where the covariance (d, d) of n points is singular, else nothing."""
    import torch

    d = len(covariance)
    values = torch.linalg.eigvalsh(covariance)
    rank = int((values > rounding(d, values.max())).sum())
    if rank == d:
        return ""
    cause = f": {n} points in {d} dimensions, {d + 1} are needed" if n < d + 1 else ""
    return f"the covariance of the {what} has rank {rank} of {d}{cause}"
