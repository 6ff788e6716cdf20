"""The exact network: the minimiser of the training loss under a known law, or under the empirical law of a data set."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sitkit.runtime.errors import UserError
from sitkit.transport.closed_form import DataLaw, MixturePosterior, prediction
from sitkit.transport.interpolant import TINY, Coefficients, Interpolant
from sitkit.transport.target import Target

if TYPE_CHECKING:
    from sitkit.data.dataset import Examples

# Numbers of float64 in one (rows, n) block of log weights: 32 MB.
MIXTURE_BLOCK = 2**22


@dataclass(frozen=True, eq=False)
class Empirical:
    """The law with probability 1/n on each of n labelled points: its denoiser minimises the training loss.

    points: (n, d); labels: (n,) int64, each of 0, ..., num_classes - 1 at least once, or all 0 where num_classes is 0.
    E[data | x] = softmax_i(-|x - alpha p_i|^2 / (2 sigma^2)) . p;  score = -(x - alpha E[data | x]) / sigma^2.
    At sigma = 0 the score is set to 0: x is then one of the points, where the mean of the noise is 0.  The velocity is not
    continuous there, so a solver that evaluates it at t = 1 (heun, rk4) misses a point by the error of its last step.
    Memory beyond the points: `MIXTURE_BLOCK` numbers at a time, or n.  The rounding error of the log weights is about
    1e-16 alpha^2 |p|^2 / sigma^2.  Raises ValueError for other shapes or labels.
    Source: Karras et al. 2022 (EDM), appendix B.3, in this module's alpha and sigma.
    """

    points: Tensor
    labels: Tensor
    num_classes: int
    half_squares: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.points.ndim != 2 or not len(self.points) or self.labels.shape != self.points.shape[:1]:
            raise ValueError(
                f"points must be (n, d) and labels (n,), n > 0; got {tuple(self.points.shape)} and "
                f"{tuple(self.labels.shape)}."
            )
        present = self.labels.unique().tolist()
        if present != list(range(max(1, self.num_classes))):
            raise ValueError(f"each of the {self.num_classes} labels needs a point; only {present} have one.")
        object.__setattr__(self, "points", self.points.detach().double())
        object.__setattr__(self, "half_squares", self.points.square().sum(1) / 2)

    def to(self, device: torch.device) -> Empirical:
        """Return the same law on a device."""
        if self.points.device == device:
            return self
        return Empirical(self.points.to(device), self.labels.to(device), self.num_classes)

    def posterior(self, c: Coefficients, x: Tensor, y: Tensor) -> MixturePosterior:
        """Return E[data | x, y] and grad log p_t(x | y) by the equations of the class."""
        rows = max(1, MIXTURE_BLOCK // len(self.points))
        blocks = zip(c.alpha.split(rows), c.sigma.split(rows), x.split(rows), y.split(rows), strict=True)
        data = torch.cat([self._denoise(*block) for block in blocks])
        away = torch.where(c.sigma > 0, x - c.alpha * data, 0.0)
        return MixturePosterior(data, -away / c.sigma.clamp_min(TINY).square())

    def _denoise(self, alpha: Tensor, sigma: Tensor, x: Tensor, y: Tensor) -> Tensor:
        # |x|^2 is common to all points: without it the squares need one matrix product.
        log_weights = alpha * (x @ self.points.T - alpha * self.half_squares) / sigma.clamp_min(TINY).square()
        y = y.unsqueeze(1)
        outside = (y != self.labels) & (y != self.num_classes)
        return log_weights.masked_fill(outside, -math.inf).softmax(1) @ self.points


def empirical(examples: Examples) -> Empirical:
    """Return the empirical law of the training examples of a data set, read without augmentation.

    Raises UserError if a class has no training example.
    """
    labels = torch.as_tensor(examples.labels[examples.train])
    try:
        return Empirical(examples.read(examples.train).flatten(1), labels, examples.num_classes)
    except ValueError as error:
        raise UserError(f"backbone 'exact' cannot use the training examples of this data set: {error}") from None


class Exact(nn.Module):
    """network(x, t, y) = E[a data + b noise | x_t = x, y] under a law: no parameters, float64 inside.

    x: (b, ...) with d numbers an example; t: (b,); y: (b,) int64, `num_classes` for all classes together.
    """

    # The prediction is exact for the null class too, so the network can be guided.
    class_dropout = 1.0

    def __init__(self, law: DataLaw, interpolant: Interpolant, target: Target) -> None:
        super().__init__()
        # The law is not a buffer: casting the network to bfloat16 must not round it.
        self.law, self.interpolant, self.target = law, interpolant, target
        self.num_classes = law.num_classes

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if (law := self.law.to(x.device)) is not self.law:
            self.law = law
        return prediction(law, self.target, self.interpolant.at(t.double(), x), x, y)


class Unprepared(nn.Module):
    """The placeholder of an exact network until the law of the data is known."""

    class_dropout = 1.0

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Raises UserError."""
        raise UserError(
            "backbone 'exact' computes its prediction from the law of the data and has no law yet: "
            "call backbone.prepare(network, interpolant=..., target=..., examples=...) and use the network that it returns."
        )
