"""A network read as a field: one evaluation gives velocity, score, data and noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from sitkit.runtime.errors import UserError
from sitkit.transport.interpolant import Interpolant
from sitkit.transport.target import Target, data_and_noise

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Network: TypeAlias = "Callable[[Tensor, Tensor, Tensor], Tensor]"


class Readings(NamedTuple):
    """What one evaluation says about x at time t, each of x's shape."""

    velocity: Tensor
    score: Tensor
    data: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Field:
    """A network with the interpolant and target it was trained for.

    network(x, t, y): x (b, ...), t (b,), y (b,) int64 in [0, num_classes], num_classes being the null class
    -> the target's prediction, of x's shape.  A network of `times = 2` takes t (b, 2), the ends of an interval, and is
    read at one time with both ends there.  `num_classes` and `times` default to the network's own attributes.
    """

    network: Network
    interpolant: Interpolant
    target: Target
    num_classes: int | None = None
    times: int | None = None

    @property
    def device(self) -> torch.device:
        """The device of the network's parameters; the CPU for a network without any."""
        import torch

        parameters = getattr(self.network, "parameters", list)()
        return next((parameter.device for parameter in parameters), torch.device("cpu"))

    @property
    def null_class(self) -> int:
        """The label that stands for no label: the number of classes (0 for unlabelled data)."""
        known = self.num_classes if self.num_classes is not None else getattr(self.network, "num_classes", 0)
        return int(known)

    @property
    def _times(self) -> int:
        return self.times if self.times is not None else getattr(self.network, "times", 1)

    def labels(self, y: Tensor | int | None, x: Tensor) -> Tensor:
        """y as (b,) int64 on x's device; None is the null class.  Raises UserError for a label that does not exist."""
        import torch

        if y is None:
            y = self.null_class
        y = torch.as_tensor(y, device=x.device).long().expand(len(x))
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) <= self.null_class:
            raise UserError(
                f"labels run from {int(y.min())} to {int(y.max())}, but the network knows 0 to {self.null_class - 1} "
                f"and the null class {self.null_class}."
            )
        return y

    def read(self, x: Tensor, t: Tensor | float, y: Tensor | None = None) -> Readings:
        """Velocity, score, data and noise at (x, t) from one evaluation of the network.

        x: (b, ...); t: a number or (b,); y: (b,) int64, or None for the null class.  Coefficients are computed in t's
        dtype, float32 at least.  The score is -noise / sigma, so it is infinite or undefined where sigma = 0; the
        others are finite where the target's determinant is (see `sitkit.transport.target`).
        """
        import torch

        time = torch.as_tensor(t, device=x.device)
        if time.dtype not in (torch.float32, torch.float64):
            time = time.double() if x.dtype == torch.float64 else time.float()
        c = self.interpolant.at(time, x)
        instants = instant(time.to(x.dtype).expand(len(x)), self._times)
        prediction = self.network(x, instants, self.labels(y, x))
        dtype = torch.promote_types(x.dtype, torch.float32)
        c = type(c)(*(value.to(dtype) for value in c))
        data, noise = data_and_noise(self.target, c, prediction.to(dtype), x.to(dtype))
        return Readings(c.d_alpha * data + c.d_sigma * noise, -noise / c.sigma, data, noise)

    def through(self, network: Network) -> Field:
        """The same field with another network in place, its classes and times kept."""
        return replace(self, network=network, num_classes=self.null_class, times=self._times)


class Counted:
    """A network that counts its evaluations per sample: a call on k times the batch counts k; `rows` counts examples.

    `nfe` is a whole number for every built-in guidance.
    """

    def __init__(self, network: Network, batch: int = 1) -> None:
        self.network, self.batch, self.rows = network, batch, 0
        self.class_dropout = getattr(network, "class_dropout", None)
        self.times = getattr(network, "times", 1)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        predicted = self.network(x, t, y)
        # After the call: one that fails for want of memory is made again in parts.
        self.rows += len(x)
        return predicted

    def beside(self, network: Network) -> Network:
        """Another network whose evaluations count here too."""

        def counted(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            self.rows += len(x)
            return network(x, t, y)

        return counted

    @property
    def nfe(self) -> int:
        """Evaluations spent per sample so far."""
        return -(-self.rows // self.batch) if self.batch else 0


def instant(t: Tensor, times: int) -> Tensor:
    """One time as a network of so many times takes it: t (b,) itself, or (b, 2) with both the same for `times = 2`.

    A network of two times predicts the mean over an interval (MeanFlow, arXiv 2505.13447); over an interval of no
    length that is the prediction at its time, so that losses, fields and samplers of one time take such a network too.
    """
    return t[:, None].expand(-1, times) if times > 1 else t
