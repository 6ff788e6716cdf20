"""Maximum mean discrepancy: the distance between the mean embeddings of two sets under a kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, final

from sitkit.evaluation.metrics.metric import FeatureMetric, Measurement, generator
from sitkit.registry import metrics
from sitkit.runtime.errors import UserError, require_within

if TYPE_CHECKING:
    from torch import Tensor

    Kernel = Callable[[Tensor, Tensor], Tensor]


@final
@metrics.register("mmd")
@dataclass(frozen=True)
class MMD(FeatureMetric):
    """E k(x,x') + E k(y,y') - 2 E k(x,y), unbiased, with a mixture of Gaussian kernels.

    k(x, y) = mean_j exp(-|x - y|^2 / (2 (widths_j scale)^2)). The mean is zero for equal laws, so values can be negative.
    The standard error is that of both sets, from the row sums. Two sets of samples share the reference, so their difference
    varies less than the two errors say.

    Args:
        scale: in feature units; by default the root mean square distance of the reference points, which costs O(m d),
            while the usual median needs all m^2 pairs.
        widths: the widths of the kernels, in units of the scale.
        block: rows of the kernel matrix in memory at once.

    Source: Gretton et al. 2012, "A kernel two-sample test", Eq. 3; Efron and Stein 1981.
    """

    unit: ClassVar[str] = "squared kernel distance"
    scale: float | None = None
    widths: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    block: int = 1024

    def __post_init__(self) -> None:
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be positive and finite; got {self.scale}.")
        if not self.widths or not all(0 < width < math.inf for width in self.widths):
            raise ValueError(f"widths must be positive and finite, at least one; got {self.widths}.")
        require_within(1, 2**20, block=self.block)

    def compare(self, samples: Tensor, reference: Tensor, *, seed: int = 0) -> Measurement:
        scale = rms_distance(reference) if self.scale is None else self.scale
        if scale == 0:
            raise UserError("mmd: all reference points are equal, so they give no scale. Set mmd's 'scale'.")
        # |x - y|^2 is expanded into products, which lose digits far from the origin.
        centre = reference.mean(0)
        estimate = discrepancy(gaussians(scale, self.widths), samples - centre, reference - centre, self.block)
        return Measurement(*estimate, (f"kernel scale {scale:.6g} feature units",))


@final
@metrics.register("kid")
@dataclass(frozen=True)
class KID(FeatureMetric):
    """The kernel inception distance: MMD^2 with k(x, y) = (x.y / d + 1)^degree, unbiased, so it may be negative.

    Args:
        degree: the degree of the kernel.
        subsets: 0 compares all pairs, with a standard error as in `mmd`, at a cost of n m d. A positive number gives the
            mean over that number of random subsets of each set. Their standard deviation, which papers report, is in
            the notes. The standard error has both parts: that of all pairs, and that of the choice of the subsets.
        size: the number of points of a subset.
        block: rows of the kernel matrix in memory at once.

    Source: Binkowski et al. 2018, arXiv 1801.01401, section 4.
    """

    unit: ClassVar[str] = "squared kernel distance"
    version: ClassVar[int] = 2
    degree: int = 3
    subsets: int = 0
    size: int = 1000
    block: int = 1024

    def __post_init__(self) -> None:
        require_within(1, 100, degree=self.degree)
        require_within(1, 2**20, block=self.block)
        require_within(0, 10**6, subsets=self.subsets)
        require_within(2, 10**9, size=self.size)

    def compare(self, samples: Tensor, reference: Tensor, *, seed: int = 0) -> Measurement:
        kernel = polynomial(self.degree)
        if not self.subsets:
            return Measurement(*discrepancy(kernel, samples, reference, self.block))
        if min(len(samples), len(reference)) < self.size:
            raise UserError(
                f"kid: subsets of {self.size} need as many samples and reference points; got {len(samples)} and "
                f"{len(reference)}. Set kid's 'size', or 'subsets' to 0."
            )
        each = self._of_subsets(samples, reference, seed)
        spread = float(each.std(correction=0))
        # The mean over all subsets is the value of all pairs, so the choice of a few adds an independent error.
        data = discrepancy(kernel, samples, reference, self.block).stderr
        choice = float(each.std()) / math.sqrt(self.subsets) if self.subsets > 1 else None
        error = None if data is None or choice is None else math.hypot(data, choice)
        note = f"standard deviation over {self.subsets} subsets of {self.size}: {spread:.6g}"
        return Measurement(float(each.mean()), error, (note,))

    def value(self, samples: Tensor, reference: Tensor, *, seed: int = 0) -> float:
        # Sets smaller than a subset: the mean over subsets has the same expectation as all pairs.
        if not self.subsets or min(len(samples), len(reference)) < self.size:
            return discrepancy(polynomial(self.degree), samples, reference, self.block).value
        return float(self._of_subsets(samples, reference, seed).mean())

    def _of_subsets(self, samples: Tensor, reference: Tensor, seed: int) -> Tensor:
        import torch

        rng, values = generator(seed), []
        for _ in range(self.subsets):
            x, y = (z[torch.randperm(len(z), generator=rng)[: self.size]] for z in (samples, reference))
            values.append(discrepancy(polynomial(self.degree), x, y, self.block).value)
        return torch.tensor(values, dtype=torch.float64)


class Discrepancy(NamedTuple):
    """An unbiased MMD^2 and its standard error over both sets; None for fewer than 3 points."""

    value: float
    stderr: float | None


def gaussians(scale: float, widths: tuple[float, ...]) -> Kernel:
    """Return the kernel (x (n, d), y (m, d)) -> mean_j exp(-|x - y|^2 / (2 (widths_j scale)^2)), (n, m)."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        squared = (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp_min(0)
        terms = [(squared * (-0.5 / (width * scale) ** 2)).exp() for width in widths]
        return sum(terms[1:], terms[0]) / len(terms)

    return kernel


