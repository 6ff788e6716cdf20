"""Guidance: a stronger prediction extrapolated away from a weaker one.

All readings are affine in the prediction at fixed x, so a combination of predictions with weights that sum to one is the
same combination of velocities, scores or data, for every target.  If weights do not sum to one (`rescale`, `cfg-zero`) the
space matters: these rules act on the velocity, velocity = p prediction + q x with (p, q) from `velocity_gains`, so they
mean the same for every target too.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeAlias, final

from sitkit.registry import Component, guidances
from sitkit.runtime.errors import UserError, require_within
from sitkit.transport.target import Target, Velocity, determinant

Weights = Literal["ema", "raw"]

if TYPE_CHECKING:
    from torch import Tensor

    from sitkit.registry.measures import Measures
    from sitkit.transport.field import Network
    from sitkit.transport.interpolant import Interpolant

# (x, t) -> (p, q), each a number or shaped to multiply x.
Gains: TypeAlias = "Callable[[Tensor, Tensor], tuple[Tensor | float, Tensor | float]]"

# Networks get the time in the state's dtype: a float32 time differs by up to 6e-8 from the planned time.
SLACK = 1e-6


def is_velocity(x: Tensor, t: Tensor) -> tuple[float, float]:
    """Return the gains of a prediction that is the velocity.

    Args:
        x: (b, ...), the states.
        t: (b,), the times.

    Returns:
        (1, 0).
    """
    return 1.0, 0.0


def velocity_gains(interpolant: Interpolant, target: Target) -> Gains:
    """Return (p, q) of velocity = p prediction + q x as a function: p = det_v / det, q = (a d_sigma - b d_alpha) / det.

    For two times (b, 2) the state x belongs to the first.
    """

    def gains(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        t = t if t.ndim == 1 else t[:, 0]
        c = interpolant.at(t.to(torch.promote_types(t.dtype, torch.float32)), x)
        (a, b), det = target.weights(c), determinant(target, c)
        return determinant(Velocity(), c) / det, (a * c.d_sigma - b * c.d_alpha) / det

    return gains


@dataclass(frozen=True)
class Guidance(Component):
    """A rule that turns a network into a guided network.

    A subclass defines `guide` and `evaluations`.
    """

    @abstractmethod
    def guide(self, network: Network, null_class: int, gains: Gains = is_velocity) -> Network:
        """Return the guided network.

        Args:
            network: maps x (b, ...), t (b,), y (b,) to a prediction of x's shape.
            null_class: the label of an example without a label.
            gains: how a prediction is read as a velocity, for a rule that acts on velocities.

        Returns:
            A network of the same form.

        Raises:
            UserError: if the network cannot be guided by this rule.
        """

    @abstractmethod
    def evaluations(self, t: float) -> int:
        """Return the network evaluations per sample of one guided evaluation at time t."""


@final
@guidances.register("none")
class Unguided(Guidance):
    """The conditional prediction, without guidance."""

    def guide(self, network: Network, null_class: int, gains: Gains = is_velocity) -> Network:
        """Return the network itself.

        Args:
            network: the network.
            null_class: not used.
            gains: not used.

        Returns:
            `network`.
        """
        return network

    def evaluations(self, t: float) -> int:
        return 1


@dataclass(frozen=True)
class Extrapolation(Guidance):
    """The prediction weak + scale (strong - weak) inside an interval of times, the strong prediction outside.

    Args:
        scale: of the extrapolation; 1 is the strong prediction alone.
        interval: the first and the last time, from noise to data, both included.

    Source: Kynkaanniemi et al. 2024 (arXiv 2404.07724) for the interval.
    """

    scale: float = 1.5
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"interval must be two times in order within [0, 1]; got {list(self.interval)}.")

    def applies(self, t: float) -> bool:
        """Whether the weak prediction is evaluated at time t."""
        return self.scale != 1 and self.interval[0] - SLACK <= t <= self.interval[1] + SLACK

    def evaluations(self, t: float) -> int:
        return 2 if self.applies(t) else 1

    def where_it_applies(self, strong: Network, guided: Network) -> Network:
        """Return the network that is `guided` at the times at which guidance applies, else `strong`."""

        def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            # Reading t waits for the device, so t is read only if the result depends on it.
            time = 0.0 if self.interval == (0.0, 1.0) else float(t.flatten()[0])
            return guided(x, t, y) if self.applies(time) else strong(x, t, y)

        return network


class Branches:
    """The conditional and the null prediction of a network, from one batched call, or from two if memory is too small.

    Args:
        network: maps x (b, ...), t (b,), y (b,) to a prediction of x's shape.
        null_class: the label of the null prediction.
    """

    def __init__(self, network: Network, null_class: int) -> None:
        self.network, self.null_class, self.apart = network, null_class, False

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        null = torch.full_like(y, self.null_class)
        if not self.apart:
            try:
                conditional, weak = self.network(torch.cat((x, x)), torch.cat((t, t)), torch.cat((y, null))).chunk(2)
                return conditional, weak
            except torch.OutOfMemoryError:
                # Memory is too small for all steps that follow, too.
                self.apart = True
        return self.network(x, t, y), self.network(x, t, null)


def need_null_class(name: str, network: Network, null_class: int) -> None:
    """Raise UserError unless the network takes labels and was trained with the null class too.

    Args:
        name: of the guidance, for the message.
        network: the network; its attribute `class_dropout`, if any, says how often training dropped the label.
        null_class: the number of classes; 0 for a network without labels.

    Raises:
        UserError: without labels, or with class_dropout 0.
    """
    if null_class == 0:
        raise UserError(f"guidance {name!r} needs class labels, and this network has none: use guidance 'none'.")
    if getattr(network, "class_dropout", None) == 0:
        raise UserError(
            f"guidance {name!r} needs a network trained with class_dropout > 0: it never saw the null class."
        )


@final
@guidances.register("cfg")
@dataclass(frozen=True)
class ClassifierFree(Extrapolation):
    """Classifier-free guidance: null + scale (conditional - null), which tempers p_t(x) p_t(y | x)^scale.

    Both branches are one batched call.

    Args:
        scale: 1 is no guidance; the paper's tables have 1.5.
        interval: the times at which guidance applies.
        channels: how many of the first channels are guided; None is all.  3 reproduces the official code on latents of 4
            channels, where scale 1.5 on 3 channels is about 1.375 on all 4 (according to the authors of DiT).
        rescale: in [0, 1].  The guided velocity is multiplied by 1 + rescale (std(conditional) / std(guided) - 1), with the
            standard deviations of each sample's velocity over all its dimensions: 1 restores the contrast of the
            conditional velocity.

    Source: Ho and Salimans 2022 (arXiv 2207.12598); SiT section 3.5.  `rescale`: Lin et al. 2023 (arXiv 2305.08891), Eq. 15
    and 16, where it acts on the v prediction, the velocity of `gvp` up to a constant.
    """

    channels: int | None = None
    rescale: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels is not None:
            require_within(1, 2**20, channels=self.channels)
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale must lie in [0, 1]; got {self.rescale:g}.")

    def guide(self, network: Network, null_class: int, gains: Gains = is_velocity) -> Network:
        import torch

        need_null_class(self.name, network, null_class)
        branches = Branches(network, null_class)

        def guided(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            conditional, null = branches(x, t, y)
            mixed = null + self.scale * (conditional - null)
            if self.channels is not None:
                mixed = torch.cat((mixed[:, : self.channels], conditional[:, self.channels :]), 1)
            if self.rescale == 0:
                return mixed
            p, q = gains(x, t)
            velocity = p * mixed + q * x
            std, wanted = std_over_features(velocity), std_over_features(p * conditional + q * x)
            # A velocity without contrast stays as it is.
            factor = torch.where(std > 0, wanted / std, 1.0) - 1
            return (mixed + self.rescale * factor * velocity / p).to(mixed.dtype)

        return self.where_it_applies(network, guided)


def std_over_features(v: Tensor) -> Tensor:
    """Return the standard deviation of each sample over its dimensions: (b, ...) -> (b, 1, ..., 1)."""
    return v.flatten(1).std(1, correction=0).reshape(-1, *[1] * (v.ndim - 1))


@final
@guidances.register("cfg-zero")
@dataclass(frozen=True)
class ClassifierFreeZero(Extrapolation):
    """CFG-Zero*: s null + scale (conditional - s null) on velocities, s = <conditional, null> / |null|^2 per sample.

    s null is the part of the conditional velocity along the null velocity, so the size of the null branch has no effect.
    It is meant for ODE samplers.

    Args:
        scale: of the extrapolation; 1 is the conditional prediction alone.
        interval: the times at which guidance applies.
        zero_until: before this time the velocity is zero and the network is not evaluated.  The paper's first K of N
            uniform steps ("zero-init", for networks that are poor near pure noise) are zero_until = K / N.

    Source: Fan et al. 2025 (arXiv 2503.18886), Algorithm 1.
    """

    zero_until: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.zero_until < 1:
            raise ValueError(f"zero_until must lie in [0, 1); got {self.zero_until:g}.")

    def evaluations(self, t: float) -> int:
        return 0 if t < self.zero_until - SLACK else super().evaluations(t)

    def guide(self, network: Network, null_class: int, gains: Gains = is_velocity) -> Network:
        need_null_class(self.name, network, null_class)
        branches = Branches(network, null_class)

        def guided(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            import torch

            conditional, null = branches(x, t, y)
            p, q = gains(x, t)
            strong, weak = p * conditional + q * x, p * null + q * x
            along, square = (
                (weak * other).flatten(1).sum(1).reshape(-1, *[1] * (x.ndim - 1)) for other in (strong, weak)
            )
            weak = torch.where(square > 0, along / square, 1.0) * weak
            return (conditional + (self.scale - 1) * (strong - weak) / p).to(conditional.dtype)

        applied = self.where_it_applies(network, guided)
        if self.zero_until == 0:
            return applied

        def zero_at_first(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            if self.evaluations(float(t.flatten()[0])) > 0:
                return applied(x, t, y)
            p, q = gains(x, t)
            return (-q / p * x).to(x.dtype)

        return zero_at_first


@final
@guidances.register("autoguidance")
@dataclass(frozen=True)
class Autoguidance(Extrapolation):
    """Autoguidance: weak + scale (strong - weak), where weak is the network of another run with the same label.

    The weak network is a smaller model, or an earlier checkpoint of the same run, with the same interpolant and target.
    A guided evaluation counts one evaluation of each network, whatever their sizes.  Only a bound copy (`bind`) can guide.

    Args:
        scale: of the extrapolation; 1 is the strong prediction alone.
        interval: the times at which guidance applies.
        run: the folder or the full name of the other run.
        step: the step of its checkpoint.
        weights: "ema" or "raw".

    Source: Karras et al. 2024 (arXiv 2406.02507), Eq. 5.
    """

    run: str = ""
    step: int | None = None
    weights: Weights = "ema"

    # The weak network, of a bound copy alone.
    _weak: ClassVar[Any] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step is not None:
            require_within(0, 10**12, step=self.step)

    def guide(self, network: Network, null_class: int, gains: Gains = is_velocity) -> Network:
        from sitkit.transport.field import Counted

        if self._weak is None:
            raise UserError(
                "guidance 'autoguidance' needs a second network: sample a run with guidance.run and guidance.step set, "
                "or bind it (`guidance.bind(run)`)."
            )
        second = network.beside(self._weak) if isinstance(network, Counted) else self._weak

        def guided(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            weak = second(x, t, y)
            return weak + self.scale * (network(x, t, y) - weak)

        return self.where_it_applies(network, guided)

    def bind(self, run: Measures) -> Self:
        if not self.run or self.step is None:
            # Without the step the identity of the samples would not name the weights.
            raise UserError(
                "guidance 'autoguidance' needs guidance.run, the name of another run, and guidance.step, one of its "
                "checkpoints' steps."
            )
        field, weak = run.field, run.load_field(self.run, self.step, self.weights)
        for quantity, own, other in (
            ("interpolant", field.interpolant, weak.interpolant),
            ("target", field.target, weak.target),
            ("number of classes", field.null_class, weak.null_class),
        ):
            if own != other:
                raise UserError(
                    f"guidance.run {self.run!r} has another {quantity} than the run that it guides ({other}, not {own}): "
                    f"choose a run with the same {quantity}."
                )
        bound = dataclasses.replace(self)
        object.__setattr__(bound, "_weak", weak.network)
        return bound
