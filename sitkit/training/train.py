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
from typing import Any, Unpack

import torch
from filelock import FileLock, Timeout
from torch import nn

from sitkit.data.dataset import Examples, load_examples
from sitkit.data.described import description
from sitkit.data.stream import feed
from sitkit.models.autoencoder import modelled_shape
from sitkit.runs.averages import check_space, due
from sitkit.runs.checkpoint import latest_checkpoint
from sitkit.runs.config.mappings import flat
from sitkit.runs.config.schema import Config
from sitkit.runs.config.sources import TrainingFlags, configure, require_flags
from sitkit.runs.environment import continued, environment
from sitkit.runs.run import (
    Run,
    build_network,
    check_unchanged,
    fingerprints,
    folder_of,
    load,
    start_from,
    use_threads,
    write_config,
)
from sitkit.runs.run_folder import RunFolder
from sitkit.runs.sample_set import show
from sitkit.runs.tracking.tracker import Tracker
from sitkit.runtime import rng
from sitkit.runtime.distributed import ProcessGroup, joined
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import read_json, to_json, write_file, write_json
from sitkit.runtime.progress import Event, Progress, silent
from sitkit.runtime.progress_bar import reporting
from sitkit.runtime.tensors import read_header
from sitkit.solvers.ode import Heun
from sitkit.training.divergence import LossWindow
from sitkit.training.ema import EMA
from sitkit.training.objective import TrainingInputs, objective_of
from sitkit.training.optimizer import Optimization
from sitkit.training.parallel import Parallelized, tf32
from sitkit.training.throughput import Throughput
from sitkit.training.training_state import TrainingState
from sitkit.transport.field import Field

PREVIEW_STEPS, PREVIEW_COLUMNS = 10, 8


class Busy(UserError):
    """Another process is training the run."""


def train(
    config: Config | str | Path = "digits", *, progress: Progress | None = None, **flags: Unpack[TrainingFlags]
) -> Run:
    """Train a combination of components; the same call continues a training that was stopped.

    Args:
        config: a configuration, the name of a preset, or a YAML file.
        progress: a function that receives events; by default a live bar in a terminal or in Jupyter.
        flags: the flags of `sitkit train` by name, as in `configure`.

    Returns:
        The trained run: its configuration, its network with averaged weights, and the field that reads the network.

    Raises:
        UserError: before any work, for what is impossible, and where another process trains the run.
        WorkFailed: where the loss or the gradient is not finite.

    Example:
        run = sitkit.train("digits", interp="gvp", steps=2000, settings={"train.lr": 1e-3})
    """
    require_flags(flags, TrainingFlags, "train")
    settings = configure(config, **flags)
    with reporting(progress) as report:
        folder = run_training(settings, report)
    return load(folder, device=settings.run.device)


def run_training(config: Config, progress: Progress = silent) -> Path:
    """Train to config.train.steps and return the run's folder; continue where the folder already holds a checkpoint.

    Under torchrun the processes share each batch; all of them see the run's folder, and the lead alone writes to it.  On
    a CPU the result of one process is the same to the bit however often the work was killed and run again; another
    number of processes continues to the same weights up to rounding.  Raises UserError before any work for what cannot
    be, Busy where another process trains the run; WorkFailed where loss or gradient is not finite, naming step, last good
    checkpoint and the dump of that step; KeyboardInterrupt after a checkpoint of the step that ctrl-C found.
    """
    use_threads(config)
    with joined(config.run.device) as here, tf32(config.train.tf32):
        parts = here.size * config.train.accumulate
        if config.train.batch % parts:
            raise UserError(
                f"train.batch = {config.train.batch} cannot be shared evenly by {here.size} processes that take "
                f"theirs in {config.train.accumulate} parts (train.accumulate): make it a multiple of {parts}."
            )
        if here.size > 1 and here.device.type == "cpu" and config.run.parallel == "fsdp" and config.run.compile is True:
            # Seen with torch 2.13: vectorised kernels of a block compiled by itself; a whole network, or simdlen 1, is right.
            raise UserError(
                "run.compile under run.parallel=fsdp compiles each block by itself, and torch's CPU compiler then gives wrong "
                "gradients (off by 1e-2): leave run.compile out, or set run.parallel=ddp."
            )
        data, marks, folder = load_examples(config.data), fingerprints(config), folder_of(config)
        told = progress if here.lead else silent
        network = build_network(config)
        if config.train.init is not None:
            start_from(network, config.train.init, config.run.folder)
        with _recorded(config, marks, folder, here, told):
            here.barrier()
            _loop(config, network.to(here.device), data, folder, here, told)
    return folder


