"""The training objective: the weighted squared error of the network's prediction along an interpolant."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sitkit.interpolant import Interpolant
from sitkit.target import Target
from sitkit.weighting import Weighting

if TYPE_CHECKING:
    from torch import Tensor

    Network = Callable[[Tensor, Tensor, Tensor], Tensor]


def interpolant_loss(
    network: Network,
    interpolant: Interpolant,
    target: Target,
    weighting: Weighting,
    data: Tensor,
    noise: Tensor,
    t: Tensor,
    y: Tensor,
) -> Tensor:
    """r(t) |network(x, t, y) - (a data + b noise)|^2 at x = alpha data + sigma noise, per example.

    data, noise: (b, ...); t: (b,) in [0, 1]; y: (b,) int64.  Returns (b,): the mean over the remaining dimensions,
    in float32 at least whatever the network's precision.  Source: SiT Eq. 6, 7 and 46-50.
    """
    c = interpolant.at(t, data)
    x = c.alpha * data + c.sigma * noise
    a, b = target.weights(c)
    error = network(x.to(data.dtype), t, y).to(x.dtype) - (a * data + b * noise)
    weighted = weighting.weight(c, target) * error.square()
    return weighted.flatten(1).mean(1)
