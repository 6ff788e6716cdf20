"""The laws of backbones, losses and autoencoders."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from sitkit.data.dataset import Examples, in_memory
from sitkit.models.autoencoder import Autoencoder
from sitkit.models.backbone import Backbone
from sitkit.models.loss import Batch, Loss
from sitkit.registry import backbones, interpolants, targets, weightings
from sitkit.runtime.errors import UserError
from sitkit.runtime.rng import sample_keys
from sitkit.testing.law import NotShown, close, law, lawful

CLASSES = 3
# Shapes of states; every backbone for images or for points takes at least one of them.
SHAPES = ((1, 8, 8), (3, 16, 16), (4, 32, 32), (3, 64, 64), (2,))


def build_network(backbone: Backbone, seed: int = 0, num_classes: int = CLASSES) -> tuple[nn.Module, tuple[int, ...]]:
    """Build the network for the first shape that the backbone takes.

    Args:
        backbone: a backbone.
        seed: the seed of the weights, 0 by default.
        num_classes: the number of classes, 3 by default.

    Returns:
        The network, and the shape of a state, as (3, 16, 16) or (2,).

    Raises:
        NotShown: the backbone takes none of the shapes, or is not trained.
    """
    if not backbone.trainable:
        raise NotShown(f"{backbone.name} is not trained")
    reasons = []
    for shape in SHAPES:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                return backbone.build(shape, num_classes), shape
            except UserError as error:
                reasons.append(str(error))
    raise NotShown(f"{backbone.name} takes none of {SHAPES}: {reasons[0]}")


def perturbed(network: nn.Module) -> nn.Module:
    """Add noise to every weight and return the network: a head that begins at zero would hide the layers before it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network


def _inputs(shape: tuple[int, ...], rows: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, *shape, generator=generator)
    return x, torch.rand(rows, generator=generator), torch.arange(rows) % (CLASSES + 1)


@lawful(Backbone)
def interface(backbone: Backbone) -> None:
    """network(x, t, y) is finite and has x's shape and dtype, also for the null class and without classes."""
    network, shape = build_network(backbone)
    who = backbone.name
    law(getattr(network, "num_classes", None) == CLASSES, f"{who}: the network has num_classes, the null class")
    dropout = getattr(network, "class_dropout", None)
    is_share = isinstance(dropout, float | int) and 0 <= dropout <= 1
    law(is_share, f"{who}: the network has class_dropout; it is {dropout}")
    bare, _ = build_network(backbone, num_classes=0)
    for module, labels in ((network, None), (bare, 0)):
        x, t, y = _inputs(shape)
        before = x.clone()
        out = module(x, t, y if labels is None else torch.zeros_like(y))
        law(out.shape == x.shape and out.dtype == x.dtype, f"{who}: of x's shape and dtype")
        law(out.isfinite(), f"{who}: finite")
        law(x == before, f"{who}: x is not changed")


@lawful(Backbone)
def conditioned(backbone: Backbone) -> None:
    """The prediction depends on x, on t and on the label, and on nothing random."""
    network, shape = build_network(backbone)
    perturbed(network)
    x, t, y = _inputs(shape)
    out = network(x, t, y)
    others = {"x": (x + 1, t, y), "t": (x, 1 - t, y), "the label": (x, t, (y + 1) % (CLASSES + 1))}
    for argument, changed in others.items():
        law((out != network(*changed)).any(), f"{backbone.name}: the prediction depends on {argument}")
    law(out == network(x, t, y), f"{backbone.name}: nothing inside is random, in training either")


@lawful(Backbone)
def each_row_alone(backbone: Backbone) -> None:
    """A prediction does not depend on the rest of the batch."""
    network, shape = build_network(backbone)
    perturbed(network).eval()
    x, t, y = _inputs(shape)
    whole = network(x, t, y)
    for row in range(len(x)):
        alone = network(x[row : row + 1], t[row : row + 1], y[row : row + 1])
        # float32 sums of up to 1e4 terms in another order.
        close(alone, whole[row : row + 1], 1e-3, f"{backbone.name}: row {row} alone")


@lawful(Backbone)
def seeded(backbone: Backbone) -> None:
    """Weights come from torch's global generator: equal seeds give equal weights, other seeds give other weights."""
    first, again, other = (build_network(backbone, seed)[0].state_dict() for seed in (0, 0, 1))
    law(all(torch.equal(first[k], again[k]) for k in first), f"{backbone.name}: equal seeds, equal weights")
    law(any(not torch.equal(first[k], other[k]) for k in first), f"{backbone.name}: other seeds, other weights")


@lawful(Backbone)
def trainable(backbone: Backbone) -> None:
    """A gradient reaches every parameter that requires one."""
    network, shape = build_network(backbone)
    perturbed(network)(*_inputs(shape)).square().mean().backward()
    without = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    law(not without, f"{backbone.name}: no gradient reaches {', '.join(without[:3])}")


@lawful(Backbone)
def saved(backbone: Backbone) -> None:
    """Its weights, saved as safetensors and loaded into another network, give the same prediction."""
    network, shape = build_network(backbone)
    perturbed(network).eval()
    state = {name: tensor.contiguous().clone() for name, tensor in network.state_dict().items()}
    other = build_network(backbone, 1)[0].eval()
    other.load_state_dict(load(save(state)))
    inputs = _inputs(shape)
    law(network(*inputs) == other(*inputs), f"{backbone.name}: loaded weights predict as the saved ones")


