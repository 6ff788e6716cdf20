"""Train a run: the loop, from step 0 or from the newest checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from sitkit.data.dataset import Examples
from sitkit.data.described import description
from sitkit.data.stream import feed
from sitkit.models.autoencoder import Prepared, median_std, prepare_data
from sitkit.runs.changed_plugins import ChangedPlugin, settle_changed_plugins
from sitkit.runs.checkpoint import latest_checkpoint, step_of
from sitkit.runs.config.identity import training_identity
from sitkit.runs.config.mappings import flat
from sitkit.runs.config.schema import Config
from sitkit.runs.config.sources import TrainingFlags, assemble, layers_of, replaced, require_flags
from sitkit.runs.environment import continued, environment
from sitkit.runs.run import Run, fingerprints, initial_network, load, start_from, use_threads
from sitkit.runs.run_folder import (
    RunFolder,
    check_unchanged,
    folder_of,
    remove_results,
    training_lock,
    write_config,
    written_identity,
)
from sitkit.runs.sample import chosen_classes
from sitkit.runs.tracking.sync import TrackedRun
from sitkit.runs.tracking.tracker import Tracker
from sitkit.runtime.distributed import ProcessGroup, joined
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import read_bytes, to_json, write_json
from sitkit.runtime.progress import Event, Progress, silent
from sitkit.runtime.progress_bar import reporting
from sitkit.runtime.stops import REPEATED, Stopped, noted
from sitkit.training.parallel import tf32
from sitkit.training.step import Training, due
from sitkit.transport.interval import largest_weight, weight_note


def train(
    config: Config | str | Path = "digits",
    *,
    restart: bool = False,
    changed_plugin: ChangedPlugin | None = None,
    progress: Progress | None = None,
    **flags: Unpack[TrainingFlags],
) -> Run:
    """Train a combination of components; the same call continues a training that was stopped.

    Args:
        config: a configuration, the name of a preset, or a YAML file.
        restart: train again from step 0, and remove the run's checkpoints, samples and numbers first.
        changed_plugin: what to do if the source of a plugin changed since the run was trained: "redo" removes the run with
            its samples and numbers and trains again, "keep" continues it or returns it as it is.
        progress: a function that receives events; by default a live bar in a terminal or in Jupyter.
        flags: the flags of `sitkit train` by name, as in `configure`.

    Returns:
        The trained run: its configuration, its network with averaged weights, and the field that reads the network.

    Raises:
        UserError: before any work, if the configuration is impossible, another process trains the run, or the source of a
            plugin changed and `changed_plugin` does not say what to do.
        WorkFailed: if the loss or the gradient is not finite.

    Example:
        run = sitkit.train("digits", interp="gvp", steps=2000, settings={"train.lr": 1e-3})
    """
    require_flags(flags, TrainingFlags, "train")
    layers = layers_of(config, flags)
    settings = assemble(layers)
    restart = restart or bool(settle_changed_plugins([settings], changed_plugin))
    with reporting(progress) as report:
        for note in replaced(layers):
            report(Event("train", message=note))
        folder = run_training(settings, report, restart)
    return load(folder, device=settings.run.device)


def run_training(config: Config, progress: Progress = silent, restart: bool = False) -> Path:
    """Train to config.train.steps and return the run's folder; continue from a checkpoint if the folder holds one.

    Under torchrun the processes share each batch.  All of them read the run's folder; only the lead writes to it.  On a
    CPU one process gives the same bits however often the work was killed and run again; another number of processes
    gives the same weights up to rounding.  restart: as in `train`.

    Raises:
        UserError: before any work, if the configuration is impossible, or the folder has checkpoints and none can be used.
        Busy: if another process trains the run.
        WorkFailed: if the loss or the gradient is not finite; it names the step, the last good checkpoint and the file
            with the examples of that step.
        Stopped: after ctrl-C, SIGTERM, SIGHUP or SIGUSR1, when the checkpoint of the current step is written.
    """
    use_threads(config)
    with joined(config.run.device) as group, tf32(config.train.tf32):
        _require_possible(config, group)
        data = prepare_data(config.data, config.autoencoder)
        if isinstance(config.sample.labels, tuple):
            chosen_classes(config.sample.labels, data.examples)
        marks, folder = fingerprints(config), folder_of(config)
        report = progress if group.lead else silent
        network = initial_network(config, data=data.examples)
        if config.train.init is not None:
            start_from(network, config.train.init, config.run.folder)
        with _recorded(config, data.examples, marks, folder, group, report, restart):
            group.barrier()
            _loop(config, network.to(group.device), data, folder, group, report)
            # The lead writes the last checkpoint, and every process may load it next.
            group.barrier()
    return folder


def _require_possible(config: Config, group: ProcessGroup) -> None:
    parts = group.size * config.train.accumulate
    if config.train.batch % parts:
        raise UserError(
            f"train.batch = {config.train.batch} cannot be divided evenly among {group.size} processes with "
            f"{config.train.accumulate} parts each (train.accumulate): make it a multiple of {parts}."
        )
    sharded = group.size > 1 and config.run.parallel == "fsdp"
    if sharded and config.run.compile is True and group.device.type == "cpu":
        # Observed with torch 2.13 for blocks that are compiled one by one; a whole network, or simdlen 1, is right.
        raise UserError(
            "run.compile under run.parallel=fsdp compiles each block by itself, and torch's CPU compiler then gives wrong "
            "gradients (off by 1e-2): leave run.compile out, or set run.parallel=ddp."
        )


@contextlib.contextmanager
def _recorded(
    config: Config,
    data: Examples,
    marks: dict[str, str],
    folder: Path,
    group: ProcessGroup,
    progress: Progress,
    restart: bool,
) -> Iterator[None]:
    """While the training runs, the lead holds the lock of the run's folder, describes the run in it, and tracks it."""
    if not group.lead:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with training_lock(folder):
        if restart:
            remove_results(folder)
        check_unchanged(folder, marks)
        write_config(folder, config)
        training, named = training_identity(config, marks), folder.name.rpartition("-")[2]
        record = {
            "processes": group.size, "training": training, "settings": written_identity(config.plain()), **marks,
        } | ({"formerly": named} if named != training else {})  # fmt: skip
        _describe(config, RunFolder(folder), environment(group.device) | record)
        std = median_std(config.autoencoder, data)
        _write_description(RunFolder(folder).data, dataclasses.replace(data, std=std))
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


