"""The tasks of a study in progress: the next task, the end of each, and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from sitkit.runtime.progress import Event, Progress, silent
from sitkit.studies.executors import POLL_SECONDS, Executor, TaskEnd
from sitkit.studies.tasks import Task, note, now

# A task whose worker died is begun again, at most this number of times.
RETRIES = 2


@dataclass
class TaskStatus:
    """Status of a task: ready, waiting for its training, running, running in another process, or finished.

    event: the latest event; None until the task starts, which may be long after it was submitted.
    part: the finished part, from 0 to 1; before: the part that was finished at the start.
    began, ended, retry_at: times of time.monotonic().  deaths: how often a worker died of it.
    """

    task: Task
    state: Literal["planned", "waiting", "begun", "elsewhere", "done", "failed"]
    event: Event | None = None
    began: float | None = None
    ended: float | None = None
    part: float = 0.0
    before: float = 0.0
    deaths: int = 0
    retry_at: float = 0.0

    @property
    def seconds(self) -> float:
        """The seconds of work so far."""
        return 0.0 if self.began is None else (self.ended or time.monotonic()) - self.began


class Work:
    """Tasks, in the order in which they begin as soon as they can, and the status of each."""

    def __init__(self, tasks: Sequence[Task], progress: Progress = silent) -> None:
        self.progress = progress
        self.failed: dict[str, str] = {}
        trainings = {task.key for task in tasks if task.kind == "train"}
        self.statuses = {
            task.key: TaskStatus(task, "waiting" if task.after in trainings else "planned") for task in tasks
        }
        self._open = dict(self.statuses)
        self._running = 0

    def do(self, executor: Executor, on_end: Callable[[Task], None] = lambda task: None) -> None:
        """Do every task, a measurement after its training; `on_end` is called with each task that has ended.

        A task that another process does is left to it and looked at again a second later.  A task whose worker dies is
        begun again, at most RETRIES times.  A failure stops only the measurements that need the task; its reason is in
        `failed`.
        """
        since = now()
        try:
            while self._open:
                while executor.takes() and (status := self._next()) is not None:
                    status.state, status.event, status.began, status.part = "begun", None, None, 0.0
                    self._running += 1
                    executor.submit(status.task, since)
                if self._open and not self._running:
                    time.sleep(POLL_SECONDS)
                for task, end in executor.wait(self._on_event):
                    self._running -= 1
                    if self._has_ended(self.statuses[task.key], end):
                        on_end(task)
        finally:
            executor.close()

    def seconds_left(self) -> float | None:
        """Return the seconds until everything is done, at the pace of trainings and measurements so far, or None."""
        seconds = 0.0
        for kind in ("train", "measure"):
            statuses = [status for status in self.statuses.values() if status.task.kind == kind]
            rest = sum(1 - status.part for status in statuses if status.state in ("planned", "waiting", "begun"))
            done = sum(status.part - status.before for status in statuses if status.began is not None)
            if rest and not done:
                return None
            seconds += rest * sum(status.seconds for status in statuses) / done if rest else 0.0
        running = sum(status.state == "begun" and status.began is not None for status in self.statuses.values())
        return seconds / max(running, 1)

    def _next(self) -> TaskStatus | None:
        for status in self._open.values():
            waits = status.task.after in self._open or status.retry_at > time.monotonic()
            if status.state != "begun" and not waits:
                return status
        return None

    def _on_event(self, task: Task, event: Event) -> None:
        status = self.statuses[task.key]
        status.event = event
        if event.stage == "start":
            status.began = time.monotonic()
        elif event.total and event.stage in ("train", "sample"):
            # A measurement spends nearly all of its time on its samples.
            status.part = event.done / event.total
            if event.message:
                # A training that continues says where it begins.
                status.before = status.part
        self.progress(event._replace(task=task.name))

    def _has_ended(self, status: TaskStatus, end: TaskEnd) -> bool:
        """Note the end of a task; return False if the task is to be done again."""
        task = status.task
        if end.how == "busy":
            status.state, status.retry_at = "elsewhere", time.monotonic() + POLL_SECONDS
            return False
        if end.how == "died":
            status.deaths += 1
            note(task.path, f"died: {end.reason}")
            if status.deaths <= RETRIES:
                status.state = "planned"
                self._say(f"{task.name}: {end.reason}; it is begun again.")
                return False
        status.ended = time.monotonic()
        if end.how == "done":
            status.state, status.part = "done", 1.0
        else:
            status.state = "failed"
            died = status.deaths > RETRIES
            self.failed[task.key] = f"{end.reason.rstrip('.')}, {status.deaths} times." if died else end.reason
            self._say(f"{task.name} failed: {self.failed[task.key]}")
        del self._open[task.key]
        for other in [other for other in self._open.values() if other.task.after == task.key]:
            other.state = "planned" if status.state == "done" else "failed"
            if other.state == "failed":
                del self._open[other.task.key]
        seconds = self.seconds_left()
        values = {} if seconds is None else {"minutes left": seconds / 60}
        self.progress(Event("study", len(self.statuses) - len(self._open), len(self.statuses), values))
        return True

    def _say(self, message: str) -> None:
        self.progress(Event("study", message=message))
