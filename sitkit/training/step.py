"""One step of a training (`Training.step`), and the work that follows it (`due`)."""

from __future__ import annotations

import time
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
from sitkit.runtime.files import read_bytes, read_row, to_json, write_file
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
# Rates of the log, as the bar names them.
SHORT_NAMES = {"images_per_second": "images/s", "mfu": "mfu", "memory_gib": "GiB"}


class Due(NamedTuple):
    """The work that follows a training step, and whether it is the last step.

    log: a row of the log.  snapshot: a snapshot of the averages.  save: a checkpoint.  preview: a picture of samples.
    """

    log: bool
    snapshot: bool
    save: bool
    preview: bool
    last: bool


def due(config: Config, step: int) -> Due:
    """Return the work that follows a step; it depends on the settings alone.  Every checkpoint has a row of the log."""
    run, last = config.run, step == config.train.steps
    save = last or step % run.checkpoint_every == 0
    return Due(
        log=save or step % run.log_every == 0,
        snapshot=snapshot_due(config.train, step),
        save=save,
        preview=last or (run.sample_every > 0 and step % run.sample_every == 0),
        last=last,
    )


class Training:
    """The state of a training and everything that its steps need, on one process of a group.

    done: the number of steps taken.  saved: the step of the last checkpoint.
    """

    def __init__(
        self, config: Config, network: nn.Module, data: Prepared, folder: Path, group: ProcessGroup, progress: Progress
    ) -> None:
        self.config, self.network, self.data, self.group, self.progress = config, network.train(), data, group, progress
        self.folder, self.files = folder, RunFolder(folder)
        self.done = self.saved = 0
        objective = objective_of(config, network, data).to(group.device)
        compiled = group.device.type == "cuda" if config.run.compile == "auto" else config.run.compile
        self.parallelized = Parallelized(objective, group, config.run.parallel, compiled)
        self.averages = EMA(network, config.train.ema_decays, config.train.posthoc, warmup=config.train.ema_warmup)
        self.optimization = Optimization(objective.parameters(), config.train)
        self.state = TrainingState(objective, self.averages, self.optimization, group)
        self.inputs = TrainingInputs(config, network, data.examples, group.device, group.rank, group.size)
        precision = torch.bfloat16 if objective.bf16 else torch.float32
        self.throughput = Throughput(config.backbone.flops(data.shape), group, precision)
        self.window = LossWindow(config, self.inputs, folder, group)

    def resume(self) -> range:
        """Continue from the newest checkpoint of the folder, if it holds one, and return the steps that remain."""
        train, lead = self.config.train, self.group.lead
        if train.posthoc and lead:
            self.progress(Event("train", message=check_space(self.folder, train, self.network)))
        self.done = self.saved = self.state.resume(self.folder, self.config)
        if self.done:
            text = f"continuing {self.folder} at step {self.done}."
            self.progress(Event("train", self.done, train.steps, message=text))
        if not train.steps:
            # The initial network is saved too, so that it can be sampled and evaluated.
            self.save()
        if lead:
            # In this mode an existing file keeps its time: nothing was written.
            self.files.metrics.open("a").close()
            forget_rows(self.files.metrics, self.done)
        # A training that ended between a checkpoint and its picture draws the picture now.
        lost = self.done > 0 and due(self.config, self.done).preview and not self._picture.exists()
        if self.group.broadcast(lost):
            self.preview()
        return range(self.done, train.steps)

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

    def log(self) -> None:
        """Write the mean losses and the rates since the last call to the log, and report them.

        Raises WorkFailed for losses that are not finite.
        """
        count, losses = self.window.summarise(self.done, self.saved)
        rates = self.throughput.read(count * self.config.train.batch)
        if self.group.lead:
            row = {"step": self.done, "time": time.time(), **losses, "lr": self.lr, **rates}
            with self.files.metrics.open("a", encoding="utf-8") as file:
                file.write(to_json(row) + "\n")
        shown = {"loss": losses["loss"], **{SHORT_NAMES[key]: value for key, value in rates.items()}}
        self.progress(Event("train", self.done, self.config.train.steps, shown))

    def snapshot(self) -> None:
        """Write the power-function averages.  Every process calls it; the lead writes."""
        self.averages.snapshot(self.folder, self.done, getattr(torch, self.config.train.posthoc_dtype), self.group)

    def save(self) -> None:
        """Write a checkpoint.  Every process calls it; the lead writes."""
        self.state.save(self.folder, self.config, self.done)
        self.saved = self.done

    @property
    def _picture(self) -> Path:
        return self.files.previews / f"step-{self.done:08d}.png"

    def preview(self) -> None:
        """Write a picture of samples with averaged weights: a row for each class, or points in the plane.

        Other data have no preview.  Every process samples; the lead writes.
        """
        config, (examples, shape, num_classes), device = self.config, self.data, self.group.device
        if not (examples.is_image or examples.is_plane):
            return
        classes = torch.tensor(examples.present_classes or [0], device=device)
        n = min(len(classes), 10) * PREVIEW_COLUMNS if examples.is_image else 1000
        index = torch.arange(n, device=device)
        labels = classes[index // PREVIEW_COLUMNS if examples.is_image else index % len(classes)]
        # Points are drawn without labels, except by a network that needs them.
        y = labels if num_classes and (examples.is_image or self.inputs.dropout == 0) else None
        keys = rng.sample_keys(config.train.seed, torch.arange(n)).to(device)
        field = Field(self.network.eval(), config.interp, config.target, num_classes)
        with self.averages.applied():
            samples = Heun(steps=PREVIEW_STEPS).sample(field, rng.normal(keys, shape, rng.INITIAL), y, seeds=keys)
            if self.group.lead:
                show(config.autoencoder.decode(samples.x), y, examples, self._picture)
        self.network.train()


def forget_rows(path: Path, step: int) -> None:
    """Remove from a log the rows after `step`, which the training writes again, and rows that are damaged."""
    lines = read_bytes(path).splitlines(keepends=True)
    kept = [line for line in lines if (row := read_row(line)) is not None and row["step"] <= step]
    if kept != lines:
        write_file(path, b"".join(line.rstrip(b"\n") + b"\n" for line in kept))
