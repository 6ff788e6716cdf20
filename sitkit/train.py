"""Training: the loop, from the first step or from where a kill left it."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sitkit import checkpoint, noise, span
from sitkit.config import Config, flat
from sitkit.data.dataset import Examples, batch
from sitkit.field import Field
from sitkit.loss import Batch
from sitkit.progress import Event, Progress, silent
from sitkit.registry import UserError, WorkFailed
from sitkit.run import (
    CHECKPOINTS,
    ENVIRONMENT,
    METRICS,
    build,
    environment,
    examples,
    folder_of,
    use_threads,
    write_config,
)
from sitkit.sample import show
from sitkit.sampler import Heun
from sitkit.tracking import Tracker
from sitkit.world import device_of

PREVIEW_STEPS, PREVIEW_COLUMNS = 10, 8


def train(config: Config, progress: Progress = silent) -> Path:
    """Train to config.train.steps and return the run's folder; continue where the folder already holds a checkpoint.

    On a CPU the result is the same to the bit however often the work was killed and run again.  Raises UserError before
    any work for what cannot be; WorkFailed where the loss is not finite, naming step, loss and last good checkpoint;
    KeyboardInterrupt after a checkpoint of the step that ctrl-C found.
    """
    use_threads(config)
    data = examples(config.data)
    device = device_of(config.run.device)
    folder = folder_of(config)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            _check_data(folder, data)
            write_config(folder, config)
            checkpoint.write_json(folder / ENVIRONMENT, environment(device) | {"data": data.fingerprint})
            tracker = Tracker(
                folder,
                name=folder.name,
                params=flat(config.plain()),
                tags={"sitkit.kind": "training", "sitkit.identity": folder.name.rpartition("-")[2]},
                artifacts=("previews/*.png", "config.yaml", ENVIRONMENT),
                enabled=config.run.track,
                on_warning=lambda text: progress(Event("train", message=text)),
            )
            with tracker:
                _loop(config, data, folder, device, progress)
    except Timeout:
        raise UserError(f"{folder} is being trained by another process.") from None
    return folder


def _check_data(folder: Path, data: Examples) -> None:
    path = folder / ENVIRONMENT
    if path.exists() and checkpoint.read_json(path).get("data", data.fingerprint) != data.fingerprint:
        raise UserError(
            f"The data of {folder} have changed since it was begun: give the old data, or remove the folder."
        )


def _loop(config: Config, data: Examples, folder: Path, device: torch.device, progress: Progress) -> None:
    settings = config.train
    network = build(config).to(device)
    parameters = [p for p in network.parameters() if p.requires_grad]
    if not config.backbone.trainable or not parameters:
        progress(Event("train", message=f"backbone {config.backbone.name!r} is given, not trained."))
        return
    ema = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )
    step = _resume(folder, network, ema, optimizer)
    if step:
        progress(Event("train", step, settings.steps, message=f"continuing {folder} at step {step}."))
    objective = Objective(config, network, data, device)
    losses: list[Tensor] = []
    saved, timed = step, time.monotonic()
    network.train()
    with metrics_from(folder / METRICS, step) as log, interruptible() as interrupted:
        while step < settings.steps and not interrupted.is_set():
            if settings.warmup:
                for group in optimizer.param_groups:
                    group["lr"] = settings.lr * min(1.0, (step + 1) / settings.warmup)
            loss = objective(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if settings.clip is not None:
                nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimizer.step()
            ema.update_parameters(network)
            losses.append(loss.detach())
            step += 1
            last = step == settings.steps
            save = last or step % config.run.checkpoint_every == 0
            if last or save or step % config.run.log_every == 0 or interrupted.is_set():
                mean = _mean_if_finite(losses, step, folder, saved)
                count = len(losses)
                losses.clear()
                rate, timed = count * settings.batch / (time.monotonic() - timed), time.monotonic()
                log({"step": step, "time": time.time(), "loss": mean, "images_per_second": rate})
                progress(Event("train", step, settings.steps, {"loss": mean, "images/s": rate}))
            if save or interrupted.is_set():
                _save(folder, config, step, network, ema, optimizer)
                saved = step
            if last or (config.run.sample_every and step % config.run.sample_every == 0):
                _preview(config, data, ema, folder, step, device)
                network.train()
        if interrupted.is_set() and step < settings.steps:
            raise KeyboardInterrupt


class Objective:
    """The loss of a step: a function of the weights and the step number alone."""

    def __init__(self, config: Config, network: nn.Module, data: Examples, device: torch.device) -> None:
        self.config, self.network, self.data, self.device = config, network, data, device
        self.span = span.trainable(config.interp, config.target, config.weight)
        self.dropout = float(getattr(network, "class_dropout", 0.0))

    def __call__(self, step: int) -> Tensor:
        """The mean loss over batch `step`."""
        config = self.config
        x, y, positions = batch(self.data, config.train.seed, step, config.train.batch)
        keys = noise.sample_keys(config.train.seed, torch.from_numpy(positions)).to(self.device)
        data, y = config.autoencoder.encode(x.to(self.device)), y.to(self.device)
        draws = noise.normal(keys, tuple(data.shape[1:]), noise.TRAINING)
        draws = config.coupling.pair(data, draws, y)
        t = config.timestep.map(noise.uniform(keys, noise.TIME)).clamp(*self.span).float()
        y = y.where(noise.uniform(keys, noise.DROPOUT) >= self.dropout, self.data.num_classes)
        path = config.interp, config.target, config.weight
        return config.loss.per_example(Batch(self.network, *path, data, draws, t, y, keys)).mean()


def _mean_if_finite(losses: list[Tensor], step: int, folder: Path, saved: int) -> float:
    values = torch.stack(losses).cpu()
    bad = (~values.isfinite()).nonzero().flatten()
    if len(bad):
        first = step - len(values) + int(bad[0]) + 1
        kept = checkpoint.latest(folder / CHECKPOINTS)
        raise WorkFailed(
            f"The loss became {float(values[bad[0]])} at step {first}. The last good checkpoint is "
            f"{kept or 'none'} (step {saved}). Try a lower train.lr, train.clip=1.0, or another weight."
        )
    return float(values.mean())


def _save(
    folder: Path, config: Config, step: int, network: nn.Module, ema: AveragedModel, optimizer: torch.optim.Optimizer
) -> None:
    tensors = {f"model.{k}": v for k, v in network.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.module.state_dict().items()}
    tensors |= {"averaged": ema.n_averaged} | checkpoint.optimizer_tensors(optimizer)
    header = {"format": 1, "step": step, "config": config.plain()}
    checkpoint.save(folder / CHECKPOINTS / f"step-{step:08d}.safetensors", tensors, header)
    checkpoint.prune(folder / CHECKPOINTS, config.run.keep)


def _resume(folder: Path, network: nn.Module, ema: AveragedModel, optimizer: torch.optim.Optimizer) -> int:
    newest = checkpoint.latest(folder / CHECKPOINTS)
    if newest is None:
        return 0
    header, tensors = checkpoint.load(newest)
    for module, prefix in ((network, "model."), (ema.module, "ema.")):
        module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    ema.n_averaged.copy_(tensors["averaged"])
    checkpoint.load_optimizer(optimizer, tensors)
    return int(header["step"])


def _preview(config: Config, data: Examples, ema: AveragedModel, folder: Path, step: int, device: torch.device) -> None:
    """A picture of what the averaged weights draw: one row a class, or points in the plane."""
    ema.module.eval()
    field = Field(ema.module, config.interp, config.target, data.num_classes)
    rows = min(max(data.num_classes, 1), 10)
    n = rows * PREVIEW_COLUMNS if data.is_image else 1000
    y = torch.arange(n, device=device) // PREVIEW_COLUMNS if data.is_image and data.num_classes else None
    keys = noise.sample_keys(config.train.seed, torch.arange(n)).to(device)
    shape = config.autoencoder.latent_shape(data.shape)
    start = noise.normal(keys, shape, noise.INITIAL)
    drawn = Heun(steps=PREVIEW_STEPS).sample(field, start, y, seeds=keys)
    show(config.autoencoder.decode(drawn.x), y, data, folder / "previews" / f"step-{step:08d}.png")


@contextlib.contextmanager
def metrics_from(path: Path, step: int) -> Iterator[Any]:
    """A function that appends a row to metrics.jsonl, which first loses the rows after `step`: they come again."""
    rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [row for row in rows if _step_of(row) <= step]
    if kept != rows:
        checkpoint.write(path, "".join(row + "\n" for row in kept))
    with path.open("a", encoding="utf-8") as file:

        def log(row: dict[str, Any]) -> None:
            file.write(checkpoint.to_json(row) + "\n")
            file.flush()

        yield log


def _step_of(row: str) -> float:
    try:
        return json.loads(row)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that ctrl-C sets, so that the loop can stop between two steps; a second ctrl-C stops at once."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    before = signal.getsignal(signal.SIGINT)

    def press(signum: int, frame: FrameType | None) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
