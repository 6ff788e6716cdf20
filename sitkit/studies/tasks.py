"""What a study is made of: trainings, and measurements that wait for their training; each with an identity and a log.

A task belongs to the folder of its run, not to a study: two studies that need the same one share it.

    runs/<run>/logs/train.log   measure-<key>.log        a line for each start and end, with time, host and process
                    train.lock  measure-<key>.lock       held by whoever is at it
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from platform import node
from typing import Any, Literal

from sitkit.runs.checkpoint import checkpoints
from sitkit.runs.config.identity import ResultLocation, number_identity
from sitkit.runs.config.schema import Config
from sitkit.runs.run_folder import RunFolder, folder_of
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import read_json
from sitkit.runtime.tensors import read_header

LOGS = "logs"
FAILED = "failed:"
NOTED = re.compile(r"(?P<time>\d{4}-\d\d-\d\dT\S+) \S+ \d+ (?P<what>.*)")


@dataclass(frozen=True)
class Task:
    """A training, or the measurement of a cell."""

    kind: Literal["train", "measure"]
    config: Config
    place: ResultLocation

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


def trained(config: Config) -> bool:
    """Whether the training of a configuration is complete on disk."""
    folder = folder_of(config)
    if not config.backbone.trainable:
        return RunFolder(folder).config.is_file()
    found = checkpoints(RunFolder(folder).checkpoints)
    try:
        return bool(found) and read_header(found[-1])["step"] == config.train.steps
    except UserError:
        return False


class Measurements:
    """The numbers on disk, found by what they are of."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self._data: dict[str, str] = {}

    def find(self, place: ResultLocation) -> tuple[str, dict[str, Any]] | None:
        """The record of a cell's number and its path within the runs, or None; data that have changed do not count."""
        folder = self.runs / place.run
        if place.run not in self._data:
            if not RunFolder(folder).environment.is_file():
                return None
            self._data[place.run] = read_json(RunFolder(folder).environment)["data"]
        named = number_identity(place.samples, json.loads(place.metric), self._data[place.run])
        path = RunFolder(folder).evaluations / f"{named}.json"
        return (path.relative_to(self.runs).as_posix(), read_json(path)) if path.is_file() else None