def _write_description(path: Path, data: Examples) -> None:
    """Write the description of the data; one of release 0.1, without counts and standard deviation, stays as it is."""
    described = description(data)
    older = {key: value for key, value in described.items() if key not in ("counts", "std")}
    if not path.is_file() or read_bytes(path) != (to_json(older, indent=2) + "\n").encode():
        write_json(path, described)


def _describe(config: Config, files: RunFolder, now: dict[str, Any]) -> None:
    """Record the environment of the training; the environments of earlier steps stay in the record."""
    newest = latest_checkpoint(files.checkpoints, lambda text: None)
    step, before = step_of(newest) if newest else 0, files.read_environment()
    if not before or step < config.train.steps:
        write_json(files.environment, continued(before, now, step) if before else now)
    elif now["settings"] != before.get("settings", files.path.name.rpartition("-")[2]):
        # The settings of the same training are written in another way: another path of the data, or a new setting.
        keys = ("training", "settings", "formerly")
        write_json(files.environment, before | {key: now[key] for key in keys if key in now})


def _loop(
    config: Config, network: nn.Module, data: Prepared, folder: Path, group: ProcessGroup, progress: Progress
) -> None:
    if not config.backbone.trainable or not any(p.requires_grad for p in network.parameters()):
        progress(Event("train", message=f"backbone {config.backbone.name!r} is given, not trained."))
        return
    settings, alone = config.train, group.size == 1
    note = weight_note(*largest_weight(config.interp, config.target, config.weight, config.timestep))
    if note:
        progress(Event("train", message=note))
    training = Training(config, network, data, folder, group, progress)
    steps, part, pin = training.resume(), training.inputs.part, group.device.type == "cuda"
    with (
        noted(0.0 if alone else REPEATED) as signals,
        feed(
            data.examples, settings.seed, steps, settings.batch, part=part, workers=config.run.workers, pin=pin
        ) as batches,
    ):
        for batch in batches:
            training.step(batch)
            now, stop = due(config, training.done), False
            if now.log or (alone and signals):
                training.log()
                # Several processes decide together, and only at a step where they wait for each other anyway.
                stop = group.any(bool(signals))
            if now.snapshot:
                training.snapshot()
            if now.save or stop:
                training.save()
            if now.preview:
                training.preview()
            if stop and not now.last:
                # Of several processes some may not have received the signal.
                raise Stopped(*signals or [signal.SIGTERM])
