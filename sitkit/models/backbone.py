"""The contract of networks and the built-in backbones: a `Backbone` is the configuration, `build` returns the module.

Every network is called as `network(x, t, y)`: x (b, *shape), t (b,), y (b,) int64 -> (b, *shape).  y is between 0 and
`network.num_classes`, which is the null class (no label); without classes all y are 0.  A network has no randomness: the
training loop drops labels with probability `network.class_dropout`.

Importing this module does not import torch: `build` imports the networks.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, final

from sitkit.registry import Component, backbones
from sitkit.runtime.errors import UserError, require_within

if TYPE_CHECKING:
    from torch import nn

    from sitkit.data.dataset import Examples
    from sitkit.transport.interpolant import Interpolant
    from sitkit.transport.target import Target


# Bounds far above every use.
MOST_CHANNELS, MOST_LAYERS = 2**20, 10**4


@dataclass(frozen=True)
class Backbone(Component):
    """The configuration of a network.

    Class attribute `trainable`: False if the network is given and training does not change it.
    """

    trainable: ClassVar[bool] = True

    @abstractmethod
    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Return the network for states of `shape`, with attributes num_classes: int and class_dropout: float.

        Weights are drawn from torch's global generator.  Raises UserError if the network cannot take the shape.
        """

    def prepare(self, network: nn.Module, *, interpolant: Interpolant, target: Target, examples: Examples) -> nn.Module:
        """Return the network prepared for a path and for data; a trained network needs no preparation.

        Args:
            network: the result of `build`.
            interpolant: the path between noise and data.
            target: the quantity that the network predicts.
            examples: the data of the run.

        Returns:
            The prepared network; by default `network` itself.
        """
        return network

    def flops(self, shape: tuple[int, ...]) -> int | None:
        """Return the FLOPs of a forward pass for one sample; a multiply-add counts as two.  None: not known."""
        return None


@contextmanager
def limited(most: float, message: str) -> Iterator[None]:
    """Raise UserError with a message if the block makes more than `most` parameters of networks, or the memory is not enough.

    A layer's parameter is counted when its memory is promised and before a value is written to it.
    """
    from torch.nn.modules.module import register_module_parameter_registration_hook

    here, total = threading.get_ident(), 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal total
        if parameter is not None and threading.get_ident() == here:
            total += parameter.numel()
            if total > most:
                raise UserError(message)

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    except RuntimeError as error:
        # torch's error of the memory of a CPU has no type of its own.
        if "allocate memory" not in str(error):
            raise
        raise UserError(message) from None
    finally:
        hook.remove()