def polynomial(degree: int) -> Kernel:
    """Return the kernel (x (n, d), y (m, d)) -> (x.y / d + 1)^degree, (n, m)."""
    return lambda x, y: (x @ y.T / x.shape[1] + 1) ** degree


def rms_distance(x: Tensor) -> float:
    """Return the root mean square distance between distinct rows of x (m, d): sqrt(2 tr(S)), S the unbiased covariance."""
    return math.sqrt(2 * float(x.var(0).sum()))


def discrepancy(kernel: Kernel, x: Tensor, y: Tensor, block: int) -> Discrepancy:
    """Return the unbiased MMD^2 between x (n, d) and y (m, d) for a symmetric kernel, with `block` kernel rows at a time.

    The variance is a delete-one jackknife over both sets. It counts the part of second order, whose terms depend on two
    points each, twice (Efron and Stein 1981): this part is estimated and subtracted once. It is at most half of the
    jackknife, which it reaches for equal laws.
    """
    import torch

    n, m = len(x), len(y)
    (xx, xx_squares), (yy, yy_squares) = inner_sums(kernel, x, block), inner_sums(kernel, y, block)
    xy, yx, xy_squares = torch.zeros_like(xx), torch.zeros_like(yy), 0.0
    for start in range(0, n, block):
        k = kernel(x[start : start + block], y)
        xy[start : start + block] = k.sum(1)
        yx += k.sum(0)
        xy_squares += float(k.square().sum())

    def mmd2(sxx: Tensor, syy: Tensor, sxy: Tensor, n: int, m: int) -> Tensor:
        return sxx / (n * (n - 1)) + syy / (m * (m - 1)) - 2 * sxy / (n * m)

    value = float(mmd2(xx.sum(), yy.sum(), xy.sum(), n, m))
    if min(n, m) < 3:
        return Discrepancy(value, None)
    without_x = mmd2(xx.sum() - 2 * xx, yy.sum(), xy.sum() - xy, n - 1, m)
    without_y = mmd2(xx.sum(), yy.sum() - 2 * yy, xy.sum() - yx, n, m - 1)
    jackknife = sum((len(v) - 1) * float(v.var(correction=0)) for v in (without_x, without_y))
    # In a symmetric matrix each pair stands twice; the cross term has the factor 2.
    second = 2 * interaction(xx_squares, xx / (n - 1), xx / (n - 1), n * (n - 1))
    second += 2 * interaction(yy_squares, yy / (m - 1), yy / (m - 1), m * (m - 1))
    second += 4 * interaction(xy_squares, xy / m, yx / n, n * m)
    return Discrepancy(value, math.sqrt(max(jackknife - second, jackknife / 2)))


def interaction(squares: float, rows: Tensor, columns: Tensor, pairs: int) -> float:
    """Return the variance of the mean of a kernel over pairs, less its row and column means (their parts are of first order).

    Args:
        squares: the sum of the squares over the pairs.
        rows, columns: the row and the column means.
        pairs: the number of pairs.
    """
    centred = squares / pairs - float(rows.mean()) ** 2 - float(rows.var(correction=0) + columns.var(correction=0))
    return centred / pairs


def inner_sums(kernel: Kernel, x: Tensor, block: int) -> tuple[Tensor, float]:
    """Return the row sums (n,) of the kernel matrix of x (n, d) without its diagonal, and its sum of squares."""
    import torch

    rows, squares = [], 0.0
    for start in range(0, len(x), block):
        k = kernel(x[start : start + block], x)
        rows.append(k.sum(1) - k.diagonal(start))
        squares += float(k.square().sum() - k.diagonal(start).square().sum())
    return torch.cat(rows), squares
