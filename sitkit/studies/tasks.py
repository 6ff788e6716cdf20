"""What a study is made of: trainings, and measurements that wait for their training; each with an identity and a log.

A task belongs to the folder of its run, not to a study: two studies that need the same one share it.

    runs/<run>/logs/train.log   measure-<key>.log        a line for each start and end, with time, host and process
                    train.lock  measure-<key>.lock       held by whoever is at it
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from platform import node
from typing import Any, Literal

from sitkit.registry import spec
from sitkit.runs import checkpoint
from sitkit.runs.config.schema import TRAINING, Config, identity, slug, training_identity
from sitkit.runs.evaluate import EVALUATIONS, number_identity
from sitkit.runs.run import CHECKPOINTS, CONFIG, ENVIRONMENT, folder_of
from sitkit.runs.sample import sampling_identity
from sitkit.runtime.errors import UserError

LOGS = "logs"
FAILED = "failed:"
NOTED = re.compile(r"(?P<time>\d{4}-\d\d-\d\dT\S+) \S+ \d+ (?P<what>.*)")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a cell's number comes from: its training, the identity of its samples, its measurement."""

    training: str
    run: str
    samples: str
    measurement: str
    metric: str


@dataclass(frozen=True)
class Task:
    """A training, or the measurement of a cell."""

    kind: Literal["train", "measure"]
    config: Config
    place: Place

    @property
    def key(self) -> str:
        """What two tasks that are the same have in common."""
        return self.place.training if self.kind == "train" else self.place.measurement

    @property
    def after(self) -> str | None:
        """The key of the training that it waits for."""
        return None if self.kind == "train" else self.place.training

    @property
    def log(self) -> str:
        """Where the task says what happens to it, within the folder of runs."""
        name = "train" if self.kind == "train" else f"measure-{self.key}"
        return f"{self.place.run}/{LOGS}/{name}.log"

    @property
    def path(self) -> Path:
        """The log."""
        return self.config.run.folder / self.log

    @property
    def name(self) -> str:
        """How a line of progress calls it."""
        return f"{self.kind} {self.place.run}" + ("" if self.kind == "train" else f" {self.key}")

    @property
    def done(self) -> bool:
        """Whether what it makes is on disk."""
        if self.kind == "train":
            return trained(self.config)
        return Measurements(self.config.run.folder).find(self.place) is not None


def note(log: Path, text: str) -> None:
    """A line of a task's log: when, where, what."""
    log.parent.mkdir(parents=True, exist_ok=True)
    line = f"{now()} {node()} {os.getpid()} {' '.join(text.split())}\n"
    with log.open("a+b") as file:
        # What a task printed last, or a process that was killed, may have left a line unfinished.
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(line.encode())


def now() -> str:
    """The time as a log has it; later ones sort after earlier ones."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def failure(log: Path, since: str) -> str | None:
    """Why a task failed, if that is the last that became of it and it happened since then; what was printed is passed over."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    last = next((found for line in reversed(lines) if (found := NOTED.match(line))), None)
    if last is None or last["time"] < since or not last["what"].startswith(f"{FAILED} "):
        return None
    return last["what"].removeprefix(f"{FAILED} ")


def place_of(config: Config) -> Place:
    """Where the number of a configuration comes from."""
    return places([config])[0]


def places(configs: Iterable[Config]) -> list[Place]:
    """Where the number of each configuration comes from; what they share is worked out once."""
    known: dict[Any, Any] = {}

    def once(key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        try:
            if key not in known:
                known[key] = make()
            return known[key]
        except TypeError:
            # A component with a field that has no hash, as a plugin may have.
            return make()

    found = []
    for config in configs:
        step, metric = final_step(config), config.metric[0]
        trains = tuple(getattr(config, name) for name in TRAINING)
        draws = (*trains, config.sampler, config.diffusion, config.guidance, config.sample)
        key, name = once(trains, lambda config=config: (training_identity(config), slug(config)))
        samples = once(draws, lambda c=config, step=step, key=key: sampling_identity(c, step, key))
        told = once((metric,), lambda metric=metric: spec(metric))
        measurement = once((*draws, metric), lambda samples=samples, told=told: identity(samples, told))
        found.append(Place(key, f"{name}-{key}", samples, measurement, json.dumps(told, sort_keys=True)))
    return found


def final_step(config: Config) -> int:
    """The step of the checkpoint that a finished training leaves; 0 for a network that is given, not trained."""
    return config.train.steps if config.backbone.trainable else 0


def trained(config: Config) -> bool:
    """Whether the training of a configuration is complete on disk."""
    folder = folder_of(config)
    if not config.backbone.trainable:
        return (folder / CONFIG).is_file()
    found = checkpoint.checkpoints(folder / CHECKPOINTS)
    try:
        return bool(found) and checkpoint.header(found[-1])["step"] == config.train.steps
    except UserError:
        return False


class Measurements:
    """The numbers on disk, found by what they are of."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self._data: dict[str, str] = {}

    def find(self, place: Place) -> tuple[str, dict[str, Any]] | None:
        """The record of a cell's number and its path within the runs, or None; data that have changed do not count."""
        folder = self.runs / place.run
        if place.run not in self._data:
            if not (folder / ENVIRONMENT).is_file():
                return None
            self._data[place.run] = checkpoint.read_json(folder / ENVIRONMENT)["data"]
        named = number_identity(place.samples, json.loads(place.metric), self._data[place.run])
        path = folder / EVALUATIONS / f"{named}.json"
        return (path.relative_to(self.runs).as_posix(), checkpoint.read_json(path)) if path.is_file() else None
