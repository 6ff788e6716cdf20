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

from filelock import FileLock, Timeout
from torch import nn

from sitkit.data.dataset import Examples
from sitkit.data.described import description
from sitkit.data.stream import feed
from sitkit.models.autoencoder import Prepared, prepare_data
from sitkit.runs.checkpoint import latest_checkpoint
from sitkit.runs.config.mappings import flat
from sitkit.runs.config.schema import Config
from sitkit.runs.config.sources import TrainingFlags, configure, require_flags
from sitkit.runs.environment import continued, environment
from sitkit.runs.run import Run, fingerprints, initial_network, load, start_from, use_threads
from sitkit.runs.run_folder import RunFolder, check_unchanged, folder_of, write_config
from sitkit.runs.tracking.sync import TrackedRun
from sitkit.runs.tracking.tracker import Tracker
from sitkit.runtime.distributed import ProcessGroup, joined
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import read_json, to_json, write_file, write_json
from sitkit.runtime.progress import Event, Progress, silent
from sitkit.runtime.progress_bar import reporting
from sitkit.runtime.tensors import read_header
from sitkit.training.parallel import tf32
from sitkit.training.step import due, prepare


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
    with joined(config.run.device) as group, tf32(config.train.tf32):
        parts = group.size * config.train.accumulate
        if config.train.batch % parts:
            raise UserError(
                f"train.batch = {config.train.batch} cannot be shared evenly by {group.size} processes that take "
                f"theirs in {config.train.accumulate} parts (train.accumulate): make it a multiple of {parts}."
            )
        if (
            group.size > 1
            and group.device.type == "cpu"
            and config.run.parallel == "fsdp"
            and config.run.compile is True
        ):
            # Seen with torch 2.13: vectorised kernels of a block compiled by itself; a whole network, or simdlen 1, is right.
            raise UserError(
                "run.compile under run.parallel=fsdp compiles each block by itself, and torch's CPU compiler then gives wrong "
                "gradients (off by 1e-2): leave run.compile out, or set run.parallel=ddp."
            )
        data = prepare_data(config.data, config.autoencoder)
        marks, folder = fingerprints(config), folder_of(config)
        report = progress if group.lead else silent
        network = initial_network(config, data=data.examples)
        if config.train.init is not None:
            start_from(network, config.train.init, config.run.folder)
        with _recorded(config, data.examples, marks, folder, group, report):
            group.barrier()
            _loop(config, network.to(group.device), data, folder, group, report)
            # The lead writes the last checkpoint, and every process may load it next.
            group.barrier()
    return folder


@contextlib.contextmanager
def _recorded(
    config: Config, data: Examples, marks: dict[str, str], folder: Path, group: ProcessGroup, progress: Progress
) -> Iterator[None]:
    """While the work goes on the lead holds the run's folder, has described it, and tracks it."""
    if not group.lead:
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
        _describe(config, folder, environment(group.device) | {"processes": group.size, **marks})
        write_json(RunFolder(folder).data, description(data))
        tracked = TrackedRun(
            folder,
            folder.name,
            params=flat(config.plain()),
            tags={"sitkit.kind": "training", "sitkit.identity": folder.name.rpartition("-")[2]},
            patterns=("previews/*.png", "config.yaml", "environment.json"),
            model=data.shape if config.run.log_model else None,
        )
        with Tracker(tracked, enabled=config.run.track, on_warning=lambda text: progress(Event("train", message=text))):
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
    config: Config, network: nn.Module, data: Prepared, folder: Path, group: ProcessGroup, progress: Progress
) -> None:
    if not config.backbone.trainable or not any(p.requires_grad for p in network.parameters()):
        progress(Event("train", message=f"backbone {config.backbone.name!r} is given, not trained."))
        return
    settings, alone = config.train, group.size == 1
    training = prepare(config, network, data, folder, group, progress)
    steps = range(training.done, settings.steps)
    with (
        metrics_from(RunFolder(folder).metrics, training.done, write=group.lead) as log,
        interruptible(0.0 if alone else 5.0) as interrupted,
        feed(
            data.examples, settings.seed, steps, settings.batch, part=training.inputs.part,
            workers=config.run.workers, pin=group.device.type == "cuda",
        ) as batches,
    ):  # fmt: skip
        for batch in batches:
            training.step(batch)
            now, stop = due(config, training.done), False
            if now.log or (alone and interrupted.is_set()):
                losses, rates = training.summarise()
                log({"step": training.done, "time": time.time(), **losses, **rates})
                shown = {"loss": losses["loss"], **short_names(rates)}
                progress(Event("train", training.done, settings.steps, shown))
                # Several processes decide together, and only where they wait for one another anyway.
                stop = group.any(interrupted.is_set())
            if now.snapshot:
                training.snapshot()
            if now.save or stop:
                training.save()
            if now.preview:
                training.preview()
            if stop and not now.last:
                raise KeyboardInterrupt


def short_names(rates: dict[str, float]) -> dict[str, float]:
    """Rates by the names that the bar has room for."""
    names = {"images_per_second": "images/s", "mfu": "mfu", "memory_gib": "GiB"}
    return {names[key]: value for key, value in rates.items()}


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
