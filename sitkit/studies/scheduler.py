"""The tasks of a study on their way: which is next, what its end means, and how long the rest takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from sitkit.runtime.progress import Event, Progress, silent
from sitkit.studies.executors import POLL_SECONDS, Ended, Executor
from sitkit.studies.tasks import Task, note, now

# How often a task is begun again whose worker died.
RETRIES = 2


@dataclass
class TaskStatus:
    """Where a task is: it can begin, waits for its training, has begun, is another process's, or has ended.

    event: what it said last, None until it says that it starts, which may be long after a cluster was given it.
    part: how much of it is there, from 0 to 1; before: how much of that was there when it began.
    began, ended: by time.monotonic().
    """

    task: Task
    state: Literal["planned", "waiting", "begun", "elsewhere", "done", "failed"]
    event: Event | None = None
    began: float | None = None
    ended: float | None = None
    part: float = 0.0
    before: float = 0.0
    deaths: int = 0
    again: float = 0.0

    @property
    def seconds(self) -> float:
        """How long it has been worked on."""
        return 0.0 if self.began is None else (self.ended or time.monotonic()) - self.began


class Work:
    """Tasks, in the order in which they begin as soon as they can, and where each of them is."""

    def __init__(self, tasks: Sequence[Task], progress: Progress = silent) -> None:
        self.progress = progress
        self.failed: dict[str, str] = {}
        trainings = {task.key for task in tasks if task.kind == "train"}
        self.standings = {
            task.key: TaskStatus(task, "waiting" if task.after in trainings else "planned") for task in tasks
        }
        self._open = dict(self.standings)
        self._begun = 0

    def do(self, executor: Executor, ended: Callable[[Task], None] = lambda task: None) -> None:
        """Do every task, a measurement once its training is there; `ended` is called with each that has come to an end.

        What another process is at is left to it and looked at again a second later.  A task whose worker dies is begun
        again, at most RETRIES times.  One that fails stops nothing but the measurements that need it; why is in `failed`.
        """
        since = now()
        try:
            while self._open:
                while executor.takes() and (standing := self._next()) is not None:
                    standing.state, standing.event, standing.began, standing.part = "begun", None, None, 0.0
                    self._begun += 1
                    executor.submit(standing.task, since)
                if self._open and not self._begun:
                    time.sleep(POLL_SECONDS)
                for task, end in executor.wait(self._hear):
                    self._begun -= 1
                    if self._ends(self.standings[task.key], end):
                        ended(task)
        finally:
            executor.close()

    def left(self) -> float | None:
        """Seconds until all is done, at the pace so far of trainings and measurements; None before both are known."""
        seconds = 0.0
        for kind in ("train", "measure"):
            known = [standing for standing in self.standings.values() if standing.task.kind == kind]
            rest = sum(1 - standing.part for standing in known if standing.state in ("planned", "waiting", "begun"))
            done = sum(standing.part - standing.before for standing in known if standing.began is not None)
            if rest and not done:
                return None
            seconds += rest * sum(standing.seconds for standing in known) / done if rest else 0.0
        going = sum(standing.state == "begun" and standing.began is not None for standing in self.standings.values())
        return seconds / max(going, 1)

    def _next(self) -> TaskStatus | None:
        for standing in self._open.values():
            waits = standing.task.after in self._open or standing.again > time.monotonic()
            if standing.state != "begun" and not waits:
                return standing
        return None

    def _hear(self, task: Task, event: Event) -> None:
        standing = self.standings[task.key]
        standing.event = event
        if event.stage == "start":
            standing.began = time.monotonic()
        elif event.total and event.stage in ("train", "sample"):
            # A measurement is the drawing of its samples and little else.
            standing.part = event.done / event.total
            if event.message:
                # What a training continues from.
                standing.before = standing.part
        self.progress(event._replace(task=task.name))

    def _ends(self, standing: TaskStatus, end: Ended) -> bool:
        """Take down how a task ended; whether that was its end."""
        task = standing.task
        if end.how == "busy":
            standing.state, standing.again = "elsewhere", time.monotonic() + POLL_SECONDS
            return False
        if end.how == "died":
            standing.deaths += 1
            note(task.path, f"died: {end.reason}")
            if standing.deaths <= RETRIES:
                standing.state = "planned"
                self._say(f"{task.name}: {end.reason}; it is begun again.")
                return False
        standing.ended = time.monotonic()
        standing.state, standing.part = ("done", 1.0) if end.how == "done" else ("failed", standing.part)
        del self._open[task.key]
        for other in [other for other in self._open.values() if other.task.after == task.key]:
            other.state = "planned" if standing.state == "done" else "failed"
            if other.state == "failed":
                del self._open[other.task.key]
        if standing.state == "failed":
            times = f", {standing.deaths} times" if standing.deaths > RETRIES else ""
            self.failed[task.key] = f"{end.reason.rstrip('.')}{times}." if times else end.reason
            self._say(f"{task.name} failed: {self.failed[task.key]}")
        left = self.left()
        told = {} if left is None else {"minutes left": left / 60}
        self.progress(Event("study", len(self.standings) - len(self._open), len(self.standings), told))
        return True

    def _say(self, message: str) -> None:
        self.progress(Event("study", message=message))