@lawful(Backbone)
def refusals(backbone: Backbone) -> None:
    """Shapes that it cannot take are refused by a UserError at `build`, never by a traceback later."""
    accepted = build_network(backbone)[1]
    for shape in ((1, 8, 8), (3, 16, 16), (1, 7, 9), (5,)):
        with torch.random.fork_rng(devices=[]):
            try:
                network = backbone.build(shape, CLASSES)
            except UserError:
                continue
            out = network(*_inputs(shape))
        law(out.shape == (4, *shape), f"{backbone.name}: states of {shape} are refused, or predicted whole")
    flops = backbone.flops(accepted)
    law(flops is None or flops > 0, f"{backbone.name}: flops are positive or None; they are {flops}")


@contextlib.contextmanager
def watched(network: nn.Module, names: tuple[str, ...], loss: str) -> Iterator[dict[str, Tensor]]:
    """Yield the outputs of a network's modules by name, from its latest call."""
    hidden: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, given, out: hidden.update({name: out})

    modules = dict(network.named_modules())
    for name in names:
        law(name in modules, f"{loss}: reads {name!r}, but the network has no such module")
    hooks = [modules[name].register_forward_hook(keep(name)) for name in names]
    try:
        yield hidden
    finally:
        for hook in hooks:
            hook.remove()


def examples_like(shape: tuple[int, ...]) -> Examples:
    """Return 32 random examples of a shape with labels, for components that are prepared with data."""
    x = torch.randn(32, *shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    labels = torch.arange(32) % CLASSES
    return in_memory(x.numpy(), labels.numpy(), tuple(f"class {k}" for k in range(CLASSES)), holdout=0.25)


def suited(loss: Loss) -> tuple[Loss, nn.Module, nn.Module | None, tuple[int, ...]]:
    """Return the loss bound to data, a small network that it takes, its own parts, and the shape of a state.

    The network is sit-xs/2 or a plugin's backbone.  Raises NotShown with the reason if the loss takes none of them.
    """
    reasons = []
    for name in ("sit-xs/2", *(n for n in backbones.names() if backbones.plugin(n) is not None)):
        try:
            network, shape = build_network(backbones.create(name))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                bound = loss.prepare(examples_like(shape))
                return bound, perturbed(network), bound.build(network, shape, CLASSES), shape
        except (UserError, NotShown) as error:
            reasons.append(str(error))
    raise NotShown(f"{loss.name} takes no network here: {reasons[0]}")


def _evaluate(loss: Loss, rows: slice = slice(None)) -> tuple[Tensor, nn.Module, nn.Module | None]:
    loss, network, parts, shape = suited(loss)
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 6, *shape, generator=generator)
    t, y = torch.rand(6, generator=generator), torch.arange(6) % (CLASSES + 1)
    keys = sample_keys(0, torch.arange(6))
    linear, velocity, weight = interpolants.create("linear"), targets.create("velocity"), weightings.create("velocity")
    with watched(network, loss.hidden, loss.name) as hidden:
        data, noise, t, y, keys = (values[rows] for values in (data, noise, t, y, keys))
        batch = Batch(network, linear, velocity, weight, data, noise, t, y, keys, parts, hidden)
        return loss.per_example(batch), network, parts


@lawful(Loss)
def per_example(loss: Loss) -> None:
    """A finite number in float32 for each example, which depends on that example alone."""
    whole = _evaluate(loss)[0]
    who = loss.name
    law(whole.shape == (6,) and whole.dtype == torch.float32, f"{who}: (b,) in float32; it is {tuple(whole.shape)}")
    law(whole.isfinite(), f"{who}: finite")
    close(_evaluate(loss, slice(2, 4))[0], whole[2:4], 1e-3, f"{who}: an example's loss does not depend on its batch")


@lawful(Loss)
def reproducible(loss: Loss) -> None:
    """Equal keys give an equal loss, and torch's own generator is not used."""
    first = _evaluate(loss)[0]
    torch.rand(3)
    state = torch.random.get_rng_state()
    law(first == _evaluate(loss)[0], f"{loss.name}: equal keys give an equal loss")
    law(torch.equal(state, torch.random.get_rng_state()), f"{loss.name}: torch's generator is not used")


@lawful(Loss)
def teaches(loss: Loss) -> None:
    """Its gradient reaches the network and the loss's own parts."""
    value, network, parts = _evaluate(loss)
    value.mean().backward()
    reached = sum(p.grad is not None for p in network.parameters())
    law(reached > 0, f"{loss.name}: a gradient reaches the network")
    own = [] if parts is None else [n for n, p in parts.named_parameters() if p.requires_grad and p.grad is None]
    law(not own, f"{loss.name}: a gradient reaches its own parts; none reaches {', '.join(own[:3])}")


def _encoded(autoencoder: Autoencoder) -> tuple[Tensor, Tensor]:
    for shape in ((3, 32, 32), (3, 64, 64), (1, 32, 32), (1, 8, 8), (4, 32, 32)):
        x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        try:
            autoencoder.latent_shape(shape)
            with torch.no_grad():
                return x, autoencoder.encode(x)
        except UserError as error:
            reason = str(error)
    raise NotShown(reason)


@lawful(Autoencoder)
def latents(autoencoder: Autoencoder) -> None:
    """encode gives finite latents of the shape `latent_shape`, and decode gives x's shape again."""
    x, z = _encoded(autoencoder)
    who, shape = autoencoder.name, autoencoder.latent_shape(tuple(x.shape[1:]))
    law(tuple(z.shape) == (len(x), *shape), f"{who}: latents have the shape {shape}; they have {tuple(z.shape[1:])}")
    law(z.isfinite(), f"{who}: latents are finite")
    with torch.no_grad():
        back, again, alone = autoencoder.decode(z), autoencoder.decode(z), autoencoder.decode(z[1:2])
    law(back.shape == x.shape, f"{who}: a decoded latent has x's shape; it has {tuple(back.shape[1:])}")
    law(back == again, f"{who}: decoding is not random")
    close(alone, back[1:2], 1e-3, f"{who}: each latent is decoded alone")
