"""A live bar for long work: in a terminal, in Jupyter, or as lines of a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sitkit.runtime.files import visible
from sitkit.runtime.progress import Event, Progress, silent

# Seconds that work may take before Python shows a bar for it.
DELAY = 2.0


@contextmanager
def reporting(progress: Progress | None) -> Iterator[Progress]:
    """Yield the function that receives the events of a piece of work.

    `progress` itself if there is one.  Otherwise a live bar, in a terminal or in Jupyter, which appears when the work is
    longer than two seconds; elsewhere nothing is shown.
    """
    if progress is not None:
        yield progress
    elif _in_jupyter():
        with _jupyter_bars(DELAY) as report:
            yield report
    elif sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        from rich.console import Console

        with bars(Console(stderr=True, highlight=False, emoji=False), DELAY) as report:
            yield report
    else:
        yield silent


def _in_jupyter() -> bool:
    try:
        return get_ipython().__class__.__name__ == "ZMQInteractiveShell"  # pyright: ignore[reportUndefinedVariable]
    except NameError:
        return False


@contextmanager
def bars(console: Any, delay: float = 0.0) -> Iterator[Progress]:
    """Yield a function that draws a bar for each stage of the work, from `delay` seconds on."""
    table = _table(console)
    began, tasks = time.monotonic(), {}

    def report(event: Event) -> None:
        if event.message:
            table.console.print(terminal_text(event.message))
        _update(table, tasks, event)
        if not table.live.is_started and time.monotonic() - began >= delay:
            table.start()

    try:
        if not delay:
            table.start()
        yield report
    finally:
        table.stop()


@contextmanager
def _jupyter_bars(delay: float) -> Iterator[Progress]:
    """Yield a function that draws the bars into one output of a notebook's cell, five times a second at most."""
    import io

    from IPython.display import display  # pyright: ignore[reportPrivateImportUsage]
    from rich.console import Console

    console = Console(file=io.StringIO(), width=100, force_jupyter=False, force_terminal=False)
    table = _table(console)
    began, last, tasks, handle = time.monotonic(), 0.0, {}, None

    def draw() -> None:
        nonlocal handle
        with console.capture() as capture:
            console.print(table.get_renderable())
        content = {"text/plain": capture.get().rstrip()}
        if handle is None:
            handle = display(content, raw=True, display_id=True)
        else:
            handle.update(content, raw=True)

    def report(event: Event) -> None:
        nonlocal last
        if event.message:
            print(visible(event.message))
        _update(table, tasks, event)
        now = time.monotonic()
        if now - began >= delay and now - last >= 0.2:
            last = now
            draw()

    yield report
    if handle is not None:
        draw()


def _table(console: Any) -> Any:
    """Return rich's table of bars.  In a narrow terminal the bar shrinks first; counts and times are never cut."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.table import Column

    return Bars(
        TextColumn("{task.description}"),
        BarColumn(max(4, min(40, console.width - 80))),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}", table_column=Column(overflow="fold")),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def _update(table: Any, tasks: dict[str, Any], event: Event) -> None:
    if not event.total:
        return
    stage, numbers = terminal_text(event.stage), terminal_text(format_values(event.values))
    if event.stage not in tasks or event.done < table.tasks[table.task_ids.index(tasks[event.stage])].completed:
        if event.stage in tasks:
            table.remove_task(tasks[event.stage])
        tasks[event.stage] = table.add_task(stage, total=event.total, numbers="")
    table.update(tasks[event.stage], completed=event.done, total=event.total, numbers=numbers)


@contextmanager
def log_lines(console: Any, every: float = 5.0) -> Iterator[Progress]:
    """Yield a function that prints a line for each stage every few seconds, for a log."""
    times: dict[tuple[str, str], float] = {}
    last: dict[tuple[str, str], tuple[int, int]] = {}

    def report(event: Event) -> None:
        if event.message:
            console.print(terminal_text(event.message))
        now, stage, place = time.monotonic(), (event.task, event.stage), (event.done, event.total)
        if place == last.get(stage):
            return
        if event.total and (event.done == event.total or now - times.get(stage, -every) >= every):
            times[stage], last[stage] = now, place
            task = f"{event.task}: " if event.task else ""
            line = f"{task}{event.stage} {event.done}/{event.total} {format_values(event.values)}"
            console.print(terminal_text(line.rstrip()))

    yield report


def terminal_text(text: object) -> str:
    """Return a text for a terminal: nothing in it is markup, and no control character reaches the terminal."""
    from rich.markup import escape

    return escape(visible(str(text)))


def format_values(values: Mapping[str, float]) -> str:
    """Return numbers with their names, as in "loss 0.123  images/s 4567"."""
    return "  ".join(
        f"{name} {value:.4g}" if abs(value) < 1000 else f"{name} {value:.0f}" for name, value in values.items()
    )
