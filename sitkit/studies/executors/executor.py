"""The protocol of an executor, the work on one task, and the executor that works in this process."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Mapping
from platform import node
from typing import Any, Literal, NamedTuple, Protocol

from sitkit.runs.config.sources import Layer, assemble
from sitkit.runtime.errors import UserError, WorkFailed
from sitkit.runtime.locks import Busy, make_once
from sitkit.runtime.progress import Event, Progress
from sitkit.studies.tasks import FAILED, Task, failure, location_of, note

# Seconds that an executor waits for an event before it looks at something else.
POLL_SECONDS = 1.0
# Seconds that a worker has for its last checkpoint when it must stop.
STOP_TIMEOUT = 60.0


class TaskEnd(NamedTuple):
    """The end of a task: done; failed, with the reason; busy, another process does it; died, its worker is gone."""

    how: Literal["done", "failed", "busy", "died"]
    reason: str = ""


OnEvent = Callable[[Task, Event], None]


class Executor(Protocol):
    """Does tasks."""

    def takes(self) -> bool:
        """Return whether another task may be submitted now."""
        ...

    def submit(self, task: Task, since: str) -> None:
        """Begin a task.  A task that has failed in another process since then is not tried again."""
        ...

    def wait(self, on_event: OnEvent) -> list[tuple[Task, TaskEnd]]:
        """Return the tasks that have ended, after at most POLL_SECONDS unless this process does the work itself."""
        ...

    def close(self) -> None:
        """Let running tasks save their state, and end them."""
        ...


def perform(task: Task, since: str, progress: Progress) -> TaskEnd:
    """Do a task unless it is done or another process does it; its log has the start, the end and the reason."""
    ends: list[TaskEnd] = []

    def over() -> bool:
        return task.done or failure(task.path, since) is not None

    try:
        if make_once(task.path.with_suffix(".lock"), over, lambda: ends.append(_do(task, progress))):
            return ends[0]
        if task.done:
            return TaskEnd("done")
    except OSError as error:
        return TaskEnd("failed", f"{task.path.parent} cannot be written: {error.strerror or error}.")
    except UserError as error:
        # What is there of the task cannot be read.
        return TaskEnd("failed", str(error))
    reason = failure(task.path, since)
    return TaskEnd("busy") if reason is None else TaskEnd("failed", reason)


def _do(task: Task, progress: Progress) -> TaskEnd:
    from sitkit.runs.evaluate import measure_run
    from sitkit.runs.run import load
    from sitkit.training.train import run_training

    config = task.config
    note(task.path, "start")
    progress(Event("start", message=task.name))
    try:
        if task.kind == "train":
            run_training(config, progress)
        else:
            measure_run(load(config.run.folder / task.place.run, settings=config, device=config.run.device), progress)
    except Busy:
        note(task.path, "left to the process that is training it")
        return TaskEnd("busy")
    except (UserError, WorkFailed) as error:
        reason = str(error)
    except Exception as error:
        # An error of a plugin, or a lack of memory, must not stop the other cells.
        with task.path.open("a", encoding="utf-8") as file:
            file.write(traceback.format_exc())
        reason = f"{type(error).__name__}: {error}"
    except KeyboardInterrupt:
        note(task.path, "stopped")
        raise
    else:
        note(task.path, "done")
        return TaskEnd("done")
    note(task.path, f"{FAILED} {reason}")
    return TaskEnd("failed", reason)


class InProcess:
    """Does one task after another in this process."""

    def __init__(self) -> None:
        self._next: tuple[Task, str] | None = None

    def takes(self) -> bool:
        """Return whether there is no task."""
        return self._next is None

    def submit(self, task: Task, since: str) -> None:
        """Keep the task until `wait`."""
        self._next = task, since

    def wait(self, on_event: OnEvent) -> list[tuple[Task, TaskEnd]]:
        """Do the task."""
        if self._next is None:
            return []
        (task, since), self._next = self._next, None
        return [(task, perform(task, since, lambda event: on_event(task, event)))]

    def close(self) -> None:
        """Do nothing: no task runs any more."""


def task_to_plain(task: Task, since: str) -> dict[str, Any]:
    """Return a task as plain values for another process, with the folder from which its paths start."""
    log = str(task.path.absolute())
    return {"kind": task.kind, "config": task.config.plain(), "since": since, "cwd": os.getcwd(), "log": log}


def perform_plain(record: Mapping[str, Any], progress: Progress) -> TaskEnd:
    """Do a task that `task_to_plain` wrote.  Events go out every half second; messages go out at once."""
    last = 0.0

    def throttled(event: Event) -> None:
        nonlocal last
        now = time.monotonic()
        if event.message or now - last > 0.5:
            last = now
            progress(event)

    try:
        os.chdir(record["cwd"])
    except OSError as error:
        return TaskEnd("failed", f"{record['cwd']} cannot be entered on {node()}: {error.strerror}.")
    config = assemble([Layer(record["config"])])
    return perform(Task(record["kind"], config, location_of(config)), record["since"], throttled)
