"""Losses and gradient norms since the last row of the log, kept on the device so that no step waits for it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sitkit.data.stream import indices
from sitkit.runs.checkpoint import latest_checkpoint
from sitkit.runs.config.schema import Config
from sitkit.runs.run_folder import RunFolder
from sitkit.runtime import rng
from sitkit.runtime.distributed import ProcessGroup
from sitkit.runtime.errors import WorkFailed
from sitkit.runtime.files import write_json
from sitkit.training.objective import TrainingInputs

# train.nonfinite=skip stops after this number of consecutive steps whose gradients are not finite.
SKIPS = 20


class LossWindow:
    """The losses of each example and the norms of the gradients, step by step, since the last summary."""

    def __init__(self, config: Config, inputs: TrainingInputs, folder: Path, group: ProcessGroup) -> None:
        self.config, self.inputs, self.folder, self.group = config, inputs, folder, group
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.skipped = 0

    def add(self, losses: Tensor, norm: Tensor) -> None:
        """Add the losses (b,) of the examples of this process, and the norm () of the gradient, of one step."""
        self.losses.append(losses)
        self.norms.append(norm)

    def summarise(self, step: int, saved: int) -> tuple[int, dict[str, float]]:
        """Return the number of steps since the last summary, and their mean loss and mean norm.

        This is the only place where training waits for the device.
        step: the latest step.  saved: the step of the last checkpoint.
        Raises WorkFailed if a loss or a gradient is not finite: with train.nonfinite=stop at the first step, with "skip"
        after 20 consecutive steps.  nonfinite-<step>.json then has losses, times and indices of the examples of that step.
        """
        means = self.group.mean(torch.stack([losses.mean() for losses in self.losses])).cpu()
        norms = torch.stack(self.norms).cpu()
        good = means.isfinite() & norms.isfinite()
        count, first = len(good), step - len(good)
        for i, finite in enumerate(good.tolist()):
            self.skipped = 0 if finite else self.skipped + 1
            if self.skipped > (0 if self.config.train.nonfinite == "stop" else SKIPS - 1):
                self._stop(first + i + 1, float(means[i]), float(norms[i]), self.losses[i], saved)
        values = {"loss": float(means[good].mean()), "grad_norm": float(norms[good].mean())}
        if self.config.train.nonfinite == "skip":
            values["skipped"] = float(count - good.sum())
        self.losses, self.norms = [], []
        return count, values

    def _stop(self, step: int, loss: float, norm: float, losses: Tensor, saved: int) -> None:
        path = self.folder / f"nonfinite-{step:08d}.json"
        losses_of_all = self.group.gather(losses.float().cpu())
        if self.group.lead:
            write_json(path, self._dump(step, loss, norm, torch.cat(losses_of_all)))
        else:
            # The lead raises the error for all processes and ends them.
            self.group.barrier()
        fault = f"gradient's norm became {norm}" if math.isfinite(loss) else f"loss became {loss}"
        newest = latest_checkpoint(RunFolder(self.folder).checkpoints)
        last = (
            f"The last good checkpoint is {newest} (step {saved})." if newest else "There is no checkpoint before it."
        )
        raise WorkFailed(
            f"The {fault} at step {step}. {last} The examples of that step are in {path}. "
            "Try a lower train.lr, train.clip=1.0, or another weight."
        )

    def _dump(self, step: int, loss: float, norm: float, losses: Tensor) -> dict[str, Any]:
        train = self.config.train
        positions = (step - 1) * train.batch + np.arange(train.batch)
        t = self.inputs.times(rng.sample_keys(train.seed, torch.from_numpy(positions)))
        data = self.inputs.examples
        index = indices(data, train.seed, positions)
        columns = {"position": positions, "index": index, "label": data.labels[index], "t": t, "loss": losses}
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        examples = [dict(zip(columns, row, strict=True)) for row in rows]
        return {"step": step, "loss": loss, "grad_norm": norm, "examples": examples}