@contextlib.contextmanager
def _recorded(
    config: Config, marks: dict[str, str], folder: Path, here: ProcessGroup, progress: Progress
) -> Iterator[None]:
    """While the work goes on the lead holds the run's folder, has described it, and tracks it."""
    if not here.lead:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise Busy(f"{folder} is being trained by another process.") from None
    try:
        check_unchanged(folder, marks)
        write_config(folder, config)
        _describe(config, folder, environment(here.device) | {"processes": here.size, **marks})
        write_json(RunFolder(folder).data, description(load_examples(config.data)))
        with Tracker(
            folder,
            name=folder.name,
            params=flat(config.plain()),
            tags={"sitkit.kind": "training", "sitkit.identity": folder.name.rpartition("-")[2]},
            artifacts=("previews/*.png", "config.yaml", "environment.json"),
            model=load_examples(config.data).shape if config.run.log_model else None,
            enabled=config.run.track,
            on_warning=lambda text: progress(Event("train", message=text)),
        ):
            yield
    finally:
        lock.release()


def _describe(config: Config, folder: Path, now: dict[str, Any]) -> None:
    """What the training runs on; what has been trained keeps what it was trained on."""
    path, newest = RunFolder(folder).environment, latest_checkpoint(RunFolder(folder).checkpoints, lambda text: None)
    step = int(read_header(newest)["step"]) if newest else 0
    before = read_json(path) if path.is_file() else {}
    if not before or step < config.train.steps:
        write_json(path, continued(before, now, step) if before else now)


def _loop(
    config: Config, network: nn.Module, data: Examples, folder: Path, here: ProcessGroup, progress: Progress
) -> None:
    settings, every = config.train, config.run.log_every
    if not config.backbone.trainable or not any(p.requires_grad for p in network.parameters()):
        progress(Event("train", message=f"backbone {config.backbone.name!r} is given, not trained."))
        return
    shape = modelled_shape(config.autoencoder, data)
    objective = objective_of(config, network, shape, data.num_classes).to(here.device)
    compiled = here.device.type == "cuda" if config.run.compile == "auto" else config.run.compile
    laid = Parallelized(objective, here, config.run.parallel, compiled)
    averages = EMA(network, settings.ema_decays, settings.posthoc)
    state = TrainingState(objective, averages, Optimization(objective.parameters(), settings), here)
    if settings.posthoc and here.lead:
        progress(Event("train", message=check_space(folder, settings, network)))
    step = saved = state.resume(folder)
    if step:
        progress(Event("train", step, settings.steps, message=f"continuing {folder} at step {step}."))
    if not settings.steps:
        # What is sampled, measured and compared like any other: the network as it was drawn.
        state.save(folder, config, 0)
    drawing = TrainingInputs(config, network, data, here.device, here.rank, here.size)
    speed = Throughput(config.backbone.flops(shape), here, torch.bfloat16 if objective.halved else torch.float32)
    window = LossWindow(config, data, drawing, folder, here)
    network.train()
    with (
        metrics_from(RunFolder(folder).metrics, step, write=here.lead) as log,
        interruptible(5.0 if here.size > 1 else 0.0) as interrupted,
        feed(
            data, settings.seed, range(step, settings.steps), settings.batch, part=drawing.part,
            workers=config.run.workers, pin=here.device.type == "cuda",
        ) as batches,
    ):  # fmt: skip
        for batch in batches:
            inputs, losses = drawing(*batch).split(settings.accumulate), []
            for part in inputs:
                with laid.accumulating(last=part is inputs[-1]):
                    loss, each = laid(*part)
                    (loss / len(inputs)).backward()
                losses.append(each)
            lr = state.learner.lr
            window.add(torch.cat(losses), state.learner.step())
            step += 1
            averages.update(step)
            last, save = step == settings.steps, step == settings.steps or step % config.run.checkpoint_every == 0
            look = save or step % every == 0 or (here.size == 1 and interrupted.is_set())
            if look:
                count, seen = window.look(step, saved)
                rates = speed.read(count * settings.batch)
                log({"step": step, "time": time.time(), **seen, "lr": lr, **rates})
                progress(Event("train", step, settings.steps, {"loss": seen["loss"], **short_names(rates)}))
            if due(settings, step):
                averages.snapshot(folder, step, getattr(torch, settings.posthoc_dtype), here)
            # Several processes decide together, and only where they wait for one another anyway.
            stop = look and here.any(interrupted.is_set())
            if save or stop:
                state.save(folder, config, step)
                saved = step
            if last or (config.run.sample_every and step % config.run.sample_every == 0):
                with averages.applied():
                    _preview(config, data, network, folder, step, here)
                network.train()
            if stop and not last:
                raise KeyboardInterrupt


