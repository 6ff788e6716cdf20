"""Losses: the weighted squared error of the prediction along an interpolant, and the contract for other losses.

A loss maps a `Batch` (network, path, data, noise, one key for each example) to one number for each example.  It builds the
modules that are trained beside the network (`Loss.build`), names the hidden layers that it reads (`Loss.hidden`), and takes
what it needs from the data before training (`Loss.prepare`).
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
    """The arguments of a loss.

    Args:
        network: (x, t, y) -> prediction, as in `sitkit.backbones`; t is (b, 2) for a network of two times.
        interpolant: the path between noise and data.
        target: the quantity that the network predicts.
        weighting: the weight of the squared error at each t.
        data: (b, ...), paired with the noise.
        noise: (b, ...), standard normal.
        t: (b,), drawn by the timestep component.
        y: (b,) int64; the null class replaces dropped labels.
        keys: (b,) int64, one for each example; `sitkit.runtime.rng` draws further random numbers from them.
        parts: the module that `Loss.build` returned.
        hidden: the outputs of the modules that `Loss.hidden` names, from the latest call of the network.
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
    """The loss that training minimises."""

    @abstractmethod
    def per_example(self, batch: Batch) -> Tensor:
        """Return the loss of each example, (b,), in float32 or better for every precision of the network."""

    def prepare(self, data: Examples) -> Loss:
        """Return this loss with what it needs of the data of the run; by default itself."""
        return self

    def build(self, network: nn.Module, shape: tuple[int, ...], num_classes: int) -> nn.Module | None:
        """Return the module that is trained beside the network (a projector, a second head); `Batch.parts` holds it.

        The optimizer gets its parameters and checkpoints hold its parameters and buffers; samples are drawn without it.
        Its weights are drawn from torch's global generator, after those of the network.

        Args:
            network: the network of the run.
            shape: the shape that the network models.
            num_classes: the number of classes, 0 without labels.

        Returns:
            The module, or None if nothing else is trained.

        Raises:
            UserError: if the loss cannot use the network.
        """
        return None

    @property
    def hidden(self) -> tuple[str, ...]:
        """The names of the modules of the network ("blocks.7") whose outputs are in `Batch.hidden`."""
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
    """Return r(t) |network(x, t, y) - (a data + b noise)|^2 at x = alpha data + sigma noise, for each example.

    Args:
        network: (x, t, y) -> prediction (b, ...).
        interpolant: alpha and sigma at t.
        target: a and b at t, the quantity that the network predicts.
        weighting: r(t).
        data: (b, ...).
        noise: (b, ...), standard normal.
        t: times in [0, 1], (b,).
        y: labels, (b,) int64.

    Returns:
        The losses (b,), means over the remaining dimensions, in float32 or better for every precision of the network.

    Source: SiT Eq. 6, 7 and 46-50.
    """
    c = interpolant.at(t, data)
    x = c.alpha * data + c.sigma * noise
    a, b = target.weights(c)
    error = network(x.to(data.dtype), instant(t, getattr(network, "times", 1)), y).to(x.dtype) - (a * data + b * noise)
    weighted = weighting.weight(c, target) * error.square()
    return weighted.flatten(1).mean(1)
