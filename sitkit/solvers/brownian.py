"""Brownian paths that refine: the path of a sample is the same on every grid."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sitkit.runtime.rng import BROWNIAN, normals


class BrownianPath:
    """W(t) on [0, 1] for each key, refined by bridges over halves of intervals: a finer grid refines the same path.

    Values at multiples of 2^-depth follow from the nodes of a binary tree; a time between two multiples takes one more
    bridge.  Times must be given in increasing order.  Memory is `depth` states for any number of times.  The law of the
    increments is exact if neighbouring times are at least 2^-depth apart.

    Args:
        keys: (b,) int64, each of a path.
        size: the number of dimensions of a path.
        dtype: of the values.
        depth: of the tree.
    """

    def __init__(self, keys: Tensor, size: int, dtype: torch.dtype, *, depth: int = 16) -> None:
        self.keys, self.size, self.dtype, self.depth = keys, size, dtype, depth
        zero = torch.zeros(len(keys), size, dtype=dtype, device=keys.device)
        end = self._draw([0])[:, 0]
        # Each entry: (level, index within the level, W at the left end, W at the right end).
        self._stack: list[tuple[int, int, Tensor, Tensor]] = [(0, 0, zero, end)]

    def _draw(self, nodes: list[int]) -> Tensor:
        return normals(self.keys, torch.tensor(nodes), self.size, BROWNIAN, self.dtype)

    def __call__(self, t: float) -> Tensor:
        """Return W(t), shape (b, size)."""
        while len(self._stack) > 1 and not 0 <= _place(t, *self._stack[-1][:2]) <= 1:
            self._stack.pop()
        nodes, (level, index, *_) = [], self._stack[-1]
        while level < self.depth and _place(t, level, index) not in (0, 1):
            nodes.append((1 << level) + index)
            level, index = level + 1, 2 * index + (_place(t, level, index) >= 0.5)
        inside = _place(t, level, index) not in (0, 1)
        if inside:
            nodes.append((1 << level) + index)
        draws = list(self._draw(nodes).unbind(1)) if nodes else []
        for draw in draws[: len(nodes) - inside]:
            self._halve(draw, t)
        level, index, left, right = self._stack[-1]
        place = _place(t, level, index)
        # lerp is exact at both ends: a node is the same to the bit from either side.
        value = torch.lerp(left, right, place)
        if inside:
            value = value + math.sqrt(place * (1 - place) / 2**level) * draws[-1]
        return value

    def _halve(self, draw: Tensor, t: float) -> None:
        level, index, left, right = self._stack[-1]
        middle = (left + right) / 2 + math.sqrt(0.25 / 2**level) * draw
        second = _place(t, level, index) >= 0.5
        self._stack.append((level + 1, 2 * index + second, *((middle, right) if second else (left, middle))))


def _place(t: float, level: int, index: int) -> float:
    """The place of t in the interval of a node of the tree: 0 at its left end, 1 at its right end, both exactly."""
    return t * 2**level - index


def path_on(keys: Tensor, x: Tensor, times: Tensor) -> BrownianPath:
    """Return the paths for states x (b, size) on a grid, deep enough for its shortest step."""
    shortest = float(times.diff().min())
    return BrownianPath(keys, x.shape[1], x.dtype, depth=max(16, math.ceil(-math.log2(shortest))))


def brownian_increments(keys: Tensor, x: Tensor, times: Tensor) -> Iterator[Tensor]:
    """Yield W(t_{i+1}) - W(t_i) of the path of each sample, step by step over a grid, each of x's shape (b, ...)."""
    path = path_on(keys, x.flatten(1), times)
    before = path(float(times[0]))
    for t in times[1:].tolist():
        value = path(t)
        yield (value - before).view_as(x)
        before = value
