"""An SDE on any time grid as torchsde sees it: in step index, s = 0..N, with steps of 1.

With x(s) = X(t_s), a step from s to s + 1 has drift h (v + w s / 2) and diffusion sqrt(h w) with h = t_{s+1} - t_s, driven by
increments (W(t_{s+1}) - W(t_s)) / sqrt(h) of unit variance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchsde import BaseBrownian

from sitkit.solvers.brownian import brownian_increments
from sitkit.solvers.sampler import Problem
from sitkit.solvers.sde import diffusion_at


class StepIndexSDE:
    """Drift and diffusion in step index, from one reading of the field per step."""

    noise_type = "diagonal"
    sde_type = "ito"

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._checked: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def f_and_g(self, s: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (h (v + w s / 2), sqrt(h w)) at step s, each (b, size)."""
        if self._checked is not None and self._checked[0] is x:
            return self._checked[1]
        times, index = self.problem.plan.times, int(s)
        t, h = float(times[index]), float(times[index + 1] - times[index])
        w = diffusion_at(self.problem, t)
        state = x.view_as(self.problem.x)
        reading = self.problem.field.read(state, torch.tensor(t, dtype=x.dtype), self.problem.y)
        drift = h * (reading.velocity + w / 2 * reading.score).flatten(1)
        both = drift.to(x.dtype), torch.full_like(x, (h * w) ** 0.5)
        # torchsde evaluates the first state to check shapes, then steps from the same tensor: this evaluation is kept.
        self._checked = (x, both) if index == 0 else None
        return both


class PathIncrements(BaseBrownian):
    """Increments of unit variance of the samples' Brownian paths over the steps of a grid."""

    def __init__(self, keys: Tensor, x: Tensor, times: Tensor) -> None:
        self._x, self._times, self._step = x.flatten(1), times.tolist(), 0
        self._increments = brownian_increments(keys, self._x, times)

    def __call__(self, ta: Any, tb: Any = None, return_U: bool = False, return_A: bool = False) -> Tensor:
        left, right = int(ta), int(tb)
        if left != self._step or right != left + 1:
            raise ValueError(f"steps must come in order; got {left} to {right} at step {self._step}.")
        self._step = right
        return next(self._increments) / (self._times[right] - self._times[left]) ** 0.5

    def __repr__(self) -> str:
        return f"PathIncrements(steps={len(self._times) - 1})"

    @property
    def dtype(self) -> torch.dtype:
        return self._x.dtype

    @property
    def device(self) -> torch.device:
        return self._x.device

    @property
    def shape(self) -> torch.Size:
        return self._x.shape

    @property
    def levy_area_approximation(self) -> str:
        return "none"
