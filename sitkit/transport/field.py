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
    """The four readings of a state x at time t, each of x's shape.

    Args:
        velocity: E[d_alpha * data + d_sigma * noise | x], the v of SiT Eq. 7.
        score: grad log p_t(x) = -noise / sigma (SiT Eq. 6); infinite or undefined where sigma = 0.
        data: E[data | x].
        noise: E[noise | x].
    """

    velocity: Tensor
    score: Tensor
    data: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Field:
    """A network with the interpolant and the target that it was trained for.

    Args:
        network: maps x (b, ...), t (b,), y (b,) int64 to the target's prediction, of x's shape.  Labels y lie in
            [0, num_classes]; num_classes is the null class.
        interpolant: the path from noise to data.
        target: the quantity that the network predicts.
        num_classes: the number of classes; by default the network's own attribute, or 0.
        times: how many times the network takes; by default the network's own attribute, or 1.  A network of two times
            takes t (b, 2), the ends of an interval, and is read at one time with both ends there.
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
        """The label of an example without a label: the number of classes (0 for unlabelled data)."""
        known = self.num_classes if self.num_classes is not None else getattr(self.network, "num_classes", 0)
        return int(known)

    @property
    def _times(self) -> int:
        return self.times if self.times is not None else getattr(self.network, "times", 1)

    def labels(self, y: Tensor | int | None, x: Tensor) -> Tensor:
        """Return y as (b,) int64 on x's device; None is the null class.

        Raises UserError for an unknown label, and for the null class of a network that was trained without it.
        """
        import torch

        if y is None:
            y = self.null_class
        y = torch.as_tensor(y, device=x.device).long().expand(len(x))
        if not len(y):
            return y
        # Each conversion waits for the device.
        lowest, highest = int(y.min()), int(y.max())
        if not 0 <= lowest <= highest <= self.null_class:
            raise UserError(
                f"labels run from {lowest} to {highest}, but the network knows 0 to {self.null_class - 1} "
                f"and the null class {self.null_class}."
            )
        if self.null_class and highest == self.null_class:
            require_unconditional(self.network)
        return y

    def read(self, x: Tensor, t: Tensor | float, y: Tensor | None = None) -> Readings:
        """Return velocity, score, data and noise at (x, t) from one evaluation of the network.

        Args:
            x: (b, ...), the states.
            t: a number or (b,), the times.  Coefficients are computed in t's dtype, float32 at least.
            y: (b,) int64, the labels; None is the null class.

        Returns:
            The readings, each of x's shape.  The score is infinite or undefined where sigma = 0; the others are singular
            only where the target's determinant is 0 (see `sitkit.transport.target`).

        Raises:
            UserError: for a label that the network does not know.
        """
        import torch

        wide = x.dtype if x.dtype == torch.float64 else torch.float32
        time = t.to(x.device) if isinstance(t, torch.Tensor) else torch.tensor(t, dtype=wide, device=x.device)
        if time.dtype not in (torch.float32, torch.float64):
            time = time.to(wide)
        c = self.interpolant.at(time, x)
        instants = instant(time.to(x.dtype).expand(len(x)), self._times)
        prediction = self.network(x, instants, self.labels(y, x))
        dtype = torch.promote_types(x.dtype, torch.float32)
        c = type(c)(*(value.to(dtype) for value in c))
        data, noise = data_and_noise(self.target, c, prediction.to(dtype), x.to(dtype))
        return Readings(c.d_alpha * data + c.d_sigma * noise, -noise / c.sigma, data, noise)

    def through(self, network: Network) -> Field:
        """Return the same field with another network, with this one's classes and times."""
        return replace(self, network=network, num_classes=self.null_class, times=self._times)


def require_unconditional(network: object) -> None:
    """Raise UserError for a network with classes whose training never dropped a label: its null class has no meaning."""
    if getattr(network, "class_dropout", None) == 0:
        raise UserError(
            "this network was trained with class_dropout = 0: it never saw an example without a label, so it needs a class "
            "(sample.labels other than 'none')."
        )


class Counted:
    """A network that counts its evaluations per sample: a call on a batch k times as large counts k.

    `rows` is the number of examples in all calls.

    Args:
        network: the network that is called.
        batch: the number of samples; by default 1, so that every row counts.
        dtype: the dtype in which the network takes states and times; None is the dtype in which they are given.
    """

    def __init__(self, network: Network, batch: int = 1, dtype: torch.dtype | None = None) -> None:
        self.network, self.batch, self.rows, self.dtype = network, batch, 0, dtype
        self.class_dropout = getattr(network, "class_dropout", None)
        self.times = getattr(network, "times", 1)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        predicted = self.network(x.to(self.dtype or x.dtype), t.to(self.dtype or t.dtype), y)
        # Counted after the call: a call that runs out of memory is repeated in parts.
        self.rows += len(x)
        return predicted

    def beside(self, network: Network) -> Network:
        """Return another network whose evaluations are counted here too."""

        def counted(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            self.rows += len(x)
            return network(x.to(self.dtype or x.dtype), t.to(self.dtype or t.dtype), y)

        return counted

    @property
    def nfe(self) -> int:
        """Evaluations per sample so far, rounded up to a whole number."""
        return -(-self.rows // self.batch) if self.batch else 0


def instant(t: Tensor, times: int) -> Tensor:
    """Return the time t (b,) in the form that a network takes: t itself, or (b, times) for a network of two times.

    A network of two times predicts the mean over an interval (MeanFlow, arXiv 2505.13447).  Over an interval of length 0
    this is the prediction at its time, so losses, fields and samplers of one time take such a network too.
    """
    return t[:, None].expand(-1, times) if times > 1 else t
