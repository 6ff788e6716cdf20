"""The tasks of a study: trainings, and measurements that wait for their training.  Each has an identity and a log.

A task belongs to the folder of its run, not to a study: two studies that need the same task share it.

    runs/<run>/logs/train.log   measure-<key>.log        a line for each start and end, with time, host and process
                    train.lock  measure-<key>.lock       held by the process that does the task
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from platform import node
from typing import Any, Literal

from sitkit.registry import essence
from sitkit.runs.checkpoint import checkpoints, header_of_checkpoint
from sitkit.runs.config.identity import final_step, number_identity, sampling_identity, training_identity
from sitkit.runs.config.schema import TRAINING_KEYS, Config
from sitkit.runs.evaluate import Evaluation
from sitkit.runs.run_folder import RunFolder, find_number, folder_of, recorded_contents
from sitkit.runtime.errors import Unreadable, UserError
from sitkit.runtime.files import exists
from sitkit.runtime.hashing import identity

LOGS = "logs"
FAILED = "failed:"
ENTRY = re.compile(r"(?P<time>\d{4}-\d\d-\d\dT\S+) \S+ \d+ (?P<text>.*)")


@dataclass(frozen=True, slots=True)
class ResultLocation:
    """The identities of a cell's number: its training, its run's folder name, its samples, its measurement."""

    training: str
    run: str
    samples: str
    measurement: str


def location_of(config: Config) -> ResultLocation:
    """Return the identities of the number of a configuration."""
    return locations_of([config])[0]


def locations_of(configs: Iterable[Config]) -> list[ResultLocation]:
    """Return the identities of the number of each configuration; common parts are computed once."""
    known: dict[Any, Any] = {}

    def once(key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        try:
            if key not in known:
                known[key] = make()
            return known[key]
        except TypeError:
            # A component with a field that has no hash, as a plugin may have.
            return make()

    locations = []
    for config in configs:
        step, metric = final_step(config), config.metric[0]
        training = (config.run.folder, *(getattr(config, name) for name in TRAINING_KEYS))
        sampling = (*training, config.sampler, config.diffusion, config.guidance, config.sample)
        key, run = once(training, lambda config=config: _training_of(config))
        samples = once(sampling, lambda c=config, step=step, key=key: sampling_identity(c, step, key))
        measurement = once(
            (*sampling, metric), lambda samples=samples, metric=metric: identity(samples, essence(metric))
        )
        locations.append(ResultLocation(key, run, samples, measurement))
    return locations


def _training_of(config: Config) -> tuple[str, str]:
    """Return the identity of a training and the name of its run's folder."""
    folder, contents = folder_of(config), {}
    # The work on a run that cannot be read says so itself.
    with contextlib.suppress(UserError):
        contents = recorded_contents(folder)
    return training_identity(config, contents), folder.name


@dataclass(frozen=True)
class Task:
    """A training, or the measurement of a cell."""

    kind: Literal["train", "measure"]
    config: Config
    place: ResultLocation

    @property
    def key(self) -> str:
        """The identity of the task: two equal tasks have the same key."""
        return self.place.training if self.kind == "train" else self.place.measurement

    @property
    def after(self) -> str | None:
        """The key of the training that it waits for."""
        return None if self.kind == "train" else self.place.training

    @property
    def log(self) -> str:
        """The path of the log within the folder of runs."""
        name = "train" if self.kind == "train" else f"measure-{self.key}"
        return f"{self.place.run}/{LOGS}/{name}.log"

    @property
    def path(self) -> Path:
        """The path of the log."""
        return self.config.run.folder / self.log

    @property
    def name(self) -> str:
        """The name in a line of progress."""
        return f"{self.kind} {self.place.run}" + ("" if self.kind == "train" else f" {self.key}")

    @property
    def done(self) -> bool:
        """True if the result is on disk."""
        if self.kind == "train":
            return trained(self.config)
        return find_measurement(self.config, self.place) is not None


def note(log: Path, text: str) -> None:
    """Add a line to a task's log: time, host, process, text."""
    log.parent.mkdir(parents=True, exist_ok=True)
    line = f"{now()} {node()} {os.getpid()} {' '.join(text.split())}\n"
    with log.open("a+b") as file:
        # The output of a task, or of a process that was killed, may end in the middle of a line.
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(line.encode())


def now() -> str:
    """Return the time in the form of a log; later times sort after earlier ones."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def failure(log: Path, since: str) -> str | None:
    """Return the reason if the last entry of a task's log is a failure after `since`, else None; other output is ignored."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    last = next((entry for line in reversed(lines) if (entry := ENTRY.match(line))), None)
    if last is None or last["time"] < since or not last["text"].startswith(f"{FAILED} "):
        return None
    return last["text"].removeprefix(f"{FAILED} ")


def trained(config: Config) -> bool:
    """Return whether the training of a configuration is complete on disk.  Raises UserError if its files cannot be read."""
    folder = RunFolder(folder_of(config))
    if not config.backbone.trainable:
        return folder.config.is_file()
    saved = checkpoints(folder.checkpoints)
    try:
        return bool(saved) and header_of_checkpoint(saved[-1])["step"] == config.train.steps
    except Unreadable:
        raise
    except UserError:
        return False


def find_measurement(config: Config, place: ResultLocation) -> tuple[str, dict[str, Any]] | None:
    """Return the path within the runs and the record of a cell's number, or None; a number on other data does not count.

    Raises UserError for a record that cannot be read.
    """
    runs = config.run.folder
    folder = RunFolder(runs / place.run)
    if not exists(folder.environment):
        return None
    data = _data_fingerprint(folder.environment, folder.environment.stat().st_mtime_ns)
    number = number_identity(place.samples, essence(config.metric[0]), data)
    path = find_number(folder.path, number, config, recorded_contents(folder.path))
    return (path.relative_to(runs).as_posix(), Evaluation.read(path).record) if exists(path) else None


@functools.lru_cache(maxsize=4096)
def _data_fingerprint(environment: Path, modified: int) -> str:
    record = RunFolder(environment.parent).read_environment()
    if "data" not in record:
        raise UserError(
            f"{environment} has no fingerprint of the data: copy it again, or remove the folder of the run."
        )
    return record["data"]
