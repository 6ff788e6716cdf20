"""Laws of data for which every reading of x_t = alpha * data + sigma * noise has a closed form.

A law gives its `posterior` at x: the mean of the data and the score.  All other readings follow, for any interpolant and
target, from noise = -sigma * score.  They are computed in float64 and cast to x's dtype at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from sitkit.transport.field import Readings
from sitkit.transport.interpolant import TINY, Coefficients
from sitkit.transport.target import Target


class MixturePosterior(NamedTuple):
    """E[data | x] and the score grad log p_t(x), each (b, d) float64."""

    data: Tensor
    score: Tensor


class DataLaw(Protocol):
    """A distribution of labelled data in d dimensions; the label `num_classes` means all classes together."""

    @property
    def num_classes(self) -> int:
        """The number of labels."""
        ...

    def posterior(self, c: Coefficients, x: Tensor, y: Tensor) -> MixturePosterior:
        """Return the posterior at x (b, d) float64, given c, each (b, 1) float64, and y (b,) int64 in [0, num_classes]."""
        ...

    def to(self, device: torch.device) -> Self:
        """Return the same law on a device."""
        ...


def readings(law: DataLaw, c: Coefficients, x: Tensor, y: Tensor | None = None) -> Readings:
    """Return E[velocity | x], grad log p_t(x), E[data | x] and E[noise | x], each of x's shape and dtype.

    Args:
        law: the law of the data.
        c: the coefficients, from `interpolant.at(t, x)`.
        x: (b, ...), the states.
        y: (b,) int64, the labels; None means all classes together.
    """
    c, flat, labels = _float64(law, c, x, y)
    data, score = law.posterior(c, flat, labels)
    noise = -c.sigma * score
    velocity = _combine(c, c.d_alpha, c.d_sigma, data, score)
    return Readings(*(value.reshape(x.shape).to(x.dtype) for value in (velocity, score, data, noise)))


def prediction(law: DataLaw, target: Target, c: Coefficients, x: Tensor, y: Tensor | None = None) -> Tensor:
    """Return E[a * data + b * noise | x], the prediction of an ideal network.  Parameters as in `readings`."""
    c, flat, labels = _float64(law, c, x, y)
    a, b = target.weights(c)
    return _combine(c, a, b, *law.posterior(c, flat, labels)).reshape(x.shape).to(x.dtype)


def _combine(c: Coefficients, a: Tensor, b: Tensor, data: Tensor, score: Tensor) -> Tensor:
    # A b that diverges as 1 / sigma was computed with sigma clamped at TINY.  With the same clamp b * sigma has its limit; a
    # finite b * sigma changes by TINY at most.
    return a * data - (b * c.sigma.clamp_min(TINY)) * score


def _float64(law: DataLaw, c: Coefficients, x: Tensor, y: Tensor | None) -> tuple[Coefficients, Tensor, Tensor]:
    b = len(x)
    c = Coefficients(*(value.double().reshape(-1, 1).expand(b, 1) for value in c))
    labels = torch.full((b,), law.num_classes, device=x.device) if y is None else y
    return c, x.double().flatten(1), labels


@dataclass(frozen=True, eq=False)
class Mixture:
    """The Gaussian mixture sum_k weights_k N(means_k, covariances_k), with the label groups_k of each component k.

    With C = U diag(l) U^T a component of p_t has the covariance U diag(alpha^2 l + sigma^2) U^T at every t, so one
    decomposition at construction is enough, and a call costs O(b K d^2).  The batch is the last axis inside: sums over a few
    components or dimensions are several times faster along another axis.

    Args:
        weights: (K,), positive; scaled to sum to 1.
        means: (K, d).
        covariances: (K, d, d), symmetric and positive definite.
        groups: (K,) int64, each of 0, 1, ..., num_classes - 1 at least once.  The law of a label is the mixture of its
            components.

    Raises:
        ValueError: for other shapes or values.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    groups: Tensor
    spectrum: Tensor = field(init=False, repr=False)
    basis: Tensor = field(init=False, repr=False)
    log_prior: Tensor = field(init=False, repr=False)
    num_classes: int = field(init=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        for name in ("weights", "means", "covariances"):
            put(self, name, getattr(self, name).detach().double())
        put(self, "groups", self.groups.long())
        k, d = _shape(self)
        if not all(bool(v.isfinite().all()) for v in (self.weights, self.means, self.covariances)):
            raise ValueError("weights, means and covariances must be finite.")
        if not bool((self.weights > 0).all()):
            raise ValueError(f"weights must be positive; got {self.weights.tolist()}.")
        put(self, "weights", self.weights / self.weights.sum())
        labels = self.groups.unique().tolist()
        if labels != list(range(len(labels))):
            raise ValueError(f"groups must use every label from 0 on; got {labels}.")
        put(self, "num_classes", len(labels))
        if not torch.allclose(self.covariances, self.covariances.mT, rtol=1e-9, atol=0):
            raise ValueError("covariances must be symmetric.")
        spectrum, basis = torch.linalg.eigh(self.covariances)
        if not bool((spectrum > 0).all()):
            worst = int(spectrum.amin(1).argmin())
            raise ValueError(
                f"covariances must be positive definite; number {worst} of {k} has the eigenvalue "
                f"{float(spectrum[worst, 0]):.3g} (d = {d})."
            )
        put(self, "spectrum", spectrum)
        put(self, "basis", basis)
        # log P(component | label): (K, num_classes + 1), -inf outside the label's group; the last label is every group.
        label = torch.arange(self.num_classes + 1, device=self.groups.device)
        within = (label == self.groups.unsqueeze(1)) | (label == self.num_classes)
        put(self, "log_prior", self.weights.log().unsqueeze(1).where(within, -math.inf).log_softmax(0))

    def to(self, device: torch.device) -> Mixture:
        """Return the same mixture on a device."""
        if self.means.device == device:
            return self
        return Mixture(*(v.to(device) for v in (self.weights, self.means, self.covariances, self.groups)))

    def posterior(self, c: Coefficients, x: Tensor, y: Tensor) -> MixturePosterior:
        """Return E[data | x, y] and grad log p_t(x | y), the sums over components of r_k data_k and r_k score_k.

        r_k is the probability of component k given x and y.  With R_k = alpha^2 l_k + sigma^2 and e_k = U_k^T (x - alpha m_k)
        data_k = m_k + alpha U_k (l_k e_k / R_k) and score_k = -U_k (e_k / R_k).
        """
        e, variance = self._residuals(c, x)
        r = (self.log_prior[:, y] + _log_components(e, variance)).softmax(0)
        pull = r.unsqueeze(1) * e / variance
        # sum_k U_k v_k as a single product of matrices.
        basis = self.basis.mT.flatten(0, 1)
        score = -(pull.flatten(0, 1).T @ basis)
        data = r.T @ self.means + c.alpha * ((self.spectrum.unsqueeze(2) * pull).flatten(0, 1).T @ basis)
        return MixturePosterior(data, score)

    def _residuals(self, c: Coefficients, x: Tensor) -> tuple[Tensor, Tensor]:
        """x - alpha m_k in the basis of C_k, and the variance along it: each (K, d, b)."""
        e = self.basis.mT @ (x.T - c.alpha.T * self.means.unsqueeze(2))
        return e, c.alpha.T.square() * self.spectrum.unsqueeze(2) + c.sigma.T.square()

    def _joint(self, c: Coefficients, x: Tensor, y: Tensor) -> Tensor:
        """log P(component | y) p_t(x | component): (K, b)."""
        return self.log_prior[:, y] + _log_components(*self._residuals(c, x))


def _log_components(e: Tensor, variance: Tensor) -> Tensor:
    """log N(x; alpha m_k, alpha^2 C_k + sigma^2) from `_residuals`: (K, b)."""
    return -0.5 * (e.square() / variance + variance.log() + math.log(2 * math.pi)).sum(1)


def _shape(mixture: Mixture) -> tuple[int, int]:
    if mixture.means.ndim != 2:
        raise ValueError(f"means must be (K, d); got {tuple(mixture.means.shape)}.")
    k, d = mixture.means.shape
    for name, wanted in (("weights", (k,)), ("covariances", (k, d, d)), ("groups", (k,))):
        got = tuple(getattr(mixture, name).shape)
        if got != wanted:
            raise ValueError(f"{name} must be {wanted}, as means are {(k, d)}; got {got}.")
    return k, d


def log_density(mixture: Mixture, c: Coefficients, x: Tensor, y: Tensor | None = None) -> Tensor:
    """Return log p_t(x | y) in nats, (b,) of x's dtype.  Parameters as in `readings`."""
    c, flat, labels = _float64(mixture, c, x, y)
    return mixture._joint(c, flat, labels).logsumexp(0).to(x.dtype)


def class_posterior(mixture: Mixture, c: Coefficients, x: Tensor) -> Tensor:
    """Return P(label | x_t = x), (b, num_classes) of x's dtype: the output of an ideal classifier of noisy data."""
    c, flat, labels = _float64(mixture, c, x, None)
    membership = torch.nn.functional.one_hot(mixture.groups, mixture.num_classes).double()
    return (mixture._joint(c, flat, labels).softmax(0).T @ membership).to(x.dtype)


def sample_law(mixture: Mixture, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return n draws of data (n, d) float64 and label (n,) int64, which depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.multinomial(mixture.weights.cpu(), n, replacement=True, generator=generator).to(mixture.means.device)
    z = torch.randn(n, mixture.means.shape[1], generator=generator, dtype=torch.float64).to(mixture.means.device)
    x = mixture.means[k].clone()
    for each in range(len(mixture.weights)):
        root = mixture.basis[each] * mixture.spectrum[each].sqrt()
        x[k == each] += z[k == each] @ root.T
    return x, mixture.groups[k]


def moments(mixture: Mixture, y: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the mean (d,) and the covariance (d, d) of the data with label y, or of all data, in float64."""
    weights = mixture.log_prior[:, mixture.num_classes if y is None else y].exp()
    mean = weights @ mixture.means
    away = mixture.means - mean
    covariance = torch.einsum("k,kij->ij", weights, mixture.covariances + away.unsqueeze(2) * away.unsqueeze(1))
    return mean, covariance


def three_gaussians() -> Mixture:
    """Return three Gaussians in the plane with unequal weights and full covariances, at the scale of data in [-1, 1]."""
    means = torch.tensor([[0.7, 0.2], [-0.6, 0.5], [0.0, -0.7]], dtype=torch.float64)
    covariances = torch.tensor(
        [[[0.09, 0.03], [0.03, 0.05]], [[0.06, -0.02], [-0.02, 0.08]], [[0.12, 0.0], [0.0, 0.04]]], dtype=torch.float64
    )
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    return Mixture(weights, means, covariances, torch.zeros(3, dtype=torch.int64))
