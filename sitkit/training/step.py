"""A training step: what it needs (`prepare`), what it does (`Training.step`), and what follows it (`due`)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from sitkit.data.stream import DataBatch
from sitkit.models.autoencoder import Prepared
from sitkit.runs.averages import check_space, snapshot_due
from sitkit.runs.config.schema import Config
from sitkit.runs.run_folder import RunFolder
from sitkit.runs.sample_set import show
from sitkit.runtime import rng
from sitkit.runtime.distributed import ProcessGroup
from sitkit.runtime.progress import Event, Progress
from sitkit.solvers.ode import Heun
from sitkit.training.divergence import LossWindow
from sitkit.training.ema import EMA
from sitkit.training.objective import TrainingInputs, objective_of
from sitkit.training.optimizer import Optimization
from sitkit.training.parallel import Parallelized
from sitkit.training.throughput import Throughput
from sitkit.training.training_state import TrainingState
from sitkit.transport.field import Field

PREVIEW_STEPS, PREVIEW_COLUMNS = 10, 8


class Due(NamedTuple):
    """What follows a training step: a row of the log, a snapshot of averages, a checkpoint, a preview; the end."""

    log: bool
    snapshot: bool
    save: bool
    preview: bool
    last: bool


def due(config: Config, step: int) -> Due:
    """Return what follows a step, a function of the settings alone.  Every checkpoint has a row of the log."""
    run, last = config.run, step == config.train.steps
    save = last or step % run.checkpoint_every == 0
    return Due(
        log=save or step % run.log_every == 0,
        snapshot=snapshot_due(config.train, step),
        save=save,
        preview=last or (run.sample_every > 0 and step % run.sample_every == 0),
        last=last,
    )


def prepare(
    config: Config, network: nn.Module, data: Prepared, folder: Path, group: ProcessGroup, progress: Progress
) -> Training:
    """Return the training of a network, at the newest checkpoint of its folder or at step 0."""
    training = Training(config, network, data, folder, group)
    if config.train.posthoc and group.lead:
        progress(Event("train", message=check_space(folder, config.train, network)))
    training.done = training.saved = training.state.resume(folder)
    if training.done:
        text = f"continuing {folder} at step {training.done}."
        progress(Event("train", training.done, config.train.steps, message=text))
    if not config.train.steps:
        # The initial network is sampled, measured and compared as any other.
        training.save()
    return training


class Training:
    """The state of a training and everything that its steps need, on one process of a group.

    done: the number of steps taken.  saved: the step of the last checkpoint.
    """

    def __init__(self, config: Config, network: nn.Module, data: Prepared, folder: Path, group: ProcessGroup) -> None:
        self.config, self.network, self.data, self.folder, self.group = config, network.train(), data, folder, group
        self.done = self.saved = 0
        objective = objective_of(config, network, data).to(group.device)
        compiled = group.device.type == "cuda" if config.run.compile == "auto" else config.run.compile
        self.parallelized = Parallelized(objective, group, config.run.parallel, compiled)
        self.averages = EMA(network, config.train.ema_decays, config.train.posthoc)
        self.optimization = Optimization(objective.parameters(), config.train)
        self.state = TrainingState(objective, self.averages, self.optimization, group)
        self.inputs = TrainingInputs(config, network, data.examples, group.device, group.rank, group.size)
        precision = torch.bfloat16 if objective.bf16 else torch.float32
        self.throughput = Throughput(config.backbone.flops(data.shape), group, precision)
        self.window = LossWindow(config, self.inputs, folder, group)

    def step(self, batch: DataBatch) -> None:
        """Accumulate gradients over the parts of a batch, then update weights and averages."""
        parts, losses = self.inputs(*batch).split(self.config.train.accumulate), []
        for part in parts:
            with self.parallelized.accumulating(last=part is parts[-1]):
                loss, each = self.parallelized(*part)
                (loss / len(parts)).backward()
            losses.append(each)
        self.lr = self.optimization.lr
        self.window.add(torch.cat(losses), self.optimization.step())
        self.done += 1
        self.averages.update(self.done)

    def summarise(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return the losses and the rates since the last call.  Raises WorkFailed for losses that are not finite."""
        count, losses = self.window.summarise(self.done, self.saved)
        return losses | {"lr": self.lr}, self.throughput.read(count * self.config.train.batch)

    def snapshot(self) -> None:
        """Write the power-function averages.  Every process calls it; the lead writes."""
        self.averages.snapshot(self.folder, self.done, getattr(torch, self.config.train.posthoc_dtype), self.group)

    def save(self) -> None:
        """Write a checkpoint.  Every process calls it; the lead writes."""
        self.state.save(self.folder, self.config, self.done)
        self.saved = self.done

    def preview(self) -> None:
        """Write a picture of samples with averaged weights: a row for each class, or points in the plane.

        Data that no picture shows have no preview.  Every process samples; the lead writes.
        """
        config, (examples, shape, num_classes), device = self.config, self.data, self.group.device
        if not (examples.is_image or examples.is_plane):
            return
        n = min(max(num_classes, 1), 10) * PREVIEW_COLUMNS if examples.is_image else 1000
        y = torch.arange(n, device=device) // PREVIEW_COLUMNS if examples.is_image and num_classes else None
        keys = rng.sample_keys(config.train.seed, torch.arange(n)).to(device)
        field = Field(self.network.eval(), config.interp, config.target, num_classes)
        with self.averages.applied():
            samples = Heun(steps=PREVIEW_STEPS).sample(field, rng.normal(keys, shape, rng.INITIAL), y, seeds=keys)
            if self.group.lead:
                path = RunFolder(self.folder).previews / f"step-{self.done:08d}.png"
                show(config.autoencoder.decode(samples.x), y, examples, path)
        self.network.train()
