"""The Frechet distance between Gaussians fitted to two sets; FID is this with Inception features."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, final

from sitkit.metrics.features import Extractor
from sitkit.metrics.metric import FeatureMetric, Measurement, bootstrap_error, generator, require_resamples, split
from sitkit.metrics.networks import Inception
from sitkit.registry import UserError, metrics

if TYPE_CHECKING:
    from torch import Tensor

# Rows held at once, as double, where a product has as many rows as there are points.
ROWS = 4096
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

    def compare(self, samples: Tensor, reference: Tensor, *, seed: int = 0) -> Measurement:
        fit = moments(samples)
        target = moments(reference) if self.reference is None else self._read(samples.shape[1])
        transport = optimal(*fit, *target)
        notes = [rank_note("samples", len(samples), fit[1]), rank_note("reference", len(reference), target[1])]
        if self.bootstrap:
            error = bootstrap_error(lambda x: frechet_distance(*moments(x), *target), samples, self.bootstrap, seed)
        else:
            error = delta_error(samples, *fit, target[0], transport)
        value = transport.distance
        if self.extrapolate:
            notes.append(f"extrapolated to infinitely many samples; at {len(samples)} it is {value:.6g}")
            value = extrapolated(samples, target, value, seed)
        return Measurement(value, error, tuple(filter(None, notes)))

    def _read(self, dimension: int) -> tuple[Tensor, Tensor]:
        mean, covariance = read_statistics(Path(self.reference or ""), self.reads)
        if len(mean) != dimension:
            raise UserError(
                f"{self.reference} has statistics of {len(mean)} {self.reads} and {self.features.name} gives {dimension}: "
                "they are of another extractor."
            )
        return mean, covariance


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
    """|mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 sum sqrt(eig(S1^{1/2} S2 S1^{1/2})).  mu (d,), S (d, d), rank as it may be."""
    return optimal(mu1, s1, mu2, s2).distance


class Transport(NamedTuple):
    """The distance, and the optimal map from the first Gaussian to the second in the first's white coordinates.

    white: (d, r), z = white^T (x - mu1) has unit covariance.  root: (r, r), (A^T S2 A)^{1/2} with S1 = A A^T.
    """

    distance: float
    white: Tensor
    root: Tensor


def optimal(mu1: Tensor, s1: Tensor, mu2: Tensor, s2: Tensor) -> Transport:
    """The optimal transport between N(mu1, S1) and N(mu2, S2).

    With S1 = A A^T the product's non-zero eigenvalues are those of A^T S2 A, which has only rank(S1) rows and stays
    symmetric: no complex root, no eps added to a singular covariance.
    """
    import torch

    mu1, s1, mu2, s2 = (m.double() for m in (mu1, s1, mu2, s2))
    values, vectors = torch.linalg.eigh(s1)
    kept = values > rounding(len(s1), values.max())
    scale = values[kept].sqrt()
    a = vectors[:, kept] * scale
    product, turned = torch.linalg.eigh(a.T @ s2 @ a)
    # The root of rounding noise, 1e-16, is 1e-8: noise must go before the root is taken.  Its size follows the factors,
    # not the product, which is nothing but noise where the two ranges are orthogonal.
    noise = rounding(len(s1), values.max() * torch.linalg.eigvalsh(s2).max())
    roots = torch.where(product > noise, product, 0).sqrt()
    distance = (mu1 - mu2).square().sum() + s1.trace() + s2.trace() - 2 * roots.sum()
    return Transport(max(float(distance), 0.0), vectors[:, kept] / scale, (turned * roots) @ turned.T)


def delta_error(x: Tensor, mean: Tensor, covariance: Tensor, target: Tensor, transport: Transport) -> float:
    """Standard error of the distance over the samples x (n, d), from each point's influence on mean and covariance.

    influence(x) = 2 (mu1 - mu2).c + |c|^2 - z^T R z - tr(S1) + tr(R), c = x - mu1, z = white^T c, R = root: the
    derivative by mu1 is 2 (mu1 - mu2) and by S1 it is I - T, with T the optimal map between the covariances.
    The bootstrap's limit for many resamples, to first order in 1/sqrt(n); it knows nothing of the bias.
    """
    total = x.new_zeros((), dtype=mean.dtype)
    slope, level = 2 * (mean - target), covariance.trace() - transport.root.trace()
    for part in x.split(ROWS):
        c = part.double() - mean
        z = c @ transport.white
        total += (c @ slope + c.square().sum(1) - ((z @ transport.root) * z).sum(1) - level).square().sum()
    return math.sqrt(float(total) / (len(x) * (len(x) - 1)))


def extrapolated(samples: Tensor, target: tuple[Tensor, Tensor], whole: float, seed: int) -> float:
    """The distance at infinitely many samples: the bias is of order 1/n, so a line against 1/n shows its limit at 0.

    samples (n, d); the distance of random subsets of SIZES sizes from n / 10 to n, least squares.  whole: that of all.
    """
    import torch

    n = len(samples)
    rng = generator(seed)
    sizes = torch.linspace(max(2, n // 10), n, SIZES, dtype=torch.float64).round().long().tolist()
    values = []
    for size in sizes[:-1]:
        subset = samples[torch.randperm(n, generator=rng)[:size]]
        values.append(frechet_distance(*moments(subset), *target))
    inverse = 1 / torch.tensor(sizes, dtype=torch.float64)
    y = torch.tensor([*values, whole], dtype=torch.float64)
    centred = inverse - inverse.mean()
    slope = (centred @ y) / centred.square().sum()
    return float(y.mean() - slope * inverse.mean())


def read_statistics(path: Path, reads: str) -> tuple[Tensor, Tensor]:
    """Mean and covariance in an .npz as ADM's evaluator publishes them: mu, sigma; mu_s, sigma_s of spatial features.

    Raises UserError for what is no such file.  Nothing is unpickled.
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
