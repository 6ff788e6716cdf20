"""What an executor is, how one of them does a task, and the simplest of them."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Mapping
from platform import node
from typing import Any, Literal, NamedTuple, Protocol

from sitkit.runs.config.identity import location_of
from sitkit.runs.config.sources import Layer, assemble
from sitkit.runtime.errors import UserError, WorkFailed
from sitkit.runtime.locks import make_once
from sitkit.runtime.progress import Event, Progress
from sitkit.studies.tasks import FAILED, Task, failure, note

# Seconds that an executor waits for news before it looks at something else.
POLL_SECONDS = 1.0
# Seconds in which a worker that is told to stop writes its checkpoint.
STOP_TIMEOUT = 60.0


class Ended(NamedTuple):
    """How a task ended: done; failed, with the reason; busy, another process is at it; died, its worker is gone."""

    how: Literal["done", "failed", "busy", "died"]
    reason: str = ""


Tell = Callable[[Task, Event], None]


class Executor(Protocol):
    """Does tasks."""

    def takes(self) -> bool:
        """Whether another task may be submitted now."""
        ...

    def submit(self, task: Task, since: str) -> None:
        """Begin a task.  One that has failed in another process since then is not tried again."""
        ...

    def wait(self, tell: Tell) -> list[tuple[Task, Ended]]:
        """The tasks that have ended, at the latest `PATIENCE` seconds from now unless this process does them itself."""
        ...

    def close(self) -> None:
        """Let whatever still runs save what it has, and end it."""
        ...


def perform(task: Task, since: str, tell: Progress) -> Ended:
    """Do a task unless it is done or another process is at it; its log has when it began, how it ended and why."""
    ended = Ended("done")

    def do() -> None:
        nonlocal ended
        ended = _do(task, tell)

    def over() -> bool:
        return task.done or failure(task.path, since) is not None

    try:
        if make_once(task.path.with_suffix(".lock"), over, do):
            return ended
    except OSError as error:
        return Ended("failed", f"{task.path.parent} cannot be written: {error.strerror or error}.")
    if task.done:
        return Ended("done")
    reason = failure(task.path, since)
    return Ended("busy") if reason is None else Ended("failed", reason)


def _do(task: Task, tell: Progress) -> Ended:
    from sitkit.runs.evaluate import measure_run
    from sitkit.runs.run import load
    from sitkit.training.train import Busy, run_training

    config = task.config
    note(task.path, "start")
    tell(Event("start", message=task.name))
    try:
        if task.kind == "train":
            run_training(config, tell)
        else:
            measure_run(load(config.run.folder / task.place.run, settings=config, device=config.run.device), tell)
    except Busy:
        note(task.path, "left to the process that is training it")
        return Ended("busy")
    except (UserError, WorkFailed) as error:
        reason = str(error)
    except Exception as error:
        # Whatever went wrong in a plugin or for want of memory, the other cells are done.
        with task.path.open("a", encoding="utf-8") as file:
            file.write(traceback.format_exc())
        reason = f"{type(error).__name__}: {error}"
    except KeyboardInterrupt:
        note(task.path, "stopped")
        raise
    else:
        note(task.path, "done")
        return Ended("done")
    note(task.path, f"{FAILED} {reason}")
    return Ended("failed", reason)


class InProcess:
    """This process, one task after another."""

    def __init__(self) -> None:
        self._next: tuple[Task, str] | None = None

    def takes(self) -> bool:
        """Whether it is idle."""
        return self._next is None

    def submit(self, task: Task, since: str) -> None:
        """Do it when it is waited for."""
        self._next = task, since

    def wait(self, tell: Tell) -> list[tuple[Task, Ended]]:
        """Do the task."""
        if self._next is None:
            return []
        (task, since), self._next = self._next, None
        return [(task, perform(task, since, lambda event: tell(task, event)))]

    def close(self) -> None:
        """Nothing runs but this."""


def task_to_plain(task: Task, since: str) -> dict[str, Any]:
    """A task as plain values, for another process, and the folder from which its paths start."""
    log = str(task.path.absolute())
    return {"kind": task.kind, "config": task.config.plain(), "since": since, "cwd": os.getcwd(), "log": log}


def perform_plain(told: Mapping[str, Any], tell: Progress) -> Ended:
    """Do the task that `as_plain` told of.  Events go out every half second, but for messages."""
    said = 0.0

    def seldom(event: Event) -> None:
        nonlocal said
        now = time.monotonic()
        if event.message or now - said > 0.5:
            said = now
            tell(event)

    try:
        os.chdir(told["cwd"])
    except OSError as error:
        return Ended("failed", f"{told['cwd']} cannot be entered on {node()}: {error.strerror}.")
    config = assemble([Layer(told["config"])])
    return perform(Task(told["kind"], config, location_of(config)), told["since"], seldom)
