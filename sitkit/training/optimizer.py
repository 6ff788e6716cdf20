"""The optimizer: AdamW with a schedule and gradient clipping; optionally it skips gradients that are not finite."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from sitkit.runs.config.schema import TrainSettings
from sitkit.training.parallel import whole


class Optimization:
    """The optimizer and its schedule, both from torch."""

    def __init__(self, parameters: Iterable[nn.Parameter], settings: TrainSettings) -> None:
        self.parameters, self.settings = [p for p in parameters if p.requires_grad], settings
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
        )
        self.schedule = schedule(self.optimizer, settings)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self) -> Tensor:
        """Take a step with the current gradients, clear them, and return their norm () before clipping.

        The call does not wait for the device.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = whole(nn.utils.get_total_norm(gradients))
        if self.settings.clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.settings.clip, norm)
        if self.settings.nonfinite == "skip":
            # The interface of gradient scaling: if this is 1, the fused kernel does not change weights and moments.
            self.optimizer.found_inf = (~norm.isfinite()).float()  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


def schedule(optimizer: torch.optim.Optimizer, settings: TrainSettings) -> lr_scheduler.LRScheduler:
    """Return the schedule: step k = 0, 1, ... of a warm-up of w steps has the rate lr (k + 1) / w; the fraction `decay` of
    the steps, at the end, goes from lr to lr_end.
    """
    steps, rise = settings.steps, max(settings.warmup - 1, 0)
    fall = 0 if settings.schedule == "constant" else max(0, min(round(steps * settings.decay), steps - rise))
    phases: dict[int, lr_scheduler.LRScheduler] = {}
    if rise:
        phases[0] = lr_scheduler.LinearLR(optimizer, 1 / settings.warmup, 1.0, rise)
    if not fall or rise < steps - fall:
        phases[rise] = lr_scheduler.ConstantLR(optimizer, 1.0)
    if fall and settings.schedule == "linear":
        phases[steps - fall] = lr_scheduler.LinearLR(optimizer, 1.0, settings.lr_end / settings.lr, fall)
    elif fall:
        phases[steps - fall] = lr_scheduler.CosineAnnealingLR(optimizer, fall, settings.lr_end)
    return lr_scheduler.SequentialLR(optimizer, list(phases.values()), list(phases)[1:])
