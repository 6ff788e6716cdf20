"""Guidance: a stronger prediction extrapolated away from a weaker one.

All readings are affine in the prediction at fixed x, so combining predictions with weights that sum to one is combining
velocities, scores or data alike, whatever the target.  Where weights do not sum to one (`rescale`, `cfg-zero`) the space
matters: those act on the velocity, velocity = p prediction + q x with (p, q) from `velocity_gains`, so that they
too mean the same for every target.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeAlias, final

from sitkit.registry import Component, guidances
from sitkit.runtime.errors import UserError
from sitkit.transport.target import Target, Velocity, determinant

Weights = Literal["ema", "raw"]

if TYPE_CHECKING:
    from torch import Tensor

    from sitkit.registry.measures import Measures
    from sitkit.transport.field import Network
    from sitkit.transport.interpolant import Interpolant

# (x, t) -> (p, q), each a number or shaped to multiply x.
Gains: TypeAlias = "Callable[[Tensor, Tensor], tuple[Tensor | float, Tensor | float]]"

# Networks get the time in the state's dtype: a float32 time lies up to 6e-8 beside the planned one.
SLACK = 1e-6


def is_velocity(x: Tensor, t: Tensor) -> tuple[float, float]:
    """(1, 0): the prediction is the velocity."""
    return 1.0, 0.0


def velocity_gains(interpolant: Interpolant, target: Target) -> Gains:
    """(p, q) of velocity = p prediction + q x: p = det_v / det, q = (a d_sigma - b d_alpha) / det.

    Of two times (b, 2) the first is the one that x is at.
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
    """A rule that turns a network into a guided network."""

    @abstractmethod
    def guide(self, network: Network, null_class: int, gains: Gains = is_velocity) -> Network:
        """network(x, t, y) with guidance; raises UserError where the network cannot be guided so.

        gains: how a prediction reads as a velocity, for a rule to which that matters.
        """

    @abstractmethod
    def evaluations(self, t: float) -> int:
        """Network evaluations per sample that one guided evaluation at time t spends."""


@final
@guidances.register("none")
@dataclass(frozen=True)
class Unguided(Guidance):
    """The conditional prediction as it is."""

    def guide(self, network: Network, null_class: int, gains: Gains = is_velocity) -> Network:
        return network

    def evaluations(self, t: float) -> int:
        return 1


@dataclass(frozen=True)
class Extrapolation(Guidance):
    """weak + scale (strong - weak) inside `interval`; outside it, and where scale is 1, the strong prediction alone.

    interval: times, noise to data, both included (Kynkaanniemi et al. 2024, arXiv 2404.07724).
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
        """`guided` at the times at which it applies, else `strong`."""

        def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            # Reading t waits for the device, so it is read only where the answer depends on it.
            time = 0.0 if self.interval == (0.0, 1.0) else float(t.flatten()[0])
            return guided(x, t, y) if self.applies(time) else strong(x, t, y)

        return network


class Branches:
    """The conditional and the null prediction of a network from one batched call, or two where memory does not allow it."""

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
                # Once is enough to know it for every step that follows.
                self.apart = True
        return self.network(x, t, y), self.network(x, t, null)


def need_null_class(name: str, network: Network, null_class: int) -> None:
    """UserError unless the network knows labels and was trained without them too."""
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
    """null + scale (conditional - null) (Ho and Salimans 2022; SiT section 3.5): p_t(x) p_t(y | x)^scale.

    `channels` guides the first so many channels only: 3 reproduces the official code on 4-channel latents, where the
    paper's scale 1.5 on 3 channels does about what 1.375 does on all 4 (DiT's authors).  `rescale` multiplies the guided
    velocity by 1 + rescale (std(conditional) / std(guided) - 1), the standard deviations those of each sample's velocity
    over all its dimensions: 1 restores the conditional's contrast (Lin et al. 2023, arXiv 2305.08891, Eq. 15 and 16, who
    measure it on the v prediction, the velocity of `gvp` up to a constant).  Both branches are one batched call.
    """

    channels: int | None = None
    rescale: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"channels must be at least 1; got {self.channels}.")
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
            ours, theirs = std_over_features(velocity), std_over_features(p * conditional + q * x)
            # A velocity without contrast has none to restore.
            factor = torch.where(ours > 0, theirs / ours, 1.0) - 1
            return (mixed + self.rescale * factor * velocity / p).to(mixed.dtype)

        return self.where_it_applies(network, guided)


def std_over_features(v: Tensor) -> Tensor:
    """Each sample's standard deviation over its dimensions: (b, ...) -> (b, 1, ..., 1)."""
    return v.flatten(1).std(1, correction=0).reshape(-1, *[1] * (v.ndim - 1))


@final
@guidances.register("cfg-zero")
@dataclass(frozen=True)
class ClassifierFreeZero(Extrapolation):
    """s null + scale (conditional - s null) on velocities, s = <conditional, null> / |null|^2 for each sample (CFG-Zero*).

    s null is the part of the conditional velocity along the null one, so that a null branch of the wrong size does not
    push.  For t < `zero_until` the velocity is zero and nothing is evaluated: the paper's first K of N uniform steps
    ("zero-init", for networks that are poor near pure noise) is zero_until = K / N.  It is meant for ODE samplers.
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
    """weak + scale (strong - weak), weak being another run's network with the same label (Karras et al. 2024).

    run: the other run's folder or full name; step, weights: which of its checkpoints, "ema" or "raw".  A smaller model, or
    an earlier checkpoint of the same run, trained for the same interpolant and target.  Each guided evaluation counts
    one evaluation of either network, whatever their sizes.  Only a bound copy (`bind`) can guide.
    Source: arXiv 2406.02507, Eq. 5.
    """

    run: str = ""
    step: int | None = None
    weights: Weights = "ema"

    # The weak network, of a bound copy alone.
    _weak: ClassVar[Any] = None

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
            # Without the step the samples' identity would not say which weights made them.
            raise UserError(
                "guidance 'autoguidance' needs guidance.run, the name of another run, and guidance.step, one of its "
                "checkpoints' steps."
            )
        field, weak = run.field, run.load_field(self.run, self.step, self.weights)
        for what, ours, theirs in (
            ("interpolant", field.interpolant, weak.interpolant),
            ("target", field.target, weak.target),
            ("number of classes", field.null_class, weak.null_class),
        ):
            if ours != theirs:
                raise UserError(
                    f"guidance.run {self.run!r} has another {what} than the run it is to guide ({theirs}, not {ours}): "
                    "choose a run that shares it."
                )
        bound = dataclasses.replace(self)
        object.__setattr__(bound, "_weak", weak.network)
        return bound
