"""A study while it is being done: the state of each cell, what is going on, and the time that is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sitkit.cli import console
from sitkit.runtime.progress import Event, Progress
from sitkit.runtime.progress_bar import format_values

if TYPE_CHECKING:
    from sitkit.studies.scheduler import TaskStatus, Work
    from sitkit.studies.status import StudyStatus

    Watch = Callable[[StudyStatus, Work], None]

COLORS = {
    "planned": "dim", "waiting": "dim", "queued": "dim", "training": "yellow", "sampling": "cyan", "measuring": "cyan",
    "elsewhere": "magenta", "done": "green", "failed": "red",
}  # fmt: skip
# What a cell of several seeds shows beside their number: the first of these that one of them is in.
ORDER = ("failed", "training", "sampling", "measuring", "elsewhere", "queued", "waiting", "planned", "done")


@contextmanager
def live_view() -> Iterator[tuple[Progress, Watch]]:
    """Functions for events and for the work that they are of: a live board on a terminal, else plain lines."""
    if not console.err.is_terminal:
        with console.progress() as report:
            yield report, lambda board, work: None
        return
    drawn = LiveView()
    with Live(get_renderable=drawn.draw, console=console.err, refresh_per_second=2, transient=True):
        yield drawn.on_event, drawn.attach


class LiveView:
    """The board of a study."""

    def __init__(self) -> None:
        self.board: StudyStatus | None = None
        self.work: Work | None = None

    def attach(self, board: StudyStatus, work: Work) -> None:
        """Look at this work from now on."""
        self.board, self.work = board, work

    def on_event(self, event: Event) -> None:
        """Print messages; the board shows progress."""
        if event.message and event.stage != "start":
            console.err.print(escape(event.message))

    def draw(self) -> Group:
        """The board as it is now."""
        if self.board is None or self.work is None:
            return Group()
        going = [standing for standing in self.work.statuses.values() if standing.state == "begun" and standing.event]
        room = max(console.err.height - 12, 8)
        return Group(self._cells(room - min(len(going), room // 2)), *_tasks(going, room // 2), self._sum())

    def _cells(self, room: int) -> Table:
        """Rows and columns of the study: how many seeds are done, and what goes on with the others."""
        assert self.board is not None
        seen: dict[tuple[str, str], Counter[str]] = {}
        for cell, place in self.board.located:
            seen.setdefault((cell.row, cell.column), Counter())[self._state(place.training, place.measurement)] += 1
        for refused in self.board.plan.refused:
            seen.setdefault((refused.row, refused.column), Counter())["failed"] += 1
        rows, columns = (list(dict.fromkeys(key[i] for key in seen)) for i in (0, 1))
        # Where not all rows have room, those in which something is to be seen.
        quiet = {"done", "planned"}
        rest = [row for row in rows if any({*seen.get((row, column), ())} - quiet for column in columns)]
        shown = rows if len(rows) <= room else (rest or rows)[:room]
        title = escape(self.board.plan.study.title)
        table = Table(
            "", *map(escape, columns), title=title or None, title_justify="left", header_style="bold", show_edge=False
        )
        for row in shown:
            table.add_row(escape(row), *(_cell(seen.get((row, column), Counter())) for column in columns))
        if len(shown) < len(rows):
            table.add_row(f"[dim]and {len(rows) - len(shown)} more rows[/]")
        return table

    def _state(self, training: str, measurement: str) -> str:
        assert self.work is not None
        standing = self.work.statuses.get(measurement)
        if standing is None:
            return "done"
        before = self.work.statuses.get(training)
        if before is not None and before.state in ("begun", "elsewhere", "failed"):
            return state(before)
        return state(standing)

    def _sum(self) -> Text:
        assert self.board is not None and self.work is not None
        plan, standings = self.board.plan, self.work.statuses
        measured = [standings.get(place.measurement) for _, place in self.board.located]
        done = sum(standing is None or standing.state == "done" for standing in measured)
        trainings = [standing.state for standing in standings.values() if standing.task.kind == "train"]
        told = [f"cells {done}/{len(plan.entries)}"]
        told += [f"trainings {trainings.count('done')}/{len(trainings)}"] if trainings else []
        text, left = Text("   ".join(told), style="bold"), self.work.seconds_left()
        for count, what in ((len(self.work.failed), "failed"), (len(plan.refused), "impossible")):
            if count:
                text.append(f"   {count} {what}", style="red")
        return text.append(f"   {clock(left)} left" if left is not None else "   time left: not known yet", style="dim")


def state(standing: TaskStatus) -> str:
    """A task's state in a word."""
    if standing.state != "begun":
        return standing.state
    if standing.event is None:
        return "queued"
    if standing.task.kind == "train":
        return "training"
    return "sampling" if standing.event.stage in ("start", "sample") else "measuring"


def _cell(states: Counter[str]) -> Text:
    total = states.total()
    if not total:
        return Text("")
    shown = next(name for name in ORDER if states[name])
    count = f"{states['done']}/{total} " if total > 1 else ""
    return Text(count, style="green" if states["done"] else "dim").append(shown, style=COLORS[shown])


def _tasks(going: list[TaskStatus], room: int) -> list[Any]:
    """A line for each task that is going on: how far it is and how fast."""
    from rich.progress_bar import ProgressBar

    table = Table.grid(padding=(0, 2))
    for standing in going[:room]:
        event = standing.event
        assert event is not None
        values = format_values(event.values)
        bar = ProgressBar(total=100, completed=100 * standing.part, width=20)
        stage = state(standing)
        table.add_row(
            Text(stage, style=COLORS[stage]), escape(standing.task.place.run), bar, f"{standing.part:.0%}", values,
            clock(standing.seconds),
        )  # fmt: skip
    if len(going) > room:
        table.add_row(f"[dim]and {len(going) - room} more[/]")
    return ["", table, ""]


def clock(seconds: float) -> str:
    """3723 -> "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
