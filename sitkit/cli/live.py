"""A live view of a study in a terminal: the state of each cell, the running tasks, and the time that is left."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sitkit.cli import console
from sitkit.runtime.progress import Event, Progress
from sitkit.runtime.progress_bar import format_values, terminal_text

if TYPE_CHECKING:
    from sitkit.studies.scheduler import TaskStatus, Work
    from sitkit.studies.status import StudyStatus

    Watch = Callable[[StudyStatus, Work], None]

# The states of a task and their colors.  A cell of several seeds shows the first of these that one of its seeds has.
COLORS = {
    "failed": "red", "training": "yellow", "sampling": "cyan", "measuring": "cyan", "elsewhere": "magenta",
    "queued": "dim", "waiting": "dim", "planned": "dim", "done": "green",
}  # fmt: skip


@contextmanager
def live_view() -> Iterator[tuple[Progress, Watch]]:
    """Yield a function for events, and one that starts the view of a study; outside a terminal events are plain lines."""
    if not console.err.is_terminal:
        with console.progress() as report:
            yield report, lambda status, work: None
        return
    with Live(console=console.err, refresh_per_second=2, transient=True) as live:
        yield print_message, lambda status, work: live.update(LiveView(status, work))


def print_message(event: Event) -> None:
    """Print the message of an event; the view itself shows the progress."""
    if event.message and event.stage != "start":
        console.note(event.message)


@dataclass(frozen=True)
class LiveView:
    """The view of a study: its cells, its running tasks, and a line with the totals."""

    status: StudyStatus
    work: Work

    def __rich__(self) -> Group:
        """Return the view as it is now; rich calls this for each frame."""
        running = [task for task in self.work.statuses.values() if task.state == "begun" and task.event]
        room = max(console.err.height - 12, 8)
        return Group(self._cells(room - min(len(running), room // 2)), *_tasks(running, room // 2), self._totals())

    def _cells(self, room: int) -> Table:
        """Return the table of rows and columns; each cell shows the finished seeds and the state of the others."""
        plan = self.status.plan
        states: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        for cell, place in self.status.located:
            states[cell.row, cell.column][self._state(place.training, place.measurement)] += 1
        for refused in plan.refused:
            states[refused.row, refused.column]["failed"] += 1
        rows, columns = (list(dict.fromkeys(names)) for names in zip(*states, strict=True))
        # Without room for every row, rows whose cells are all done or all planned are left out first.
        active = [row for row in rows if any(states[row, column].keys() - {"done", "planned"} for column in columns)]
        named = rows if len(rows) <= room else (active or rows)[:room]
        table = console.empty_table(("", *columns), plan.study.title)
        for row in named:
            table.add_row(terminal_text(row), *(_cell(states[row, column]) for column in columns))
        if len(named) < len(rows):
            table.add_row(f"[dim]and {len(rows) - len(named)} more rows[/]")
        return table

    def _state(self, training: str, measurement: str) -> str:
        before, task = self.work.statuses.get(training), self.work.statuses.get(measurement)
        if task is None:
            return "done"
        return state_of(before if before and before.state in ("begun", "elsewhere", "failed") else task)

    def _totals(self) -> Text:
        plan, tasks = self.status.plan, self.work.statuses
        measurements = [tasks.get(place.measurement) for _, place in self.status.located]
        finished = sum(task is None or task.state == "done" for task in measurements)
        trainings = [task.state for task in tasks.values() if task.task.kind == "train"]
        text = Text(f"cells {finished}/{len(plan.entries)}", style="bold")
        if trainings:
            text.append(f"   trainings {trainings.count('done')}/{len(trainings)}")
        for count, state in ((len(self.work.failed), "failed"), (len(plan.refused), "impossible")):
            if count:
                text.append(f"   {count} {state}", style="red")
        seconds = self.work.seconds_left()
        rest = "time left: not known yet" if seconds is None else f"{clock(seconds)} left"
        return text.append(f"   {rest}", style="dim")


def state_of(task: TaskStatus) -> str:
    """Return the state of a task in one word, a key of COLORS."""
    if task.state != "begun":
        return task.state
    if task.event is None:
        return "queued"
    if task.task.kind == "train":
        return "training"
    return "sampling" if task.event.stage in ("start", "sample") else "measuring"


def _cell(states: Counter[str]) -> Text:
    total = states.total()
    if not total:
        return Text("")
    state = next(name for name in COLORS if states[name])
    count = f"{states['done']}/{total} " if total > 1 else ""
    return Text(count, style="green" if states["done"] else "dim").append(state, style=COLORS[state])


def _tasks(running: list[TaskStatus], room: int) -> list[Any]:
    """Return a line for each running task: its state, its run, its progress and its speed."""
    table = Table.grid(padding=(0, 2))
    for task in running[:room]:
        state, part = state_of(task), task.part
        values = format_values(task.event.values) if task.event else ""
        bar = ProgressBar(total=100, completed=100 * part, width=20)
        words = Text(state, style=COLORS[state]), terminal_text(task.task.place.run)
        table.add_row(*words, bar, f"{part:.0%}", values, clock(task.seconds))
    if len(running) > room:
        table.add_row(f"[dim]and {len(running) - room} more[/]")
    return ["", table, ""]


def clock(seconds: float) -> str:
    """Return a time as minutes and seconds, or as hours, minutes and seconds: 3723 is "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
