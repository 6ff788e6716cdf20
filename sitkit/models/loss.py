"""The training objective: the weighted squared error of the network's prediction along an interpolant, or a plugin's.

A loss sees the network, the path, the pair of data and noise and a key for each example, and gives one number for each
example; what it trains besides the network it builds itself (`Loss.build`), what it reads inside the network it names
(`Loss.hidden`), and what it needs of the data it is bound to before training (`Loss.bind`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, final

from sitkit.registry import Component, losses
from sitkit.transport.field import instant
from sitkit.transport.interpolant import Interpolant
from sitkit.transport.target import Target
from sitkit.transport.weighting import Weighting

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sitkit.data.dataset import Examples

    Network = Callable[[Tensor, Tensor, Tensor], Tensor]


class Batch(NamedTuple):
    """What a loss is a function of.

    network(x, t, y) as in `sitkit.backbones`, t being (b, 2) for a network of two times (`instant`); data, noise:
    (b, ...), already paired; t: (b,) drawn by the timestep component; y: (b,) int64 with dropped labels replaced by the
    null class; keys: (b,) int64, one for each example, from which `sitkit.runtime.rng` makes whatever more must be drawn.
    parts: what `Loss.build` gave.  hidden: the outputs of the modules that `Loss.hidden` names, those of the network's
    latest call.
    """

    network: Network
    interpolant: Interpolant
    target: Target
    weighting: Weighting
    data: Tensor
    noise: Tensor
    t: Tensor
    y: Tensor
    keys: Tensor
    parts: nn.Module | None = None
    hidden: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class Loss(Component):
    """What training makes small."""

    @abstractmethod
    def per_example(self, batch: Batch) -> Tensor:
        """The loss of each example, (b,), in float32 at least whatever the network's precision."""

    def prepare(self, data: Examples) -> Loss:
        """Return this loss with what it needs of the run's data filled in; itself where it needs nothing."""
        return self

    def build(self, network: nn.Module, shape: tuple[int, ...], num_classes: int) -> nn.Module | None:
        """What is trained beside the network (a projector, a second head), found again in `Batch.parts`; None: nothing.

        Its parameters go to the optimiser and, with its buffers, to the checkpoints; samples are drawn without it.
        Weights are drawn from torch's global generator, after the network's.  Raises UserError for a network that the
        loss cannot use.
        """
        return None

    @property
    def hidden(self) -> tuple[str, ...]:
        """Names of the network's modules ("blocks.7") whose outputs `per_example` finds in `Batch.hidden`."""
        return ()


@final
@losses.register("interpolant")
@dataclass(frozen=True)
class InterpolantLoss(Loss):
    """r(t) |network(x, t, y) - (a data + b noise)|^2 at x = alpha data + sigma noise (SiT Eq. 6, 7 and 46-50)."""

    def per_example(self, batch: Batch) -> Tensor:
        path = batch.interpolant, batch.target, batch.weighting
        return interpolant_loss(batch.network, *path, batch.data, batch.noise, batch.t, batch.y)


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
    error = network(x.to(data.dtype), instant(t, getattr(network, "times", 1)), y).to(x.dtype) - (a * data + b * noise)
    weighted = weighting.weight(c, target) * error.square()
    return weighted.flatten(1).mean(1)
