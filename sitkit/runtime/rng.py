"""Random numbers that depend on the sample alone, not on the batch, the rank or the number of steps.

Every draw is a pure function of (key, node, element), computed by the counter-based generator Philox4x32-10
(Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in integer tensor operations: sample 17 is the same for
any batch size, number of processes and device.  `sample_keys(seed, index)` makes the keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_CACHED = 1 << 15
# Purposes of draws; draws with one key and different purposes are independent.
KEY, INITIAL, BROWNIAN, LABEL, TIME, TRAINING, DROPOUT, PROBE, DATA, POSTERIOR = range(10)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return four words in [0, 2^32) from a 128-bit counter and a 64-bit key: int64 tensors that broadcast, read modulo 2^32.

    A product wraps modulo 2^64 as int64; its halves are exact in the low 32 bits of itself and of its shift.  The higher bits
    are masked only before the next product and at the end.
    """
    c0, c1, c2, c3 = counter
    rounds = torch.arange(10, device=key[0].device).view(-1, *[1] * key[0].ndim)
    for k0, k1 in zip(key[0] + rounds * _WEYL[0], key[1] + rounds * _WEYL[1], strict=True):
        p0, p1 = (c0 & _MASK) * _MULTIPLIERS[0], (c2 & _MASK) * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1, (p0 >> 32) ^ c3 ^ k1, p0
    return c0 & _MASK, c1 & _MASK, c2 & _MASK, c3 & _MASK


def words(keys: Tensor, nodes: Tensor, count: int, purpose: int) -> Tensor:
    """Return words in [0, 2^32), (b, k, count) int64, for keys (b,) and nodes (k,), both int64."""
    groups = torch.arange((count + 3) // 4, device=keys.device)
    nodes = nodes.to(keys.device)[:, None]
    counter = (groups, nodes, groups.new_full((), purpose), nodes >> 32)
    four = philox(counter, (keys[:, None, None] >> 32, keys[:, None, None]))
    return torch.stack(torch.broadcast_tensors(*four)[:count], -1).flatten(2)[..., :count]


def sample_keys(seed: int, index: Tensor) -> Tensor:
    """Return the random key of each sample of a seed.

    Args:
        seed: the seed of the set of samples.
        index: the numbers of the samples, (b,) int64.

    Returns:
        The keys, (b,) int64.  Equal pairs of seed and number have equal keys.
    """
    high, low = words(torch.tensor([seed], device=index.device), index, 2, KEY)[0].unbind(-1)
    return (high << 32) | low


def normal(keys: Tensor, shape: tuple[int, ...], purpose: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw standard normal numbers that depend on the keys alone.

    Args:
        keys: a key for each sample, (b,) int64, as from `sample_keys`.
        shape: the shape of the draw for each key.
        purpose: a constant of `sitkit.runtime.rng`; draws of different purposes are independent.
        dtype: the type of the result, float32 by default.

    Returns:
        A tensor of shape (b, *shape).
    """
    flat = normals(keys, torch.zeros(1, dtype=torch.int64), math.prod(shape), purpose, dtype)
    return flat.reshape(len(keys), *shape)


def normals(keys: Tensor, nodes: Tensor, count: int, purpose: int, dtype: torch.dtype) -> Tensor:
    """Return standard normal draws, (b, k, count), for keys (b,) and nodes (k,), by Box and Muller in float64."""
    if len(nodes) > 1 and len(keys) * count > _CACHED:
        # Node by node the intermediate arrays stay in the processor's cache: 4 times faster at (64, 10, 4096).
        return torch.cat([normals(keys, node, count, purpose, dtype) for node in nodes.split(1)], 1)
    pairs = (words(keys, nodes, count + count % 2, purpose).double() + 0.5) / 2**32
    radius, angle = (-2 * pairs[..., 0::2].log()).sqrt(), 2 * math.pi * pairs[..., 1::2]
    both = torch.stack((radius * angle.cos(), radius * angle.sin()), -1)
    return both.flatten(2)[..., :count].to(dtype)


def uniform(keys: Tensor, purpose: int) -> Tensor:
    """Draw a uniform number for each key.

    Args:
        keys: a key for each sample, (b,) int64, as from `sample_keys`.
        purpose: a constant of `sitkit.runtime.rng`; draws of different purposes are independent.

    Returns:
        Numbers in (0, 1), (b,) float64.
    """
    return (words(keys, torch.zeros(1, dtype=torch.int64), 1, purpose)[:, 0, 0].double() + 0.5) / 2**32


def labels(keys: Tensor, num_classes: int) -> Tensor:
    """Return a class in [0, num_classes) for each key, int64."""
    return (words(keys, torch.zeros(1, dtype=torch.int64), 1, LABEL)[:, 0, 0] * num_classes) >> 32