def short_names(rates: dict[str, float]) -> dict[str, float]:
    """Rates by the names that the bar has room for."""
    names = {"images_per_second": "images/s", "mfu": "mfu", "memory_gib": "GiB"}
    return {names[key]: value for key, value in rates.items()}


def _preview(config: Config, data: Examples, network: nn.Module, folder: Path, step: int, here: ProcessGroup) -> None:
    """A picture of what the network draws: one row a class, or points in the plane, and nothing of what has no picture.

    Every process draws, the lead saves.
    """
    if not (data.is_image or data.is_plane):
        return
    network.eval()
    field = Field(network, config.interp, config.target, data.num_classes)
    rows = min(max(data.num_classes, 1), 10)
    n = rows * PREVIEW_COLUMNS if data.is_image else 1000
    y = torch.arange(n, device=here.device) // PREVIEW_COLUMNS if data.is_image and data.num_classes else None
    keys = rng.sample_keys(config.train.seed, torch.arange(n)).to(here.device)
    shape = modelled_shape(config.autoencoder, data)
    start = rng.normal(keys, shape, rng.INITIAL)
    drawn = Heun(steps=PREVIEW_STEPS).sample(field, start, y, seeds=keys)
    if here.lead:
        show(config.autoencoder.decode(drawn.x), y, data, RunFolder(folder).previews / f"step-{step:08d}.png")


@contextlib.contextmanager
def metrics_from(path: Path, step: int, write: bool = True) -> Iterator[Any]:
    """A function that appends a row to metrics.jsonl, which first loses the rows after `step`: they come again.

    write: False gives one that does nothing.
    """
    if not write:
        yield lambda row: None
        return
    rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [row for row in rows if _step_of(row) <= step]
    if kept != rows:
        write_file(path, "".join(row + "\n" for row in kept))
    with path.open("a", encoding="utf-8") as file:

        def log(row: dict[str, Any]) -> None:
            file.write(to_json(row) + "\n")
            file.flush()

        yield log


def _step_of(row: str) -> float:
    try:
        return json.loads(row)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


@contextlib.contextmanager
def interruptible(patience: float = 0.0) -> Iterator[threading.Event]:
    """An event that ctrl-C sets, so that the loop can stop between two steps; a second ctrl-C stops at once.

    patience: seconds within which another one is the same: torchrun passes on the one that its processes had already.
    """
    pressed = threading.Event()
    first = 0.0
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    before = signal.getsignal(signal.SIGINT)

    def press(signum: int, frame: FrameType | None) -> None:
        nonlocal first
        if not pressed.is_set():
            first = time.monotonic()
            pressed.set()
        elif time.monotonic() - first >= patience:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