@final
@backbones.register("sit")
@dataclass(frozen=True)
class SiTBackbone(Backbone):
    """Scalable interpolant transformer: adaLN-Zero blocks, y = head(blocks(patches(x) + positions, t + label)).

    The defaults are SiT-XL/2.  Parameter names and shapes are the official ones.  The label table always has the row
    of the null class.  learn_sigma: the head has twice the channels and the second half is not read, as in the official
    checkpoints.  time_scale: a factor of t before its sinusoidal features, 1.0 in the paper.
    qk_norm: normalise queries and keys (RMS, per head).  checkpointing: recompute each block in the backward pass.

    Source: Ma et al. 2024 (arXiv 2401.08740), Table 9; Peebles and Xie 2022 (arXiv 2212.09748), section 3.2.
    """

    patch_size: int = 2
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    class_dropout: float = 0.1
    learn_sigma: bool = True
    time_scale: float = 1.0
    qk_norm: bool = False
    checkpointing: bool = False

    def __post_init__(self) -> None:
        require_within(
            1, MOST_CHANNELS, patch_size=self.patch_size, hidden_size=self.hidden_size, num_heads=self.num_heads
        )
        require_within(1, MOST_LAYERS, depth=self.depth)
        require_within(0, 1024, mlp_ratio=self.mlp_ratio)
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads; got {self.hidden_size} and {self.num_heads}."
            )
        if self.hidden_size % 4:
            raise ValueError(
                f"hidden_size must be a multiple of 4 (sine and cosine of two axes); got {self.hidden_size}."
            )
        if int(self.hidden_size * self.mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio must leave at least one unit; got {self.mlp_ratio}.")
        _conditioning(self.class_dropout, self.time_scale)

    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        from sitkit.models.sit import SiT

        return SiT(_image(shape, self.patch_size), num_classes, **vars(self))

    def flops(self, shape: tuple[int, ...]) -> int:
        from sitkit.models.sit import flops

        return flops(_image(shape, self.patch_size), self)


@final
@backbones.register("mlp")
@dataclass(frozen=True)
class MLPBackbone(Backbone):
    """Residual perceptron for points of any shape: h <- h + W silu(h + time + label), y = W silu(h), W = 0 at first.

    time_scale: a factor of t before its Fourier features cos(pi k t), sin(pi k t), k = 1, 2, 4, ..., 32.
    """

    hidden_size: int = 128
    depth: int = 3
    class_dropout: float = 0.1
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        require_within(1, MOST_CHANNELS, hidden_size=self.hidden_size)
        require_within(1, MOST_LAYERS, depth=self.depth)
        _conditioning(self.class_dropout, self.time_scale)

    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        from sitkit.models.mlp import MLP

        return MLP(shape, num_classes, **vars(self))


@final
@backbones.register("exact")
@dataclass(frozen=True)
class ExactBackbone(Backbone):
    """The exact prediction, without training: y = E[a data + b noise | x_t = x, label] under the law of the data.

    law: "mixture" is the Gaussian mixture of the data set; "empirical" gives each training example, read without
    augmentation, the same probability: a network of unlimited capacity would learn this; "auto" is "mixture" if the data
    set states its law, else "empirical".  The computation is in float64.

    `build` returns a module that cannot be called; `prepare` returns the network.
    """

    trainable: ClassVar[bool] = False

    law: Literal["auto", "mixture", "empirical"] = "auto"

    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        from sitkit.models.exact import Unprepared

        return Unprepared(num_classes)

    def prepare(self, network: nn.Module, *, interpolant: Interpolant, target: Target, examples: Examples) -> nn.Module:
        """Return the network of the law.  Raises UserError if law is "mixture" and the data set states no law."""
        from sitkit.models.exact import Exact, empirical

        if self.law == "mixture" and examples.law is None:
            raise UserError(
                "backbone 'exact' with law 'mixture' needs a data set that states its law, such as 'gaussian-mixture'; "
                "this one has only examples. Use law 'empirical' or 'auto'."
            )
        law = None if self.law == "empirical" else examples.law
        return Exact(empirical(examples) if law is None else law, interpolant, target)


def _conditioning(class_dropout: float, time_scale: float) -> None:
    if not 0 <= class_dropout <= 1:
        raise ValueError(f"class_dropout must be between 0 and 1; got {class_dropout}.")
    if not 0 < time_scale < float("inf"):
        raise ValueError(f"time_scale must be positive and finite; got {time_scale}.")


def _image(shape: tuple[int, ...], patch_size: int) -> tuple[int, int, int]:
    size = "x".join(map(str, shape))
    if len(shape) != 3:
        raise UserError(
            f"backbone 'sit' takes images (channels, height, width), not states of shape {size}. Use 'mlp'."
        )
    channels, height, width = shape
    if height % patch_size or width % patch_size:
        sizes = ", ".join(str(p) for p in range(1, 17) if height % p == 0 and width % p == 0)
        raise UserError(
            f"backbone 'sit': an image of {height}x{width} (shape {size}) cannot be cut into patches of "
            f"patch_size = {patch_size}. A patch_size that divides both: {sizes}."
        )
    return channels, height, width


# Ma et al. 2024, Table 9.
_TABLE_9 = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
for _size, (_hidden_size, _depth, _num_heads) in _TABLE_9.items():
    for _patch in (2, 4, 8):
        _fields = {"patch_size": _patch, "hidden_size": _hidden_size, "depth": _depth, "num_heads": _num_heads}
        backbones.preset(f"sit-{_size}/{_patch}", of="sit", **_fields)

# A size for a laptop, not in the paper: on 8x8 digits, after the same time, a width of 96 is nearer to the data than 128.
for _patch in (1, 2, 4):
    _fields = {"patch_size": _patch, "hidden_size": 96, "depth": 4, "num_heads": 4, "learn_sigma": False}
    backbones.preset(f"sit-xs/{_patch}", of="sit", **_fields)
